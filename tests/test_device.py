"Every path that touches a device, on a pretended one: its numbers are the CPU's, and its tensors do not meet the CPU's"
import copy, warnings
import pytest, torch
from torch import nn
from torch.nn import functional as F
from fgvc_fisher.fisher import DiagFisher, estimate_fisher
from fgvc_fisher.fisher.per_image import PerImage
from pretend import DEVICE, Pretend, pretend
from test_fisher import (
    Branches, Pooled, Routed, SequenceFirst, Shared, TwoInputs, Uses, WAYS, Words, conv1ds, conv2ds, conv3ds, named,
    randomised
)

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
               lambda: there.lerp_(x, 0.5), lambda: torch.cat([there, x]), lambda: F.linear(x, there)]
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
    'standardised weights': (named('test_nfnet'), (2,3,64,64)),
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
