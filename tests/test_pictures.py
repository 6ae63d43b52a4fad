"Smaller copies: the right pixels, whole or not at all, and made anew when something has changed"
import errno, json, os, re, shutil, signal, struct, sys, time, warnings, zlib
from io import BytesIO
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from fgvc_fisher.data import cache_images, folder_dls, picture_dl
from fgvc_fisher.data.loaders import open_item
from fgvc_fisher.data.pictures import open_picture, skip_bad, to_rgb
from fgvc_fisher.data import read_aircraft, read_table
from fgvc_fisher.data.tables import crop_to_boxes
from forks import Forked

def photo(i, width=120, height=80):
    "A smooth picture that JPEG keeps well"
    rng = np.random.default_rng(i)
    return Image.fromarray(rng.integers(0, 256, (5,7,3), np.uint8)).resize((width,height), Image.BICUBIC)

@pytest.fixture
def table(tmp_path):
    (tmp_path/'pics').mkdir()
    for i in range(6): photo(i).save(tmp_path/f'pics/{i}.jpg', quality=98)
    return pd.DataFrame({'path': [tmp_path/f'pics/{i}.jpg' for i in range(6)]})

def cache(*args, **kw): return cache_images(*args, quiet=True, **kw)
def times(table): return [o.stat().st_mtime_ns for o in table.path]
def pixels(path): return np.array(Image.open(path)).astype(int)

def test_copies_are_the_resized_pictures(table, tmp_path):
    small = cache(table, 40)
    for before,after in zip(table.path, small.path):
        assert after==tmp_path/'pics_40'/before.name and Image.open(after).size==(60,40)
        assert abs(pixels(after) - np.array(Image.open(before).resize((60,40), Image.BICUBIC)).astype(int)).mean() < 4
    assert not [o for o in (tmp_path/'pics_40').iterdir() if o.suffix not in ('.jpg','.jsonl') and o.name!='.lock']

def test_second_call_writes_nothing(table):
    small = cache(table, 40)
    manifest = small.path[0].with_name('manifest.jsonl')
    before = times(small),manifest.read_bytes()
    assert (times(cache(table, 40)),manifest.read_bytes())==before

@pytest.mark.parametrize('change', ['content', 'time', 'copy is lost', 'copy is cut'])
def test_what_has_changed_is_made_anew(table, change):
    small = cache(table, 40)
    before,copy = times(small),small.path[2]
    if change=='content': photo(9).save(table.path[2], quality=98)
    if change=='time': os.utime(table.path[2], (1e9,1e9))
    if change=='copy is lost': copy.unlink()
    if change=='copy is cut': copy.write_bytes(copy.read_bytes()[:-50])
    after = times(cache(table, 40))
    assert [a!=b for a,b in zip(after, before)]==[i==2 for i in range(6)]
    source = Image.open(table.path[2]).resize((60,40), Image.BICUBIC)
    assert abs(pixels(copy) - np.array(source).astype(int)).mean() < 4

@pytest.mark.parametrize('torn', ['', '["3.jpg", [1', '["x"]', '\x00\x00'])
def test_torn_manifest(table, torn):
    "A line that was cut off costs one picture, and the next line does not stick to it"
    small = cache(table, 40)
    manifest,before = small.path[0].with_name('manifest.jsonl'),times(small)
    lines = manifest.read_text().splitlines()
    manifest.write_text('\n'.join(lines[:-1])+'\n'+torn)
    lost = small.path.map(lambda o: o.name).tolist().index(json.loads(lines[-1])[0])
    assert [a!=b for a,b in zip(times(cache(table, 40)), before)]==[i==lost for i in range(6)]
    assert times(cache(table, 40))==times(cache(table, 40))

def test_settings_have_folders_of_their_own(table):
    cut = table.assign(credit=20)
    box = cut.assign(crop=[(10,20,60,60)]*6)
    tables = cache(table, 40), cache(table, 30), cache(cut, 40), cache(box, 30)
    sizes = {o.path[0].parent.name: Image.open(o.path[0]).size for o in tables}
    assert sizes=={'pics_40': (60,40), 'pics_30': (45,30), 'pics_40_cut20': (80,40), 'pics_30_box_cut20': (37,30)}

