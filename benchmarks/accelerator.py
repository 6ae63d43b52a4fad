"""Everything that an accelerator has to tell, in one call: five tables.

    python benchmarks/accelerator.py

1. `tests`: the tests that need a GPU, `tests/test_cuda.py`.
2. `fisher`: images per second and peak memory of the empirical Fisher, beside a plain forward and backward pass of the
   same batch, by the rule for convolutions: first this package's choice, for all networks, then unfolding and a matrix
   product, one convolution with a group for each image, and `convolution_backward` for one image at a time. `of_plain`
   is the median over turns of its speed relative to the plain pass; `error` is relative to this package's Fisher.
3. `penalty`: milliseconds of the proximal step, written in several ways. The first row only reads and writes the same
   bytes; `memory` is its time relative to a row's.
4. `training`: pictures per second of the paper's recipe with the penalty, from the original pictures and from smaller
   copies, and hours for the 80 epochs of the paper (3,334 pictures for training and 3,333 for validation).
5. `memory`: peak memory of single steps, where no more than `budget` GB may be used.

The tables lie in a folder named after the card. What has a row there is not measured again: a call that was cut off is
repeated, and to measure a row anew remove it. Weights are random, and pictures are random or drawn unless `tree` is
given. A rule is the better one for a shape and a device if its `images_s` is larger. On a CPU the script runs, too, but
it is meant for a GPU. With `--tiny` the sizes are those of its test.
"""
import gc, os, re, subprocess, sys, tempfile, time
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from textwrap import shorten
from xml.etree import ElementTree
import pandas as pd, timm, torch, torch.nn.functional as F
from fastai.callback.channelslast import ChannelsLast # adds `to_channelslast` to Learner  # noqa: F401
from fastai.callback.core import Callback
from fastcore.script import call_parse, store_true
from fgvc_fisher.callback import L2SPFisherCallback
from fgvc_fisher.data import aircraft_dls
from fgvc_fisher.data.synthetic import draw_aircraft
from fgvc_fisher.experiment.paper import as_published_penalty, fit_published, published_learner, published_scalars
from fgvc_fisher.fisher.estimate import Estimate, LabelPlan
from fgvc_fisher.fisher.per_image import RULES, PerImage, conv_rule
from fgvc_fisher.penalty import QuadraticPenalty
from fisher import clear_peak, memory
from penalty import Step, kernels
from warbirds import machine

NETWORKS = dict(inception_v4=299, resnet50=224, mobilenetv3_large_100=224, vit_small_patch16_224=224)       # pixels
SIZES = dict(networks=NETWORKS, batches=(32,128), seconds=1., arch='inception_v4', size=299, bs=32, drawn=384,
             variants=4, each=64, workers=None)
TINY = dict(networks=dict(test_resnet=32), batches=(2,), seconds=0., arch='test_resnet', size=32, bs=4, drawn=64,
            variants=2, each=4, workers=0)

# The tables

class Table:
    "Rows in a CSV file, each measured once; the row of a measurement that fails has a note"
    def __init__(self, file, keys):
        self.file,self.keys = file,keys
    def rows(self): return pd.read_csv(self.file) if self.file.exists() else pd.DataFrame(columns=self.keys)
    def has(self, key):
        wanted = [f'{o:g}' if isinstance(o, float) else str(o) for o in key.values()]
        return (self.rows()[self.keys].astype(str)==wanted).all(axis=1).any()
    def add(self, measure, **key):
        "Measure a row, unless it is there: `measure` yields its columns as soon as they are known"
        if self.has(key): return
        found = dict(note='')
        try:
            for columns in measure(): found |= columns
        except Exception as e: found |= dict(note=shorten(f'{type(e).__name__}: {e}', 200))
        gc.collect()
        if torch.cuda.is_available(): torch.cuda.empty_cache()
        rows = pd.concat([self.rows(), pd.DataFrame([key | found])])
        rows.to_csv(self.file, index=False, float_format='%.4g')
        print(self.file.stem, *(f'{k} {v}' for k,v in (key | found).items()), sep=', ', flush=True)

