"""What the penalty costs on real photographs: time per step, memory, and the speed of the Fisher's estimation.

    python benchmarks/cost.py PHOTOS

PHOTOS and the networks are as for `evidence.py`. The arms take turns, round after round, with an epoch of `airliners17`
each. `step_ms` is the median time of a batch from its arrival to the end of its step, without the loading of pictures;
`ratio` is the median over rounds of its ratio to the plain arm's time in the same round. Memory is the peak of a
separate process that trains for one such epoch, so it includes Python and its libraries. The Fisher's speed is compared
with that of a plain training epoch; both include the loading of pictures.
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

ARMS = {'plain': {}, 'L2': dict(alpha=5e-4), 'L2-SP': dict(l2sp=0.1), 'L2-SP-Fisher': dict(beta=10.),
        'explicit step': dict(beta=0.01, step='grad'),
        'as published': dict(step='published', alpha=5e-4, beta=4e-5, l2sp=0.004), 'last layer only': dict(tune='head')}
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

def one_epoch_run(photos, network, arm, size):
    return Run(arm=arm, epochs=1, size=size, lr=1e-3, num_workers=0, **settings(photos, 'airliners17', network),
               **ARMS[arm])

def epoch(run, source):
    "Train for one epoch; the seconds of each batch but the first, and of the whole epoch"
    times,start = Times(),time.perf_counter()
    fine_tune(run, source.model, source.fisher, cbs=[times], quiet=True)
    return times.seconds[1:],time.perf_counter()-start

def memory(photos, network, arm, size, shared):
    "Peak memory in MB of a separate process that trains for one epoch"
    job = json.dumps([str(photos), network, arm, size, str(shared)])
    command = [sys.executable, __file__, str(photos), '--alone', job]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

def peak_memory(photos, network, arm, size, shared):
    "Peak memory in MB of this process, after an epoch"
    run = one_epoch_run(Path(photos), network, arm, size)
    epoch(run, run_source(run, shared, progress=False))
    if torch.cuda.is_available(): return torch.cuda.max_memory_allocated()/1e6
    status = Path('/proc/self/status').read_text()                 # Linux; `getrusage` starts with the parent's peak
    return int(re.search(r'VmHWM:\s+(\d+)', status)[1])/1000

def steps(photos, network, size, rounds, shared):
    "One row per arm: time per step and peak memory"
    runs = {o: one_epoch_run(photos, network, o, size) for o in ARMS}
    sources = {o: run_source(r, shared, progress=False) for o,r in runs.items()}
    turns = [{o: median(epoch(r, sources[o])[0]) for o,r in runs.items()} for _ in range(rounds+1)][1:]
    ratios = {o: sorted(t[o]/t['plain'] for t in turns) for o in runs}
    return [dict(network=network, arm=o, step_ms=1000*median(t[o] for t in turns), ratio=median(ratios[o]),
                 ratio_low=ratios[o][0], ratio_high=ratios[o][-1],
                 memory_mb=memory(photos, network, o, size, shared)) for o in runs]

def fishers(photos, network, size, rounds, shared):
    "One row per kind of Fisher: pictures per second, and the ratio to a training epoch of the same round"
    run = one_epoch_run(photos, network, 'plain', size)
    source = run_source(run, shared, progress=False)
    pictures = read_pictures(photos/'data/imagenet_sample')[::2].reset_index(drop=True)
    dl = source_dl(pictures, source.model, size, num_workers=0)
    training = Run(**vars(run) | dict(valid='', test='val'))
    turns = []
    for _ in range(rounds):
        turns.append(dict(training=476/epoch(training, source)[1]))    # 476 pictures in the training split
        for name,kw in ESTIMATES.items():
            start = time.perf_counter()
            fisher = estimate_fisher(source.model, dl, progress=False, **kw)
            turns[-1][name] = fisher.n_images/(time.perf_counter()-start)
    return [dict(network=network, what=o, pictures_s=median(t[o] for t in turns),
                 ratio=median(t[o]/t['training'] for t in turns)) for o in turns[0]]

def put(rows, file, size):
    "Write the rows of a network to a file: they replace its earlier rows and leave those of other networks"
    new = pd.DataFrame(rows).assign(size=size, machine=machine('cuda' if torch.cuda.is_available() else 'cpu'))
    old = rows_of(file)
    others = old[~old.network.isin(new.network)] if len(old) else old
    pd.concat([others, new]).to_csv(file, index=False, float_format='%.4g')
    print(new.to_string(index=False, float_format='{:.4g}'.format))

@call_parse
def main(
    photos:str, # Folder with data/ and weights/
    out:str='results/evidence', # Folder for the tables
    networks:str='mobilenet,squeezenet', # Networks to measure, separated by commas
    size:int=128, # Side of the pictures in pixels
    rounds:int=5, # Rounds of one epoch per arm, after one that is not counted
    alone:str='', # For the script itself: one epoch of one arm, to measure its memory
):
    if alone:
        print(peak_memory(*json.loads(alone)))
        return
    with tempfile.TemporaryDirectory() as shared:
        for network,(file,rows) in product(networks.split(','), (('cost', steps), ('cost_fisher', fishers))):
            put(rows(Path(photos), network, size, rounds, shared), Path(out)/f'{file}.csv', size)
