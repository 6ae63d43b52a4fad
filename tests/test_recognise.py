"Uploaded files, maps of many kinds of networks, and models that are restored"
import io, random, shutil, struct, time, warnings, zlib
from concurrent.futures import ThreadPoolExecutor
import numpy as np, pandas as pd, pytest, timm, torch
from PIL import Image, ImageFile, features
from fastai.learner import load_learner
from fastai.vision.all import PILImage
from torch import nn
from torchvision.models import squeezenet1_1
from fgvc_fisher.data import aircraft_dls, folder_dls, read_aircraft, read_pictures
from fgvc_fisher.learner import aircraft_learner, remake_head, source_dl, source_model
from fgvc_fisher.data.pictures import resize_picture
from fgvc_fisher.experiment.paper import published_learner
from fgvc_fisher.explore.recognise import (
    Recognised, Recogniser, grad_cam, heat_picture, map_layer, read_kin, read_upload
)
from fgvc_fisher.retention import with_source_head
from conftest import mobilenet, narrow_inception

def saved(img, fmt='PNG', **kwargs):
    img.save(file := io.BytesIO(), fmt, **kwargs)
    return file.getvalue()

def noise(w=60, h=40, mode='RGB', seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h,w,3), dtype=np.uint8)).convert(mode)

def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
def flat_png(w, h):
    "A one-bit PNG, all black, without its pixels in memory"
    packer,rows = zlib.compressobj(9),b''
    for _ in range(h): rows += packer.compress(bytes(1+(w+7)//8))
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 1, 0, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n'+header+chunk(b'IDAT', rows+packer.flush())+chunk(b'IEND', b'')
def header_png(w, h):
    header = chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n'+header+chunk(b'IDAT', b'')

def refused(content, name='a.bin'):
    "What the page says; a warning would be an error"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(ValueError) as e: read_upload(content, name)
    said = str(e.value)
    assert said.startswith(name) and '\n' not in said and said[-1]!='.' and type(e.value) is ValueError
    return said

def read(content):
    "A picture that opens, without a warning"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        picture,note = read_upload(content, 'a')
    assert type(picture) is PILImage and picture.mode=='RGB'
    return picture,note

def ftyp(*brands): return struct.pack('>I', 12+4*len(brands))+b'ftyp'+brands[0]+bytes(4)+b''.join(brands[1:])+bytes(400)

UNREADABLE = {
    'empty': b'', 'pdf': b'%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj', 'heic': ftyp(b'heic', b'mif1', b'heic'),
    'broken avif': ftyp(b'avif', b'mif1'), 'video': ftyp(b'isom', b'mp42'), 'text': 'Größe,1\r\n\tx'.encode(),
    'eps': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n', 'zip': b'PK\3\4\x14\0',
    'start of a jpeg': b'\xff\xd8\xff\xe0\0\x10JF', 'sound': b'RIFF\x10\0\0\0WAVEfmt ',
    'noise': random.Random(0).randbytes(3000), 'xbm': saved(noise(mode='1'), 'XBM'), 'one byte': b'\xff'}

@pytest.mark.parametrize('kind', UNREADABLE)
def test_what_is_no_picture(kind):
    assert 'cannot be read' in refused(UNREADABLE[kind])

def test_too_small():
    for w,h in ((15,400), (400,15), (1,1)): assert f'{w} x {h}' in refused(saved(noise(w, h)))
    assert read(saved(noise(16,16)))[0].size==(16,16)

TOO_LARGE = {
    '100 megapixels': flat_png(10_000, 10_000), 'error of Pillow': header_png(30_000, 30_000),
    'warning of Pillow': header_png(10_000, 9_500), 'greatest': header_png(2**31-1, 2**31-1),
    'just above': header_png(50_001, 1000)}

@pytest.mark.parametrize('content', TOO_LARGE.values(), ids=TOO_LARGE)
def test_too_large_is_never_decoded(content, monkeypatch):
    def load(self): raise AssertionError('decoded')
    monkeypatch.setattr(ImageFile.ImageFile, 'load', load)
    assert '50 million' in refused(content)
    assert len(content)<100_000

def test_large_screen_of_a_gif():
    gif = bytearray(saved(noise(), 'GIF'))
    gif[6:10] = struct.pack('<HH', 60_000, 60_000)
    assert '50 million' in refused(bytes(gif))

def test_50_megapixels_open(): assert read(flat_png(10_000, 5_000))[0].size==(10_000,5_000)

def test_very_long():
    assert read(flat_png(200_000, 16))[0].size==(200_000,16)
    assert read(flat_png(16, 200_000))[0].size==(16,200_000)

@pytest.mark.parametrize('fmt', ['JPEG','PNG','WEBP','GIF','BMP','TIFF'])
def test_truncated(fmt):
    content = saved(noise(), fmt)
    for part in (0.5, 0.9): assert 'cannot be read' in refused(content[:int(len(content)*part)])
    for i in range(1, len(content), 61):
        try: read_upload(content[:i], 'a')
        except ValueError as e: assert str(e).startswith('a ')

@pytest.mark.parametrize('fmt,kwargs', [
    ('JPEG', {}), ('JPEG', dict(progressive=True, exif=True)), ('PNG', {}), ('WEBP', {}), ('GIF', {}), ('BMP', {}),
    ('TIFF', dict(compression='tiff_lzw'))])
def test_any_damage_is_a_value_error(fmt, kwargs):
    "Bytes changed, inserted and left out at random, mostly in the first part"
    rng = random.Random(fmt)
    if kwargs.get('exif'):
        kwargs = kwargs | dict(exif=(exif := Image.Exif()))
        exif[0x0112],exif[0x010e] = 6,'x'*40
    whole = saved(noise(), fmt, **kwargs)
    opened = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(rng.choice((1,2,8,40))):
            i = rng.randrange(rng.choice((30, 200, len(content))))
            content[i:i+rng.choice((0,1,1,1,4))] = rng.randbytes(rng.choice((0,1,1,1,4)))
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            try: opened += read_upload(content, 'a')[0].mode=='RGB'
            except ValueError as e: assert str(e).startswith('a ') and type(e) is ValueError
    assert opened>0

def test_transparent():
    rgba = np.zeros((20,30,4), np.uint8)
    rgba[:,:15] = 200,0,0,255
    rgba[:,15:] = 0,0,0,0
    rgba[0,29] = 0,0,0,128
    img = Image.fromarray(rgba)
    picture,note = read(saved(img))
    assert 'white' in note
    assert [picture.getpixel(o) for o in ((0,0), (20,5))]==[(200,0,0), (255,255,255)]
    assert 125<=picture.getpixel((29,0))[0]<=129
    grey,note = read(saved(img.convert('LA')))
    assert note and grey.getpixel((20,5))==(255,255,255) and grey.getpixel((0,0))[0]<100
    for fmt,kwargs in (('GIF', {}), ('WEBP', dict(lossless=True))):
        assert read(saved(img, fmt, **kwargs))[0].getpixel((20,5))==(255,255,255)

def test_transparent_palette():
    p = Image.new('P', (20,20), 1)
    p.putpalette([0,0,0, 0,0,200, 9,9,9]+[0]*759)
    p.paste(2, (0,0,5,20))
    for transparency in (2, bytes([255,255,0])):                      # one colour, and a list of them
        picture,note = read(saved(p, transparency=transparency))
        assert note and picture.getpixel((0,0))==(255,255,255) and picture.getpixel((19,0))==(0,0,200)

def test_opaque_says_nothing():
    for mode in ('RGBA','LA','RGB','L','P','1'):
        picture,note = read(saved(noise(mode='L').convert(mode)))
        assert note=='' and picture.size==(60,40)

@pytest.mark.parametrize('fmt', ['JPEG','PNG','WEBP','TIFF'])
def test_upright(fmt):
    "A telephone notes how it was held"
    t = Image.Transpose
    turned = {2: t.FLIP_LEFT_RIGHT, 3: t.ROTATE_180, 4: t.FLIP_TOP_BOTTOM, 5: t.TRANSPOSE,
              6: t.ROTATE_270, 7: t.TRANSVERSE, 8: t.ROTATE_90}
    kwargs = dict(JPEG=dict(quality=95, subsampling=0), WEBP=dict(lossless=True)).get(fmt, {})
    img = noise(4,3).resize((64,48), Image.Resampling.NEAREST)
    for orientation,how in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture,note = read(saved(img, fmt, exif=exif, **kwargs))
        right = np.asarray(img.transpose(how), int)
        assert picture.size==right.shape[1::-1] and abs(np.asarray(picture)-right).mean()<6 and note==''

@pytest.mark.parametrize('note', [b'Exif\0\0rubbish', b'Exif\0\0M\xbd\0*\0\0\0\x08',
                                  b'Exif\0\0MM\0*\0\0\0\x08\xff\xff'+bytes(40)])
def test_a_broken_note_on_a_whole_picture(note):
    for fmt in ('JPEG','PNG','WEBP'): assert read(saved(noise(), fmt, exif=note))[0].size==(60,40)

def test_grey_of_16_bits_is_scaled():
    a = np.linspace(0, 65535, 40*20).reshape(20,40).astype(np.uint16)
    for fmt in ('PNG','TIFF'):
        picture,_ = read(saved(Image.fromarray(a), fmt))
        assert abs(np.asarray(picture)[...,0]-a/257).max()<=1
    signed,_ = read(saved(Image.fromarray(a.astype(np.int32)*9), 'TIFF'))
    real,_ = read(saved(Image.fromarray(a.astype(np.float32)/65535-0.5), 'TIFF'))
    for picture in (signed, real): assert abs(np.asarray(picture)[...,0]-a/257).max()<=1
    assert np.asarray(read(saved(Image.fromarray(np.full((20,20), np.nan, np.float32)), 'TIFF'))[0]).max()==0

def test_other_modes():
    cmyk,_ = read(saved(Image.new('CMYK', (20,20), (0,255,255,0)), 'JPEG'))
    assert cmyk.getpixel((5,5))[0]>200 and max(cmyk.getpixel((5,5))[1:])<60
    bits = noise(mode='1')
    assert np.array_equal(np.asarray(read(saved(bits))[0])[...,0], np.asarray(bits)*255)

@pytest.mark.parametrize('fmt', ['GIF','WEBP','PNG','TIFF'])
def test_first_frame(fmt):
    frames = [Image.new('RGB', (30,20), o) for o in ((200,0,0), (0,200,0), (0,0,200))]
    picture,note = read(saved(frames[0], fmt, save_all=True, append_images=frames[1:]))
    assert 'first' in note
    assert picture.getpixel((3,3))[0]>190 and picture.getpixel((3,3))[1]<10

def test_a_telephones_two_pictures():
    "An MPO is a JPEG with another behind it, of which nobody knows"
    picture,note = read(saved(noise(), 'MPO', save_all=True, append_images=[noise(seed=1)]))
    assert picture.size==(60,40) and note==''

@pytest.mark.skipif(not features.check('avif'), reason='this Pillow has no AVIF')
def test_avif(monkeypatch):
    content = saved(noise(), 'AVIF')
    assert read(content)[0].size==(60,40)
    monkeypatch.delitem(Image.OPEN, 'AVIF')
    assert 'cannot be read' in refused(content)

def test_heic_where_something_reads_it(monkeypatch):
    "Such as pillow-heif"
    plugin = (lambda fp, name: Image.open(io.BytesIO(saved(noise()))), lambda head: head[4:12]==b'ftypheic')
    monkeypatch.setitem(Image.OPEN, 'HEIF', plugin)
    monkeypatch.setattr(Image, 'ID', [*Image.ID, 'HEIF'])
    assert read(ftyp(b'heic', b'mif1'))[0].size==(60,40)

def test_programs_are_not_started(monkeypatch):
    "PostScript that Pillow would hand to Ghostscript"
    import subprocess
    def run(*args, **kwargs): raise AssertionError('started')
    for o in ('check_call','run','Popen'): monkeypatch.setattr(subprocess, o, run)
    refused(saved(noise(), 'EPS'))

def test_foreign_names():
    with pytest.raises(ValueError, match=r'^<b>x</b>\.png '): read_upload(b'', '<b>x</b>.png')
    with pytest.raises(ValueError) as e: read_upload(b'', 'long '*9000+'\n\r\u2028\u202e\0.jpeg')
    assert len(str(e.value))<150 and str(e.value).isprintable() and '.jpeg ' in str(e.value)
    for name in ('', ' \n'):
        with pytest.raises(ValueError, match='This file'): read_upload(b'', name)

def test_memoryview(): assert read(memoryview(saved(noise())))[0].size==(60,40)

def test_warnings_of_others_stay():
    "Read in many threads; the filters are afterwards as they were"
    before = list(warnings.filters)
    def one(i):
        try: return read_upload((saved(noise()), header_png(10_000, 9_500))[i%2], 'a')[0].size
        except ValueError: return None
    with ThreadPoolExecutor(8) as pool: sizes = list(pool.map(one, range(64)))
    assert sizes==[(60,40), None]*32 and warnings.filters==before

def test_one_file_at_a_time(monkeypatch):
    "Or threads would put back each other's filters of warnings"
    inside,most,opener = [],[],Image.open
    def slow(*args, **kwargs):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        return opener(*args, **kwargs)
    monkeypatch.setattr(Image, 'open', slow)
    with ThreadPoolExecutor(4) as pool: list(pool.map(lambda _: read_upload(saved(noise()), 'a'), range(8)))
    assert most==[1]*8

# The map

def by_hand(maps, rest, x, target):
    "Grad-CAM from its formula: `maps` makes A from x, `rest` the logits from A"
    with torch.no_grad(): A = maps(x)
    A.requires_grad_()
    w = torch.autograd.grad(rest(A.clone())[:,target].sum(), A)[0].mean((2,3), keepdim=True)
    L = nn.functional.interpolate((w*A).sum(1, keepdim=True).relu().detach(), size=x.shape[2:], mode='bilinear')[:,0]
    return L/L.amax((1,2), keepdim=True).clamp(min=1e-300)

def squeezenet(): return squeezenet1_1(num_classes=10)
def timm_halves(m): return m.forward_features, m.forward_head
def squeezenet_halves(m): return lambda x: m.classifier[:3](m.features(x)), lambda A: A.mean((2,3))
def inception_halves(m): return m.features[:18], lambda A: m.forward_head(m.features[18:](A))
def resnet_halves(m):
    stem = nn.Sequential(m.conv1, m.bn1, m.act1, m.maxpool)
    return lambda x: m.layer3(m.layer2(m.layer1(stem(x)))), lambda A: m.forward_head(m.layer4(A))

NETS = {
    'test_resnet': ('test_resnet', 96, timm_halves, 'layer4'),
    'test_resnet, small': ('test_resnet', 32, resnet_halves, 'layer3'),
    'inception_v4': (narrow_inception, 139, timm_halves, 'features'),
    'inception_v4, small': (narrow_inception, 75, inception_halves, 'features.17'),
    'mobilenet': (mobilenet, 96, timm_halves, 'bn2'), 'squeezenet': (squeezenet, 96, squeezenet_halves, 'classifier.2'),
    'test_efficientnet': ('test_efficientnet', 96, timm_halves, None),
    'test_convnext': ('test_convnext', 96, timm_halves, None),
    'test_byobnet': ('test_byobnet', 96, timm_halves, None)}

@pytest.mark.parametrize('net', NETS)
def test_the_map_is_that_of_the_formula(net):
    make,size,halves,name = NETS[net]
    torch.manual_seed(0)
    model = (timm.create_model(make, num_classes=10) if isinstance(make, str) else make()).double().eval()
    x = torch.randn(2, 3, size, size, dtype=torch.double)
    layer = map_layer(model, x)
    if name: assert layer is model.get_submodule(name)
    there = 0
    for target in range(4):
        right,heat = by_hand(*halves(model), x, target),grad_cam(model, x, layer, target)
        assert heat.shape==(2,size,size) and torch.allclose(heat, right, atol=1e-9)
        assert set(heat.amax((1,2)).tolist())<={0.,1.} and heat.min()>=0
        there += (heat.amax((1,2))>0).sum()
    assert there>0

def test_no_map():
    x = torch.randn(1, 3, 160, 160)
    for fused in (True, False):
        timm.layers.set_fused_attn(fused)
        try: assert map_layer(timm.create_model('test_vit'), x) is None
        finally: timm.layers.set_fused_attn(True)
    small = dict(img_size=64, embed_dim=8, depths=(1,1), num_heads=(1,1), window_size=4, num_classes=3)
    swin = timm.models.swin_transformer.SwinTransformer(**small)
    assert map_layer(swin, torch.randn(1,3,64,64)) is None                             # channels come last
    assert map_layer(nn.Sequential(nn.Flatten(), nn.Linear(12,2)), torch.randn(1,3,2,2)) is None

def test_a_layer_that_is_used_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b,self.act,self.head = nn.Conv2d(3,4,3),nn.Conv2d(4,5,3),nn.ReLU(inplace=True),nn.Linear(5,2)
        def forward(self, x): return self.head(self.act(self.b(self.act(self.a(x)))).mean((2,3)))
    model,x = Twice().double(),torch.randn(1,3,9,9).double()
    layer = map_layer(model, x)
    assert layer is model.act
    for target in range(2):
        right = by_hand(lambda x: model.b(model.a(x).relu()).relu(), lambda A: model.head(A.mean((2,3))), x, target)
        assert torch.allclose(grad_cam(model, x, layer, target), right)

def test_nothing_speaks_for_it():
    model = nn.Sequential(nn.Conv2d(3,4,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4,2)).eval()
    nn.init.constant_(model[4].weight, -1.)
    x = torch.randn(1,3,9,9)
    assert grad_cam(model, x, map_layer(model, x), 0).abs().sum()==0
    nn.init.constant_(model[4].weight, float('nan'))
    assert grad_cam(model, x, map_layer(model, x), 0).abs().sum()==0

# The recogniser

def a_learner(tree, arch='test_resnet', size=64, make=aircraft_learner, level='variant', **kwargs):
    dls = {k: kwargs.pop(k) for k in ('transforms','box','credit') if k in kwargs}
    torch.manual_seed(0)
    return make(aircraft_dls(tree, level, size=size, bs=4, num_workers=0, **dls), arch, None, **kwargs)

@pytest.fixture(scope='module')
def photo(drawn): return PILImage.create(read_aircraft(drawn).path[3])

@pytest.fixture
def learn(drawn): return a_learner(drawn)

def softened(source):
    "Random weights say the same of everything; these do not"
    torch.manual_seed(1)
    with torch.no_grad():
        for p in source.parameters(): p.add_(0.3*torch.randn_like(p)*(p.std() if p.numel()>1 else 0))
    return source

def test_fastais_predict(drawn, photo):
    for kwargs in (dict(), dict(transforms='published', make=published_learner), dict(transforms='fastai'),
                   dict(box=True), dict(credit=20), dict(level='family'), dict(size=47)):
        learn = a_learner(drawn, **kwargs)
        for img in (photo, PILImage.create(noise(90,200)), PILImage.create(noise(40,30))):
            got = Recogniser(learn)(img)
            with learn.no_bar(): label,_,p = learn.predict(img)
            assert got.variants.label[0]==label and got.variants.probability.is_monotonic_decreasing
            p = dict(zip(learn.dls.vocab, p.tolist()))
            assert np.allclose([p[o] for o in got.variants.label], got.variants.probability, atol=1e-6)

def test_seen_is_what_timm_would_show(learn, photo):
    tfm = timm.data.create_transform(64, crop_pct=0.875, interpolation='bicubic', normalize=False)
    seen = Recogniser(learn)(photo).seen
    assert seen.dtype==np.uint8 and seen.shape==(64,64,3)
    assert abs(seen.astype(int)-tfm(photo).permute(1,2,0).numpy()).max()<=2           # Pillow rounds in between

def test_modes_without_read_upload(learn):
    "16 bits and floats are scaled, transparency is white, a turned picture is upright, as in an upload"
    recogniser,grey = Recogniser(learn),noise(64, 64, 'L')
    wanted = recogniser(grey).seen
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16)*257)
    real = Image.fromarray(np.asarray(grey).astype(np.float32)/255)
    for img in (deep, real): assert abs(recogniser(img).seen.astype(int)-wanted).max()<=2
    assert (recogniser(Image.new('LA', (64,64), (0,0))).seen==255).all()

