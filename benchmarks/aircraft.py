"""The paper's question on its own pictures: 20 variants of FGVC-Aircraft, EfficientNet-Lite0 and real ImageNet weights.

    python benchmarks/aircraft.py --photos PHOTOS --jobs 2                  # every stage; resumes if interrupted
    python benchmarks/aircraft.py --photos PHOTOS --stages main --seeds 5   # some stages
    python benchmarks/aircraft.py --photos PHOTOS --accelerator             # the whole grid on a GPU, see below
    python benchmarks/aircraft.py                                           # only the tables, from `results/aircraft`

PHOTOS contains `data/fgvc20` (an FGVC-Aircraft tree), `data/imagenet_sample` and `data/imagenet_extra` (pictures with a
`labels.csv`) and the weights in `weights/`. Every other ImageNet picture of a class estimates the Fisher, the others
measure retention. Everything is chosen on the validation split: the stages `epochs` and `rate`, on plain runs alone,
come first, and the later ones use what they found (`EPOCHS`, `RATE`). Finished runs get their rows in OUT at the end of
the call, also of one that is interrupted, or else by the next call; a run that has a row is not done again.
`nbs/evidence.ipynb` reads them. EWC is done as people write it, its gradients clipped at norm 1, and once without the
clipping; `clipped` clips those of other arms, too. `kept` normalises one layer by its running statistics in training:
the one whose channel `benchmarks/saturated.py` looks at. LwF, the clipping and this need callbacks that a `Run` has no
field for, and run one at a time. What was set about memory in `benchmarks/evidence.py` holds here, too.

With `--accelerator` everything, or the stages that are named, runs at 224 and 299 pixels with ten seeds and in float16,
and the paper's recipe and three starts of it with Inception-v4, two of whose tensors are substitutes. A few steps are
timed first and the script says how long all of it will take. It is restarted by the same call. A process mostly waits
for pictures and kernels, so a large card carries as many jobs as there are cores.
"""
import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
import pandas as pd, torch
from fastai.callback.core import Callback
from fastai.callback.training import GradientClip
from fastai.torch_core import default_device
from fastcore.parallel import num_cpus
from fastcore.script import call_parse, store_true
from filelock import FileLock
from safetensors.torch import load_file, save_file
from evidence import add_rows, merge_all, rows_of
from family import LwF
from fgvc_fisher.experiment import Run, grid, read_runs, show_table, sweep, table
from fgvc_fisher.experiment.budget import estimate_time
from fgvc_fisher.experiment.run import do_run, make_learner
from fgvc_fisher.learner import source_model

NETWORK = dict(arch='tf_efficientnet_lite0', weights='tf_efficientnet_lite0_imagenet_fp16.safetensors')
INCEPTION = dict(arch='inception_v4', weights='inception_v4_repaired_fp16.safetensors')
SOURCES = 'imagenet_sample', 'imagenet_extra'
SUBSTITUTED = 'Inception-v4 (two tensors substituted)'
KERNEL = 'features.10.branch0.conv.weight'                           # one of the two; the other is the source's head
RANDOM = 'random_kernel.safetensors'                                 # the same weights with that kernel at random
EPOCHS,RATE = 10,0.04 # On val within the noise of the best, 30 epochs at 0.02, in a third of the time
SIZE,LARGER = 160,224
STRENGTHS,PULLS = [0.1, 0.25, 0.5, 1.], [0.1, 0.3, 1.]
PAPER = dict(recipe='published', transforms='published', epochs=80, lr=Run.lr) # the recipe has its own rates
LWF = {f'LwF, weight = {o:g}': o for o in (0.1, 0.3, 1., 3., 10.)} # arm -> weight of the source's answers in the loss
CLIPPED = 'EWC, clipped','clipped plain','clipped L2-SP-Fisher' # Arms with gradients clipped at norm 1
KEPT,KEPT_NORM = 'L2-SP-Fisher with one layer kept','blocks.1.1.bn2'  # A layer with its running statistics in training
EWC = dict(kind='empirical', step='grad')
PUBLISHED = dict(step='published', l2sp=0.004)

def paper(name):
    "The paper's recipe: its control, the cell of its claim, and L2-SP-Fisher as equation (1) has it"
    return [dict(arm=f'{name}: control', **PUBLISHED), dict(arm=f'{name}: the claim', beta=4e-4, **PUBLISHED),
            dict(arm=f'{name}: L2-SP-Fisher', strength=0.5)]

