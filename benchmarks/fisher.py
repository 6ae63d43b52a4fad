"""The empirical diagonal Fisher of four networks: this package, one image at a time, and other packages.

    python benchmarks/fisher.py

One row per network and method: images per second and peak memory, both also relative to a plain forward and backward
pass of the same batch; the relative error against one image at a time and the number of missing parameters; or the
reason why the method fails. Each method runs in a separate process. Its memory is what the first estimate needs beyond
model, batch and imports; `first_s` is the time of this estimate, with everything that a package prepares or checks
once. Afterwards the method and the plain pass are timed in turns, and the ratio is the median over the turns. The
newest versions of the other packages are installed into `benchmarks/.peers` unless they are there; they use the
PyTorch of the running environment. Weights and pictures are random. Linux only.
"""
import ctypes, gc, json, os, platform, resource, subprocess, sys, sysconfig, tempfile, time
from contextlib import nullcontext
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from statistics import median
from textwrap import shorten
import pandas as pd, timm, torch, torch.nn.functional as F
from fastcore.script import call_parse
from safetensors.torch import load_file, save_file
from timm.models.efficientnet import _gen_mobilenet_v1
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

# pixels, batch
NETWORKS = dict(inception_v4=(299,8), mobilenetv1_075=(224,32), resnet50=(224,16), vit_tiny_patch16_224=(224,32))
PEERS,METHODS = Path(__file__).resolve().parent/'.peers',{}

mobilenet = partial(_gen_mobilenet_v1, 'mobilenetv1_100', 0.75, pretrained=False, pad_type='same', bn_eps=1e-3)

def build(network): return mobilenet() if network=='mobilenetv1_075' else timm.create_model(network, pretrained=False)

def method(package, module=None):
    "Register a method of `package`: from a model and batches it makes a function that returns the Fisher by name"
    return lambda f: METHODS.setdefault(f.__name__, (f, package, module))[0]

def mean_of(squares, batches):
    "The mean over images, where `squares(x, y)` gives the sum over a batch"
    sums = {}
    for x,y in batches:
        for k,v in squares(x, y).items(): sums[k] = sums[k].add_(v) if k in sums else v
    return {k: v/sum(len(x) for x,_ in batches) for k,v in sums.items()}

def parts(batches, n): return [o for x,y in batches for o in zip(x.split(n), y.split(n))]

def as_loader(batches):
    images = ConcatDataset([TensorDataset(*b) for b in batches])
    return DataLoader(images, batch_size=len(batches[0][0]))

# The methods; the docstring is the method's name in the table

@method('torch')
def plain(model, batches):
    "plain forward and backward"
    def run():
        for x,y in batches:
            model.zero_grad(set_to_none=True)
            F.cross_entropy(model(x), y).backward()
    return run

@method('torch')
def single(model, batches):
    "one image at a time"
    names,params = zip(*model.named_parameters())
    def squares(x, y): return {k: g*g for k,g in zip(names, torch.autograd.grad(F.cross_entropy(model(x), y), params))}
    return lambda: mean_of(squares, parts(batches, 1))

@method('fgvc_fisher')
def fgvc_fisher(model, batches):
    "fgvc_fisher"
    from fgvc_fisher.fisher.estimate import Estimate, LabelPlan
    estimate = Estimate(model, LabelPlan('empirical'), {})   # as in `estimate_fisher`; the first call checks the rules
    def run():
        for x,y in batches: estimate.add(x, y)
        return dict(estimate.fisher())
    return run

@method('fgvc_fisher')
def laid_out(model, batches):
    "fgvc_fisher, channels last"
    from fgvc_fisher.learner import channels_last
    return fgvc_fisher(channels_last(model, batches[0][0].shape[-1]), batches)

