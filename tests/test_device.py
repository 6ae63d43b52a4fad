"Every path that touches a device, on a pretended one: its numbers are the CPU's, and its tensors do not meet the CPU's"
import copy, io, random, warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
import fastai.optimizer, fastai.torch_core, numpy as np, pandas as pd, pytest, timm, torch
from PIL import Image
from fastai.basics import Callback, CrossEntropyLossFlat, DataLoaders, Learner, accuracy, load_learner
from fastai.callback.fp16 import MixedPrecision
from fastai.data.load import DataLoader
from torch import nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torchvision.models import squeezenet1_1
import fgvc_fisher.data.loaders, fgvc_fisher.experiment.run
from fgvc_fisher.callback import L2SPFisherCallback
from fgvc_fisher.data import aircraft_dls
from fgvc_fisher.data.transforms import MixedCrossEntropy
from fgvc_fisher.experiment import do_run
from fgvc_fisher.experiment.saved import fit_temperature, load_model, save_model, temperature_on
from fgvc_fisher.cli import estimate_command
from fgvc_fisher.explore.compromise import Compromise
from fgvc_fisher.explore.recognise import Recogniser
from fgvc_fisher.fisher import DiagFisher, estimate_fisher, shard_fisher, tar_shards
from fgvc_fisher.fisher.diagonal import KINDS as KINDS_OF_FISHERS
from fgvc_fisher.fisher.per_image import PerImage, SquaredGradients
from fgvc_fisher.learner import aircraft_learner, n_outputs, nesterov, remake_head, source_model
from fgvc_fisher.penalty import QuadraticPenalty
from fgvc_fisher.penalty.merging import interpolate, merge
from fgvc_fisher.retention import Retention, compare_with_source, retention, with_source_head
from pretend import DEVICE, Pretend, dispatch, pretend
from test_fisher import (
    Branches, Pooled, Routed, SequenceFirst, Shared, TwoInputs, Uses, WAYS, Words, conv1ds, conv2ds, conv3ds, named,
    randomised
)
from test_loops import problem
from test_shards import write_tar
from tiny import network

def agree(a, b, tol=1e-12):
    "Mappings from names to tensors, wherever they are"
    assert list(a)==list(b)
    for n in a:
        x,y = a[n].detach().cpu().double(),b[n].detach().cpu().double()
        assert (x-y).norm() <= tol*y.norm(), n

def is_on_device(model): return all(isinstance(o, Pretend) for o in (*model.parameters(), *model.buffers()))

def batches(shape, n_classes=3, n=2, dtype=torch.float64):
    "Some batches on the CPU"
    return [(torch.randn(*shape, dtype=dtype), torch.randint(n_classes, shape[:1])) for _ in range(n)]

def on_both(model, data, **kw):
    "The Fisher on the CPU and on the device"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        wanted = estimate_fisher(model, data, progress=False, **kw)
        return estimate_fisher(copy.deepcopy(model).to(DEVICE), data, progress=False, **kw),wanted

# The pretended device itself

def test_what_the_device_refuses(device):
    x,there = torch.randn(3,3),torch.randn(3,3).to(device)
    refused = [lambda: x+there, lambda: there@x, lambda: torch.stack([there.sum(), torch.tensor(1.)]),
               lambda: there.lerp_(x, 0.5), lambda: torch.cat([there, x]), lambda: F.linear(x, there),
               lambda: x[torch.tensor([0,2]).to(device)], lambda: there.index_put_((torch.tensor([0,2]),), x[:2])]
    for f in refused:
        with pytest.raises(RuntimeError, match='CPU tensor'): f()
    with pytest.raises(TypeError, match='numpy'): there.numpy()

def test_what_the_device_computes(device):
    x = torch.randn(3,3)
    there = x.to(device)
    assert there.device==device and torch.equal((there*torch.tensor(2.)).cpu(), 2*x)
    assert there.sum().item()==x.sum().item() and there.tolist()==x.tolist()
    assert torch.equal(there[torch.tensor([2,0])].cpu(), x[[2,0]])
    assert torch.equal(torch.zeros(3).copy_(there[0]), x[0]) and torch.tensor([1.], device=device).tolist()==[1.]

