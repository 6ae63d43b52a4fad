"""Two tasks, one after the other: what is left of ImageNet, and of the aircraft, after a third set of pictures?

    python benchmarks/sequence.py PHOTOS --work .keep/aircraft

The first task are finished runs of `benchmarks/aircraft.py`. Their networks are fine-tuned a second time, on
`data/warbirds30`, with as many pictures, epochs and the same rate. The penalty pulls them to where the first task left
them, weighted by

- both: the sum of two Fishers, each divided by its mean: that of ImageNet, which held the first task, and that of the
  aircraft, estimated on their training pictures with the network after them
- the last, the first: one of the two alone

A row for each run, in `results/aircraft/sequence.csv`; every task is asked with its own head and BatchNorm statistics:

- source, first, second: accuracy on ImageNet, on the aircraft's test pictures and on the warbirds' validation pictures,
  which nothing was chosen on
- source_before, first_before: the same before the second task
"""
import copy
from dataclasses import replace
from pathlib import Path
import pandas as pd
from fastcore.script import call_parse
from aircraft import KEY
from evidence import add_rows, rows_of
from unprotected import body
from fgvc_fisher.data.tables import pick_split
from fgvc_fisher.experiment import fine_tune, load_run, read_runs
from fgvc_fisher.experiment.run import read_run, read_target, run_dls, run_source
from fgvc_fisher.fisher.estimate import estimate_fisher
from fgvc_fisher.learner import normalise, source_dl
from fgvc_fisher.retention import accuracy_on

# Arm of the first task, penalty of the second, the Fishers that weigh it
ARMS = [('plain', {}, ()), ('L2-SP, l2sp = 0.3', dict(l2sp=0.3), ()),
        ('L2-SP-Fisher, strength = 0.5', dict(strength=0.5), ('source','first')),
        ('L2-SP-Fisher, strength = 0.5', dict(strength=0.5), ('first',)),
        ('L2-SP-Fisher, strength = 0.5', dict(strength=0.5), ('source',))]
WEIGHED = {(): '', ('source','first'): ', by both Fishers', ('first',): ', by the last Fisher',
           ('source',): ', by the first Fisher'}

def normalised(fisher, names):
    "The Fisher of some parameters, divided by its mean over them"
    mean = sum(fisher[n].sum() for n in names)/sum(fisher[n].numel() for n in names)
    return {n: fisher[n]/mean for n in names}

def with_body(model, tuned):
    "A copy of a model, with its own head and statistics, that has the body of another"
    model,own = copy.deepcopy(model),body(tuned)
    model.load_state_dict(model.state_dict() | {n: own[n] for n in body(model)})
    return model

def test_pictures(run, model):
    "Batches of the run's test pictures"
    return normalise(run_dls(run, read_target(run), run.test).valid, model)

def second_run(first, settings, arm, photos):
    "The second task: as many pictures, the same training"
    second = replace(first, data=str(photos/'data/warbirds30'), arm=arm, valid='', test='val', strength=0., l2sp=0.)
    n_first,n_second = [len(pick_split(read_target(o), o.train)) for o in (first,second)]
    return replace(second, fraction=min(1., n_first/n_second), **settings)

def do(first, settings, fishers, photos, work):
    "Train the second task after a first, and measure all three"
    model = load_run(work/'runs'/first.id).model
    found = run_source(replace(first, strength=1.), work/'sources', progress=False)
    second = second_run(first, settings, f'{first.arm}{WEIGHED[fishers]}', photos)
    weights = {}
    if 'source' in fishers: weights['source'] = found.fisher
    if 'first' in fishers:
        train = pick_split(read_target(first), first.train)
        pictures = source_dl(train, model, first.size, num_workers=first.num_workers)
        weights['first'] = estimate_fisher(model, pictures, progress=False)
    names = list(body(model))
    parts = [normalised(o, names) for o in weights.values()]
    total = {n: sum(o[n] for o in parts) for n in names} if parts else None
    folder = work/'sequence'/second.id
    folder.mkdir(parents=True, exist_ok=True)
    penalty = replace(second, strength=second.strength*len(parts))        # so that each Fisher has its strength
    tuned = fine_tune(penalty, model, total, folder, quiet=True).model
    of_first,of_second = test_pictures(first, model),test_pictures(second, tuned)
    return {k: getattr(second, k) for k in KEY} | dict(
        weighed_by=' and '.join(fishers), strength=second.strength, l2sp=second.l2sp, fraction=second.fraction,
        source_before=accuracy_on(with_body(found.model, model), found.pictures),
        source=accuracy_on(with_body(found.model, tuned), found.pictures),
        first_before=accuracy_on(model, of_first), first=accuracy_on(with_body(model, tuned), of_first),
        second=accuracy_on(tuned, of_second))

@call_parse
def main(
    photos:str, # Folder with data/ and weights/, as for `benchmarks/aircraft.py`
    out:str='results/aircraft', # Folder for the table
    work:str='.keep/aircraft', # The folder of the runs, as for `benchmarks/aircraft.py`
    seeds:int=3, # Runs an arm
):
    "Do what has no row yet, seed after seed."
    photos,work,file = Path(photos),Path(work),Path(out)/'sequence.csv'
    runs = read_runs(work)
    for seed in sorted(runs.seed.unique())[:seeds]:
        for arm,settings,fishers in ARMS:
            for i in runs[(runs.arm==arm) & (runs.seed==seed)].id:
                first = read_run(work/'runs'/i)
                key = tuple(getattr(replace(first, arm=arm+WEIGHED[fishers]), o) for o in KEY)
                if key in {*rows_of(file).reindex(columns=KEY).itertuples(index=False, name=None)}: continue
                row = do(first, settings, fishers, photos, work)
                add_rows(pd.DataFrame([row]), file, KEY)
                print(f"{row['arm']}, seed {seed}: ImageNet {row['source']:.1%}, aircraft {row['first']:.1%}, "
                      f"warbirds {row['second']:.1%}", flush=True)
    print(rows_of(file).to_string())
