"FGVC-Aircraft, folders and CSV files are read as one kind of table"
import shutil
from io import BytesIO
import numpy as np, pandas as pd, pytest
from PIL import Image
from fgvc_fisher.data import aircraft_dls, folder_dls, forms, table_dls
from fgvc_fisher.data import (
    class_weights, hold_out, pick_split, read_aircraft, read_data, read_folder, read_image_folder, read_pictures,
    read_table, take_fraction
)
from fgvc_fisher.data.forms import checked_splits
from fgvc_fisher.data.loaders import open_item
from fgvc_fisher.learner import aircraft_learner
from fgvc_fisher.data.tables import crop_to_boxes, picture_suffixes, read_lines, split_name

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

def test_cache_of_the_real_archive(whole_archive, tmp_path, monkeypatch):
    "Two pictures of each variant for training and two to measure on; one picture stands for all"
    monkeypatch.setattr(forms, '_check_leaks', lambda *args, **kw: None)
    table = read_aircraft(whole_archive)
    table = pd.concat([pick_split(table, o).head(200) for o in ('train','val')])
    row = table_dls(table, size=32, bs=8, cache=tmp_path, num_workers=0).train_ds.items[0]
    assert row.path.parent.name=='images_48_cut20' and Image.open(row.path).size==(86,48)
    assert not getattr(row, 'credit', 0)

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

def test_class_weights_of_true_and_false(flowers):
    labels = [False]*4+[True]*2
    table = read_table(pd.DataFrame({'path': sorted(flowers.rglob('*.png'))[:6], 'label': labels}))
    assert class_weights(table).tolist()==[0.75,1.5]

def test_class_weights():
    from sklearn.utils.class_weight import compute_class_weight
    table = random_table(4)
    table = table[table.label!=6]
    table = table.assign(label=table.label.cat.remove_unused_categories())
    expected = compute_class_weight('balanced', classes=np.array(table.label.cat.categories), y=table.label.to_numpy())
    np.testing.assert_allclose(class_weights(table), expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r'\b9\b'):
        class_weights(table.assign(label=table.label.cat.add_categories([9])))

@pytest.fixture
def flowers(tmp_path):
    for split in ('train','val'):
        for k,label in enumerate(('rose','daisy','tulip')):
            (tmp_path/'flowers'/split/label).mkdir(parents=True)
            for i in range(4):
                picture = Image.new('RGB', (40,30), (80*k,20*i,99*(split=='val')))
                picture.save(tmp_path/f'flowers/{split}/{label}/{i}.png')
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
    if not splits: table = table.drop(columns='part')
    table.to_csv(flowers/'list.csv', index=False)
    columns = dict(path='file', label='species', split='part' if splits else 'split')
    dls = table_dls(flowers/'list.csv', size=16, bs=4, num_workers=0, **columns)
    assert (len(dls.train_ds), len(dls.valid_ds))==((12,12) if splits else (18,6))
    assert list(dls.vocab)==['daisy','rose','tulip']
    again = table_dls(table, flowers, size=16, bs=4, num_workers=0, **columns)
    assert [o.path for o in again.valid_ds.items]==[o.path for o in dls.valid_ds.items]

@pytest.mark.parametrize('column,values', [('Split', 'ab'), ('set', 'ab'), ('subset', 'ab'), ('is_valid', [True,False]),
                                           ('part', ['train','Validation']), ('fold', ['test','train']),
                                           ('is_test', '01'), ('is_training_image', [1,0]), ('valid', ['yes','no'])])
def test_a_column_of_splits_by_another_name(flowers, column, values):
    "It is not left out in silence"
    files = sorted(flowers.rglob('*.png'))[:2]
    table = pd.DataFrame({'path': files, 'label': ['a','b'], column: list(values)})
    table.to_csv(flowers/'list.csv', index=False)
    for o in (table, flowers/'list.csv'):
        with pytest.raises(ValueError, match=f"'{column}' looks like its column of splits.*--split"): read_table(o)
        assert len(read_table(o, split=column))==2 and len(read_table(o, label=None))==2