def test_a_device_without_float64():
    with pretend(float64=False) as device:
        x = torch.randn(3).to(device)
        with pytest.raises(TypeError, match='float64'): x.double()
        assert x.cpu().double().dtype==torch.float64

# The Fisher

MORE = {
    'one dimension': lambda: Pooled(6, nn.Conv1d(4,6,3, stride=2, dilation=2, padding=2),
                                    nn.InstanceNorm1d(6, affine=True)),
    'reflected': lambda: Pooled(6, nn.Conv2d(4,6,3, padding=1, padding_mode='reflect', groups=2)),
    'by two strides': lambda: Pooled(6, nn.Conv2d(4,6,(3,1), stride=(2,1), padding=(1,0), dilation=(1,2))),
    'valid': lambda: Pooled(6, nn.Conv2d(4,6,2, padding='valid'), nn.PReLU(6)),
    'even kernel, same': lambda: Pooled(6, nn.Conv2d(4,6,4, padding='same', dilation=2)),
    'depthwise': lambda: Pooled(8, nn.Conv2d(4,8,3, groups=4, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8,8,1)),
    'pointwise, padded': lambda: Pooled(6, nn.Conv2d(4,6,1, padding=1)),
    'transposed': lambda: Pooled(6, nn.ConvTranspose2d(4,6,3, padding=1, stride=2, output_padding=1, groups=2)),
}
IMAGES = (3,4,7,7)
NETWORKS = { # and the shape of a batch
    'convolutions': (conv2ds, (3,4,9,9)), 'in one dimension': (conv1ds, (5,4,11)), 'in three': (conv3ds, (3,4,5,5,5)),
    'raw parameters': (Branches, (5,6)), 'several functions': (Shared, (5,3,6,6)),
    'sequence first': (SequenceFirst, (5,8,4)),
    'by image': (Routed, (5,6)), 'no rule': (TwoInputs, (5,5)),
    'standardised weights': (named('test_nfnet'), (2,3,32,32)),
    'attention': (named('test_vit', img_size=32, init_values=0.5), (3,3,32,32)),
    'layer norm': (named('test_convnext'), (2,3,32,32)), 'depthwise network': (named('test_efficientnet'), (2,3,32,32)),
    **{name: (make, IMAGES[:3] if name=='one dimension' else IMAGES) for name,make in MORE.items()},
    **{name: (lambda way=way: Uses(way), (5,6)) for name,way in WAYS.items()}}

@pytest.mark.parametrize('name', NETWORKS)
def test_rules(device, name):
    make,shape = NETWORKS[name]
    agree(*on_both(randomised(make()), batches(shape), kind='empirical'))

def test_tokens(device):
    data = [(torch.randint(9, (5,7)), torch.randint(4, (5,))) for _ in range(2)]
    agree(*on_both(Words().double(), data, kind='empirical'))

def test_in_slices(device, monkeypatch):
    "As on a GPU, where large layers take a few images at a time"
    class Sliced(PerImage):
        def __init__(self, *args):
            super().__init__(*args)
            self.step = 2
    monkeypatch.setattr('fgvc_fisher.fisher.per_image.PerImage', Sliced)
    agree(*on_both(randomised(conv2ds()), batches((5,4,9,9)), kind='exact'))

def small(): return randomised(Pooled(6, nn.Conv2d(3,6,3, padding=1), nn.BatchNorm2d(6), nn.GELU(), nn.Conv2d(6,6,1)))
SHAPE = (4,3,8,8)

KINDS = {
    'sampled': dict(), 'three labels': dict(n_samples=3, seed=2), 'exact': dict(kind='exact'),
    'most of the mass': dict(kind='exact', mass=0.6), 'empirical': dict(kind='empirical'),
    'a few images': dict(n_images=5), 'until precise': dict(target_error=0.9), 'from image 7': dict(image_offset=7)}

def test_few_operations(device, monkeypatch):
    "Each is a kernel that a GPU has to launch: those of one more normalisation, beside the views"
    counted = []
    def counting(func, args, kwargs, float64=True):
        if not func.is_view: counted.append(func)
        return dispatch(func, args, kwargs, float64)
    monkeypatch.setattr('pretend.dispatch', counting)
    def count(n):
        model = Pooled(4, *[nn.BatchNorm2d(4) for _ in range(n)]).to(device).eval()
        squares,x = SquaredGradients(model),torch.randn(3,4,5,5).to(device)
        def choose(logits): return torch.zeros_like(logits[:,:1], dtype=torch.int64),torch.ones_like(logits[:,:1])
        squares.add_batch(x, choose)                                # verifies the rules
        counted.clear()
        squares.add_batch(x, choose)
        return len(counted)
    assert count(12)-count(2) <= 10*10

