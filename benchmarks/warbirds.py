"""Fine-tune MobileNet-v1 0.75 with its ImageNet weights on photographs of 30 aircraft types, in seven arms.

    python benchmarks/warbirds.py PATH

PATH contains `data/warbirds30` (an FGVC-Aircraft tree), `data/imagenet_sample` (pictures with a `labels.csv`) and
`weights/mobilenetv1_075_imagenet.safetensors`. Half of the ImageNet pictures estimate the Fisher, the other half
measure retention. Each finished run is a row of `runs.csv`; a second call does only the runs that are missing.
"""
import platform
from functools import partial
from pathlib import Path
import pandas as pd, torch
from fastcore.script import call_parse
from timm.models.efficientnet import _gen_mobilenet_v1
from fgvc_fisher.data import read_pictures
from fgvc_fisher.experiment import Run, curves, fine_tune, frontier, run_arm, show_table, table
from fgvc_fisher.fisher import estimate_fisher
from fgvc_fisher.learner import source_dl, source_model
from fgvc_fisher.retention import accuracy_on, halves

ARMS = {'plain': {}, 'L2-SP-Fisher, beta = 10': dict(beta=10.), 'L2-SP, 1e-2': dict(l2sp=1e-2),
        'L2-SP-Fisher, beta = 100': dict(beta=100.), 'L2, 5e-4': dict(alpha=5e-4),
        'L2-SP-Fisher, beta = 1': dict(beta=1.),
        'L2-SP-Fisher, beta = 1, explicit': dict(beta=1., step='grad')}

mobilenet = partial(_gen_mobilenet_v1, 'mobilenetv1_100', 0.75, pretrained=False, pad_type='same', bn_eps=1e-3)

def machine(device):
    cpu = f'{torch.get_num_threads()} CPU threads, {platform.machine()}'
    name = torch.cuda.get_device_name() if device=='cuda' else cpu
    return f'{name}; Python {platform.python_version()}, torch {torch.__version__}'

def rows(file): return pd.read_csv(file) if file.exists() else pd.DataFrame(columns=['arm','seed'])

def append(new, file): pd.concat([rows(file), new]).to_csv(file, index=False, float_format='%.6g')

def report(runs, out):
    "The table and the picture, from the rows"
    shown = show_table(table(runs))
    shown.to_csv(Path(out)/'table.csv')
    frontier(runs).figure.savefig(Path(out)/'frontier.png', dpi=100)
    print(shown.to_string())

def task(photos, size):
    "The aircraft's tree, the source model, and loaders of ImageNet pictures: for the Fisher, for the retention"
    photos,device = Path(photos),'cuda' if torch.cuda.is_available() else 'cpu'
    source = source_model(mobilenet, photos/'weights/mobilenetv1_075_imagenet.safetensors').to(device)
    parts = halves(read_pictures(photos/'data/imagenet_sample'))
    return photos/'data/warbirds30',source,*[source_dl(o, source, size) for o in parts]

def run_arms(arms, photos, out, size, epochs, seeds):
    """Do the runs that are not in `out/runs.csv` yet, and return the Fisher.
    `arms`: name -> keywords of `Run`, and `tune` for another way to train"""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tree,source,for_fisher,for_retention = task(photos, size)
    device = next(source.parameters()).device.type
    before,fisher = accuracy_on(source, for_retention),estimate_fisher(source, for_fisher)
    for seed in seeds:
        for arm,kw in arms.items():
            done,kw = rows(out/'runs.csv'),dict(kw)
            if ((done.arm==arm) & (done.seed==seed)).any(): continue
            print(f'\n{arm}, seed {seed}', flush=True)
            tune = kw.pop('tune', fine_tune)
            run = Run(str(tree), arm, size=size, seed=seed, **dict(epochs=epochs) | kw)
            row,curve,_ = run_arm(run, source, for_retention, fisher, tune)
            append(curve, out/'curves.csv')
            append(pd.DataFrame([row | dict(data=tree.name, before=before, machine=machine(device))]), out/'runs.csv')
    return fisher

@call_parse
def main(
    photos:str, # Folder with data/ and weights/
    out:str='results/warbirds30', # Folder for the rows, the table and the pictures
    epochs:int=4, # Passes over the training split
    size:int=128, # Side of the pictures in pixels
    seeds:int=2, # Runs per arm
    first:int=42, # The first seed; the others follow
):
    fisher = run_arms(ARMS, photos, out, size, epochs, range(first, first+seeds))
    fisher.summary().to_csv(Path(out)/'fisher.csv', index=False, float_format='%.6g')
    report(rows(Path(out)/'runs.csv').sort_values(['seed','beta'], kind='stable'), out)
    curves(rows(Path(out)/'curves.csv')).savefig(Path(out)/'curves.png', dpi=100)
