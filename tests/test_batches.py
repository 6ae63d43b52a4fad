"Batches as loaders of all kinds yield them, in the Fisher and in the retention"
from collections import UserDict, namedtuple
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader as FastaiLoader
from fastai.torch_core import TensorCategory, TensorImage
from torch import nn
from torch.utils.data import (
    BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, SubsetRandomSampler, TensorDataset,
    WeightedRandomSampler
)
from fgvc_fisher.data.batches import read_batch
from fgvc_fisher.fisher import estimate_fisher
from fgvc_fisher.retention import Retention, accuracy_on, compare_with_source, retention

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Flatten(), nn.Linear(48,7))
X,Y = torch.randn(5,3,4,4),torch.tensor([0,3,6,3,1])
Pair = namedtuple('Pair', 'label image')

ACCEPTED = {
    'tuple': (X,Y), 'list': [X,Y], 'three': (X,Y,torch.arange(5)), 'names too': (X,Y,list('abcde')),
    'dict': dict(image=X, label=Y), 'Hugging Face': UserDict(pixel_values=X, labels=Y),
    'capitals': dict(Image=X, Label=Y),
    'more in a dict': dict(x=X, y=Y, path=list('abcde')), 'named tuple': Pair(Y,X),
    'fastai': (TensorImage(X),TensorCategory(Y)),
    'arrays': (X.numpy(),Y.numpy()), 'float64': (X.double(),Y), 'half': (X.double().numpy(),Y.int()),
    'mirrored arrays': (X.flip(0).numpy()[::-1],Y.flip(0).numpy()[::-1]), 'list of labels': (X,Y.tolist()),
    'floats': (X,Y.float()), 'column': (X,Y[:,None]), 'column of floats': (X,Y[:,None].double()), 'bytes': (X,Y.byte()),
    'one-hot': (X,nn.functional.one_hot(Y, 7)), 'one-hot floats': (X,nn.functional.one_hot(Y, 7).float()),
    'one-hot booleans': (X,nn.functional.one_hot(Y, 7).bool()),
}
REFUSED = { # and what the sentence names
    'no labels': (X, 'no labels'), 'images alone in a tuple': ((X,), 'no labels'), 'None': ((X,None), 'no labels'),
    'dict without labels': (dict(image=X, name=list('abcde')), 'image, name'),
    'soft': ((X,torch.full((5,7), 1/7)), 'one-hot'), 'mixed': ((X,(Y,Y,0.3)), 'labels'),
    'several labels': ((X,torch.ones(5,7)), 'one-hot'), 'fractions': ((X,torch.rand(5)), 'whole'),
    'NaN': ((X,torch.full((5,), torch.nan)), 'whole'), 'infinite': ((X,torch.full((5,), torch.inf)), 'whole'),
    'strings': ((X,list('abcde')), 'labels'), 'three dimensions': ((X,Y[:,None,None]), r'\(5, 1, 1\)'),
    'dict of labels': ((X,dict(a=Y)), 'labels'),
}
ALWAYS_REFUSED = {
    'uint8': ((X.byte(),Y), 'uint8'),
    'whole pixels': ((X.long(),Y), 'int64'), 'array of bytes': ((X.byte().numpy(),Y), 'uint8'),
    'one label': ((X,Y[:1]), '5 images and 1 label'), 'ten labels': ((X,torch.cat([Y,Y])), '5 images and 10'),
    'four in an array': ((X,Y[:4].numpy()), '5 images and 4'), 'one-hot of ten': ((X,torch.eye(10)), '5 images and 10'),
    'a sample': ((X[0],3), 'DataLoader'), 'a sample of tensors': ((X[0],Y[0]), 'DataLoader'),
    'samples': ([(X[0],0),(X[1],3)], 'tuple'), 'list of images': ((list(X),Y), 'list'), 'a number': (3., 'float'),
    'a vector': (X[0,0,0], r'\(4,\)'), 'two images in a dict': (dict(image=X, x=X, label=Y), 'image and x'),
    'no images in a dict': (dict(label=Y), 'label'), 'empty': ((), 'empty'), 'a name': ('photo.jpg', 'str'),
    'None': (None, 'NoneType'), 'nested': (((X,X),Y), 'tuple'), 'array of names': ((np.array(['a','b']),Y), 'images'),
}

