"What a first user meets: other layouts of a network, other forms of an argument, and arguments that do nothing"
import copy, warnings
from functools import partial
import numpy as np, pytest, timm, torch
from torch import nn, Tensor
from fgvc_fisher.callback import L2SPFisherCallback
from fgvc_fisher.fisher import estimate_fisher
from fgvc_fisher.learner import head_names, remake_head
from fgvc_fisher.penalty import QuadraticPenalty
from fgvc_fisher.retention import Retention, compare_with_source, retention, with_source_head

@pytest.fixture(scope='module')
def source():
    torch.manual_seed(0)
    return timm.create_model('test_resnet', num_classes=5).eval()

@pytest.fixture(scope='module')
def fisher(source): return estimate_fisher(source, [torch.randn(8,3,32,32)], progress=False)

# Networks

class HeadFirst(nn.Module):
    "Its head was made before its body"
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 5)
        self.body = nn.Sequential(nn.Conv2d(3,8,3,2), nn.ReLU(), nn.Conv2d(8,8,3,2))
    def forward(self, x): return self.head(self.body(x).mean((2,3)))

def test_a_head_that_was_made_first():
    source = HeadFirst().eval()
    tuned = copy.deepcopy(source)
    assert head_names(source)==['head'] and remake_head(tuned, 3)(torch.randn(2,3,32,32)).shape==(2,3)
    x = torch.randn(20,3,32,32)
    assert retention(tuned, source, [(x, source(x).argmax(1))])==dict(target=1., source=1.)

def test_a_network_that_takes_no_pictures_has_the_last_layer_as_its_head():
    assert head_names(nn.Sequential(nn.Linear(4,4), nn.ReLU(), nn.Linear(4,3)))==['2']

class Experts(nn.Module):
    "Each token goes to one of two experts, by a mask, its numbers or a list of them"
    def __init__(self, how):
        super().__init__()
        self.how,self.a,self.b,self.head = how,nn.Linear(4,4),nn.Linear(4,4),nn.Linear(4,3)
    def rows(self, z, mask):
        if self.how=='mask': return z[mask]
        if self.how=='masked_select': return z.masked_select(mask[:,None]).reshape(-1, 4)
        numbers = mask.nonzero()[:,0]
        if self.how=='index_select': return z.index_select(0, numbers)
        return z[numbers.tolist() if self.how=='list' else (numbers, slice(None))]
    def forward(self, x):
        z = x.flatten(0,1)
        first = z[:,0]>0
        out = torch.empty_like(z)
        out[first],out[~first] = self.a(self.rows(z, first)),self.b(self.rows(z, ~first))
        return self.head(out.reshape(x.shape).tanh().mean(1))

@pytest.mark.filterwarnings('ignore:.*the whole network')
@pytest.mark.parametrize('how', ['mask', 'masked_select', 'index_select', 'list', 'numbers'])
def test_rows_that_are_picked_are_no_images(how):
    "As many for the first image as for the batch by images, and other numbers for the next ones"
    torch.manual_seed(0)
    model,x = Experts(how).double().eval(),torch.randn(4,8,4).double()
    x[...,0] = x[...,0].abs()
    for i,k in enumerate((4,4,1,7)): x[i,k:,0] *= -1
    two,one = [estimate_fisher(model, x.split(n), 'exact', progress=False) for n in (2,1)]
    for name in one: assert torch.allclose(two[name], one[name], rtol=1e-9), name

class Pooled(nn.Module):
    "Takes the token at a place of each image's"
    def __init__(self):
        super().__init__()
        self.a,self.head = nn.Linear(4,4),nn.Linear(4,3)
    def forward(self, x): return self.head(self.a(x)[torch.arange(len(x)), x[...,0].argmax(1)])

def test_a_row_of_each_image_in_order_keeps_the_rules():
    model,x = Pooled().double().eval(),torch.randn(4,6,4).double()
    two,one = [estimate_fisher(model, x.split(n), 'exact', progress=False) for n in (2,1)]
    for name in one: assert torch.allclose(two[name], one[name], rtol=1e-9), name
    assert (two.coverage().rule=='linear').all()