def test_each_part_of_a_picture_has_a_copy(table):
    "Also in one table, and where credits differ; a copy that somebody reads does not change"
    left,right = [cache(table.assign(crop=[(x,0,x+60,60)]*6), 30) for x in (0,60)]
    assert abs(pixels(left.path[5])-pixels(right.path[5])).mean()>10 and Image.open(right.path[5]).size==(30,30)
    both = table.iloc[[0,0]].assign(crop=[(0,0,60,60),(60,0,120,60)])
    assert list(cache(both, 30).path)==[left.path[0],right.path[0]]
    strips = cache(table.iloc[[0,0]].assign(credit=[20,0]), 30)
    assert [Image.open(o).size for o in strips.path]==[(60,30),(45,30)]

@pytest.mark.parametrize('dest', [None, 'copies'])
def test_pictures_of_somebody_else_are_not_replaced(table, tmp_path, dest):
    dest = dest and tmp_path/dest
    folder = tmp_path/'pics_40' if dest is None else dest/tmp_path.relative_to('/')/'pics_40'
    folder.mkdir(parents=True)
    (folder/'.DS_Store').write_bytes(b'')
    assert len(cache(table, 40, dest))==6                              # what a system adds does not count
    (folder/'manifest.jsonl').unlink()
    before = {o: o.read_bytes() for o in folder.iterdir()}
    with pytest.raises(ValueError, match=f'{re.escape(str(folder))}.*dest='): cache(table, 40, dest)
    assert {o: o.read_bytes() for o in folder.iterdir()}==before

def test_pictures_with_only_the_root_in_common(table, tmp_path):
    other = Path('/dev/shm')
    if not other.is_dir() or tmp_path.is_relative_to(other): pytest.skip("there is no second place for a picture")
    file = other/f'{tmp_path.parent.name}-{tmp_path.name}.jpg'
    try:
        shutil.copy(table.path[0], file)
        apart = pd.DataFrame({'path': [file, table.path[1]]})
        with pytest.raises(ValueError, match='dest='): cache(apart, 40)
        assert all(o.is_relative_to(tmp_path/'copies/root_40') for o in cache(apart, 40, tmp_path/'copies').path)
    finally: file.unlink()

def test_small_pictures_are_used_as_they_are(table):
    assert list(cache(table, 80).path)==list(table.path)
    assert list(cache(table, 500).path)==list(table.path)
    assert Image.open(cache(table.assign(credit=20), 500).path[0]).size==(120,60)      # but not with their strip

def test_any_format_and_equal_names(tmp_path):
    "Folders are kept apart, and so are a.png and a.jpg"
    for folder in 'xy':
        (tmp_path/'p'/folder).mkdir(parents=True)
        for i,mode in enumerate(('L','P','RGBA','CMYK')):
            photo(i).convert(mode).save(tmp_path/f'p/{folder}/{i}.{"jpg" if mode=="CMYK" else "png"}')
        photo(7).save(tmp_path/f'p/{folder}/0.jpg')
    small = cache(pd.DataFrame({'path': sorted((tmp_path/'p').rglob('*.*'))}), 40)
    assert len(set(small.path))==10 and {open_picture(o).mode for o in small.path}=={'RGB'}
    assert {o.parent.parent for o in small.path}=={tmp_path/'p_40'}

def test_two_data_sets_share_no_copies(tilde, tmp_path):
    "Same folder for the copies, same file names, other pictures"
    tables = []
    for i,name in enumerate('ab'):
        (tmp_path/name/'images').mkdir(parents=True)
        photo(i).save(tmp_path/name/'images/1.jpg', quality=98)
        tables.append(pd.DataFrame({'path': [tmp_path/name/'images/1.jpg']}))
    a,b = [cache(o, 40, dest='~/copies') for o in tables]
    assert a.path[0].is_relative_to(tmp_path/'copies')
    assert a.path[0]!=b.path[0] and abs(pixels(a.path[0])-pixels(b.path[0])).mean()>10
    assert not (tmp_path/'a/images_40').exists()

