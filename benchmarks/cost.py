"""What remembering costs: seconds a step, memory, and seconds for the Fisher, on real photographs.

    python benchmarks/cost.py PHOTOS

PHOTOS and the networks as for `evidence.py`. The arms take turns, an epoch of `airliners17` each, round after round: `step_ms` is the median time of a
batch from its arrival to the end of its step, without the loading of pictures, and `ratio` the median over rounds of what it is to the plain arm's of the same
round. Memory is the greatest that a process of its own had in the same epoch, so it holds Python and its libraries, too. The Fisher's pace is that of
its estimation, with the loading, beside the pace of a plain training epoch with the loading.
"""
import json, re, subprocess, sys, tempfile, time
from itertools import product
from pathlib import Path
from statistics import median
import pandas as pd, torch
from fastai.callback.core import Callback
from fastcore.script import call_parse
from fgvc_fisher.data import read_pictures
from fgvc_fisher.experiment import Run
from fgvc_fisher.fisher import estimate_fisher
from fgvc_fisher.learner import source_dl
from fgvc_fisher.experiment import fine_tune
from fgvc_fisher.experiment.run import run_source
from evidence import rows_of, settings
from warbirds import machine

ARMS = {'plain': {}, 'L2': dict(alpha=5e-4), 'L2-SP': dict(l2sp=0.1), 'L2-SP-Fisher': dict(beta=10.), 'explicit step': dict(beta=0.01, step='grad'),
        'as published': dict(step='published', alpha=5e-4, beta=4e-5, l2sp=0.004), 'last layer only': dict(tune='head')}
ESTIMATES = {'sampled': dict(), 'empirical': dict(kind='empirical'), 'exact, 99 %': dict(kind='exact', mass=0.99, n_images=64)}

class Times(Callback):
    "Seconds of every batch"
    order = 100
    def __init__(self): self.seconds = []
    def before_batch(self): self.began = self.now()
    def after_batch(self):
        if self.training: self.seconds.append(self.now()-self.began)
    def now(self):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        return time.perf_counter()

def a_run(photos, network, arm, size): return Run(arm=arm, epochs=1, size=size, lr=1e-3, num_workers=0, **settings(photos, 'airliners17', network), **ARMS[arm])

def epoch(run, source):
    "An epoch of an arm: seconds of its batches, and of all of it"
    times,start = Times(),time.perf_counter()
    fine_tune(run, source.model, source.fisher, cbs=[times], quiet=True)
    return times.seconds[1:],time.perf_counter()-start

def memory(photos, network, arm, size, shared):
    "Greatest memory of a process that does an epoch, in MB"
    told = json.dumps([str(photos), network, arm, size, str(shared)])
    found = subprocess.run([sys.executable, __file__, str(photos), '--alone', told], check=True, capture_output=True, text=True).stdout
    return float(found.split()[-1])

def greatest(photos, network, arm, size, shared):
    "MB that this process had at most, after an epoch"
    run = a_run(Path(photos), network, arm, size)
    epoch(run, run_source(run, shared, progress=False))
    if torch.cuda.is_available(): return torch.cuda.max_memory_allocated()/1e6
    return int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1000    # Linux; `getrusage` would begin at what the parent had

def steps(photos, network, size, rounds, shared):
    "A row an arm"
    runs = {o: a_run(photos, network, o, size) for o in ARMS}
    sources = {o: run_source(r, shared, progress=False) for o,r in runs.items()}
    turns = [{o: median(epoch(r, sources[o])[0]) for o,r in runs.items()} for _ in range(rounds+1)][1:]
    ratios = {o: sorted(t[o]/t['plain'] for t in turns) for o in runs}
    return [dict(network=network, arm=o, step_ms=1000*median(t[o] for t in turns), ratio=median(ratios[o]), ratio_low=ratios[o][0], ratio_high=ratios[o][-1],
                 memory_mb=memory(photos, network, o, size, shared)) for o in runs]

def fishers(photos, network, size, rounds, shared):
    "A row a kind of Fisher: pictures a second, and their ratio to a training epoch's of the same round"
    run = a_run(photos, network, 'plain', size)
    source,pictures = run_source(run, shared, progress=False),read_pictures(photos/'data/imagenet_sample')[::2].reset_index(drop=True)
    dl,turns = source_dl(pictures, source.model, size, num_workers=0),[]
    for _ in range(rounds):
        turns.append(dict(training=476/epoch(Run(**vars(run) | dict(valid='', test='val')), source)[1]))
        for name,kw in ESTIMATES.items():
            start = time.perf_counter()
            fisher = estimate_fisher(source.model, dl, progress=False, **kw)
            turns[-1][name] = fisher.n_images/(time.perf_counter()-start)
    return [dict(network=network, what=o, pictures_s=median(t[o] for t in turns), ratio=median(t[o]/t['training'] for t in turns)) for o in turns[0]]

def put(rows, file, size):
    "Write the rows of a network beside those of others, in place of its own of another time"
    new = pd.DataFrame(rows).assign(size=size, machine=machine('cuda' if torch.cuda.is_available() else 'cpu'))
    old = rows_of(file)
    others = old[~old.network.isin(new.network)] if len(old) else old
    pd.concat([others, new]).to_csv(file, index=False, float_format='%.4g')
    print(new.to_string(index=False, float_format='{:.4g}'.format))

@call_parse
def main(
    photos:str, # Folder with data/ and weights/
    out:str='results/evidence', # Folder for the tables
    networks:str='mobilenet,squeezenet', # What to measure, with commas between
    size:int=128, # Side of the pictures in pixels
    rounds:int=5, # Of an epoch each, after one that is not counted
    alone:str='', # For the script itself: one epoch of one arm, to see its memory
):
    if alone: print(greatest(*json.loads(alone))); return
    with tempfile.TemporaryDirectory() as shared:
        for network,(file,rows) in product(networks.split(','), (('cost', steps), ('cost_fisher', fishers))):
            put(rows(Path(photos), network, size, rounds, shared), Path(out)/f'{file}.csv', size)