@pytest.mark.parametrize('name', KINDS)
def test_kinds(device, name):
    model = small()
    got,wanted = on_both(model, batches(SHAPE, n=9), **KINDS[name])
    agree(got, wanted)
    assert got.n_images==wanted.n_images and got.coverage().equals(wanted.coverage())
    assert torch.allclose(got.moments, wanted.moments) and got.provenance.keys()==wanted.provenance.keys()
    assert got.provenance['weights_sha256']==wanted.provenance['weights_sha256']

FORMS = {
    'on the device': lambda x, y: (x.to(DEVICE), y.to(DEVICE)), 'labels on the device': lambda x, y: (x, y.to(DEVICE)),
    'dict': lambda x, y: dict(image=x.to(DEVICE), label=y), 'arrays': lambda x, y: (x.numpy(), y.numpy()),
    'one-hot': lambda x, y: (x, F.one_hot(y, 4).to(DEVICE)), 'list': lambda x, y: (x.to(DEVICE), y.tolist()),
    'floats': lambda x, y: (x.float().to(DEVICE), y.float().to(DEVICE))}

@pytest.mark.parametrize('name', FORMS)
def test_batches(device, name):
    model,data = small(),batches(SHAPE)
    wanted = estimate_fisher(model, data, kind='empirical', progress=False)
    got = estimate_fisher(model.to(device), [FORMS[name](*o) for o in data], kind='empirical', progress=False)
    agree(got, wanted, 1e-6)

def test_resuming(device, tmp_path):
    "From the device's checkpoint on the device and on the CPU"
    model,data = small(),batches(SHAPE, n=3)
    def broken():
        yield from data[:2]
        raise OSError('the disk is gone')
    wanted = estimate_fisher(model, data, progress=False)
    there = copy.deepcopy(model).to(device)
    for again in (there, model):
        kw = dict(checkpoint=tmp_path/'part', checkpoint_every=0, progress=False)
        with pytest.raises(OSError, match='disk'): estimate_fisher(there, broken(), **kw)
        assert DiagFisher.load(tmp_path/'part').n_images==8
        agree(estimate_fisher(again, data, **kw), wanted)

TYPES = [(torch.float16,None), (torch.bfloat16,None), (torch.float32,torch.bfloat16), (torch.float32,torch.float16),
         (torch.float16,torch.float16), (torch.bfloat16,torch.bfloat16)]
@pytest.mark.parametrize('dtype,casts', TYPES)
def test_types_and_autocast(device, dtype, casts):
    model,data = small().to(dtype),batches(SHAPE, dtype=torch.float32)
    with torch.autocast('cpu', casts, enabled=casts is not None): wanted = on_both(model, data)[1]
    with torch.autocast(device.type, casts, enabled=casts is not None): got = on_both(model, data)[0]
    agree(got, wanted, 0.02)
    assert all(v.dtype==torch.float32 for v in got.values())

def test_a_fisher_from_the_device(device, tmp_path):
    "Summed by hand there: it is saved, added and shown as one from the CPU"
    model,data = small(),batches(SHAPE)
    fisher = estimate_fisher(model, data, progress=False)
    sums = {n: v.to(device) for n,v in fisher.sums.items()}
    there = DiagFisher(sums, fisher.n_images, fisher.kind, fisher.provenance, fisher.moments.to(device), fisher.rules)
    agree(there+fisher, fisher)
    agree(fisher+there, fisher)
    for half in (False,True): agree(DiagFisher.load(there.save(tmp_path/'f', half)), fisher, 1e-3 if half else 0)
    assert there.summary().equals(fisher.summary())
    there.plot_histogram()
    there.check(model.to(device))

# The penalty

