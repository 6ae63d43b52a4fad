"What a fine-tuned model still knows, with labels and without: against NumPy, and on what does not fit"
import copy, json, math, shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, timm, torch
from fastai.basics import CrossEntropyLossFlat, DataLoaders, Learner
from fastai.data.load import DataLoader as FastaiLoader
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset
from fgvc_fisher.experiment import Run
from fgvc_fisher.explore import explore_penalty
from fgvc_fisher.explore.compromise import Compromise, read_compromise
from fgvc_fisher.explore.training import _TrainingView
from fgvc_fisher.learner import head_names, remake_head
from fgvc_fisher.retention import (
    Retention, accuracy_on, compare_with_source, halves, retention, source_parts, with_source_head
)

NORMS = 'target','source'
MEASURES = 'retention','agreement','divergence'
def columns(*measures): return [f'{o}_{norm}_bn' for o in measures for norm in NORMS]

def network(n_classes, seed=0, norm=nn.BatchNorm1d):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6,8), norm(8), nn.ReLU(), nn.Linear(8,n_classes))

def tuned_from(source, seed=1, strength=0.3):
    "A fine-tuned model: other weights, other statistics, a head of two classes"
    model = network(2, seed, type(source[1])).to(source[0].weight.dtype)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name,v in model.state_dict().items():
            if name[0]=='3' or not v.is_floating_point(): continue
            own = source.state_dict()[name]
            v.copy_(own + strength*(torch.rand_like(v) if 'running' in name else torch.randn_like(v)))
    return model

@pytest.fixture
def source(): return network(5).eval()
@pytest.fixture
def tuned(source): return tuned_from(source).eval()
@pytest.fixture
def batches():
    torch.manual_seed(2)
    return [(2*torch.randn(n,6), torch.randint(5, (n,))) for n in (7,7,3)]

def images(batches): return [x for x,_ in batches]

# Against NumPy

def numpy_logits(body, norm, head, x):
    "The network in NumPy: body, statistics and head from three models; float64"
    w = {k: v.double().numpy() for k,v in body.state_dict().items()}
    h = x.double().numpy() @ w['0.weight'].T + w['0.bias']
    if '1.running_mean' in w:
        mean,var = [norm.state_dict()[f'1.running_{o}'].double().numpy() for o in ('mean','var')]
        h = (h-mean)/np.sqrt(var+1e-5)
    else: h = (h-h.mean(1, keepdims=True))/np.sqrt(h.var(1, keepdims=True)+1e-5)
    h = np.maximum(h*w['1.weight'] + w['1.bias'], 0)
    head = {k: v.double().numpy() for k,v in head.state_dict().items()}
    return h @ head['3.weight'].T + head['3.bias']

def in_numpy(tuned, source, batches, tuned_batches):
    "All six numbers from the formulas, over all pictures at once"
    x,seen = [torch.cat(images(o)) for o in (batches, tuned_batches)]
    y = np.concatenate([o.numpy() for _,o in batches])
    def probabilities(z):
        z = np.exp(z-z.max(1, keepdims=True))
        return z/z.sum(1, keepdims=True)
    p = probabilities(numpy_logits(source, source, source, x))
    found = {}
    for norm,statistics,pictures in (('target',tuned,seen), ('source',source,x)):
        q = probabilities(numpy_logits(tuned, statistics, source, pictures))
        found[f'retention_{norm}_bn'] = (q.argmax(1)==y).mean()
        found[f'agreement_{norm}_bn'] = (q.argmax(1)==p.argmax(1)).mean()
        found[f'divergence_{norm}_bn'] = (p*np.log(p/q)).sum(1).mean()
    return found

@pytest.mark.parametrize('norm', [nn.BatchNorm1d, nn.LayerNorm])
@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('apart', [False,True])
def test_the_formulas_in_numpy(norm, seed, apart, batches):
    source = network(5, seed, norm).double()
    if norm is nn.BatchNorm1d: source[1].running_var.mul_(3.)
    tuned = tuned_from(source, seed+10)
    batches = [(x.double(),y) for x,y in batches]
    seen = [(0.8*x-0.1,y) for x,y in batches] if apart else batches
    found = compare_with_source(tuned, source, batches, seen if apart else None)
    wanted = in_numpy(tuned, source, batches, seen)
    assert list(found)==columns(*MEASURES) and set(found)==set(wanted)
    for name,value in wanted.items(): assert found[name]==pytest.approx(value, rel=1e-12, abs=1e-14), name

