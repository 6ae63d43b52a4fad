"The Fisher against plain autograd, one image at a time, in float64"
import copy, random, warnings
import numpy as np, pytest, timm, torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from functools import partial
from torchvision.models import squeezenet1_1
from fgvc_fisher.fisher import DiagFisher, estimate_fisher
from fgvc_fisher.fisher.estimate import draw_labels, most_probable, model_restored
from fgvc_fisher.fisher.per_image import SquaredGradients
from conftest import mobilenet, narrow_inception

def one_by_one(model, x, rounds):
    "Rounds are `(label, weight)` of every image; the definition, spelled out"
    names,params = zip(*model.named_parameters())
    total = {n: torch.zeros_like(p) for n,p in zip(names, params)}
    for i in range(len(x)):
        logp = model(x[i:i+1]).log_softmax(-1)[0]
        for label,weight in rounds(i, logp):
            grads = torch.autograd.grad(logp[label], params, retain_graph=True, allow_unused=True)
            for n,g in zip(names, grads): total[n] += 0 if g is None else weight*g**2
    return {n: v/len(x) for n,v in total.items()}

def agree(fisher, expected, tol=1e-9):
    assert list(fisher) == list(expected)
    for n,f in expected.items(): assert (fisher[n]-f).norm() <= tol*f.norm(), n

def randomised(model):
    "Float64, evaluation mode, random statistics and affine parameters in the normalisations"
    model = model.double().eval()
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_var.uniform_(0.5, 1.5)
            m.running_mean.normal_(0, 0.2)
        if isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)) and m.weight is not None:
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.2)
    for n,p in model.named_parameters():
        if 'gamma' in n: p.data.uniform_(0.5, 1.5)      # layer scales start near zero and would hide the layers
    return model

class Branches(nn.Module):
    "Raw parameters, one module used twice, tokens folded into the batch, a weight that two modules share"
    def __init__(self):
        super().__init__()
        self.scale,self.twice = nn.Parameter(torch.rand(6)),nn.Linear(6,6)
        self.tokens,self.tied = nn.Linear(3,3),nn.Linear(6,6)
        self.tied.weight = self.twice.weight
        self.head,self.unused = nn.Linear(6,4),nn.Linear(2,2)
    def forward(self, x):
        x = self.twice(self.twice(x).tanh())*self.scale
        x = self.tokens(x.reshape(-1,3)).reshape(len(x),6)
        return self.head(self.tied(x).tanh())

class TwoInputs(nn.Module):
    "A module with parameters that is called by keyword, and one that returns a tuple"
    def __init__(self):
        super().__init__()
        self.mix,self.rnn = nn.Bilinear(5,5,6),nn.GRU(6,6,batch_first=True)
        self.head = nn.Linear(6,3)
    def forward(self, x): return self.head(self.rnn(self.mix(input1=x, input2=x.tanh())[:,None])[0][:,0])

class Pooled(nn.Module):
    "Layers, then the mean over all positions, then a head"
    def __init__(self, n, *layers):
        super().__init__()
        self.layers,self.head = nn.Sequential(*layers),nn.Linear(n,4)
    def forward(self, x): return self.head(self.layers(x).flatten(2).mean(2))

class Words(nn.Module):
    "An embedding of tokens, a class token, a GroupNorm"
    def __init__(self):
        super().__init__()
        self.words,self.token = nn.Embedding(9,6),nn.Parameter(torch.randn(6))
        self.norm,self.head = nn.GroupNorm(3,6),nn.Linear(6,4)
    def forward(self, x):
        x = torch.cat((self.token.expand(len(x),1,-1), self.words(x)), 1)
        return self.head(self.norm(x.mT).tanh().mean(2))