@pytest.mark.parametrize('name', ACCEPTED)
def test_accepted(name):
    x,y = read_batch(ACCEPTED[name], MODEL)
    assert torch.equal(x, X) and torch.equal(y, Y) and y.dtype==torch.long and type(x) is type(y) is torch.Tensor
    fisher,wanted = [estimate_fisher(MODEL, [o], 'empirical', progress=False) for o in (ACCEPTED[name],(X,Y))]
    assert torch.equal(fisher['1.weight'], wanted['1.weight'])
    assert accuracy_on(MODEL, [ACCEPTED[name]])==accuracy_on(MODEL, [(X,Y)])
    assert retention(MODEL, MODEL, [ACCEPTED[name]])==retention(MODEL, MODEL, [(X,Y)])

@pytest.mark.parametrize('name', REFUSED)
def test_labels_that_are_no_class_numbers(name):
    batch,match = REFUSED[name]
    with pytest.raises(ValueError, match=match): estimate_fisher(MODEL, [batch], 'empirical', progress=False)
    with pytest.raises(ValueError, match=match): accuracy_on(MODEL, [batch])
    assert estimate_fisher(MODEL, [batch], 'sampled', progress=False).n_images==5

@pytest.mark.parametrize('name', ALWAYS_REFUSED)
def test_refused(name):
    batch,match = ALWAYS_REFUSED[name]
    for labels in (True,False):
        with pytest.raises(ValueError, match=match): read_batch(batch, MODEL, labels)
    for kind in ('empirical','sampled'):
        with pytest.raises(ValueError, match=match): estimate_fisher(MODEL, [batch], kind, progress=False)

@pytest.mark.parametrize('labels', map(torch.tensor, [[0,3,7,3,1], [0,3,-1,3,1], [0.,-100.,6.,3.,1.]]))
def test_labels_outside_the_classes(labels):
    with pytest.raises(ValueError, match='7 classes'): estimate_fisher(MODEL, [(X,labels)], 'empirical', progress=False)
    with pytest.raises(ValueError, match='7 classes'): accuracy_on(MODEL, [(X,labels)])

class Stream(IterableDataset):
    def __iter__(self): return iter(TensorDataset(X, Y))
class Unsized:
    "Says that it has a length, and then has none"
    def __len__(self): raise NotImplementedError
    def __iter__(self): return iter([(X,Y)])
class Sized(Unsized):
    def __len__(self): return 1

LOADERS = {
    'stream': lambda: DataLoader(Stream(), 2), 'generator': lambda: (o for o in [(X,Y)]), 'zip': lambda: zip([X],[Y]),
    'map': lambda: map(lambda o: o, [(X,Y)]), 'unsized': Unsized, 'sized': Sized,
    'dicts': lambda: DataLoader([dict(image=x, label=int(y)) for x,y in zip(X,Y)], 3),
    'arrays': lambda: DataLoader(TensorDataset(X, Y), 5, collate_fn=lambda o: tuple(map(np.stack, zip(*o)))),
}
@pytest.mark.parametrize('name', LOADERS)
@pytest.mark.parametrize('progress', [True,False])
def test_loaders(name, progress):
    fisher = estimate_fisher(MODEL, LOADERS[name](), 'empirical', progress=progress)
    wanted = estimate_fisher(MODEL, [(X,Y)], 'empirical', progress=False)
    assert torch.allclose(fisher['1.weight'], wanted['1.weight'], rtol=1e-5) and fisher.n_images==5

def test_tokens_are_no_images():
    words = nn.Sequential(nn.Embedding(9,4), nn.Flatten(), nn.Linear(12,3))
    assert estimate_fisher(words, [torch.randint(9, (5,3))], progress=False).n_images==5

