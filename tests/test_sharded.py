"""The penalty on a model that is spread over processes is the penalty on the whole one.

Two processes train a model under `fully_shard`, each on its half of every batch; this process trains the same model
without sharding. No number of rows is divisible by two, and one layer has a single row, so the second process has none.
"""
import copy, math
from datetime import timedelta
from functools import partial
import pandas as pd, pytest, torch, torch.distributed as dist, torch.nn.functional as F
from torch import nn
from fgvc_fisher.distributed.sharded import matching_shard, reduce_over_shards
from fgvc_fisher.penalty import QuadraticPenalty
from forks import ranks, succeed

try: from torch.distributed.fsdp import fully_shard
except ImportError: pytest.skip("torch.distributed.fsdp.fully_shard came with PyTorch 2.6", allow_module_level=True)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

pytestmark = pytest.mark.xdist_group('sharded')   # What its tests share is made once

COEFS = dict(alpha=0.02, beta=3., l2sp=0.1)
SCALED = COEFS | dict(beta=0., strength=3.)
NEW = ['7']
LR = {'sgd': 0.05, 'adamw': 0.01}

def problem():
    "A model, its anchor and Fisher, and batches"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3,5,3), nn.BatchNorm2d(5), nn.GroupNorm(1,5), nn.Flatten(),
                          nn.Linear(45,7), nn.LayerNorm(7), nn.Linear(7,1), nn.Linear(1,3)).double()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    theta0 = {n: (p + 0.1*torch.randn_like(p)).detach() for n,p in model.named_parameters()}
    fisher = {n: 10**(3*torch.rand_like(p)-2) for n,p in theta0.items()}
    return model.eval(),theta0,fisher,[(torch.randn(8,3,5,5).double(), torch.randint(3, (8,))) for _ in range(5)]

def optimizer(model, name):
    "Two groups, each with a rate of its own"
    ps,lr = [*model.parameters()],LR[name]
    groups = [dict(params=ps[:3], lr=lr/2), dict(params=ps[3:], lr=lr)]
    return torch.optim.SGD(groups, momentum=0.9) if name=='sgd' else torch.optim.AdamW(groups, weight_decay=0.1)

def full(t): return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()

def described(penalty):
    "All that a penalty reports about the whole model"
    with torch.no_grad(): value = penalty.value()
    grads = torch.autograd.grad(penalty.value(), [*penalty.params.values()])
    return dict(value=value, distance=penalty.distance(), table=penalty.table(), max_fisher=penalty.max_fisher,
                mean_fisher=penalty.mean_fisher, stiffest=penalty.stiffest(0.1),
                grads=dict(zip(penalty.params, map(full, grads))))

def train(net, penalty, opt, step, batches, share=slice(None)):
    for x,y in batches:
        opt.zero_grad()
        loss = F.cross_entropy(net(x[share]), y[share])
        (loss+penalty.value() if step=='loss' else loss).backward()
        if step=='grad': penalty.add_grad_()
        opt.step()
        if step=='prox': penalty.prox_(opt)

def fit(case, shard=lambda model: model, share=slice(None)):
    "What a penalty reports before and after a training, the parameters then, and what it stores of anchor and Fisher"
    model,theta0,fisher,batches = problem()
    model = shard(model)
    args = (None,None) if case.get('bare') else (theta0,fisher)
    penalty = QuadraticPenalty(model, *args, new=NEW, **case['kw'])
    before = described(penalty)
    train(model, penalty, optimizer(model, case['opt']), case['step'], batches, share)
    stored = [o for d in (penalty.anchor, penalty.fisher or {}) for o in d.values()]
    return dict(before=before, after=described(penalty), params={n: full(p) for n,p in model.named_parameters()},
                summary=penalty.summary(), numel=sum(o.numel() for o in stored),
                nbytes=sum(o.untyped_storage().nbytes() for o in stored),
                dtypes={o.dtype for o in stored}, devices={o.device.type for o in stored})