def settle(device):
    if device=='cuda': torch.cuda.synchronize()
def seconds(f, device):
    settle(device)
    start = time.perf_counter()
    f()
    settle(device)
    return time.perf_counter()-start
def peak_mib(f, device):
    "MiB that a call takes at its peak beyond what was in use before"
    clear_peak(device)
    before = memory(device)
    f()
    settle(device)
    return memory(device, peak=True)-before

# 1. The tests

def tests(out):
    "A row for each test: how it ended and how long it took"
    if out.exists(): return
    where = Path(__file__).resolve().parent.parent
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder)/'report.xml'
        command = [sys.executable, '-m', 'pytest', '-q', '-m', 'cuda', 'tests/test_cuda.py', f'--junitxml={report}']
        threads = dict(OMP_NUM_THREADS='4')                        # beside other work more of them wait for each other
        subprocess.run(command, cwd=where, env=os.environ | threads)
        if not report.exists(): return                             # such as without pytest
        cases = ElementTree.parse(report).iter('testcase')
        rows = [dict(test=o.get('name'), seconds=o.get('time'), ended=o[0].tag if len(o) else 'passed',
                     message=(o[0].get('message') or '')[:200] if len(o) else '') for o in cases]
    pd.DataFrame(rows).to_csv(out, index=False)

# 2. The Fisher, by the rule for convolutions

def kernel_gradient(n, g, x, w, settings, groups):
    "The gradient of n weights, one after the other in `w`, by PyTorch's own function"
    _,found,_ = torch.ops.aten.convolution_backward(g, x, w, None, *settings, groups, [False,True,False])
    return found.unflatten(0, (n,-1))

