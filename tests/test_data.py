"Errors in a tree are reported with the name or file, and batches hold the pictures of their split"
import multiprocessing, shutil
import pandas as pd, pytest, torch
from PIL import Image
from fgvc_fisher.data import aircraft_dls, folder_dls, pick_split, read_aircraft, read_pictures, table_dls

@pytest.fixture
def tree(drawn, tmp_path): return shutil.copytree(drawn, tmp_path/'tree')

def append(file, text):
    with file.open('a') as f: f.write(text)

@pytest.mark.parametrize('below', ['.', 'data'])
def test_any_folder_on_the_way_will_do(tree, below): assert len(read_aircraft(tree/below))==48

def test_as_the_archive_unpacks(tree, tmp_path):
    (tmp_path/'archive').mkdir()
    tree.rename(tmp_path/'archive/fgvc-aircraft-2013b')
    assert len(read_aircraft(tmp_path/'archive'))==48

def test_table_agrees_with_the_lists(tree):
    table = read_aircraft(tree)
    for level,name in (('variant','variants'), ('family','families'), ('manufacturer','manufacturers')):
        for split in ('train','val','trainval','test'):
            expected = [o.split(' ',1) for o in (tree/f'data/images_{level}_{split}.txt').read_text().splitlines()]
            rows = pick_split(read_aircraft(tree, level), split)
            assert sorted(zip(rows.image, rows.label))==sorted(map(tuple, expected))
            assert list(rows.label.cat.categories)==(tree/f'data/{name}.txt').read_text().splitlines()
    box = (tree/'data/images_box.txt').read_text().splitlines()[0].split()
    assert table.set_index('image').loc[box[0], ['xmin','ymin','xmax','ymax']].tolist()==[int(o) for o in box[1:]]

def test_no_tree(tmp_path):
    with pytest.raises(FileNotFoundError, match='images/.*variants.txt.*fgvc-aircraft-2013b'): read_aircraft(tmp_path)

def test_no_lists(tree):
    for o in (tree/'data').glob('images_variant_*.txt'): o.unlink()
    with pytest.raises(FileNotFoundError, match='images_variant_train.txt'): read_aircraft(tree)

def test_unknown_label(tree):
    append(tree/'data/images_variant_val.txt', '0000001 Concorde\n')
    with pytest.raises(ValueError, match="images_variant_val.txt.*'Concorde'.*0000001.*variants.txt"):
        read_aircraft(tree)

def test_line_without_label(tree):
    append(tree/'data/images_variant_val.txt', '0000001\n')
    with pytest.raises(ValueError, match="images_variant_val.txt.*'0000001'"): read_aircraft(tree)

