"""Does remembering cost anything? Every way to fine-tune and to remember, on real photographs, each with several seeds.

    python benchmarks/evidence.py --photos PHOTOS --jobs 2     # the runs, then tables and pictures; stopped, it goes on where it was
    python benchmarks/evidence.py                              # tables and pictures again, from the rows in `results/evidence`

PHOTOS holds `data/warbirds30`, `data/airliners17` (FGVC-Aircraft trees), `data/imagenet_sample` (pictures with a `labels.csv`) and the weights of
MobileNet-v1 0.75 and SqueezeNet in `weights/`. Half of the ImageNet pictures estimate the Fisher, the other half measure retention. Runs are done
seed by seed, so that whatever has been finished compares; what has a row in OUT is not measured again. `nbs/evidence.ipynb` reads the rows and says
what holds. On Linux an allocator that keeps its memory makes a MobileNet step about a fifth shorter:

    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592
"""
import dataclasses, time
from itertools import product
from pathlib import Path
import matplotlib.pyplot as plt, pandas as pd
from fastcore.script import call_parse
from filelock import FileLock
from torch.optim.swa_utils import update_bn
from fgvc_fisher.data import picture_dl, pick_split, read_aircraft
from fgvc_fisher.experiment import Run, frontier, grid, read_runs, show_table, sweep, table
from fgvc_fisher.fisher import estimate_fisher
from fgvc_fisher.learner import normalise
from fgvc_fisher.penalty import interpolate, merge
from fgvc_fisher.experiment import differences
from fgvc_fisher.retention import accuracy_on, retention
from fgvc_fisher.experiment import load_run
from fgvc_fisher.experiment.run import run_source

# Without BatchNorm SqueezeNet diverges at MobileNet's rate. On airliners17 it learnt nothing in 4 or 12 epochs, at rates from 0.0001 to 0.02
NETWORKS = {'mobilenet': dict(trees=['airliners17','warbirds30'], arch='warbirds:mobilenet', weights='mobilenetv1_075_imagenet.safetensors', lr=0.02),
            'squeezenet': dict(trees=['warbirds30'], arch='torchvision.models:squeezenet1_1', weights='squeezenet1_1_imagenet_fp16.safetensors', lr=0.002)}
TARGET = dict(airliners17=0, warbirds30=500) # Pictures for the target's Fisher: all 476 that there are, or as many as of the source
PULLS = dict(mobilenet=1, squeezenet=10) # A step pulls by lr * strength: at a tenth of the rate ten times the strength pulls as much

def arms(network):
    "What is compared on every tree: name and keywords of `Run`"
    k = PULLS[network]
    return [dict(arm='plain'), dict(arm='L2', alpha=[5e-4]), dict(arm='L2-SP', l2sp=[o*k for o in (0.01, 0.1, 0.3, 1, 3, 10)]),
            dict(arm='L2-SP-Fisher', beta=[o*k for o in (0.1, 1, 10, 30, 100, 1000)]), dict(arm='last layer only', tune='head')]

def more_arms(tree, network):
    "What is compared beside, for one question each"
    k = PULLS[network]
    fisher = dict(beta=[o*k for o in (0.1, 1, 10, 30, 100, 1000)])
    asked = [dict(arm='exact Fisher', kind='exact', **fisher), dict(arm='target Fisher', fisher_from='target', n_fisher=TARGET[tree], **fisher),
             dict(arm='normalised Fisher', normalize=True, beta=[o*k for o in (0.1, 1, 10)]),
             *[dict(arm=f'Fisher of {n} pictures', n_fisher=n, beta=[10*k]) for n in (10, 30, 100)],
             dict(arm='empirical Fisher', kind='empirical', beta=[10*k]),
             dict(arm='explicit step', step='grad', beta=[o*k for o in (0.1, 1, 10)]),
             dict(arm='as published', step='published', alpha=5e-4, l2sp=0.004, beta=[0, 4e-5]), dict(arm='linear probe first', tune='head first')]
    if network=='squeezenet': return asked                           # it has no BatchNorm
    for o in (False, True):
        how = dict(lr=0.002, freeze_bn=o)                            # at the usual rate kept statistics learn nothing, see `frozen_bn.py`
        name = 'BatchNorm kept' if o else 'BatchNorm free'
        asked += [dict(arm=f'{name}: plain', **how), dict(arm=f'{name}: L2-SP-Fisher', beta=[100], **how)]
    return asked

