"""The paper's question on its own pictures: 20 variants of FGVC-Aircraft, EfficientNet-Lite0 and real ImageNet weights.

    python benchmarks/aircraft.py --photos PHOTOS --jobs 2                  # every stage; resumes if interrupted
    python benchmarks/aircraft.py --photos PHOTOS --stages main --seeds 5   # some stages
    python benchmarks/aircraft.py                                           # only the tables, from `results/aircraft`

PHOTOS contains `data/fgvc20` (an FGVC-Aircraft tree), `data/imagenet_sample` and `data/imagenet_extra` (pictures with a
`labels.csv`) and the weights in `weights/`. Every other ImageNet picture of a class estimates the Fisher, the others
measure retention. Everything is chosen on the validation split: the stages `epochs` and `rate`, on plain runs alone,
come first, and the later ones use what they found (`EPOCHS`, `RATE`). A run that has a row in OUT is not done again.
`nbs/evidence.ipynb` reads the rows. What was set about memory in `benchmarks/evidence.py` holds here, too.
"""
import os
from pathlib import Path
import pandas as pd
from fastcore.script import call_parse
from evidence import add_rows, rows_of
from fgvc_fisher.experiment import grid, read_runs, show_table, sweep, table

NETWORK = dict(arch='tf_efficientnet_lite0', weights='tf_efficientnet_lite0_imagenet_fp16.safetensors')
EPOCHS,RATE,SIZE = 20,0.02,160
STRENGTHS,PULLS = [0.1, 0.25, 0.5, 1.], [0.1, 0.3, 1.]

# What each stage compares. The further strengths of `more` complete the curves once `main` has its seeds
STAGES = {
    'epochs': [dict(arm=f'plain, {n} epochs', epochs=n) for n in (10, 20, 30)],
    'rate': [dict(arm=f'plain, {n} epochs, rate {lr:g}', lr=lr, epochs=n) for n in (10,) for lr in (0.005, 0.01, 0.04)],
    'main': [dict(arm='plain'), dict(arm='L2-SP-Fisher', strength=STRENGTHS), dict(arm='L2-SP', l2sp=PULLS),
             dict(arm='both', l2sp=[0.03], strength=[0.5, 1.])],
    'more': [dict(arm='L2', alpha=[5e-4]), dict(arm='L2-SP-Fisher', strength=[0.05, 2., 5., 10.]),
             dict(arm='L2-SP', l2sp=[0.01, 0.03, 3.])],
    'others': [dict(arm='last layer only', tune='head'), dict(arm='linear probe first', tune='head first'),
               dict(arm='empirical Fisher, explicit step', kind='empirical', step='grad', strength=[0.25, 0.5, 1.]),
               dict(arm='as published', step='published', alpha=5e-4, l2sp=0.004, beta=[0, 4e-5]),
               dict(arm='target Fisher', fisher_from='target', strength=[0.5, 1.])],
    'pictures': [dict(arm=f'Fisher of {n} pictures', n_fisher=n, strength=0.5) for n in (30, 100, 300)],
    'levels': [dict(arm=f'plain, {o}', level=o) for o in ('family', 'manufacturer')],
}
KEY = ['arm', 'seed', 'size', 'epochs', 'lr', 'level'] # These columns identify a run, on any machine

def join_sources(photos, folder):
    "One folder for both sets of ImageNet pictures, in the order of their classes"
    parts = ['imagenet_sample', 'imagenet_extra']
    tables = [pd.read_csv(photos/'data'/o/'labels.csv') for o in parts]
    joined = pd.concat([t.assign(path=f'{o}/'+t.path) for o,t in zip(parts, tables)])
    folder.mkdir(parents=True, exist_ok=True)
    for o in parts:
        if not (folder/o).exists(): os.symlink((photos/'data'/o).absolute(), folder/o)
    joined.sort_values('class_index', kind='stable').to_csv(folder/'labels.csv', index=False)
    return folder

def all_runs(photos, work, stages, seeds, **kwargs):
    "The runs of some stages, stage by stage and seed by seed; those that are about choices and levels have one seed"
    common = dict(data=photos/'data/fgvc20', source=join_sources(photos, work/'imagenet'), test='test',
                  arch=NETWORK['arch'], weights=photos/'weights'/NETWORK['weights'], **kwargs)
    def of(stage):
        arms = [dict(epochs=EPOCHS, lr=RATE) | o for o in STAGES[stage]]
        return grid(arms, seeds[:1] if stage in ('epochs','rate','levels') else seeds, **common)
    return [run for stage in stages for run in of(stage)]

def collect(runs, work, out):
    "Add the finished runs to `runs.csv`, without the paths of this machine"
    found = read_runs(work)
    if not len(found): return
    found = found[found.id.isin([o.id for o in runs])]
    named = found.assign(**{o: [Path(v).name for v in found[o].astype(str)] for o in ('data','source','weights')})
    add_rows(named, out/'runs.csv', KEY)

def report(out):
    "The table of the arms"
    rows = rows_of(out/'runs.csv')
    if not len(rows): return
    shown = show_table(table(rows))
    shown.to_csv(out/'table.csv')
    print(shown.to_string())

@call_parse
def main(
    photos:str='', # Folder with data/ and weights/; empty: only make the tables
    out:str='results/aircraft', # Folder for the rows and tables
    work:str='.keep/aircraft', # Folder for the runs, outside version control
    stages:str=','.join(STAGES), # Which, separated by commas
    jobs:int=1, # Parallel processes
    seeds:int=5, # Runs an arm
    first:int=42, # The first seed; the others follow
    size:int=SIZE, # Side of the pictures in pixels
    num_workers:int=0, # Processes per run that load pictures
):
    "Do the runs that have no row yet, then make the tables."
    out,work = Path(out),Path(work)
    out.mkdir(parents=True, exist_ok=True)
    if photos:
        runs = all_runs(Path(photos), work, stages.split(','), range(first, first+seeds), size=size,
                        num_workers=num_workers)
        done = rows_of(out/'runs.csv').reindex(columns=KEY).itertuples(index=False, name=None)
        done = set(done)
        left = [o for o in runs if tuple(getattr(o, k) for k in KEY) not in done]
        try:
            if left: sweep(left, work, jobs, retry=True, quiet=True)
        finally: collect(runs, work, out)
    report(out)