@method('torch')
def vmap(model, batches):
    "torch.func vmap"
    params,buffers = [{k: v.detach() for k,v in o} for o in (model.named_parameters(), model.named_buffers())]
    def loss(params, x, y):
        out = torch.func.functional_call(model, (params, buffers), (x[None],))
        return F.cross_entropy(out, y[None])
    per_image = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    def squares(x, y): return {k: v.square().sum(0) for k,v in per_image(params, x, y).items()}
    def run():
        while True:
            try: return mean_of(squares, parts(batches, run.n))
            except (MemoryError, RuntimeError) as e:
                if run.n==1 or 'memory' not in repr(e).lower(): raise
            run.n //= 2
            run.note = f'{run.n} images at once, more did not fit into memory'
            clear_peak(batches[0][0].device.type)
    run.n = len(batches[0][0])
    return run

@method('backpack-for-pytorch', 'backpack')
def backpack(model, batches):
    "BackPACK"
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared
    loss,why = extend(torch.nn.CrossEntropyLoss(reduction='sum')),''
    try: net = extend(model, use_converter=True)
    # even a converter that fails late has already replaced in-place activations, with which `extend` would fail, too
    except Exception as e: net,why = extend(model),f'its converter failed: {type(e).__name__}'
    def squares(x, y):
        net.zero_grad()
        with backpack(SumGradSquared()): loss(net(x), y).backward()
        return {k: p.sum_grad_squared for k,p in net.named_parameters() if hasattr(p, 'sum_grad_squared')}
    def run(): return mean_of(squares, batches)
    run.note = why
    return run

@method('nngeometry', 'nngeometry')
def nngeometry(model, batches):
    "NNGeometry"
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatDiag, PVector
    layers = LayerCollection.from_model(model)
    def log_likelihood(x, y): return -F.cross_entropy(model(x), y, reduction='none')[:,None]
    def run():
        backend = TorchHooksJacobianBackend(model=model, function=log_likelihood, layer_collection=layers)
        diag = PVector(layers, vector_repr=PMatDiag(backend, examples=as_loader(batches)).get_diag()).to_dict()
        return {f'{k}.{n}': v for k,wb in diag.items() for n,v in zip(('weight','bias'), wb)}
    return run

@method('opacus', 'opacus')
def opacus(model, batches):
    "Opacus"
    from opacus import GradSampleModule
    net = GradSampleModule(model.train(), strict=False, loss_reduction='sum')   # in evaluation mode it records nothing
    def squares(x, y):
        net.zero_grad()
        F.cross_entropy(net(x), y, reduction='sum').backward()
        return {k: p.grad_sample.square().sum(0) for k,p in model.named_parameters() if p.grad_sample is not None}
    return lambda: mean_of(squares, batches)

@method('laplace-torch', 'laplace')
def laplace(model, batches):
    "laplace-torch, CurvlinopsEF"
    from laplace import DiagLaplace
    from laplace.curvature import CurvlinopsEF
    names,params = zip(*model.named_parameters())
    posterior = DiagLaplace(model, 'classification', backend=CurvlinopsEF)
    def run():
        posterior.fit(as_loader(batches))
        diag = (posterior.H/posterior.n_data).split([p.numel() for p in params])
        return {k: v.view_as(p) for k,v,p in zip(names, diag, params)}
    return run

# A measurement, in a process of its own

def clear_peak(device):
    "Reset the peak memory; `ru_maxrss` cannot be reset, and starts with the parent's peak"
    gc.collect()
    if device=='cuda': torch.cuda.reset_peak_memory_stats()
    else:
        ctypes.CDLL(None).malloc_trim(0)
        Path('/proc/self/clear_refs').write_text('5')

def memory(device, peak=False):
    "MiB in use now, or at the peak"
    if device=='cuda': return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated())/2**20
    return int(Path('/proc/self/status').read_text().split('VmHWM:' if peak else 'VmRSS:')[1].split()[0])/1024

def prepare(folder, network, size, bs, device, **_):
    "Save a batch and weights, with BatchNorm statistics that bound the gradients"
    torch.manual_seed(0)
    model = build(network).to(device).train()
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.momentum = None   # the mean over the passes
    with torch.no_grad():
        for _ in range(3): model(torch.randn(bs, 3, size, size).to(device))
    torch.save((model.state_dict(), torch.randn(bs, 3, size, size), torch.randint(1000, (bs,))), folder/'network.pt')