# What each stage compares. The further strengths of `more` complete the curves once `main` has its seeds
STAGES = {
    'epochs': [dict(arm=f'plain, {n} epochs', epochs=n, lr=0.02) for n in (10, 20, 30)],  # before RATE was known
    'rate': [dict(arm=f'plain, {n} epochs, rate {lr:g}', lr=lr, epochs=n)
             for n,lr in ((10, 0.005), (10, 0.01), (10, 0.04), (10, 0.08), (20, 0.04))],
    'main': [dict(arm='plain'), dict(arm='L2-SP-Fisher', strength=STRENGTHS), dict(arm='L2-SP', l2sp=PULLS),
             dict(arm='both', l2sp=[0.03], strength=[0.5, 1.])],
    'more': [dict(arm='L2', alpha=[5e-4]), dict(arm='L2-SP-Fisher', strength=[0.05, 2., 5., 10.]),
             dict(arm='L2-SP', l2sp=[0.01, 0.03, 3.]), dict(arm='both', l2sp=[0.01, 0.1], strength=[0.5])],
    'others': [dict(arm='last layer only', tune='head'), dict(arm='linear probe first', tune='head first'),
               dict(arm=CLIPPED[0], strength=[0.001, 0.003, 0.01, 0.03, 0.3], **EWC),
               dict(arm='EWC', strength=[0.03], **EWC),                 # not clipped
               dict(arm='as published', alpha=[0., 5e-4], beta=[0., 4e-5, 4e-4], **PUBLISHED),
               dict(arm='target Fisher', fisher_from='target', strength=STRENGTHS[1:])],
    'clipped': [dict(arm=CLIPPED[1]), dict(arm=CLIPPED[2], strength=STRENGTHS[1:])],
    'kept': [dict(arm=KEPT, strength=[0.5])],
    'distilled': [dict(arm=o) for o in LWF],
    'merged': [dict(arm='plain')],                                   # WiSE-FT and Fisher merging, after its training
    'pictures': [dict(arm=f'Fisher of {n} pictures', n_fisher=n, strength=0.5) for n in (30, 100, 300)],
    'small': [dict(arm=f'{share:.0%} of train: {family}', fraction=share, **strengths) for share in (0.15, 0.3, 0.5)
              for family,strengths in (('plain', {}), ('L2-SP', dict(l2sp=PULLS)),
                                       ('L2-SP-Fisher', dict(strength=STRENGTHS[1:])))],
    'levels': [dict(arm=f'plain, {o}', level=o) for o in ('family', 'manufacturer')],
    'rates': [dict(arm=f'{family} at rate {lr:g}', lr=lr, **strengths) for lr in (RATE/2, 2*RATE, 4*RATE)
              for family,strengths in (('L2-SP', dict(l2sp=PULLS[:2])), ('L2-SP-Fisher', dict(strength=[0.25, 0.5])),
                                       ('both', dict(l2sp=[0.03], strength=[0.5])))],
    'larger': [dict(arm='plain', size=LARGER), dict(arm='L2-SP', l2sp=[*PULLS, 3., 10.], size=LARGER),
               dict(arm='L2-SP-Fisher', strength=STRENGTHS[1:], size=LARGER),
               dict(arm='both', l2sp=[0.03], strength=[0.5], size=LARGER),
               *[dict(arm=f'plain at rate {lr:g}', lr=lr, size=LARGER) for lr in (RATE/2, RATE/4)]],
    'recipe': [PAPER | o for o in paper('published recipe')],
    'inception': [PAPER | o for o in paper(SUBSTITUTED)],
    'starts': [dict(arm=f'{SUBSTITUTED}: plain'), dict(arm=f'{SUBSTITUTED}: kernel at random', weights=RANDOM),
               dict(arm=f'{SUBSTITUTED}: from scratch', weights=False)],
}
N_SEEDS = dict(epochs=1, rate=1, levels=1, rates=1)                    # choices and levels; elsewhere as many as asked
ON_GPU = 'inception', 'starts'                                        # too slow for two cores
SIZES,PAPER_SIZE = (224, 299), 299
NOT_AGAIN = 'epochs', 'rate', 'kept', 'larger'                         # of the grid at each of the sizes
KEY = ['arm', 'seed', 'arch', 'size', 'epochs', 'lr', 'level', 'amp'] # These columns identify a run, on any machine
SETTING = KEY[2:6] + ['amp'] # Arms are compared where these are equal

# The runs

def join_sources(photos, folder):
    "One folder for both sets of ImageNet pictures, in the order of their classes"
    tables = [pd.read_csv(photos/'data'/o/'labels.csv') for o in SOURCES]
    joined = pd.concat([t.assign(path=f'{o}/'+t.path) for o,t in zip(SOURCES, tables)])
    folder.mkdir(parents=True, exist_ok=True)
    for o in SOURCES:
        if not (folder/o).exists(): os.symlink((photos/'data'/o).absolute(), folder/o)
    text,file = joined.sort_values('class_index', kind='stable').to_csv(index=False),folder/'labels.csv'
    if not file.exists() or file.read_text()!=text: file.write_text(text)     # a run may be reading it
    return folder

