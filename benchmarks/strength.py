"""Does one strength of the Fisher term mean the same for four networks? A scan of each.

    python benchmarks/strength.py --photos PHOTOS            # resumes if interrupted
    python benchmarks/strength.py                            # only the table, from `results/strength`

PHOTOS contains `data/fgvc20` (an FGVC-Aircraft tree), `data/imagenet_sample` (pictures with a `labels.csv`) and the
weights of EfficientNet-Lite0, MobileNet-v1 0.75 and SqueezeNet in `weights/`. EfficientNet-Lite0 is fine-tuned on
`fgvc20` and the demo's network on its drawn task, with one seed: enough to see where a network begins to retain, and no
more. The runs of MobileNet and SqueezeNet are those of `benchmarks/evidence.py` (three seeds): only the mean of their
Fisher is measured here, which turns each beta into a strength.
"""
import dataclasses
from pathlib import Path
import pandas as pd
from fastcore.script import call_parse
from evidence import settings
from fgvc_fisher.experiment import Run, grid, read_runs, sweep
from fgvc_fisher.experiment.demo import draw_task
from fgvc_fisher.experiment.run import run_source
from fgvc_fisher.learner import head_names

ARMS = [dict(arm='plain'), dict(arm='L2-SP-Fisher', strength=[0.05, 0.1, 0.25, 0.5, 1., 2., 5.])]
LITE0,OF_EVIDENCE = 'EfficientNet-Lite0',{'MobileNet-v1 0.75': 'mobilenet', 'SqueezeNet 1.1': 'squeezenet'}

def mean_fisher(run, shared):
    "The mean of the Fisher over the parameters that the source and the fine-tuned network share"
    source = run_source(dataclasses.replace(run, strength=1.), shared, progress=False)
    heads = tuple(f'{o}.' for o in head_names(source.model))
    body = [v for k,v in source.fisher.sums.items() if not k.startswith(heads)]
    return sum(v.double().sum().item() for v in body)/sum(v.numel() for v in body)/source.fisher.n_images

def trained(name, photos, work, **kwargs):
    "Rows of runs that are done here"
    if name=='demo': task = draw_task(work/'task', num_workers=0) | dict(epochs=8)
    else: task = dict(data=photos/'data/fgvc20', source=photos/'data/imagenet_sample', arch='tf_efficientnet_lite0',
                      weights=photos/'weights/tf_efficientnet_lite0_imagenet_fp16.safetensors', **kwargs)
    runs = grid(ARMS, [42], **task)
    sweep(runs, work)
    return read_runs(work).assign(mean_fisher=mean_fisher(runs[0], work/'sources'))

def of_evidence(name, photos, work, **kwargs):
    "Rows of the evidence, each beta as a strength"
    rows = pd.read_csv('results/evidence/runs.csv')
    chosen = (rows.tree=='warbirds30') & (rows.network==OF_EVIDENCE[name])
    rows = rows[chosen & rows.arm.str.match('plain$|L2-SP-Fisher,')]
    mean = mean_fisher(Run(**settings(photos, 'warbirds30', OF_EVIDENCE[name], **kwargs)), work/'sources')
    return rows.assign(strength=rows.beta*mean, mean_fisher=mean)

def report(out):
    "The table"
    rows = pd.read_csv(out/'runs.csv')
    shown = {'mean_fisher': 'mean F', 'last': 'target', 'retention_target_bn': 'retention',
             'retention_source_bn': "retention, source's BatchNorm", 'before': 'before'}
    t = rows.groupby(['network','strength'], sort=False)[list(shown)].mean().rename(columns=shown)
    t.insert(1, 'beta', t.index.get_level_values('strength')/t['mean F'])
    t = t.sort_index(level=['network','strength'])
    t.to_csv(out/'table.csv', float_format='%.4g')
    return t

@call_parse
def main(
    photos:str='', # Folder with `data` and `weights`; empty: only report
    out:str='results/strength', # Where the rows go
    work:str='.keep/strength', # Where the runs go, outside version control
    networks:str=','.join([LITE0,*OF_EVIDENCE,'demo']), # Which, separated by commas
    size:int=128, # Side of the pictures in pixels
    epochs:int=6, # Passes over the training split of `fgvc20`
    num_workers:int=0, # Processes per run that load pictures
):
    "Scan the strengths."
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name in networks.split(',') if photos else []:
        measure,how = (of_evidence, {}) if name in OF_EVIDENCE else (trained, dict(epochs=epochs))
        folder = Path(work)/name.replace(' ', '-')
        found = measure(name, Path(photos), folder, size=size, num_workers=num_workers, **how)
        found = found.assign(network=name, **{o: [Path(v).name for v in found[o].astype(str)]
                                              for o in ('data','source','weights')})
        file = out/'runs.csv'
        before = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=['network'])
        pd.concat([before[before.network!=name], found]).to_csv(file, index=False)
    print(report(out).round(3).to_string())
