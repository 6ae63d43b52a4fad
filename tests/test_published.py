"The published recipe, logs and penalty, against what was published"
import copy, inspect, math, pickle
from contextlib import nullcontext
from collections import OrderedDict
import numpy as np, pandas as pd, pytest, timm, torch, torch.nn.functional as F
from torch import nn
from fastai.basics import Callback, DataLoaders, Learner, params
from fastai.callback.training import GradientAccumulation
from fastai.data.load import DataLoader
from fastai.optimizer import SGD
from torch.amp import autocast
from fgvc_fisher.data import aircraft_dls
from fgvc_fisher.learner import nesterov
from fgvc_fisher.experiment.paper import (
    RATES, AsPublished, PublishedSchedule, as_published_penalty, fit_published, published_learner, published_logs,
    published_scalars, published_summary
)
from conftest import OnCpu, narrow_inception

# run, epochs, best, its epoch, last, mean of the last five: in per cent, from the project's record of the logs
TABLE = [('new-0-0', 80, 80.198, 78, 79.868, 79.616), ('new-0.0004-0', 80, 80.018, 65, 79.238, 79.202),
         ('new-0-0.0005', 80, 78.938, 75, 76.988, 76.334),
         ('new-0.0004-0.0005', 80, 78.158, 74, 76.868, 76.910), ('new-0.00004-0.0005', 80, 77.828, 70, 75.157, 76.520),
         ('new-0.00004-0', 67, 77.918, 64, 76.478, 76.826)]

def quietly(learn, fit, *args, **kwargs):
    with learn.no_bar(), learn.no_logging(): fit(*args, **kwargs)
    return learn

# The logs

@pytest.mark.parametrize('run,epochs,best,at,last,last5', TABLE)
def test_summary(run, epochs, best, at, last, last5):
    row = published_summary().loc[run]
    assert (row.epochs, row.best_epoch, row['head'], row.cut_off) == (epochs, at, 105, epochs<80)
    assert 100*np.array([row.best, row['last'], row.last5]) == pytest.approx([best, last, last5], abs=6e-4)
    assert 193<=row.seconds<=196

def test_logs_are_those_that_were_published(photos):
    theirs,ours = pd.read_csv(photos/'facts/published_runs.csv'),published_logs()
    assert len(ours)==len(theirs)
    assert set(ours.columns)=={'run','beta','alpha','head','epoch','lr','train_loss','val_loss','accuracy','top5',
                               'epoch_s'}
    for name in ('run', 'epoch', 'lr', 'train_loss', 'val_loss', 'epoch_s'):
        pd.testing.assert_series_equal(ours[name], theirs[name])
    for name,their in (('accuracy','top1'), ('top5','top5')):
        assert (100*ours[name]-theirs[their]).abs().max() < 1e-9
        assert (ours[name].isna()==theirs[their].isna()).all()

def test_names_are_parsed():
    summary = published_summary()
    assert summary.loc['new-0.00004-0.0005', ['beta','alpha','head']].tolist()==[0.00004, 0.0005, 105]
    assert summary.loc['old-0.0004', ['beta','head']].tolist()==[0.0004, 500] and np.isnan(summary.alpha['old-0.0004'])
    assert summary.loc['original', ['beta','alpha','head']].isna().all()

# The recipe

class Rates(Callback):
    "The groups' rates at the first training batch of each epoch"
    def __init__(self): self.seen = {}
    def before_batch(self):
        if self.training: self.seen.setdefault(self.epoch, [o['lr'] for o in self.opt.hypers])

def linear_learner(n_groups, opt_func=nesterov, **kwargs):
    "A Learner of `n_groups` parameter groups"
    net = nn.Sequential(*[nn.Linear(2,2) for _ in range(n_groups)])
    ds = [(torch.randn(2), torch.randn(2)) for _ in range(4)]
    dls = DataLoaders(*[DataLoader(ds, bs=4, num_workers=0) for _ in range(2)], device='cpu')
    return Learner(dls, net, F.mse_loss, opt_func=opt_func, splitter=lambda m: [params(o) for o in m], **kwargs)

