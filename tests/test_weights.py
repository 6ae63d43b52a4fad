"Files of weights as others write them: what is read, and what is refused without being run"
import argparse, copy, os, pathlib, pickle
from functools import partial
import numpy as np
import pytest, timm, torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import Adam, OptimWrapper
from safetensors.torch import save_file, save_model
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel
from fgvc_fisher.learner import load_weights, n_outputs, source_model

def resnet(**kw): return timm.create_model('test_resnet', num_classes=6, **kw)

@pytest.fixture(scope='module')
def trained():
    "A network with weights and BatchNorm statistics of its own"
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = resnet()
        model(torch.randn(4, 3, 32, 32))
    return model.eval()

def is_same(model, other): return all(torch.equal(v, model.state_dict()[k]) for k,v in other.state_dict().items())
def prefixed(state, *prefixes): return {''.join(prefixes)+k: v for k,v in state.items()}

def uncounted(model): return {k: v for k,v in model.state_dict().items() if 'num_batches_tracked' not in k}

class Namespaced:
    "Values that a training script keeps beside the weights"
    def __init__(self, folder):
        self.values = dict(args=argparse.Namespace(lr=0.1, out=pathlib.Path('out'), betas=(0.9,0.99)), epoch=3,
            metric=np.float64(71.5), history=np.arange(3), device=torch.device('cpu'), seen={1,2}, name='resnet')

class Backbone(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.backbone = model

WRAPPED = {
    'itself': lambda m: m.state_dict(),
    'state_dict': lambda m: dict(state_dict=m.state_dict(), epoch=3),
    'model_state_dict': lambda m: dict(model_state_dict=m.state_dict(), optimizer=dict(state={0: m.fc.weight})),
    'model': lambda m: dict(model=m.state_dict()),
    'its own word': lambda m: dict(netG=m.state_dict()),
    'nested': lambda m: dict(checkpoint=dict(model=dict(weights=m.state_dict())), step=1),
    'values beside it': lambda m: dict(state_dict=m.state_dict(), **Namespaced(m).values),
    'parameters': lambda m: {k: nn.Parameter(v) if v.is_floating_point() else v for k,v in m.state_dict().items()},
    'half': lambda m: copy.deepcopy(m).half().state_dict(),
    'without counters': lambda m: uncounted(m),
    'module.': lambda m: nn.DataParallel(m).state_dict(),
    '_orig_mod.': lambda m: torch.compile(m).state_dict(),
    'module._orig_mod.': lambda m: dict(model=nn.DataParallel(torch.compile(m)).state_dict()),
    'model.': lambda m: dict(state_dict=prefixed(m.state_dict(), 'model.'), hyper_parameters=dict(lr=0.1)),
    '0.': lambda m: nn.Sequential(m).state_dict(),
    'backbone.': lambda m: Backbone(m).state_dict(),
    'three': lambda m: prefixed(m.state_dict(), 'module.', 'net.', '_orig_mod.'),
    'averaged': lambda m: AveragedModel(m).state_dict(),
    'ema': lambda m: dict(state_dict=resnet().state_dict(), state_dict_ema=ModelEmaV3(m).module.state_dict()),
    'ema without counters': lambda m: dict(state_dict=resnet().state_dict(), ema_state_dict=uncounted(m)),
    'another size': lambda m: dict(grey=resnet(in_chans=1).state_dict(), rgb=m.state_dict()),
    'another of its kind': lambda m: dict(discriminator=nn.Linear(3, 1).state_dict(), generator=m.state_dict()),
    'nested ema': lambda m: dict(model=resnet().state_dict(), model_ema=dict(decay=0.9, module=m.state_dict())),
}
@pytest.mark.parametrize('kind', WRAPPED)
@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
def test_what_is_read(kind, legacy, trained, tmp_path):
    torch.save(WRAPPED[kind](trained), tmp_path/'w.pth', _use_new_zipfile_serialization=not legacy)
    model = load_weights(resnet(), tmp_path/'w.pth')
    if kind!='half': assert all(torch.equal(p, q) for p,q in zip(model.parameters(), trained.parameters()))
    source = source_model('test_resnet', tmp_path/'w.pth')                 # takes the file's number of classes
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(source(x), trained(x), atol=1e-2 if kind=='half' else 0)

@pytest.mark.parametrize('suffix', ['.safetensors', '.pth', '.bin', '', '.SAFETENSORS', '.ckpt'])
@pytest.mark.parametrize('save', [save_file, torch.save], ids=['safetensors', 'torch'])
def test_the_suffix_does_not_matter(save, suffix, trained, tmp_path):
    save(trained.state_dict(), tmp_path/f'w{suffix}')
    assert is_same(load_weights(resnet(), str(tmp_path/f'w{suffix}')), trained)

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_any_floating_type(dtype, trained, tmp_path):
    save_file({k: v.to(dtype) if v.is_floating_point() else v for k,v in trained.state_dict().items()}, tmp_path/'w')
    loaded = load_weights(resnet(), tmp_path/'w')
    assert loaded.fc.weight.dtype==torch.float32
    assert torch.equal(loaded.fc.weight, trained.fc.weight.to(dtype).float())

def test_double_precision_stays(tmp_path):
    layer = nn.Linear(3, 2).double()
    torch.save(layer.state_dict(), tmp_path/'w.pth')
    assert torch.equal(load_weights(nn.Linear(3, 2).double(), tmp_path/'w.pth').weight, layer.weight)

@pytest.mark.parametrize('wrap', [nn.DataParallel, torch.compile, lambda m: nn.DataParallel(torch.compile(m))])
def test_into_a_wrapped_network(wrap, trained, tmp_path):
    save_file(trained.state_dict(), tmp_path/'w.safetensors')
    model = resnet()
    load_weights(wrap(model), tmp_path/'w.safetensors')
    assert is_same(model, trained)

@pytest.mark.parametrize('opt_func', [Adam, partial(OptimWrapper, opt=torch.optim.SGD)])
@pytest.mark.parametrize('with_opt', [True, False])
def test_fastais_save(opt_func, with_opt, trained, tmp_path):
    dls = DataLoaders(*(DataLoader([(torch.randn(3,32,32), k%6) for k in range(8)], bs=4) for _ in range(2)))
    learn = Learner(dls, copy.deepcopy(trained), CrossEntropyLossFlat(), opt_func=opt_func, path=tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)
    file = learn.save('fastai', with_opt=with_opt)
    assert is_same(load_weights(resnet(), file), learn.model.cpu())

def test_timms_checkpoint(trained, tmp_path):
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9)
    saver = CheckpointSaver(resnet(), optimizer, args=argparse.Namespace(model='test_resnet', output=tmp_path),
                            model_ema=ModelEmaV3(trained), checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=np.float64(50.))
    assert is_same(load_weights(resnet(), tmp_path/'last.pth.tar'), trained)          # the average, as timm does

