"The penalty on a real architecture, against autograd"
import math
import pytest, timm, torch
from fgvc_fisher.penalty import QuadraticPenalty, find_new

@pytest.fixture
def tuned():
    "A network that has moved away from its source; the head is new"
    torch.manual_seed(0)
    source = timm.create_model('test_efficientnet', num_classes=7).double()
    model = timm.create_model('test_efficientnet', num_classes=3).double()
    theta0 = {n: p.detach() for n,p in source.named_parameters()}
    fisher = {n: torch.rand_like(p)*10**(4*torch.rand_like(p)-2) for n,p in theta0.items()}
    return model,theta0,fisher,find_new(model, theta0)

def plain(model, theta0, fisher, new, alpha, beta, l2sp):
    total = sum(alpha*(p**2).sum() for p in model.parameters())
    return total + sum(((beta*fisher[n]+l2sp)*(p-theta0[n])**2).sum() for n,p in model.named_parameters() if n not in new)

@pytest.mark.parametrize('alpha,beta,l2sp', [(5e-4,0,0), (0,3.,0), (0,0,0.02), (5e-4,3.,0.02)])
def test_value_and_gradient_against_autograd(tuned, alpha, beta, l2sp):
    model,theta0,fisher,new = tuned
    penalty = QuadraticPenalty(model, theta0, fisher, alpha, beta, l2sp, new)
    expected = plain(model, theta0, fisher, new, alpha, beta, l2sp)
    assert torch.isclose(penalty.value(), expected, rtol=1e-12)
    grads = torch.autograd.grad(expected, [*model.parameters()], allow_unused=True)
    penalty.add_grad_(scale=3.)
    for p,g in zip(model.parameters(), grads):
        assert torch.allclose(p.grad, torch.zeros_like(p) if g is None else 3*g, rtol=1e-12, atol=1e-14)

def test_proximal_step_is_stationary(tuned):
    "At the result of the step, the gradient of Omega + ||theta - v||^2 / 2 lr is zero"
    model,theta0,fisher,new = tuned
    penalty,lr = QuadraticPenalty(model, theta0, fisher, 5e-4, 3., 0.02, new),0.02
    v = [p.detach().clone() for p in model.parameters()]
    penalty.prox_(lr)
    goal = plain(model, theta0, fisher, new, 5e-4, 3., 0.02) + sum(((p-o)**2).sum() for p,o in zip(model.parameters(), v))/(2*lr)
    for g in torch.autograd.grad(goal, [*model.parameters()]): assert g.abs().max() < 1e-9

@pytest.mark.parametrize('beta', [0., 1e-6, 1., 1e6, 1e12])
def test_never_beyond_the_anchor_in_float32(tuned, beta):
    model,theta0,fisher,new = tuned
    model.float()
    penalty = QuadraticPenalty(model, theta0, fisher, beta=beta, new=new)
    def distance(): return torch.stack([(p.detach()-theta0[n].float()).norm() for n,p in model.named_parameters() if n not in new])
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

@pytest.mark.parametrize('kw,said', [(dict(alpha=-1.), 'alpha=-1.0'), (dict(beta=math.nan), 'beta=nan'), (dict(l2sp=math.inf), 'l2sp=inf'), (dict(beta=1.), 'needs a Fisher')])
def test_coefficients_that_cannot_be_meant(tuned, kw, said):
    with pytest.raises(ValueError, match=said): QuadraticPenalty(tuned[0], **kw)

def test_fisher_of_another_network_names_what_differs(tuned):
    model,_,fisher,_ = tuned
    other = {k: v for k,v in fisher.items() if k!='bn1.weight'} | {'conv_stem.weight': torch.ones(1), 'layer4.weight': torch.ones(2)}
    with pytest.raises(ValueError, match=r'conv_stem.weight is \(.*\), in the source \(1,\), bn1.weight is not in the source, layer4.weight is not in the model'):
        find_new(model, other)

def test_no_shared_parameter():
    with pytest.raises(ValueError, match='shares no parameter with the source'): find_new(torch.nn.Linear(2,2), {'a': torch.ones(1)})
    with pytest.raises(ValueError, match='no parameter is shared'): QuadraticPenalty(torch.nn.Linear(2,2), l2sp=1., new=['weight','bias'])

@pytest.mark.parametrize('bad', [math.nan, math.inf, -1.])
def test_fisher_that_is_none(tuned, bad):
    model,theta0,fisher,new = tuned
    fisher['bn1.bias'] = torch.full_like(fisher['bn1.bias'], bad)
    with pytest.raises(ValueError, match='the Fisher of bn1.bias has negative or non-finite'):
        QuadraticPenalty(model, theta0, fisher, beta=1., new=new)