@pytest.fixture(scope='module')
def rates():
    "Epoch -> rates of three groups"
    learn,rates = linear_learner(3),Rates()
    quietly(learn, fit_published, learn, 89, cbs=rates)
    return rates.seen

@pytest.mark.parametrize('run', published_logs().run.unique())
def test_rates_are_those_of_every_run(rates, run):
    log = published_logs().query('run==@run')
    assert [f'{sum(rates[k])/3:.3e}' for k in log.epoch]==[f'{o:.3e}' for o in log.lr]

def test_rates_of_each_group(rates):
    for k,seen in rates.items():
        assert seen==pytest.approx([1e-4+k*(o-1e-4)/3 if k<3 else o*0.9**(k//10) for o in RATES], rel=1e-12)

@pytest.mark.parametrize('start', [1, 2, 3, 9, 10, 11, 37])
def test_rates_after_a_stop(rates, start, tmp_path):
    "Model and optimizer through a file; what the optimizer holds does not matter"
    begun,resumed,seen = linear_learner(3, path=tmp_path),linear_learner(3, path=tmp_path),Rates()
    quietly(begun, fit_published, begun, start)
    begun.save('begun', with_opt=True)
    resumed.load('begun', with_opt=True)
    for group in resumed.opt.opt.param_groups: group['initial_lr'] = group['lr'] = 5.
    quietly(resumed, fit_published, resumed, 41, cbs=[seen], start_epoch=start)
    assert list(seen.seen)==list(range(start, 41)) and all(seen.seen[k]==rates[k] for k in seen.seen)

def test_rates_of_fewer_groups_and_none_for_more(rates):
    for n in (1,2):
        learn,seen = linear_learner(n),Rates()
        quietly(learn, fit_published, learn, 5, cbs=seen)
        assert seen.seen=={k: rates[k][-n:] for k in range(5)}
    with pytest.raises(ValueError, match='3.*4'): fit_published(linear_learner(4), 1)
    with pytest.raises(ValueError, match='nesterov'): fit_published(linear_learner(3, opt_func=SGD), 1)

def test_validation_needs_no_optimizer():
    learn = linear_learner(3, cbs=PublishedSchedule())
    with learn.no_bar(): assert len(learn.validate())==1

def test_weight_decay_is_what_one_says():
    for kw,wd in (({}, 0), (dict(wd=0.0005), 0.0005)):
        learn = linear_learner(3)
        quietly(learn, fit_published, learn, 1, **kw)
        assert [o['weight_decay'] for o in learn.opt.opt.param_groups]==[wd]*3

def test_inception_v4_has_as_many_parameters_as_published(drawn):
    "Counted on the meta device, which has shapes and no numbers"
    def on_meta():
        with torch.device('meta'): return timm.create_model('inception_v4')
    assert inspect.signature(published_learner).parameters['arch'].default=='inception_v4'
    dls = aircraft_dls(drawn, size=64, bs=4, transforms='published', num_workers=0)
    assert published_learner(dls, 'tiny:network', weights=None).model.fc.out_features==dls.c==4
    dls.c = 100
    for n_out,want in ((None, 41_304_201), (500, 41_911_316)):
        learn = published_learner(dls, on_meta, n_out=n_out)
        learn.create_opt()
        assert [n for n,_ in learn.model.named_parameters()]==[n for n,_ in narrow_inception().named_parameters()]
        assert learn.model.features[0].conv.weight.numel()==864      # so all 449 scalars are from it
        groups = [sum(p.numel() for p in g['params']) for g in learn.opt.opt.param_groups]
        assert sum(groups)==want and groups[-1]==1537*(n_out or 105) and len(groups)==3
        assert learn.opt.opt.defaults['nesterov'] and learn.opt.opt.defaults['momentum']==0.9
        assert list(learn.metrics.attrgot('name'))==['accuracy','top5']

# The penalty

class Net(nn.Module):
    "The shape of the golden file's network: blocks of a convolution, BatchNorm and ReLU; mean over the picture; a head"
    def __init__(self, blocks=22, width=6, n_out=7):
        super().__init__()
        def block(i):
            conv = nn.Conv2d(width if i else 3, width, 3, padding=1, bias=False)
            return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(width, eps=1e-3), act=nn.ReLU()))
        self.features,self.last_linear = nn.Sequential(*map(block, range(blocks))),nn.Linear(width, n_out)
    def forward(self, x): return self.last_linear(self.features(x).mean((2,3)))

def close(a, b, rel=1e-10):
    "Relative to the greatest value"
    a,b = torch.as_tensor(a),torch.as_tensor(b)
    assert a.shape==b.shape and (a-b).abs().max() <= rel*b.abs().max()

@pytest.fixture
def golden(photos):
    with np.load(photos/'facts/as_published_golden.npz') as f: return {k: torch.from_numpy(f[k]) for k in f}

def part(golden, name): return {k[len(name)+1:]: v for k,v in golden.items() if k.startswith(name+'/')}

def golden_net(golden, name):
    net = Net().double().train()
    net.load_state_dict(part(golden, 'theta0') | part(golden, name))
    return net

def test_as_published(golden):
    "Penalty, scalars and every gradient, as the published code computed them"
    source,model = golden_net(golden, 'theta0'),golden_net(golden, 'theta')
    scalars = published_scalars(source, golden['x'])
    theirs = part(golden, 'fisher_scalar')
    assert list(scalars)==[n for n,_ in source.named_parameters()] and set(theirs)<=set(scalars)
    for n,v in theirs.items(): close(scalars[n], v)
    close(torch.stack(list(scalars.values())), golden['fim_flat'][:len(scalars)])
    coefficients = dict(alpha=0.0005, beta=0.00004, l2sp=0.004)
    penalty = as_published_penalty(model, dict(source.named_parameters()), scalars, **coefficients)
    close(penalty.detach(), golden['penalty'])
    penalty.backward()
    grads = part(golden, 'grad')
    for n,p in model.named_parameters():
        zeros = torch.zeros_like(p)
        close(p.grad if p.grad is not None else zeros, grads.get(n, zeros))
    # 22 convolutions and the head's two
    assert sum(n in grads and bool(grads[n].any()) for n,_ in model.named_parameters())==24
    assert all(p.grad is None for p in source.parameters())

def test_defaults_are_the_published_coefficients(golden):
    source,model = golden_net(golden, 'theta0'),golden_net(golden, 'theta')
    scalars = published_scalars(source, golden['x'])
    close(as_published_penalty(model, dict(source.named_parameters()), scalars).detach(), golden['penalty'])

def problem(n=24, bs=6, dtype=torch.float64):
    torch.manual_seed(0)
    x,y = torch.randn(n,3,8,8, dtype=dtype),torch.randint(3, (n,))
    dls = DataLoaders(*[DataLoader(list(zip(x, y)), bs=bs, num_workers=0) for _ in range(2)], device='cpu')
    return Net(10, 4, 3).to(dtype),dls,list(zip(x.split(bs), y.split(bs)))

def learner(model, dls, **kwargs):
    "fastai records float32, so the loss is; its gradient stays float64"
    return Learner(dls, model, lambda p,y: F.cross_entropy(p, y).float(), opt_func=nesterov, **kwargs)

def written_out(model, steps, lr, context=nullcontext, alpha=0.3, beta=0.7, l2sp=0.2):
    "The training as a plain loop over lists of micro-batches; returns the penalties"
    source,values = copy.deepcopy(model).train(),[]
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True)
    for micro in steps:
        optimizer.zero_grad()
        for x,y in micro:
            with context():
                loss = F.cross_entropy(model.train()(x).float() if context is not nullcontext else model.train()(x), y)
                grads = torch.autograd.grad(source(x).log_softmax(-1).sum(), [*source.parameters()])
                flat = torch.cat([g.flatten() for g in grads])**2/len(x)
                penalty,factor = 0.,10
                for k,((n,p),q) in enumerate(zip(model.named_parameters(), source.parameters())):
                    if 'bn' in n: continue
                    if 'linear' in n or int(n.split('.')[1])>=8:
                        penalty = penalty + alpha*(p**2).sum()/2
                        continue
                    penalty = penalty + factor*(l2sp+beta*flat[k])*((p-q.detach())**2).sum()/2
                    factor = 5
            ((loss+penalty)*len(x)/sum(len(o) for o,_ in micro)).backward()
            values.append(penalty.item())
        optimizer.step()
    return values

