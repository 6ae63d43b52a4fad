"Every error in a tree is reported, and every picture that is in it twice"
import io, re, shutil
from threading import get_ident
import numpy as np, pandas as pd, pytest
from PIL import Image, ImageOps
from tqdm import tqdm
from fgvc_fisher.data import cache_images, check_aircraft, without_duplicates
from fgvc_fisher.data.check import look_at, near_pairs
from fgvc_fisher.data import table_dls
from fgvc_fisher.data import pick_split, read_aircraft
from fgvc_fisher.distributed import ranks

LEVELS = ('variant','family','manufacturer')

# What the findings and the kinds of pairs are called
MISSING,UNLISTED,UNREADABLE = 'listed but missing','file not listed','cannot be decoded'
NO_LISTS,NO_LEVEL,NO_CONTENT = 'no list of pictures','level without lists','list without content'
NO_LABEL,UNKNOWN_LABEL = 'line without a label','unknown label'
EMPTY_LABEL,LABEL_TWICE = 'label without a picture','label listed twice'
TWO_LABELS,PICTURE_TWICE,TWO_SPLITS = 'picture with several labels','picture listed twice','picture in several splits'
NOT_EVERYWHERE,TRAINVAL = 'picture not listed at every level','trainval differs from train and val'
TWO_FAMILIES,TWO_MAKERS = 'variant of several families','family of several manufacturers'
SIZE = 'unexpected size'
SAME,NEAR,MIRRORED = 'same pixels','near','mirrored'

@pytest.fixture(scope='session')
def clean(drawn, tmp_path_factory):
    "The drawn tree with other pictures: noise, no two alike"
    tree,rng = shutil.copytree(drawn, tmp_path_factory.mktemp('clean')/'tree'),np.random.default_rng(0)
    for o in sorted((tree/'data/images').iterdir()):
        blots = rng.integers(0, 256, (8,12,3), dtype=np.uint8)
        Image.fromarray(blots).resize((180,120), Image.Resampling.BICUBIC).save(o, quality=90)
    return tree

@pytest.fixture
def tree(clean, tmp_path): return shutil.copytree(clean, tmp_path/'tree')/'data'

@pytest.fixture
def first(tree): return {o: pick_split(read_aircraft(tree), o).image[0] for o in ('train','val','test')}

def jpg(tree, image): return tree/f'images/{image}.jpg'
def append(file, text):
    with file.open('a') as f: f.write(text)
def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
def label(tree, image, level='variant'): return dict(read_aircraft(tree, level)[['image','label']].to_numpy())[image]
def check(tree, **kwargs): return check_aircraft(tree, quiet=True, **kwargs)
def found(check, severity='error'):
    rows = check.findings[check.findings.severity==severity]
    return set(zip(rows.finding, rows.name, rows.detail))
def values(found):
    "The files and numbers in the details in place of the sentences"
    return {(finding, name, *re.findall(r'\w+\.txt|\d[\d,]*', detail)) for finding,name,detail in found}
def report(check, *about):
    "The line of the printed report that has all these words"
    line, = [o for o in str(check).splitlines() if all(str(k) in o for k in about)]
    return line

def test_nothing_wrong(tree):
    c = check(tree)
    assert c.ok and len(c.findings)==0 and len(c.pairs)==0 and len(c.unreadable)==0
    labels = {o: len((tree/f'{o}.txt').read_text().splitlines()) for o in ('variants','families','manufacturers')}
    assert c.counts.loc['trainval'].to_dict()=={'pictures': 32, **labels}
    assert str(tree) in str(c) and len(str(c).splitlines())==2+len(c.counts) and repr(c)==str(c)

def test_drawn_aircraft_are_no_duplicates(drawn): assert len(check(drawn).pairs)==0

def test_no_tree(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))): check(tmp_path)

@pytest.mark.parametrize('below', ['.', '..'])
def test_any_folder_on_the_way_will_do(tree, below): assert check(tree/below).ok

# the files

def test_missing_picture(tree, first):
    jpg(tree, first['val']).unlink()
    c = check(tree)
    assert found(c)=={(MISSING, first['val'], '')} and not c.ok and len(c.findings)==1