def random_kernel(file, made):
    "A copy of Inception-v4's weights with random numbers for the substituted kernel"
    state = load_file(file)
    torch.manual_seed(0)
    state[KERNEL] = torch.nn.init.kaiming_normal_(state[KERNEL].float()).to(state[KERNEL].dtype)
    save_file(state, made)

def settings(stage, photos, work):
    "Network and source pictures of a stage. Inception-v4's substitutes were fitted on all but half of the sample"
    if stage not in ON_GPU: return dict(arch=NETWORK['arch'], weights=photos/'weights'/NETWORK['weights'],
                                        source=join_sources(photos, work/'imagenet'))
    return dict(arch=INCEPTION['arch'], weights=photos/'weights'/INCEPTION['weights'],
                source=photos/'data/imagenet_sample')

def all_runs(photos, work, stages, seeds, epochs=EPOCHS, **kwargs):
    "The runs of some stages, stage by stage and seed by seed; those that are about choices and levels have one seed"
    found = []
    for stage in stages:
        common = settings(stage, photos, work) | dict(data=photos/'data/fgvc20', test='test', **kwargs)
        arms = [dict(epochs=epochs, lr=RATE) | o for o in STAGES[stage]]
        if stage=='starts': random_kernel(common['weights'], work/RANDOM)
        arms = [o | dict(weights=work/RANDOM) if o.get('weights')==RANDOM else o for o in arms]
        found += grid(arms, seeds[:N_SEEDS.get(stage)], **common)
    return list(dict.fromkeys(found))                                 # `merged` has runs of `main`

def accelerator_runs(photos, work, stages, seeds, **kwargs):
    "The stages at each of `SIZES`; those that only Inception-v4 can show, at the paper's size"
    at_each,at_one = [[o for o in stages if (o in ON_GPU)==large] for large in (False,True)]
    found = [all_runs(photos, work, at_each, seeds, size=size, **kwargs) for size in SIZES]
    return sum(found, []) + all_runs(photos, work, at_one, seeds, size=PAPER_SIZE, **kwargs)

def not_done(runs, out):
    "The runs that have no row"
    rows = rows_of(out/'runs.csv').reindex(columns=KEY)
    done = {*rows.itertuples(index=False, name=None)}
    return [run for run in runs if tuple(getattr(run, o) for o in KEY) not in done]

def source_of(run): return source_model(run.arch, run.weights or None).to(default_device())

class KeptNorm(Callback):
    "Normalise one layer by its running statistics in training, too"
    def before_train(self): self.model.get_submodule(KEPT_NORM).eval()

def further_callbacks(run):
    "Functions that make what a `Run` has no field for: LwF's loss, a limit to the gradients, a layer's statistics"
    if run.arm.startswith(KEPT): return [KeptNorm]
    if run.arm in LWF: return [lambda: LwF(source_of(run), LWF[run.arm])]
    return [lambda: GradientClip(1.)] if run.arm.startswith(CLIPPED) else []

def say_how_long(runs, jobs):
    "Time a few steps of each network, size and recipe, and print how long the runs will take; returns the seconds"
    groups = defaultdict(list)
    for run in runs: groups[run.arch, run.size, run.recipe, run.step=='published'].append(run)
    total = 0.
    for (arch,size,recipe,_),same in groups.items():
        run = same[0]
        if run.step!='published': run = replace(run, alpha=0., beta=0., l2sp=0., strength=0., tune='all')
        run = replace(run, fraction=1.)
        time = estimate_time(make_learner(run, source_of(run)), 1, n_batches=5, skip=2)
        train,rest = time.n_train*time.train,time.start+time.n_valid*time.valid
        seconds = sum(o.epochs*(o.fraction*train+rest) for o in same)
        print(f'{len(same)} runs of {arch} at {size} pixels, {recipe}: {seconds/3600:.1f} hours', flush=True)
        total += seconds
    print(f'all {len(runs)} runs: {total/jobs/3600:.1f} hours with {jobs} at a time, if each is as fast as one alone; '
          'further the Fishers, the retention and the merging', flush=True)
    return total

# The rows

def portable(rows):
    "Rows without the paths of this machine"
    return rows.assign(**{o: [Path(v).name for v in rows[o].astype(str)] for o in ('data','source','weights')})