def test_other_columns_may_hold_anything(flowers):
    "Lists, arrays, two columns of one name, a split that is categorical"
    table = pd.DataFrame({'path': sorted(flowers.rglob('*.png'))[:4], 'label': list('abab')})
    boxes = table.assign(box=[[1,2]]*4, array=[np.ones(2)]*4, valid_pixels=[3,4,5,6])
    for o in (boxes, pd.concat([boxes, boxes[['box']]], axis=1)): assert len(read_table(o))==4
    splits = table.assign(split=pd.Categorical(['trainval']*4))
    assert set(checked_splits(read_table(splits), 'flowers').split)=={'train','val'}
    with pytest.raises(ValueError, match='no column 2; its columns are path, label'): read_table(table, label=2)

def test_csv_with_numbers_for_labels(flowers):
    "In the order of the numbers, not of their digits"
    files = sorted(flowers.rglob('*.png'))
    table = pd.DataFrame({'path': files, 'label': [(i%12)+1 for i in range(24)]})
    assert list(read_table(table).label.cat.categories)==list(range(1,13))

def test_csv_without(flowers):
    with pytest.raises(FileNotFoundError, match='none.csv'): table_dls(flowers/'none.csv')
    (flowers/'a.csv').write_text('path,label,split\ntrain/rose/0.png,rose,train\ntrain/rose/9.png,rose,val\n')
    with pytest.raises(FileNotFoundError, match='a.csv.*9.png'): table_dls(flowers/'a.csv')
    (flowers/'a.csv').write_text('path,label,split\ntrain/rose/0.png,rose,train\ntrain/tulip/1.png,tulip,fold 3\n')
    with pytest.raises(ValueError, match="'val'.*train, fold 3"): table_dls(flowers/'a.csv')
    (flowers/'a.csv').write_text('path,label,split\ntrain/rose/0.png,rose,train\ntrain/rose/0.png,tulip,val\n')
    with pytest.raises(ValueError, match='train/rose/0.png'): table_dls(flowers/'a.csv')

# Folders: `path` or `path xN`, the number of pictures; `read` is what each split has of each class

def make(root, *files):
    for o in files:
        (root/o).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (4,3)).save(root/o, format='JPEG')
    return root
def read(root): return sorted(zip(read_image_folder(root).split, read_image_folder(root).label))

SPLITS = {'train': ['train','Train','TRAIN','training','Training Set','train_data','train-images','trn','trainset',
                    'train2017'],
          'val': ['val','Valid','validation','VALIDATION','dev','Dev','eval','Evaluation','val_set','valid images',
                  'val2017','val_2012'],
          'test': ['test','Testing','test_set','tst','TestData'], 'trainval': ['trainval','Train_Val']}
@pytest.mark.parametrize('split,name', [(k,o) for k,names in SPLITS.items() for o in names])
def test_a_split_folder_is_no_class(split, name, tmp_path):
    assert read(make(tmp_path, f'{name}/a/1.jpg', f'{name}/b/1.jpg'))==[(split,'a'), (split,'b')]
    assert split_name(f' {name} ')==split

NO_SPLIT = ['trainer','values','tests','set','data','dataset','fold 3',
            'trains','validated','','1','train1','2017','train20171']
@pytest.mark.parametrize('name', NO_SPLIT)
def test_another_name_is_a_class(name, tmp_path):
    assert split_name(name) is None
    if name: assert read(make(tmp_path, f'{name}/1.jpg', 'b/1.jpg'))==sorted([('train',name), ('train','b')])

HIDDEN = ['.ipynb_checkpoints/1.jpg', '__MACOSX/a/1.jpg', 'a/._1.jpg', 'a/.ipynb_checkpoints/2.jpg',
          '.DS_Store/a/1.jpg', '.git/1.jpg', '@eaDir/1.jpg', 'a/__MACOSX/._1.jpg']
@pytest.mark.parametrize('file', HIDDEN)
def test_hidden(file, tmp_path):
    root = make(tmp_path/'.hidden above', 'a/1.jpg', 'b/1.jpg', file)
    assert read(root)==[('train','a'), ('train','b')] and len(read_folder(root))==2
    root = make(tmp_path/'splits', 'Train/a/1.jpg', 'Dev/a/1.jpg', *[f'{o}/{file}' for o in ('Train','Dev')], file)
    assert read(root)[0]==('train','a') if file[0]=='a' else read(root)==[('train','a'), ('val','a')]