PENALTIES = {
    'beta': dict(beta=3.), 'strength': dict(strength=0.5), 'all terms': dict(alpha=0.02, beta=3., l2sp=0.1),
    'l2sp': dict(l2sp=0.1), 'alpha on the head': dict(alpha=0.1, alpha_on='new'),
    'weights': dict(beta=1., beta_on='weights'),
    'in bfloat16': dict(beta=3., dtype=torch.bfloat16), 'in float16': dict(strength=1., l2sp=0.1, dtype=torch.float16),
    'on the CPU': dict(beta=3., l2sp=0.1, device='cpu'),
    'in bfloat16 on the CPU': dict(alpha=0.1, strength=1., dtype=torch.bfloat16, device='cpu')}

def steps(model, penalty, data, device='cpu'):
    "Train by hand, a step of each kind for each batch; what the penalty says on the way"
    optimizer,said = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9),[]
    for x,y in data:
        optimizer.zero_grad()
        (F.cross_entropy(model(x.to(device)), y.to(device)) + 0.01*penalty.value()).backward()
        penalty.add_grad_(0.1)
        optimizer.step()
        penalty.prox_(optimizer)
        said.append([penalty.value().item(), penalty.distance(), *penalty.stiffest(0.1)])
    table = penalty.table()
    return said,table.moved.tolist(),table.cost.tolist(),table.terms.tolist()

@pytest.mark.parametrize('moved', ['before','after'])
@pytest.mark.parametrize('name', PENALTIES)
def test_penalty(device, name, moved):
    "Made from tensors on the CPU or on the device, before or after the model is moved"
    model,theta0,fisher,data = problem(n=12)
    there,kw = copy.deepcopy(model),PENALTIES[name] | dict(new=['3'])
    wanted = steps(model, QuadraticPenalty(model, theta0, fisher, **kw), data)
    if moved=='before': there.to(device)
    else: theta0 = {n: v.to(device) for n,v in theta0.items()}
    penalty = QuadraticPenalty(there, theta0, fisher, **kw)
    there.to(device)
    found = steps(there, penalty, data, device)
    agree(dict(there.named_parameters()), dict(model.named_parameters()), 1e-6)
    assert found[-1]==wanted[-1]
    for a,b in zip(found[:-1], wanted): assert torch.allclose(*map(numbers, (a,b)), equal_nan=True)
    if 'CPU' in name: assert 'copied from cpu' in penalty.summary()

def numbers(o):
    "All numbers of nested lists, as a tensor"
    return torch.tensor([v for row in o for v in (row if isinstance(row, list) else [row]) if isinstance(v, float)])

def tuned_in_fastai(model, cb, data, device, n=2, **kw):
    dls = DataLoaders(*[DataLoader(data, bs=4, num_workers=0) for _ in range(2)], device=device)
    learn = Learner(dls, model, CrossEntropyLossFlat(), metrics=accuracy, cbs=cb, **kw)
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 0.1)
    return learn

CALLBACKS = {**PENALTIES, 'explicit': dict(alpha=0.02, beta=0.3, l2sp=0.1, step='grad'),
             'explicit, on the CPU': dict(beta=0.3, step='grad', device='cpu'),
             'without an anchor': dict(l2sp=0.1, anchor=None), 'frozen statistics': dict(beta=1., freeze_bn=True)}
@pytest.mark.parametrize('name', CALLBACKS)
def test_callback(device, name, capsys):
    "fastai moves the model to the device when the training begins, after the callback was made"
    model,theta0,fisher,data = problem(n=12)
    data = [(o,t) for x,y in data for o,t in zip(x, y)]
    kw = dict(anchor=theta0, fisher=fisher, new=['3']) | CALLBACKS[name]
    here,there = [tuned_in_fastai(copy.deepcopy(model), L2SPFisherCallback(**kw), data, o) for o in ('cpu', device)]
    agree(dict(there.model.named_parameters()), dict(here.model.named_parameters()), 1e-6)
    assert is_on_device(there.model) and here.recorder.metric_names==there.recorder.metric_names
    assert torch.allclose(torch.tensor(there.recorder.values), torch.tensor(here.recorder.values), equal_nan=True)

class Mixed(MixedPrecision):
    "fastai's mixed precision, which knows CUDA alone, on the device"
    def before_fit(self):
        super().before_fit()
        self.autocast,self.learn.scaler = torch.autocast(self.dls.device.type, torch.float16),GradScaler('cpu')