class Again(nn.Module):
    "A layer that is used again, on some images alone or on all of them in another order"
    def __init__(self, how):
        super().__init__()
        self.how,self.a,self.head = how,nn.Linear(4,4),nn.Linear(4,3)
    def forward(self, x):
        z = self.a(x).tanh()
        if self.how=='hard':
            hard = x[:,0]>0
            if not hard.any(): return self.head(z)
            z = z.clone()
            z[hard] = self.a(z[hard]).tanh()
            return self.head(z)
        if self.how=='halves':
            first,second = self.a(torch.cat([z[::2],z[1::2]])).tanh().split([(len(x)+1)//2, len(x)//2])
            out = torch.empty_like(z)
            out[::2],out[1::2] = first,second
            return self.head(out)
        order = x[:,0].detach().argsort()
        if self.how=='take': return self.head(self.a(torch.take_along_dim(z, order[:,None], 0)).tanh()[order.argsort()])
        order = order[:,None].expand_as(z)
        return self.head(self.a(z.gather(0, order)).tanh().gather(0, order.argsort(0)))

class Expanded(nn.Module):
    "A parameter in as many copies as a batch may have images"
    def __init__(self, shape):
        super().__init__()
        self.shape,self.a,self.head = shape,nn.Parameter(torch.randn(shape[-1] if len(shape)>1 else 1)),nn.Linear(4,3)
    def forward(self, x):
        z = (x[:,None]+self.a.expand(self.shape)).tanh().mean(1) if len(self.shape)>1 else x*self.a.expand(self.shape)
        return self.head(z)

class Typed(nn.Module):
    "A parameter brought to the images' type, which it has"
    def __init__(self, to):
        super().__init__()
        self.to_x,self.a,self.head = to,nn.Parameter(torch.randn(4)),nn.Linear(4,3)
    def forward(self, x): return self.head((x*self.to_x(self.a, x)).tanh())

class InPlace(nn.Module):
    "It normalises its own input, in place"
    def __init__(self):
        super().__init__()
        self.a,self.head = nn.Linear(4,4),nn.Linear(4,3)
    def forward(self, x): return self.head(self.a(x.sub_(0.5).mul_(3.)).tanh())

ODD = {**{f'again, {o}': partial(Again, o) for o in ('hard','halves','gather','take')}, 'in place': InPlace,
       **{f'expanded to {o}': partial(Expanded, o) for o in ((4,4), (4,))},
       'type_as': partial(Typed, Tensor.type_as), 'to': partial(Typed, Tensor.to),
       'atleast_1d': partial(Typed, lambda w, x: torch.atleast_1d(w, x)[0])}
@pytest.mark.filterwarnings('ignore:.*the whole network')
@pytest.mark.parametrize('kind', ['exact','empirical'])
@pytest.mark.parametrize('make', ODD.values(), ids=ODD)
def test_odd_networks_by_autograd(make, kind):
    "The first and the last image stay where they are, and the images of the first batch are not hard"
    torch.manual_seed(0)
    model = make().double().eval()
    x,y = torch.randn(12,4).double(),torch.randint(3, (12,))
    x[:,0] = torch.linspace(-1, 0.5, 12).double()
    x[4:8,0] = x[4:8,0].flip(0)
    asked = x.clone()
    wanted = {n: torch.zeros_like(p) for n,p in model.named_parameters()}
    for i in range(12):
        log_p = model(x[i:i+1].clone()).log_softmax(-1)[0]
        for c in range(3) if kind=='exact' else [y[i]]:
            weight = log_p[c].exp().item() if kind=='exact' else 1.
            found = torch.autograd.grad(log_p[c], list(model.parameters()), retain_graph=True)
            for n,g in zip(wanted, found): wanted[n] += weight*g**2/12
    for n in (1, 4, 5, 12):
        batches = list(zip(x.split(n), y.split(n)))
        fisher = estimate_fisher(model, batches, kind, progress=False)
        for name in wanted: assert torch.allclose(fisher[name], wanted[name], rtol=1e-9, atol=1e-15), (n, name)
    assert torch.equal(x, asked)
    model(x.clone()).sum().backward()                                 # nothing is left on it
    same = compare_with_source(copy.deepcopy(model), model, [(x, y)], labelled=False)
    assert same['divergence_target_bn']==0 and torch.equal(x, asked)

@pytest.mark.parametrize('model,said', [
    (nn.LazyLinear(3), 'weight of LazyLinear has no shape'),
    (nn.Linear(4,3).to(torch.complex64), 'weight of Linear is torch.complex64')])
def test_parameters_without_a_fisher(model, said):
    with pytest.raises(ValueError, match=said): estimate_fisher(model, [torch.randn(2,4)], progress=False)

def test_probabilities_are_no_logits(source):
    x = [torch.randn(2,3,32,32)]
    model = nn.Sequential(source, nn.Softmax(-1))
    with pytest.warns(UserWarning, match='softmax'): estimate_fisher(model, x, progress=False)

# Estimates

def interrupted(batches):
    yield from batches
    raise KeyboardInterrupt

def test_a_checkpoint_with_more_images_than_there_are(source, tmp_path):
    x = torch.randn(8,3,32,32).split(4)
    how = dict(checkpoint=tmp_path/'c', checkpoint_every=0, progress=False)
    with pytest.raises(KeyboardInterrupt): estimate_fisher(source, interrupted(x), **how)
    for data,n in ((x[:1], None), (x, 4)):
        with pytest.raises(ValueError, match='8 images, 4 more'): estimate_fisher(source, data, n_images=n, **how)
    assert estimate_fisher(source, x, **how).n_images==8

@pytest.mark.parametrize('kw,said', [
    (dict(checkpoint='.'), 'is a folder'), (dict(checkpoint='nowhere/c'), 'no folder nowhere'),
    (dict(n_images=7.5), '7.5'), (dict(n_samples=2.5), '2.5'), (dict(kind='exact', n_samples=4), "for kind 'sampled'"),
    (dict(mass=0.5), "'exact'")])
def test_arguments_of_an_estimate(source, kw, said):
    with pytest.raises(ValueError, match=said): estimate_fisher(source, [torch.randn(2,3,32,32)], progress=False, **kw)

# The penalty

def test_a_new_head_with_as_many_classes_is_new_whether_or_not_there_is_an_anchor(source, fisher):
    model = copy.deepcopy(source)
    model.reset_classifier(5)
    tables = [L2SPFisherCallback(fisher=fisher, anchor=o).table(model) for o in (None, source, source.state_dict())]
    for t in tables: assert t[t.part=='new'].parameter.tolist()==['fc.weight','fc.bias'] and t.cost.sum()==0
    assert not (L2SPFisherCallback(fisher=fisher, anchor=source).table(copy.deepcopy(source)).part=='new').any()
    with torch.no_grad(): model.conv1[0].weight.add_(1)                    # trained before: the last layer is no sign
    assert not (L2SPFisherCallback(fisher=fisher, anchor=source).table(model).part=='new').any()

def test_a_penalty_that_does_nothing_says_so(source, fisher):
    model = copy.deepcopy(source)
    for make in (lambda: QuadraticPenalty(model, source, fisher), lambda: L2SPFisherCallback(anchor=source),
                 L2SPFisherCallback):
        with pytest.warns(UserWarning, match='moves nothing'): make()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        L2SPFisherCallback(anchor=source, strength=0., freeze_bn=True)                      # said on purpose

@pytest.mark.parametrize('kw,said', [
    (dict(new='head'), "'head' is neither"), (dict(new=[nn.Linear(2,2)]), 'Linear is no name'),
    (dict(dtype='bfloat16'), 'bfloat16')])
def test_arguments_of_a_penalty(source, fisher, kw, said):
    for make in (lambda: QuadraticPenalty(source, source, fisher, strength=1., **kw),
                 lambda: L2SPFisherCallback(fisher=fisher, **kw).table(copy.deepcopy(source))):
        with pytest.raises(ValueError, match=said): make()

RATES = [0.1],np.array([0.1]),torch.tensor([0.1]),object()
@pytest.mark.parametrize('rate', RATES, ids=lambda o: type(o).__name__)
def test_what_is_no_rate(source, fisher, rate):
    penalty = QuadraticPenalty(source, source, fisher, strength=1., new=None)
    with pytest.raises(ValueError, match='^lr'): penalty.prox_(rate)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.head = nn.Linear(6,6),nn.Linear(6,6),nn.Linear(6,5)
        self.b.weight = self.a.weight
    def forward(self, x): return self.head(self.b(self.a(x).tanh()).tanh())

def test_a_state_dict_names_tied_weights_twice():
    source = Tied()
    fisher = estimate_fisher(source, [torch.randn(4,6)], progress=False)
    model = copy.deepcopy(source)
    with torch.no_grad(): model.a.weight.add_(1)
    values = [QuadraticPenalty(model, o, fisher, strength=1.).value() for o in (source, source.state_dict())]
    assert values[0]==values[1]>0

def test_fastais_body_of_a_network_with_a_head_of_its_own(source, fisher):
    "The source's head has no counterpart, and the own one is new"
    body = copy.deepcopy(source)
    body.reset_classifier(0)
    model = nn.Sequential(nn.ModuleDict(dict(model=body)), nn.Sequential(nn.Linear(512,3)))
    cb = L2SPFisherCallback(fisher=fisher, anchor=source)
    t = cb.table(model)
    assert t[t.part=='new'].parameter.tolist()==['1.0.weight','1.0.bias'] and t.cost.sum()==0

# What it still knows

@pytest.mark.parametrize('norm', ['sourc', 'Source', 'both', None])
def test_statistics_of_another_name(source, norm):
    with pytest.raises(ValueError, match='norm='): with_source_head(source, source, norm)

def test_one_batch_is_no_list_of_batches(source):
    one = torch.randn(4,3,32,32),torch.arange(4)
    for make in (lambda: Retention(source, one), lambda: retention(source, source, list(one)),
                 lambda: estimate_fisher(source, one, progress=False)):
        with pytest.raises(ValueError, match='one batch, images and labels'): make()