COEFS = dict(alpha=0.3, beta=0.7, l2sp=0.2)

def same(learn, alone, rel=1e-9):
    for p,q in zip(learn.model.parameters(), alone.parameters()): close(p.detach(), q.detach(), rel)

@pytest.mark.parametrize('coefs', [COEFS, dict(alpha=0., beta=0.7, l2sp=0.), dict(alpha=0.3, beta=0., l2sp=0.2)])
def test_training_is_the_loop_written_out(coefs):
    "Eight steps in two epochs"
    model,dls,batches = problem()
    learn,alone = learner(model, dls),copy.deepcopy(model)
    quietly(learn, learn.fit, 2, 0.01, cbs=AsPublished(copy.deepcopy(model), **coefs))
    values = written_out(alone, [[b] for b in batches]*2, 0.01, **coefs)
    same(learn, alone)
    assert learn.recorder.metric_names==['epoch','train_loss','valid_loss','penalty','time'] and not learn.metrics
    assert [o[-1] for o in learn.recorder.values]==pytest.approx([sum(values[:4])/4, sum(values[4:])/4], rel=1e-9)

def test_the_penalty_matters():
    model,dls,_ = problem()
    learns = [learner(copy.deepcopy(model), dls) for _ in range(2)]
    for learn,beta in zip(learns, (0., 0.7)):
        quietly(learn, learn.fit, 1, 0.01, cbs=AsPublished(copy.deepcopy(model), alpha=0.3, beta=beta, l2sp=0.2))
    first = [o.model.features[1].conv.weight for o in learns]
    assert (first[0]-first[1]).norm() > 1e-6*first[0].norm()