@pytest.mark.parametrize('name', ['all terms','explicit','on the CPU'])
def test_mixed_precision(device, name, capsys):
    "Near the training in float32, and not the same"
    model,theta0,fisher,data = problem(n=12)
    data = [(o,t) for x,y in data for o,t in zip(x, y)]
    def trained(*cbs):
        cb = L2SPFisherCallback(anchor=theta0, fisher=fisher, new=['3'], **CALLBACKS[name])
        learn = tuned_in_fastai(copy.deepcopy(model), [cb, *cbs], data, device, opt_func=nesterov)
        return dict(learn.model.named_parameters())
    found,wanted = trained(Mixed()),trained()
    agree(found, wanted, 0.02)
    assert not torch.equal(found['0.weight'], wanted['0.weight']) and found['0.weight'].dtype==torch.float32

@pytest.mark.parametrize('opt_func', [nesterov, fastai.optimizer.Adam])
def test_saved_and_resumed(device, opt_func, tmp_path, capsys):
    "A training saved on the device resumes there and on the CPU, with its optimizer's state"
    model,theta0,fisher,data = problem(n=12)
    data = [(o,t) for x,y in data for o,t in zip(x, y)]
    def learner(device, n):
        cb = L2SPFisherCallback(beta=1., fisher=fisher, anchor=theta0)
        return tuned_in_fastai(copy.deepcopy(model), cb, data, device, n, opt_func=opt_func, path=tmp_path)
    wanted = learner('cpu', 3)
    learner(device, 2).save('epoch-2')
    for where in (device, 'cpu'):
        learn = learner(where, 0).load('epoch-2')
        with learn.no_bar(), learn.no_logging(): learn.fit(3, 0.1, start_epoch=2)
        agree(dict(learn.model.named_parameters()), dict(wanted.model.named_parameters()), 1e-6)

@pytest.mark.parametrize('there', ['source','tuned','both'])
def test_merging(device, there):
    torch.manual_seed(0)
    source,tuned = small(),small()
    fishers = [estimate_fisher(o, batches(SHAPE), progress=False) for o in (source, tuned)]
    wanted = [merge(source, tuned, *fishers, beta=2., alpha=0.01), interpolate(source, tuned, 0.3)]
    if there!='tuned': source.to(device)
    if there!='source': tuned.to(device)
    found = [merge(source, tuned, *fishers, beta=2., alpha=0.01), interpolate(source, tuned, 0.3)]
    for a,b in zip(found, wanted): agree(a.state_dict(), b.state_dict())
    assert all(is_on_device(o)==(there!='source') for o in found)

# A device without float64, such as Apple's

@pytest.fixture
def without_float64(monkeypatch):
    monkeypatch.setattr('fgvc_fisher.distributed.sharded.WITHOUT_FLOAT64', {DEVICE.type})
    with pretend(float64=False) as device: yield device

@pytest.mark.parametrize('name', ['sampled', 'most of the mass', 'empirical', 'until precise'])
def test_fisher_without_float64(without_float64, name):
    data = batches(SHAPE, n=9, dtype=torch.float64 if name=='empirical' else torch.float32)
    agree(*on_both(small().float(), data, **KINDS[name]), 1e-5)

@pytest.mark.parametrize('name', ['strength', 'in bfloat16 on the CPU', 'explicit', 'without an anchor'])
def test_training_without_float64(without_float64, name, capsys): test_callback(without_float64, name, capsys)

def test_a_default_device_without_float64(without_float64, capsys):
    with torch.device(without_float64): test_callback(without_float64, 'all terms', capsys)

def test_the_rest_without_float64(without_float64):
    source,data = small().float(),batches(SHAPE, n_classes=4)
    fisher = estimate_fisher(source, data, progress=False)
    there = copy.deepcopy(source).to(without_float64)
    agree(merge(there, copy.deepcopy(there), fisher, fisher).state_dict(), source.state_dict())
    assert retention(there, source, data)==retention(source, source, data)
    assert QuadraticPenalty(there, source, fisher, strength=1.).table().moved.sum()==0
    fisher.check(there)

# What the tuned model still knows