def test_pictures_that_are_not_normalised(learn):
    learn.dls.valid.after_batch.fs = type(learn.dls.valid.after_batch.fs)()
    with pytest.raises(ValueError, match='not normalised.*aircraft_learner'): Recogniser(learn)

def test_heat_is_that_of_the_first_label(learn, photo):
    got = Recogniser(learn)(photo)
    dl = learn.dls.test_dl([photo], num_workers=0)
    x,model = dl.one_batch()[0].as_subclass(torch.Tensor).double(),learn.model.double().eval()
    right = by_hand(*timm_halves(model), x, learn.dls.vocab.o2i[got.variants.label[0]])[0].numpy()
    assert got.heat.shape==(64,64) and np.allclose(got.heat, right, atol=1e-4) and got.heat.max()==1

def test_outputs_without_a_label(drawn, photo):
    learn = a_learner(drawn, n_out=9)
    bias = learn.model.fc.bias.data
    bias[4:] += 50
    got = Recogniser(learn)(photo)
    assert len(got.variants)==4 and abs(got.variants.probability.sum()-1)<1e-6
    bias[4:] -= 100
    with learn.no_bar(): label,_,p = learn.predict(photo)
    again = Recogniser(learn)(photo)
    assert again.variants.label[0]==label
    assert np.allclose(again.variants.probability, got.variants.probability, atol=1e-6)

