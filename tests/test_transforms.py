"The paper's transforms are timm's own, number for number"
import numpy as np, pandas as pd, pytest, torch
from PIL import Image, ImageOps
from fastai.torch_core import set_seed
from fastai.vision.all import PILImage, TensorImage
from timm.data import Mixup, create_transform
from timm.data.random_erasing import RandomErasing
from torchvision.transforms import functional as pil
from fgvc_fisher.data import transforms
from fgvc_fisher.data import aircraft_dls, picture_dl, read_aircraft
from fgvc_fisher.data.transforms import MEAN, STD, TimmTransform, named_transforms

PUBLISHED = dict(input_size=299, is_training=True, scale=(0.08,1.), ratio=(3/4,4/3), hflip=0.5,
                 auto_augment='rand-m9-mstd0.5-inc1', interpolation='random', mean=MEAN, std=STD, normalize=False)

@pytest.fixture(scope='module')
def picture():
    rng = np.random.default_rng(3)
    return PILImage.create(Image.fromarray(rng.integers(0, 256, (9,13,3), np.uint8)).resize((700,480), Image.BICUBIC))

def seeded(tfm, seed, picture):
    "What a transform makes of a picture with this seed"
    set_seed(seed)
    return tfm(picture).as_subclass(torch.Tensor)

def posterize_12(image, bits):
    "`ImageOps.posterize` of an RGB picture as in Pillow 12: 0 bits give black"
    mask = ~(2**(8-bits)-1)
    return image.point([i & mask for i in range(256)]*3)

def posterize_13(image, bits):
    "As in Pillow 13"
    if bits<1: raise ValueError(f'bits={bits} must be between 1 and 8')
    return posterize_12(image, bits)

def test_posterize_12_is_pillows(picture):
    "For 1 to 8 bits with any version of Pillow, for 0 bits where Pillow allows it"
    for bits in range(9):
        try: expected = ImageOps.posterize(picture, bits)
        except ValueError:
            assert bits==0
            continue
        assert np.array_equal(np.array(posterize_12(picture, bits)), np.array(expected))

def published_pair():
    "The transforms of 'published' for training, ours and timm's own"
    return named_transforms('published', 299, True, 105).item[0], create_transform(**PUBLISHED)

@pytest.fixture
def same_kernel(monkeypatch):
    "Pillow's resizing in place of PyTorch's"
    monkeypatch.setattr(transforms, 'resize_picture', lambda img,size,how: pil.resize(img, size, how))

def test_published_training_is_timms(picture, monkeypatch, same_kernel):
    "Every pixel, for the same random numbers, with timm on Pillow 12"
    ours,theirs = published_pair()
    for seed in range(40):
        a = seeded(ours, seed, picture)
        with monkeypatch.context() as m:
            m.setattr(ImageOps, 'posterize', posterize_12)
            assert torch.equal(a, seeded(theirs, seed, picture))

@pytest.mark.parametrize('pillow', ['installed', posterize_13])
def test_posterized_to_no_bits(picture, monkeypatch, same_kernel, pillow):
    "The black picture of Pillow 12, with the installed Pillow and with one that refuses 0 bits"
    ours,theirs = published_pair()
    for o in (ours.tfm, theirs):
        augment, = [step for step in o.transforms if hasattr(step, 'ops')]
        op, = [op for op in augment.ops if op.name=='PosterizeIncreasing']
        op.magnitude,op.magnitude_std,op.prob = 10,0,1                # 0 bits, always
        augment.ops = [op]
    if pillow!='installed':
        monkeypatch.setattr(ImageOps, 'posterize', pillow)
        with pytest.raises(ValueError, match='bits=0'): theirs(picture)
    for seed in range(3):
        a = seeded(ours, seed, picture)
        with monkeypatch.context() as m:
            m.setattr(ImageOps, 'posterize', posterize_12)
            b = seeded(theirs, seed, picture)
        assert torch.equal(a, b) and not a.any()

@pytest.mark.parametrize('pillow', ['installed', posterize_13])
def test_other_levels_are_posterized_as_by_timm(picture, monkeypatch, pillow):
    from timm.data.auto_augment import posterize
    if pillow!='installed': monkeypatch.setattr(ImageOps, 'posterize', pillow)
    for bits in range(1, 9):
        ours,theirs = transforms._posterize(picture, bits),posterize(picture, bits)
        assert np.array_equal(np.array(ours), np.array(theirs))

def test_published_evaluation_is_timms(picture):
    theirs = create_transform(299, is_training=False, crop_pct=0.875, interpolation='bicubic', normalize=False)
    assert (named_transforms('published', 299, False, 105).item[0](picture).int()-theirs(picture)).abs().max()<=2

