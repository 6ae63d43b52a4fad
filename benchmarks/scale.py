"""How training with the penalty and estimating the Fisher scale to two processes, and by calculation to many GPUs.

    python benchmarks/scale.py --photos PHOTOS  # measure and calculate
    python benchmarks/scale.py                  # only calculate

PHOTOS contains `data/warbirds30` and `weights/mobilenetv1_075_imagenet.safetensors`. `torchrun` starts the processes,
with one thread each. They read decoded pictures, so that the network is measured and not the disk. One process and two
take turns, round after round, because the speed of a shared machine varies; the efficiency is the median over rounds of
rate(2) / (2 rate(1)), with rates in pictures per second.
"""
import json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path
import pandas as pd, timm, torch
from fastai.data.all import DataLoaders, TfmdDL
from fastcore.script import call_parse
from fgvc_fisher.experiment.budget import picture_cost
from fgvc_fisher.callback import L2SPFisherCallback
from fgvc_fisher.data import aircraft_dls
from fgvc_fisher.fisher import estimate_fisher
from fgvc_fisher.learner import aircraft_learner, source_model
from fgvc_fisher.distributed.ranks import shutdown_processes, processes
from fgvc_fisher.learner import distributed_training
from warbirds import mobilenet

# `share`: the part of its peak that a GPU reaches when it trains Inception-v4
# T4: from the published validation batches, 24.5 GFLOP * 32 in 0.13 s of 65 TFLOPS. H200: an assumption, not measured
GPUS = {'T4': dict(tflops=65, share=0.093), 'H200': dict(tflops=989, share=0.2)}
# bytes per second, in one direction, of the slowest link of a ring
LINKS = {'PCIe 3': 12e9, 'NVLink': 450e9, '10 Gbit/s': 1.25e9, '100 Gbit/s': 12.5e9, '400 Gbit/s': 50e9}
SETUPS = [('T4',2,'PCIe 3'), ('T4',8,'10 Gbit/s'), ('T4',8,'100 Gbit/s'),
          ('H200',2,'NVLink'), ('H200',8,'NVLink'), ('H200',64,'100 Gbit/s'), ('H200',64,'400 Gbit/s')]

def decoded(photos, n, size):
    "The first `n` pictures and labels, as the network sees them"
    dl = aircraft_dls(Path(photos)/'data/warbirds30', size=size, bs=32, num_workers=0).valid
    batches = []
    for b in dl:
        batches.append(b)
        if sum(len(o[1]) for o in batches)>=n: break
    return [torch.cat(o)[:n].as_subclass(torch.Tensor) for o in zip(*batches)]

def work(file):
    "The work of one process: time training and a Fisher's estimation, in batches of 32 over all processes"
    torch.set_num_threads(1)
    n,i = processes()
    job = torch.load(file)
    x,y = job['x'],job['y']
    source = source_model(mobilenet, job['weights'])
    mine = list(zip(x, y))
    dls = DataLoaders(*(TfmdDL(mine, bs=32//n, shuffle=o, drop_last=True, num_workers=0) for o in (True, False)))
    fisher = estimate_fisher(source, [x[:32]], progress=False)                       # also warms up
    def timed(f, pictures):
        start = time.perf_counter()
        f()
        return pictures/(time.perf_counter()-start)
    learn = aircraft_learner(dls, source, n_out=30, loss_func=torch.nn.CrossEntropyLoss())
    cb = L2SPFisherCallback(beta=10., fisher=fisher, anchor=dict(source.named_parameters()))
    def train():
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.001, cbs=cb)
    learn.dls.valid.n = 32
    with distributed_training(learn):
        train()
        steps = len(x)//32*32
        rate = timed(train, steps)
    batches = list(zip(x.split(32//n), y.split(32//n)))
    ours = timed(lambda: estimate_fisher(source, batches, progress=False), len(x))
    if not i: print(json.dumps(dict(training=rate, fisher=ours)), flush=True)
    shutdown_processes()

def measured(file, n):
    "Rates of n processes"
    starter = [str(Path(sys.executable).parent/'torchrun'), '--nproc-per-node', str(n), '--no-python']
    command = [*starter, sys.executable, '-c', f'import scale; scale.work({file!r})']
    path = os.pathsep.join(map(str, [Path(__file__).parent, *sys.path]))
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=path)
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode: sys.exit(done.stderr[-3000:])
    return json.loads([o for o in done.stdout.splitlines() if o.startswith('{')][-1])

def on_paper():
    """Calculated for Inception-v4 at 299 pixels, 32 pictures per GPU: the time of a step, the time to send its
    gradients, and the efficiency if communication and backward pass do not overlap"""
    model = timm.create_model('inception_v4')
    cost = picture_cost(model, 299)['training']
    size = 4*sum(p.numel() for p in model.parameters())
    rows = []
    for gpu,n,link in SETUPS:
        step = 32*cost/(GPUS[gpu]['tflops']*1e12*GPUS[gpu]['share'])
        sent = 2*(n-1)/n*size          # in a ring each GPU sends every gradient twice, except the n-th part
        rows.append(dict(gpu=gpu, gpus=n, link=link, step_ms=1e3*step, mb_sent=sent/1e6, send_ms=1e3*sent/LINKS[link]))
    t = pd.DataFrame(rows)
    return t.assign(pictures_s=32e3*t.gpus/(t.step_ms+t.send_ms), efficiency=t.step_ms/(t.step_ms+t.send_ms))

@call_parse
def main(
    photos:str='', # Folder with data/ and weights/; default: only calculate
    out:str='results/scale', # Folder for the tables
    rounds:int=5, # Rounds of one process and two
    pictures:int=256, # Pictures, decoded beforehand
    size:int=128, # Their side in pixels
):
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    paper = on_paper()
    paper.to_csv(out/'paper.csv', index=False, float_format='%.4g')
    if not photos: return print(paper.to_string(index=False))
    with tempfile.TemporaryDirectory() as folder:
        file,(x,y) = f'{folder}/pictures.pt',decoded(photos, pictures, size)
        torch.save(dict(x=x, y=y, weights=str(Path(photos)/'weights/mobilenetv1_075_imagenet.safetensors')), file)
        rows = [dict(round=k, processes=n, **measured(file, n)) for k in range(rounds) for n in (1, 2)]
    machine = (f'{os.cpu_count()} cores, {platform.machine()}; '
               f'Python {platform.python_version()}, torch {torch.__version__}')
    t = pd.DataFrame(rows).assign(size=size, machine=machine)
    t.to_csv(out/'cpu.csv', index=False, float_format='%.4g')
    one,two = [t[t.processes==n].set_index('round')[['training','fisher']] for n in (1, 2)]
    print(t.to_string(index=False), '\n\nefficiency, median over rounds\n', (two/one/2).median().to_string())