def state(model):
    params = [(p.requires_grad, p.grad is None, p.device, p.data_ptr()) for p in model.parameters()]
    return ([m.training for m in model.modules()], params,
            [len(m._forward_hooks)+len(m._forward_pre_hooks)+len(m._backward_hooks) for m in model.modules()])

@pytest.mark.parametrize('train', [True, False])
def test_models_stay_as_they_were(learn, photo, train, capsys):
    source = softened(source_model('test_resnet', None))
    for model in (learn.model, source):
        model.train(train)
        model.layer1.eval()
        for i,p in enumerate(model.parameters()):
            p.requires_grad_(i%3>0)
            if i%2: p.grad = torch.full_like(p, float(i))
    def all_of(m):
        grads = [p.grad for p in m.parameters() if p.grad is not None]
        return [o.clone() for o in (*m.state_dict().values(), *grads)]
    before,values = [state(m) for m in (learn.model, source)],[all_of(m) for m in (learn.model, source)]
    learn.model.layer2.register_forward_hook(lambda *_: None).remove()
    recogniser = Recogniser(learn, source)
    rng = random.getstate(),torch.get_rng_state(),np.random.get_state()[1].copy()
    recogniser(photo)
    assert before==[state(m) for m in (learn.model, source)]
    for m,old in zip((learn.model, source), values): assert all(torch.equal(a, b) for a,b in zip(all_of(m), old))
    assert random.getstate()==rng[0] and torch.equal(torch.get_rng_state(), rng[1])
    assert (np.random.get_state()[1]==rng[2]).all()
    assert capsys.readouterr()==('','') and torch.is_grad_enabled()