def test_unlisted_picture_is_a_remark(tree, first):
    shutil.copy(jpg(tree, first['train']), tree/'images/stray.jpg')
    (tree/'images/Thumbs.db').touch()
    c = check(tree)
    assert c.ok and found(c, 'remark')=={(UNLISTED, 'stray.jpg', ''), (UNLISTED, 'Thumbs.db', '')}
    assert len(c.pairs)==0

def test_unreadable_pictures(tree):
    "With Pillow's reason, and without the folder's name"
    images = sorted(pick_split(read_aircraft(tree), 'test').image[:4])
    cut = jpg(tree, images[0]).read_bytes()[:-200]
    contents = cut,b'no picture at all',b'',b'\xff\xd8\xff\xe0'
    for image,content in zip(images, contents): jpg(tree, image).write_bytes(content)
    c = check(tree)
    assert not c.ok and len(c.findings)==4 and set(c.findings.finding)=={UNREADABLE}
    reasons = dict(c.unreadable[['image','reason']].to_numpy())
    assert sorted(reasons)==images and 'image file is truncated' in reasons.pop(images[0])
    for o in reasons.values(): assert 'cannot identify image file' in o and str(tree) not in o
    report(c, UNREADABLE, *images)

def test_truncation_that_a_draft_does_not_see(tree, first):
    "The last bytes only: enough is there for the size and the first rows"
    file = jpg(tree, first['train'])
    file.write_bytes(file.read_bytes()[:-20])
    with Image.open(file) as image: assert image.size==(180,120)
    assert list(check(tree).unreadable.image)==[first['train']]

def test_no_picture_can_be_decoded(tree):
    for o in (tree/'images').iterdir(): o.write_bytes(b'nothing')
    c = check(tree)
    assert len(c.unreadable)==48 and len(c.pairs)==0

def test_unusual_pictures_can_be_decoded(tree):
    for image,mode in zip(read_aircraft(tree).image, ('L','P','RGBA','1','I;16','CMYK')):
        Image.new(mode, (50,40)).save(jpg(tree, image), format='TIFF')
    assert check(tree).ok

# the lists

def test_overlapping_splits(tree, first):
    for level in LEVELS: append(tree/f'images_{level}_test.txt', f"{first['val']} {label(tree, first['val'], level)}\n")
    c = check(tree)
    assert found(c)=={(TWO_SPLITS, first['val'], 'val, test')} and len(c.findings)==1

def test_overlap_with_trainval_where_there_is_no_train_and_val(tree, first):
    for level in LEVELS:
        for split in ('train','val'): (tree/f'images_{level}_{split}.txt').unlink()
    assert check(tree).ok
    image = first['test']
    for level in LEVELS: append(tree/f'images_{level}_trainval.txt', f'{image} {label(tree, image, level)}\n')
    assert found(check(tree))=={(TWO_SPLITS, first['test'], 'trainval, test')}

def test_trainval_is_wrong(tree, first):
    for level in LEVELS:
        edit(tree/f'images_{level}_trainval.txt', f"{first['val']} {label(tree, first['val'], level)}\n", '')
        append(tree/f'images_{level}_trainval.txt', f"{first['test']} {label(tree, first['test'], level)}\n")
    errors = found(check(tree))
    files = [f'images_{level}_trainval.txt' for level in LEVELS]
    assert values(errors)=={(TRAINVAL, first[o], file) for file in files for o in ('val','test')}
    assert len({detail for *_,detail in errors})==2*len(LEVELS), "left out and added are not the same"

def test_levels_that_disagree(tree, first):
    line = f"{first['test']} {label(tree, first['test'], 'family')}\n"
    edit(tree/'images_family_test.txt', line, '')
    assert values(found(check(tree)))=={(NOT_EVERYWHERE, first['test'], 'images_family_test.txt')}

def test_variant_of_two_families(tree, first):
    family,variant = label(tree, first['test'], 'family'),label(tree, first['test'])
    other = next(o for o in (tree/'families.txt').read_text().splitlines() if o!=family)
    edit(tree/'images_family_test.txt', f"{first['test']} {family}\n", f"{first['test']} {other}\n")
    again = pick_split(read_aircraft(tree), 'test').query('label==@variant').image.iloc[-1]
    append(tree/'images_family_test.txt', f'{again} {family}\n') # is not counted twice
    errors = {o[:2]: o[2] for o in found(check(tree))}
    assert errors[TWO_FAMILIES,variant]==f'{family} 11, {other} 1'

