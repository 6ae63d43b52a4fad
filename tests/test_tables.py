"FGVC-Aircraft, folders and CSV files are read as one kind of table"
import shutil
from io import BytesIO
import numpy as np, pandas as pd, pytest
from PIL import Image
from fgvc_fisher.data import aircraft_dls, folder_dls, table_dls
from fgvc_fisher.data import (
    class_weights, hold_out, pick_split, read_aircraft, read_image_folder, read_table, take_fraction
)
from fgvc_fisher.data.tables import crop_to_boxes

@pytest.fixture(scope='module')
def whole_archive(tmp_path_factory):
    "10,000 copies of a picture, 100 variants: what the real archive is known by; the lower 20 rows are white"
    root = tmp_path_factory.mktemp('archive')/'fgvc-aircraft-2013b/data'
    (root/'images').mkdir(parents=True)
    pixels = np.zeros((70,90,3), np.uint8)
    pixels[50:] = 255
    Image.fromarray(pixels).save(jpeg := BytesIO(), 'JPEG', quality=95)
    for i in range(10_000): (root/f'images/{i:07}.jpg').write_bytes(jpeg.getvalue())
    for level,n in (('variant',100), ('family',70), ('manufacturer',41)):
        stem = {'variant':'variants', 'family':'families', 'manufacturer':'manufacturers'}[level]
        (root/f'{stem}.txt').write_text('\n'.join(f'{level} {k}' for k in range(n)))
        splits = dict(train=range(3334), val=range(3334, 6667), trainval=range(6667), test=range(6667, 10_000))
        for split,these in splits.items():
            (root/f'images_{level}_{split}.txt').write_text(''.join(f'{i:07} {level} {i%n}\n' for i in these))
    return root.parent.parent

def test_credit_strip_is_cut_off_the_real_archive(whole_archive):
    "and only there, unless told otherwise; it does not reach the batches"
    assert set(read_aircraft(whole_archive).credit)=={20} and set(read_aircraft(whole_archive, credit=0).credit)=={0}
    for level in ('family','manufacturer'): assert set(read_aircraft(whole_archive, level).credit)=={20}
    kw = dict(size=32, bs=8, num_workers=0)
    with_strip,without = [next(iter(aircraft_dls(whole_archive, credit=o, **kw).valid))[0] for o in (0, None)]
    assert with_strip.max()>0.9 and without.max()<0.1

def test_cache_of_the_real_archive(whole_archive, tmp_path):
    "Two pictures of each variant for training and two to measure on"
    table = read_aircraft(whole_archive)
    table = pd.concat([pick_split(table, o).head(200) for o in ('train','val')])
    row = table_dls(table, size=32, bs=8, cache=tmp_path, num_workers=0).train_ds.items[0]
    assert row.path.parent.name=='images_48_cut20' and Image.open(row.path).size==(86,48) and not hasattr(row, 'credit')

def test_no_strip_elsewhere(drawn, photos):
    assert set(read_aircraft(drawn).credit)=={0} and set(read_aircraft(photos/'data/warbirds30').credit)=={0}

def test_boxes(drawn):
    table = crop_to_boxes(read_aircraft(drawn))
    lines = [o.split() for o in (drawn/'data/images_box.txt').read_text().splitlines()]
    boxes = {image: tuple(map(int, box)) for image,*box in lines}
    for o in table.itertuples(): assert o.crop==(boxes[o.image][0]-1, boxes[o.image][1]-1, *boxes[o.image][2:])
    whole,boxed = [next(iter(aircraft_dls(drawn, box=o, size=32, bs=4, num_workers=0).valid))[0] for o in (False, True)]
    assert (whole-boxed).abs().mean()>0.01

def test_missing_boxes(drawn, tmp_path):
    tree = shutil.copytree(drawn, tmp_path/'tree')
    lines = (tree/'data/images_box.txt').read_text().splitlines()
    (tree/'data/images_box.txt').write_text('\n'.join(lines[1:]))
    with pytest.raises(ValueError, match=f'images_box.txt.*{lines[0].split()[0]}'): aircraft_dls(tree, box=True)
    (tree/'data/images_box.txt').unlink()
    with pytest.raises(ValueError, match='images_box.txt'): aircraft_dls(tree, box=True)

def random_table(seed, n=400, classes=7):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.integers(0, classes, n-classes)**2 % classes])
    label = pd.Categorical(labels, categories=range(classes))
    return pd.DataFrame({'image': rng.permutation(n).astype(str), 'label': label, 'split': 'train'})

@pytest.mark.parametrize('seed', range(5))
def test_fractions_are_stratified_nested_and_seeded(seed):
    table,before = random_table(seed),set()
    for fraction in (0.15, 0.3, 0.5, 1.):
        part = take_fraction(table, fraction, seed)
        for label,n in table.label.value_counts().items():
            assert (part.label==label).sum()==(max(1, round(n*fraction)) if n else 0)
        assert before <= set(part.image) and list(part.image)==[o for o in table.image if o in set(part.image)]
        assert part.equals(take_fraction(table, fraction, seed))
        before = set(part.image)
    assert set(take_fraction(table, 0.3, seed).image)!=set(take_fraction(table, 0.3, seed+1).image)
    assert set(take_fraction(table[::-1], 1).image)==set(table.image)

@pytest.mark.parametrize('fraction', [0, -1, 1.5, 15])
def test_wrong_fraction(fraction, drawn):
    with pytest.raises(ValueError, match=f'fraction={fraction}'): aircraft_dls(drawn, fraction=fraction)