@pytest.mark.parametrize('there', ['source','tuned','both'])
def test_retention(device, there):
    source,tuned,data = small(),small(),batches(SHAPE, n_classes=4)
    wanted = retention(tuned, source, data)
    if there!='tuned': source.to(device)
    if there!='source': tuned.to(device)
    assert retention(tuned, source, data)==wanted
    assert is_on_device(with_source_head(tuned, source, 'source'))==(there!='source')

@pytest.mark.parametrize('labels', ['with labels','labels on the device','no labels'])
@pytest.mark.parametrize('there', ['source','tuned','both'])
def test_comparison_with_the_source(device, there, labels):
    source,tuned,data = small(),small(),batches(SHAPE, n_classes=4)
    if labels=='no labels': data = [x for x,_ in data]
    wanted = compare_with_source(tuned, source, data)
    if there!='tuned': source.to(device)
    if there!='source': tuned.to(device)
    if labels=='labels on the device': data = [(x,y.to(device)) for x,y in data]
    assert compare_with_source(tuned, source, data)==pytest.approx(wanted, rel=1e-12)
    assert any('retention' in o for o in wanted)==(labels!='no labels')

def test_retention_while_training(device):
    source,data = small(),batches(SHAPE, n_classes=4, dtype=torch.float32)
    data = [(o,t) for x,y in data for o,t in zip(x, y)]
    pictures = batches(SHAPE, n_classes=4)
    def values(device):
        torch.manual_seed(0)
        return tuned_in_fastai(copy.deepcopy(source).float(), Retention(source, pictures), data, device).recorder.values
    assert torch.allclose(torch.tensor(values(device)), torch.tensor(values('cpu')), atol=1e-5)

@pytest.fixture
def by_default(device, monkeypatch):
    "The device, on which fastai and this package put things by default"
    for module in (fastai.torch_core, fgvc_fisher.data.loaders, fgvc_fisher.experiment.run):
        monkeypatch.setattr(module, 'default_device', lambda use=-1: device)
    return device

@pytest.mark.parametrize('transforms', ['plain','published','fastai'])
def test_batches_of_pictures(by_default, drawn, tiny_weights, transforms):
    "Bytes are normalised, mixed and erased on the device"
    def batch(device):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        dls = aircraft_dls(drawn, size=32, bs=4, num_workers=0, transforms=transforms)
        learn = aircraft_learner(dls.to(device), 'tiny:network', str(tiny_weights))
        return [*learn.dls.train.one_batch(), *learn.dls.valid.one_batch()]
    there,here = batch(by_default),batch('cpu')
    assert all(isinstance(o, Pretend) for o in there) and not any(isinstance(o, Pretend) for o in here)
    for a,b in zip(there, here): assert torch.allclose(a.cpu().float(), b.float(), atol=1e-5)

@pytest.mark.parametrize('recipe,step', [('one-cycle','prox'), ('published','published')])
def test_whole_runs(by_default, tiny_run, tmp_path, recipe, step, monkeypatch):
    "Interrupted after an epoch and resumed: the same result as on the CPU"
    run = replace(tiny_run, bs=8, recipe=recipe, step=step, epochs=2, **dict(beta=1e-5) if step=='published' else {})
    class Stop(Callback):
        def after_epoch(self): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): do_run(run, tmp_path/'there', cbs=[Stop()], quiet=True)
    found = do_run(run, tmp_path/'there', quiet=True)
    for module in (fastai.torch_core, fgvc_fisher.data.loaders, fgvc_fisher.experiment.run):
        monkeypatch.setattr(module, 'default_device', lambda use=-1: torch.device('cpu'))
    wanted = do_run(run, tmp_path/'here', quiet=True)
    assert found['last']==wanted['last'] and found['retention_target_bn']==wanted['retention_target_bn']

def test_recogniser(by_default, drawn, tiny_weights):
    picture = next(Path(drawn).rglob('*.jpg'))
    source = source_model('tiny:network', str(tiny_weights))
    def recognised(device):
        torch.manual_seed(0)
        learn = aircraft_learner(aircraft_dls(drawn, size=64, bs=4, num_workers=0).to(device), source)
        learn.model.to(device)
        return Recogniser(learn, source)(Image.open(picture))
    there,here = recognised(by_default),recognised('cpu')
    assert (there.seen==here.seen).all() and np.allclose(there.heat, here.heat, atol=1e-4)
    for name in ('variants','source'):
        pd.testing.assert_frame_equal(getattr(there, name), getattr(here, name), rtol=1e-4)

