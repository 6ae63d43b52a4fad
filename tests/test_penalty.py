"The penalty on a real architecture, against autograd"
import copy, math, pickle, re
from itertools import product
from types import SimpleNamespace
import pytest, timm, torch
from torch import nn
from fgvc_fisher.fisher import DiagFisher, estimate_fisher
from fgvc_fisher.penalty import QuadraticPenalty, find_new
from fgvc_fisher.penalty.quadratic import BUNCH, parameter_kinds

@pytest.fixture
def tuned():
    "A network that has moved away from its source; the head is new"
    torch.manual_seed(0)
    source = timm.create_model('test_efficientnet', num_classes=7).double()
    model = timm.create_model('test_efficientnet', num_classes=3).double()
    theta0 = {n: p.detach() for n,p in source.named_parameters()}
    fisher = {n: torch.rand_like(p)*10**(4*torch.rand_like(p)-2) for n,p in theta0.items()}
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1*torch.randn_like(p))
    return model,theta0,fisher,find_new(model, theta0)

def plain(model, theta0, fisher, new, alpha, beta, l2sp):
    total = sum(alpha*(p**2).sum() for p in model.parameters())
    shared = [(n, p) for n,p in model.named_parameters() if n not in new]
    return total + sum(((beta*fisher[n]+l2sp)*(p-theta0[n])**2).sum() for n,p in shared)

@pytest.mark.parametrize('alpha,beta,l2sp', [(5e-4,0,0), (0,3.,0), (0,0,0.02), (5e-4,3.,0.02)])
def test_value_and_gradient_against_autograd(tuned, alpha, beta, l2sp):
    model,theta0,fisher,new = tuned
    penalty = QuadraticPenalty(model, theta0, fisher, alpha, beta, l2sp, new)
    expected = plain(model, theta0, fisher, new, alpha, beta, l2sp)
    assert torch.isclose(penalty.value(), expected, rtol=1e-12)
    grads = torch.autograd.grad(expected, [*model.parameters()], allow_unused=True)
    penalty.add_grad_(scale=3.)
    for p,g in zip(model.parameters(), grads):
        assert p.grad is None if g is None or not g.any() else torch.allclose(p.grad, 3*g, rtol=1e-12, atol=1e-14)

def test_bunches_of_any_size_and_layout_agree(tuned, monkeypatch):
    "One parameter at a time, all at once; weights in channels-last order"
    model,theta0,fisher,new = tuned
    def stepped(model):
        model.zero_grad()
        penalty = QuadraticPenalty(model, theta0, fisher, 5e-4, 3., 0.02, new)
        penalty.add_grad_()
        penalty.prox_(0.02)
        return [*model.parameters(), *(p.grad for p in model.parameters())]
    wanted = stepped(copy.deepcopy(model))
    for size,layout in ((1, torch.contiguous_format), (10**9, torch.contiguous_format), (2**14, torch.channels_last)):
        monkeypatch.setitem(BUNCH, 'cpu', size)
        got = stepped(copy.deepcopy(model).to(memory_format=layout))
        for a,b in zip(got, wanted): assert torch.allclose(a, b, rtol=1e-12, atol=0)

def test_which_terms_apply_to_which_parameters(tuned):
    "Named choices and functions, in the table, the value, the gradient and the step"
    model,theta0,fisher,new = tuned
    on = dict(alpha_on='new', beta_on=lambda name, p: p.ndim==4)
    penalty = QuadraticPenalty(model, theta0, fisher, 0.1, 3., 0.2, new, **on)
    table = penalty.table().set_index('parameter')
    assert set(table[table.terms=='alpha'].index)==set(new)
    anchored = [n for n,p in model.named_parameters() if p.ndim==4]
    assert set(table[table.terms=='beta F + l2sp'].index)==set(anchored)
    assert (table.loc[anchored].kind=='weight').all()
    params = dict(model.named_parameters())
    with torch.no_grad():
        expected = sum(0.1*(params[n]**2).sum() for n in new)
        expected = expected + sum(((3*fisher[n]+0.2)*(params[n]-theta0[n])**2).sum() for n in anchored)
    assert torch.isclose(penalty.value(), expected, rtol=1e-12)
    before = {n: p.detach().clone() for n,p in params.items()}
    penalty.add_grad_()
    penalty.prox_(0.1)
    for n,p in params.items():
        untouched = n not in [*new,*anchored]
        assert torch.equal(p, before[n])==untouched and (p.grad is None)==untouched