def test_left_as_it_was_after_a_failure(learn, photo):
    def fail(*_): raise RuntimeError('no')
    recogniser,before = Recogniser(learn.model.train() and learn),state(learn.model)
    hook = learn.model.global_pool.register_forward_hook(fail)
    for _ in range(2):                                                                 # its lock is free again, too
        with pytest.raises(RuntimeError, match='no'): recogniser(photo)
    hook.remove()
    assert state(learn.model)==before and len(recogniser(photo).variants)==4

def same(a, b):
    same_arrays = np.array_equal(a.seen, b.seen) and np.array_equal(a.heat, b.heat)
    return same_arrays and a.variants.equals(b.variants) and (a.source is b.source or a.source.equals(b.source))

def test_in_threads(learn, photo):
    recogniser = Recogniser(learn, softened(source_model('test_resnet', None)))
    imgs = [photo, PILImage.create(noise()), PILImage.create(noise(50,90))]
    right = [recogniser(o) for o in imgs]
    with ThreadPoolExecutor(6) as pool: got = list(pool.map(recogniser, imgs*6))
    assert all(same(g, right[i%3]) for i,g in enumerate(got)) and not same(right[0], right[1])
    with torch.no_grad():
        assert same(recogniser(photo), right[0])
        assert not torch.is_grad_enabled()

