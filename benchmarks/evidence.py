"""Does retention cost accuracy? Ways to fine-tune with and without penalties, on real photographs, with several seeds.

    python benchmarks/evidence.py --photos PHOTOS --jobs 2  # runs, then tables; resumes if interrupted
    python benchmarks/evidence.py                           # only tables, from `results/evidence`

PHOTOS contains `data/warbirds30`, `data/airliners17` (FGVC-Aircraft trees), `data/imagenet_sample` (pictures with a
`labels.csv`) and the weights of MobileNet-v1 0.75 and SqueezeNet in `weights/`. Half of the ImageNet pictures estimate
the Fisher, the other half measure retention. The script runs one seed after the other, so that the finished runs are
comparable at any time; a run that has a row in OUT is not measured again. `nbs/evidence.ipynb` reads the rows and draws
the conclusions. On Linux a MobileNet step is about a fifth shorter if the allocator keeps its memory:

    M=glibc.malloc
    export GLIBC_TUNABLES=$M.hugetlb=1:$M.mmap_threshold=4294967296:$M.trim_threshold=8589934592
"""
import dataclasses, time
from itertools import product
from pathlib import Path
import pandas as pd
from fastcore.script import call_parse
from filelock import FileLock
from torch.optim.swa_utils import update_bn
from fgvc_fisher.data import picture_dl, pick_split, read_aircraft
from fgvc_fisher.experiment import differences, grid, load_run, read_runs, show_table, sweep, table
from fgvc_fisher.experiment.run import run_source
from fgvc_fisher.fisher import estimate_fisher
from fgvc_fisher.learner import normalise
from fgvc_fisher.penalty import interpolate, merge
from fgvc_fisher.retention import accuracy_on, retention

# Without BatchNorm SqueezeNet diverges at MobileNet's rate.
# On airliners17 it learnt nothing in 4 or 12 epochs, at rates from 0.0001 to 0.02
NETWORKS = {'mobilenet': dict(trees=['airliners17','warbirds30'], arch='warbirds:mobilenet',
                              weights='mobilenetv1_075_imagenet.safetensors', lr=0.02),
            'squeezenet': dict(trees=['warbirds30'], arch='torchvision.models:squeezenet1_1',
                               weights='squeezenet1_1_imagenet_fp16.safetensors', lr=0.002)}
# Pictures for the target's Fisher: 0 takes all (476), 500 takes as many as the source's Fisher
TARGET = dict(airliners17=0, warbirds30=500)
# Factors of the strengths: a step pulls by lr * strength, so a tenth of the rate needs ten times the strength
PULLS = dict(mobilenet=1, squeezenet=10)

def arms(network):
    "What is compared on every tree: name and keywords of `Run`"
    k = PULLS[network]
    return [dict(arm='plain'), dict(arm='L2', alpha=[5e-4]),
            dict(arm='L2-SP', l2sp=[o*k for o in (0.01, 0.1, 0.3, 1, 3, 10)]),
            dict(arm='L2-SP-Fisher', beta=[o*k for o in (0.1, 1, 10, 30, 100, 1000)]),
            dict(arm='last layer only', tune='head')]

def more_arms(tree, network):
    "Further arms; each answers one question"
    k = PULLS[network]
    fisher = dict(beta=[o*k for o in (0.1, 1, 10, 30, 100, 1000)])
    asked = [dict(arm='exact Fisher', kind='exact', **fisher),
             dict(arm='target Fisher', fisher_from='target', n_fisher=TARGET[tree], **fisher),
             *[dict(arm=f'normalised Fisher, beta = {o*k:g}', strength=o*k) for o in (0.1, 1, 10)],
             *[dict(arm=f'Fisher of {n} pictures', n_fisher=n, beta=[10*k]) for n in (10, 30, 100)],
             dict(arm='empirical Fisher', kind='empirical', beta=[10*k]),
             dict(arm='explicit step', step='grad', beta=[o*k for o in (0.1, 1, 10)]),
             dict(arm='as published', step='published', alpha=5e-4, l2sp=0.004, beta=[0, 4e-5]),
             dict(arm='linear probe first', tune='head first')]
    if network=='squeezenet': return asked                           # it has no BatchNorm
    for o in (False, True):
        how = dict(lr=0.002, freeze_bn=o)           # at the usual rate frozen statistics fail, see `frozen_bn.py`
        name = 'BatchNorm kept' if o else 'BatchNorm free'
        asked += [dict(arm=f'{name}: plain', **how), dict(arm=f'{name}: L2-SP-Fisher', beta=[100], **how)]
    return asked

def settings(photos, tree, network, **kwargs):
    "What all runs of a tree and a network have in common"
    net = NETWORKS[network]
    return dict(data=photos/'data'/tree, source=photos/'data/imagenet_sample', arch=net['arch'],
                weights=photos/'weights'/net['weights'], **kwargs)

def all_runs(photos, more, seeds, **kwargs):
    "All runs, network by network and seed by seed, with the further arms for the trees in `more`"
    found = []
    for network,seed in product(NETWORKS, seeds):
        for tree in NETWORKS[network]['trees']:
            compared = arms(network) + (more_arms(tree, network) if tree in more else [])
            asked = [dict(lr=NETWORKS[network]['lr']) | o for o in compared]
            found += grid(asked, [seed], **settings(photos, tree, network, **kwargs))
    return found

PARTS = [0.9, 0.8, 0.6, 0.4, 0.2] # WiSE-FT: the tuned model's share
BETAS = [0.01, 0.03, 0.1, 0.3, 1.] # Fisher merging

