"What the tests share: where the real photographs are, and models of every kind"
import importlib, os
from pathlib import Path
import pytest, timm, torch
from fastai.callback import fp16
from fastai.callback.fp16 import MixedPrecision
from safetensors.torch import save_file
from torch.amp import GradScaler, autocast
from pretend import pretend
from ray_cluster import ray_cluster  # noqa: F401, a fixture
from tiny import network

# Files whose tests need a shell, signals, /proc or forks: left out on Windows and macOS, where processes are spawned
POSIX = ['accelerator', 'archive', 'cluster', 'commands', 'docs', 'evidence', 'explore', 'hub', 'keep', 'live', 'loops',
         'pictures', 'processes', 'runs', 'sharded', 'shards', 'walkthrough']
def pytest_collection_modifyitems(items):
    items.sort(key=lambda o: o.path.stem!='test_walkthrough')    # long ones at the end would leave processes idle
    for o in items:
        if o.path.stem in [f'test_{name}' for name in POSIX]: o.add_marker('posix')

# A folder with data/ and weights/; CI sets it, elsewhere the tests that need photographs are skipped.
PHOTOS = os.environ.get('FGVC_FISHER_PHOTOS', '')

@pytest.fixture(scope='session')
def photos():
    if not PHOTOS: pytest.skip("FGVC_FISHER_PHOTOS is not set: no real photographs and weights here")
    if not (Path(PHOTOS)/'data').is_dir(): pytest.fail(f"FGVC_FISHER_PHOTOS={PHOTOS} has no folder data")
    return Path(PHOTOS)

@pytest.fixture(scope='session')
def drawn(tmp_path_factory):
    from fgvc_fisher.data.synthetic import draw_aircraft
    return draw_aircraft(tmp_path_factory.mktemp('drawn')/'aircraft', n_variants=4, n_per_split=4)

@pytest.fixture(scope='session')
def drawn_source(tmp_path_factory):
    from fgvc_fisher.data.synthetic import draw_source
    return draw_source(tmp_path_factory.mktemp('drawn')/'source', n_classes=4, n_per_split=4)

@pytest.fixture(scope='session')
def tiny_weights(tmp_path_factory):
    "A file of weights for `tiny.network`, as if it had been pretrained on `drawn_source`"
    file = tmp_path_factory.mktemp('weights')/'tiny.safetensors'
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(network(num_classes=4).state_dict(), file)
    return file

@pytest.fixture(scope='session')
def tiny_run(drawn, drawn_source, tiny_weights):
    "A whole run in about a second: L2-SP-Fisher, three epochs of four batches"
    from fgvc_fisher.experiment import Run
    return Run(drawn, 'L2-SP-Fisher, beta = 10', beta=10, arch='tiny:network', weights=str(tiny_weights),
               source=drawn_source, test='test', size=32, bs=4, epochs=3, num_workers=0)

@pytest.fixture(scope='session')
def tiny_done(tiny_run, tmp_path_factory):
    "The folder of `tiny_run` when it is done; its Fisher is in `sources` beside. To be read only"
    from fgvc_fisher.experiment import do_run
    out = tmp_path_factory.mktemp('done')
    do_run(tiny_run, out/'run', out/'sources', quiet=True)
    return out/'run'

@pytest.fixture
def unplaced_labels(monkeypatch):
    "Labels in `frontier` lie where they fall: `test_results` looks at that, and it takes seconds a picture"
    from fgvc_fisher.experiment import results
    monkeypatch.setattr(results, 'adjust_text', lambda *args, **kwargs: None)

@pytest.fixture
def device():
    "A pretended accelerator"
    with pretend() as device: yield device

def mobilenet(**kw):
    "MobileNet-v1 0.75 as its ImageNet weights in FGVC_FISHER_PHOTOS want it: depthwise and `Conv2dSame`"
    from timm.models.efficientnet import _gen_mobilenet_v1
    return _gen_mobilenet_v1('mobilenetv1_100', 0.75, pretrained=False, pad_type='same', bn_eps=1e-3, **kw)

@pytest.fixture(scope='session')
def mobilenet_075(photos):
    from fgvc_fisher.learner import source_model
    return source_model(mobilenet, photos/'weights/mobilenetv1_075_imagenet.safetensors')

def narrow_inception(**kw):
    "Inception-v4 with all its 449 parameters, by name, and a sixteenth of its channels"
    module = importlib.import_module('timm.models.inception_v4')
    with pytest.MonkeyPatch.context() as patch:
        full = module.ConvNormAct
        patch.setattr(module, 'ConvNormAct', lambda i, o, **conv: full(i if i==3 else i//16, o//16, **conv))
        model = timm.create_model('inception_v4', **kw)
    model.num_features //= 16
    model.reset_classifier(model.num_classes)
    return model

@pytest.fixture
def tilde(tmp_path, monkeypatch):
    "`~` is the test's own folder"
    for o in ('HOME','USERPROFILE'): monkeypatch.setenv(o, str(tmp_path))

@pytest.fixture
def autocast_on_cpu(monkeypatch):
    "fastai's mixed precision casts on the processor, not on CUDA"
    monkeypatch.setattr(fp16, 'autocast', lambda device, dtype: torch.autocast('cpu', dtype=dtype))

class OnCpu(MixedPrecision):
    "fastai's mixed precision, which knows CUDA alone, on a CPU"
    def before_fit(self):
        super().before_fit()
        dtype = dict(fp16=torch.float16, bf16=torch.bfloat16)[self.amp_mode.value]
        self.autocast,self.learn.scaler = autocast('cpu', dtype=dtype),GradScaler('cpu', **self.kwargs)