@pytest.mark.parametrize('labelled', [True,False])
def test_the_same_as_two_retentions(source, tuned, batches, labelled):
    found = compare_with_source(tuned, source, batches, labelled=labelled)
    assert list(found)==columns(*MEASURES[not labelled:])
    if labelled: assert [found[o] for o in columns('retention')]==list(retention(tuned, source, batches).values())
    assert found=={k: v for k,v in compare_with_source(tuned, source, batches).items() if k in found}

def test_agreement_is_accuracy_with_the_sources_answers_as_labels(source, tuned, batches):
    answers = [(x,source(x).argmax(-1)) for x in images(batches)]
    found = compare_with_source(tuned, source, images(batches))
    assert [found[o] for o in columns('agreement')]==list(retention(tuned, source, answers).values())

@pytest.mark.parametrize('seed', range(5))
def test_bounds(source, batches, seed):
    "An accuracy changes by no more than the share of changed answers; no divergence is negative"
    found,before = compare_with_source(tuned_from(source, seed), source, batches),accuracy_on(source, batches)
    for norm in NORMS:
        assert abs(found[f'retention_{norm}_bn']-before) <= 1-found[f'agreement_{norm}_bn']+1e-12
        assert 0 <= found[f'agreement_{norm}_bn'] < 1 and found[f'divergence_{norm}_bn'] > 0

@pytest.mark.parametrize('wrap', [lambda m: m, nn.DataParallel, torch.compile, AveragedModel, copy.deepcopy])
def test_the_source_agrees_with_itself(source, batches, wrap):
    wanted = dict.fromkeys(columns('agreement'), 1.) | dict.fromkeys(columns('divergence'), 0.)
    for pair in ((wrap(source),source), (source,wrap(source)), (network(5, seed=0).eval(),wrap(source))):
        assert compare_with_source(*pair, images(batches))==wanted
    headless = copy.deepcopy(source)
    headless[3] = nn.Linear(8,2)                                        # another head is not looked at
    assert compare_with_source(wrap(headless), source, images(batches))==wanted

def test_only_the_statistics_have_changed(source, batches):
    tuned = copy.deepcopy(source)
    tuned[1].running_mean += 1
    found = compare_with_source(tuned, source, images(batches))
    assert found['agreement_source_bn']==1 and found['divergence_source_bn']==0
    assert found['agreement_target_bn']<1 and found['divergence_target_bn']>0

def test_batches_of_any_size_give_the_same(source, tuned, batches):
    one = [tuple(map(torch.cat, zip(*batches)))]
    wanted = compare_with_source(tuned, source, batches)
    assert compare_with_source(tuned, source, one)==pytest.approx(wanted, rel=1e-6)
    with_empty = [(torch.zeros(0,6),torch.zeros(0)), *batches]
    assert compare_with_source(tuned, source, with_empty)==wanted and accuracy_on(source, with_empty)>=0

# Each picture is read once, and passes through as few networks as possible

class Counting(nn.Module):
    "Counts the calls of all copies"
    calls = []
    def forward(self, x):
        if not x.is_meta: self.calls.append(len(x))
        return x

@pytest.mark.parametrize('norm,apart,n', [(nn.BatchNorm1d,False,3), (nn.BatchNorm1d,True,3), (nn.LayerNorm,False,2),
                                          (nn.LayerNorm,True,3)])
def test_forward_passes(batches, norm, apart, n):
    source = nn.Sequential(*network(5, norm=norm), Counting())
    tuned = nn.Sequential(*tuned_from(network(5, norm=norm)), Counting())
    Counting.calls.clear()
    compare_with_source(tuned, source, iter(batches), iter(batches) if apart else None)
    assert len(Counting.calls)==n*len(batches)

def test_nothing_is_changed(source, tuned, batches):
    for o in (source,tuned): o.train()
    before = copy.deepcopy((source.state_dict(),tuned.state_dict()))
    compare_with_source(tuned, source, batches)
    for old,new in zip(before, (source,tuned)):
        assert all(torch.equal(v, new.state_dict()[k]) for k,v in old.items())
    assert source.training and tuned.training and all(p.requires_grad for p in source.parameters())