def case(opt, step, bare=False, **kw): return dict(opt=opt, step=step, bare=bare, kw=kw)
CASES = {f'{o} {s} all': case(o, s, **COEFS) for o in LR for s in ('prox','grad') if (o,s)!=('sgd','grad')} | {
    'sgd prox strength': case('sgd', 'prox', **SCALED),
    'sgd grad fisher': case('sgd', 'grad', beta=3.),
    'adamw grad strength': case('adamw', 'grad', **SCALED),
    'float32': case('sgd', 'prox', dtype=torch.float32, **COEFS),
    'bfloat16': case('sgd', 'grad', dtype=torch.bfloat16, **COEFS),
    'cpu': case('sgd', 'prox', device='cpu', **COEFS),
    'weights': case('adamw', 'prox', beta_on='weights', **SCALED),
    'in the loss': case('sgd', 'loss', **SCALED),
    'bare': case('adamw', 'prox', bare=True, alpha=0.02, l2sp=0.1)}

# In each of the two processes

def sharded(model, **kw):
    "Two layers by themselves, the rest together"
    for k in (0,4): fully_shard(model[k], **kw)
    return fully_shard(model, **kw)

def error_of(f, *args, **kw):
    try: f(*args, **kw)
    except ValueError as e: return str(e)

def laid_out(like):
    "DTensors laid out in several ways, and the tensors that they are made of"
    flat = init_device_mesh('cpu', (2,))
    square = init_device_mesh('cpu', (1,2))
    layouts = [(flat, [Shard(0)]), (flat, [Shard(1)]), (flat, [Replicate()]),
               (square, [Shard(0),Shard(0)]), (square, [Shard(1),Shard(0)]), (square, [Replicate(),Shard(1)])]
    for mesh,how in layouts:
        for t in like: yield distribute_tensor(t, mesh, how),t

def shards_agree():
    "`matching_shard` and PyTorch's own distribution, of tensors and of DTensors with another layout"
    torch.manual_seed(1)
    tensors = [torch.randn(*s) for s in ((5,3), (1,7), (2,1), (4,4,2))]
    other = {id(t): distribute_tensor(t, init_device_mesh('cpu', (2,)), [Shard(t.ndim-1)]) for t in tensors}
    # a list: every process has to make every comparison, or one of them waits for the other
    agree = [torch.equal(matching_shard(o, d), d.to_local()) for d,t in laid_out(tensors) for o in (t, other[id(t)], d)]
    return all(agree)

def dtensors_as_source():
    "Anchor and Fisher of a sharded source, and replicated ones"
    model,theta0,fisher,_ = problem()
    source,flat = sharded(copy.deepcopy(model)),init_device_mesh('cpu', (2,))
    for n,p in source.named_parameters(): p.to_local().data.copy_(matching_shard(theta0[n], p))
    copies = {n: distribute_tensor(f, flat, [Replicate()]) for n,f in fisher.items()}
    return described(QuadraticPenalty(sharded(model), dict(source.named_parameters()), copies, new=NEW, **COEFS))

def partial_gradient():
    "A replicated parameter whose gradient is still to be summed: what tensor parallelism can leave"
    flat = init_device_mesh('cpu', (2,))
    model = nn.Linear(3,2, bias=False).double()
    model.weight = nn.Parameter(distribute_tensor(torch.ones(2,3).double(), flat, [Replicate()]))
    model.weight.grad = DTensor.from_local(torch.ones(2,3).double(), flat, [Partial()])
    QuadraticPenalty(model, alpha=1.).add_grad_()
    return full(model.weight.grad)

def refused():
    "The errors for a Fisher with a bad value in the first process's shard, and for a penalty made before sharding"
    model,theta0,fisher,_ = problem()
    early = QuadraticPenalty(model, theta0, fisher, new=NEW, **COEFS)
    sharded(model)
    fisher['0.weight'][0,0,0,0] = math.nan
    bad = error_of(QuadraticPenalty, model, theta0, fisher, new=NEW, **COEFS)
    return dict(fisher=bad, early=error_of(early.prox_, optimizer(model, 'sgd')))