@pytest.mark.parametrize('kw', [
    dict(train=True, interpolation='bilinear'), dict(train=True, interpolation='bicubic'),
    dict(interpolation='bilinear'), dict(crop_mode='squash'), dict(crop_mode='border')])
def test_other_steps_are_timms_too(picture, kw):
    "What is replaced is the kernel alone, whatever timm is asked for"
    train = kw.get('train', False)
    given = {k: v for k,v in kw.items() if k!='train'}
    rest = dict(color_jitter=0.) if train else dict(crop_pct=0.875, interpolation='bicubic')
    ours,theirs = TimmTransform(96, **kw),create_transform(96, is_training=train, normalize=False, **rest | given)
    for seed in range(5):
        assert (seeded(ours, seed, picture).int()-seeded(theirs, seed, picture)).abs().max()<=2

def test_published_batch_is_timms():
    "Mixed, normalised, erased, in timm's order; targets of 105 outputs"
    from fastai.data.all import Pipeline, TensorCategory
    x = torch.randint(0, 256, (6,3,32,32), dtype=torch.uint8)
    y = torch.tensor([0,3,104,7,7,50])
    batch = Pipeline(named_transforms('published', 32, True, 105).batch)
    set_seed(5)
    a,p = batch((TensorImage(x.clone()), TensorCategory(y)))
    set_seed(5)
    b,q = Mixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=105)(x.float()/255, y)
    b = (b-torch.tensor(MEAN)[:,None,None])/torch.tensor(STD)[:,None,None]
    b = RandomErasing(0.5, mode='pixel', device='cpu')(b)
    a,p = [o.as_subclass(torch.Tensor) for o in (a, p)]
    assert torch.allclose(a, b, atol=1e-5) and torch.allclose(p, q)
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
    learn = aircraft_learner(dls, 'tiny:network', weights=None, n_out=9 if name=='published' else None)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)
    assert np.isfinite(learn.recorder.values[0][:2]).all()
    x,_ = dls.one_batch()
    assert x.shape==(4,3,32,32) and x.dtype==torch.float32
    if name!='published': assert -1.01<=x.min() and x.max()<=1.01
    learn.validate()
    learn.get_preds()

@pytest.fixture(scope='module')
def mixing(drawn):
    "A Learner whose training pictures are mixed, in batches that leave a rest without `drop_last`"
    from fgvc_fisher.learner import aircraft_learner
    dls = aircraft_dls(drawn, size=32, bs=6, transforms='published', num_workers=0)
    learn = aircraft_learner(dls, 'tiny:network', weights=None)
    with learn.no_bar(), learn.no_logging(): yield learn

def test_training_pictures_are_evaluated_unmixed(mixing):
    from fastai.interpret import ClassificationInterpretation
    n,c = len(mixing.dls.train.items),mixing.dls.c
    mixing.validate(ds_idx=0)
    probs,y = mixing.get_preds(ds_idx=0)
    assert n%6 and probs.shape==(n,c) and y.shape==(n,) and not y.is_floating_point()
    _,y,_,losses = mixing.get_preds(ds_idx=0, with_decoded=True, with_loss=True)
    assert y.shape==losses.shape==(n,)
    assert ClassificationInterpretation.from_learner(mixing, ds_idx=0).confusion_matrix().sum()==n

def test_metrics_of_mixed_pictures(mixing):
    "The class with the larger share is the one that a metric gets: in training, and for a batch that is mixed already"
    import matplotlib.pyplot as plt
    mixing.recorder.train_metrics = True
    mixing.fit(1, 0.01)
    mixing.recorder.train_metrics = False
    assert 0<=mixing.recorder.log[2]<=1
    batch = mixing.dls.train.one_batch()
    assert batch[1].shape==(6,mixing.dls.c)
    probs,_ = mixing.get_preds(dl=[batch])
    _,accuracy = mixing.validate(dl=[batch])
    assert accuracy==pytest.approx((probs.argmax(1)==batch[1].argmax(1)).float().mean().item())
    mixing.show_results(ds_idx=0)
    plt.close('all')

def test_show_batch_tells_both_labels(drawn):
    import matplotlib.pyplot as plt
    dls = aircraft_dls(drawn, size=64, bs=8, transforms='published', num_workers=0)
    set_seed(2)
    dls.show_batch(max_n=8)
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
    paths = [tmp_path/f'p/{i}.png' for i in range(24)]
    table = pd.DataFrame({'path': paths, 'label': pd.Categorical([i%8 for i in range(24)])})
    for x,y in picture_dl(table, 32, 4, True, 2): assert (255*x[:,0,16,16]/10).round().tolist()==y.tolist()