def test_family_of_two_manufacturers(tree, first):
    maker,family = label(tree, first['test'], 'manufacturer'),label(tree, first['test'], 'family')
    append(tree/'manufacturers.txt', '\nConvair\n')
    edit(tree/'images_manufacturer_test.txt', f"{first['test']} {maker}\n", f"{first['test']} Convair\n")
    (finding,name,detail), = found(check(tree))
    assert (finding,name)==(TWO_MAKERS,family) and detail.startswith(f'{maker} ') and detail.endswith(', Convair 1')

def test_unknown_label(tree, first):
    image = first['test']
    edit(tree/'images_variant_test.txt', f'{image} {label(tree, image)}\n', f'{image} Concorde\n')
    assert (UNKNOWN_LABEL, 'Concorde', first['test'], 'images_variant_test.txt') in values(found(check(tree)))

def test_line_without_label(tree, first):
    edit(tree/'images_variant_test.txt', f"{first['test']} {label(tree, first['test'])}\n", f"{first['test']}\n")
    assert found(check(tree))=={(NO_LABEL, first['test'], 'images_variant_test.txt')}

def test_label_without_a_picture_and_label_twice(tree):
    twice = (tree/'families.txt').read_text().splitlines()[0]
    append(tree/'variants.txt', '\nConcorde\n')
    append(tree/'families.txt', f'\n{twice}\n')
    assert found(check(tree))=={(EMPTY_LABEL, 'Concorde', 'variants.txt'), (LABEL_TWICE, twice, 'families.txt')}

def test_picture_with_two_labels(tree, first):
    image = first['train']
    edit(tree/'images_variant_trainval.txt', f'{image} {label(tree, image)}\n', f'{image} Concorde\n')
    append(tree/'variants.txt', '\nConcorde\n')
    assert found(check(tree))=={(TWO_LABELS, first['train'], f"{label(tree, first['train'])} / Concorde")}

def test_picture_listed_twice(tree, first):
    append(tree/'images_family_test.txt', f"{first['test']} {label(tree, first['test'], 'family')}\n")
    assert found(check(tree))=={(PICTURE_TWICE, first['test'], 'images_family_test.txt')}

@pytest.mark.parametrize('name', ['images_family_test.txt', 'manufacturers.txt'])
def test_list_without_content(tree, name):
    "Gone, empty, no text: three reasons, and nothing else is reported"
    def reason():
        (finding,file,detail), = found(check(tree))
        assert (finding,file)==(NO_CONTENT,name)
        return detail
    (tree/name).unlink()
    gone = reason()
    (tree/name).touch()
    empty = reason()
    (tree/name).write_bytes(b'\xff\xfe\xff')
    assert '0xff' in reason() and gone!=empty

def test_absent_level_is_a_remark(tree):
    for o in [tree/'families.txt', *tree.glob('images_family_*.txt')]: o.unlink()
    c = check(tree)
    assert c.ok and found(c, 'remark')=={(NO_LEVEL, 'family', '')}

def test_no_lists_at_all(tree):
    for o in tree.glob('images_*.txt'): o.unlink()
    c = check(tree)
    assert (NO_LISTS, 'images_variant_train.txt') in values(found(c)) and len(found(c, 'remark'))==48
    report(c, NO_LISTS)

def test_numbers(tree):
    assert check(tree, sizes=dict(train=16, val=16, test=16, trainval=32, variant=4)).ok
    c = check(tree, sizes=dict(train=3334, variant=4, dev=1))
    assert values(found(c))=={(SIZE, 'train', '16', '3,334'), (SIZE, 'dev', '0', '1')}

def test_numbers_of_the_archive_are_known_by_its_name(tree, tmp_path):
    (tmp_path/'tree').rename(tmp_path/'fgvc-aircraft-2013b')
    numbers = {o[1:] for o in values(found(check(tmp_path))) if o[0]==SIZE}
    assert numbers=={('train','16','3,334'), ('val','16','3,333'), ('trainval','32','6,667'), ('test','16','3,333'),
                     ('variant','4','100')}