def settings(photos, tree, network, **kwargs):
    "What all runs of a tree and a network have in common"
    net = NETWORKS[network]
    return dict(data=photos/'data'/tree, source=photos/'data/imagenet_sample', arch=net['arch'], weights=photos/'weights'/net['weights'], **kwargs)

def all_runs(photos, more, seeds, **kwargs):
    "Network by network and seed by seed; the further arms for those trees in `more` only"
    found = []
    for network,seed in product(NETWORKS, seeds):
        for tree in NETWORKS[network]['trees']:
            asked = [dict(lr=NETWORKS[network]['lr']) | o for o in arms(network) + (more_arms(tree, network) if tree in more else [])]
            found += grid(asked, [seed], **settings(photos, tree, network, **kwargs))
    return found

PARTS = [0.9, 0.8, 0.6, 0.4, 0.2] # WiSE-FT: the tuned model's share
BETAS = [0.01, 0.03, 0.1, 0.3, 1.] # Fisher merging

def merged_rows(run, folder, shared):
    "A plain run merged with its source along both curves, a row a point"
    source = run_source(dataclasses.replace(run, beta=1.), shared, progress=False)      # with its Fisher
    learn = load_run(run, folder, source.model)
    train = pick_split(read_aircraft(run.data, run.level), run.train)
    train = train.sample(min(500, len(train)), random_state=run.seed).sort_index()
    train = normalise(picture_dl(train, run.size, run.bs, num_workers=run.num_workers), source.model)
    start = time.perf_counter()
    fishers = source.fisher,estimate_fisher(learn.model, train, progress=False)
    took = time.perf_counter()-start
    points = [('WiSE-FT', 't', t, 0., lambda t: interpolate(source.model, learn.model, t)) for t in PARTS]
    points += [('Fisher merging', 'beta', b, took, lambda b: merge(source.model, learn.model, *fishers, b)) for b in BETAS]
    for arm,name,strength,seconds,make in points:
        model = make(strength)
        update_bn(train, model)                                      # its statistics in between belong to neither
        kept = retention(model, source.model, source.pictures)
        yield dict(arm=f'{arm}, {name} = {strength:g}', strength=strength, seed=run.seed, last=accuracy_on(model, learn.dls.valid), before=source.before, seconds=seconds,
                   **{f'retention_{k}_bn': v for k,v in kept.items()})

def merge_all(runs, work):
    "Merge every plain run that is done and was not merged yet"
    for run in [o for o in runs if o.arm=='plain']:
        folder = work/'runs'/run.id
        with FileLock(f'{folder}/merging.lock'):
            if not (folder/'result.json').exists() or (folder/'merged.csv').exists(): continue
            rows = pd.DataFrame(merged_rows(run, folder, work/'sources'))
            rows.to_csv(folder/'merged.part', index=False)
            (folder/'merged.part').rename(folder/'merged.csv')

def named(runs):
    "Rows without the paths of this machine; `tree` and `network` tell the comparisons apart"
    networks = {o['arch']: k for k,o in NETWORKS.items()}
    return runs.assign(tree=[Path(o).name for o in runs.data], network=runs.arch.map(networks),
                       **{o: [Path(v).name for v in runs[o].astype(str)] for o in ('data','source','weights')})

KEY = ['tree','network','arm','seed','size','epochs','lr'] # What makes a run of this comparison the one it is, wherever it was made

def rows_of(file):
    "The rows of a file; none if it is not there"
    return pd.read_csv(file) if file.exists() else pd.DataFrame()