def compare(fisher, wanted):
    "The relative error of a Fisher, and the number of missing parameters"
    def difference(k, v): return fisher[k].detach().cpu().float().view_as(v)-v if k in fisher else v
    off = sum(difference(k, v).double().square().sum() for k,v in wanted.items())
    total = sum(v.double().square().sum() for v in wanted.values())
    return dict(error=(off/total).sqrt().item(), missing=len(wanted.keys()-fisher.keys()))

def measure(folder, network, device, name, amp, n_batches, seconds, limit, **_):
    "Yield memory, error and speed as soon as they are known"
    if device=='cpu':   # too large an allocation raises an error; if memory runs out, this process is killed first
        free = int(Path('/proc/meminfo').read_text().split('MemAvailable:')[1].split()[0])*1024
        resource.setrlimit(resource.RLIMIT_DATA, (int(.9*free),)*2)
        Path('/proc/self/oom_score_adj').write_text('1000')
    make,_,module = METHODS[name]
    if module: import_module(module)
    state,x,y = torch.load(folder/'network.pt', weights_only=True)
    reference = folder/'reference.safetensors'
    layout = dict(device=device, memory_format=torch.channels_last if amp else None)
    x,y = x.to(**layout),y.to(device)
    models = [build(network).eval() for _ in range(2)]
    for m in models: m.load_state_dict(state)
    model,other = [m.to(**layout) for m in models]
    def call(f):
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16) if amp else nullcontext(): out = f()
        if device=='cuda': torch.cuda.synchronize()
        return time.perf_counter()-start,out
    call(plain(other, [(x[:1],y[:1])]))                     # loads the kernels before memory is measured
    other.zero_grad()
    torch.backends.cudnn.allow_tf32 = False                 # compared in float32, timed as PyTorch is by default
    clear_peak(device)
    before,batches = memory(device),[(x,y)]*n_batches
    run = make(model, batches)
    first,fisher = call(run)
    found = dict(mib=memory(device, peak=True)-before, first_s=first, note=getattr(run, 'note', ''))
    if name=='single' and not amp: save_file({k: v.cpu() for k,v in fisher.items()}, reference)
    if fisher is not None and reference.exists(): found.update(compare(fisher, load_file(reference)))
    del fisher
    yield found
    torch.backends.cudnn.allow_tf32 = True
    base,turns,end = plain(other, batches),[],time.perf_counter()+.8*limit-first
    for f in (base, run) if device=='cuda' else (base,): call(f)
    while len(turns)<3 or sum(map(sum, turns))<seconds:
        turns.append([call(f)[0] for f in (base, run)])
        speed,ratio = len(x)*n_batches/median(r for _,r in turns),median(b/r for b,r in turns)
        yield found | dict(images_s=speed, of_plain=ratio, turns=len(turns))
        if time.perf_counter()+sum(turns[-1])>end: return

def work(job):
    "The job of a child process"
    folder = job['folder'] = Path(job['folder'])
    if job['name']=='prepare': return prepare(**job)
    try:
        for found in measure(**job): (folder/'found.json').write_text(json.dumps(found))
    except Exception as e:
        why = shorten(f'{type(e).__name__}: {str(e).split("DefaultCPUAllocator: ")[-1]}', 120)
        (folder/'found.json').write_text(json.dumps(dict(note=why)))

# The table

def start(job, path, limit):
    "Run `job` in a process that imports from the folders `path` first; what it measured, or a note why it failed"
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([*path, os.environ.get('PYTHONPATH', '')]).strip(os.pathsep))
    command = [sys.executable, __file__, '--job', json.dumps(job)]
    file,why = Path(job['folder'])/'found.json',''
    file.unlink(missing_ok=True)
    try:
        p = subprocess.run(command, env=env, timeout=limit, capture_output=True, text=True)
        if p.returncode==-9: why = 'killed (out of memory?)'
        elif p.returncode: why = f'ended with {p.returncode}: {p.stderr.strip()[-80:]}'
    except subprocess.TimeoutExpired: why = f'longer than {limit} s'
    return (json.loads(file.read_text()) if file.exists() else {}) | (dict(note=why) if why else {})