# Batches of every kind

WITHOUT = {'tensors': lambda x,y: x, 'tuples': lambda x,y: (x,), 'lists': lambda x,y: [x], 'None': lambda x,y: (x,None),
           'dicts': lambda x,y: dict(image=x), 'paths': lambda x,y: dict(image=x, path=['a']*len(x)),
           'arrays': lambda x,y: x.numpy(), 'float64': lambda x,y: x.double()}
@pytest.mark.parametrize('kind', WITHOUT)
def test_without_labels(source, tuned, batches, kind):
    "Needs no flag"
    pictures = [WITHOUT[kind](x, y) for x,y in batches]
    wanted = compare_with_source(tuned, source, batches, labelled=False)
    assert compare_with_source(tuned, source, pictures)==wanted
    assert compare_with_source(tuned, source, pictures, list(pictures))==wanted
    assert compare_with_source(tuned, source, batches, list(pictures))==compare_with_source(tuned, source, batches)
    with pytest.raises(ValueError, match='no labels'): retention(tuned, source, pictures)

@pytest.mark.parametrize('loader', [
    lambda ds: DataLoader(ds, 4), lambda ds: FastaiLoader(ds, bs=4, num_workers=0), lambda ds: iter(DataLoader(ds, 4)),
    lambda ds: (o for o in DataLoader(ds, 4))])
def test_loaders(source, tuned, batches, loader):
    ds = TensorDataset(*map(torch.cat, zip(*batches)))
    found = compare_with_source(tuned, source, loader(ds))
    assert found==pytest.approx(compare_with_source(tuned, source, batches), rel=1e-6)
    assert compare_with_source(tuned, source, loader(ds), loader(ds))==found
    same = loader(ds)
    assert compare_with_source(tuned, source, same, same)==found

def test_a_label_that_means_nothing(source, tuned, batches):
    dummy = [(x,torch.zeros(len(x))) for x in images(batches)]
    strange = [(x,torch.full((len(x),), 99)) for x in images(batches)]
    for pictures in (dummy, strange, [(x,list('abcdefg'[:len(x)])) for x in images(batches)]):
        assert list(compare_with_source(tuned, source, pictures, labelled=False))==columns('agreement','divergence')

def mixed(batches): return [batches[0], batches[1][0], batches[2]]
def other_labels(batches): return [(x,y.flip(0)) for x,y in batches]
REFUSED = { # pictures, pictures for the tuned model, what the sentence names
    'empty': (lambda b: [], None, 'empty'), 'empty loader': (lambda b: iter([]), None, 'empty'),
    'both empty': (lambda b: [], lambda b: [], 'empty'),
    'only empty batches': (lambda b: [torch.zeros(0,6)], None, 'empty'),
    'one more': (lambda b: b, lambda b: b[:2], 'more batches'),
    'one fewer': (lambda b: b[:2], lambda b: b, 'more batches'),
    'none': (lambda b: b, lambda b: [], 'more batches'),
    'other sizes': (lambda b: images(b), lambda b: images(b[::-1]), '7 images.* 3 images'),
    'other labels': (lambda b: b, other_labels, 'labels differ'),
    'another order': (lambda b: b, lambda b: [b[1],b[0],b[2]], 'labels differ'),
    'shuffled': (lambda b: DataLoader(images(b)[0], shuffle=True), lambda b: DataLoader(images(b)[0]), 'shuffling'),
    'shuffled too': (
        lambda b: images(b), lambda b: FastaiLoader(images(b)[0], shuffle=True, num_workers=0), 'shuffling'),
    'some labels': (mixed, None, 'some batches'), 'no labels at first': (lambda b: mixed(b)[1:], None, 'some batches'),
    'too high': (lambda b: [(b[0][0],b[0][1]+5)], None, '5 classes'),
    'negative': (lambda b: [(b[0][0],b[0][1]-9)], None, '5 classes'),
    'numbers of pictures': (lambda b: [(b[0][0],torch.arange(90,97))], None, '90 to 96'),
    'NaN labels': (lambda b: [(b[0][0],torch.full((7,), torch.nan))], None, 'whole'),
    'names': (lambda b: [(b[0][0],list('abcdefg'))], None, 'labels'),
    'two labels': (lambda b: [(b[0][0],b[0][1][:2])], None, '7 images and 2'),
    'a picture': (lambda b: b[0][0][0], None, r'\(B'), 'None': (lambda b: [None], None, 'NoneType'),
    'None later': (lambda b: [*b, None], None, 'NoneType'),
    'pixels': (lambda b: [b[0][0].byte()], lambda b: b[:1], 'uint8'),
    'NaN in a picture': (lambda b: [b[0][0]/0], None, 'NaN'),
}
@pytest.mark.parametrize('name', REFUSED)
def test_pictures_that_do_not_fit(source, tuned, batches, name):
    pictures,seen,named = REFUSED[name]
    with pytest.raises(ValueError, match=named):
        compare_with_source(tuned, source, pictures(batches), None if seen is None else seen(batches))

