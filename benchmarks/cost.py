"""What the arms cost on the paper's pictures: time per step, memory, and the speed of the Fisher's estimation.

    python benchmarks/cost.py PHOTOS

PHOTOS, the network and the source are those of `aircraft.py`. The arms take turns, round after round, with an epoch
over three tenths of the training pictures each. `step_ms` is the median time of a batch from its arrival to the end of
its step, without the loading of pictures; `ratio` is the median over rounds of its ratio to the plain arm's time in the
same round. Memory is the peak of a separate process that trains for one such epoch, so it includes Python and its
libraries. The Fisher's speed is compared with that of such an epoch; both include the loading of pictures.
"""
import json, re, subprocess, sys, tempfile, time
from pathlib import Path
from statistics import median
import pandas as pd, torch
from fastai.callback.core import Callback
from fastcore.script import call_parse
from fgvc_fisher.data import read_pictures
from fgvc_fisher.experiment import Run, fine_tune
from fgvc_fisher.experiment.run import run_source
from fgvc_fisher.fisher import estimate_fisher
from fgvc_fisher.learner import source_dl
from aircraft import EWC, PUBLISHED, further_callbacks, settings
from warbirds import machine

ARMS = {'plain': {}, 'L2': dict(alpha=5e-4), 'L2-SP': dict(l2sp=0.3), 'L2-SP-Fisher': dict(strength=0.5),
        'both': dict(l2sp=0.03, strength=0.5), 'EWC, clipped': dict(strength=0.01, **EWC),
        'as published': dict(alpha=5e-4, beta=4e-5, **PUBLISHED), 'LwF, weight = 1': {},
        'last layer only': dict(tune='head')}
ESTIMATES = {'sampled': dict(), 'empirical': dict(kind='empirical'),
             'exact, 99 %': dict(kind='exact', mass=0.99, n_images=64)}

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

def one_epoch_run(photos, work, arm, size):
    "A training of an epoch over a part of the pictures, without validation"
    return Run(arm=arm, epochs=1, size=size, lr=1e-3, num_workers=0, fraction=0.3, data=photos/'data/fgvc20', valid='',
               test='val', **settings('main', photos, work), **ARMS[arm])

def epoch(run, source):
    "Train for one epoch; the seconds of each batch but the first, and of the whole epoch"
    times,start = Times(),time.perf_counter()
    cbs = [times, *(make() for make in further_callbacks(run))]
    fine_tune(run, source.model, source.fisher, cbs=cbs, quiet=True)
    return times.seconds[1:],time.perf_counter()-start

def memory(photos, work, arm, size):
    "Peak memory in MB of a separate process that trains for one epoch"
    job = json.dumps([str(photos), str(work), arm, size])
    command = [sys.executable, __file__, str(photos), '--alone', job]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

def peak_memory(photos, work, arm, size):
    "Peak memory in MB of this process, after an epoch"
    run = one_epoch_run(Path(photos), Path(work), arm, size)
    epoch(run, run_source(run, work, progress=False))
    if torch.cuda.is_available(): return torch.cuda.max_memory_allocated()/1e6
    status = Path('/proc/self/status').read_text()                 # Linux; `getrusage` starts with the parent's peak
    return int(re.search(r'VmHWM:\s+(\d+)', status)[1])/1000

def steps(photos, work, size, rounds):
    "One row per arm: time per step and peak memory"
    runs = {o: one_epoch_run(photos, work, o, size) for o in ARMS}
    sources = {o: run_source(r, work, progress=False) for o,r in runs.items()}
    turns = [{o: median(epoch(r, sources[o])[0]) for o,r in runs.items()} for _ in range(rounds+1)][1:]
    ratios = {o: sorted(t[o]/t['plain'] for t in turns) for o in runs}
    return [dict(arm=o, step_ms=1000*median(t[o] for t in turns), ratio=median(ratios[o]), ratio_low=ratios[o][0],
                 ratio_high=ratios[o][-1], memory_mb=memory(photos, work, o, size)) for o in runs]

def fishers(photos, work, size, rounds):
    "One row per kind of Fisher: pictures per second, and the ratio to a training epoch of the same round"
    run = one_epoch_run(photos, work, 'plain', size)
    source = run_source(run, work, progress=False)
    pictures = read_pictures(photos/'data/imagenet_sample')[::4].reset_index(drop=True)
    dl = source_dl(pictures, source.model, size, num_workers=0)
    turns = []
    for _ in range(rounds):
        batches,seconds = epoch(run, source)
        turns.append(dict(training=(len(batches)+1)*run.bs/seconds))
        for name,kw in ESTIMATES.items():
            start = time.perf_counter()
            fisher = estimate_fisher(source.model, dl, progress=False, **kw)
            turns[-1][name] = fisher.n_images/(time.perf_counter()-start)
    return [dict(what=o, pictures_s=median(t[o] for t in turns), ratio=median(t[o]/t['training'] for t in turns))
            for o in turns[0]]

@call_parse
def main(
    photos:str, # Folder with data/ and weights/
    out:str='results/aircraft', # Folder for the tables
    size:int=160, # Side of the pictures in pixels
    rounds:int=3, # Rounds of one epoch per arm, after one that is not counted
    alone:str='', # For the script itself: one epoch of one arm, to measure its memory
):
    if alone:
        print(peak_memory(*json.loads(alone)))
        return
    about = dict(size=size, machine=machine('cuda' if torch.cuda.is_available() else 'cpu'))
    with tempfile.TemporaryDirectory() as work:
        for file,rows in (('cost', steps), ('cost_fisher', fishers)):
            found = pd.DataFrame(rows(Path(photos), Path(work), size, rounds)).assign(**about)
            found.to_csv(Path(out)/f'{file}.csv', index=False, float_format='%.4g')
            print(found.to_string(index=False, float_format='{:.4g}'.format), flush=True)