class Shared(nn.Module):
    "Parameters that several functions use, some with a rule and some without, or one function twice"
    def __init__(self):
        super().__init__()
        self.a,self.b,self.head = nn.Conv2d(3,4,3),nn.Conv2d(4,4,1),nn.Linear(4,5)
        self.act,self.table = nn.PReLU(4),nn.Parameter(torch.randn(4,1,1))
        self.gate,self.token = nn.Parameter(torch.randn(4)),nn.Parameter(torch.randn(1,1,4))
        self.norm = nn.LayerNorm(4, elementwise_affine=False)
    def forward(self, x):
        x = self.act(self.b(self.act(self.a(x)) + self.table))*self.table             # PReLU twice, add and mul
        x = torch.addcmul(x, self.gate[:,None,None], self.table)                       # a weight with a weight
        x = self.b(x)                                                                  # a rule twice
        x = torch.cat((self.token.expand(len(x),-1,-1), x.flatten(2).mT, self.token.expand(len(x),-1,-1)), 1)
        x = F.layer_norm(x, (4,), self.gate, self.gate) + self.token                   # twice in one call
        return self.head(F.linear(x, self.gate.diag(), self.gate).tanh().mean(1)*self.gate.sigmoid())

class Routed(nn.Module):
    "Which parameters an image meets depends on the image"
    def __init__(self):
        super().__init__()
        self.experts,self.head = nn.ModuleList(nn.Linear(6,6) for _ in range(3)),nn.Linear(6,4)
        self.shift = nn.Parameter(torch.randn(6))
    def forward(self, x):
        return self.head(torch.cat([self.experts[int(o.sum()>0)](o[None]).tanh()+self.shift for o in x]))

class SequenceFirst(nn.Module):
    "Rows are tokens, not images, in attention and in a head that all tokens share"
    def __init__(self):
        super().__init__()
        self.mix,self.head = nn.MultiheadAttention(4,2),nn.Linear(4,3)
    def forward(self, x): return self.head(self.mix(*[x.transpose(0,1)]*3)[0]).mean(0)

class Faint(nn.Module):
    "Rows are tokens in a part whose gradients are ten million times smaller than those of the rest"
    def __init__(self):
        super().__init__()
        self.faint,self.head = nn.Linear(4,3),nn.Linear(40,3)
    def forward(self, x): return self.head(x.flatten(1)) + 1e-7*self.faint(x.transpose(0,1).tanh()).mean(0)

def conv2ds():
    return Pooled(6, nn.Conv2d(4,8,3, stride=2, dilation=2, padding=3, groups=2), nn.ELU(inplace=True),
                  nn.Conv2d(8,8,(2,3), padding='same'), nn.ReLU(inplace=True),
                  nn.ConvTranspose2d(8,6,3, stride=2, output_padding=1, groups=2, dilation=2), nn.GroupNorm(2,6),
                  nn.Conv2d(6,6,1, stride=2, groups=3))
def conv1ds():
    return Pooled(6, nn.Conv1d(4,8,3, padding=1, padding_mode='circular'), nn.BatchNorm1d(8), nn.Tanh(),
                  nn.ConvTranspose1d(8,6,4, stride=3))
def conv3ds():
    return Pooled(6, nn.Conv3d(4,8,3, padding=1, groups=4), nn.BatchNorm3d(8), nn.Tanh(), nn.ConvTranspose3d(8,6,2))
def named(name, **kw): return partial(timm.create_model, name, num_classes=5, **kw)

NETWORKS = { # and the shape of a batch: small, since convolutions in float64 are slow
    'inception_v4': (partial(narrow_inception, num_classes=5), (2,3,75,75)),
    'mobilenetv1_075': (lambda: mobilenet(num_classes=5), (2,3,32,32)),
    'mobilenetv3_small_100': (named('mobilenetv3_small_100'), (2,3,32,32)),
    'regnety_002': (named('regnety_002'), (2,3,48,48)),
    'convnext_atto': (named('convnext_atto', ls_init_value=0.5), (2,3,48,48)),
    'vit_tiny_patch16_224': (named('vit_tiny_patch16_224', img_size=64, init_values=0.5), (3,3,64,64)),
    'swin_tiny': (named('swin_tiny_patch4_window7_224', img_size=56, depths=(1,1,1,1)), (2,3,56,56)),
    'resnetv2_50': (named('resnetv2_50'), (2,3,32,32)),           # standardised weights
    'squeezenet1_1': (lambda: squeezenet1_1(num_classes=5), (3,3,64,64)),
    'conv2ds': (conv2ds, (3,4,9,9)), 'conv1ds': (conv1ds, (5,4,11)), 'conv3ds': (conv3ds, (3,4,5,5,5)),
    'branches': (Branches, (5,6)),
    'two_inputs': (TwoInputs, (5,5)),
}

