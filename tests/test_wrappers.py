"A wrapped model is the same model for every function that takes one; what does not fit is refused by name"
import copy, functools
from collections import OrderedDict
import pytest, timm, torch
from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel
from fgvc_fisher.distributed.wrappers import copy_module, match_names, unwrap
from fgvc_fisher.explore.recognise import grad_cam, map_layer
from fgvc_fisher.fisher import DiagFisher, estimate_fisher
from fgvc_fisher.fisher.diagonal import weights_sha256
from fgvc_fisher.penalty import QuadraticPenalty, find_new, interpolate, merge
from fgvc_fisher.retention import Retention, retention, with_source_head

class Wrap(nn.Module):
    "A user's own"
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return self.net(x)

WRAPPERS = dict(
    none=lambda m: m, compiled=torch.compile, parallel=nn.DataParallel, averaged=AveragedModel,
    ema=lambda m: ModelEmaV3(m), ema2=lambda m: ModelEmaV2(m), ema1=lambda m: ModelEma(m),
    nested=lambda m: nn.DataParallel(torch.compile(AveragedModel(m))),
    twice=lambda m: torch.compile(nn.DataParallel(m)))
BY_NAME = dict(own=Wrap, sequential=nn.Sequential, own_twice=lambda m: Wrap(nn.Sequential(m)),
               own_compiled=lambda m: torch.compile(Wrap(m)), compiled_own=lambda m: Wrap(torch.compile(m)))

def network(n): return timm.create_model('test_resnet', num_classes=n)

@pytest.fixture(scope='module')
def models():
    torch.manual_seed(0)
    source,tuned = network(5),network(3)
    tuned.load_state_dict({k: v for k,v in source.state_dict().items() if k[:2]!='fc'}, strict=False)
    with torch.no_grad():
        for p in tuned.parameters(): p.add_(0.05*torch.randn_like(p))
    pictures = [(torch.randn(4,3,32,32), torch.tensor([0,1,2,3]))]
    return source.eval(),tuned.eval(),pictures,estimate_fisher(source, pictures, progress=False)

every = pytest.mark.parametrize('wrap', (WRAPPERS | BY_NAME).values(), ids=(WRAPPERS | BY_NAME))
known = pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)

@known
def test_unwrap(models, wrap):
    params = dict(unwrap(wrap(models[1])).named_parameters())
    for n,p in models[1].named_parameters(): assert torch.equal(p, params[n])

@every
def test_retention_of_a_wrapped_model(models, wrap):
    "A model of zeros knows nothing, however it is wrapped"
    source,tuned,pictures,_ = models
    for norm in ('target','source'):
        wanted = with_source_head(tuned, source, norm).state_dict()
        got = with_source_head(wrap(tuned), source, norm).state_dict()
        assert list(got)==list(wanted) and all(torch.equal(got[k], wanted[k]) for k in got)
    zeros = copy.deepcopy(tuned)
    with torch.no_grad():
        for p in zeros.parameters(): p.zero_()
    assert retention(wrap(zeros), source, pictures)==retention(zeros, source, pictures)

@every
def test_penalty_on_a_wrapped_model(models, wrap):
    "The same value; the anchor as a model, a state_dict or its parameters, wrapped or not"
    source,tuned,_,fisher = models
    wanted = QuadraticPenalty(tuned, dict(source.named_parameters()), fisher, beta=2., new=find_new(tuned, fisher))
    anchors = [source, source.state_dict(), torch.compile(source).state_dict(), nn.DataParallel(source),
               AveragedModel(source).state_dict(), Wrap(source).state_dict()]
    for anchor in anchors:
        model = wrap(tuned)
        new = find_new(model, fisher)
        assert [n.rpartition('fc.')[2] for n in new]==['weight','bias'] and find_new(model, anchor)==new
        unwrap(model).requires_grad_(True)                             # an average is frozen
        assert torch.equal(QuadraticPenalty(model, anchor, fisher, beta=2., new=new).value(), wanted.value())

@known
def test_merging_of_wrapped_models(models, wrap):
    source,tuned,_,fisher = models
    wanted,got = interpolate(source, tuned, 0.3),interpolate(wrap(source), wrap(tuned), 0.3)
    for p,q in zip(wanted.parameters(), got.parameters()): assert torch.equal(p, q)
    target = {n: torch.rand_like(p) for n,p in tuned.named_parameters()}
    merged = [merge(s, t, fisher, target) for s,t in ((source,tuned), (wrap(source),wrap(tuned)))]
    for p,q in zip(*(o.parameters() for o in merged)): assert torch.equal(p, q)