def test_accumulated_batches():
    "The mean over the micro-batches, of loss and penalty"
    model,dls,batches = problem(bs=4)
    learn,alone = learner(model, dls),copy.deepcopy(model)
    quietly(learn, learn.fit, 1, 0.01, cbs=[AsPublished(copy.deepcopy(model), **COEFS), GradientAccumulation(12)])
    written_out(alone, [batches[:3], batches[3:]], 0.01, **COEFS)
    same(learn, alone, 1e-6)                                       # fastai divides the loss in float32

def test_inside_autocast():
    "The source runs in 16 bits, as the model does, and the training is the loop written out; outside it would not be"
    model,dls,batches = problem(dtype=torch.float32)
    learn,alone,source,seen = learner(model, dls),copy.deepcopy(model),copy.deepcopy(model),[]
    source.last_linear.register_forward_hook(lambda m, inp, out: seen.append(out.dtype))
    quietly(learn, learn.fit, 1, 0.01, cbs=[AsPublished(source, **COEFS), OnCpu('bf16')])
    context = lambda: autocast('cpu', dtype=torch.bfloat16)
    values = written_out(alone, [[b] for b in batches], 0.01, context=context, **COEFS)
    assert seen==[torch.bfloat16]*4
    same(learn, alone, 1e-4)
    assert learn.recorder.values[0][-1]==pytest.approx(sum(values)/4, rel=1e-4)

def test_the_scaler_scales_the_penalty_along():
    "A scaled loss, penalty included, and the gradients scaled back: the training is the one without a scale"
    model,dls,_ = problem(dtype=torch.float32)
    class Scaled(OnCpu):
        def before_fit(self):
            super().before_fit()
            self.autocast = autocast('cpu', enabled=False)
    scaled,plain = [learner(copy.deepcopy(model), dls) for _ in range(2)]
    for learn,more in ((scaled, [Scaled('fp16', init_scale=2.**8)]), (plain, [])):
        quietly(learn, learn.fit, 1, 0.01, cbs=[AsPublished(copy.deepcopy(model), **COEFS), *more])
    same(scaled, plain.model, 1e-4)