def merged_rows(run, folder, shared):
    "Merge a plain run with its source along both curves; one row per point"
    source = run_source(dataclasses.replace(run, beta=1.), shared, progress=False)      # with its Fisher
    learn = load_run(folder, pictures=True)
    train = pick_split(read_aircraft(run.data, run.level), run.train)
    train = train.sample(min(500, len(train)), random_state=run.seed).sort_index()
    train = normalise(picture_dl(train, run.size, run.bs, num_workers=run.num_workers), source.model)
    start = time.perf_counter()
    fishers = source.fisher,estimate_fisher(learn.model, train, progress=False)
    took = time.perf_counter()-start
    def straight(t): return interpolate(source.model, learn.model, t)
    def weighted(beta): return merge(source.model, learn.model, *fishers, beta)
    points = [('WiSE-FT', 't', t, 0., straight) for t in PARTS]
    points += [('Fisher merging', 'beta', b, took, weighted) for b in BETAS]
    for arm,name,strength,seconds,make in points:
        model = make(strength)
        update_bn(train, model)                       # between the two models neither one's statistics are right
        kept = retention(model, source.model, source.pictures)
        yield dict(arm=f'{arm}, {name} = {strength:g}', strength=strength, seed=run.seed,
                   last=accuracy_on(model, learn.dls.valid), before=source.before, seconds=seconds,
                   **{f'retention_{k}_bn': v for k,v in kept.items()})

def merge_all(runs, work):
    "Merge every finished plain run that is not merged yet"
    for run in [o for o in runs if o.arm=='plain']:
        folder = work/'runs'/run.id
        with FileLock(f'{folder}/merging.lock'):
            if not (folder/'result.json').exists() or (folder/'merged.csv').exists(): continue
            rows = pd.DataFrame(merged_rows(run, folder, work/'sources'))
            rows.to_csv(folder/'merged.part', index=False)
            (folder/'merged.part').rename(folder/'merged.csv')

def named(runs):
    "Rows without the paths of this machine; `tree` and `network` identify the comparison"
    networks = {o['arch']: k for k,o in NETWORKS.items()}
    return runs.assign(tree=[Path(o).name for o in runs.data], network=runs.arch.map(networks),
                       **{o: [Path(v).name for v in runs[o].astype(str)] for o in ('data','source','weights')})

KEY = ['tree','network','arm','seed','size','epochs','lr'] # These columns identify a run, on any machine

def rows_of(file):
    "The rows of a file; none if it is not there"
    return pd.read_csv(file) if file.exists() else pd.DataFrame()

def still_to_do(runs, out):
    "Runs without a row, and plain runs that are not merged yet"
    asked = named(pd.DataFrame(map(dataclasses.asdict, runs)))
    finished = rows_of(out/'runs.csv')
    if finished.empty: return runs
    merged = {*rows_of(out/'merged.csv').reindex(columns=['tree','network','seed']).itertuples(index=False, name=None)}
    done = {*finished[KEY].itertuples(index=False, name=None)}
    return [run for run,o in zip(runs, asked.itertuples()) if tuple(getattr(o, k) for k in KEY) not in done
            or o.arm=='plain' and (o.tree,o.network,o.seed) not in merged]

def add_rows(new, file, key):
    "Add rows to a file; they replace rows with the same key"
    if new.empty: return
    both = pd.concat([rows_of(file), new]).drop_duplicates(key, keep='last')
    order = [o for o in ('network','tree','alpha','l2sp','beta','step','arm','strength','seed') if o in both]
    both.sort_values(order, kind='stable').to_csv(file, index=False, float_format='%.6g')

def collect(runs, work, out):
    "Add the results to `runs.csv`, one row per run, and `merged.csv`, one row per merged model"
    found = read_runs(work)
    found = named(found[found.id.isin([o.id for o in runs])]) if len(found) else found
    add_rows(found, out/'runs.csv', KEY)
    merged = [pd.read_csv(file).assign(tree=o.tree, network=o.network, machine=o.machine) for _,o in found.iterrows()
              if o.arm=='plain' and (file := work/'runs'/o.id/'merged.csv').exists()]
    if merged: add_rows(pd.concat(merged), out/'merged.csv', ['tree','network','arm','seed'])

def report(out):
    "For every tree and network: a table, and the differences from plain fine-tuning"
    rows = pd.concat([pd.read_csv(out/o) for o in ('runs.csv','merged.csv') if (out/o).exists()])
    for (tree,network),r in rows.groupby(['tree','network'], sort=False):
        name = f'{tree}-{network}'
        shown = show_table(table(r))
        shown.to_csv(out/f'table-{name}.csv')
        differences(r).to_csv(out/f'differences-{name}.csv', float_format='%.4f')
        print(f'\n{name}\n{shown.to_string()}')

@call_parse
def main(
    photos:str='', # Folder with data/ and weights/; default: only make the tables
    out:str='results/evidence', # Folder for the rows and tables
    work:str='.keep/evidence', # Folder for the runs, outside version control
    jobs:int=1, # Parallel processes
    seeds:int=3, # Runs per arm
    first:int=42, # The first seed; the others follow
    epochs:int=4, # Passes over the training split
    size:int=128, # Side of the pictures in pixels
    num_workers:int=0, # Processes per run that load pictures
    more:str='airliners17', # Trees on which the further arms run, too; separated by commas
):
    out,work = Path(out),Path(work)
    out.mkdir(parents=True, exist_ok=True)
    if photos:
        runs = all_runs(Path(photos), more.split(','), range(first, first+seeds), epochs=epochs, size=size,
                        num_workers=num_workers)
        runs = still_to_do(runs, out)
        try:
            if runs: sweep(runs, work, jobs, retry=True, quiet=True)
            merge_all(runs, work)
        finally: collect(runs, work, out)                            # keep finished runs after an interruption, too
    report(out)
