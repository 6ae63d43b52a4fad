"The paper's transforms are timm's own, number for number"
import random
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from fastai.torch_core import set_seed
from fastai.vision.all import PILImage, TensorImage
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import functional as pil
from fgvc_fisher.data import transforms
from fgvc_fisher.data import aircraft_dls, picture_dl, read_aircraft
from fgvc_fisher.data.transforms import MEAN, STD, TimmTransform, named_transforms

PUBLISHED = dict(input_size=299, is_training=True, scale=(0.08,1.), ratio=(3/4,4/3), hflip=0.5, auto_augment='rand-m9-mstd0.5-inc1',
                 interpolation='random', mean=MEAN, std=STD, normalize=False)

@pytest.fixture(scope='module')
def picture():
    rng = np.random.default_rng(3)
    return PILImage.create(Image.fromarray(rng.integers(0, 256, (9,13,3), np.uint8)).resize((700,480), Image.BICUBIC))

def test_published_training_is_timms(picture, monkeypatch):
    "With Pillow's resizing in place of PyTorch's, every pixel, for the same random numbers"
    monkeypatch.setattr(transforms, 'resize_picture', lambda img,size,how: pil.resize(img, size, how))
    ours,theirs = named_transforms('published', 299, True, 105).item[0],create_transform(**PUBLISHED)
    for seed in range(40):
        set_seed(seed); a = ours(picture)
        set_seed(seed); assert torch.equal(a.as_subclass(torch.Tensor), theirs(picture))

def test_published_evaluation_is_timms(picture):
    theirs = create_transform(299, is_training=False, crop_pct=0.875, interpolation='bicubic', normalize=False)
    assert (named_transforms('published', 299, False, 105).item[0](picture).int()-theirs(picture)).abs().max()<=2

@pytest.mark.parametrize('kw', [dict(train=True, interpolation='bilinear'), dict(train=True, interpolation='bicubic'), dict(interpolation='bilinear'),
                                dict(crop_mode='squash'), dict(crop_mode='border')])
def test_other_steps_are_timms_too(picture, kw):
    "What is replaced is the kernel alone, whatever timm is asked for"
    rest = dict(color_jitter=0.) if kw.get('train') else dict(crop_pct=0.875, interpolation='bicubic')
    theirs = create_transform(96, is_training=kw.get('train', False), normalize=False, **rest | {k: v for k,v in kw.items() if k!='train'})
    for seed in range(5):
        set_seed(seed); a = TimmTransform(96, **kw)(picture).int()
        set_seed(seed); assert (a-theirs(picture)).abs().max()<=2

def test_published_batch_is_timms():
    "Mixed, normalised, erased, in timm's order; targets of 105 outputs"
    from fastai.data.all import Pipeline, TensorCategory
    x,y = torch.randint(0, 256, (6,3,32,32), dtype=torch.uint8),torch.tensor([0,3,104,7,7,50])
    batch = Pipeline(named_transforms('published', 32, True, 105).batch)
    set_seed(5); a,p = batch((TensorImage(x.clone()), TensorCategory(y)))
    set_seed(5)
    b,q = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=105)(x.float()/255, y)
    b = (b-torch.tensor(MEAN)[:,None,None])/torch.tensor(STD)[:,None,None]
    b = RandomErasing(0.5, mode='pixel', device='cpu')(b)
    assert torch.allclose(a.as_subclass(torch.Tensor), b, atol=1e-5) and torch.allclose(p.as_subclass(torch.Tensor), q)
    assert p.shape==(6,105) and torch.allclose(p.sum(1), torch.ones(6))

def test_evaluation_is_not_mixed(drawn):
    dls = aircraft_dls(drawn, size=32, bs=4, transforms='published', num_workers=0)
    (x,y),(x2,_) = next(iter(dls.valid)),next(iter(dls.valid))
    assert y.shape==(4,) and y.dtype==torch.int64 and torch.equal(x, x2)
    raw = next(iter(aircraft_dls(drawn, size=32, bs=4, num_workers=0).valid))[0]
    assert torch.allclose(x, (raw-torch.tensor(MEAN)[:,None,None])/torch.tensor(STD)[:,None,None], atol=1e-5)

@pytest.mark.parametrize('name', ['published', 'plain', 'fastai'])
def test_every_name_trains(drawn, name):
    from fgvc_fisher.learner import aircraft_learner
    dls = aircraft_dls(drawn, size=32, bs=4, transforms=name, num_workers=0)
    learn = aircraft_learner(dls, 'test_resnet', weights=None, n_out=9 if name=='published' else None)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)
    assert np.isfinite(learn.recorder.values[0][:2]).all()
    x,_ = dls.one_batch()
    assert x.shape==(4,3,32,32) and x.dtype==torch.float32
    if name!='published': assert -1.01<=x.min() and x.max()<=1.01
    learn.validate(); learn.get_preds()

def test_show_batch_tells_both_labels(drawn):
    import matplotlib.pyplot as plt
    dls = aircraft_dls(drawn, size=64, bs=8, transforms='published', num_workers=0)
    set_seed(2); dls.show_batch(max_n=8)
    titles = [o.get_title() for o in plt.gcf().axes]
    plt.close('all')
    assert all(any(v in o for v in dls.vocab) for o in titles) and any('\n+ ' in o for o in titles)
    for o in titles: assert sum(int(p.split()[-2]) for p in o.split('\n')) in (99,100,101)

def test_odd_batch(drawn):
    with pytest.raises(ValueError, match=r"bs.*'published'.*\b5\b"):
        aircraft_dls(drawn, size=32, bs=5, transforms='published')
    with pytest.raises(ValueError, match="'autoaugment'.*published, plain, fastai"):
        aircraft_dls(drawn, size=32, bs=4, transforms='autoaugment')

@pytest.mark.parametrize('workers', [0, 2])
def test_same_seed_and_workers_same_batches(drawn, workers):
    def epochs(seed):
        set_seed(seed)
        dl = picture_dl(read_aircraft(drawn), 32, 8, True, workers, 'published')
        return [torch.cat([x for x,_ in dl]) for _ in range(2)]
    a,b,c = epochs(1),epochs(1),epochs(2)
    assert all(torch.equal(x, y) for x,y in zip(a, b)) and not torch.equal(a[0], a[1]) and not torch.equal(a[0], c[0])

def test_shuffled_labels_stay_with_their_pictures(tmp_path):
    "Each class has its own grey; it is found in every shuffled, cached, two-process batch"
    (tmp_path/'p').mkdir()
    for i in range(24): Image.new('RGB', (90,60), (10*(i%8),)*3).save(tmp_path/f'p/{i}.png')
    table = pd.DataFrame({'path': [tmp_path/f'p/{i}.png' for i in range(24)], 'label': pd.Categorical([i%8 for i in range(24)])})
    for x,y in picture_dl(table, 32, 4, True, 2): assert (255*x[:,0,16,16]/10).round().tolist()==y.tolist()