def test_broken_picture_is_named_and_the_rest_goes_on(table):
    whole = table.path[3].read_bytes()
    table.path[3].write_bytes(whole[:300])
    with pytest.raises(OSError, match='3.jpg'): cache(table, 40, n_workers=1)
    copies = table.path[0].parent.with_name('pics_40')
    before = {o: o.stat().st_mtime_ns for o in copies.glob('*.jpg')}
    assert before and copies/'3.jpg' not in before
    table.path[3].write_bytes(whole)
    assert len(cache(table, 40))==6 and all(o.stat().st_mtime_ns==t for o,t in before.items())

def test_no_place_for_copies(table, tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(OSError, match=re.escape(str(tmp_path/'file'))):
        cache(table, 40, dest=tmp_path/'file')

@pytest.mark.parametrize('side', [0, -5, 'big', 0.5])
def test_wrong_side(table, side):
    with pytest.raises(ValueError, match=f'short_side={side!r}'): cache(table, side)

def test_says_what_it_takes(table, capsys):
    small = cache_images(table, 40)
    said = capsys.readouterr()
    size = sum(o.stat().st_size for o in small.path)/1e6
    assert re.search(rf'\b6 .* 40 .* {size:.1f} MB', said.out) and str(small.path[0].parent) in said.out
    assert said.err==''                                        # a bar is for a terminal
    cache_images(table, 40)
    assert capsys.readouterr().out==''

def test_boxes_of_a_tree(drawn, tmp_path):
    table = crop_to_boxes(read_aircraft(drawn, credit=20))
    small = cache(table, 24, dest=tmp_path)
    assert not {'crop','credit','xmin'} & set(small.columns)
    left,top,right,bottom = table.crop[0]
    height = min(bottom, Image.open(table.path[0]).height-20)-top
    assert Image.open(small.path[0]).size==(int(24*(right-left)/height), 24)

def pictures_of(folder): return pd.DataFrame({'path': sorted(folder.glob('*.jpg'))})
def copy(folder): cache(pictures_of(folder), 300, n_workers=2)

def copy_on_a_full_disk(folder):
    "A limit on the size of files stands in for it; what is printed has to be short, since that goes into a file too"
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000,2000))
    try: copy(folder)
    except OSError as e: sys.exit(str(e)[-200:])

N = 120
@pytest.fixture
def many(tmp_path):
    (tmp_path/'many').mkdir()
    photo(0, 900, 600).effect_spread(30).save(tmp_path/'many/0.jpg', quality=98)    # noisy: copies of some 50 kB
    for i in range(1, N): shutil.copy(tmp_path/'many/0.jpg', tmp_path/f'many/{i}.jpg')
    return tmp_path/'many'

@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_killed_in_the_middle(many, how):
    "Every copy that is there is whole; what was done is not done again"
    copies = many.with_name('many_300')
    job = Forked(copy, many)
    while len(list(copies.glob('*.jpg')))<10 and job.poll() is None: time.sleep(0.01)
    job.signal(how)
    assert job.wait(20)!=0
    there = {o: o.stat().st_mtime_ns for o in copies.glob('*.jpg')}
    assert 10 <= len(there) < N
    for o in there: Image.open(o).load()
    known = {json.loads(o)[0] for o in (copies/'manifest.jsonl').read_text().splitlines() if o.endswith(']')}
    (copies/'7.jpg.0123456789ab.part').write_bytes(b'half')                   # as of a write that was killed
    assert len(known)>=len(there)-4      # the manifest may lack those in progress
    cache(pictures_of(many), 300)
    assert len(list(copies.glob('*.jpg')))==N and not list(copies.glob('*.part'))
    assert all(o.stat().st_mtime_ns==t for o,t in there.items() if o.name in known)