@known
def test_fisher_of_a_wrapped_model(models, wrap, tmp_path):
    source,_,pictures,fisher = models
    got = estimate_fisher(wrap(source), pictures, progress=False)
    assert got.provenance==fisher.provenance and all(torch.equal(got[n], fisher[n]) for n in fisher)
    assert weights_sha256(wrap(source))==weights_sha256(source)
    assert len(DiagFisher.load(fisher.save(tmp_path/'fisher.safetensors'), wrap(source)))==len(fisher)

@known
def test_where_the_evidence_is_in_a_wrapped_model(models, wrap):
    tuned,x = models[1],models[2][0][0]
    wanted,wrapped = grad_cam(tuned, x, map_layer(tuned, x), 1),wrap(tuned)
    assert torch.allclose(grad_cam(wrapped, x, map_layer(wrapped, x), 1), wanted, atol=1e-5)

def changed(model, how):
    "A copy of a network, changed"
    model = copy.deepcopy(model)
    how(model)
    return model
def another_layer(model): model.conv1[0] = nn.Conv2d(3, model.conv1[0].out_channels, 5, padding=2, bias=False)
def pruned(model): prune.l1_unstructured(model.conv1[0], 'weight', 0.5)
def normed(model): parametrizations.weight_norm(model.conv1[0])
def no_norm(model): model.bn1 = nn.Identity()
def more_before(model): model.conv1.add_module('more', nn.Conv2d(model.conv1[-1].out_channels, 3, 1))

@pytest.mark.parametrize('how,named', [(another_layer, 'conv1.0.weight'), (pruned, 'conv1.0.weight.*prune.remove'),
    (normed, 'conv1.0.weight.*remove_parametrizations'), (no_norm, 'bn1.weight'), (more_before, 'more.weight')])
def test_a_model_that_is_not_the_sources(models, how, named):
    "Is refused by retention, penalty and merging alike"
    source,tuned,pictures,fisher = models
    model = changed(tuned, how)
    for refused in (lambda: with_source_head(model, source), lambda: with_source_head(nn.DataParallel(model), source),
                    lambda: Retention(source, pictures).check(model), lambda: find_new(model, fisher),
                    lambda: find_new(model, source), lambda: interpolate(source, model)):
        with pytest.raises(ValueError, match=named): refused()

def test_new_layers_at_the_end_have_a_retention(models):
    source,tuned,_,_ = models
    model = changed(tuned, lambda m: setattr(m, 'fc', nn.Sequential(nn.Linear(m.num_features, 7), nn.Linear(7,3))))
    wanted,got = (with_source_head(o, source).state_dict() for o in (tuned, model))
    assert all(torch.equal(v, got[k]) for k,v in wanted.items())

def test_a_backbone_beside_its_own_head(models):
    source,tuned,_,_ = models
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = changed(tuned, lambda m: m.reset_classifier(0))
            self.head = nn.Linear(tuned.num_features, 2)
    wanted,got = (with_source_head(o, source).state_dict() for o in (tuned, Whole()))
    assert all(torch.equal(v, got[k]) for k,v in wanted.items())

@pytest.mark.parametrize('state,own,wanted', [
    (['a.w','a.b'], ['a.w','a.b'], ['a.w','a.b']),
    (['module.a.w','module.b'], ['a.w','b'], ['a.w','b']),
    (['a.w','b'], ['module.a.w','module.b'], ['module.a.w','module.b']),
    (['model.module.a.w','model.module.b'], ['x.a.w','x.b'], ['x.a.w','x.b']),
    (['a._orig_mod.w','b.w'], ['a.w','b._orig_mod.w'], ['a.w','b._orig_mod.w']),
    (['0.0.w','0.1.w'], ['0.w','1.w'], ['0.w','1.w']),
    (['0.w','1.w','n_averaged'], ['0.w','1.w'], ['0.w','1.w']),
    (['student.a','teacher.a'], ['a'], ['student.a','teacher.a']),
    (['x.y'], ['z'], ['x.y']), ([], ['a'], []), (['a'], [], ['a'])])
def test_match_names(state, own, wanted):
    matched = match_names({n: i for i,n in enumerate(state)}, own)
    assert list(matched)==wanted and list(matched.values())==list(range(len(wanted)))

@pytest.mark.parametrize('bad', [{}, None, 'model.pth', [nn.Linear(2,2)]])
def test_no_module(bad):
    with pytest.raises(ValueError, match=type(bad).__name__): unwrap(bad)

