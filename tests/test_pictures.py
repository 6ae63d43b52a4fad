"Smaller copies: the right pixels, whole or not at all, and made anew when something has changed"
import json, os, re, shutil, signal, sys, time
import numpy as np, pandas as pd, pytest
from PIL import Image
from fgvc_fisher.data import cache_images
from fgvc_fisher.data.pictures import open_picture
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

@pytest.mark.parametrize('change', ['content', 'time', 'copy is lost', 'copy is cut', 'manifest is lost'])
def test_what_has_changed_is_made_anew(table, change):
    small = cache(table, 40)
    before,copy = times(small),small.path[2]
    if change=='content': photo(9).save(table.path[2], quality=98)
    if change=='time': os.utime(table.path[2], (1e9,1e9))
    if change=='copy is lost': copy.unlink()
    if change=='copy is cut': copy.write_bytes(copy.read_bytes()[:-50])
    if change=='manifest is lost': copy.with_name('manifest.jsonl').unlink()
    after = times(cache(table, 40))
    assert [a!=b for a,b in zip(after, before)]==[change=='manifest is lost' or i==2 for i in range(6)]
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

def test_other_boxes_are_noticed(table):
    first = cache(table.assign(crop=[(0,0,60,60)]*6), 30)
    again = cache(table.assign(crop=[(0,0,60,60)]*5+[(60,0,120,60)]), 30)
    assert Image.open(again.path[5]).size==(30,30) and abs(pixels(again.path[5])-pixels(first.path[0])).mean()>10

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

def test_two_data_sets_share_no_copies(tmp_path):
    "Same folder for the copies, same file names, other pictures"
    tables = []
    for i,name in enumerate('ab'):
        (tmp_path/name/'images').mkdir(parents=True)
        photo(i).save(tmp_path/name/'images/1.jpg', quality=98)
        tables.append(pd.DataFrame({'path': [tmp_path/name/'images/1.jpg']}))
    a,b = [cache(o, 40, dest=tmp_path/'copies') for o in tables]
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
    assert '6/6' in said.err
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
