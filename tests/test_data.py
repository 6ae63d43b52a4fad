"What is wrong with a tree is said, with the name of the thing"
import shutil
import pandas as pd, pytest, torch
from PIL import Image
from fgvc_fisher.data import aircraft_dls, pick_split, read_aircraft, read_pictures

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
    with pytest.raises(FileNotFoundError, match='is no FGVC-Aircraft tree: looked for images/ and variants.txt in .*fgvc-aircraft-2013b'):
        read_aircraft(tmp_path)

def test_no_lists(tree):
    for o in (tree/'data').glob('images_variant_*.txt'): o.unlink()
    with pytest.raises(FileNotFoundError, match='has no list of pictures: looked for images_variant_train.txt'): read_aircraft(tree)

def test_unknown_label(tree):
    append(tree/'data/images_variant_val.txt', '0000001 Concorde\n')
    with pytest.raises(ValueError, match="images_variant_val.txt: the label 'Concorde' of image 0000001 is not in .*variants.txt"): read_aircraft(tree)

def test_line_without_label(tree):
    append(tree/'data/images_variant_val.txt', '0000001\n')
    with pytest.raises(ValueError, match="the line '0000001' has no label"): read_aircraft(tree)

def test_missing_picture(tree):
    (tree/'data/images/0000003.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='1 pictures are listed but missing: .*0000003.jpg'): aircraft_dls(tree)

def test_unknown_level_and_split(tree):
    with pytest.raises(ValueError, match="level 'model': choose from variant, family, manufacturer"): aircraft_dls(tree, level='model')
    with pytest.raises(ValueError, match="split 'dev': there is no dev, only train, val, test"): aircraft_dls(tree, valid='dev')

def test_class_without_training_picture(tree):
    append(tree/'data/variants.txt', 'Concorde\n')
    with pytest.raises(ValueError, match='1 classes have no training picture: Concorde'): aircraft_dls(tree)

def test_same_picture_in_both_splits(tree):
    with pytest.raises(ValueError, match='16 pictures are in the training and in the validation split'): aircraft_dls(tree, train='trainval')

@pytest.mark.parametrize('workers', [0, 1])
def test_truncated_picture_is_named(tree, workers):
    file = tree/'data/images/0000002.jpg'
    file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(OSError, match='0000002.jpg cannot be decoded'): list(aircraft_dls(tree, size=32, bs=16, num_workers=workers).train)

@pytest.mark.parametrize('content', [b'', b'%PDF-1.4 no picture', b'\xff\xd8\xff\xe0'])
def test_no_picture_at_all_is_skipped_and_said(tree, content):
    (tree/'data/images/0000002.jpg').write_bytes(content)
    with pytest.warns(UserWarning, match='left out 1 pictures that cannot be decoded: .*0000002.jpg'):
        dls = aircraft_dls(tree, size=32, bs=15, on_bad='skip', num_workers=0)
    assert len(dls.train_ds)==15 and len(list(dls.train))==1

def test_unusual_pictures_are_read(tree):
    "Grey, with a palette, with transparency, and named JPEG all the same"
    for i,mode in enumerate(('L','P','RGBA','1'), 1): Image.new(mode, (50,40)).save(tree/f'data/images/{i:07}.jpg', format='PNG')
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
    with pytest.raises(ValueError, match='labels.csv has no column class_index'): read_pictures(tmp_path)
    pd.DataFrame(dict(path=['a.jpg'], class_index=[1])).to_csv(tmp_path/'labels.csv')
    with pytest.raises(FileNotFoundError, match='1 pictures are listed in .* but missing: .*a.jpg'): read_pictures(tmp_path)

def test_a_learner_takes_files_and_pictures(tree):
    "From a table with and without a part of each picture; the order of files is kept"
    from fastai.vision.all import PILImage
    from fgvc_fisher.learner import aircraft_learner
    files = sorted((tree/'data/images').glob('*.jpg'))[:5]
    for credit in (0, 20):
        learn = aircraft_learner(aircraft_dls(tree, size=32, bs=4, credit=credit, num_workers=0), 'test_resnet', weights=None)
        with learn.no_bar():
            label,_,probs = learn.predict(PILImage.create(files[2]))
            assert label in learn.dls.vocab and abs(float(probs.sum())-1)<1e-5
            if credit: continue
            batch,_ = learn.get_preds(dl=learn.dls.test_dl(files))
            assert torch.allclose(batch[2], probs, atol=1e-5) and torch.allclose(learn.predict(files[2])[2], probs, atol=1e-5)

def test_validation_in_the_tables_order(tree):
    table = pick_split(read_aircraft(tree), 'val')
    for workers in (0, 2):
        dls = aircraft_dls(tree, size=32, bs=3, num_workers=workers)
        assert [o.image for o in dls.valid.items]==list(table.image)
        for _ in range(2): assert torch.cat([y for _,y in dls.valid]).tolist()==table.label.cat.codes.tolist()