def test_the_papers_choice_for_inception_v4():
    "By the counts of its 449 parameters; no BatchNorm, lower blocks under beta, upper ones and the head under alpha"
    with torch.device('meta'): model = timm.create_model('inception_v4', num_classes=105)
    penalty = QuadraticPenalty(model, alpha=1., l2sp=1., alpha_on='published', beta_on='published')
    weights = [n for n,p in model.named_parameters() if p.ndim==4 or 'linear' in n]
    assert penalty.decayed | penalty.anchored == set(weights) and not penalty.decayed & penalty.anchored
    assert penalty.anchored == {n for n in weights if n[9:].split('.')[0] in '0 1 2 3 4 5 6 7'.split()}

def test_a_strength_does_not_depend_on_the_fishers_scale(tuned):
    model,theta0,fisher,new = tuned
    def moved(factor, **kw):
        other = copy.deepcopy(model)
        QuadraticPenalty(other, theta0, {n: factor*f for n,f in fisher.items()}, new=new, **kw).prox_(0.02)
        return torch.cat([p.detach().flatten() for p in other.parameters()])
    mean = torch.cat([f.flatten() for n,f in fisher.items() if n not in new]).mean().item()
    wanted = moved(1., beta=2./mean)
    for factor in (1e-9, 1., 1e6): assert torch.allclose(moved(factor, strength=2.), wanted, rtol=1e-12)
    with pytest.raises(ValueError, match='strength=2.0.*zero'): moved(0., strength=2.)
    with pytest.raises(ValueError, match='both'): moved(1., beta=1., strength=2.)

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_kept_in_fewer_bits(tuned, dtype):
    "The step is that of the rounded anchor and Fisher, in the parameters' precision"
    model,theta0,fisher,new = tuned
    rounded = [{n: v.to(dtype).double() for n,v in o.items()} for o in (theta0, fisher)]
    a,b = copy.deepcopy(model),copy.deepcopy(model)
    kept = QuadraticPenalty(a, theta0, fisher, beta=3., new=new, dtype=dtype)
    assert {v.dtype for v in [*kept.anchor.values(), *kept.fisher.values()]}=={dtype}
    kept.prox_(0.02)
    QuadraticPenalty(b, *rounded, beta=3., new=new).prox_(0.02)
    for p,q in zip(a.parameters(), b.parameters()): assert torch.equal(p, q)
    assert math.isclose(kept.distance(), QuadraticPenalty(a, rounded[0], new=new).distance(), rel_tol=1e-12)

@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('stored', [None, torch.float16, torch.float32])
def test_parameters_of_16_bits_and_a_small_fisher(tuned, kind, stored):
    "As with the same numbers in float64, though every value of the Fisher would be 0 in float16"
    model,theta0,fisher,new = tuned
    rounded = copy.deepcopy(model).to(kind)
    precise = copy.deepcopy(rounded).double()
    fisher = {n: 1e-9*f/f.max() for n,f in fisher.items()}
    theta0 = {n: v.to(kind) for n,v in theta0.items()}
    kw = dict(strength=2., l2sp=0.1, alpha=0.05, new=new)
    ours = QuadraticPenalty(rounded, theta0, fisher, dtype=stored, **kw)
    wanted = QuadraticPenalty(precise, {n: v.double() for n,v in theta0.items()}, fisher, **kw)
    for o in (ours, wanted): o.add_grad_()
    eps = torch.finfo(kind).eps
    def near(a, b): return torch.allclose(a.double(), b.double(), rtol=4*eps, atol=eps*b.abs().max().item())
    assert all(near(p.grad, q.grad) for p,q in zip(rounded.parameters(), precise.parameters()))
    assert math.isclose(ours.value().item(), wanted.value().item(), rel_tol=1e-2)
    for o in (ours, wanted): o.prox_(0.5)
    assert all(near(p, q) for p,q in zip(rounded.parameters(), precise.parameters()))
    with torch.no_grad(): rounded.conv_stem.weight.fill_(300.)               # whose square is no float16
    assert ours.value().isfinite()