WHOLE = 'the whole network' # the beginning of what `coverage` says where there is no rule

def test_rounding_rejects_no_rule():
    "In bfloat16 two right ways to compute a gradient differ by several per cent after some layers"
    torch.manual_seed(0)
    model = randomised(named('convnext_atto')()).float()
    data = [(torch.randn(4,3,64,64), torch.randint(5, (4,)))]
    with torch.autocast('cpu', torch.bfloat16): fisher = estimate_fisher(model, data, 'empirical', progress=False)
    assert not fisher.coverage().rule.str.startswith(WHOLE).any()

def given(shape): return randn(shape), torch.randint(3, (shape[0],))
def randn(shape): return torch.randn(*shape, dtype=torch.float64)

@pytest.mark.parametrize('name', NETWORKS)
def test_empirical_against_autograd(name):
    make,shape = NETWORKS[name]
    model,(x,y) = randomised(make()),given(shape)
    with warnings.catch_warnings(record=True):
        fisher = estimate_fisher(model, zip(x.split(2), y.split(2)), kind='empirical', progress=False)
    agree(fisher, one_by_one(model, x, lambda i,_: [(y[i],1)]))
    slow = fisher.coverage().rule.str.startswith(WHOLE)
    assert name=='two_inputs' or not slow.any()                    # GRU is one function with several outputs

def test_tokens_against_autograd():
    model,x,y = Words().double(),torch.randint(9, (5,7)),torch.randint(4, (5,))
    fisher = estimate_fisher(model, [(x,y)], kind='empirical', progress=False)
    agree(fisher, one_by_one(model, x, lambda i,_: [(y[i],1)]))
    assert not fisher.coverage().rule.str.startswith(WHOLE).any()

@pytest.mark.parametrize('cuts', [[5],[1,4],[4,1],[2,3],[1,1,3]])
@pytest.mark.parametrize('make,shape', [(Shared,(5,3,6,6)), (Routed,(5,6)), (SequenceFirst,(5,8,4)), (Faint,(5,10,4))])
def test_parameters_that_several_functions_use(make, shape, cuts):
    "The first batch may be a single image, where every order of rows seems right"
    model,(x,y) = make().double(),given(shape)
    with warnings.catch_warnings(record=True):
        fisher = estimate_fisher(model, zip(x.split(cuts), y.split(cuts)), kind='empirical', progress=False)
        exact = estimate_fisher(model, x.split(cuts), kind='exact', progress=False)
    agree(fisher, one_by_one(model, x, lambda i,_: [(y[i],1)]))
    agree(exact, one_by_one(model, x, lambda i,logp: list(enumerate(logp.detach().exp()))))
    if make is Shared: assert not fisher.coverage().rule.str.startswith(WHOLE).any()

class Uses(nn.Module):
    "The weights of a table of ways to use them more than once"
    def __init__(self, forward):
        super().__init__()
        self.w,self.b = nn.Parameter(torch.randn(6,6)/2),nn.Parameter(torch.randn(6))
        self.scale = nn.Parameter(torch.rand(()))
        self.linear,self.act,self.head = nn.Linear(6,6),nn.PReLU(6),nn.Linear(6,3)
        self.words = nn.Embedding(3,6)
        self.words.weight = self.head.weight
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(6,6))
        self.way = forward
    def forward(self, x): return self.head(self.way(self, x))

class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x*w
    @staticmethod
    def backward(ctx, g):
        x,w = ctx.saved_tensors
        return g*w,(g*x).sum(0)

def in_place(m, x):
    x = m.linear(x)
    x += m.b
    x *= m.b
    return x
def in_parts(m, x):
    a,b = m.w.chunk(2)
    x = torch.cat([F.linear(x, a), F.linear(x, b, m.b[:3])], 1)
    return torch.stack([o@m.w for o in torch.where(x>0, x, m.b*x)])

