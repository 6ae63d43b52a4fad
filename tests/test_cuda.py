"""What only a GPU can show: its kernels, its types, pinned memory, autocast with a scaler, compiled models, peak memory

    pytest -m cuda tests/test_cuda.py

All that can be tested without one is in `test_device`. These tests take some minutes on a card with 15 GB."""
import copy, gc, warnings
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import product
import numpy as np, pandas as pd, pytest, timm, torch
from PIL import Image
from fastai.callback.core import Callback
from torch import nn
from torch.nn import functional as F
from fgvc_fisher.callback import L2SPFisherCallback
from fgvc_fisher.data import aircraft_dls
from fgvc_fisher.experiment import do_run
from fgvc_fisher.experiment.paper import fit_published, published_learner
from fgvc_fisher.explore.recognise import Recogniser
from fgvc_fisher.fisher import estimate_fisher
from fgvc_fisher.learner import aircraft_learner, source_model
from fgvc_fisher.penalty import QuadraticPenalty
from fgvc_fisher.penalty.merging import merge
from fgvc_fisher.retention import Retention, retention
from test_device import CALLBACKS, PENALTIES, agree, batches, small, steps
from test_fisher import conv1ds, conv2ds, conv3ds, named, randomised
from test_loops import problem

DEVICE = 'cuda'
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')]

@pytest.fixture(autouse=True)
def in_float32():
    "Products of float32 in float32, and the same kernels each time"
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True): yield
    torch.set_float32_matmul_precision(precision)

# The Fisher

NETWORKS = {
    'convolutions': (conv2ds, (5,4,19,19)), 'in one dimension': (conv1ds, (5,4,31)), 'in three': (conv3ds, (3,4,5,5,5)),
    'inception_v4': (named('inception_v4'), (4,3,75,75)), 'resnet50': (named('resnet50'), (4,3,64,64)),
    'resnext50': (named('resnext50_32x4d'), (4,3,64,64)), 'mobilenetv3': (named('mobilenetv3_small_100'), (4,3,96,96)),
    'convnext': (named('convnext_atto', ls_init_value=0.5), (4,3,64,64)),
    'vit': (named('vit_tiny_patch16_224', img_size=64, init_values=0.5), (4,3,64,64))}

LAYOUTS = [torch.contiguous_format,torch.channels_last]

@cache
def on_the_cpu(name, dtype):
    "A network, its pictures, and its Fisher on the CPU; made once for both layouts"
    make,shape = NETWORKS[name]
    model,data = randomised(make()).to(dtype),batches(shape, dtype=dtype)
    return model,data,estimate_fisher(model, data, kind='empirical', progress=False)

HARD_SWISH = 1e-4 # PyTorch's multiplies by a sixth in float32 on a GPU, also in float64

@pytest.mark.parametrize('name,layout', [(name, layout) for name,(_,shape) in NETWORKS.items() for layout in LAYOUTS
                                         if len(shape)==4 or layout==torch.contiguous_format])
def test_rules_in_float64(name, layout):
    model,data,wanted = on_the_cpu(name, torch.float64)
    data = [(x.to(memory_format=layout),y) for x,y in data]
    there = copy.deepcopy(model).to(DEVICE, memory_format=layout)
    got = estimate_fisher(there, data, kind='empirical', progress=False)
    agree(got, wanted, HARD_SWISH if name=='mobilenetv3' else 1e-9)
    assert got.coverage().equals(wanted.coverage())

def as_a_whole(a, b):
    "The relative difference of two Fishers; single parameters may differ more"
    a,b = [torch.cat([v.flatten() for v in o.values()]) for o in (a, b)]
    return ((a-b).norm()/b.norm()).item()

@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('name', ['inception_v4','mobilenetv3','convnext','vit'])
def test_float32_and_its_layouts(name, layout):
    model,data,wanted = on_the_cpu(name, torch.float32)
    data = [(x.to(memory_format=layout),y) for x,y in data]
    there = copy.deepcopy(model).to(DEVICE, memory_format=layout)
    got = estimate_fisher(there, data, kind='empirical', progress=False)
    if name=='inception_v4': assert as_a_whole(got, wanted) < 1e-2             # its first layers' gradients are 1e-10
    else: agree(got, wanted, 1e-2)