def pair(value): return list(value) if isinstance(value, (tuple,list)) else [value]*2
def convolution(gradients):
    "A rule for `conv2d` from a function: gradients and inputs of k images -> the gradients (k, *weight)"
    def follow(n, grad, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
        if isinstance(padding, str) or len(input)!=n:              # rare: left to the package
            yield from conv_rule(n, grad, input, weight, bias, stride, padding, dilation, groups)
            return
        stride,padding,dilation = map(pair, (stride, padding, dilation))
        x,w = input.to(grad.dtype),weight.to(grad.dtype)
        def make(s): return gradients(grad[s], x[s], w, stride, padding, dilation, groups)
        size = max(w.numel(), w[0].numel()*groups*grad[0,0].numel())
        yield weight,PerImage(n, make, size, grad.device)
        yield bias,PerImage(n, lambda s: grad[s].sum((2,3)), len(weight), grad.device)
    return follow

def unfolded(g, x, w, stride, padding, dilation, groups):
    patches = F.unfold(x, w.shape[2:], dilation, padding, stride).unflatten(1, (groups,-1))
    return (g.flatten(2).unflatten(1, (groups,-1))@patches.mT).reshape(len(g), *w.shape)
def grouped(g, x, w, stride, padding, dilation, groups):
    one_image = [o.flatten(0, 1)[None] for o in (g, x)]
    settings = stride,padding,dilation,False,[0,0]
    return kernel_gradient(len(g), *one_image, w.repeat(len(g), 1, 1, 1), settings, len(g)*groups)
def by_image(g, x, w, stride, padding, dilation, groups):
    settings = stride,padding,dilation,False,[0,0]
    return torch.cat([kernel_gradient(1, a, b, w, settings, groups) for a,b in zip(g.split(1), x.split(1))])

WAYS = {'this package': conv_rule, 'unfolded': convolution(unfolded), 'grouped': convolution(grouped),
        'by image': convolution(by_image)}

def casts(name, device):
    "A context: autocast to the type of that name, or none"
    return nullcontext() if name=='float32' else torch.autocast(device, getattr(torch, name))

def largest_difference(found, wanted):
    "The largest relative difference of a parameter's Fisher"
    return max(((found[n]-v).norm()/v.norm()).item() for n,v in wanted.items() if v.any())

def fisher_speed(network, size, bs, dtype, way, device, time_for):
    "Yield error and memory, then speed"
    torch.manual_seed(0)
    model = timm.create_model(network, num_classes=100).to(device).eval()
    for p in model.parameters(): p.requires_grad_()
    x,y = torch.randn(bs, 3, size, size, device=device),torch.randint(100, (bs,), device=device)
    def plain():
        with casts(dtype, device): F.cross_entropy(model(x), y).backward()
        model.zero_grad(set_to_none=True)
    def started(way):
        "An estimate that has verified the rules on its first images"
        RULES[F.conv2d] = WAYS[way]
        made = Estimate(model, LabelPlan('empirical'), {})
        with casts(dtype, device): made.add(x[:4], y[:4])
        return made
    wanted,made = started('this package').fisher(),started(way)
    if made.total.slow: raise RuntimeError(f'the rule is wrong for {len(made.total.slow)} parameters')
    yield dict(error=largest_difference(made.fisher(), wanted))
    def estimate():
        with casts(dtype, device): made.add(x, y)
    estimate()
    plain()                                                        # both have loaded their kernels
    yield dict(mib=peak_mib(estimate, device), plain_mib=peak_mib(plain, device))
    turns,end = [],time.perf_counter()+time_for
    while len(turns)<3 or time.perf_counter()<end: turns.append([seconds(f, device) for f in (plain, estimate)])
    speeds = [bs/median(o) for o in zip(*turns)]
    yield dict(images_s=speeds[1], plain_s=speeds[0], of_plain=median(a/b for a,b in turns), turns=len(turns))

def fisher_table(table, device, networks, batches, seconds, **_):
    half = 'float16' if device=='cuda' else 'bfloat16'
    try:
        for way,bs,dtype,(network,size) in product(WAYS, batches, ('float32',half), networks.items()):
            measure = partial(fisher_speed, network, size, bs, dtype, way, device, seconds)
            table.add(measure, network=network, size=size, bs=bs, dtype=dtype, rule=way)
    finally: RULES[F.conv2d] = conv_rule

# 3. The penalty

def penalty_table(table, device, arch, tiny, **_):
    "All kernels are measured together, unless the last one has a row"
    if table.has(dict(arch=arch, kernel='torch.compile' if not tiny else 'a loop of plain expressions')): return
    torch.manual_seed(0)
    source,model = [timm.create_model(arch, num_classes=105).to(device) for _ in range(2)]
    step = Step(model, None, None, source, {n: torch.rand_like(p) for n,p in source.named_parameters()})
    n,floor = sum(p.numel() for p in model.parameters()),None
    try:
        for name,ms in kernels(step, device, not tiny):
            floor = floor or ms
            table.add(lambda: [dict(parameters=n, ms=ms, gb_s=16*n/ms/1e6, memory=floor/ms)], arch=arch, kernel=name)
    except Exception as e:                                         # the compiler's, of whatever kind
        note = shorten(f'{type(e).__name__}: {e}', 200)
        table.add(lambda: [dict(note=note)], arch=arch, kernel='torch.compile')

# 4. The paper's recipe

class Pace(Callback):
    "Pictures per second of training and of validation in the last epoch, without the first batches of each"
    order,skip = 100,2
    def __init__(self, device): self.device,self.ended = device,{}
    def before_epoch(self): self.ended = {True: [], False: []}
    def after_batch(self):
        settle(self.device)
        self.ended[self.training].append((time.perf_counter(), len(self.xb[0])))
    def rate(self, training):
        first,*rest = self.ended[training][min(self.skip, len(self.ended[training])-2):]
        return sum(n for _,n in rest)/(rest[-1][0]-first[0])

def recipe_speed(tree, copies, layout, arch, size, bs, workers, device):
    dls = aircraft_dls(tree, size=size, bs=bs, transforms='published', cache=copies or False, num_workers=workers)
    pace = Pace(device)
    learn = published_learner(dls, arch, None, cbs=pace)
    fisher = {n: torch.rand_like(p) for n,p in learn.model.named_parameters()}
    learn.add_cb(L2SPFisherCallback(alpha=5e-4, beta=1., fisher=fisher))
    if 'autocast' in layout and device=='cuda': learn.to_fp16()
    if 'channels last' in layout: learn.to_channelslast(use_amp=False)
    with learn.no_bar(), learn.no_logging(): fit_published(learn, 2)
    train,valid = pace.rate(True),pace.rate(False)
    yield dict(train_s=train, valid_s=valid, hours_80=80*(3334/train+3333/valid)/3600)

def training_table(table, device, arch, size, bs, drawn, variants, each, workers, tree='', **_):
    keys = [dict(arch=arch, size=size, bs=bs, layout=layout, cached=cached)
            for layout in ('float32', 'autocast', 'autocast, channels last') for cached in (False, True)]
    if all(map(table.has, keys)): return
    with tempfile.TemporaryDirectory() as folder:
        tree = tree or draw_aircraft(Path(folder)/'tree', variants, each, drawn)
        for key in keys:
            copies = Path(folder)/'copies' if key['cached'] else None
            table.add(partial(recipe_speed, tree, copies, key['layout'], arch, size, bs, workers, device), **key)

# 5. Memory

def training_step(arch, size, bs, device, amp, step):
    "A function that takes a training step, without a penalty, with this package's or with that of the published code"
    model = timm.create_model(arch, num_classes=105).to(device).train()
    x,y = torch.randn(bs, 3, size, size, device=device),torch.randint(105, (bs,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), 1e-7, momentum=0.9, nesterov=True)
    if step=='proximal':
        fisher = {n: torch.rand_like(p) for n,p in model.named_parameters()}
        penalty = QuadraticPenalty(model, None, fisher, beta=1.)
        del fisher
    if step=='published':
        source = timm.create_model(arch, num_classes=105).to(device).train()
        theta0 = dict(source.named_parameters())
    def take():
        with casts(amp, device): loss = F.cross_entropy(model(x), y)
        if step=='published': loss = loss + as_published_penalty(model, theta0, published_scalars(source, x))
        loss.backward()
        optimizer.step()
        if step=='proximal': penalty.prox_(optimizer)
        optimizer.zero_grad()
    return take

def step_memory(arch, size, bs, device, amp, step):
    take = training_step(arch, size, bs, device, amp, step)
    take()                                                         # makes the momenta
    yield dict(peak_gb=(memory(device)+peak_mib(take, device))/1024)

def memory_table(table, device, arch, size, batches, budget, **_):
    if device=='cuda':
        share = budget*2**30/torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1., share))
    half = 'float16' if device=='cuda' else 'bfloat16'
    for step in ('no penalty', 'proximal', 'published'):
        for dtype in ('float32', half):
            for bs in batches:
                measure = partial(step_memory, arch, size, bs, device, dtype, step)
                table.add(measure, arch=arch, size=size, bs=bs, dtype=dtype, step=step, budget=budget)
    if device=='cuda': torch.cuda.set_per_process_memory_fraction(1.)