def test_shards(device, tmp_path):
    pictures = [(noise_png(seed), seed%4) for seed in range(6)]
    tars = [write_tar(tmp_path/f'{i}.tar', pictures[2*i:2*i+2]) for i in range(3)]
    def fisher(model, out):
        return shard_fisher(model, tar_shards(tars), out, kind='empirical', size=8, bs=2, quiet=True)
    model = small()
    agree(fisher(copy.deepcopy(model).to(device), tmp_path/'there'), fisher(model, tmp_path/'here'), 1e-6)

def noise_png(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (12,12,3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), 'PNG')
    return file.getvalue()

@pytest.mark.parametrize('n_out', [4,2])
def test_compromise(device, n_out):
    "The panel's merged models, whose pictures may be on either"
    source,tuned = small().float(),small().float()
    nn.init.normal_(tuned.layers[0].weight)
    tuned.head = nn.Linear(6,n_out)
    fishers = [{n: torch.rand_like(p) for n,p in o.named_parameters()} for o in (source,tuned)]
    data = [batches(SHAPE, n_classes=n, dtype=torch.float32) for n in (n_out,n_out,4)]
    def measured(device):
        there = [[(x.to(device),y.to(device)) for x,y in o] for o in data[:2]]
        return Compromise(*[copy.deepcopy(o).to(device) for o in (source,tuned)], *fishers, *there, data[2])
    here,there = [measured(o).measure_grid([0.,0.1], [0.,1.], progress=False) for o in ('cpu', device)]
    for k,v in here.grid.items():
        if k!='layers': assert np.allclose(there.grid[k].astype(float), v.astype(float), atol=1e-5), k

@pytest.mark.parametrize('options', [dict(kind='exact', mass=0.9), dict(target_error=0.9, half=True)])
def test_command(device, drawn_source, tiny_weights, tmp_path, options, capsys):
    for where in (device.type, 'cpu'):
        estimate_command('tiny:network', str(drawn_source), str(tmp_path/where), str(tiny_weights), size=32, bs=4,
                         device=where, **dict(n_images=4) | options)
    agree(*[DiagFisher.load(tmp_path/where) for where in (device.type, 'cpu')], 2e-3)

@pytest.mark.parametrize('head', ['target','source'])
def test_a_saved_model(without_float64, tmp_path, head):
    "Written from the device, with its temperature; read on the CPU"
    source = network(num_classes=4)
    tuned = remake_head(copy.deepcopy(source), 3)
    x,y = batches((6,3,32,32), dtype=torch.float32)[0]
    chosen = with_source_head(tuned, source) if head=='source' else tuned.eval()
    wanted = [temperature_on(tuned, [(x,y)]), chosen(x).detach()]
    temperature = temperature_on(tuned.to(without_float64), [(x,y)])
    logits = tuned(x.to(without_float64))
    assert fit_temperature(logits, y)==pytest.approx(temperature)==pytest.approx(wanted[0], rel=1e-4)
    save_model(tuned, source.to(without_float64), tmp_path/'model', list('abc'), temperature=temperature)
    back,classes,_ = load_model(tmp_path/'model', 'tiny:network', head)
    assert len(classes)==(4 if head=='source' else 3) and torch.allclose(back(x), wanted[1], atol=1e-5)

# What is made on the way is where it is needed

class OfItsOwn(Pooled):
    "Makes its new head as timm's networks did: on the CPU, in float32"
    def __init__(self): super().__init__(6, nn.Conv2d(3,6,3))
    def reset_classifier(self, n): self.head = nn.Sequential(nn.Linear(6,6), nn.Linear(6,n))

@pytest.mark.parametrize('dtype', [torch.float32,torch.float16])
@pytest.mark.parametrize('make', [
    OfItsOwn, squeezenet1_1, named('test_resnet'), named('test_vit'), named('levit_128s'),
    partial(timm.create_model, 'test_vit', num_classes=0), named('deit_tiny_distilled_patch16_224')])