def test_what_a_learner_leaves_is_no_class(flowers):
    "fastai's `lr_find` makes the folder `models` below the data, and `save` a file in it"
    before,dls = read_image_folder(flowers/'train'),folder_dls(flowers/'train', size=32, bs=4, num_workers=0)
    learn = aircraft_learner(dls, 'tiny:network', None)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=20, show_plot=False)
    assert (flowers/'train/models').is_dir() and not list((flowers/'train/models').iterdir())
    pd.testing.assert_frame_equal(read_image_folder(flowers/'train'), before)
    learn.save('best')
    pd.testing.assert_frame_equal(read_image_folder(flowers/'train'), before)

def test_a_class_called_models(flowers):
    "Pictures make it one, and so does anything else but saved models: a class must not vanish in silence"
    (flowers/'train/models').mkdir()
    (flowers/'train/models/1.heic2').touch()
    with pytest.raises(FileNotFoundError, match='models'): folder_dls(flowers/'train')
    (flowers/'train/rose').rename(flowers/'train/models/rose')
    assert 'models' in read_image_folder(flowers/'train').label.cat.categories

LAYOUTS = {
    'a class called train': (['bus/1.jpg','car/1.jpg','train/1.jpg'], [('train',o) for o in ('bus','car','train')]),
    'a class called train in splits': (['train/train/1.jpg','val/train/1.jpg'], [('train','train'), ('val','train')]),
    'train alone': (['train/a/1.jpg'], [('train','a')]), 'test alone': (['test/a/1.jpg'], [('test','a')]),
    'deeper': (['train/a/b/c/1.jpg','val/a/1.jpg'], [('train','a'), ('val','a')]),
    'suffix in capitals': (['a/1.JPG','a/2.JPEG','a/3.Jfif'], [('train','a')]*3)}
@pytest.mark.parametrize('layout', LAYOUTS)
def test_layout(layout, tmp_path):
    files,found = LAYOUTS[layout]
    assert read(make(tmp_path, *files))==found

MIXED = {
    'classes beside splits': (['train/a/1.jpg','val/a/1.jpg','a/1.jpg'], 'train, val.*beside'),
    'a split and loose classes': (['train/a/1.jpg','b/1.jpg','c/1.jpg'], 'train.*b, c'),
    'two spellings': (['train/a/1.jpg','val/a/1.jpg','valid/a/1.jpg'], "'val'.*'valid'"),
    'dev and val': (['train/a/1.jpg','dev/a/1.jpg','val/a/1.jpg'], "'dev'.*'val'"),
    'an unsorted test split': (['train/a/1.jpg','val/a/1.jpg','test/1.jpg'], 'test'),
    'all unsorted': (['train/1.jpg','test/1.jpg'], 'no folder for each class'),
    'train, unsorted': (['train/1.jpg'], 'train.*no folder for each class'),
    'classes, and an unsorted test split': (['a/1.jpg','b/1.jpg','Test/1.jpg'], 'Test.*no folder for each class'),
    'splits below classes': (['a/train/1.jpg','a/val/1.jpg','b/train/1.jpg','b/val/1.jpg'], 'train, val'),
    'a folder too high': (['flowers/train/a/1.jpg','flowers/Valid/a/1.jpg'], 'flowers.*Valid, train')}
@pytest.mark.parametrize('layout', MIXED)
def test_mixed_layout_is_refused(layout, tmp_path):
    files,said = MIXED[layout]
    with pytest.raises(ValueError, match=said): read(make(tmp_path, *files))

@pytest.mark.parametrize('first,second', [('Train','train'), ('VAL','val')])
def test_two_cases_of_one_split(first, second, tmp_path):
    "On a disk that tells them apart, they are one split"
    assert read(make(tmp_path, f'{first}/a/1.jpg', f'{second}/b/1.jpg'))==[(split_name(first),o) for o in 'ab']

def test_pictures_in_no_class_are_said(tmp_path):
    root = make(tmp_path, 'train/a/1.jpg', 'train/loose.jpg', 'preview.jpg')
    with pytest.warns(UserWarning, match=r'\b2\b.*preview.jpg.*loose.jpg'): table = read_image_folder(root)
    assert len(table)==1