KEYS = dict(fisher=['network','size','bs','dtype','rule'], penalty=['arch','kernel'],
            training=['arch','size','bs','layout','cached'], memory=['arch','size','bs','dtype','step','budget'])
MEASURES = dict(fisher=fisher_table, penalty=penalty_table, training=training_table, memory=memory_table)

@call_parse
def main(
    out:str='results/accelerator', # Folder for the tables, in a folder for each card
    only:str='tests,fisher,penalty,training,memory', # The tables to make, separated by commas
    tree:str='', # A tree of pictures like FGVC-Aircraft's for `training`; default: it is drawn
    budget:float=15., # GB for `memory`
    tiny:store_true=False, # Tiny networks and pictures, for the test of this script?
):
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    card = re.sub(r'\W+', '-', machine(device).split(';')[0])
    folder = Path(out)/card
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'machine.txt').write_text(machine(device)+'\n')
    sizes = (TINY if tiny else SIZES) | dict(tree=tree, budget=budget, tiny=tiny)
    for name in only.split(','):
        file = folder/f'{name}.csv'
        if name=='tests': tests(file)
        else: MEASURES[name](Table(file, KEYS[name]), device, **sizes)
    for name in only.split(','): print(f'\n{name}', pd.read_csv(folder/f'{name}.csv').to_string(index=False), sep='\n')