@pytest.mark.parametrize('call', [lambda o: o.prox_(0.1), lambda o: o.add_grad_(), lambda o: o.value()])
@pytest.mark.parametrize('how', ['assigned', 'a new layer', 'a new head'])
def test_parameters_that_have_been_replaced(tuned, call, how):
    "The penalty would move tensors that nobody trains"
    model,theta0,fisher,new = tuned
    model = copy.deepcopy(model)
    penalty = QuadraticPenalty(model, theta0, fisher, strength=1., alpha=0.1, new=new)
    copied_model,copied = copy.deepcopy((model, penalty))
    call(penalty)
    if how=='assigned': model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    if how=='a new layer': model.bn1 = copy.deepcopy(model.bn1)
    if how=='a new head': model.reset_classifier(3)
    with pytest.raises(ValueError, match='replaced since this penalty'): call(penalty)
    call(copied)
    model.to(torch.float64)
    call(QuadraticPenalty(model, theta0, fisher, l2sp=1., new=['classifier']))

def test_tied_parameters_are_not_replaced_ones():
    model = torch.nn.Sequential(torch.nn.Linear(4,4), torch.nn.Tanh(), torch.nn.Linear(4,4))
    model[2].weight = model[0].weight
    penalty = QuadraticPenalty(model, l2sp=1.)
    with torch.no_grad(): model[0].weight.add_(1)
    assert penalty.value().item()==pytest.approx(16)
    penalty.prox_(0.5)
    assert penalty.value().item()==pytest.approx(4)

def test_the_summary_in_a_line(tuned):
    model,theta0,fisher,new = tuned
    model.conv_stem.weight.requires_grad_(False)
    n,shared = len(theta0),len(theta0)-len(new)
    said = QuadraticPenalty(model, theta0, fisher, alpha=1., beta=1., new=new, alpha_on='new').summary()
    values = sum(v.numel() for k,v in theta0.items() if k not in new)
    terms = f'alpha.*{len(new)}.*{n}.*beta.*{shared-1}.*{n}.*1 frozen'
    rest = f'{", ".join(new)}.*Fisher.*{2*8*values/1e6:.1f} MB'
    assert re.search(f'{terms}.*{rest}', said)
    half = QuadraticPenalty(model.to('meta'), theta0, new=new, device='cpu').summary()
    assert re.search(f'{8*values/1e6:.1f} MB.*{8*values/1e6:.1f} MB.*cpu', half) and 'Fisher' not in half

def test_stiffest_names_the_parameter(tuned):
    model,theta0,fisher,new = tuned
    fisher['bn1.weight'][3] = 1e5
    penalty = QuadraticPenalty(model, theta0, fisher, alpha=1., beta=2., l2sp=3., new=new)
    assert penalty.stiffest(0.01)==(2*0.01*(2e5+3+1), 'bn1.weight')
    assert penalty.stiffest({new[0]: 0.5})==(1., new[0])
    model.requires_grad_(False)
    assert penalty.stiffest(0.01)==(0., None)

@pytest.mark.parametrize('lr', [-0.1, math.nan, math.inf, '0.1', None])
def test_invalid_rates(tuned, lr):
    with pytest.raises(ValueError, match=f'lr={lr}'): QuadraticPenalty(tuned[0], alpha=1.).prox_(lr)