def test_missing_picture(tree):
    (tree/'data/images/0000003.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='0000003.jpg'): aircraft_dls(tree)

def test_unknown_level_and_split(tree):
    with pytest.raises(ValueError, match="'model'.*variant, family, manufacturer"): aircraft_dls(tree, level='model')
    with pytest.raises(ValueError, match="'fold 3'.*train, val, test"): aircraft_dls(tree, valid='fold 3')

def test_class_without_training_picture(tree):
    append(tree/'data/variants.txt', 'Concorde\n')
    with pytest.raises(ValueError, match='Concorde'): aircraft_dls(tree)

def test_same_picture_in_both_splits(tree):
    image = pick_split(read_aircraft(tree), 'val').image.min()
    with pytest.raises(ValueError, match=rf'\b16\b.*{image}'): aircraft_dls(tree, train='trainval')

GREY = 7 # how much lighter each picture is than the one before

@pytest.fixture(scope='session')
def greys(tmp_path_factory):
    "36 pictures, each of its own grey: a tree, folders with and without splits, and a list; the numbers of each split"
    root,numbers,rows = tmp_path_factory.mktemp('greys'),dict(train=[], val=[], test=[]),[]
    (root/'images').mkdir()
    (root/'variants.txt').write_text('A\nB\nC\n')
    for n in range(36):
        split,label = list(numbers)[n//4%3],'ABC'[n//12]
        numbers[split].append(n)
        files = root/f'images/{n:07}.jpg',root/f'splits/{split}/{label}/{n}.png',root/f'classes/{label}/{n}.png'
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (60,52), (GREY*n,)*3).save(file)
        append(root/f'images_variant_{split}.txt', f'{n:07} {label}\n')
        rows.append((files[2].relative_to(root), label, split))
    pd.DataFrame(rows, columns=['path','label','split']).to_csv(root/'list.csv', index=False)
    pd.DataFrame(rows, columns=['path','label','split']).drop(columns='split').to_csv(root/'no splits.csv', index=False)
    return root,numbers|dict(trainval=numbers['train']+numbers['val'])

def dealt(dl):
    "The numbers of the greys in an epoch's batches"
    return sorted((255*torch.cat([x for x,_ in dl])[:,0].mean((1,2))/GREY).round().int().tolist())

@pytest.mark.parametrize('cache', [False, True])
@pytest.mark.parametrize('train,valid', [('train','val'), ('trainval','test')])
@pytest.mark.parametrize('load,name', [(aircraft_dls,'.'), (folder_dls,'splits'), (table_dls,'list.csv')])
def test_training_deals_the_pictures_of_its_split_and_no_others(greys, tmp_path, load, name, train, valid, cache):
    root,numbers = greys
    kw = dict(train=train, valid=valid, size=32, bs=4, num_workers=0, cache=cache and tmp_path)
    dls = load(root/name, **kw)
    for _ in range(2): assert dealt(dls.train)==sorted(numbers[train])
    assert dealt(dls.valid)==sorted(numbers[valid])
    part = load(root/name, fraction=0.5, **kw)
    assert set(dealt(part.train)) < set(numbers[train]) and dealt(part.valid)==sorted(numbers[valid])

def test_training_without_the_bad_pictures(greys):
    root,numbers = greys
    dls = aircraft_dls(root, size=32, bs=4, num_workers=0, on_bad='skip')
    assert dealt(dls.train)==sorted(numbers['train']) and dealt(dls.valid)==sorted(numbers['val'])

@pytest.mark.parametrize('load,name', [(folder_dls,'classes'), (table_dls,'no splits.csv')])
def test_what_is_held_out_is_not_trained_on(greys, load, name):
    "Where there are no splits: each picture is dealt for training or for validation, never for both"
    def held(seed):
        dls = load(greys[0]/name, size=32, bs=1, seed=seed, num_workers=0)
        assert sorted(dealt(dls.train)+dealt(dls.valid))==list(range(36))
        return dealt(dls.valid)
    assert len(held(0))==6 and held(0)==held(0)!=held(1)

@pytest.mark.parametrize('workers', [0, 1])
def test_truncated_picture_is_named(tree, workers):
    file = tree/'data/images/0000002.jpg'
    file.write_bytes(file.read_bytes()[:900])
    dls = aircraft_dls(tree, size=32, bs=16, num_workers=workers)
    with pytest.raises(OSError, match='0000002.jpg'): list(dls.train)
    for o in multiprocessing.active_children(): o.terminate()     # PyTorch waits for 5 s for a worker that has raised

@pytest.mark.parametrize('content', [b'', b'%PDF-1.4 no picture', b'\xff\xd8\xff\xe0'])
def test_no_picture_at_all_is_skipped_and_said(tree, content):
    (tree/'data/images/0000002.jpg').write_bytes(content)
    with pytest.warns(UserWarning, match=r'\b1\b.*0000002.jpg'):
        dls = aircraft_dls(tree, size=32, bs=15, on_bad='skip', num_workers=0)
    assert len(dls.train_ds)==15 and len(list(dls.train))==1

def test_unusual_pictures_are_read(tree):
    "Grey, with a palette, with transparency, and named JPEG all the same"
    for i,mode in enumerate(('L','P','RGBA','1'), 1):
        Image.new(mode, (50,40)).save(tree/f'data/images/{i:07}.jpg', format='PNG')
    (x,_), = aircraft_dls(tree, size=32, bs=16, num_workers=0).train
    assert x.shape==(16,3,32,32)

@pytest.mark.parametrize('workers', [0, 2])
def test_same_seed_same_batches(tree, workers):
    from fastai.torch_core import set_seed
    def batches(seed):
        set_seed(seed)
        return torch.cat([x for x,_ in aircraft_dls(tree, size=32, bs=8, num_workers=workers).train])
    assert torch.equal(batches(1), batches(1)) and not torch.equal(batches(1), batches(2))

def test_source_pictures(drawn_source, tmp_path):
    table = read_pictures(drawn_source)
    assert len(table)==32 and list(table.label.cat.categories)==[0,1,2,3]
    pd.DataFrame(dict(path=['a.jpg'], label=[1])).to_csv(tmp_path/'labels.csv')
    with pytest.raises(ValueError, match='labels.csv.*class_index'): read_pictures(tmp_path)
    pd.DataFrame(dict(path=['a.jpg'], class_index=[1])).to_csv(tmp_path/'labels.csv')
    with pytest.raises(FileNotFoundError, match='labels.csv.*a.jpg'): read_pictures(tmp_path)

def test_a_learner_takes_files_and_pictures(tree):
    "From a table with and without a part of each picture; the order of files is kept"
    from fastai.vision.all import PILImage
    from fgvc_fisher.learner import aircraft_learner
    files = sorted((tree/'data/images').glob('*.jpg'))[:5]
    for credit in (0, 20):
        dls = aircraft_dls(tree, size=32, bs=4, credit=credit, num_workers=0)
        learn = aircraft_learner(dls, 'tiny:network', weights=None)
        with learn.no_bar():
            label,_,probs = learn.predict(PILImage.create(files[2]))
            assert label in learn.dls.vocab and abs(float(probs.sum())-1)<1e-5
            if credit: continue
            batch,_ = learn.get_preds(dl=learn.dls.test_dl(files))
            assert torch.allclose(batch[2], probs, atol=1e-5)
            assert torch.allclose(learn.predict(files[2])[2], probs, atol=1e-5)

def test_validation_in_the_tables_order(tree):
    table = pick_split(read_aircraft(tree), 'val')
    for workers in (0, 2):
        dls = aircraft_dls(tree, size=32, bs=3, num_workers=workers)
        assert [o.image for o in dls.valid.items]==list(table.image)
        for _ in range(2): assert torch.cat([y for _,y in dls.valid]).tolist()==table.label.cat.codes.tolist()