again = partial(checkpoint, use_reentrant=False)
WAYS = {
    'a number': lambda m, x: x*m.scale/m.scale.exp(),
    'a tied embedding': lambda m, x: x + m.words(x[:,0].gt(0).long()),
    'a normalised weight': lambda m, x: m.act(m.normed(m.act(m.normed(x)))),
    'in place': in_place, 'in parts': in_parts,
    'einsum and matmul': lambda m, x: torch.einsum('bi,ij->bj', x, m.w)@m.w@m.w.T,
    'again for the gradient': lambda m, x: again(m.act, again(m.act, x@m.w)),
    'a function of its own': lambda m, x: Product.apply(Product.apply(x, m.b), m.b),
    'vmap': lambda m, x: torch.vmap(lambda o: o@m.w)(x)@m.w,
    'complex': lambda m, x: torch.fft.irfft(torch.fft.rfft(x)*torch.complex(m.b[:4], m.b[2:]), n=6),
}
@pytest.mark.parametrize('name', WAYS)
def test_ways_to_use_a_parameter(name):
    model,(x,y) = Uses(WAYS[name]).double(),given((7,6))
    for cuts in ([7],[1,6],[2,5]):
        with warnings.catch_warnings(record=True):
            fisher = estimate_fisher(model, zip(x.split(cuts), y.split(cuts)), kind='empirical', progress=False)
        agree(fisher, one_by_one(model, x, lambda i,_: [(y[i],1)]))

class Keeps(nn.Linear):
    "Keeps what it computed, as `tiny_vit` and `levit` do"
    def __init__(self, *args):
        super().__init__(*args)
        self.kept,self.calls,self.last,self.old = {},[],None,torch.zeros(3)
        self.register_buffer('counter', torch.zeros(()))
    def train(self, mode=True):
        super().train(mode)
        if mode: self.kept = {}
        return self
    def forward(self, x):
        if self.training: self.kept = {}
        if 'table' not in self.kept: self.kept['table'] = [self.bias.sigmoid()]
        self.last,self.counter = x@self.weight.T,self.counter+1
        self.calls.append(self.last)
        self.old += 1
        return self.last*self.kept['table'][0]

@pytest.mark.parametrize('before', ['never run','without gradients','with gradients','in training'])
def test_networks_that_keep_what_they_computed(before):
    model,(x,y) = nn.Sequential(nn.Linear(6,5), nn.Tanh(), Keeps(5,4)).double().eval(),given((5,6))
    keeper = model[2]
    with torch.set_grad_enabled(before!='without gradients'):
        if before!='never run': model.train(before=='in training')(x)
    model.train(before=='in training')
    found = {k: v for k,v in vars(keeper).items() if k not in ('kept','calls')}
    kept,calls,old,counter = dict(keeper.kept),list(keeper.calls),keeper.old.clone(),keeper.counter.clone()
    fisher = estimate_fisher(model, [(x[:2],y[:2]),(x[2:],y[2:])], kind='empirical', progress=False)
    assert all(vars(keeper)[k] is v for k,v in found.items()) and torch.equal(keeper.old, old)
    assert list(keeper.kept)==list(kept) and all(keeper.kept[k] is v for k,v in kept.items())
    assert len(keeper.calls)==len(calls) and torch.equal(keeper.counter, counter)
    if before in ('never run','without gradients'): copy.deepcopy(model)
    agree(fisher, one_by_one(model.train().eval(), x, lambda i,_: [(y[i],1)]))

@pytest.mark.parametrize('name', ['levit_128s', pytest.param('tiny_vit_5m_224', marks=pytest.mark.slow)])
def test_the_networks_of_timm_that_keep_tables(name):
    options = {} if name=='tiny_vit_5m_224' else dict(img_size=64)
    model,(x,y) = randomised(timm.create_model(name, num_classes=5, **options)),given((2,3,64,64))
    with torch.no_grad(): model(x[:1])
    fisher = estimate_fisher(model, [(x,y)], kind='empirical', progress=False)
    rules = fisher.coverage().rule
    copy.deepcopy(model)
    assert fisher[next(n for n in fisher if 'attention_biases' in n)].any()
    assert not rules.str.startswith(WHOLE).any()

