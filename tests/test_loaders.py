"Loaders go to spawned workers, and a trained Learner takes pictures that are in no table"
import multiprocessing, pickle, shutil
from functools import partial
from io import BytesIO
from pathlib import Path
import numpy as np
import pandas as pd
import pytest, torch
from fastai.learner import load_learner
from fastai.vision.all import (
    CategoryBlock, DataBlock, DataLoaders, ImageBlock, MultiCategoryBlock, Normalize, PILImage, PILImageBW,
    RandomSplitter, RegressionBlock, Resize, TensorImage, get_image_files
)
from PIL import Image
from forks import context
from fgvc_fisher.data import aircraft_dls, folder_dls, table_dls
from fgvc_fisher.data.loaders import open_item
from fgvc_fisher.data.tables import read_aircraft
from fgvc_fisher.learner import aircraft_learner, source_dl, source_model

def same_batches(dl, other):
    "With the same random numbers, for crops and the order alike"
    def batches(o):
        o.rng.seed(0)
        torch.manual_seed(0)
        np.random.seed(0)
        return list(o)
    return all(torch.equal(a, b) for xy,uv in zip(batches(dl), batches(other)) for a,b in zip(xy, uv))

KINDS = {
    'plain': partial(aircraft_dls), 'published': partial(aircraft_dls, transforms='published'),
    'fastai': partial(aircraft_dls, transforms='fastai'), 'box': partial(aircraft_dls, box=True),
    'credit': partial(aircraft_dls, credit=4), 'cached': partial(aircraft_dls, cache=True),
    'family': partial(aircraft_dls, level='family'),
    'table': lambda path, **kw: table_dls(read_aircraft(path), **kw),
    'folders': lambda path, **kw: folder_dls(folders(path), **kw)}

def folders(tree):
    "The drawn pictures in a folder for each class"
    for row in read_aircraft(tree).itertuples():
        target = tree.parent/'folders'/row.label/Path(row.path).name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(Path(row.path).read_bytes())
    return tree.parent/'folders'

@pytest.fixture(scope='module')
def tree(tmp_path_factory):
    from fgvc_fisher.data.synthetic import draw_aircraft
    return draw_aircraft(tmp_path_factory.mktemp('loaders')/'aircraft', n_variants=4, n_per_split=4, size=64)

@pytest.mark.parametrize('kind,workers', [*((o,0) for o in KINDS), ('published',1), ('cached',1), ('fastai',1)])
def test_a_loader_can_be_pickled(kind, workers, tree):
    dls = KINDS[kind](tree, size=32, bs=4, num_workers=workers)
    learn = aircraft_learner(dls, 'tiny:network', None)
    for dl in (*dls.loaders, dls.test_dl([open_item(dls.valid.items[0])]), dls.valid.new(bs=3)):
        again = pickle.loads(pickle.dumps(dl))
        if not workers and kind!='published' and dl is not dls.train: assert same_batches(dl, again)
        assert again.dataset[0][0].shape==(3,32,32) if kind!='fastai' else again.dataset[0][0].shape[0]==3
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)
    for dl in dls.loaders: pickle.dumps(dl)

@pytest.mark.parametrize('transforms', ['plain', 'published', 'fastai'])
def test_a_source_loader_can_be_pickled(transforms, drawn_source):
    dl = source_dl(drawn_source, source_model('tiny:network', None), 32, bs=4, num_workers=0, transforms=transforms)
    assert same_batches(dl, pickle.loads(pickle.dumps(dl)))

@pytest.mark.slow
def test_workers_that_are_not_forked(tree, monkeypatch):
    "A fork server, Python 3.14's default, gets a pickled loader, as spawned workers on Windows and macOS do"
    monkeypatch.setattr(multiprocessing.context._default_context, '_actual_context', context())
    assert multiprocessing.get_start_method()!='fork'
    dls = aircraft_dls(tree, size=32, bs=4, transforms='published', cache=True, num_workers=1)
    learn = aircraft_learner(dls, 'tiny:network', None)
    assert sum(len(y) for x,y in learn.dls.train)==16

# Pictures in no table