def test_every_suffix_that_pillow_reads(tmp_path):
    for o in ('.jpg','.jpeg','.jfif','.jpe','.png','.gif','.bmp','.tif','.tiff','.webp','.ppm','.jp2','.tga','.ico'):
        assert o in picture_suffixes()
        make(tmp_path/'classes', f'a/1{o}')
    assert not picture_suffixes() & {'.txt','.csv','.svg','.pdf','.mp4','.mpg','.json','.npy','.h5','.pt',''}
    (tmp_path/'classes/a/notes.txt').write_text('x')
    assert len(read_image_folder(tmp_path/'classes'))==14==len(read_folder(tmp_path/'classes'))

def test_order_as_torchvision_reads_folders(tmp_path):
    from torchvision.datasets import ImageFolder
    make(tmp_path, *[f'{o}.jpg' for o in ('b/1','b/10','b/2','a/x/1','a/x-y/1','a/z','a/Y','C/1','a/x/y/0')])
    found = ImageFolder(tmp_path)
    assert [str(o) for o in read_image_folder(tmp_path).path]==[file for file,_ in found.samples]
    assert [found.classes[i] for _,i in found.samples]==list(read_image_folder(tmp_path).label)

def test_imagenet_folders(tmp_path):
    root = make(tmp_path, 'Train/n01440764/1.jpg', 'Validation/n03888257/1.jpg', '__MACOSX/n01440764/._1.jpg')
    assert [(o.label, o.split) for o in read_pictures(root).itertuples()]==[(0,'train'), (701,'val')]

# Tables: what is written is what is read

@pytest.fixture
def listed(tmp_path):
    make(tmp_path, 'a.jpg')
    def write(text, encoding='utf-8', name='list.csv'):
        (tmp_path/name).write_bytes(text.encode(encoding))
        return tmp_path/name
    return write
def csv(labels): return 'path,label\n'+''.join(f'a.jpg,{o}\n' for o in labels)

ODD = ['1.1','1.10','007','7','NA','None','null','nan','NaN','N/A','','-1','True','TRUE','1e3','1000','2020-01-01',
       'inf','#N/A','0x1F','1_000','-','Škoda','<NA>',' a b']
@pytest.mark.parametrize('label', [o for o in ODD if o])
def test_label_as_written(label, listed):
    for labels in ([label], [label,'7'], [label,'x'], ['1',label,'2.5']):
        table = read_table(listed(csv(labels)))
        assert list(table.label)==[o.strip() for o in labels]
        assert set(table.label.cat.categories)=={o.strip() for o in labels}

def test_labels_that_differ_are_classes(listed):
    labels = [o for o in ODD if o.strip()]
    assert len(read_table(listed(csv(labels))).label.cat.categories)==len(labels)

@pytest.mark.parametrize('empty', ['', ' ', '""', '  ""'])
def test_an_empty_cell_is_missing(empty, listed):
    with pytest.raises(ValueError, match=r'list.csv.*\b1 rows.*row 3 below'): read_table(listed(csv(['x','y',empty])))

@pytest.mark.parametrize('labels,classes', [
    (['10','9','1'], ['1','9','10']), (['1.5','1','-2'], ['-2','1','1.5']), (['b','10','9'], ['10','9','b'])])
def test_order_of_classes(labels, classes, listed):
    "As before they were read as text: numbers by value"
    assert list(read_table(listed(csv(labels))).label.cat.categories)==classes

@pytest.mark.parametrize('labels', [[1,2], [1.5,2.5], [True,False], ['1.10','1.1'], ['NA','x'], [-1,3]])
def test_a_dataframe_has_its_own_labels(labels, listed):
    listed('')
    root = listed('').parent
    table = read_table(pd.DataFrame(dict(path='a.jpg', label=labels)), root)
    assert list(table.label)==labels and set(table.label.cat.categories)==set(labels)

@pytest.mark.parametrize('name', ['007.jpg', 'NA', '1.10', 'a b.jpg', 'ü.jpg'])
def test_path_as_written(name, listed, tmp_path):
    make(tmp_path, name)
    assert read_table(listed(f'path,label\n{name},x\n')).path[0]==tmp_path/name