def test_tied_weights(tmp_path):
    def tied():
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model[1].weight = model[0].weight
        return model
    model = tied()
    save_model(model, str(tmp_path/'w.safetensors'))                     # has one of the two names
    loaded = load_weights(tied(), tmp_path/'w.safetensors')
    assert torch.equal(loaded[1].weight, model[0].weight) and torch.equal(loaded[1].bias, model[1].bias)
    with pytest.raises(ValueError, match='missing'):
        load_weights(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), tmp_path/'w.safetensors')

# What does not fit is named
def renamed(state): return {k.replace('fc.', 'classifier.'): v for k,v in state.items()}
MISFITS = {
    'another head': (lambda m: prefixed(renamed(m.state_dict()), 'backbone.'), 'missing: fc.bias.*classifier'),
    'a loss': (lambda m: prefixed(m.state_dict(), 'a.') | {'loss.weight': torch.zeros(3)}, 'unknown: loss.weight'),
    'a missing layer': (lambda m: {k: v for k,v in m.state_dict().items() if k!='fc.bias'}, 'missing: fc.bias'),
    'another shape': (lambda m: m.state_dict() | {'fc.bias': torch.zeros(9)}, r'fc.bias \(9,\) instead of \(6,\)'),
    'another network': (lambda m: timm.create_model('test_vit').state_dict(), 'missing: bn1.bias'),
    'two that fit': (lambda m: dict(teacher=m.state_dict(), student=m.state_dict()), 'teacher.*student'),
    'two that do not': (lambda m: dict(a={'x': torch.zeros(1)}, b={'y': torch.zeros(1)}), 'missing: bn1.bias'),
    'no tensors': (lambda m: dict(epoch=3, state_dict={}), 'no tensors'),
    'a tensor': (lambda m: torch.zeros(3), 'no tensors'),
    'a list': (lambda m: list(m.state_dict().values()), 'no tensors'),
}
@pytest.mark.parametrize('kind', MISFITS)
def test_what_does_not_fit(kind, trained, tmp_path):
    make,said = MISFITS[kind]
    torch.save(make(trained), tmp_path/'w.pth')
    model = resnet()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=f'w.pth.*({said})'): load_weights(model, tmp_path/'w.pth')
    assert is_same(model, before)

class Evil:
    "Leaves a file when it is unpickled"
    def __init__(self, file): self.file = file
    def __reduce__(self): return os.system, (f'touch {self.file}',)
class EvilPath(Evil):
    def __reduce__(self): return pathlib.Path.write_text, (pathlib.Path(self.file), 'x')
class EvilExpression(Evil):
    def __reduce__(self): return eval, (f"open({self.file!r}, 'w')",)