class Bad(nn.Module):
    "Returns something else than logits"
    def __init__(self, what):
        super().__init__()
        self.what,self.layer = what,nn.Linear(6,5)
    def forward(self, x): return self.what(self.layer(x))
BAD = {'a dict': (lambda z: dict(logits=z), 'dict'), 'a tuple': (lambda z: (z,z), 'tuple'),
       'None': (lambda z: None, 'None'),
       'one logit': (lambda z: z[:,:1], r'\(7, 1\)'), 'one dimension': (lambda z: z[:,0], r'\(7,\)'),
       'maps': (lambda z: z[:,:,None,None], r'\(7, 5, 1, 1\)'),
       'one row': (lambda z: z.mean(0, keepdim=True), r'\(1, 5\)')}
@pytest.mark.parametrize('name', BAD)
def test_what_is_no_classifier(batches, name):
    what,named = BAD[name]
    with pytest.raises(ValueError, match=f'Bad.*{named}'): compare_with_source(Bad(what), Bad(what), images(batches))
    with pytest.raises(ValueError, match=f'Bad.*{named}'): accuracy_on(Bad(what), batches)

@pytest.mark.parametrize('bad', [None, 'model.pth', {}, [network(5)]])
def test_no_network(source, batches, bad):
    for pair in ((bad,source), (source,bad)):
        with pytest.raises(ValueError, match=type(bad).__name__): compare_with_source(*pair, batches)

def test_another_body(source, batches):
    with pytest.raises(ValueError, match='running_mean is missing'):
        compare_with_source(network(5, norm=nn.LayerNorm), source, batches)

# Numbers that are none

@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_model_that_diverged_is_nan(source, tuned, batches, value):
    "Its NaN logits are no answer, above all not that of the first class"
    first_class = [(x,torch.zeros(len(x))) for x in images(batches)]
    with torch.no_grad(): tuned[0].weight[0] = value
    found = compare_with_source(tuned, source, first_class)
    assert set(found)==set(columns(*MEASURES)) and all(map(math.isnan, found.values()))
    assert all(map(math.isnan, retention(tuned, source, first_class).values()))

@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_source_without_answers_is_refused(source, tuned, batches, value):
    with torch.no_grad(): source[3].bias[1] = value
    for labelled in (True,False):
        with pytest.raises(ValueError, match='source model.*NaN'):
            compare_with_source(tuned, source, batches, labelled=labelled)

def test_a_class_that_is_ruled_out(source, tuned, batches):
    "A probability of exactly 0 in the source, and in both as they have one head, adds nothing"
    masked = copy.deepcopy(source)
    with torch.no_grad(): masked[3].bias[4] = -math.inf
    fewer = copy.deepcopy(source)
    fewer[3] = nn.Linear(8,4)
    with torch.no_grad():
        fewer[3].weight.copy_(source[3].weight[:4])
        fewer[3].bias.copy_(source[3].bias[:4])
    wanted = compare_with_source(tuned, fewer, images(batches))
    assert compare_with_source(tuned, masked, images(batches))==pytest.approx(wanted, rel=1e-6)

def test_certain_of_something_else_is_finite(source, batches):
    "Logits of a thousand, whose other probabilities are 0 in float32 and float64"
    sure,other = copy.deepcopy(source),copy.deepcopy(source)
    with torch.no_grad(): sure[0].weight.mul_(1000)
    with torch.no_grad(): other[0].weight.mul_(-1000)
    found = compare_with_source(other, sure, images(batches))
    assert 100<found['divergence_source_bn']<math.inf and found['agreement_source_bn']<1

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision(source, tuned, batches, dtype):
    "Either network: nearly the same, and exactly none from itself"
    wanted = compare_with_source(tuned, source, batches)
    half = copy.deepcopy(source).to(dtype)
    assert compare_with_source(half, half, images(batches))['divergence_source_bn']==0
    for pair in ((copy.deepcopy(tuned).to(dtype),source), (tuned,half)):
        found = compare_with_source(*pair, batches)
        for o in columns('divergence'): assert found[o]==pytest.approx(wanted[o], rel=0.1)