@pytest.mark.parametrize('end', ['\n','\r\n','\r'])
@pytest.mark.parametrize('sep', [',',';','\t',', ','; '])
@pytest.mark.parametrize('encoding', ['utf-8','utf-8-sig','utf-16','utf-16-le+','utf-32'])
def test_csv_of_every_origin(end, sep, encoding, listed):
    text = end.join(sep.join(o) for o in (('path','label','n'), ('a.jpg','Škoda 1','1'), ('a.jpg','007','2')))
    if encoding.endswith('+'): text,encoding = '\ufeff'+text,encoding[:-1]
    table = read_table(listed(text+end, encoding))
    assert list(table.label)==['Škoda 1','007'] and list(table.n)==[1,2]

@pytest.mark.parametrize('encoding', ['latin-1','cp1252','utf-16-le','utf-16-be','utf-32-le','cp037'])
def test_another_encoding_is_named(encoding, listed, drawn, tmp_path):
    with pytest.raises(ValueError, match='list.csv.*UTF-8'): read_table(listed(csv(['Citroën']), encoding))
    with pytest.raises(ValueError, match='labels.csv.*UTF-8'):
        read_pictures(listed('path,class_index,é\na.jpg,1,é\n', encoding, 'labels.csv').parent)
    tree = shutil.copytree(drawn, tmp_path/'tree')
    for name in ('variants.txt','images_variant_train.txt','images_box.txt'):
        text = (tree/f'data/{name}').read_text()
        (tree/f'data/{name}').write_bytes((text+'é').encode(encoding))
        with pytest.raises(ValueError, match=f'{name}.*UTF-8'): read_aircraft(tree)
        (tree/f'data/{name}').write_text(text)

@pytest.mark.parametrize('encoding', ['utf-8-sig','utf-16','utf-32'])
@pytest.mark.parametrize('end', ['\n','\r\n'])
def test_lists_with_a_mark(encoding, end, drawn, tmp_path):
    tree = shutil.copytree(drawn, tmp_path/'tree')
    before = read_aircraft(tree).drop(columns='path')
    for o in (tree/'data').glob('*.txt'): o.write_bytes(o.read_text().replace('\n', end).encode(encoding))
    assert read_aircraft(tree).drop(columns='path').equals(before) and 'xmin' in before

@pytest.mark.parametrize('encoding', ['utf-8-sig','utf-16'])
def test_a_grid_with_a_mark(encoding, tmp_path):
    from fgvc_fisher.experiment.sweeps import read_grid
    (tmp_path/'grid.toml').write_bytes('data = "é"\r\n[[arm]]\r\narm = "a"\r\n'.encode(encoding))
    run, = read_grid(tmp_path/'grid.toml')
    assert run.data==str(tmp_path/'é')
    (tmp_path/'grid.toml').write_bytes('data = "é"'.encode('latin-1'))
    with pytest.raises(ValueError, match='^[^ ]*grid.toml is not.*UTF-8'): read_grid(tmp_path/'grid.toml')

def test_lines_end_at_line_ends_only(tmp_path):
    (tmp_path/'a.txt').write_bytes('a\u2028b\x85c\x0bd\r\n\n e \rf'.encode())
    assert read_lines(tmp_path/'a.txt')==['a\u2028b\x85c\x0bd','e','f']

@pytest.mark.parametrize('box', ['1 2 3', '1 2 3 x', '', '1 2 3 4 5', '1 2 3 4.5'])
def test_a_box_that_is_none(box, drawn, tmp_path):
    tree = shutil.copytree(drawn, tmp_path/'tree')
    (tree/'data/images_box.txt').write_text(f'0000001 {box}\n')
    with pytest.raises(ValueError, match='images_box.txt.*0000001'): read_aircraft(tree)

@pytest.mark.parametrize('text,said', [
    ('', 'list.csv'), ('path,label\n', 'no pictures'), ('path,label\n,\n\n', 'no pictures'),
    ('path,label\n"a,b\n', 'list.csv'),
    ('path\na.jpg\n', 'label.*columns'), ('a.jpg,x\n', 'label, path'), ('path,label\na.jpg\n', 'row 1'),
    ('path,label\na.jpg,x,y\na.jpg,x,y,z\n', 'list.csv'),
    ('path|label\na.jpg|x\n', 'label, path')])
def test_a_csv_that_is_none(text, said, listed):
    with pytest.raises(ValueError, match=said): read_table(listed(text))