def test_hold_out():
    "Every picture is dealt once, to one side"
    table = random_table(3)
    dealt = hold_out(table, 0.2)
    assert dealt.drop(columns='split').equals(table.drop(columns='split')) and set(dealt.split)=={'train','val'}
    assert dealt.equals(hold_out(table, 0.2)) and not dealt.equals(hold_out(table, 0.2, seed=1))
    train,val = [set(pick_split(dealt, o).image) for o in ('train','val')]
    assert not train & val and train | val==set(table.image)
    for label,rows in dealt.groupby('label', observed=True):
        assert (rows.split=='val').sum()==min(max(1, round(0.2*len(rows))), len(rows)-1)
    alone = pd.DataFrame({'image': ['a','b','c'], 'label': pd.Categorical(['x','y','y']), 'split': 'train'})
    assert set(hold_out(alone).query("label=='x'").split)=={'train'}
    with pytest.raises(ValueError, match='fraction=1'): hold_out(table, 1)

def test_class_weights():
    from sklearn.utils.class_weight import compute_class_weight
    table = random_table(4)
    table = table[table.label!=6]
    table = table.assign(label=table.label.cat.remove_unused_categories())
    expected = compute_class_weight('balanced', classes=np.array(table.label.cat.categories), y=table.label.to_numpy())
    np.testing.assert_allclose(class_weights(table), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r'\b9\b'):
        class_weights(table.assign(label=table.label.cat.add_categories([9])))

def test_weighted_loss(drawn):
    "A loss with class weights takes the place of the data's own"
    from fastai.losses import CrossEntropyLossFlat
    from fgvc_fisher.learner import aircraft_learner
    dls = aircraft_dls(drawn, size=32, bs=4, num_workers=0)
    loss_func = CrossEntropyLossFlat(weight=class_weights(read_aircraft(drawn)))
    learn = aircraft_learner(dls, 'test_resnet', weights=None, loss_func=loss_func)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.01)

@pytest.fixture
def flowers(tmp_path):
    for split in ('train','val'):
        for k,label in enumerate(('rose','daisy','tulip')):
            (tmp_path/'flowers'/split/label).mkdir(parents=True)
            for i in range(4):
                Image.new('RGB', (40,30), (80*k,20*i,0)).save(tmp_path/f'flowers/{split}/{label}/{i}.png')
    return tmp_path/'flowers'

def test_image_folder(flowers):
    table = read_image_folder(flowers)
    assert len(table)==24 and list(table.label.cat.categories)==['daisy','rose','tulip']
    assert table.split.value_counts().to_dict()=={'train':12,'val':12}
    assert all(o.path.parent.name==o.label and o.path.parent.parent.name==o.split for o in table.itertuples())
    dls = folder_dls(flowers, size=16, bs=4, num_workers=0, cache=True)
    assert list(dls.vocab)==['daisy','rose','tulip'] and (len(dls.train_ds), len(dls.valid_ds))==(12,12)
    assert (flowers.with_name('flowers_24')/'train/rose/0.png.jpg').is_file()   # beside the folder: not a class
    assert len(folder_dls(flowers/'train', size=16, bs=4, num_workers=0).valid_ds)==3   # a fifth is held out

def test_image_folder_without(flowers, tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere'): folder_dls(tmp_path/'nowhere')
    (tmp_path/'empty').mkdir()
    with pytest.raises(FileNotFoundError): folder_dls(tmp_path/'empty')
    for o in (flowers/'train/rose').iterdir(): o.unlink()
    with pytest.raises(FileNotFoundError, match='rose'): folder_dls(flowers)

@pytest.mark.parametrize('splits', [True, False])
def test_csv(flowers, splits):
    rows = [(str(o.relative_to(flowers)), o.parent.name, o.parent.parent.name) for o in sorted(flowers.rglob('*.png'))]
    table = pd.DataFrame(rows, columns=['file','species','part'])
    table.to_csv(flowers/'list.csv', index=False)
    columns = dict(path='file', label='species', split='part' if splits else 'split')
    dls = table_dls(flowers/'list.csv', size=16, bs=4, num_workers=0, **columns)
    assert (len(dls.train_ds), len(dls.valid_ds))==((12,12) if splits else (18,6))
    assert list(dls.vocab)==['daisy','rose','tulip']
    again = table_dls(table, flowers, size=16, bs=4, num_workers=0, **columns)
    assert [o.path for o in again.valid_ds.items]==[o.path for o in dls.valid_ds.items]

def test_csv_with_numbers_for_labels(flowers):
    "In the order of the numbers, not of their digits"
    files = sorted(flowers.rglob('*.png'))
    table = pd.DataFrame({'path': files, 'label': [(i%12)+1 for i in range(24)]})
    assert list(read_table(table).label.cat.categories)==list(range(1,13))

def test_csv_without(flowers):
    with pytest.raises(FileNotFoundError, match='none.csv'): table_dls(flowers/'none.csv')
    (flowers/'a.csv').write_text('path,label,split\ntrain/rose/0.png,rose,train\ntrain/rose/9.png,rose,val\n')
    with pytest.raises(FileNotFoundError, match='a.csv.*9.png'): table_dls(flowers/'a.csv')
    (flowers/'a.csv').write_text('path,label,split\ntrain/rose/0.png,rose,train\ntrain/rose/1.png,rose,dev\n')
    with pytest.raises(ValueError, match="'val'.*train, dev"): table_dls(flowers/'a.csv')
    (flowers/'a.csv').write_text('path,label,split\ntrain/rose/0.png,rose,train\ntrain/rose/0.png,rose,val\n')
    with pytest.raises(ValueError, match='train/rose/0.png'): table_dls(flowers/'a.csv')