def gathered():
    "A penalty that is made after a forward pass, when some parameters are whole"
    model,theta0,fisher,batches = problem()
    sharded(model)(batches[0][0])
    penalty = QuadraticPenalty(model, theta0, fisher, new=NEW, **COEFS)
    penalty.prox_(0.1)
    model.reshard()
    return {n: full(p) for n,p in model.named_parameters()}

def data_parallel(case, share):
    "The penalty on the model within `DistributedDataParallel`"
    model,theta0,fisher,batches = problem()
    penalty = QuadraticPenalty(model, theta0, fisher, new=NEW, **case['kw'])
    net = nn.parallel.DistributedDataParallel(model)
    train(net, penalty, optimizer(model, case['opt']), case['step'], batches, share)
    return dict(after=described(penalty), params={n: full(p) for n,p in model.named_parameters()})

def accelerated(share):
    "The training by hand, with a model and an optimizer that accelerate has prepared"
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy='size_based_wrap', min_num_params=100)
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # on CPUs accelerate silently ignores the plugin; with these two it does what it does on GPUs
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    model,theta0,fisher,batches = problem()
    model,opt = accelerator.prepare(model, optimizer(model, 'adamw'))
    penalty = QuadraticPenalty(model, theta0, fisher, new=NEW, **COEFS)
    for x,y in batches:
        opt.zero_grad()
        accelerator.backward(F.cross_entropy(model(x[share]), y[share]))
        opt.step()
        penalty.prox_(opt)
    kinds = {type(p).__name__ for p in model.parameters()}
    return dict(kinds=kinds, summary=penalty.summary(), after=described(penalty),
                params={n: full(p) for n,p in model.named_parameters()})

def one_of_two(folder):
    dist.init_process_group('gloo', timeout=timedelta(seconds=60))
    rank = dist.get_rank()
    share = slice(4*rank, 4*rank+4)
    meshes = {f'hybrid {s}': init_device_mesh('cpu', s, mesh_dim_names=('copies','parts')) for s in ((2,1), (1,2))}
    some = CASES['sgd prox strength']
    results = {k: fit(c, sharded, share) for k,c in CASES.items()}
    results |= {k: fit(some, partial(sharded, mesh=m), share) for k,m in meshes.items()}
    results |= {f'ddp {k}': data_parallel(CASES[k], share) for k in ('sgd prox all', 'adamw grad all')}
    results |= dict(agree=shards_agree(), dtensors=dtensors_as_source(), partial=partial_gradient())
    results |= dict(refused=refused(), gathered=gathered(), accelerate=accelerated(share))
    torch.save(results, folder/f'{rank}.pt')
    # a process that exits early can break the other's connection
    dist.barrier()
    dist.destroy_process_group()

# In this one

@pytest.fixture(scope='module')
def both(tmp_path_factory):
    "The results of the two processes"
    folder = tmp_path_factory.mktemp('two')
    succeed(ranks(one_of_two, folder))
    return [torch.load(folder/f'{k}.pt', weights_only=False) for k in range(2)]

def close(a, b, rtol=1e-12): assert (a-b).abs().max() <= rtol*b.abs().max()

def same(a, b):
    "Do two processes agree to the last bit?"
    assert torch.equal(a['value'], b['value'])
    assert all(a[k]==b[k] for k in ('distance','max_fisher','mean_fisher','stiffest'))
    pd.testing.assert_frame_equal(a['table'], b['table'], check_exact=True)
    for n,g in a['grads'].items(): assert torch.equal(g, b['grads'][n]), n

def right(got, wanted):
    "Does it agree with the penalty on the whole model?"
    close(got['value'], wanted['value'])
    for k in ('distance','mean_fisher'): assert got[k]==pytest.approx(wanted[k], rel=1e-12)
    assert got['max_fisher']==wanted['max_fisher']
    stiffness,name = wanted['stiffest']
    assert got['stiffest']==(pytest.approx(stiffness, rel=1e-12), name)
    pd.testing.assert_frame_equal(got['table'], wanted['table'], rtol=1e-12, atol=1e-14)
    for n,g in got['grads'].items(): close(g, wanted['grads'][n])