@pytest.mark.parametrize('header', ['path,label,label', 'path,label, label ', 'path,label,"label"', 'label,path,label'])
def test_a_column_twice(header, listed):
    with pytest.raises(ValueError, match="2 columns 'label'"): read_table(listed(f'{header}\na.jpg,b.jpg,x\n'))
    columns = [o.strip(' "') for o in header.split(',')]
    twice = pd.DataFrame([['a.jpg','b.jpg','x']], columns=columns)
    with pytest.raises(ValueError, match="2 columns 'label'"): read_table(twice)

def test_another_column_twice_is_no_error(listed):
    assert list(read_table(listed('path,label,note,note,label.1\na.jpg,x,1,2,y\n')).label)==['x']

def test_compressed_and_with_row_names(listed, tmp_path):
    "As pandas reads them, and R writes them"
    import bz2, gzip, lzma
    for suffix,module in (('gz',gzip), ('bz2',bz2), ('xz',lzma)):
        file = tmp_path/f'list.csv.{suffix}'
        file.write_bytes(module.compress(csv(['007','NA']).encode('utf-16')))
        assert list(read_table(file).label)==['007','NA']
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(ValueError, match=file.name): read_table(file)
        file.write_bytes(b'path,label')
        with pytest.raises(ValueError, match=file.name): read_table(file)
    table = read_table(listed('"path" "label"\n"1" "a.jpg" "007"\n"2" "a.jpg" "NA"\n'.replace(' ', ',')))
    assert list(table.label)==['007','NA'] and list(table.index)==[0,1]

def test_blank_lines_and_spaces_and_trailing_commas(listed):
    assert len(read_table(listed(' path , label \n a.jpg , x \n')))==1
    assert len(read_table(listed('\npath,label\n\na.jpg,x\n,\n\n')))==1
    assert list(read_table(listed('path,label\na.jpg,x,\na.jpg,y,\n')).label)==['x','y']

@pytest.mark.parametrize('name,split', [*((o,k) for k,names in SPLITS.items() for o in names), ('fold 3 ','fold 3'),
                                        ('NA','NA')])
def test_split_in_a_csv(name, split, listed):
    table = read_table(listed(f'path,label,split\na.jpg,x, {name} \n'))
    assert list(table.split)==[split] and len(pick_split(table, name.strip()))==1
    table = read_table(pd.DataFrame(dict(path=['a.jpg'], label='x', split=[name])), listed('').parent)
    assert list(table.split)==[split]

def test_two_names_of_one_split(listed):
    assert len(pick_split(read_table(listed('path,label,split\na.jpg,x,Train\na.jpg,x,train \n')), 'train'))==2
    with pytest.raises(ValueError, match="list.csv.*'val'.*'dev'"):
        read_table(listed('path,label,split\na.jpg,x,val\na.jpg,x,dev\n'))

def test_no_split_in_a_row(listed):
    table = read_table(listed('path,label,split\na.jpg,x,\na.jpg,y,val\n'))
    assert table.split.isna().tolist()==[True,False]
    with pytest.raises(ValueError, match="'train'.*val"): pick_split(table, 'train')

@pytest.mark.parametrize('value,number', [('0',0), ('7',7), ('007',7), ('3.0',3), ('3.',3), (' 5 ',5), ('"6"',6)])
def test_class_index(value, number, listed):
    table = read_pictures(listed(f'path,class_index\na.jpg,{value}\n', name='labels.csv').parent)
    assert list(table.label)==[number]==list(table.class_index) and len(table.label.cat.categories)==number+1

NO_CLASS = ['-1','1.5','x','NA','1e3','-0.5','True','1000000','99999999999999','0x1','1 2','+1','٣']
@pytest.mark.parametrize('value', NO_CLASS)
def test_class_index_that_is_none(value, listed):
    with pytest.raises(ValueError, match='labels.csv.*class_index.*row 2.*'+value.replace('+', r'\+')):
        read_pictures(listed(f'path,class_index\na.jpg,1\na.jpg,{value}\n', name='labels.csv').parent)

def test_class_index_that_is_empty(listed):
    with pytest.raises(ValueError, match='labels.csv.*row 2'):
        read_pictures(listed('path,class_index\na.jpg,1\na.jpg,\n', name='labels.csv').parent)