def test_one_damage_does_not_hide_another(tree, first):
    rows = pick_split(read_aircraft(tree), 'train')
    maker = label(tree, rows.image[7], 'manufacturer')
    jpg(tree, rows.image[1]).unlink()
    jpg(tree, rows.image[2]).write_bytes(b'no picture')
    shutil.copy(jpg(tree, rows.image[3]), jpg(tree, first['val']))
    (tree/'images/stray.jpg').touch()
    lines = f'{rows.image[4]} {rows.label[4]}\n{rows.image[5]} Concorde\n{rows.image[6]}\n'
    append(tree/'images_variant_test.txt', lines)
    (tree/'images_family_val.txt').write_bytes(b'\xff')
    append(tree/'manufacturers.txt', '\nConvair\n')
    edit(tree/'images_manufacturer_trainval.txt', f'{rows.image[7]} {maker}\n', '')
    c = check(tree)
    damage = {MISSING, UNREADABLE, TWO_SPLITS, UNKNOWN_LABEL, NO_LABEL, NO_CONTENT, EMPTY_LABEL, TRAINVAL, TWO_LABELS}
    assert damage <= set(c.findings.finding)
    assert len(c.across)==1 and found(c, 'remark')=={(UNLISTED, 'stray.jpg', '')}
    names = {f'{c.across.image_1[0]}={c.across.image_2[0]}', rows.image[1], rows.image[2], 'stray.jpg', 'Concorde'}
    for o in set(c.findings.finding) | names: assert o in str(c)

def test_report_shortens_names(tree):
    for o in (tree/'images').iterdir(): o.unlink()
    line = report(check(tree), MISSING, 48)
    assert line.endswith('[...]') and len(line)<350

# duplicates

def twin(tree, first, change, **kwargs):
    with Image.open(jpg(tree, first['train'])) as image: changed = change(image.convert('RGB'))
    changed.save(jpg(tree, first['test']), **kwargs)
    return check(tree)

def only_pair(c, first):
    assert c.ok and len(c.pairs)==len(c.across)==1
    pair = c.pairs.iloc[0]
    assert pair.image_1<pair.image_2
    assert {pair.image_1: pair.split_1, pair.image_2: pair.split_2}=={first['train']: 'train', first['test']: 'test'}
    return pair

def test_copy_of_the_file(tree, first):
    shutil.copy(jpg(tree, first['train']), jpg(tree, first['test']))
    c = check(tree)
    pair = only_pair(c, first)
    assert (pair.kind,pair.distance)==(SAME,0)
    labels = {o: label(tree, o) for o in (first['train'],first['test'])}
    assert {pair.image_1: pair.label_1, pair.image_2: pair.label_2}==labels

def test_same_pixels_in_another_file(tree, first):
    assert only_pair(twin(tree, first, lambda o: o, format='PNG'), first).kind==SAME

def test_encoded_or_scaled_anew(tree):
    "Four pictures, each with one that was made of it"
    ours,theirs = [pick_split(read_aircraft(tree), o).image[:4] for o in ('train','test')]
    changes = lambda o: o,lambda o: o.resize((90,60)),lambda o: o.resize((360,200)),lambda o: o.convert('L')
    for a,b,change in zip(ours, theirs, changes):
        with Image.open(jpg(tree, a)) as image: change(image.convert('RGB')).save(jpg(tree, b), quality=40)
    pairs = check(tree).pairs
    assert set(map(frozenset, zip(pairs.image_1, pairs.image_2)))==set(map(frozenset, zip(ours, theirs)))
    assert set(pairs.kind)=={NEAR} and pairs.distance.max()<=32

def test_mirrored(tree, first): assert only_pair(twin(tree, first, ImageOps.mirror, quality=60), first).kind==MIRRORED

def test_same_pixels_need_the_same_shape(tree, first):
    "Flat pictures have one hash and, of 40 x 60 and 60 x 40, even the same bytes"
    Image.new('RGB', (40,60), 'grey').save(jpg(tree, first['train']))
    Image.new('RGB', (60,40), 'grey').save(jpg(tree, first['test']))
    assert only_pair(check(tree), first).kind==NEAR

def test_part_of_a_picture_is_none(tree, first):
    assert len(twin(tree, first, lambda o: o.crop((30,20,180,120))).pairs)==0