@pytest.mark.parametrize('anchor', [5, 'source', [torch.ones(2)], {'weight': 'a', 'bias': torch.ones(2)},
                                    {'model': {'weight': torch.ones(2,2)}}])
def test_no_anchor(anchor):
    with pytest.raises(ValueError, match='anchor|no parameter'): QuadraticPenalty(nn.Linear(2,2), anchor, l2sp=1.)

# Functions in place of methods, layers that were wrapped one by one, what has no values

def doubled(f):
    @functools.wraps(f)
    def g(*args): return 2*f(*args)
    return g

def test_a_copy_has_hooks_of_its_own():
    "Those that are there are copied, and one that is added to either is not the other's"
    called,net = [],network(2)
    net.conv1.register_forward_hook(lambda *args: called.append('both'))
    copied = copy_module(net)
    for model,name in ((net, 'original'), (copied, 'copy')):
        model.fc.register_forward_hook(lambda *args, name=name: called.append(name))
        assert all(a is not b for m,c in zip(net.modules(), copied.modules())
                   for a,b in zip(vars(m).values(), vars(c).values()) if isinstance(a, OrderedDict))
    for model in (net, copied): model.eval()(torch.randn(2,3,32,32))
    assert called==['both','original','both','copy']

@pytest.mark.parametrize('part', ['', '0'])
@pytest.mark.parametrize('wrap', [torch.compile, torch.autocast('cpu', torch.bfloat16), doubled],
                         ids=['compiled', 'autocast', 'doubled'])
def test_a_method_in_a_wrapper_is_the_copys(wrap, part):
    "And does not compute with the weights of the original"
    source,tuned = [nn.Sequential(nn.Linear(6,8), nn.ReLU(), nn.Linear(8,5)) for _ in range(2)]
    for o in (source, tuned):
        plain = copy.deepcopy(o)
        layer = o.get_submodule(part)
        layer.forward = wrap(layer.forward)
        copied = copy_module(o)
        x = torch.randn(3,6)
        assert torch.equal(copied(x), plain(x))
        with torch.no_grad(): o[0].weight.zero_()
        assert torch.equal(copied(x), plain(x)) and 'forward' not in vars(copied.get_submodule(part))

def test_a_function_in_place_of_a_method_is_refused():
    net = nn.Sequential(nn.Linear(6,8), nn.Linear(8,5))
    old = net[1].forward
    net[1].forward = lambda x: old(x)
    with pytest.raises(ValueError, match='forward of 1 was replaced by a function'): copy_module(net)
    net[1].forward = lambda x: x                       # nothing of the original is in it
    assert copy_module(net)(torch.ones(1,6)).shape==(1,8)

def test_layers_that_were_wrapped_one_by_one():
    "As in PyTorch's ImageNet example; a layer may also have that name"
    net = nn.Sequential(OrderedDict(body=nn.Linear(3,4), head=nn.Linear(4,2)))
    state = {n.replace('body.', 'body.module.'): p for n,p in net.state_dict().items()}
    assert list(match_names(state, net.state_dict()))==list(net.state_dict())
    own = nn.Sequential(OrderedDict(module=nn.Linear(3,4), body=nn.Sequential(OrderedDict(module=nn.Linear(4,2)))))
    assert list(match_names(own.state_dict(), own.state_dict()))==list(own.state_dict())

class Counted(nn.Linear):
    "A layer with an extra state"
    def get_extra_state(self): return dict(seen=3)
    def set_extra_state(self, state): pass

def test_a_state_that_is_no_tensor():
    source,tuned = [nn.Sequential(Counted(6,8), nn.Linear(8,5)) for _ in range(2)]
    assert weights_sha256(source)==weights_sha256(copy.deepcopy(source))!=weights_sha256(tuned)
    data = [(torch.randn(9,6), torch.randint(5, (9,)))]
    assert retention(tuned, source, data)['source']==retention(tuned, source, data)['target']

def made_in_inference():
    with torch.inference_mode(): return nn.Linear(3,2)

@pytest.mark.parametrize('net,named', [
    (nn.LazyLinear(3), 'no shape yet'), (nn.Linear(3,2).to(torch.complex64), 'complex64'),
    (made_in_inference(), 'inference_mode')], ids=lambda o: o if isinstance(o, str) else '')
def test_parameters_that_cannot_be_trained(net, named):
    with pytest.raises(ValueError, match=named): QuadraticPenalty(net, l2sp=1.)
    with pytest.raises(ValueError, match=named): estimate_fisher(net, [torch.randn(2,3)], progress=False)