def test_on_another_device(source, tuned, batches, device):
    "The models there and the pictures here, or one of the models"
    wanted = compare_with_source(tuned, source, batches)
    there = [copy.deepcopy(o).to(device) for o in (tuned, source)]
    for model in (tuned, there[0]):
        for other in (source, there[1]): assert compare_with_source(model, other, batches)==wanted

# The callback

def learner(source, seed=0):
    torch.manual_seed(seed)
    ds = [(torch.randn(6), torch.randint(2, ())) for _ in range(12)]
    loaders = [FastaiLoader(ds, bs=4, num_workers=0) for _ in range(2)]
    learn = Learner(DataLoaders(*loaders, device='cpu'), tuned_from(source), CrossEntropyLossFlat())
    return learn
def fit(learn, *cbs):
    with learn.no_bar(), learn.no_logging(): learn.fit(2, 0.1, cbs=cbs)
    return learn
def names(learn): return learn.recorder.metric_names[3:-1]
def last(learn): return dict(zip(names(learn), learn.recorder.values[-1][2:]))

def test_columns_as_before_with_labels(source, batches):
    learn = fit(learner(source), Retention(source, batches))
    assert names(learn)==columns('retention')
    assert list(last(learn).values())==list(retention(learn.model, source, batches).values())

@pytest.mark.parametrize('make', [
    lambda source,batches: Retention(source, images(batches)),
    lambda source,batches: Retention(source, images(batches), labelled=False),
    lambda source,batches: Retention(source, [(x,torch.zeros(len(x))) for x,_ in batches], labelled=False)])
def test_columns_without_labels(source, batches, make):
    cb = make(source, batches)
    for learn in (learner(source), learner(source, 1)):
        fit(learn, cb)
        assert names(learn)==columns('agreement','divergence')
        assert last(learn)==compare_with_source(learn.model, source, images(batches))
        assert len({tuple(o[2:]) for o in learn.recorder.values})==2             # every epoch is measured anew

def test_measuring_without_labels_changes_no_training(source, batches):
    alone = fit(learner(source))
    shuffled = DataLoader(torch.cat(images(batches)), 4, shuffle=True)
    for pictures in (images(batches), shuffled):
        measured = fit(learner(source), Retention(source, pictures))
        for p,q in zip(alone.model.parameters(), measured.model.parameters()): assert torch.equal(p, q)

@pytest.mark.parametrize('name', ['empty', 'too high', 'names', 'NaN in a picture', 'None'])
def test_refused_before_the_training(source, batches, name):
    pictures,_,named = REFUSED[name]
    learn = learner(source)
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match=named): fit(learn, Retention(source, pictures(batches)))
    assert all(torch.equal(v, learn.model.state_dict()[k]) for k,v in before.items())

def test_a_training_that_diverges_has_no_agreement(source, batches):
    learn = learner(source)
    with torch.no_grad(): learn.model[0].weight[0] = math.nan
    assert all(map(math.isnan, last(fit(learn, Retention(source, images(batches)))).values()))

@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_byobnet'])
def test_networks_of_timm(name):
    "With BatchNorm and without"
    torch.manual_seed(0)
    source,tuned = [timm.create_model(name, num_classes=n) for n in (5,3)]
    shared = {k: v for k,v in source.state_dict().items() if v.shape==tuned.state_dict()[k].shape}
    tuned.load_state_dict(shared, strict=False)
    x = torch.randn(4, 3, *[timm.data.resolve_model_data_config(source)['input_size'][-1]]*2)
    found = compare_with_source(tuned, source, [x])
    assert found==dict.fromkeys(columns('agreement'), 1.) | dict.fromkeys(columns('divergence'), 0.)
    with torch.no_grad():
        for p in tuned.parameters(): p.add_(0.1*torch.randn_like(p))
    p,q = [o.eval()(x).double().log_softmax(-1) for o in (source, with_source_head(tuned, source))]
    with torch.no_grad(): found = compare_with_source(tuned, source, [x])
    wanted = nn.functional.kl_div(q, p, reduction='batchmean', log_target=True).item()
    assert found['divergence_target_bn']==pytest.approx(wanted)