def test_a_new_head(device, make, dtype):
    model = remake_head(make().to(device, dtype), 3)
    assert is_on_device(model) and {p.dtype for p in model.parameters()}=={dtype} and n_outputs(model)==3

@pytest.mark.parametrize('where', ['here','there'])
def test_a_default_device(device, where, tiny_weights, drawn, tmp_path):
    "As after `torch.set_default_device`"
    data,model = batches(SHAPE, n_classes=4),small()
    there = copy.deepcopy(model).to(device if where=='there' else 'cpu')
    wanted = {kind: estimate_fisher(model, data, kind, progress=False, target_error=0.9) for kind in KINDS_OF_FISHERS}
    source = source_model('tiny:network', str(tiny_weights))
    with torch.device(device):
        for kind in KINDS_OF_FISHERS:
            found = estimate_fisher(there, data, kind, progress=False, target_error=0.9)
            agree(found, wanted[kind])
            assert torch.allclose(found.moments, wanted[kind].moments)
        found.plot_enough()
        found.plot_histogram()
        penalty = QuadraticPenalty(there, model, found, strength=1., new=['head'])
        penalty.add_grad_()
        penalty.prox_(0.1)
        assert penalty.value().item()==0 and len(penalty.table())
        assert compare_with_source(there, model, data)['agreement_target_bn']==1
        DiagFisher.load(found.save(tmp_path/'f'), there)
    dls = aircraft_dls(drawn, size=64, bs=4, num_workers=0)
    learn = aircraft_learner(dls, source)
    picture = Image.open(next(Path(drawn).rglob('*.jpg')))
    wanted = Recogniser(learn, source)(picture)
    with torch.device(device):
        aircraft_learner(dls, source)
        assert Recogniser(learn, source)(picture).variants.equals(wanted.variants)

def test_a_learner_that_moves(device, capsys):
    "From the CPU to the device between two trainings, with the anchor of the first"
    model,theta0,fisher,data = problem(n=12)
    data = [(o,t) for x,y in data for o,t in zip(x, y)]
    def trained(*devices):
        learn = tuned_in_fastai(copy.deepcopy(model), L2SPFisherCallback(beta=1., fisher=fisher), data, 'cpu', 1)
        for device in devices:
            learn.dls.to(device)
            learn.model.to(device)
            learn.create_opt()                                     # whose momenta are on the other device
            with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.1)
        return learn
    there,here = trained(device, 'cpu', device),trained('cpu', 'cpu', 'cpu')
    agree(dict(there.model.named_parameters()), dict(here.model.named_parameters()), 1e-6)
    a,b = [o.table().moved.sum() for learn in (there,here) for o in learn.cbs if isinstance(o, L2SPFisherCallback)]
    assert a==pytest.approx(b)

def test_anchor_and_fisher_on_another_device(device):
    "Kept on the device for a model on the CPU"
    model,theta0,fisher,data = problem(n=12)
    other = copy.deepcopy(model)
    for o,where in ((model,None), (other,device)):
        steps(o, QuadraticPenalty(o, theta0, fisher, beta=3., l2sp=0.1, new=['3'], device=where), data)
    agree(dict(other.named_parameters()), dict(model.named_parameters()), 1e-6)

def test_weighted_classes(by_default, drawn, tiny_weights, capsys):
    loss = MixedCrossEntropy(weight=torch.tensor([1.,2.,3.,4.]))
    dls = aircraft_dls(drawn, size=32, bs=4, num_workers=0, transforms='published')
    learn = aircraft_learner(dls, 'tiny:network', str(tiny_weights), loss_func=loss)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert is_on_device(learn.model) and np.isfinite(learn.recorder.values[-1][0])

def test_exported(by_default, drawn, tiny_weights, tmp_path, capsys):
    dls = aircraft_dls(drawn, size=32, bs=4, num_workers=0)
    cb = L2SPFisherCallback(l2sp=0.1, new='fc')
    learn = aircraft_learner(dls, 'tiny:network', str(tiny_weights), cbs=cb, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    learn.export()
    back = load_learner(tmp_path/'export.pkl', cpu=True)
    picture = next(Path(drawn).rglob('*.jpg'))
    with learn.no_bar(), back.no_bar():
        assert torch.allclose(back.predict(picture)[2], learn.predict(picture)[2], atol=1e-5)