def test_rates_by_name(tuned):
    "By the names of the wrapped model, too; by others nothing would move without a word"
    model = tuned[0]
    def after(lr):
        other = copy.deepcopy(model)
        QuadraticPenalty(other, alpha=1.).prox_(lr)
        return [*other.parameters()]
    wrapped = {n: 0.1 for n,_ in nn.DataParallel(torch.compile(model)).named_parameters()}
    assert all(map(torch.equal, after(wrapped), after(0.1)))
    some = {n: r for n,r in wrapped.items() if 'bn' in n}
    moved = [not torch.equal(p, q) for p,q in zip(after(some), model.parameters())]
    assert moved==['bn' in n and p.any().item() for n,p in model.named_parameters()]
    for wrong in (dict(head=0.1), {n.upper(): 0.1 for n in wrapped}, wrapped | dict(head=0.1)):
        with pytest.raises(ValueError, match='no such parameter'): after(wrong)
        with pytest.raises(ValueError, match='no such parameter'): QuadraticPenalty(model, alpha=1.).stiffest(wrong)

@pytest.mark.parametrize('kw,said', [
    (dict(alpha_on='head'), "alpha_on='head'.*all, weights, new, published"),
    (dict(beta_on='new'), "beta_on='new'.*all, weights, published"),
    (dict(alpha_on='published'), "'published'.*conv_stem.weight"),
    (dict(l2sp=1., beta_on=lambda name, p: False), 'beta_on='),
    (dict(dtype=torch.int8), 'dtype=torch.int8')])
def test_invalid_choices(tuned, kw, said):
    with pytest.raises(ValueError, match=said): QuadraticPenalty(tuned[0], alpha=1., **kw)

def test_proximal_step_is_stationary(tuned):
    "At the result of the step, the gradient of Omega + ||theta - v||^2 / 2 lr is zero"
    model,theta0,fisher,new = tuned
    penalty,lr = QuadraticPenalty(model, theta0, fisher, 5e-4, 3., 0.02, new),0.02
    v = [p.detach().clone() for p in model.parameters()]
    penalty.prox_(lr)
    away = sum(((p-o)**2).sum() for p,o in zip(model.parameters(), v))
    goal = plain(model, theta0, fisher, new, 5e-4, 3., 0.02) + away/(2*lr)
    for g in torch.autograd.grad(goal, [*model.parameters()]): assert g.abs().max() < 1e-9

STRENGTHS = [*product([1e-300,1e-40,1e-12,1e12,1e30], [0.,1e-30,0.1,1e30]), (1e40,0.), (1e300,0.)]

@pytest.mark.parametrize('beta,l2sp', STRENGTHS)
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32, torch.float64])
def test_no_strength_overflows(beta, l2sp, dtype):
    "Beside the closed form in Python's float; a parameter without Fisher, too"
    model = torch.nn.Linear(3, 1, bias=False, dtype=dtype)
    fisher,theta0,v = [0.,1e-3,100.],[1.,2.,-3.],[0.5,-2.,4.]
    torch.nn.init.zeros_(model.weight).data += torch.tensor([v], dtype=dtype)
    sources = [{'weight': torch.tensor([values])} for values in (theta0, fisher)]
    QuadraticPenalty(model, *sources, beta=beta, l2sp=l2sp).prox_(0.02)
    c = [0.04*(beta*f+l2sp) for f in fisher]
    wanted = torch.tensor([[a + k/(1+k)*(b-a) for a,b,k in zip(v, theta0, c)]])
    assert torch.allclose(model.weight.detach().float(), wanted, rtol=2e-3 if dtype==torch.float16 else 1e-6)

@pytest.mark.parametrize('beta', [0., 1e-6, 1., 1e6, 1e12])
def test_never_beyond_the_anchor_in_float32(tuned, beta):
    model,theta0,fisher,new = tuned
    model.float()
    penalty = QuadraticPenalty(model, theta0, fisher, beta=beta, new=new)
    def distance():
        away = [p.detach()-theta0[n].float() for n,p in model.named_parameters() if n not in new]
        return torch.stack([o.norm() for o in away])
    before = distance()
    for _ in range(3): penalty.prox_(0.02)
    assert (distance() <= before*(1+1e-6)).all() and distance().isfinite().all()