def test_two_processes_at_once(many):
    jobs = [Forked(copy, many) for _ in range(2)]
    assert [o.wait() for o in jobs]==[0,0]
    lines = [json.loads(o)[0] for o in (many.with_name('many_300')/'manifest.jsonl').read_text().splitlines() if o]
    assert sorted(lines)==sorted(f'{i}.jpg' for i in range(N))        # nobody did what the other had done

def test_full_disk(many):
    "No half-written copy is taken for whole"
    job = Forked(copy_on_a_full_disk, many)
    assert job.wait()!=0 and 'File too large' in job.err
    assert not list(many.with_name('many_300').glob('*.jpg'))
    small = cache(pictures_of(many), 300)
    assert all(Image.open(o).size==(450,300) for o in small.path)

def test_photographs(photos, tmp_path):
    "What evaluation sees of real photographs from copies is nearly what it sees of the originals"
    from fgvc_fisher.data import picture_dl
    table = read_table(photos/'data/imagenet_sample/labels.csv', label='class_index')[:32]
    small = cache(table, 146, dest=tmp_path)
    a,b = [next(iter(picture_dl(o, 128, bs=32, num_workers=0)))[0] for o in (table, small)]
    assert 0 < 255*(a-b).abs().mean() < 4 and {min(Image.open(o).size) for o in small.path}=={146}

# One way to open a picture

def saved(img, fmt='PNG', **kwargs):
    img.save(file := BytesIO(), fmt, **kwargs)
    return file.getvalue()
def turned(orientation):
    exif = Image.Exif()
    exif[0x0112],exif[0x010f] = orientation,'maker'
    return exif
def ramp(w=48, h=32): return np.add.outer(np.arange(h)*3, np.arange(w)*3).astype(np.uint8)
GREY = Image.fromarray(ramp())
STRIPES = Image.fromarray(np.stack([ramp(), ramp()[::-1], ramp()[:,::-1]], -1))
def palette(**kwargs):
    img = Image.new('P', (48,32), 1)
    img.putpalette([9,9,9, 0,0,200]+[0]*762)
    img.paste(0, (0,0,24,32))
    return saved(img, **kwargs)
def half(mode):
    img = Image.new('RGBA', (48,32), (0,0,200,255))
    img.paste((0,0,0,0), (0,0,24,32))
    return img.convert(mode)
BLUE = np.uint8([[[255,255,255]]*24+[[0,0,200]]*24]*32)
WIDE = ramp().astype(np.uint16)*257

SAME = {                       # the file, and how far from grey `ramp`
    '16 bits, PNG': (saved(Image.fromarray(WIDE)), 0), '16 bits, TIFF': (saved(Image.fromarray(WIDE), 'TIFF'), 0),
    '16 bits, other byte order': (saved(Image.frombytes('I;16B', (48,32), WIDE.astype('>u2').tobytes()), 'TIFF'), 0),
    '16 bits, PGM': (b'P5 48 32 65535\n'+WIDE.astype('>u2').tobytes(), 0),
    '32 bits': (saved(Image.fromarray(WIDE.astype(np.int32)), 'TIFF'), 0),
    '32 bits, values of 8': (saved(Image.fromarray(ramp().astype(np.int32)), 'TIFF'), 0),
    'real, to 1': (saved(Image.fromarray(ramp().astype(np.float32)/255), 'TIFF'), 0),
    'real, to 255': (saved(Image.fromarray(ramp().astype(np.float32)), 'TIFF'), 0),
    'real, to 65535': (saved(Image.fromarray(WIDE.astype(np.float32)), 'TIFF'), 0),
    'grey': (saved(GREY), 0), 'grey with alpha': (saved(GREY.convert('LA')), 0), 'GIF': (saved(GREY, 'GIF'), 0),
    'palette': (saved(GREY.convert('P')), 0), 'WebP': (saved(GREY, 'WEBP', lossless=True), 0),
    'CMYK': (saved(GREY.convert('RGB').convert('CMYK'), 'JPEG', quality=98), 6)}
