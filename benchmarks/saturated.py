"""Why does a channel without Fisher information move in trainings on small pictures, and not on larger ones?

    python benchmarks/saturated.py PHOTOS

Nothing is trained. `benchmarks/unprotected.py` names the channel (`CHANNEL`) whose movement costs the most of ImageNet:
its activation, a ReLU6, takes only the values 0 and 6, and passes no gradient on. This gives the untrained network
pictures of each size, normalised by the running statistics, as when the Fisher information is estimated, and by those
of each batch, as in training. A row each, in `results/aircraft/saturated.csv`:

- task, pictures: whose pictures, and how many
- statistics: `running` or `batch`
- deviation: what BatchNorm divides the channel by, the square root of the mean variance
- open: the share of the activations between 0 and 6, which alone pass a gradient on
- gradient: the length of the gradient of the log-likelihood, relative to the median of the layer's channels; mean over
  the batches
"""
import copy
from pathlib import Path
import pandas as pd, torch
from fastcore.script import call_parse
import aircraft
from unprotected import gradient, norm_after
from fgvc_fisher.data import read_aircraft
from fgvc_fisher.data.tables import pick_split, read_folder
from fgvc_fisher.learner import source_dl, source_model

CHANNEL = 'blocks.1.1.conv_dw.weight',33
SIZES = 128,160,192,224,256
N,BS = 128,32

def look(model, batches, parameter, channel):
    "What one channel does on some batches, by the statistics of the mode that the model is in"
    norm,found = norm_after(model, batches[0]).get(parameter),[]
    def note(module, args, out):
        variance = args[0][:,channel].var() if module.training else module.running_var[channel]
        between = ((out[:,channel]>0) & (out[:,channel]<6)).float().mean()
        found.append(dict(variance=variance.item(), open=between.item()))
    hook = norm.register_forward_hook(note)
    for images in batches:
        lengths = gradient(model, images, parameter).flatten(1).norm(dim=1)
        found[-1]['gradient'] = (lengths[channel]/lengths.median()).item()
    hook.remove()
    mean = pd.DataFrame(found).mean()
    return dict(deviation=mean.variance**0.5, open=mean.open, gradient=mean.gradient)

@call_parse
def main(
    photos:str, # Folder with data/ and weights/, as for `benchmarks/aircraft.py`
    out:str='results/aircraft', # Folder for the table
):
    "Look at each size and write the table."
    photos,rows = Path(photos),[]
    model = source_model(aircraft.NETWORK['arch'], photos/'weights'/aircraft.NETWORK['weights'])
    tables = dict(aircraft=pick_split(read_aircraft(photos/'data/fgvc20'), 'train'),
                  imagenet=read_folder(photos/'data'/aircraft.SOURCES[0]))
    for size in SIZES:
        for task,table in tables.items():
            some = table.sample(min(N, len(table)), random_state=0)
            batches = [x.as_subclass(torch.Tensor) for x,_ in source_dl(some, model, size, BS, num_workers=0)]
            for statistics in ('running','batch'):
                found = look(copy.deepcopy(model).train(statistics=='batch'), batches, *CHANNEL)
                rows.append(dict(size=size, task=task, pictures=len(some), statistics=statistics) | found)
        pd.DataFrame(rows).to_csv(Path(out)/'saturated.csv', index=False, float_format='%.6g')
    print(pd.DataFrame(rows).to_string(index=False))
