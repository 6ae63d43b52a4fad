"""The same result from every loop: fastai with its own callbacks, and accelerate, against a loop in float64.

The reference takes gradients from autograd, in the precision that is tested; everything else, from the scale of fp16
to Adam, is written out below.
"""
import copy, math
from contextlib import nullcontext
from functools import partial
import pytest, torch, torch.distributed.fsdp, torch.nn.functional as F
from fastai import distributed
from accelerate import Accelerator
from torch import nn
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner, OptimWrapper, params, trainable_params
from fastai.callback.schedule import ParamScheduler
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.data.load import DataLoader
from fastai.optimizer import SGD
from torch.amp import autocast
from fgvc_fisher.callback import L2SPFisherCallback
from fgvc_fisher.penalty import QuadraticPenalty
from conftest import OnCpu
from forks import ranks, succeed

COEFS = dict(alpha=0.02, beta=3., l2sp=0.1)
BODY,HEAD = ('0.weight','0.bias','1.weight','1.bias'),('3.weight','3.bias')

def problem(n=48, bs=4):
    "A model with a new head, its anchor and Fisher, and batches"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10,8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8,3))
    theta0 = {n: (p + 0.1*torch.randn_like(p)).detach() for n,p in model.named_parameters() if n in BODY}
    fisher = {n: 10**(3*torch.rand_like(p)-2) for n,p in theta0.items()}
    x,y = torch.randn(n,10),torch.randint(3, (n,))
    return model,theta0,fisher,list(zip(x.split(bs), y.split(bs)))

# The reference

class Sgd:
    "With momentum, Nesterov's if wanted"
    def __init__(self, mom=0.9, nesterov=False): self.mom,self.nesterov,self.speed = mom,nesterov,{}
    def __call__(self, n, p, g, lr):
        v = self.speed[n] = self.mom*self.speed.get(n, 0.) + g
        return p - lr*(g + self.mom*v if self.nesterov else v)

class AdamW:
    "Adam, with weight decay of its own beside it"
    def __init__(self, decay=0.): self.decay,self.state = decay,{}
    def __call__(self, n, p, g, lr):
        k,m,v = self.state.get(n, (0,0.,0.))
        k,m,v = self.state[n] = k+1, 0.9*m+0.1*g, 0.999*v+0.001*g*g
        return p*(1-lr*self.decay) - lr*(m/(1-0.9**k))/((v/(1-0.999**k)).sqrt()+1e-8)

def gradients(model, theta, micro, dtype, scale):
    "Of the mean loss over all pictures of the micro-batches, times `scale`"
    model = copy.deepcopy(model)
    with torch.no_grad():
        for n,p in model.named_parameters(): p.copy_(theta[n])
    if dtype is None: model.double()
    total = {n: torch.zeros_like(p, dtype=torch.float64) for n,p in theta.items()}
    for x,y in micro:
        with autocast('cpu', dtype=dtype) if dtype else nullcontext(): logits = model(x if dtype else x.double())
        loss = F.cross_entropy(logits.float() if dtype else logits, y)*len(y)/sum(len(y) for _,y in micro)
        for n,g in zip(total, torch.autograd.grad(loss*scale, [*model.parameters()])): total[n] += g.double()
    return total

def written_out(steps, optimizer, lr, step='prox', dtype=None, scale=1., clip=None, trained=lambda i, n: True):
    "The parameters after `steps`, a list of lists of micro-batches; `lr(i, name)`; how many steps were skipped"
    model,theta0,fisher,_ = problem()
    theta,skipped = {n: p.detach().double() for n,p in model.named_parameters()},0
    w = {n: COEFS['beta']*fisher[n].double() + COEFS['l2sp'] for n in BODY}
    for i,micro in enumerate(steps):
        grads = {n: g/scale for n,g in gradients(model, theta, micro, dtype, scale).items() if trained(i, n)}
        if not all(g.isfinite().all() for g in grads.values()):
            skipped += 1
            scale /= 2
            continue
        if step=='grad':
            for n in grads:
                to_anchor = 2*w[n]*(theta[n]-theta0[n].double()) if n in BODY else 0
                grads[n] = grads[n] + 2*COEFS['alpha']*theta[n] + to_anchor
        if clip is not None:
            norm = math.sqrt(sum(g.square().sum() for g in grads.values()))
            grads = {n: g*min(1, clip/norm) for n,g in grads.items()}
        for n,g in grads.items():
            rate = lr(i, n)
            theta[n] = optimizer(n, theta[n], g, rate)
            if step=='prox':
                c = 2*rate*w[n] if n in BODY else 0
                theta[n] = (theta[n] + (c*theta0[n] if n in BODY else 0))/(1 + 2*rate*COEFS['alpha'] + c)
    return theta,skipped

