"""One batch of real photographs through every stage of Inception-v4: Fisher, a training step, validation.

    python benchmarks/inception_v4.py PATH

PATH contains `data/airliners17`, an FGVC-Aircraft tree. The weights are random: the script shows that every stage works
with the network at its full size, and how long a batch takes, not how well the network classifies.
"""
import platform, time
from pathlib import Path
import pandas as pd, torch
from fastcore.script import call_parse
from fgvc_fisher.callback import L2SPFisherCallback
from fgvc_fisher.data import aircraft_dls
from fgvc_fisher.fisher import estimate_fisher
from fgvc_fisher.learner import aircraft_learner, source_model

def one_batch(photos, size, bs):
    "`(stage, seconds)` of each stage, and the `Learner`, the Fisher and the callback"
    seconds,start = [],time.perf_counter()
    def stage(name):
        nonlocal start
        seconds.append((name, time.perf_counter()-start))
        start = time.perf_counter()
    dls = aircraft_dls(Path(photos)/'data/airliners17', size=size, bs=bs, num_workers=0)
    source = source_model('inception_v4', weights=None)
    learn = aircraft_learner(dls, source, n_out=105)
    batch = dls.valid.one_batch()
    stage('build')
    fisher = estimate_fisher(source.to(dls.device), [batch], progress=False)
    stage('fisher')
    learn.dls.train.n = bs                                   # one batch per epoch
    learn.dls.valid.n = bs
    cb = L2SPFisherCallback(alpha=5e-4, beta=10., fisher=fisher)
    # a tiny rate: untrained, the early layers' gradients are in the thousands
    with learn.no_bar(), learn.no_logging(): learn.fit(1, slice(1e-6, 3e-6), cbs=cb)
    stage('training step and validation')
    return seconds,learn,fisher,cb

@call_parse
def main(
    photos:str, # Folder with data/airliners17
    out:str='results/inception_v4', # Folder for the table
    size:int=299, # Side of the pictures in pixels
    bs:int=8, # Pictures in the batch
):
    seconds,learn,fisher,cb = one_batch(photos, size, bs)
    cpu = f'{torch.get_num_threads()} CPU threads, {platform.machine()}'
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    table = pd.DataFrame(seconds, columns=['stage','seconds'])
    table = table.assign(size=size, bs=bs, machine=f'{machine}; torch {torch.__version__}')
    Path(out).mkdir(parents=True, exist_ok=True)
    table.to_csv(Path(out)/'one_batch.csv', index=False, float_format='%.4g')
    print(table.to_string(index=False))
    print(f'parameters {sum(p.numel() for p in learn.model.parameters()):,}; Fisher of {fisher.n_images} images; '
          f'validation loss {learn.recorder.values[-1][1]:.4f}; penalty {cb.penalty.value().item():.4g}')
