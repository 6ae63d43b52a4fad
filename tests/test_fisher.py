"The Fisher against plain autograd, one image at a time, in float64"
import random, warnings
import numpy as np, pytest, timm, torch
from torch import nn
from torchvision.models import squeezenet1_1
from fgvc_fisher.fisher import DiagFisher, estimate_fisher
from conftest import mobilenet

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
        if isinstance(m, nn.BatchNorm2d):
            for o in (m.weight.data, m.running_var): o.uniform_(0.5, 1.5)
            for o in (m.bias.data, m.running_mean): o.normal_(0, 0.2)
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
    def __init__(self): super().__init__(); self.mix,self.rnn,self.head = nn.Bilinear(5,5,6),nn.GRU(6,6,batch_first=True),nn.Linear(6,3)
    def forward(self, x): return self.head(self.rnn(self.mix(input1=x, input2=x.tanh())[:,None])[0][:,0])

NETWORKS = { # and the shape of a batch: two images where float64 is slow
    'inception_v4': (lambda: timm.create_model('inception_v4', num_classes=5), (2,3,75,75)),
    'mobilenetv1_075': (lambda: mobilenet(num_classes=5), (2,3,32,32)),
    'squeezenet1_1': (lambda: squeezenet1_1(num_classes=5), (3,3,64,64)),
    'branches': (Branches, (5,6)),
    'two_inputs': (TwoInputs, (5,5)),
}

@pytest.mark.parametrize('name', NETWORKS)
def test_empirical_against_autograd(name):
    make,shape = NETWORKS[name]
    model,x = randomised(make()),torch.randn(*shape, dtype=torch.float64)
    y = torch.randint(3, (len(x),))
    with warnings.catch_warnings(record=True):
        fisher = estimate_fisher(model, zip(x.split(2), y.split(2)), kind='empirical', progress=False)
    agree(fisher, one_by_one(model, x, lambda i,_: [(y[i],1)]))

@pytest.mark.parametrize('name', ['squeezenet1_1', 'branches'])
def test_exact_against_the_sum_over_classes(name):
    make,shape = NETWORKS[name]
    model,x = randomised(make()),torch.randn(*shape, dtype=torch.float64)
    with warnings.catch_warnings(record=True): fisher = estimate_fisher(model, [x], kind='exact', progress=False)
    agree(fisher, one_by_one(model, x, lambda i,logp: list(enumerate(logp.detach().exp()))))

def test_sampled_labels_are_drawn_from_the_model():
    model,x = nn.Linear(4,3).double(),torch.randn(1,4, dtype=torch.float64).expand(4000,4)
    sampled,exact = [estimate_fisher(model, [x], kind=o, progress=False)['bias'] for o in ('sampled','exact')]
    assert torch.allclose(sampled, exact, rtol=0.15)

def test_what_the_rules_do_not_cover_is_said():
    with pytest.warns(UserWarning) as said: estimate_fisher(Branches(), torch.randn(1,4,6), progress=False)
    slow,unused = [next(str(o.message) for o in said if k in str(o.message)) for k in ('which is slower', 'do not depend')]
    assert 'tokens.weight' in slow and 'twice.weight' in slow and 'head.weight' not in slow
    assert 'unused.weight' in unused

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
    a,b,whole = [estimate_fisher(model, [(x[o],y[o])], 'empirical', progress=False) for o in (slice(4), slice(4,10), slice(10))]
    agree(a+b, dict(whole), tol=1e-12)
    assert (b+a).n_images==10

def test_n_images_stops_in_the_middle_of_a_batch():
    model,x,y = nn.Linear(5,3).double(),torch.randn(10,5).double(),torch.randint(3, (10,))
    few,part = estimate_fisher(model, zip(x.split(4), y.split(4)), 'empirical', n_images=6, progress=False),estimate_fisher(model, [(x[:6],y[:6])], 'empirical', progress=False)
    assert few.n_images==6
    agree(few, dict(part), tol=1e-12)

def test_header_can_be_read_by_any_tool(tmp_path):
    from safetensors import safe_open
    fisher = estimate_fisher(timm.create_model('test_resnet'), torch.randn(1,2,3,32,32), seed=7, progress=False, provenance=dict(images='noise'))
    with safe_open(fisher.save(tmp_path/'f.safetensors'), 'pt') as f: about = f.metadata()
    assert about['kind']=='sampled' and about['n_images']=='2'
    again = DiagFisher.load(tmp_path/'f.safetensors')
    assert list(again)==list(fisher) and again.provenance['arch']=='test_resnet'
    assert again.provenance['seed']=='7' and again.provenance['images']=='noise'
    assert [o.name for o in tmp_path.iterdir()]==['f.safetensors']

def test_not_a_classifier():
    with pytest.raises(ValueError, match=r'Conv2d is no classifier of images: expected logits \(B, C\)'):
        estimate_fisher(nn.Conv2d(3,3,1), torch.randn(1,2,3,4,4), progress=False)
