"""How much of ImageNet do the BatchNorm statistics of another task cost by themselves?

    python benchmarks/norm_statistics.py PHOTOS

Nothing is trained. A network with its ImageNet weights gets the statistics of pictures of aircraft (`data/fgvc20`,
training split) in place of its own, in all of its BatchNorm layers, or in the first or second half of them. Its
accuracy on ImageNet with each is a row of `results/aircraft/norm_statistics.csv`. A penalty on the parameters cannot be
expected to keep what is lost here, as long as the statistics are the aircraft's. Two tensors of Inception-v4 are
substitutes, which were not fitted on the pictures that it is measured on here.
"""
import copy
from pathlib import Path
import pandas as pd
from fastcore.script import call_parse
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from aircraft import INCEPTION, LARGER, NETWORK, PAPER_SIZE, SIZE, join_sources
from fgvc_fisher.data import read_aircraft
from fgvc_fisher.data.tables import pick_split, read_folder
from fgvc_fisher.learner import source_dl, source_model
from fgvc_fisher.retention import accuracy_on, source_parts

MOBILENET = dict(arch='warbirds:mobilenet', weights='mobilenetv1_075_imagenet.safetensors')
NETWORKS = [(NETWORK, SIZE), (MOBILENET, SIZE), (NETWORK, LARGER), (INCEPTION, PAPER_SIZE)] # and pixels

def norms(model): return [m for m in model.modules() if isinstance(m, _BatchNorm)]

def with_statistics(model, other, chosen):
    "A copy of a model with the BatchNorm statistics of another in some of its layers"
    model = copy.deepcopy(model)
    for i in chosen: norms(model)[i].load_state_dict(norms(other)[i].state_dict())
    return model

def examine(arch, weights, source, target, size):
    "The rows of a network"
    model = source_model(arch, weights).eval()
    _,for_retention = source_parts(read_folder(source))
    pictures = list(source_dl(for_retention, model, size, num_workers=0))
    other = copy.deepcopy(model)
    update_bn((x for x,_ in source_dl(target, model, size, num_workers=0)), other)
    other.eval()
    n = len(norms(model))
    chosen = {'none': [], 'all': range(n), 'the first half': range(n//2), 'the second half': range(n//2, n)}
    return [dict(arch=arch, size=size, layers=k, n_layers=len(v), pictures=len(target),
                 accuracy=accuracy_on(with_statistics(model, other, v), pictures))
            for k,v in chosen.items()]

@call_parse
def main(
    photos:str, # Folder with data/ and weights/, as for `benchmarks/aircraft.py`
    out:str='results/aircraft', # Folder for the table
    work:str='.keep/aircraft', # Folder for the joined source pictures
):
    "Measure each network and write the table."
    photos,rows = Path(photos),[]
    joined,sample = join_sources(photos, Path(work)/'imagenet'),photos/'data/imagenet_sample'
    target = pick_split(read_aircraft(photos/'data/fgvc20'), 'train')
    for network,size in NETWORKS:
        source = sample if network is INCEPTION else joined           # its substitutes were fitted on the others
        rows += examine(network['arch'], photos/'weights'/network['weights'], source, target, size)
        pd.DataFrame(rows).to_csv(Path(out)/'norm_statistics.csv', index=False, float_format='%.6g')
    print(pd.DataFrame(rows).to_string(index=False))