def test_validation_and_source_are_left_alone():
    model,dls,_ = problem()
    source = copy.deepcopy(model)
    learn = learner(model, dls)
    quietly(learn, learn.fit, 1, 0.01, cbs=AsPublished(source, **COEFS))
    for p,q in zip(source.parameters(), problem()[0].parameters()): assert torch.equal(p, q) and p.grad is None
    x,y = [torch.cat(o) for o in zip(*learn.dls.valid)]
    losses = [(F.cross_entropy(learn.model.eval()(bx), by).item(), len(by)) for bx,by in learn.dls.valid]
    assert learn.recorder.values[0][1]==pytest.approx(sum(a*n for a,n in losses)/len(y), rel=1e-5)

def test_recorded_training_loss_is_without_the_penalty():
    model,dls,batches = problem(n=6)
    loss = F.cross_entropy(copy.deepcopy(model).train()(batches[0][0]), batches[0][1]).item()
    learn = learner(model, dls)
    quietly(learn, learn.fit, 1, 0.01, cbs=AsPublished(copy.deepcopy(model), **COEFS))
    train_loss,_,penalty = learn.recorder.values[0]
    assert train_loss==pytest.approx(loss, rel=1e-5) and penalty>0.01

def test_pickled_and_refused():
    model,dls,_ = problem()
    learn,cb = learner(model, dls),AsPublished(copy.deepcopy(model))
    for cb,named in ((pickle.loads(pickle.dumps(cb)), 'AsPublished.*source'),
                     (AsPublished(model), r'deepcopy\(learn.model\)'),
                     (AsPublished(Net(10, 4, 5)), r'last_linear.weight.*\(3, 4\).*\(5, 4\)')):
        with pytest.raises(ValueError, match=named): quietly(learn, learn.fit, 1, cbs=cb)

def test_another_network_has_the_head_alone_under_l2(drawn):
    dls = aircraft_dls(drawn, size=32, bs=4, transforms='published', num_workers=0)
    learn = published_learner(dls, 'tiny:network', weights=None)
    quietly(learn, learn.fit, 1, cbs=AsPublished(copy.deepcopy(learn.model), alpha=0., beta=0., l2sp=0.01))
    assert all(p.isfinite().all() for p in learn.model.parameters()) and learn.recorder.values[0][-1]>0

def test_scalars_of_inception_v4(drawn):
    "On real names: 449 numbers, the first of all gradients, and a penalty that is zero at theta0 but for L2"
    dls = aircraft_dls(drawn, size=96, bs=2, transforms='published', num_workers=0)
    torch.manual_seed(0)
    learn = published_learner(dls, narrow_inception)
    source = copy.deepcopy(learn.model).train()
    x = dls.one_batch()[0].as_subclass(torch.Tensor)
    scalars = published_scalars(source, x)
    grads = torch.autograd.grad(source(x).log_softmax(-1).sum(), [*source.parameters()])
    first = torch.cat([g.flatten() for g in grads])[:449]
    assert len(scalars)==449
    close(torch.stack(list(scalars.values())), first**2/2, 1e-4)
    upper = [p for n,p in source.named_parameters() if 'bn' not in n and ('linear' in n or int(n.split('.')[1])>=8)]
    l2 = sum(p.double().square().sum().item() for p in upper)/2
    penalty = as_published_penalty(learn.model, dict(source.named_parameters()), scalars, alpha=1.)
    assert penalty.item()==pytest.approx(l2, rel=1e-4)

@pytest.mark.parametrize('coefs', [dict(alpha=-1.), dict(beta=math.nan), dict(l2sp=-1e-3)])
def test_coefficients_are_checked(coefs):
    with pytest.raises(ValueError, match=next(iter(coefs))): AsPublished(torch.nn.Linear(2,2), **coefs)

def test_scalars_of_a_frozen_source():
    net = torch.nn.Linear(3,2).requires_grad_(False)
    with pytest.raises(ValueError, match='weight is frozen'): published_scalars(net, torch.randn(4,3))