def still_to_do(runs, out):
    "Those without a row; a plain run has to have been merged, too"
    asked,there = named(pd.DataFrame(map(dataclasses.asdict, runs))),rows_of(out/'runs.csv')
    if there.empty: return runs
    merged = {*rows_of(out/'merged.csv').reindex(columns=['tree','network','seed']).itertuples(index=False, name=None)}
    done = {*there[KEY].itertuples(index=False, name=None)}
    return [run for run,o in zip(runs, asked.itertuples()) if tuple(getattr(o, k) for k in KEY) not in done
            or o.arm=='plain' and (o.tree,o.network,o.seed) not in merged]

def add_rows(new, file, key):
    "Write rows beside those of a file, in place of the same ones"
    if new.empty: return
    both = pd.concat([rows_of(file), new]).drop_duplicates(key, keep='last')
    order = [o for o in ('network','tree','alpha','l2sp','beta','step','arm','strength','seed') if o in both]
    both.sort_values(order, kind='stable').to_csv(file, index=False, float_format='%.6g')

def collect(runs, work, out):
    "Add what was measured to `runs.csv`, a row a run, and `merged.csv`, a row a merged model"
    found = read_runs(work)
    found = named(found[found.id.isin([o.id for o in runs])]) if len(found) else found
    add_rows(found, out/'runs.csv', KEY)
    merged = [pd.read_csv(file).assign(tree=o.tree, network=o.network, machine=o.machine) for _,o in found.iterrows()
              if o.arm=='plain' and (file := work/'runs'/o.id/'merged.csv').exists()]
    if merged: add_rows(pd.concat(merged), out/'merged.csv', ['tree','network','arm','seed'])

MAIN = 'plain', 'L2', 'L2-SP', 'L2-SP-Fisher', 'last layer only', 'linear probe first', 'WiSE-FT', 'Fisher merging'
FISHERS = 'plain', 'L2-SP', 'L2-SP-Fisher', 'exact Fisher', 'target Fisher'

def chosen(rows, families): return rows[[o.split(',')[0] in families for o in rows.arm]]

def report(out):
    "A table, the differences from plain fine-tuning and two frontiers for every tree and network"
    rows = pd.concat([pd.read_csv(out/o) for o in ('runs.csv','merged.csv') if (out/o).exists()])
    for (tree,network),r in rows.groupby(['tree','network'], sort=False):
        name = f'{tree}-{network}'
        shown = show_table(table(r))
        shown.to_csv(out/f'table-{name}.csv')
        differences(r).to_csv(out/f'differences-{name}.csv', float_format='%.4f')
        for kind,families in (('frontier', MAIN), ('fishers', FISHERS)):
            if not {o.split(',')[0] for o in r.arm} > set(FISHERS) and kind=='fishers': continue
            frontier(chosen(r, families)).figure.savefig(out/f'{kind}-{name}.png', dpi=100)
        print(f'\n{name}\n{shown.to_string()}')
    plt.close('all')

@call_parse
def main(
    photos:str='', # Folder with data/ and weights/; without it only the tables and pictures are made
    out:str='results/evidence', # Folder for the rows, tables and pictures
    work:str='.keep/evidence', # Folder for the runs; not for the repository
    jobs:int=1, # Processes side by side
    seeds:int=3, # Runs an arm
    first:int=42, # The first seed; the others follow
    epochs:int=4, # Passes over the training split
    size:int=128, # Side of the pictures in pixels
    num_workers:int=0, # Processes that decode, for each run
    more:str='airliners17', # The trees, with commas between, on which the further arms are run, too
):
    out,work = Path(out),Path(work)
    out.mkdir(parents=True, exist_ok=True)
    if photos:
        runs = all_runs(Path(photos), more.split(','), range(first, first+seeds), epochs=epochs, size=size, num_workers=num_workers)
        runs = still_to_do(runs, out)
        try:
            if runs: sweep(runs, work, jobs, retry=True, quiet=True)
            merge_all(runs, work)
        finally: collect(runs, work, out)                            # what there is, also when it is interrupted
    report(out)