# fastai

groups = lambda m: [params(m[:3]), params(m[3])]
torch_opt = lambda opt, **kw: partial(OptimWrapper, opt=partial(opt, **kw))

def learner(opt, splitter=trainable_params, bs=4):
    model,theta0,fisher,batches = problem(bs=bs)
    ds = [(x,y) for bx,by in batches for x,y in zip(bx, by)]
    dls = DataLoaders(*[DataLoader(ds, bs=bs, num_workers=0) for _ in range(2)], device='cpu')
    learn = Learner(dls, model, CrossEntropyLossFlat(), opt, splitter=splitter)
    return learn,dict(fisher=fisher, anchor=theta0, **COEFS)

def fit(opt, n_epoch=2, lr=0.1, cbs=(), step='prox', splitter=trainable_params, bs=4):
    "The parameters after fastai's loop"
    learn,kw = learner(opt, splitter, bs)
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, lr, cbs=[L2SPFisherCallback(step=step, **kw), *cbs])
    return dict(learn.model.named_parameters())

def agree(got, wanted, rtol):
    "Within `rtol` of how far the parameters went, and float32"
    start = dict(problem()[0].named_parameters())
    for n,p in got.items():
        moved = (wanted[n]-start[n].detach()).norm()
        assert (p.detach()-wanted[n]).norm() <= rtol*moved + 1e-6*start[n].norm(), n

one_each = lambda n_epoch=2: [[b] for b in problem()[3]]*n_epoch
steady = lambda i, n: 0.1

OPTIMIZERS = dict(
    sgd=(partial(SGD, mom=0.9), Sgd()),
    nesterov=(torch_opt(torch.optim.SGD, momentum=0.9, nesterov=True), Sgd(nesterov=True)),
    adam=(torch_opt(torch.optim.Adam), AdamW()),
    adamw=(torch_opt(torch.optim.AdamW, weight_decay=0.3), AdamW(0.3)))

@pytest.mark.parametrize('step,lr', [('prox',0.1), ('grad',0.02)])
@pytest.mark.parametrize('opt,plain', OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers(opt, plain, step, lr):
    agree(fit(opt, lr=lr, step=step), written_out(one_each(), copy.deepcopy(plain), lambda i, n: lr, step)[0], 1e-4)

@pytest.mark.parametrize('step,lr', [('prox',0.1), ('grad',0.02)])
def test_accumulation_and_clipping(step, lr):
    batches = problem()[3]
    steps = [batches[i:i+3] for i in range(0, 12, 3)]*2
    got = fit(partial(SGD, mom=0.9), lr=lr, step=step, cbs=[GradientAccumulation(12), GradientClip(0.4)])
    agree(got, written_out(steps, Sgd(), lambda i, n: lr, step, clip=0.4)[0], 1e-4)

def test_rates_by_group_and_schedule():
    cos = lambda start, end, pos: start + (1-math.cos(math.pi*pos))*(end-start)/2
    def lr(i, n):
        top,pos = 0.3 if n in HEAD else 0.05,i/24
        return cos(top/25, top, pos/0.25) if pos<0.25 else cos(top, top/1e5, (pos-0.25)/0.75)
    learn,kw = learner(partial(SGD, mom=0.9), groups)
    with learn.no_bar(), learn.no_logging():
        learn.fit_one_cycle(2, slice(0.05,0.3), moms=(0.9,0.9,0.9), cbs=L2SPFisherCallback(**kw))
    agree(dict(learn.model.named_parameters()), written_out(one_each(), Sgd(), lr)[0], 1e-4)

def test_a_rate_of_zero_takes_no_step():
    off = ParamScheduler({'lr': lambda pos: 0.1 if pos<0.5 else 0.})
    wanted,_ = written_out(one_each(), Sgd(), lambda i, n: 0.1 if i<12 else 0.)
    agree(fit(partial(SGD, mom=0.9), cbs=[off]), wanted, 1e-4)

def test_frozen_then_unfrozen():
    learn,kw = learner(partial(SGD, mom=0.9), groups)
    cb,start = L2SPFisherCallback(**kw),dict(problem()[0].named_parameters())
    learn.freeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 0.1, cbs=cb)
        assert all(torch.equal(p, start[n]) for n,p in learn.model.named_parameters() if n in ('0.weight','0.bias'))
        learn.unfreeze()
        learn.fit(1, 0.1, cbs=cb)
    plain = Sgd()
    def trained(i, n):
        "fastai does not freeze normalisations, and forgets the momentum when it unfreezes"
        if i==12: plain.speed.clear()
        return i>=12 or n[0] in '13'
    agree(dict(learn.model.named_parameters()), written_out(one_each(), plain, steady, trained=trained)[0], 1e-4)