@pytest.mark.parametrize('evil,named', [(Evil, 'system'), (EvilPath, 'getattr|write_text'), (EvilExpression, 'eval')])
@pytest.mark.parametrize('place', ['alone', 'beside', 'inside', 'in arguments'])
@pytest.mark.parametrize('legacy', [False, True], ids=['zip', 'legacy'])
def test_no_pickle_is_run(evil, named, place, legacy, trained, tmp_path):
    bad = evil(str(tmp_path/'ran'))
    content = {'alone': bad, 'beside': dict(state_dict=trained.state_dict(), epoch=bad),
               'inside': trained.state_dict() | {'fc.bias': bad},
               'in arguments': dict(model=trained.state_dict(), args=argparse.Namespace(out=bad))}[place]
    torch.save(content, tmp_path/'w.pth', _use_new_zipfile_serialization=not legacy)
    model = resnet()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=f'w.pth.*({named}).*any program') as e: load_weights(model, tmp_path/'w.pth')
    assert not (tmp_path/'ran').exists() and is_same(model, before) and '\n' not in str(e.value)

@pytest.mark.parametrize('protocol', range(6))
def test_a_bare_pickle(protocol, tmp_path):
    (tmp_path/'w.pkl').write_bytes(pickle.dumps(Evil(str(tmp_path/'ran')), protocol))
    with pytest.raises(ValueError, match='w.pkl'): load_weights(resnet(), tmp_path/'w.pkl')
    assert not (tmp_path/'ran').exists()

class KeepsNothing(Callback): pass

def test_an_exported_learner(drawn, tmp_path):
    from fgvc_fisher.data import aircraft_dls
    from fgvc_fisher.learner import aircraft_learner
    learn = aircraft_learner(aircraft_dls(drawn, size=32, bs=4, num_workers=0), 'test_resnet', None, cbs=KeepsNothing())
    learn.export(tmp_path/'export.pkl')
    with pytest.raises(ValueError, match='export.pkl.*Learner.*load_learner.*state_dict'):
        load_weights(resnet(), tmp_path/'export.pkl')

def test_a_pickled_network(trained, tmp_path):
    torch.save(trained, tmp_path/'whole.pth')
    with pytest.raises(ValueError, match='whole.pth.*timm.models.resnet.ResNet.*state_dict'):
        load_weights(resnet(), tmp_path/'whole.pth')

def test_what_torch_was_told_to_trust_stays(trained, tmp_path):
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([KeepsNothing])
    try:
        torch.save(dict(model=trained.state_dict(), args=argparse.Namespace()), tmp_path/'w.pth')
        load_weights(resnet(), tmp_path/'w.pth')
        assert set(torch.serialization.get_safe_globals())=={*before, KeepsNothing}
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    with pytest.raises(pickle.UnpicklingError): torch.load(tmp_path/'w.pth', weights_only=True)

def safetensors_bytes(model, folder):
    save_file(model.state_dict(), folder/'good.safetensors')
    return (folder/'good.safetensors').read_bytes()
FILES = {
    'empty': (lambda m, d: b'', 'empty'), 'one byte': (lambda m, d: b'x', 'neither'),
    'a page': (lambda m, d: b'<!DOCTYPE html> 404', 'neither'),
    'a pointer': (lambda m, d: b'version https://git-lfs.github.com/spec/v1', 'neither'),
    'json': (lambda m, d: b'{"a": 1}', 'neither'), 'nearly a header': (lambda m, d: b'12345678{', 'neither'),
    'truncated': (lambda m, d: safetensors_bytes(m, d)[:-100], 'neither'),
    'half a header': (lambda m, d: safetensors_bytes(m, d)[:50], 'neither'),
    'a zip': (lambda m, d: b'PK\x03\x04'+bytes(100), 'neither'),
}
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('kind', FILES)
def test_no_weights(kind, suffix, trained, tmp_path):
    make,said = FILES[kind]
    (tmp_path/f'w{suffix}').write_bytes(make(trained, tmp_path))
    with pytest.raises(ValueError, match=f'w{suffix}.*{said}') as e: source_model('test_resnet', tmp_path/f'w{suffix}')
    assert '\n' not in str(e.value)

def test_a_folder(tmp_path):
    with pytest.raises(ValueError, match='folder'): source_model('test_resnet', tmp_path)

@pytest.mark.parametrize('arch', ['deit_tiny_distilled_patch16_224', 'levit_128s', 'test_convnext', 'crossvit_9_240'])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_the_file_has_the_number_of_classes(arch, prefix, tmp_path):
    model = timm.create_model(arch, num_classes=7)
    save_file({prefix+k: v.clone() for k,v in model.state_dict().items()}, tmp_path/'w.safetensors')
    source = source_model(arch, tmp_path/'w.safetensors')
    assert n_outputs(source)==7 and is_same(source, model)