@pytest.mark.parametrize('name,values', [('credit', ['John Doe','']), ('credit', ['12','7']),
                                         ('crop', ['corn','maize'])])
@pytest.mark.parametrize('as_label', [False, True])
def test_columns_of_a_csv_have_no_meaning(name, values, as_label, flowers):
    "Those called `credit` and `crop` neither: `read_aircraft`'s say what to cut off"
    if as_label: values = [o or 'Jane' for o in values]
    files = sorted(flowers.rglob('*.png'))
    label = name if as_label else 'label'
    rows = pd.DataFrame({'path': files, 'label': [o.parent.name for o in files]})
    rows[name] = [values[i%2] for i in range(len(files))]
    rows.to_csv(flowers/'list.csv', index=False)
    for table in (flowers/'list.csv', pd.read_csv(flowers/'list.csv')):
        found = read_table(table, label=label)
        assert name not in found and len(found)==24 and found.label.nunique()>1
        for cache,size in ((False, (40,30)), (True, (24,18))):
            dls = table_dls(table, label=label, size=16, bs=4, num_workers=0, cache=cache)
            assert {open_item(o).size for o in dls.valid.items}=={size} and len(dls.one_batch()[0])==4

def test_a_tree_keeps_what_is_cut_off(drawn):
    table = crop_to_boxes(read_aircraft(drawn, credit=3))
    found = read_table(table.sample(frac=0.5, random_state=0))
    assert set(found.credit)=={3} and isinstance(found.crop[0], tuple)

@pytest.mark.parametrize('link,to', [('a/up', '..'), ('a/here', '.'), ('self', '.'), ('b/top', '../..'),
                                     ('a/x/two', '../..')])
def test_links_in_circles(link, to, tmp_path):
    root = make(tmp_path/'qq', 'a/1.jpg', 'a/x/2.jpg', 'b/1.jpg')
    (root/link).symlink_to(to, target_is_directory=True)
    assert read(root)==[('train','a'), ('train','a'), ('train','b')] and len(read_folder(root))==3
    (make(tmp_path/'more', '9.jpg')/'back').symlink_to(root, target_is_directory=True)
    (root/'b/more').symlink_to(tmp_path/'more', target_is_directory=True)         # pictures elsewhere are read
    assert len(read_image_folder(root))==4

@pytest.mark.parametrize('train,valid', [(0,1), (False,True), ('0','1')])
def test_splits_that_are_no_text(train, valid, flowers):
    files = sorted(flowers.rglob('*.png'))
    table = pd.DataFrame({'path': files, 'label': [o.parent.name for o in files]})
    kw = dict(size=16, bs=4, num_workers=0, valid=valid, train=train)
    table['split'] = [valid if i%2 else train for i in range(len(files))]
    table.to_csv(flowers/'list.csv', index=False)
    for o in (table, flowers/'list.csv'):
        dls = table_dls(o, **kw)
        assert (len(dls.train_ds), len(dls.valid_ds))==(12,12)
    assert len(read_data(flowers/'list.csv', train=train, valid=valid))==24
    with pytest.raises(ValueError, match='no split 3'): table_dls(table, **(kw | dict(valid=3)))

@pytest.mark.parametrize('valid', [None, ''])
def test_no_validation_split_for_loaders(valid, flowers):
    with pytest.raises(ValueError, match=f'valid={valid!r}'): folder_dls(flowers, valid=valid, num_workers=0)

def test_copies_are_no_data(flowers):
    "Those of a lone folder `train` lie beside it, in the data"
    shutil.rmtree(flowers/'val')
    before = read_image_folder(flowers)
    for _ in range(2): folder_dls(flowers, size=16, bs=4, num_workers=0, cache=True)
    assert (flowers/'train_24/rose/0.png.jpg').is_file()
    pd.testing.assert_frame_equal(read_image_folder(flowers), before)
    assert len(read_folder(flowers))==12 and read_data(flowers).label.nunique()==3
    assert set(read_image_folder(flowers/'train_24').label)=={'daisy','rose','tulip'}      # unless one asks for them
    (flowers/'train/rose/manifest.jsonl').write_text('{"file": "0.png"}\n')                # somebody else's
    assert len(read_image_folder(flowers))==12