@pytest.mark.parametrize('step,lr', [('prox',0.1), ('grad',0.02)])
def test_bfloat16(step, lr):
    got = fit(partial(SGD, mom=0.9), lr=lr, step=step, cbs=[OnCpu('bf16')])
    agree(got, written_out(one_each(), Sgd(), lambda i, n: lr, step, torch.bfloat16)[0], 0.02)

@pytest.mark.parametrize('step,lr', [('prox',0.1), ('grad',0.02)])
def test_float16_with_its_scale_and_its_skipped_steps(step, lr):
    theta,skipped = written_out(one_each(), Sgd(), lambda i, n: lr, step, torch.float16, scale=2.**22, clip=1.)
    assert 2 <= skipped < 12
    got = fit(partial(SGD, mom=0.9), lr=lr, step=step, cbs=[OnCpu('fp16', init_scale=2.**22), GradientClip(1.)])
    agree(got, theta, 0.005)

# PyTorch's own loop

@pytest.mark.parametrize('step', ['prox', 'grad'])
def test_by_hand_with_rates_by_group(step):
    model,theta0,fisher,batches = problem()
    rates = [dict(params=params(model[:3]), lr=0.05), dict(params=params(model[3]), lr=0.3)]
    optimizer = torch.optim.SGD(rates, momentum=0.9)
    penalty = QuadraticPenalty(model, theta0, fisher, new=['3'], **COEFS)
    for x,y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if step=='grad': penalty.add_grad_()
        optimizer.step()
        if step=='prox': penalty.prox_(optimizer)
    wanted,_ = written_out(one_each(1), Sgd(), lambda i, n: 0.3 if n in HEAD else 0.05, step)
    agree(dict(model.named_parameters()), wanted, 1e-4)

# Two processes, each of which does this

def by_hand():
    "accelerate, and the loop written by hand. It deals batches out in turns"
    model,theta0,fisher,batches = problem()
    accelerator = Accelerator(cpu=True)
    dataset = [(x,y) for bx,by in batches for x,y in zip(bx, by)]
    loader = torch.utils.data.DataLoader(dataset, batch_size=4)
    net,optimizer,loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), loader)
    penalty = QuadraticPenalty(model, theta0, fisher, new=['3'], **COEFS)
    for _ in range(2):
        for x,y in loader:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(net(x), y))
            optimizer.step()
            penalty.prox_(optimizer)
    return model.state_dict()

def broadcast(self, idxs, rank):
    "fastai's own goes through CUDA"
    idxs = torch.tensor(list(idxs))
    torch.distributed.broadcast(idxs, rank)
    return idxs.tolist()

def by_fastai():
    "fastai's `distrib_ctx`, which gives each process one half of the pictures"
    distributed.DistributedDL._broadcast = broadcast
    learn,kw = learner(partial(SGD, mom=0.9))
    with learn.distrib_ctx(sync_bn=False, cpu=True), learn.no_bar(), learn.no_logging():
        cb = L2SPFisherCallback(**kw)
        for _ in range(2): learn.fit(1, 0.1, cbs=cb)                    # the same training continues
    return learn.model.state_dict()

def by_shards():
    "A Learner whose model is spread over the processes, each with all pictures; None where there is no `fully_shard`"
    if not hasattr(torch.distributed.fsdp, 'fully_shard'): return
    learn,kw = learner(partial(SGD, mom=0.9))
    torch.distributed.fsdp.fully_shard(learn.model, mesh=torch.distributed.init_device_mesh('cpu', (2,)))
    cb = L2SPFisherCallback(**kw)
    for _ in range(2):
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.1, cbs=cb)
    learn.model.reshard()
    return {n: p.full_tensor().detach() for n,p in learn.model.named_parameters()}

def one_of_two(file):
    results = by_hand(),by_fastai(),by_shards()
    if distributed.rank_distrib()==0: torch.save(results, file)
    # a process that exits early can break the other's connection
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()

def test_two_processes(tmp_path):
    succeed(ranks(one_of_two, tmp_path/'two.pt'))
    hand,fastais,sharded = torch.load(tmp_path/'two.pt')
    batches = problem()[3]
    agree(hand, written_out([batches[i:i+2] for i in range(0, 12, 2)]*2, Sgd(), steady)[0], 1e-4)
    agree(fastais, written_out([[a,b] for a,b in zip(batches[:6], batches[6:])]*2, Sgd(), steady)[0], 1e-4)
    if sharded: agree(sharded, written_out(one_each(), Sgd(), steady)[0], 1e-4)