def test_parts_of_a_table_without_splits():
    table = pd.DataFrame(dict(path=list('abcde')))
    assert [list(o.path) for o in source_parts(table)]==[list(o.path) for o in halves(table)]==[list('ace'),list('bd')]
    for n in (0,1):
        for parts in (halves, source_parts):
            with pytest.raises(ValueError, match=f'too few source pictures, {n}'): parts(table[:n])

# The points between two models

def conv_net(n_classes):
    body = nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(4,n_classes))

@pytest.fixture
def between():
    "`Compromise` of the pictures it is given, and those pictures"
    torch.manual_seed(4)
    source,tuned = conv_net(5),conv_net(2)
    for p in tuned.parameters(): nn.init.normal_(p)
    fishers = [{n: torch.rand_like(p) for n,p in o.named_parameters()} for o in (source, tuned)]
    def batches(n): return [(torch.randn(m,3,6,6), torch.randint(n, (m,))) for m in (8,8,3)]
    target,pictures = batches(2),batches(5)
    return lambda *seen, **kw: Compromise(source, tuned, *fishers, target, target, *seen, **kw), pictures

def test_points_have_an_agreement_without_labels(between):
    make,pictures = between
    seen = [0.5*x for x in images(pictures)]
    dummy = [(x,torch.zeros(len(x))) for x in images(pictures)]
    for c in (make(images(pictures), seen), make(dummy, seen, labelled=False)):
        assert c.measures==('last', *columns('agreement')) and c.before==1
        for point in ((0.,0.), (0.1,0.5)):
            found,wanted = c.at(*point),compare_with_source(c.model(*point), c.source, images(pictures), seen)
            assert [found[o] for o in c.measures[1:]]==pytest.approx([wanted[o] for o in c.measures[1:]])
        assert list(c.tuned_is)==list(c.measures)
    assert make(pictures).measures==('last', *columns('retention'))
    assert make([*pictures[:2], pictures[2][0]]).measures==c.measures         # some labels are no labels
    with pytest.raises(ValueError, match='19 and 16'): make(images(pictures), seen[:2])

def test_the_panel_names_what_it_shows(between):
    make,pictures = between
    for seen,name in ((pictures,'retention'), (images(pictures),'agreement')):
        c = make(seen).measure_grid([0.,0.1], [0.,1.], progress=False)
        panel = explore_penalty(c)
        assert ('agreement' in panel.finish())==(name=='agreement')
        ax = panel.pictures[0].axes
        assert ax.get_xlabel().startswith(name) and name in ax.get_title()
        panel.set(strength=1.)
        assert f"{c.at(**panel.values)[f'{name}_target_bn']:.0%}" in panel.finish()

@pytest.mark.parametrize('in_curve', [True,False])
@pytest.mark.parametrize('name', ['retention','agreement',''])
def test_the_panel_of_trainings_names_what_it_shows(name, in_curve):
    "Measured after every epoch, or only at the end; '': no source"
    runs = {o.id: o for o in (Run('data', arm='plain', seed=s, epochs=2) for s in (0,1))}
    measured = {f'{name}_target_bn': 0.25} if name else {}
    curve = dict(epoch=[0,1], train_loss=2., valid_loss=2., accuracy=0.5)
    training = SimpleNamespace(known=lambda: runs, batches=lambda id: [], stage='done', problems=[],
                               epochs=lambda id: pd.DataFrame(curve | (measured if in_curve else {})),
                               result=lambda id: dict(test_last=0.5) | measured)
    view = _TrainingView(training, dict(data='data'))
    text,shown = view.draw(),view.legend.value
    ax = view.pictures[2].axes
    assert ax.get_title().lower().startswith(name or 'retention')
    assert [max(o.get_ydata()[-1:]) for o in ax.lines]==(2*[0.25] if name else [])
    assert f'>{name or "retention"}<' in shown and ('25.0%' in shown)==bool(name)
    assert (f'Highest {name}:' in text)==bool(name) and 'Highest accuracy' in text