@pytest.mark.parametrize('kind', SAME)
def test_grey_of_every_kind(kind, tmp_path):
    content,tolerance = SAME[kind]
    (tmp_path/'a.jpg').write_bytes(content)
    img = open_picture(tmp_path/'a.jpg')
    assert img.mode=='RGB' and abs(np.asarray(img).astype(int)-ramp()[...,None]).max()<=tolerance

@pytest.mark.parametrize('content', [
    palette(transparency=0), palette(transparency=bytes([0,255])), saved(half('RGBA')),
    saved(half('RGBA'), 'WEBP', lossless=True), saved(half('RGBA'), 'GIF'),
    saved(half('RGBA'), 'TIFF')], ids=['colour','list','RGBA','WebP','GIF','TIFF'])
def test_transparent_is_white(content): assert np.array_equal(np.asarray(open_picture(BytesIO(content))), BLUE)

def test_other_modes():
    bits = GREY.convert('1')
    assert np.array_equal(np.asarray(open_picture(BytesIO(saved(bits)))), np.stack([np.asarray(bits)*255]*3, -1))
    assert np.array_equal(np.asarray(to_rgb(half('RGBA').convert('RGBa'))[0]), BLUE)
    for mode in ('HSV','YCbCr','RGBX'):
        assert abs(np.asarray(to_rgb(STRIPES.convert(mode))[0]).astype(int)-np.asarray(STRIPES)).mean()<4, mode

@pytest.mark.parametrize('mode', ['I;16','I','F'])
@pytest.mark.parametrize('value', [0, 1, 300, 65535])
def test_a_flat_picture(mode, value):
    "Nothing to scale from; of a real 1 nobody knows"
    level = {0: 0, 65535: 255, 300: 1, 1: {'I;16': 0, 'I': 1, 'F': 255}[mode]}[value]
    img = Image.fromarray(np.full((20,30), value, dict(zip(('I;16','I','F'), (np.uint16,np.int32,np.float32)))[mode]))
    assert img.mode==mode and to_rgb(img)[0].getpixel((3,3))==(level,)*3

@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(bad):
    grey = ramp().astype(np.float32)
    grey[0,0],grey[31,47] = bad,255
    img = np.asarray(to_rgb(Image.fromarray(grey))[0])[...,0]
    assert img[0,0]==(255 if bad==np.inf else 0) and np.array_equal(img[1:-1], ramp()[1:-1])
    assert np.asarray(to_rgb(Image.fromarray(np.full((9,9), bad, np.float32)))[0]).max() in (0,255)

@pytest.mark.parametrize('fmt', ['GIF','WEBP','PNG','TIFF'])
def test_first_frame(fmt):
    frames = [Image.new('RGB', (30,20), o) for o in ((200,0,0), (0,200,0))]
    img = open_picture(BytesIO(saved(frames[0], fmt, save_all=True, append_images=frames[1:])))
    assert img.getpixel((3,3))[0]>190 and img.getpixel((3,3))[1]<10

TURNS = dict(zip(range(2, 9), ('FLIP_LEFT_RIGHT','ROTATE_180','FLIP_TOP_BOTTOM','TRANSPOSE','ROTATE_270','TRANSVERSE',
                               'ROTATE_90')))
TURNS |= {o: None for o in (0, 1, 9, 77)}
def upright(orientation):
    how = TURNS[orientation]
    return np.asarray(STRIPES.transpose(Image.Transpose[how]) if how else STRIPES)