def test_symmetric_pictures_are_one_pair(tree, first):
    with Image.open(jpg(tree, first['train'])) as o: half = o.convert('RGB').crop((0,0,90,120))
    both = Image.new('RGB', (180,120))
    both.paste(half, (0,0)), both.paste(ImageOps.mirror(half), (90,0))
    for split in ('train','test'): both.save(jpg(tree, first[split]), format='PNG')
    assert only_pair(check(tree), first).kind==SAME

def test_within_a_split_is_not_across(tree):
    (a,b),labels = (pick_split(read_aircraft(tree), 'val')[o][:2] for o in ('image','label'))
    assert labels.nunique()==1
    shutil.copy(jpg(tree, a), jpg(tree, b))
    c = check(tree)
    assert c.ok and len(c.pairs)==len(c.within)==1 and len(c.across)==0
    line = report(c, SAME, f'{c.pairs.image_1[0]}={c.pairs.image_2[0]}')
    assert re.findall(r'\b\d{1,2}\b', line)==['1','1','0'], "a pair, of the same pixels, none of different labels"

def test_different_labels_are_counted(tree):
    train,val = (pick_split(read_aircraft(tree), o) for o in ('train','val'))
    a,b = train.image[0],val.image[val.label.astype(str)!=str(train.label[0])].iloc[0]
    shutil.copy(jpg(tree, a), jpg(tree, b))
    c = check(tree)
    assert len(c.across)==1 and len(c.within)==0
    assert re.findall(r'\b\d{1,2}\b', report(c, SAME, f'{c.across.image_1[0]}={c.across.image_2[0]}'))==['1','1','1']

def test_distance_is_heeded(tree, first):
    c = twin(tree, first, lambda o: o.resize((90,60)), quality=30)
    d = only_pair(c, first).distance
    assert d>0 and len(check(tree, distance=d).pairs)==1 and len(check(tree, distance=d-1).pairs)==0

@pytest.mark.parametrize('n', [0, 1, 1024, 1025, 2500])
def test_near_pairs_against_counting(n):
    rng = np.random.default_rng(n)
    a,b = (rng.random((n,16))<0.5 for _ in 'ab')
    i,j,d = near_pairs(a, b, 1)
    differing = {x: (a[x]!=b[x+1:]).sum(1) for x in range(n)}
    counted = {(x, y+x+1, differing[x][y]) for x in range(n) for y in np.flatnonzero(differing[x]<=1)}
    assert len(i)==len(counted) and set(zip(i, j, d))==counted

def test_hash_is_that_of_imagehash(tree, first):
    import imagehash
    with Image.open(jpg(tree, first['train'])) as o: image = o.convert('RGB')
    _,_,plain,mirrored = look_at(jpg(tree, first['train']))
    assert (plain==imagehash.phash(image, 16).hash.ravel()).all()
    assert (mirrored!=imagehash.phash(ImageOps.mirror(image), 16).hash.ravel()).sum()<=4

def test_show_names_the_pictures(tree, first, capsys):
    import matplotlib.pyplot as plt
    plt.switch_backend('agg')
    plt.close('all')
    check(tree).show()
    assert capsys.readouterr().out and not plt.get_fignums(), "nothing to see is said, not drawn"
    c = twin(tree, first, ImageOps.mirror)
    c.show()
    titles = [o.get_title() for o in plt.gcf().axes]
    plt.close('all')
    assert {o.split('\n')[0] for o in titles if o}=={f"{first['train']} train", f"{first['test']} test"}
    c.show(pd.concat([c.pairs]*5), n=3)
    assert sum(bool(o.images) for o in plt.gcf().axes)==6
    plt.close('all')

def test_without_duplicates(tree, first):
    table = read_aircraft(tree)
    val = pick_split(table, 'val').image
    shutil.copy(jpg(tree, first['train']), jpg(tree, first['test']))      # train = test
    shutil.copy(jpg(tree, val[1]), jpg(tree, val[2]))                     # val = val
    pairs = check(tree).pairs
    assert len(pairs)==2
    def left_out(*args): return set(table.image)-set(without_duplicates(table, *args).image)
    assert left_out(pairs)==left_out(pairs, 'trainval')=={first['train']}
    assert left_out(pairs, 'test')=={first['test']} and left_out(pairs, 'val')==set()
    assert len(without_duplicates(pick_split(table, 'trainval'), pairs))==32, "the twin is not in this table"
    with pytest.raises(ValueError, match="'fold 3'"): without_duplicates(table, pairs, 'fold 3')
    less = without_duplicates(table, pairs)
    assert list(less.index)==list(range(47)) and list(less.label.cat.categories)==list(table.label.cat.categories)