@pytest.mark.parametrize('images', [1,2])
def test_normalising_one_image_whose_gradient_lies_in_another_order(images):
    "PyTorch's own gradient of `batch_norm` is wrong for one image (2.15, CPU)"
    class Ordered(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.norm,self.head = nn.Conv2d(3,16,1),nn.BatchNorm2d(16),nn.Linear(16,4)
        def forward(self, x):
            return self.head(self.norm(self.conv(x)).flatten(2).mT.tanh().square().sum(1))
    model,(x,y) = randomised(Ordered()),given((4,3,2,2))
    params = dict(model.named_parameters())
    expected = {n: 0 for n in params}
    for i in range(4):
        logp = model(x[[i,i]]).log_softmax(-1)[:,y[i]].mean()
        for n,g in zip(params, torch.autograd.grad(logp, [*params.values()])): expected[n] += g**2/4
    agree(estimate_fisher(model, zip(x.split(images), y.split(images)), kind='empirical', progress=False), expected)

@pytest.mark.parametrize('name', ['deit_tiny_distilled_patch16_224','levit_128s'])
def test_two_heads(name):
    "Averaged in evaluation mode: both have their Fisher"
    model = timm.create_model(name, num_classes=5).eval()
    x,y = torch.randn(2,3,224,224),torch.randint(5, (2,))
    fisher = estimate_fisher(model, [(x,y)], kind='empirical', progress=False)
    heads = [n for n in fisher if n.startswith(('head.','head_dist.'))]
    assert len({n.split('.')[0] for n in heads})==2 and all(fisher[n].any() for n in heads)
    pair = model(x[[0,0]])[:1].log_softmax(-1)[0,y[0]]
    one = estimate_fisher(model, [(x[:1],y[:1])], kind='empirical', progress=False)
    for n,g in zip(heads, torch.autograd.grad(pair, [dict(model.named_parameters())[n] for n in heads])):
        assert torch.allclose(one[n], g**2, rtol=1e-3, atol=1e-9)

@pytest.mark.parametrize('wrap', [lambda o: (o,o), lambda o: dict(logits=o), lambda o: [o], lambda o: None,
                                  lambda o: o[0], lambda o: o[:,:,None], lambda o: o.argmax(-1)])
def test_what_is_no_logits(wrap):
    class Wrapped(nn.Linear):
        def forward(self, x): return wrap(super().forward(x))
    with pytest.raises(ValueError, match=r'Wrapped is not an image classifier.*\(B, C\)'):
        estimate_fisher(Wrapped(4,3), [torch.randn(5,4)], progress=False)

@pytest.mark.parametrize('name', ['mobilenetv1_075', 'convnext_atto', 'branches'])
def test_sampled_against_autograd_with_the_same_labels(name):
    make,shape = NETWORKS[name]
    model,(x,_) = randomised(make()),given(shape)
    with torch.no_grad(): labels = draw_labels(model(x).softmax(-1), 0, seed=3, n_samples=4)
    with warnings.catch_warnings(record=True):
        fisher = estimate_fisher(model, x.split(2), n_samples=4, seed=3, progress=False)
    agree(fisher, one_by_one(model, x, lambda i,_: [(o,1/4) for o in labels[i]]))

@pytest.mark.parametrize('name', ['squeezenet1_1', 'vit_tiny_patch16_224', 'branches'])
def test_exact_against_the_sum_over_classes(name):
    make,shape = NETWORKS[name]
    model,(x,_) = randomised(make()),given(shape)
    with warnings.catch_warnings(record=True): fisher = estimate_fisher(model, [x], kind='exact', progress=False)
    agree(fisher, one_by_one(model, x, lambda i,logp: list(enumerate(logp.detach().exp()))))

def test_exact_with_a_mass_of_probability():
    model,x = nn.Sequential(nn.Linear(4,8), nn.Tanh(), nn.Linear(8,30)).double(),torch.randn(7,4).double()*3
    fisher = estimate_fisher(model, [x], kind='exact', mass=0.9, progress=False)
    left = []
    def most(i, logp):
        p,order = logp.detach().exp().sort(descending=True)
        kept = int((p.cumsum(0)<0.9).sum())+1
        left.append(1-p[:kept].sum().item())
        return list(zip(order[:kept], p[:kept]))
    agree(fisher, one_by_one(model, x, most))
    assert float(fisher.provenance['mass_left']) == pytest.approx(sum(left)/7, rel=1e-9)

def test_memory_of_the_exact_kind_does_not_grow_with_the_classes():
    "Nothing of a round is left when the next begins"
    import gc
    model,x = nn.Sequential(nn.Linear(4,8), nn.Tanh(), nn.Linear(8,16)).double(),torch.randn(7,4).double()
    alive = []
    class Counting(SquaredGradients):
        def add_round(self, *args, **kw):
            super().add_round(*args, **kw)
            alive.append(sum(isinstance(o, torch.Tensor) for o in gc.get_objects()))
    with model_restored(model):
        total = Counting(model)
        total.add_batch(x, lambda logits: most_probable(logits.softmax(-1), 1.))
    assert len(alive)==16 and max(alive[5:])-min(alive[5:]) < 10

def test_moments_are_the_spread_between_images():
    model,(x,y) = randomised(timm.create_model('test_resnet', num_classes=5)),given((6,3,32,32))
    fisher = estimate_fisher(model, zip(x.split(4), y.split(4)), kind='empirical', progress=False)
    each = [estimate_fisher(model, [(x[i:i+1],y[i:i+1])], kind='empirical', progress=False) for i in range(6)]
    totals = torch.tensor([[v.sum() for v in o.values()] + [sum(v.sum() for v in o.values())] for o in each])
    error = fisher.error()
    assert torch.allclose(torch.tensor(error.total.to_numpy()), totals.mean(0), rtol=1e-9)
    assert torch.allclose(torch.tensor(error.error.to_numpy()), totals.std(0)/6**0.5, rtol=1e-6)
    parts = sum(each[1:], each[0])
    assert torch.allclose(parts.moments, fisher.moments, rtol=1e-9)

def test_autocast():
    "A forward pass in bfloat16 around the estimate: float32 sums, about the same numbers"
    model = randomised(timm.create_model('test_vit', num_classes=5)).float()
    x,y = torch.randn(4,3,160,160),torch.randint(5, (4,))
    full = estimate_fisher(model, [(x,y)], kind='empirical', progress=False)
    with torch.autocast('cpu', torch.bfloat16): half = estimate_fisher(model, [(x,y)], kind='empirical', progress=False)
    assert all(v.dtype==torch.float32 for v in half.sums.values())
    a,b = [torch.cat([v.flatten() for v in o.values()]) for o in (half,full)]
    assert (a-b).norm() < 0.1*b.norm()

def test_sampled_labels_are_drawn_from_the_model():
    model,x = nn.Linear(4,3).double(),torch.randn(1,4, dtype=torch.float64).expand(4000,4)
    sampled,exact = [estimate_fisher(model, [x], kind=o, progress=False)['bias'] for o in ('sampled','exact')]
    assert torch.allclose(sampled, exact, rtol=0.15)

def test_logits_without_a_gradient():
    class Frozen(nn.Linear):
        def forward(self, x): return super().forward(x).detach()
    with pytest.raises(ValueError, match='Frozen have no gradient'):
        estimate_fisher(Frozen(4,3), [torch.randn(5,4)], progress=False)

def test_a_network_without_a_head():
    "Its features look like logits"
    headless = timm.create_model('test_resnet', num_classes=0)
    with pytest.raises(ValueError, match='num_classes=0'): estimate_fisher(headless, [torch.randn(2,3,32,32)])

def test_a_network_without_parameters():
    with pytest.raises(ValueError, match='Flatten has no parameters'):
        estimate_fisher(nn.Flatten(), [torch.randn(5,4)], progress=False)

def test_a_normalisation_with_the_statistics_of_its_input():
    "Without running statistics a rule cannot hold: an image alone is what counts"
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3,4,3), norm, nn.Flatten(), nn.Linear(64,3)).double()
    x,y = given((4,3,6,6))
    with pytest.warns(UserWarning, match=r'1\.weight'):
        fisher = estimate_fisher(model, [(x,y)], kind='empirical', progress=False)
    agree(fisher, one_by_one(model.eval(), x, lambda i,_: [(y[i],1)]))