@pytest.mark.parametrize('orientation', TURNS)
@pytest.mark.parametrize('fmt', ['PNG','WEBP','TIFF','JPEG'])
def test_orientation(fmt, orientation, tmp_path):
    "In training, in copies (once), in crops, in the check, in uploads and in shards"
    from fgvc_fisher.data.check import look_at
    from fgvc_fisher.explore.recognise import read_upload
    kwargs = dict(WEBP=dict(lossless=True), JPEG=dict(quality=100, subsampling=0)).get(fmt, {})
    folder = tmp_path/'pics'
    folder.mkdir()
    file = folder/f'a.{fmt.lower()}'
    file.write_bytes(saved(STRIPES, fmt, exif=turned(orientation), **kwargs))
    Image.fromarray(upright(orientation)).save(tmp_path/'plain.png')
    tolerance = 8 if fmt=='JPEG' else 0
    def same(img, right=upright(orientation), tolerance=tolerance):
        a = np.asarray(img).astype(int)
        return a.shape==right.shape and abs(a-right).max()<=tolerance
    img = open_picture(file)
    assert same(img) and img.getexif().get(0x0112) not in range(2, 9)
    assert same(open_picture(file, (4,2,20,24), 3), upright(orientation)[2:24,4:20])
    assert same(open_picture(file, None, 5), upright(orientation)[:-5])
    assert np.array_equal(np.asarray(read_upload(file.read_bytes(), 'a')[0]), np.asarray(img))
    assert look_at(file).pixels[0]==img.size
    if not tolerance: assert look_at(file)[1]==look_at(tmp_path/'plain.png')[1]
    table = pd.DataFrame(dict(path=[file], label=pd.Categorical(['x']), split='train', image='a'))
    for side in (100, 31, 16):
        small = cache(table, side)
        again = open_picture(small.path[0])
        assert (again.width>again.height)==(img.width>img.height) and (side<32 or same(again))
    x, = [x for x,_ in picture_dl(table, 32, num_workers=0)]
    y, = [x for x,_ in picture_dl(table.assign(path=[tmp_path/'plain.png']), 32, num_workers=0)]
    assert (x-y).abs().max()<0.1

@pytest.mark.parametrize('name,label', [('a.png', b'3'), ('a.PNG', b' 3\n'), ('a.jfif', '\ufeff3\r\n'.encode()),
                                        ('a.gif', '3'.encode('utf-16'))])
def test_pictures_and_labels_of_a_shard(name, label, tmp_path):
    "The same picture, and a class number as somebody's editor writes it"
    import tarfile, timm
    from fgvc_fisher.fisher.shards import shard_batches, tar_shards
    content = saved(STRIPES, exif=turned(6))
    (tmp_path/'a.png').write_bytes(content)
    with tarfile.open(tmp_path/'a.tar', 'w') as tar:
        for o,data in ((name, content), ('a.cls', label)):
            info = tarfile.TarInfo(o)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    model = timm.create_model('test_resnet', num_classes=4).eval()
    (x,y), = shard_batches(tar_shards(tmp_path/'a.tar')[0], model, 32)
    from fgvc_fisher.learner import source_dl
    table = pd.DataFrame(dict(path=[tmp_path/'a.png'], label=pd.Categorical([3], categories=range(4))))
    same, = source_dl(table, model, 32, num_workers=0)
    assert y.tolist()==[3] and np.array_equal(x.cpu(), same[0].cpu())

def test_a_copy_of_a_turned_crop(tmp_path):
    "A box refers to the upright picture, in the copy as well"
    (tmp_path/'pics').mkdir()
    (tmp_path/'pics/a.png').write_bytes(saved(STRIPES, exif=turned(6)))
    table = pd.DataFrame(dict(path=[tmp_path/'pics/a.png'], crop=[(2,4,22,44)], credit=6))
    small = cache(table, 20)
    assert Image.open(small.path[0]).size==(20,38)
    right = upright(6)[4:42,2:22]
    assert abs(pixels(small.path[0])-right).mean()<6

def test_copies_of_an_earlier_version_are_made_again(table):
    small = cache(table, 40)
    before,manifest = times(small),small.path[0].with_name('manifest.jsonl')
    lines = [json.loads(o) for o in manifest.read_text().splitlines() if o]
    for o in lines: o[1].pop()
    manifest.write_text(''.join(json.dumps(o)+'\n' for o in lines))
    assert all(a!=b for a,b in zip(times(cache(table, 40)), before))