def test_pictures_of_every_mode_and_shape(learn, photo, monkeypatch):
    recogniser = Recogniser(learn)
    for mode in ('L','RGBA','P','CMYK','1'): assert recogniser(photo.convert(mode)).seen.shape==(64,64,3)
    img = Image.new('RGB', (70,50))
    assert recogniser(img) and type(img) is Image.Image
    ramp = np.linspace(0, 255, 100_000).astype(np.uint8)[None,:,None]
    wide = Image.fromarray(np.broadcast_to(ramp, (16,100_000,3)).copy())
    resized = []
    def note(img, *args):
        resized.append(img.size)
        return resize_picture(img, *args)
    monkeypatch.setattr('fgvc_fisher.data.transforms.resize_picture', note)
    for img in (wide, wide.transpose(Image.Transpose.TRANSPOSE)):
        seen = recogniser(img).seen                                              # the middle, 16 of 100,000 pixels wide
        assert abs(seen.astype(int)-128).max()<=1
    assert resized==[(128,16), (16,128)]                                               # never 73 x 456,250

def test_the_middle_is_that_of_the_whole(learn):
    "Cut out before it is resized or afterwards"
    img = noise(30,20).resize((3000,20), Image.Resampling.BICUBIC)
    cut = Recogniser(learn)(img).seen
    transform = timm.data.create_transform(64, crop_pct=0.875, interpolation='bicubic', normalize=False)
    whole = transform(img).permute(1,2,0).numpy()
    assert abs(cut.astype(int)-whole).mean()<2