def test_frozen_parameters_stay_and_cost_nothing(tuned):
    model,theta0,fisher,new = tuned
    model.conv_stem.weight.requires_grad_(False)
    penalty,before = QuadraticPenalty(model, theta0, fisher, 1., 1., new=new),model.conv_stem.weight.clone()
    penalty.prox_(0.1)
    penalty.add_grad_()
    assert torch.equal(model.conv_stem.weight, before) and model.conv_stem.weight.grad is None
    row = penalty.table().set_index('parameter').loc['conv_stem.weight']
    assert row.terms=='frozen' and row.cost==0 and row.moved>0

def test_anchor_is_a_clone(tuned):
    model = tuned[0]
    penalty = QuadraticPenalty(model, l2sp=1.)
    model.conv_stem.weight.data.add_(1)
    assert penalty.value()>0

@pytest.mark.parametrize('kw,said', [
    (dict(alpha=-1.), 'alpha=-1.0'), (dict(beta=math.nan), 'beta=nan'), (dict(l2sp=math.inf), 'l2sp=inf'),
    (dict(beta=1.), 'beta=1.0.*fisher='), (dict(alpha='a'), 'alpha=a'), (dict(l2sp=None), 'l2sp=None')])
def test_invalid_coefficients(tuned, kw, said):
    with pytest.raises(ValueError, match=said): QuadraticPenalty(tuned[0], **kw)

def test_fisher_of_another_network_names_what_differs(tuned):
    model,_,fisher,_ = tuned
    other = fisher | {'conv_stem.weight': torch.ones(1), 'layer4.weight': torch.ones(2), 'head.weight': torch.ones(2)}
    del other['bn1.weight']
    with pytest.raises(ValueError, match=r'conv_stem.weight.*\(1,\).*bn1.weight.*layer4.weight.*head.weight'):
        find_new(model, other)

def test_no_shared_parameter():
    model = torch.nn.Linear(2,2)
    with pytest.raises(ValueError, match='Linear'): find_new(model, {'a': torch.ones(1)})
    with pytest.raises(ValueError, match='shared'): QuadraticPenalty(model, l2sp=1., new=['weight','bias'])

@pytest.mark.parametrize('bad', [math.nan, math.inf, -1.])
def test_an_invalid_fisher(tuned, bad):
    model,theta0,fisher,new = tuned
    fisher['bn1.bias'] = torch.full_like(fisher['bn1.bias'], bad)
    with pytest.raises(ValueError, match='bn1.bias'):
        QuadraticPenalty(model, theta0, fisher, beta=1., new=new)

@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('where', ['dict', 'module', 'own', 'large'])
def test_an_anchor_that_is_not_finite(tuned, bad, where):
    "In one value; in a mapping, a module or the model itself; or only in the type that it is stored in"
    model,theta0,fisher,new = tuned
    source = copy.deepcopy(model)
    source.bn1.bias.data[-1] = 1e6*(1 if bad>0 else -1) if where=='large' else bad
    anchor = dict(source.named_parameters()) if where=='dict' else None if where=='own' else source
    dtype = torch.float16 if where=='large' else None
    with pytest.raises(ValueError, match='anchor.*bn1.bias'):
        QuadraticPenalty(source if where=='own' else model, anchor, fisher, beta=1., new=new, dtype=dtype)

def test_an_anchor_that_is_a_fisher(tuned):
    model,theta0,fisher,new = tuned
    estimate = DiagFisher(fisher, 1, 'exact')
    for o in (None, estimate):
        with pytest.raises(ValueError, match='anchor is a DiagFisher.*fisher='):
            QuadraticPenalty(model, estimate, o, l2sp=1., new=new)
    with pytest.raises(ValueError, match='negative'): QuadraticPenalty(model, theta0, theta0, beta=1., new=new)