@pytest.mark.parametrize('name', [*CASES, 'hybrid (2, 1)', 'hybrid (1, 2)'])
def test_it_is_the_penalty_on_the_whole_model(both, name):
    wanted = fit(CASES.get(name, CASES['sgd prox strength']))
    for got in both:
        for n,p in got[name]['params'].items(): close(p, wanted['params'][n])
        for k in ('before','after'): right(got[name][k], wanted[k])
    for k in ('before','after'): same(*(o[name][k] for o in both))

@pytest.mark.parametrize('name', [*CASES, 'hybrid (2, 1)', 'hybrid (1, 2)'])
def test_each_process_stores_its_shard(both, name):
    model = problem()[0]
    dtype = CASES.get(name, CASES['sgd prox strength'])['kw'].get('dtype') or torch.float64
    n = sum(p.numel() for k,p in model.named_parameters() if k[0] not in NEW)*(1 if name=='bare' else 2)
    numel = [o[name]['numel'] for o in both]
    if name=='hybrid (2, 1)': assert numel==[n,n]
    else: assert sum(numel)==n and 0.4*n < numel[1] < numel[0] < 0.6*n
    for got in (o[name] for o in both):
        assert got['nbytes']==got['numel']*dtype.itemsize and got['dtypes']=={dtype} and got['devices']=={'cpu'}
        assert '0.0 MB' in got['summary'] and 'process' in got['summary']

def test_shards_are_those_of_pytorch(both): assert all(o['agree'] for o in both)

def test_anchor_and_fisher_that_are_sharded_themselves(both):
    model,theta0,fisher,_ = problem()
    for o in both: right(o['dtensors'], described(QuadraticPenalty(model, theta0, fisher, new=NEW, **COEFS)))

def test_a_model_whose_parameters_are_whole_after_a_forward_pass(both):
    model,theta0,fisher,_ = problem()
    QuadraticPenalty(model, theta0, fisher, new=NEW, **COEFS).prox_(0.1)
    for o in both:
        for n,p in model.named_parameters(): close(o['gathered'][n], p)

def test_a_gradient_that_is_still_to_be_summed(both):
    wanted = torch.full((2,3), 4.).double()                  # 1 + 1 from the processes, 2 from alpha, once
    for o in both: assert torch.equal(o['partial'], wanted)

def test_invalid_arguments_are_refused_in_every_process(both):
    for o in (o['refused'] for o in both):
        assert '0.weight' in o['fisher']
        assert 'replaced' in o['early'] and 'sharding' in o['early']

@pytest.mark.parametrize('name', ['sgd prox all', 'adamw grad all'])
def test_data_parallel_processes_stay_equal_to_the_last_bit(both, name):
    a,b = (o[f'ddp {name}'] for o in both)
    wanted = fit(CASES[name])
    same(a['after'], b['after'])
    for n,p in a['params'].items(): assert torch.equal(p, b['params'][n]), n
    for n,p in a['params'].items(): close(p, wanted['params'][n])

def test_through_accelerate(both):
    wanted = fit(CASES['adamw prox all'])
    for o in (o['accelerate'] for o in both):
        assert o['kinds']=={'DTensor'} and 'process' in o['summary']
        for n,p in o['params'].items(): close(p, wanted['params'][n])
        right(o['after'], wanted['after'])

def test_plain_numbers_are_left_alone():
    numbers = {'a': torch.tensor(1.)}
    assert reduce_over_shards(numbers, {'a': torch.zeros(2)}) is numbers

def test_no_estimate_of_a_sharded_model():
    from fgvc_fisher.fisher import DiagFisher, estimate_fisher
    model,_,fisher,batches = problem()
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh('cpu', (1,)))(batches[0][0])
        with pytest.raises(ValueError, match='estimate_fisher.*14.*FSDPSequential.*0.weight'):
            estimate_fisher(model, batches)
        about = dict(weights_sha256='0')
        with pytest.raises(ValueError, match='weights_sha256'): DiagFisher(fisher, 1, 'exact', about).check(model)
    finally: dist.destroy_process_group()