def test_source_and_what_is_left_of_it(drawn, photo):
    torch.manual_seed(0)
    source = softened(source_model(timm.create_model('test_resnet', num_classes=7)))
    source.pretrained_cfg = source.pretrained_cfg | dict(mean=(0.3,0.4,0.5), std=(0.2,0.3,0.25))
    table = pd.DataFrame(dict(path=[read_aircraft(drawn).path[3]], label=pd.Categorical([0])))
    for transforms in ('plain','published'):
        learn = aircraft_learner(aircraft_dls(drawn, size=64, bs=4, num_workers=0, transforms=transforms), source)
        softened(learn.model)
        with torch.no_grad():
            x = next(iter(source_dl(table, source, 64, num_workers=0)))[0].as_subclass(torch.Tensor)
            tuned = with_source_head(learn.model, source, 'source')
            before,after = [model(x)[0].softmax(-1) for model in (source, tuned)]
        got = Recogniser(learn, source, list('abcdefg'))(photo).source
        assert list(got.name[:5])==['abcdefg'[i] for i in before.topk(5).indices]
        for o in got.itertuples():
            i = 'abcdefg'.index(o.name)
            assert abs(o.before-before[i])<1e-5 and abs(o.after-after[i])<1e-5
        assert not np.allclose(got.before, got.after, atol=1e-3)