@pytest.mark.parametrize('mode', ['RGB','L','P','1','CMYK'])
@pytest.mark.parametrize('fmt', ['JPEG','PNG','TIFF'])
def test_ordinary_pictures_bit_for_bit(mode, fmt, tmp_path):
    "As Pillow converts them"
    if (mode,fmt) in (('P','JPEG'), ('CMYK','PNG')): return
    (tmp_path/'a').write_bytes(saved(photo(3).convert(mode), fmt))
    assert np.array_equal(np.asarray(open_picture(tmp_path/'a')), np.asarray(Image.open(tmp_path/'a').convert('RGB')))

@pytest.mark.parametrize('note', [b'Exif\0\0rubbish', b'Exif\0\0M\xbd\0*\0\0\0\x08',
                                  b'Exif\0\0MM\0*\0\0\0\x08\xff\xff'+bytes(40)])
def test_broken_exif_data(note):
    for fmt in ('JPEG','PNG','WEBP'): assert open_picture(BytesIO(saved(STRIPES, fmt, exif=note))).size==(48,32)

# What cannot be decoded

def png_header(w, h):
    def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))
    return b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0))+chunk(b'IDAT', b'')
JPEG = saved(photo(5, 400, 300), 'JPEG')
BAD = {'empty': b'', 'text': b'not a picture', 'html': b'<html>404</html>', 'cut in the middle': JPEG[:len(JPEG)//2],
       'the end is missing': JPEG[:-40], 'header alone': JPEG[:300], 'bomb': png_header(30_000, 30_000),
       'no data': png_header(40, 40), 'PNG, data damaged': saved(STRIPES)[:60]+bytes(40)+saved(STRIPES)[100:],
       'GIF, cut': saved(STRIPES, 'GIF')[:400], 'TIFF, cut': saved(STRIPES, 'TIFF')[:400],
       'BMP, cut': saved(STRIPES, 'BMP')[:400],
       'WebP, cut': saved(photo(2), 'WEBP')[:200], 'zip': b'PK\3\4'+bytes(99), 'pdf': b'%PDF-1.4', 'null': bytes(500)}
@pytest.mark.parametrize('kind', [*BAD, 'folder'])
def test_what_cannot_be_decoded_is_named_or_skipped(kind, tmp_path):
    for k,label in enumerate('xy'):
        (tmp_path/'pics'/label).mkdir(parents=True)
        for i in range(5): photo(10*k+i).save(tmp_path/f'pics/{label}/{i}.jpg')
    bad = tmp_path/'pics/x/bad.jpg'
    bad.mkdir() if kind=='folder' else bad.write_bytes(BAD[kind])
    with pytest.raises(OSError, match='bad.jpg.*on_bad') as e: open_picture(bad)
    assert '\n' not in str(e.value) and e.value.__cause__ is not None
    table = pd.DataFrame(dict(path=sorted((tmp_path/'pics').glob('*/*.jpg'))))
    with pytest.warns(UserWarning, match=r'\b1 of 11\b.*bad.jpg') as said: good, = skip_bad([table])
    assert len(said)==1 and list(good.path)==[o for o in table.path if o!=bad]
    assert skip_bad([table], 'error')[0] is table
    with pytest.warns(UserWarning, match='bad.jpg'): assert len(cache(table, 40, on_bad='skip'))==10
    with pytest.raises(OSError, match='bad.jpg'): cache(table, 30)
    with pytest.raises(OSError, match=r'\b1 pictures.*bad.jpg'): skip_bad([table[table.path==bad]])
    if kind=='folder': return
    with pytest.warns(UserWarning, match='bad.jpg') as said:
        dls = folder_dls(tmp_path/'pics', size=16, on_bad='skip', num_workers=0)
    assert len(said)==1 and len(dls.train_ds)+len(dls.valid_ds)==10 and len(list(dls.train))==1

def test_pictures_of_several_tables_are_said_once(table):
    table.path[1].write_bytes(b'')
    table.path[5].write_bytes(b'')
    with pytest.warns(UserWarning, match=r'\b2 of 6\b.*1.jpg.*5.jpg') as said: a,b = skip_bad([table[:3], table[2:]])
    assert len(said)==1 and (len(a),len(b))==(2,3)
    assert skip_bad([table[:0]])[0].empty
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        skip_bad([table[2:4]])
    for on_bad in ('ignore', '', None, True):
        with pytest.raises(ValueError, match=re.escape(repr(on_bad))): cache(table, 40, on_bad=on_bad)

@pytest.mark.parametrize('code', [errno.EIO, errno.EACCES, errno.EMFILE])
def test_a_disk_that_fails_is_no_bad_picture(table, monkeypatch, code):
    real = Image.open
    def fails(path):
        if str(path)==str(table.path[1]): raise OSError(code, 'why')
        return real(path)
    monkeypatch.setattr(Image, 'open', fails)
    with pytest.raises(OSError, match=f'{re.escape(str(table.path[1]))} cannot be read .why') as e: skip_bad([table])
    assert e.value.errno==code

def test_a_split_without_a_good_picture_is_an_error(tmp_path):
    for o in ('train/a/1.jpg','train/b/2.jpg','val/a/1.jpg'):
        (tmp_path/o).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path/o).write_bytes(JPEG if o[0]=='t' else b'')
    with pytest.raises(OSError, match=r'\b1 pictures.*val/a/1.jpg cannot be decoded \([^)]*\)$'):
        folder_dls(tmp_path, size=16, on_bad='skip', num_workers=0)