def peers():
    "The folder with the other packages, which are installed on the first call"
    if not (PEERS/'installed').exists():
        print(f'Installing the other packages into {PEERS}', flush=True)
        subprocess.run([sys.executable, '-m', 'venv', '--clear', PEERS], check=True)
        (PEERS/'.gitignore').write_text('*\n')
        (next(PEERS.glob('lib/python*/site-packages'))/'running.pth').write_text(sysconfig.get_path('purelib')+'\n')
        names = {package for _,package,module in METHODS.values() if module}
        pip = [PEERS/'bin/python', '-m', 'pip', 'install', '-qq', *names, f'torch=={metadata.version("torch")}']
        if subprocess.run(pip).returncode: print('They could not be installed')
        else: (PEERS/'installed').touch()
    site = next(PEERS.glob('lib/python*/site-packages'))
    if (site/'torch').exists(): raise RuntimeError(f'{site} has a PyTorch of its own: remove {PEERS}')
    return [str(site)]

def machine(device):
    cpuinfo = Path('/proc/cpuinfo').read_text().splitlines()
    models = [o.split(':')[1].strip() for o in cpuinfo if o.startswith('model name')]
    cpu = models[0] if models else platform.machine()
    name = torch.cuda.get_device_name() if device=='cuda' else f'{cpu}, {torch.get_num_threads()} threads'
    return dict(machine=name, python=platform.python_version(), torch=torch.__version__)

@call_parse
def main(
    out:str='results/fisher_speed', # Folder for the table
    device:str='auto', # 'cpu', 'cuda', or 'auto': a GPU if there is one
    amp:bool=False, # Also the plain pass and this package in bfloat16, channels last?
    bs:float=1, # Multiplies the batch sizes
    only:str=','.join(NETWORKS), # The networks; other timm networks get 160 pixels, batch 4
    methods:str=','.join(METHODS), # The methods; `single` always runs, the others are compared with it
    seconds:float=10, # Time for timing a method
    limit:int=600, # Seconds after which a method is stopped
    n_batches:int=0, # Batches per estimate; 0: one on a CPU, eight on a GPU
    job:str='', # For the script itself: the job of a child process
):
    if job: return work(json.loads(job))
    if device=='auto': device = 'cuda' if torch.cuda.is_available() else 'cpu'
    chosen = [(o,False) for o in METHODS if o in ['single', *methods.split(',')]]
    if amp: chosen += [(o,True) for o in ('plain','fgvc_fisher')]
    n_batches = n_batches or (8 if device=='cuda' else 1)
    path = peers() if any(METHODS[o][2] for o,_ in chosen) else []
    rows,file = [],Path(out)/f'{device}.csv'
    file.parent.mkdir(parents=True, exist_ok=True)
    for network in only.split(','):
        size,n = NETWORKS.get(network, (160,4))
        what,plain_mib = dict(network=network, size=size, bs=max(1, round(n*bs))),None
        with tempfile.TemporaryDirectory() as folder:
            job = dict(what, folder=folder, device=device, n_batches=n_batches, seconds=seconds, limit=limit)
            if failed := start(job | dict(name='prepare'), [], None): raise RuntimeError(f'{network}: {failed["note"]}')
            for name,low in chosen:
                make,package,module = METHODS[name]
                found = start(job | dict(name=name, amp=low), path if module else [], limit)
                if name=='plain': plain_mib = found.get('mib')
                if plain_mib and 'mib' in found: found['mib_of_plain'] = found['mib']/plain_mib
                peer = next(metadata.distributions(name=package, path=[*path, *sys.path]), None)
                about = dict(version=peer and peer.version) | machine(device)
                rows.append(what | dict(method=make.__doc__+(', bf16' if low else '')) | found | about)
                columns = [*what, 'method', 'images_s', 'of_plain', 'first_s', 'mib', 'mib_of_plain', 'error',
                           'missing', 'turns', 'note', *about]
                table = pd.DataFrame(rows, columns=columns)
                table.to_csv(file, index=False, float_format='%.4g')
                print(f'{network}, {rows[-1]["method"]}', flush=True)
    print(table.drop(columns=[*machine(device)]).to_string(index=False, float_format='{:.4g}'.format, na_rep=''))
    print('; '.join(machine(device).values()))