def test_the_best_that_is_left_is_shown_too(drawn, photo):
    source = source_model(timm.create_model('test_resnet', num_classes=9))
    learn = aircraft_learner(aircraft_dls(drawn, size=64, bs=4, num_workers=0), source)
    recogniser = Recogniser(learn, source)
    first = recogniser(photo).source
    assert len(first)==5 and np.allclose(first.before, first.after, atol=1e-6)         # nothing has been tuned
    last = ({f'class {i}' for i in range(9)}-set(first.name)).pop()
    recogniser.tuned.fc.bias.data[int(last[-1])] += 20
    got = recogniser(photo).source
    assert len(got)==6 and got.name[5]==last and got.after.idxmax()==5 and got.before.is_monotonic_decreasing
    recogniser.tuned.fc.bias.data[int(last[-1])] -= 20
    recogniser.tuned.fc.bias.data[int(first.name[2][-1])] += 20
    assert list(recogniser(photo).source.name)==list(first.name)

def test_a_source_of_few_classes(learn, photo):
    assert len(Recogniser(learn, source_model(timm.create_model('test_resnet', num_classes=2)))(photo).source)==2

def test_names_of_the_source(learn, photo):
    source = source_model('test_resnet', None)
    names = Recogniser(learn, source).names
    assert len(names)==1000 and (names[0], names[895], names[281])==('tench','warplane','tabby')
    with pytest.raises(ValueError, match='names.*1000.*3'): Recogniser(learn, source, list('abc'))
    few = remake_head(source, 3)
    assert Recogniser(learn).names is None and Recogniser(learn, few).names==['class 0','class 1','class 2']
    assert Recogniser(learn, few, pd.Series([7,8,9])).names==['7','8','9']