CUTS = [dict(credit='John Doe'), dict(credit=float('nan')), dict(credit=-1), dict(credit=2.5), dict(crop='corn'),
        dict(crop=float('nan')), dict(crop=(1,2,3)), dict(crop=(0,0,'9',9)), dict(crop=True)]
@pytest.mark.parametrize('cut', CUTS)
def test_no_part_of_a_picture(cut, table):
    "What is no number of pixels is named, before a folder for copies is made"
    (name,value), = cut.items()
    said = f'2.jpg.*{name}={re.escape(repr(value))}.*rename'
    with pytest.raises(ValueError, match=said): open_picture(table.path[2], **cut)
    whole = 0 if name=='credit' else (0,0,9,9)
    broken = table.assign(**{name: [value if i==2 else whole for i in range(6)]}).astype({name: object})
    with pytest.raises(ValueError, match=said): cache(broken, 40)
    assert not table.path[0].parent.with_name('pics_40').exists()
    with pytest.raises(ValueError, match=said): open_item(broken.iloc[2])

def test_whole_numbers_of_any_kind(table):
    file = table.path[0]
    for credit in (20, 20., np.int64(20), np.float32(20)): assert open_picture(file, credit=credit).size==(120,60)
    for crop in ((0,0,9,8), [0,0,9,8], np.array([0,0,9,8])): assert open_picture(file, crop).size==(9,8)

def test_each_picture_has_a_copy_of_its_own(tmp_path):
    "Even where names differ by a suffix, and whichever split comes first"
    (tmp_path/'p').mkdir()
    names = ['0.png','0.png.jpg','0.png.jpg.jpg','1.png','1.jpg','2.PNG.JPG','2.PNG']
    for i,name in enumerate(names): photo(i).save(tmp_path/f'p/{name}', **dict(quality=98) if i else {})
    table = pd.DataFrame({'path': [tmp_path/'p'/o for o in names]})
    both = [cache(table, 40), pd.concat([cache(table[:1], 40), cache(table[1:], 40)])]
    for small in both:
        assert [o.name for o in small.path]==['0.png.jpg.jpg.jpg', *names[1:3], '1.png.jpg', *names[4:6], '2.PNG.jpg']
        for before,after in zip(table.path, small.path):
            source = np.array(Image.open(before).convert('RGB').resize((60,40), Image.BICUBIC)).astype(int)
            assert abs(pixels(after)-source).mean() < 4