@pytest.mark.parametrize('dtype', [torch.int8, torch.bool, torch.complex128])
@pytest.mark.parametrize('swap', [False, True])
def test_values_that_are_no_real_numbers(tuned, dtype, swap):
    model,theta0,fisher,new = tuned
    changed = (fisher if swap else theta0) | {'bn1.bias': theta0['bn1.bias'].to(dtype)}
    both = (theta0,changed) if swap else (changed,fisher)
    with pytest.raises(ValueError, match=f"{'fisher' if swap else 'anchor'}.*bn1.bias is {dtype}"):
        QuadraticPenalty(model, *both, beta=1., new=new)

def test_an_anchor_without_values(tuned):
    model,_,_,new = tuned
    with pytest.raises(ValueError, match='anchor.*conv_stem.weight.*meta'):
        QuadraticPenalty(model, copy.deepcopy(model).to('meta'), l2sp=1., new=new)

def test_a_fisher_that_is_too_large_for_its_dtype(tuned):
    model,theta0,fisher,new = tuned
    fisher['bn1.bias'] = torch.full_like(fisher['bn1.bias'], 1e300, dtype=torch.float64)
    with pytest.raises(ValueError, match='bn1.bias.*torch.float32'):
        QuadraticPenalty(model, theta0, fisher, beta=1., new=new, dtype=torch.float32)

def test_new_by_one_name(tuned):
    model,theta0,_,new = tuned
    assert QuadraticPenalty(model, theta0, l2sp=1., new='classifier').shared==[n for n in theta0 if n not in new]
    with pytest.raises(ValueError, match="'head'.*EfficientNet"): QuadraticPenalty(model, theta0, new='head')

# What an own loop does besides

def pulled(**kw):
    "A small network that has moved, and a penalty that pulls it back"
    net = nn.Sequential(nn.Linear(4,3), nn.Linear(3,2)).double()
    theta0 = {n: torch.randn_like(p) for n,p in net.named_parameters()}
    fisher = {n: torch.rand_like(p) for n,p in net.named_parameters()}
    return net,QuadraticPenalty(net, theta0, fisher, **kw)

@pytest.mark.parametrize('name', ['alpha', 'beta', 'l2sp', 'strength'])
def test_a_coefficient_may_be_set_at_any_time(name):
    net,penalty = pulled(alpha=0.1, l2sp=0.1, beta=0.1)
    setattr(penalty, name, 0.7)
    again = dict(alpha=penalty.alpha, l2sp=penalty.l2sp) | dict({name: 0.7} if name=='strength' else
                                                                dict(beta=penalty.beta) | {name: 0.7})
    same = QuadraticPenalty(net, penalty.anchor, penalty.fisher, **again)
    assert getattr(penalty, name)==pytest.approx(0.7) and torch.isclose(penalty.value(), same.value(), rtol=1e-12)
    setattr(penalty, name, torch.tensor(0.5))
    assert getattr(penalty, name)==pytest.approx(0.5)
    for bad in (-1, math.nan, 'a', torch.ones(2)):
        with pytest.raises(ValueError, match=name): setattr(penalty, name, bad)
    if name in ('beta','strength'):
        with pytest.raises(ValueError, match='needs a Fisher'): setattr(QuadraticPenalty(net, l2sp=1.), name, 1.)
    for bad in (math.nan, 'a'):
        with pytest.raises(ValueError, match='scale'): penalty.add_grad_(bad)

def test_a_fisher_of_other_weights():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12,4), nn.Linear(4,3))
    fisher,source = estimate_fisher(net, [torch.randn(8,3,2,2)], progress=False),copy.deepcopy(net)
    QuadraticPenalty(net, fisher=fisher, strength=1.)
    with torch.no_grad(): net[2].weight.mul_(2)
    with pytest.raises(ValueError, match='2.weight do not have the values.*anchor=source'):
        QuadraticPenalty(net, fisher=fisher, strength=1.)
    QuadraticPenalty(net, fisher=fisher, strength=1., new=['2'])
    QuadraticPenalty(net, source, fisher, strength=1.)
    with pytest.warns(UserWarning, match='2.weight'):
        QuadraticPenalty(net, net, fisher, strength=1.)