def test_kin(drawn, learn, photo):
    kin = read_kin(drawn)
    tables = {o: read_aircraft(drawn, o).set_index('image').label for o in ('variant','family','manufacturer')}
    assert len(kin)==4
    for i,variant in tables['variant'].items():
        assert (tables['family'][i], tables['manufacturer'][i])==tuple(kin.set_index('variant').loc[variant])
    got = Recogniser(learn)(photo).variants
    assert list(got.columns)==['label','probability','family','manufacturer']
    assert all(tuple(kin.set_index('variant').loc[o.label])==(o.family,o.manufacturer) for o in got.itertuples())
    given = Recogniser(learn, kin=kin[:2].assign(more=1)).kin
    assert list(given.columns)==['label','family','manufacturer'] and len(given)==2
    assert len(Recogniser(learn, kin=pd.concat([kin,kin]))(photo).variants)==4
    assert Recogniser(learn, kin=kin[:2])(photo).variants.family.isna().sum()==2
    with pytest.raises(ValueError, match='kin.*family, manufacturer'): Recogniser(learn, kin=kin[['variant']])
    for level in ('family','manufacturer'):
        assert list(Recogniser(a_learner(drawn, level=level))(photo).variants.columns)==['label','probability']

def test_kin_of_pictures_in_several_splits(drawn, tmp_path):
    shutil.copytree(drawn, tmp_path/'tree')
    for o in (tmp_path/'tree').rglob('images_*_val.txt'): o.unlink()                     # train and trainval remain
    for o in (tmp_path/'tree').rglob('images_family_*.txt'): o.write_text('\n'.join(o.read_text().splitlines()[::-1]))
    assert read_aircraft(tmp_path/'tree').image.duplicated().any()
    pd.testing.assert_frame_equal(read_kin(tmp_path/'tree'), read_kin(drawn))

def test_a_data_set_without_kin(tmp_path):
    for k,c in enumerate('ab'):
        (tmp_path/c).mkdir()
        for i in range(5): noise(seed=10*k+i).save(tmp_path/c/f'{i}.png')
    learn = aircraft_learner(folder_dls(tmp_path, size=32, bs=2, num_workers=0), 'test_resnet', None)
    assert list(Recogniser(learn)(noise()).variants.columns)==['label','probability']

def test_a_learner_that_was_exported(learn, photo, tmp_path):
    right = Recogniser(learn)(photo)
    learn.export(tmp_path/'l.pkl')
    assert same(Recogniser(load_learner(tmp_path/'l.pkl'))(photo), right)

def test_a_transformer_has_no_heat(drawn, photo):
    learn = a_learner(drawn, 'test_vit', 160)
    got = Recogniser(learn)(photo)
    assert got.heat.shape==(160,160) and not got.heat.any() and len(got.variants)==4
    assert np.array_equal(heat_picture(got), got.seen)

def test_weights_that_are_no_numbers(learn, photo):
    with torch.no_grad(): learn.model.fc.weight.fill_(float('nan'))
    got = Recogniser(learn)(photo)
    assert got.variants.probability.isna().all() and not got.heat.any()

def test_heat_picture():
    seen,heat = np.full((4,6,3), 200, np.uint8),np.linspace(0, 1, 24).reshape(4,6)
    img = heat_picture(Recognised(seen, None, heat, None))
    grey = np.asarray(Image.fromarray(img).convert('L')).ravel().astype(int)
    assert img.dtype==np.uint8 and img.shape==seen.shape and (np.diff(grey)>0).all()       # lighter with more evidence
    assert (img[0,0]==60).all() and img[-1,-1].std()>5 and (seen==200).all()
    other = heat_picture(Recognised(seen, None, heat, None), 'gray')
    assert (other.std(-1)<1).all() and not np.array_equal(other, img)
    nothing = heat_picture(Recognised(seen, None, heat*0, None))
    assert np.array_equal(nothing, seen) and nothing is not seen

def test_photographs(photos, mobilenet_075):
    "0.840 of all 1,000 are right"
    learn = aircraft_learner(aircraft_dls(photos/'data/warbirds30', size=224, bs=4, num_workers=0), mobilenet_075)
    recogniser = Recogniser(learn, mobilenet_075)
    pictures = read_pictures(photos/'data/imagenet_sample')[::25]
    got = [recogniser(read_upload(o.path.read_bytes(), o.path.name)[0]) for o in pictures.itertuples()]
    right = [g.source.name[0]==recogniser.names[i] for g,i in zip(got, pictures.class_index)]
    assert np.mean(right)>0.7
    assert all(np.allclose(g.source.before, g.source.after, atol=1e-4) for g in got)        # nothing has been tuned
    assert all(g.heat.max() in (0,1) for g in got) and np.mean([g.heat.max() for g in got])>0.9
    assert set(got[0].variants.columns)=={'label','probability','family','manufacturer'}
    assert got[0].variants.family.notna().all()