def test_what_the_rules_do_not_cover_is_said_once():
    model = TwoInputs()
    model.unused = nn.Linear(2,2)
    with pytest.warns(UserWarning) as said: fisher = estimate_fisher(model, torch.randn(3,4,5), progress=False)
    slow,unused = [[str(o.message) for o in said if k in str(o.message)] for k in ('rnn.weight_ih_l0', 'unused.weight')]
    assert len(slow)==len(unused)==1 and slow!=unused and 'mix.weight' not in slow[0]
    rules = fisher.coverage().rule
    assert rules['rnn.weight_ih_l0'].startswith(WHOLE) and rules['mix.weight']=='bilinear'
    assert list(rules.index)==list(fisher) and not fisher['unused.weight'].any()

def test_model_comes_back_as_it_was():
    model = timm.create_model('test_efficientnet', num_classes=4).train()
    model.blocks[0].eval()
    model.conv_stem.weight.requires_grad_(False)
    model(torch.randn(4,3,32,32)).sum().backward()
    def state():
        hooks = [len(m._forward_hooks) for m in model.modules()]
        return [m.training for m in model.modules()],[p.requires_grad for p in model.parameters()],hooks
    before,buffers = state(),{k: v.clone() for k,v in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    randoms = torch.get_rng_state(),random.getstate(),np.random.get_state()[1].tolist()
    def broken():
        yield torch.randn(4,3,32,32, generator=torch.Generator().manual_seed(0))
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): estimate_fisher(model, broken(), progress=False)
    assert state() == before
    assert all(torch.equal(v, buffers[k]) for k,v in model.state_dict().items())
    assert all(g is None if p.grad is None else torch.equal(p.grad, g) for p,g in zip(model.parameters(), grads))
    assert torch.equal(torch.get_rng_state(), randoms[0]) and random.getstate()==randoms[1]
    assert np.random.get_state()[1].tolist()==randoms[2]