def test_a_mistake_is_noticed_before_much_is_computed():
    "A tuple of images and labels instead of a loader; a whole data set"
    with pytest.raises(ValueError, match='one batch'): estimate_fisher(MODEL, (X,Y), progress=False)
    with pytest.raises(ValueError, match='DataLoader'): estimate_fisher(MODEL, TensorDataset(X, Y), progress=False)

NO_BATCHES = {
    'folder': ('pictures', 'str'), 'path': (Path('pictures'), 'PosixPath|WindowsPath'), 'nothing': (None, 'NoneType'),
    'table': (pd.DataFrame(dict(path=['a.jpg'])), 'DataFrame'), 'dict': (dict(image=X, label=Y), 'dict'),
    'number': (3, 'int'), 'network': (MODEL, 'Sequential'), 'loaders': (DataLoaders(FastaiLoader([X])), 'dls.valid'),
}
READERS = [partial(estimate_fisher, MODEL), partial(accuracy_on, MODEL), partial(retention, MODEL, MODEL),
           partial(compare_with_source, MODEL, MODEL), lambda o: compare_with_source(MODEL, MODEL, [X], o),
           partial(Retention, MODEL)]
@pytest.mark.parametrize('name', NO_BATCHES)
def test_what_yields_no_batches(name):
    data,named = NO_BATCHES[name]
    for read in READERS:
        if data is None and read is READERS[4]: continue                       # `tuned_dl=None` is its default
        with pytest.raises(ValueError, match=named): read(data)

def test_a_generator_is_read_once():
    "A retention with one loader reads it twice, a `Retention` every epoch"
    def once(): return iter([(X,Y)])
    assert estimate_fisher(MODEL, once(), 'empirical', progress=False).n_images==5
    assert accuracy_on(MODEL, once())==accuracy_on(MODEL, [(X,Y)])
    assert retention(MODEL, MODEL, once(), once())==retention(MODEL, MODEL, [(X,Y)])
    assert compare_with_source(MODEL, MODEL, once())==compare_with_source(MODEL, MODEL, [(X,Y)])
    for refused in (lambda o: retention(MODEL, MODEL, o), lambda o: retention(MODEL, MODEL, o, o), READERS[-1]):
        with pytest.raises(ValueError, match='only once'): refused(once())

DATA = TensorDataset(X, Y)
SHUFFLED = {
    'PyTorch': DataLoader(DATA, 2, shuffle=True), 'seeded': DataLoader(DATA, 2, True, generator=torch.Generator()),
    'weighted': DataLoader(DATA, 2, sampler=WeightedRandomSampler(torch.ones(5), 5)),
    'some': DataLoader(DATA, 2, sampler=SubsetRandomSampler([0,1,2])),
    'batches': DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 2, False)),
    'fastai': FastaiLoader(DATA, bs=2, shuffle=True, num_workers=0),
}
IN_ORDER = {
    'PyTorch': DataLoader(DATA, 2), 'fastai': FastaiLoader(DATA, bs=2, num_workers=0), 'list': [(X,Y)],
    'batches': DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 2, False)),
}
@pytest.mark.parametrize('name', SHUFFLED)
def test_a_checkpoint_needs_the_same_order(name, tmp_path):
    "Without one a shuffled loader will do"
    assert estimate_fisher(MODEL, SHUFFLED[name], progress=False).n_images>=3
    with pytest.raises(ValueError, match='shuffling'):
        estimate_fisher(MODEL, SHUFFLED[name], checkpoint=tmp_path/'part', progress=False)

@pytest.mark.parametrize('name', IN_ORDER)
def test_a_loader_in_order(name, tmp_path):
    assert estimate_fisher(MODEL, IN_ORDER[name], checkpoint=tmp_path/'part', progress=False).n_images==5

@pytest.mark.parametrize('kind', ['sampled','exact','empirical'])
def test_one_logit(kind):
    with pytest.raises(ValueError, match='one logit.*two logits'):
        estimate_fisher(nn.Linear(4,1), [(torch.randn(5,4),torch.zeros(5))], kind, progress=False)