def test_the_rows_of_the_benchmark(tiny_done, tmp_path, monkeypatch):
    "At the source, between, and at the run's own result; what has a row is not measured again"
    monkeypatch.syspath_prepend(Path(__file__).parents[1]/'benchmarks')
    import agreement
    done = json.loads((tiny_done/'result.json').read_text())
    shutil.copytree(tiny_done, tmp_path/'runs'/done['id'])
    shutil.copytree(tiny_done.parent/'sources', tmp_path/'sources')
    asked = dict(work=str(tmp_path), out=str(tmp_path/'out'))
    agreement.main(**asked, positions='0,1')
    first = pd.read_csv(tmp_path/'out/runs.csv')
    agreement.main(**asked, positions='0,0.5,1')
    rows = pd.read_csv(tmp_path/'out/runs.csv').set_index('position').sort_index()
    assert list(rows.index)==[0,0.5,1] and len(first)==2
    assert rows.loc[0.,'agreement_source_bn']==1 and rows.loc[0.,'retention_source_bn']==pytest.approx(rows.before[0.])
    for o in columns(*MEASURES): assert rows.loc[1.,o]==pytest.approx(done[o], rel=1e-5)

def test_the_points_of_a_run_without_labels(tiny_run, tmp_path):
    shutil.copytree(tiny_run.source, tmp_path/'pictures', ignore=shutil.ignore_patterns('labels.csv'))
    run = replace(tiny_run, source=str(tmp_path/'pictures'), epochs=1)
    c = read_compromise(run, tmp_path, n_pictures=6, n_fisher=6, progress=False)
    assert c.measures==('last', *columns('agreement')) and c.before==1
    assert c.at(0., 1e15)['agreement_source_bn']==1                          # all the way back to the source

# Which buffers are statistics, and which layer is the head

def test_buffers_of_the_weights_stay_with_the_weights():
    "Spectral normalisation has some; restoring the source's statistics leaves them alone"
    def net(): return nn.Sequential(spectral_norm(nn.Linear(6,8)), nn.BatchNorm1d(8), nn.Linear(8,5))
    source,tuned = net(),net()
    x = torch.randn(20,6)
    for _ in range(5): tuned.train()(x)
    combined = with_source_head(tuned, source, norm='source')
    assert torch.equal(combined[0].weight, tuned.eval()[0].weight)
    assert torch.equal(combined[1].running_mean, source[1].running_mean)

class Cosine(nn.Module):
    "A head of one's own class"
    def __init__(self, n, m):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m,n))
    def forward(self, x): return 16*nn.functional.linear(nn.functional.normalize(x), self.weight)

class OwnHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.body,self.embed,self.head = nn.Conv2d(3,8,3,2,1),nn.Linear(8,16),Cosine(16,5)
    def forward(self, x): return self.head(self.embed(self.body(x).relu().mean((2,3))))

class OfOneSize(nn.Module):
    "It takes 32 pixels only, and was made with a layer for training after its head"
    def __init__(self):
        super().__init__()
        self.body,self.head,self.also = nn.Conv2d(3,8,3,2,1),nn.Linear(8*256,5),nn.Linear(8*256,4)
    def forward(self, x): return self.head(self.body(x).relu().flatten(1))

@pytest.mark.parametrize('make', [OwnHead, OfOneSize])
def test_the_head_is_where_the_logits_come_from(make):
    torch.manual_seed(0)
    source = make().eval()
    x = torch.randn(60,3,32,32)
    y = source(x).argmax(1)
    tuned = copy.deepcopy(source)
    for p in tuned.head.parameters(): nn.init.normal_(p)
    assert head_names(source)==['head'] and retention(tuned, source, [(x,y)])==dict(target=1., source=1.)

def test_a_guess_is_said():
    class Unrunnable(nn.Module):
        def __init__(self):
            super().__init__()
            self.body,self.head = nn.Linear(6,4),nn.Linear(4,3)
        def forward(self, x): return self.head(self.body(x)*x.mean().item())
    with pytest.warns(UserWarning, match='cannot be run without real pictures.*head'):
        assert head_names(Unrunnable())==['head']

def test_a_head_that_cannot_be_made_anew():
    with pytest.raises(ValueError, match='head, is a Cosine.*reset_classifier'): remake_head(OwnHead(), 3)