def test_batches_do_not_matter():
    model,x,y = nn.Linear(5,3).double(),torch.randn(10,5).double(),torch.randint(3, (10,))
    one,many = [estimate_fisher(model, zip(x.split(n), y.split(n)), 'empirical', progress=False) for n in (10,3)]
    assert one.n_images==many.n_images==10
    agree(many, dict(one), tol=1e-12)

def test_merging_two_halves_is_the_whole():
    model,x,y = nn.Linear(5,3).double(),torch.randn(10,5).double(),torch.randint(3, (10,))
    parts = slice(4),slice(4,10),slice(10)
    a,b,whole = [estimate_fisher(model, [(x[o],y[o])], 'empirical', progress=False) for o in parts]
    agree(a+b, dict(whole), tol=1e-12)
    assert (b+a).n_images==10

def test_n_images_stops_in_the_middle_of_a_batch():
    model,x,y = nn.Linear(5,3).double(),torch.randn(10,5).double(),torch.randint(3, (10,))
    few = estimate_fisher(model, zip(x.split(4), y.split(4)), 'empirical', n_images=6, progress=False)
    part = estimate_fisher(model, [(x[:6],y[:6])], 'empirical', progress=False)
    assert few.n_images==6
    agree(few, dict(part), tol=1e-12)

def test_header_can_be_read_by_any_tool(tmp_path):
    from safetensors import safe_open
    model,x = timm.create_model('test_resnet'),torch.randn(1,2,3,32,32)
    fisher = estimate_fisher(model, x, seed=7, progress=False, provenance=dict(images='noise'))
    with safe_open(fisher.save(tmp_path/'f.safetensors'), 'pt') as f: about = f.metadata()
    assert about['kind']=='sampled' and about['n_images']=='2'
    again = DiagFisher.load(tmp_path/'f.safetensors')
    assert list(again)==list(fisher) and again.provenance['arch']=='test_resnet'
    assert again.provenance['seed']=='7' and again.provenance['images']=='noise'
    assert [o.name for o in tmp_path.iterdir()]==['f.safetensors']

def test_not_a_classifier():
    with pytest.raises(ValueError, match=r'Conv2d.*\(B, C\)'):
        estimate_fisher(nn.Conv2d(3,3,1), torch.randn(1,2,3,4,4), progress=False)