# photographs

def test_photographs(photos):
    "One tree of photographs, and the batches of what is left of it"
    path = photos/'data/airliners17'
    c = check(path)
    assert c.ok and len(c.findings)==0 and c.counts.pictures['trainval']==578
    assert c.across.kind.value_counts().to_dict()=={SAME: 3}
    assert c.within.kind.value_counts().to_dict()=={SAME: 7, NEAR: 1}
    assert (c.pairs.label_1!=c.pairs.label_2).sum()==6
    assert ('0100271','0100535') in set(zip(c.across.image_1, c.across.image_2))
    table = read_aircraft(path)
    less = without_duplicates(table, c.pairs)
    assert len(table)-len(less)==3 and (less.split=='val').sum()==(table.split=='val').sum()
    dls = table_dls(less, size=32, bs=8, num_workers=0)
    assert len(dls.train_ds)+len(dls.valid_ds)==575 and dls.c==table.label.nunique()

def test_hidden_files_are_no_remark(tree):
    for o in ('.DS_Store','._0000001.jpg'): (tree/f'images/{o}').write_bytes(b'x')
    (tree/'images/.ipynb_checkpoints').mkdir()
    assert not len(check(tree).findings)

def test_lists_in_other_encodings(tree):
    "With a byte order mark they are read, without one the list is named"
    file = tree/'images_family_val.txt'
    text = file.read_text()
    for encoding in ('utf-8-sig','utf-16'):
        file.write_bytes(text.replace('\n', '\r\n').encode(encoding))
        assert check(tree).ok
    file.write_bytes((text+'é').encode('latin-1'))
    assert 'UTF-8' in report(check(tree), NO_CONTENT, file.name)

def test_a_turned_copy_is_a_duplicate(tree, first):
    "The check sees pictures upright, as training does"
    exif = Image.Exif()
    exif[0x0112] = 3
    img = Image.open(jpg(tree, first['train']))
    img.transpose(Image.Transpose.ROTATE_180).save(jpg(tree, first['test']), quality=95, exif=exif)
    pair, = check(tree).across.itertuples()
    assert {pair.image_1, pair.image_2}=={first['train'], first['test']} and pair.kind==NEAR

class Terminal(io.StringIO):
    def isatty(self): return True

@pytest.mark.parametrize('output,quiet,rank,shown', [(Terminal, False, 0, True), (io.StringIO, False, 0, False),
                                                     (Terminal, True, 0, False), (Terminal, False, 1, False)])
def test_bars(output, quiet, rank, shown, drawn, tmp_path, monkeypatch):
    "In the terminal of the first process; nothing in a file, where each drawing would be a line"
    written = output()
    monkeypatch.setattr('sys.stderr', written)
    monkeypatch.setattr(ranks, 'processes', lambda: (2, rank))
    monkeypatch.setattr(ranks, 'IN_NOTEBOOK', False)
    check_aircraft(drawn, quiet=quiet)
    assert ('decoding' in written.getvalue())==shown
    cache_images(drawn, 20, tmp_path, quiet=quiet)
    assert ('smaller copies' in written.getvalue())==shown
    if not shown: assert not written.getvalue()

def test_a_bar_is_moved_by_one_thread(drawn, monkeypatch):
    "Several threads could find at the same moment that it is time to draw it"
    movers = set()
    class Bar(tqdm):
        def update(self, n=1):
            movers.add(get_ident())
            return super().update(n)
    monkeypatch.setattr(ranks, 'tqdm', lambda *args, **kwargs: Bar(*args, mininterval=0, **kwargs))
    monkeypatch.setattr('sys.stderr', Terminal())
    monkeypatch.setattr(ranks, 'IN_NOTEBOOK', False)
    check_aircraft(drawn)
    assert movers=={get_ident()}