def collect(runs, work, out):
    "Add the finished runs, and the models merged from them, to `runs.csv`"
    if not (work/'runs').is_dir(): return
    with FileLock(work/'collect.lock'):
        found = read_runs(work)
        found = found[found.id.isin([o.id for o in runs])]
        if found.empty: return
        plain = [o for _,o in found.iterrows() if (work/'runs'/o.id/'merged.csv').exists()]
        merged = [pd.read_csv(work/'runs'/o.id/'merged.csv').assign(**o[KEY[2:]], machine=o.machine) for o in plain]
        add_rows(pd.concat([portable(found), *merged]), out/'runs.csv', KEY)

def do(runs, work, out, jobs, merging):
    "Do the runs without a row, `jobs` at a time, and write their rows; then merge the plain ones"
    collect(runs, work, out)                                          # what an interrupted call has finished
    left = not_done(runs, out)
    together = [o for o in left if not further_callbacks(o)]
    try:
        if together: sweep(together, work, jobs, retry=True, quiet=True)
    finally: collect(runs, work, out)
    for run in [o for o in left if further_callbacks(o)]:
        do_run(run, work/'runs'/run.id, work/'sources', [make() for make in further_callbacks(run)], quiet=True)
        collect(runs, work, out)
    if not merging: return
    for run in [o for o in runs if o.arm=='plain' and (work/'runs'/o.id/'result.json').exists()]:
        merge_all([run], work)
        collect(runs, work, out)

def report(out):
    "A table of the arms for each network, size, number of epochs and rate"
    rows = rows_of(out/'runs.csv')
    if rows.empty: return
    tables = {k: show_table(table(r)) for k,r in rows.groupby(SETTING, sort=False)}
    shown = pd.concat(tables, names=[*SETTING,'arm']).fillna('–')
    shown.to_csv(out/'table.csv')
    print(shown.to_string())

def default_stages(accelerator):
    "Without those that are too slow for two cores; on an accelerator without those that only make choices"
    return [o for o in STAGES if o not in (NOT_AGAIN if accelerator else ON_GPU)]

def check(stages, counts):
    "`SystemExit` for an unknown stage and for a count below 1"
    for o in stages:
        if o not in STAGES: raise SystemExit(f"stages: there is no {o!r}; choose from {', '.join(STAGES)}")
    for k,v in counts.items():
        if v<1: raise SystemExit(f'{k}={v}: give a whole number of at least 1')

def check_photos(photos, stages):
    "`SystemExit` if pictures or weights are missing"
    needed = ['data/fgvc20', *(f'data/{o}/labels.csv' for o in SOURCES), f"weights/{NETWORK['weights']}"]
    if {*stages} & {*ON_GPU}: needed.append(f"weights/{INCEPTION['weights']}")
    for o in needed:
        if not (photos/o).exists(): raise SystemExit(f'{photos/o} is missing; name the folder with data/ and weights/')

@call_parse
def main(
    photos:str='', # Folder with data/ and weights/; empty: only make the tables
    out:str='results/aircraft', # Folder for the rows and tables
    work:str='.keep/aircraft', # Folder for the runs, outside version control
    stages:str=None, # Which, separated by commas; default: all that there is time for, see `default_stages`
    jobs:int=1, # Parallel processes
    seeds:int=None, # Runs an arm; default: 5, with `--accelerator` 10
    first:int=42, # The first seed; the others follow
    size:int=SIZE, # Side of the pictures in pixels
    epochs:int=EPOCHS, # Passes over the training split, where a stage does not say
    num_workers:int=None, # Processes per run that load pictures; default: 0, with `--accelerator` the cores there are
    accelerator:store_true=False, # At 224 and 299 pixels, instead of `size`
):
    "Do the runs that have no row yet, then make the tables."
    out,work = Path(out),Path(work)
    stages = default_stages(accelerator) if stages is None else stages.split(',')
    seeds = (10 if accelerator else 5) if seeds is None else seeds
    if num_workers is None: num_workers = max(1, num_cpus()//max(1, jobs)) if accelerator else 0
    check(stages, dict(jobs=jobs, seeds=seeds, size=size, epochs=epochs))
    if photos: check_photos(Path(photos), stages)
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    seeds = range(first, first+seeds)
    if photos and accelerator:
        runs = accelerator_runs(Path(photos), work, stages, seeds, epochs=epochs, num_workers=num_workers,
                                amp=torch.cuda.is_available())
        say_how_long(not_done(runs, out), jobs)
        do(runs, work, out, jobs, 'merged' in stages)
    elif photos:
        runs = all_runs(Path(photos), work, stages, seeds, epochs, size=size, num_workers=num_workers)
        do(runs, work, out, jobs, 'merged' in stages)
    report(out)