def as_items(file):
    "The same picture in every form that is accepted"
    img = Image.open(file)
    pixels = np.array(img)
    return {
        'text': str(file), 'path': Path(file), 'bytes': file.read_bytes(), 'bytearray': bytearray(file.read_bytes()),
        'picture': img, 'fastai picture': PILImage.create(file), 'opaque': img.convert('RGBA'),
        'array': pixels, 'channels first': pixels.transpose(2,0,1), 'opaque array': np.array(img.convert('RGBA')),
        'reversed twice': np.ascontiguousarray(pixels[::-1])[::-1], 'tensor': torch.tensor(pixels),
        'tensor, channels first': torch.tensor(pixels).permute(2,0,1),
        'tensor image': TensorImage(torch.tensor(pixels).permute(2,0,1)),
        'series': pd.Series(dict(path=file, label='x'))}

@pytest.fixture(scope='module', params=['plain', 'published', 'fastai'])
def learn(request, tree):
    dls = aircraft_dls(tree, size=32, bs=4, transforms=request.param, num_workers=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        learn = aircraft_learner(dls, 'tiny:network', None)
    with learn.no_bar(), learn.no_logging(): yield learn

def test_predict_takes_every_form(learn):
    expected = learn.get_preds()[0][5]
    for name,item in as_items(Path(learn.dls.valid.items[5].path)).items():
        label,index,probs = learn.predict(item)
        assert torch.allclose(probs, expected, atol=1e-5), name
        assert label==learn.dls.vocab[index] and index==probs.argmax()

def test_predict_a_grey_picture(learn):
    img = Image.open(learn.dls.valid.items[5].path).convert('L')
    grey = np.array(img)
    expected = learn.predict(np.stack([grey]*3, 2))[2]
    for item in (img, grey, grey[:,:,None], grey[None], torch.tensor(grey), grey.astype(np.float32),
                 grey.astype(np.float32)/255, grey.astype(np.uint16)*257):
        assert torch.allclose(learn.predict(item)[2], expected, atol=1e-5)

NO_PICTURES = {
    'none': (None, TypeError, 'NoneType'), 'a number': (3, TypeError, 'int'), 'a dict': ({}, TypeError, 'dict'),
    'normalised': (torch.randn(3,8,8), ValueError, r'float32.*\(8, 8, 3\)'),
    'a batch': (torch.zeros(2,3,8,8), ValueError, '2, 3'),
    'two channels': (np.zeros((8,8,2), np.uint8), ValueError, '8, 8, 2'),
    'long': (torch.zeros(8,8).long(), ValueError, 'int64'),
    'nothing': (np.zeros((0,8,3), np.uint8), ValueError, '0, 8, 3'),
    'a vector': (np.zeros(8, np.uint8), ValueError, r'\(8,\)'),
    'no bytes': (b'', OSError, '0 bytes'), 'other bytes': (b'<html>', OSError, '6 bytes'),
    'no file': ('nowhere.jpg', FileNotFoundError, 'nowhere.jpg'), 'a folder': ('.', OSError, '')}
@pytest.mark.parametrize('kind', NO_PICTURES)
def test_no_picture(kind, learn):
    item,error,said = NO_PICTURES[kind]
    with pytest.raises(error, match=said): learn.predict(item)

def test_a_loader_of_files(learn):
    files = [str(o.path) for o in learn.dls.valid.items]
    dl = learn.dls.test_dl(files)
    predictions,targets = learn.get_preds(dl=dl)
    assert targets is None and len(predictions)==len(files)
    assert torch.allclose(predictions, learn.get_preds()[0], atol=1e-5)
    mixed = learn.dls.test_dl([files[0], Path(files[0]), np.array(Image.open(files[0]))], bs=2)
    assert torch.allclose(learn.get_preds(dl=mixed)[0], predictions[:1].expand(3,-1), atol=1e-5)

@pytest.mark.parametrize('as_items', [lambda dls, table: dls.valid.items, lambda dls, table: table])
def test_a_loader_with_labels(as_items, learn, tree):
    table = read_aircraft(tree)
    table = table[table.split=='val'].reset_index(drop=True)
    dl = learn.dls.test_dl(as_items(learn.dls, table), with_labels=True)
    predictions,targets = learn.get_preds(dl=dl)
    assert targets.tolist()==table.label.cat.codes.tolist()
    assert learn.validate(dl=dl)[1]==(predictions.argmax(1)==targets).float().mean()

def test_labels_of_files_are_unknown(learn):
    with pytest.raises(ValueError, match='with_labels=True.*label'):
        learn.get_preds(dl=learn.dls.test_dl([learn.dls.valid.items[0].path], with_labels=True))

def test_results_are_shown(learn):
    learn.show_results(max_n=2)
    assert len(learn.predict(learn.dls.valid.items[0], with_input=True))==4

def test_an_exported_learner_predicts(learn, tmp_path):
    file = learn.dls.valid.items[5].path
    learn.export(tmp_path/'learner.pkl')
    again = load_learner(tmp_path/'learner.pkl')
    with again.no_bar(), again.no_logging():
        for item in (str(file), BytesIO(Path(file).read_bytes()).getvalue()):
            assert torch.allclose(again.predict(item)[2], learn.predict(item)[2], atol=1e-5)
            assert again.predict(item)[0]==learn.predict(item)[0]
        assert again.get_preds(dl=again.dls.test_dl([file]*2))[0].shape==(2,4)

# The same checks and the same pictures, however a Learner comes to them

def test_loaders_that_a_learner_gets_later_are_normalised(tree):
    "As for progressive resizing"
    make = lambda size: folder_dls(folders(tree), size=size, bs=4, num_workers=0)
    learn = aircraft_learner(make(32), 'tiny:network', None)
    expected = learn.get_preds()[0]
    learn.dls = make(32)
    assert torch.equal(learn.get_preds()[0], expected)
    learn.dls = make(48)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)
    for dl in learn.dls.loaders: assert sum(isinstance(o, Normalize) for o in dl.after_batch.fs)==1