@pytest.mark.parametrize('casts', [torch.float16,torch.bfloat16])
@pytest.mark.parametrize('name', ['resnet50','mobilenetv3','convnext','vit'])
def test_fisher_under_autocast(name, casts):
    make,shape = NETWORKS[name]
    model,data = randomised(make()).float().to(DEVICE),batches(shape, dtype=torch.float32)
    wanted = estimate_fisher(model, data, kind='empirical', progress=False)
    with torch.autocast(DEVICE, casts): got = estimate_fisher(model, data, kind='empirical', progress=False)
    assert as_a_whole(got, wanted) < 0.2

@pytest.mark.parametrize('name,precision', [*product(['resnet50','mobilenetv3','convnext','vit'],
                                                     ['TF32','float16','bfloat16']), ('inception_v4','TF32')])
def test_rounding_rejects_no_rule(name, precision):
    """As people start: with TF32 in convolutions, which is PyTorch's default, or under autocast. The gradients of a
    random Inception-v4 are too small for float16."""
    make,shape = NETWORKS[name]
    model,data = randomised(make()).float().to(DEVICE),batches(shape, dtype=torch.float32)
    casts = nullcontext() if precision=='TF32' else torch.autocast(DEVICE, getattr(torch, precision))
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True), casts, warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*one image at a time')
        estimate_fisher(model, data, kind='empirical', progress=False)
        assert torch.backends.cudnn.allow_tf32

@pytest.mark.parametrize('dtype', [torch.float16,torch.bfloat16])
@pytest.mark.parametrize('casts', [False,True])
def test_models_in_half_precision(dtype, casts):
    model,data = small().to(DEVICE, dtype),batches((8,3,16,16), dtype=torch.float32)
    with torch.autocast(DEVICE, dtype, enabled=casts):
        got = estimate_fisher(model, data, kind='exact', progress=False)
    agree(got, estimate_fisher(model.float(), data, kind='exact', progress=False), 0.1)

def test_a_compiled_model():
    model,data = small().to(DEVICE),batches((8,3,16,16))
    wanted = estimate_fisher(model, data, progress=False)
    agree(estimate_fisher(torch.compile(model), data, progress=False), wanted)

@pytest.mark.parametrize('bs', [8,32])
def test_the_memory_of_an_estimate(bs):
    "Inception-v4 at 299 pixels, beside its own forward and backward pass"
    def peak(f):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()-before
    model = timm.create_model('inception_v4', num_classes=10).to(DEVICE).eval()
    x,y = torch.randn(bs,3,299,299, device=DEVICE),torch.randint(10, (bs,), device=DEVICE)
    def plain():
        F.cross_entropy(model(x), y).backward()
        model.zero_grad(set_to_none=True)
    plain()                                                                     # loads its kernels
    assert peak(lambda: estimate_fisher(model, [(x,y)], progress=False)) < 2*peak(plain) + 2*2**30

# The penalty and trainings

@pytest.mark.parametrize('name', PENALTIES)
def test_penalty(name):
    model,theta0,fisher,data = problem(n=12)
    there = copy.deepcopy(model).to(DEVICE)
    penalties = [QuadraticPenalty(o, theta0, fisher, **PENALTIES[name] | dict(new=['3'])) for o in (model, there)]
    for o,penalty,where in zip((model, there), penalties, ('cpu', DEVICE)): steps(o, penalty, data, where)
    agree(dict(there.named_parameters()), dict(model.named_parameters()), 1e-5)
    if 'CPU' in name:
        assert all(v.is_pinned() for v in penalties[1].anchor.values()) and 'copied from cpu' in penalties[1].summary()

def test_many_bunches():
    "A network with hundreds of tensors, in float64, anchor and Fisher in pinned memory"
    model = timm.create_model('test_resnet', num_classes=5).double()
    theta0 = {n: p.detach()+0.1*torch.randn_like(p) for n,p in model.named_parameters()}
    fisher = {n: torch.rand_like(p) for n,p in theta0.items()}
    there = copy.deepcopy(model).to(DEVICE)
    for o in (QuadraticPenalty(m, theta0, fisher, 5e-4, 3., 0.02, device='cpu') for m in (model, there)):
        for _ in range(5):
            o.add_grad_()
            o.prox_(0.02)
    agree(dict(there.named_parameters()), dict(model.named_parameters()))
    for p,q in zip(model.parameters(), there.parameters()): assert torch.allclose(p.grad, q.grad.cpu(), rtol=1e-9)