def test_kinds_by_whatever_names():
    net = nn.ModuleDict(dict(rnn=nn.LSTM(3,4), words=nn.Embedding(5,3), attention=nn.MultiheadAttention(4,2),
                             normed=nn.utils.parametrizations.weight_norm(nn.Linear(4,4)), norm=nn.LayerNorm(4)))
    kinds = parameter_kinds(net)
    assert {kinds[n] for n in kinds if n.startswith('rnn.weight')}=={'weight'}
    assert {kinds[n] for n in kinds if n.startswith('rnn.bias')}=={'bias'}
    assert {n: kinds[n] for n in kinds if n.startswith('normed')}=={
        'normed.bias': 'bias', 'normed.parametrizations.weight.original0': 'weight',
        'normed.parametrizations.weight.original1': 'weight'}
    assert [kinds[o] for o in ('words.weight', 'norm.weight', 'attention.in_proj_weight')]==['other', 'norm', 'weight']

def test_no_step_of_the_optimizer_no_proximal_step():
    "As accelerate's optimizer says; also between the steps of accumulated gradients"
    net,penalty = pulled(l2sp=1.)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = copy.deepcopy(net.state_dict())
    for told in (dict(step_was_skipped=True), dict(gradient_state=SimpleNamespace(sync_gradients=False))):
        vars(optimizer).update(told)
        penalty.prox_(optimizer)
        assert all(torch.equal(before[n], v) for n,v in net.state_dict().items())
        vars(optimizer).update(step_was_skipped=False)
    optimizer.gradient_state.sync_gradients = True
    penalty.prox_(optimizer)
    assert not any(torch.equal(before[n], v) for n,v in net.state_dict().items())

def test_a_part_that_was_replaced_while_it_is_still_there():
    net = nn.Sequential(nn.Linear(4,3), nn.Linear(3,2))
    penalty,old = QuadraticPenalty(net, l2sp=1.),net[0]
    net[0] = nn.Linear(4,3)
    for use in (penalty.value, penalty.add_grad_, lambda: penalty.prox_(0.1)):
        with pytest.raises(ValueError, match='0.weight, 0.bias replaced'): use()
    net[0] = old
    penalty.prox_(0.1)

def test_layers_that_are_replaced_with_their_parameters():
    net = nn.Sequential(nn.Conv2d(3,4,1), nn.BatchNorm2d(4))
    penalty = QuadraticPenalty(net, l2sp=1.)
    nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert isinstance(net[1], nn.SyncBatchNorm)
    penalty.prox_(0.1)

def test_a_copy_and_a_pickle_with_their_model():
    net,penalty = pulled(l2sp=1.)
    for copied,of_it in (copy.deepcopy((net, penalty)), pickle.loads(pickle.dumps((net, penalty)))):
        of_it.prox_(0.5)
        half = {n: (p+penalty.anchor[n])/2 for n,p in net.named_parameters()}
        assert all(torch.allclose(p, half[n]) for n,p in copied.named_parameters())

def test_gradients_of_another_type_and_sparse_ones():
    net = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2)).double()
    theta0 = {n: torch.randn_like(p) for n,p in net.named_parameters()}
    penalty = QuadraticPenalty(net, theta0, l2sp=0.5)
    net(torch.tensor([0, 3])).sum().backward()
    expected = {n: p.grad.to_dense()+(p-theta0[n]).detach() for n,p in net.named_parameters()}
    penalty.add_grad_()
    assert all(torch.allclose(p.grad, expected[n]) for n,p in net.named_parameters())
    net = nn.Linear(3, 2).bfloat16()
    penalty = QuadraticPenalty(net, {n: torch.zeros_like(p) for n,p in net.named_parameters()}, l2sp=1.)
    net.bias.grad_dtype = None
    net.bias.grad = torch.ones(2)
    net.weight.grad = torch.ones_like(net.weight)
    penalty.add_grad_()
    assert torch.allclose(net.weight.grad.float(), 1+2*net.weight.float(), rtol=0.02)
    assert torch.allclose(net.bias.grad, 1+2*net.bias.float(), rtol=1e-5)
