"""What the penalty costs in a training step: this package, the usual autograd loop, and the published scheme.

    python benchmarks/penalty.py

A training step is a forward and backward pass and SGD with Nesterov momentum. The methods take turns, round after
round. A row has the median seconds of a whole step, and the milliseconds that the penalty alone takes (for the loop:
building the penalty, and its backward pass). `floor_ms` is the time for reading and writing the same number of bytes:
one `torch.lerp` over arrays as long as all parameters, which reads three numbers and writes one. Weights and pictures
are random.
"""
import copy, platform, time
from functools import partial
from pathlib import Path
from statistics import median
import pandas as pd, timm, torch, torch.nn.functional as F
from fastcore.script import call_parse
from fgvc_fisher.penalty import QuadraticPenalty

ALPHA,BETA = 5e-4,10.

class Step:
    "A training step with a penalty on the loss, or before or after the optimizer's step"
    def __init__(self, model, x, y, source, fisher):
        self.model,self.x,self.y,self.source,self.fisher = model,x,y,source,fisher
        # a tiny rate: untrained, the early layers' gradients are in the thousands
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-7, momentum=0.9, nesterov=True)
        self.theta0 = {n: p.detach().clone() for n,p in source.named_parameters()}
    def __call__(self, on_loss=None, before=None, after=None):
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.x), self.y)
        (loss if on_loss is None else loss+on_loss()).backward()
        if before: before()
        self.optimizer.step()
        if after: after()

def penalty(step, **kw): return QuadraticPenalty(step.model, step.theta0, step.fisher, ALPHA, BETA, **kw)

def loop(step):
    "The penalty as a loop over the parameters"
    total = 0.
    for n,p in step.model.named_parameters():
        total = total + ALPHA*(p**2).sum() + BETA*(step.fisher[n]*(p-step.theta0[n])**2).sum()
    return total

def published(step):
    "A forward and backward pass of a copy of the source model, then a loop over the parameters"
    copied = copy.deepcopy(step.source).train()
    copied(step.x).log_softmax(-1).sum().backward()
    flat = torch.cat([p.grad.flatten() for p in copied.parameters()])**2/len(step.x)
    total = 0.
    for k,(n,p) in enumerate(step.model.named_parameters()):
        if 'bn' in n: continue
        upper = 'linear' in n or int(n.split('.')[1])>=8
        total = total + (ALPHA*p.norm()**2/2 if upper else (0.004+BETA*flat[k])*5*(p-step.theta0[n]).norm()**2/2)
    return total

def methods(step, device):
    "Name -> the keywords of a step"
    def prox(**kw): return dict(after=partial(penalty(step, **kw).prox_, step.optimizer))
    ways = {'no penalty': {}, 'proximal': prox(), 'explicit': dict(before=penalty(step).add_grad_),
            'proximal, anchor and Fisher in bfloat16': prox(dtype=torch.bfloat16),
            'autograd loop': dict(on_loss=partial(loop, step)),
            'published scheme': dict(on_loss=partial(published, step))}
    if device=='cuda': ways['proximal, anchor and Fisher on the CPU'] = prox(device='cpu')
    return ways

def seconds(f, device):
    if device=='cuda': torch.cuda.synchronize()
    start = time.perf_counter()
    f()
    if device=='cuda': torch.cuda.synchronize()
    return time.perf_counter()-start

def alone(on_loss=None, before=None, after=None):
    "The part of a step that a penalty adds"
    if on_loss is not None: return lambda: on_loss().backward()
    return before or after

def best(f, device, n=7): return 1000*min(seconds(f, device) for _ in range(n))

def kernels(step, device, compiled):
    "Milliseconds of the proximal step's arithmetic, written in several ways"
    params = dict(step.model.named_parameters())
    ps,theta0,fs = [[o.detach() for o in d.values()] for d in (params, step.theta0, step.fisher)]
    flat = [torch.cat([o.flatten() for o in q]) for q in (ps, theta0, fs)]
    k = torch.tensor(25., device=ps[0].device)
    def plain():
        for p,t,f in zip(ps, theta0, fs): p.add_(f/25*(t-p)/(1+f/25))
    def foreach(): torch._foreach_lerp_(ps, theta0, torch._foreach_div(fs, torch._foreach_add(fs, 25.)))
    def fused(ps, theta0, fs, k):
        for p,t,f in zip(ps, theta0, fs): p.copy_(torch.lerp(p, t, f/(f+k)))
    prox = QuadraticPenalty(step.model, step.theta0, step.fisher, beta=1.).prox_
    yield 'one lerp over flat arrays: the memory',best(lambda: flat[0].lerp_(*flat[1:]), device)
    yield 'this package: foreach in bunches',best(lambda: prox(0.02), device)
    yield 'foreach, all parameters at once',best(foreach, device)
    yield 'a loop of plain expressions',best(plain, device)
    if compiled:
        torch._dynamo.config.recompile_limit = 10**4
        fused = torch.compile(fused)
        yield 'torch.compile',best(lambda: fused(ps, theta0, fs, k), device)

@call_parse
def main(
    out:str='results/penalty_speed', # Folder for the tables
    arch:str='inception_v4', # A network for the published scheme: with `features.0` and up, `last_linear`
    size:int=299, # Side of the pictures in pixels
    bs:int=8, # Pictures per batch
    rounds:int=5, # Rounds of one step per method, after one that is not counted
    device:str='cpu', # Or 'cuda'
    compiled:bool=True, # Compile a kernel, too? Compiling takes minutes, which are not counted
):
    torch.manual_seed(0)
    source = timm.create_model(arch, pretrained=False, num_classes=105).to(device)
    model,fisher = copy.deepcopy(source).train(),{n: torch.rand_like(p) for n,p in source.named_parameters()}
    step = Step(model, torch.randn(bs,3,size,size).to(device), torch.randint(105, (bs,)).to(device), source, fisher)
    n = sum(p.numel() for p in model.parameters())
    cpu = f'{torch.get_num_threads()} CPU threads, {platform.machine()}'
    machine = torch.cuda.get_device_name() if device=='cuda' else cpu
    machine = f'{machine}; torch {torch.__version__}'
    table = pd.DataFrame(kernels(step, device, compiled), columns=['kernel','ms'])
    table = table.assign(gb_per_s=16*n/table.ms/1e6, memory=table.ms[0]/table.ms, machine=machine)
    ways = methods(step, device)
    turns = [{name: seconds(partial(step, **kw), device) for name,kw in ways.items()} for _ in range(rounds+1)][1:]
    times = {name: [o[name] for o in turns] for name in ways}
    bytes_moved = {'proximal': 16, 'explicit': 20}                   # per parameter
    base,rows = times['no penalty'],[]
    for name,t in times.items():
        extra = best(alone(**ways[name]), device, 3 if name=='published scheme' else 7) if ways[name] else 0.
        moved = bytes_moved.get(name, float('nan'))
        rows.append(dict(method=name, step_s=median(t), ratio=median(a/b for a,b in zip(t, base)), extra_ms=extra,
                         extra_ratio=1+extra/1000/median(base), mb=moved*n/1e6, floor_ms=table.ms[0]*moved/16))
    Path(out).mkdir(parents=True, exist_ok=True)
    steps = pd.DataFrame(rows).assign(arch=arch, parameters=n, size=size, bs=bs, machine=machine)
    for name,t in (('steps', steps), ('kernels', table)):
        t.to_csv(Path(out)/f'{name}_{device}.csv', index=False, float_format='%.4g')
        print(t.drop(columns='machine').to_string(index=False, float_format='{:.4g}'.format))