def trained(drawn, source, fisher, device, name='all terms', half=False, n=2, **kw):
    "A Learner after some epochs"
    torch.manual_seed(0)
    dls = aircraft_dls(drawn, size=64, bs=4, num_workers=0).to(device)
    cb = L2SPFisherCallback(fisher=fisher, **CALLBACKS[name] | dict(anchor=source))
    learn = aircraft_learner(dls, source, cbs=cb, **kw)
    learn.model.to(device)
    if half: learn.to_fp16()
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 1e-3)
    return learn

@pytest.fixture
def source(tiny_weights): return source_model('tiny:network', str(tiny_weights))
@pytest.fixture
def fisher(source): return estimate_fisher(source, batches((4,3,64,64), dtype=torch.float32), progress=False)

@pytest.mark.parametrize('name', ['beta','all terms','explicit','in bfloat16 on the CPU','frozen statistics'])
@pytest.mark.parametrize('half', [False,True])
def test_mixed_precision_with_its_scaler(drawn, source, fisher, name, half, capsys):
    "Steps that the scaler skips leave the model where it was"
    learn = trained(drawn, source, fisher, DEVICE, name, half)
    assert all(p.isfinite().all() and p.dtype==torch.float32 for p in learn.model.parameters())
    assert learn.recorder.metric_names[3:6]==['accuracy','penalty','penalty_to_loss']
    assert np.isfinite(np.array(learn.recorder.values)[:,:2]).all()

def test_channels_last_and_compiled(drawn, source, fisher, capsys):
    learn = trained(drawn, source, fisher, DEVICE, n=1)
    learn.model = torch.compile(learn.model.to(memory_format=torch.channels_last))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert np.isfinite(learn.recorder.values[-1][:2]).all()

@pytest.mark.parametrize('half', [False,True])
def test_the_published_recipe_with_workers(drawn, tiny_weights, half):
    "Decoded in two processes, mixed and erased on the GPU"
    dls = aircraft_dls(drawn, size=64, bs=4, num_workers=2, transforms='published')
    assert dls.one_batch()[0].device.type==dls.one_batch()[1].device.type==DEVICE
    learn = published_learner(dls, 'tiny:network', str(tiny_weights))
    if half: learn.to_fp16()
    with learn.no_bar(), learn.no_logging(): fit_published(learn, 2)
    assert np.isfinite(np.array(learn.recorder.values)[:,:2].astype(float)).all()

@pytest.mark.parametrize('recipe,step', [('one-cycle','prox'), ('published','published')])
def test_runs_resume_to_the_bit(tiny_run, tmp_path, recipe, step):
    run = replace(tiny_run, recipe=recipe, step=step, **dict(beta=1e-5) if step=='published' else {})
    class Stop(Callback):
        def after_epoch(self):
            if self.epoch==1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): do_run(run, tmp_path/'a', cbs=[Stop()], quiet=True)
    a,b = do_run(run, tmp_path/'a', quiet=True),do_run(run, tmp_path/'b', quiet=True)
    assert a['last']==b['last'] and a['retention_target_bn']==b['retention_target_bn']
    assert torch.cuda.get_device_name() in a['machine']

# What uses the results

def test_retention_merging_and_recogniser(drawn, source, fisher, capsys):
    data = batches((4,3,64,64), n_classes=4, dtype=torch.float32)
    learn = trained(drawn, source, fisher, DEVICE, n=1)
    learn.add_cb(Retention(source, data))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    here = copy.deepcopy(learn.model).cpu()
    assert retention(learn.model, source, data)==pytest.approx(retention(here, source, data), abs=0.13)
    merged = [merge(source, o, fisher, fisher).state_dict() for o in (learn.model, here)]
    agree(*merged, 1e-5)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80,80,3), dtype=np.uint8))
    there = Recogniser(learn, source)(picture)
    learn.model,learn.dls = here,learn.dls.to('cpu')
    pd.testing.assert_frame_equal(Recogniser(learn, source)(picture).variants, there.variants, rtol=1e-2, atol=1e-3)
    assert isinstance(here, nn.Module) and there.heat.max()<=1