@pytest.mark.parametrize('transforms', ['plain', 'published', 'fastai'])
def test_time_augmentation_sees_other_crops(tree, transforms):
    dls = aircraft_dls(tree, size=32, bs=4, num_workers=0, transforms=transforms)
    learn = aircraft_learner(dls, 'tiny:network', None)
    with learn.no_bar(): augmented,plain = learn.tta(n=2, beta=0.)[0],learn.get_preds()[0]
    assert not torch.allclose(augmented, plain)
    with learn.no_bar(): assert torch.equal(learn.get_preds()[0], plain)

def listed(tree, *rows):
    "A CSV file of some pictures"
    file = tree.parent/'listed.csv'
    pd.DataFrame(rows, columns=['path','label','split']).to_csv(file, index=False)
    return file

def test_what_the_commands_refuse_the_loaders_refuse(tree, tmp_path):
    a,b,c,d = [str(o) for o in read_aircraft(tree).path[:4]]
    rest = [(c, 'x', 'val'), (d, 'y', 'val')]
    with pytest.raises(ValueError, match='same picture'):
        table_dls(listed(tree, (a,'x','train'), (b,'y','train'), (f'{Path(a).parent}/./{Path(a).name}','x','val')))
    shutil.copy(a, tmp_path/'copy.jpg')
    with pytest.raises(ValueError, match='same picture in two splits'):
        table_dls(listed(tree, (a,'x','train'), (b,'y','train'), (tmp_path/'copy.jpg','x','val'), *rest))
    with pytest.raises(ValueError, match='one class'):
        table_dls(listed(tree, (a,'x','train'), (c,'x','val')))
    (tmp_path/'one/a').mkdir(parents=True)
    shutil.copy(a, tmp_path/'one/a'), shutil.copy(b, tmp_path/'one/a')
    with pytest.raises(ValueError, match='one class'): folder_dls(tmp_path/'one')

@pytest.mark.parametrize('blocks,named', [
    ((ImageBlock(PILImageBW), CategoryBlock), '1 channels'), ((ImageBlock, MultiCategoryBlock), 'no class numbers'),
    ((ImageBlock, RegressionBlock), 'no class numbers')], ids=['grey', 'several', 'numbers'])
def test_dataloaders_of_another_kind(tree, blocks, named):
    get_y = dict(MultiCategoryBlock=lambda o: [o.stem[-1]], RegressionBlock=lambda o: float(len(o.stem)))
    block = DataBlock(blocks, get_items=get_image_files, splitter=RandomSplitter(seed=0), item_tfms=Resize(32),
                      get_y=get_y.get(blocks[1].__name__, lambda o: o.stem[-1]))
    dls = block.dataloaders(tree/'data/images', bs=4, num_workers=0)
    with pytest.raises(ValueError, match=named):
        learn = aircraft_learner(dls, 'tiny:network', None, n_out=9)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)

def test_loaders_that_are_not_fastais():
    data = [(torch.rand(3,32,32), 0) for _ in range(8)]
    for dls,n_out,named in ((DataLoaders.from_dsets(data, data, bs=4, device='cpu'), None, 'n_out'),
                            (DataLoaders(*[torch.utils.data.DataLoader(data)]*2), 2, 'fastai')):
        with pytest.raises(ValueError, match=named): aircraft_learner(dls, 'tiny:network', None, n_out=n_out)
