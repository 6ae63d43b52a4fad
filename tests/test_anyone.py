"""Anyone's pictures: a folder or a CSV file to predictions by two commands, both questions from one file, and what is
refused in a sentence before anything is written"""
import json, re, shutil
from dataclasses import replace
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from safetensors.torch import load_file
from fgvc_fisher.data import read_data, read_folder, read_image_folder
from fgvc_fisher.data.forms import data_form
from fgvc_fisher.data.tables import aircraft_root
from fgvc_fisher.experiment import Run, do_run, load_run, predict, sweep
from fgvc_fisher.experiment.run import read_run, read_target, run_source
from fgvc_fisher.learner import load_weights, n_outputs, remake_head, source_model
from fgvc_fisher.retention import with_source_head
from forks import shell

NAMES = ('rose', 'daisy', 'iris')

def picture(file, value):
    "A picture of its own for each value"
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(value).integers(0, 256, (24,32,3), np.uint8)
    Image.fromarray(pixels).save(file)

def folder(path, counts=(8,8,8), splits=('',)):
    "A folder for each class, below a folder for each split"
    for i,split in enumerate(splits):
        for k,(name,n) in enumerate(zip(NAMES, counts)):
            for j in range(n): picture(path/split/name/f'{j}.png', 1000*i+100*k+j)
    return path

def listed(path, rows, header='file,species'):
    "A CSV file"
    path.write_text('\n'.join([header, *rows])+'\n')
    return path

@pytest.fixture
def flowers(tmp_path): return folder(tmp_path/'flowers')

@pytest.fixture
def unlabelled(drawn_source, tmp_path):
    "The source's pictures, in folders that say nothing"
    for i,o in enumerate(sorted(drawn_source.glob('images/*'))):
        (tmp_path/f'some/{i%3}').mkdir(parents=True, exist_ok=True)
        shutil.copy(o, tmp_path/f'some/{i%3}/{i}{o.suffix}')
    return tmp_path/'some'

def options(tiny_weights, out):
    "Of a short training"
    return ['--arch', 'tiny:network', '--weights', tiny_weights, '--epochs', 1, '--size', 32, '--bs', 4,
            '--num-workers', 0, '--out', out]

def test_a_folder_to_predictions(flowers, unlabelled, tiny_weights, tmp_path):
    out,csv = tmp_path/'out',tmp_path/'predictions.csv'
    said = shell('fgvc-finetune', '--data', flowers, '--source', unlabelled, *options(tiny_weights, out))
    assert said.code==0, said.err
    for o in ('read as a folder for each class', '3 classes', 'train 18, val 6', 'seed 42', 'agreement_source_bn'):
        assert o in said.out
    assert 'retention' not in said.out
    said = shell('fgvc-predict', out, flowers, '--out', csv)
    assert said.code==0 and '24 pictures' in said.out, said.err
    rows = pd.read_csv(csv)
    assert list(rows)==['path','label','probability','label_2','probability_2','label_3','probability_3']
    assert set(rows.path)=={str(o) for o in flowers.glob('*/*')} and set(rows.label)<=set(NAMES)
    assert np.allclose(rows.filter(like='probability').sum(axis=1), 1, atol=1e-4)
    assert (rows.probability>=rows.probability_2).all()
    (flowers/'broken.jpg').write_bytes(b'no picture')
    said = shell('fgvc-predict', out, flowers/'broken.jpg', flowers/'rose/0.png', '--head', 'source', '--n', 2,
                 '--out', csv)
    assert said.code==0 and 'broken.jpg' in said.err and 'Traceback' not in said.err
    rows = pd.read_csv(csv)
    assert len(rows)==1 and rows.label[0].startswith('class ') and list(rows)[-1]=='probability_2'

def test_results_beside_the_classes(flowers, tiny_weights, tmp_path, monkeypatch):
    "What a run and a sweep write among the folders of the classes is no class, for them and for later ones"
    monkeypatch.chdir(flowers)
    before = read_image_folder('.')
    how = [*options(tiny_weights, 'finetuned'), '--strength', 0]
    for seed in (1,2):
        said = shell('fgvc-finetune', '--data', '.', *how, '--seed', seed, '--out', f'finetuned/{seed}')
        assert said.code==0 and '3 classes' in said.out, said.err
    run = Run('.', arch='tiny:network', weights=str(tiny_weights), epochs=1, size=32, bs=4, num_workers=0)
    assert not sweep([run, replace(run, seed=1)], 'sweep', quiet=True).attrs['failed']
    do_run(run, 'again', quiet=True)
    pd.testing.assert_frame_equal(read_image_folder('.'), before)

def test_a_list_to_predictions(flowers, drawn_source, tiny_weights, tmp_path):
    "Names of columns, paths that are absolute or relative, a split by another name"
    rows = [f"{o if i%2 else o.relative_to(tmp_path)},{o.parent.name},{'Training' if i%4 else 'dev'}"
            for i,o in enumerate(sorted(flowers.glob('*/*')))]
    csv = listed(tmp_path/'list.csv', rows, 'file,species,part')
    columns = ['--path', 'file', '--label', 'species', '--split', 'part']
    said = shell('fgvc-finetune', '--data', csv, *columns, '--source', drawn_source, '--fraction', 0.5, '--test', 'dev',
                 *options(tiny_weights, tmp_path/'out'))
    assert said.code==0, said.err
    assert 'read as a CSV file' in said.out and 'train 18, val 6' in said.out and 'retention_source_bn' in said.out
    run = read_run(tmp_path/'out')
    assert (run.path,run.label,run.split,run.fraction)==('file','species','part',0.5)
    asked = listed(tmp_path/'asked.csv', [str(o.relative_to(tmp_path)) for o in flowers.glob('rose/*')], 'path')
    said = shell('fgvc-predict', tmp_path/'out', asked, '--out', tmp_path/'p.csv')
    assert said.code==0 and len(pd.read_csv(tmp_path/'p.csv'))==8, said.err

def one_class(path): folder(path/'flowers', counts=(8,))
def no_picture(path):
    for o in NAMES: (path/'flowers'/o).mkdir(parents=True)
def in_two_splits(path):
    folder(path/'flowers', splits=('train','val'))
    shutil.copy(path/'flowers/train/rose/3.png', path/'flowers/val/iris/copy.png')
def single_pictures(path):
    for i in range(30): picture(path/f'flowers/{i}/0.png', i)
def archive(path): (path/'flowers.zip').write_bytes(b'PK')
def missing_file(path): listed(path/'list.csv', ['a.png,rose', 'b.png,iris'], 'path,label')
def repeated(path):
    folder(path/'flowers')
    rows = ['flowers/rose/0.png,rose', 'flowers/iris/0.png,iris', 'flowers/rose/0.png,iris']
    listed(path/'list.csv', rows, 'path,label')
def repeated_by_absolute_path(path):
    folder(path/'flowers')
    rows = ['flowers/rose/0.png,rose', 'flowers/iris/0.png,iris', f'{path}/flowers/../flowers/rose/0.png,rose']
    listed(path/'list.csv', rows, 'path,label')
def other_columns(path):
    folder(path/'flowers')
    listed(path/'list.csv', ['flowers/rose/0.png,rose'])
def plain(path): folder(path/'flowers')
def beside_a_list(path):
    picture(path/'flowers/0.png', 0)
    listed(path/'flowers/list.csv', ['0.png,rose'], 'path,label')
def in_a_folder_beside_a_list(path):
    for i in range(4): picture(path/f'flowers/images/{i}.png', i)
    listed(path/'flowers/list.csv', ['images/0.png,rose'], 'path,label')

WRONG = [(one_class, [], "one class, 'rose'"), (no_picture, [], 'no pictures'), (in_two_splits, [], 'two splits'),
         (single_pictures, [], '30 classes has a single'), (archive, ['--data', 'flowers.zip'], 'unpack'),
         (missing_file, ['--data', 'list.csv'], '2 pictures in list.csv are missing'),
         (repeated, ['--data', 'list.csv'], 'rows 0 and 2'),
         (repeated_by_absolute_path, ['--data', 'list.csv'], 'rows 0 and 2'),
         (other_columns, ['--data', 'list.csv'], 'file, species'), (plain, ['--level', 'family'], "level='family'"),
         (plain, ['--label', 'species'], "label='species'"), (plain, ['--form', 'aircraft'], 'FGVC-Aircraft'),
         (plain, ['--form', 'table'], "form='table'"), (beside_a_list, [], 'list.csv'),
         (in_a_folder_beside_a_list, [], 'list.csv'), (plain, ['--data', ''], "--data ''"),
         (plain, ['--train', 'exam'], 'exam'), (plain, ['--test', 'exam'], 'exam'),
         (plain, ['--fraction', '0'], 'fraction=0'), (plain, ['--fraction', '1.5'], 'fraction=1.5'),
         (plain, ['--source', 'flowers/nowhere'], 'nowhere'), (plain, ['--fisher-from', 'source', '--strength', '1'],
                                                              '--fisher-from target')]

@pytest.mark.parametrize('make,args,named', WRONG, ids=[f'{o[0].__name__} {" ".join(o[1])}' for o in WRONG])
def test_what_is_refused(make, args, named, tiny_weights, tmp_path):
    make(tmp_path)
    given = [] if '--data' in args else ['--data', 'flowers']
    strength = [] if '--strength' in args or '--source' in args else ['--strength', 0]
    said = shell('fgvc-finetune', *given, *args, *strength, *options(tiny_weights, 'out'), cwd=tmp_path)
    assert said.code!=0 and 'Traceback' not in said.err, said.err
    assert named in said.err.strip().splitlines()[-1] and not (tmp_path/'out').exists()

@pytest.mark.parametrize('break_it,named', [
    (lambda o: (o/'result.json').unlink(), 'not finished'), (lambda o: (o/'run.json').unlink(), 'run.json'),
    (lambda o: (o/'model.safetensors').unlink(), 'model.safetensors'),
    (lambda o: (o/'model.safetensors').write_bytes(b'nonsense'), 'model.safetensors'),
    (lambda o: (o/'run.json').write_text(json.dumps(json.loads((o/'run.json').read_text()) | dict(colour='red'))),
     'another version.*colour'),
    (lambda o: shutil.rmtree(o), 'no such file')])
def test_predictions_that_are_refused(break_it, named, tiny_done, drawn, tmp_path):
    shutil.copytree(tiny_done, tmp_path/'run')
    break_it(tmp_path/'run')
    said = shell('fgvc-predict', tmp_path/'run', drawn, '--out', tmp_path/'p.csv')
    assert said.code!=0 and 'Traceback' not in said.err and re.search(named, said.err), said.err
    assert not (tmp_path/'p.csv').exists()

@pytest.mark.parametrize('pictures,named', [('nowhere', 'nowhere'), ('empty', 'no pictures'), ('text.txt', 'text.txt'),
                                            ('photo.HEIC', 'photo.HEIC cannot'), ('a.csv x.jpg', 'a.csv is a table')])
def test_pictures_that_are_refused(pictures, named, tiny_done, tmp_path):
    (tmp_path/'empty').mkdir()
    (tmp_path/'text.txt').write_text('no list')
    (tmp_path/'a.csv').write_text('path\nx.jpg\n')
    for o in ('photo.HEIC','x.jpg'): (tmp_path/o).write_bytes(bytes(range(256)))
    said = shell('fgvc-predict', tiny_done, *pictures.split(), '--out', 'p.csv', cwd=tmp_path)
    assert said.code!=0 and 'Traceback' not in said.err and named in said.err and not (tmp_path/'p.csv').exists()

# One file, both tasks

def test_both_heads_are_those_of_the_run(tiny_run, tiny_done, tmp_path):
    "Against the tuned model and the source by another way; the run's pictures and weights are not needed"
    source = run_source(replace(tiny_run, beta=0), tmp_path).model.cpu()
    tuned = load_weights(remake_head(source_model('tiny:network', None), 4), tiny_done/'model.safetensors').eval()
    x = torch.randn(5, 3, 32, 32)
    moved = tmp_path/'moved'
    shutil.copytree(tiny_done, moved)
    for name in ('data','source','weights'):
        fields = json.loads((moved/'run.json').read_text()) | {name: 'gone'}
        (moved/'run.json').write_text(json.dumps(fields))
    with torch.no_grad():
        torch.testing.assert_close(load_run(moved).model.cpu()(x), tuned(x))
        expected = with_source_head(tuned, source, 'source')(x)
        torch.testing.assert_close(load_run(moved, 'source').model.cpu()(x), expected)
        changed = with_source_head(tuned, source, 'target')(x)
        assert not torch.allclose(expected, changed)                 # the statistics matter
    sizes = {k: v.numel() for k,v in load_file(moved/'model.safetensors').items()}
    small = {k for k in sizes if k.startswith('source/')}
    assert small and not any(o.dim()==4 for k,o in load_file(moved/'model.safetensors').items() if k in small)
    own = source.state_dict()
    assert sum(sizes[k] for k in small)==sum(v.numel() for k,v in own.items() if k.startswith('fc.') or 'running_' in k)

def test_predictions_do_not_depend_on_the_batch(tiny_done, drawn):
    learn = load_run(tiny_done)
    one,two = predict(learn, drawn, bs=1),predict(learn, drawn, bs=7)
    assert one.label.equals(two.label) and np.allclose(one.probability, two.probability, atol=1e-5)
    same = predict(learn, pd.DataFrame(dict(path=list(one.path))))
    assert same.label.equals(one.label)

def test_a_loss_that_says_nothing_about_probabilities(tiny_done, drawn):
    learn = load_run(tiny_done)
    learn.loss_func.temperature = 1.
    expected = predict(learn, drawn, n=1)
    learn.loss_func = torch.nn.CrossEntropyLoss()
    assert np.allclose(predict(learn, drawn, n=1).probability, expected.probability, atol=1e-6)
    for wrong in (dict(n=0), dict(bs=0)):
        with pytest.raises(ValueError, match=f'{next(iter(wrong))}=0'): predict(learn, drawn, **wrong)

# Source pictures without labels

def test_a_run_without_labels(tiny_run, unlabelled, tmp_path):
    assert list(read_folder(unlabelled).label.cat.categories)==['unknown']
    row = do_run(replace(tiny_run, source=str(unlabelled), epochs=1), tmp_path/'run', quiet=True)
    assert np.isnan(row['before']) and not any(o.startswith('retention') for o in row)
    assert 0<=row['agreement_source_bn']<=1 and row['divergence_source_bn']>=0
    with pytest.raises(ValueError, match='labels'):
        do_run(replace(tiny_run, source=str(unlabelled), kind='empirical'), tmp_path/'other', quiet=True)
    kept = replace(tiny_run, source=str(unlabelled), tune="head", beta=0., epochs=1)
    same = do_run(kept, tmp_path/"head", quiet=True)
    assert same['agreement_source_bn']==1 and same['divergence_source_bn']<1e-6

# The table of a data set

def test_a_test_split_is_left_alone(tmp_path):
    folder(tmp_path/'flowers', splits=('Training','test'))
    table = read_data(tmp_path/'flowers')
    assert dict(table.split.value_counts())==dict(train=18, val=6, test=24)
    assert set(table[table.split=='test'].path)=={*(tmp_path/'flowers/test').glob('*/*')}
    same,other = read_data(tmp_path/'flowers'),read_data(tmp_path/'flowers', seed=1)
    assert same.equals(table) and not other.equals(table) and set(other.path)==set(table.path)

def test_what_is_held_out_belongs_to_the_seed(flowers, tiny_weights):
    run = Run(flowers, arch='tiny:network', weights=tiny_weights)
    splits = [read_target(replace(run, seed=o)).set_index('image').split for o in (1,1,2)]
    assert splits[0].equals(splits[1]) and not splits[0].equals(splits[2])
    few = read_target(replace(run, fraction=0.5))
    assert dict(few.split.value_counts())==dict(train=9, val=6)

def test_ids_and_files_of_runs_with_a_tree_are_as_they_were():
    assert Run('tree').id=='plain-42-4e4f0150'
    assert Run('tree', fisher_from='target', strength=1.).fisher_pictures==('target', 'tree', 'variant', 'train')

@pytest.mark.parametrize('name,said', [('a.zip', 'unpack'), ('a.TAR.GZ', 'unpack'), ('a.7z', 'unpack'),
                                       ('a.JPG', 'picture'), ('a.webp', 'picture')])
def test_files_that_are_no_list(name, said, tmp_path):
    (tmp_path/name).write_bytes(b'x')
    with pytest.raises(ValueError, match=said): data_form(tmp_path/name)

@pytest.mark.parametrize('names', [('1', '1.0', '01'), ('NA', 'nan', 'None'),
    ('a,b', 'c"d', 'e\'f', 'Škoda', '日本', '🌹', ' a', 'a', 'A', 'x'*100)])
def test_names_of_classes(names, tiny_weights, tmp_path):
    "Whatever the classes are called, the model file and the predictions have their names"
    for i,name in enumerate(names):
        for j in range(4): picture(tmp_path/'data'/name/f'{j}.png', 10*i+j)
    run = Run(tmp_path/'data', arch='tiny:network', weights=tiny_weights, size=32, bs=4, epochs=1, num_workers=0)
    do_run(run, tmp_path/'run', quiet=True)
    learn = load_run(tmp_path/'run')
    assert list(learn.dls.vocab)==sorted(names) and set(predict(learn, tmp_path/'data').label)<=set(names)
    assert list(load_run(tmp_path/'run', pictures=True).dls.vocab)==sorted(names)

# Copies

def test_pictures_in_no_split_and_empty_files_are_no_copies(flowers, tmp_path):
    files = sorted(flowers.glob('*/*'))
    shutil.copy(files[0], files[1])                              # two copies that are in no split
    for o in (files[2], files[9], files[10]): o.write_bytes(b'')
    splits = ['', '', *('train' if i%2 else 'val' for i in range(22))]
    csv = listed(tmp_path/'list.csv', [f'{o},{o.parent.name},{s}' for o,s in zip(files, splits)], 'path,label,split')
    assert dict(read_data(csv).split.value_counts())==dict(train=11, val=11)
    run = Run(csv, arch='tiny:network', on_bad='skip')
    with pytest.warns(UserWarning, match='skipping 3'): assert len(read_target(run))==21

@pytest.mark.parametrize('seed', range(3))
def test_copies_in_what_was_held_out(seed, flowers):
    table = read_data(flowers, seed=seed)
    held,kept = [table[(table.split==o) & (table.label=='iris')].path.iloc[0] for o in ('val','train')]
    shutil.copy(held, kept)
    said = f"({held}.*{kept}|{kept}.*{held}).*two splits.*held out.*remove"
    with pytest.raises(ValueError, match=said): read_data(flowers, seed=seed)
    assert len(read_data(flowers, seed=seed, valid=''))==24      # all are in one split

def test_one_content_with_two_labels(flowers):
    shutil.copy(flowers/'iris/0.png', flowers/'rose/copy.png')
    with pytest.warns(UserWarning, match='1 times.*iris.*rose'): assert len(read_data(flowers, valid=''))==25

TWICE = [('test', 'test', True), ('test', 'test', False), ('train', 'val', False), ('train', 'test', True),
         ('val', 'test', False)]
@pytest.mark.parametrize('source,target,relabel', TWICE)
def test_a_tree_that_lists_a_picture_twice(source, target, relabel, drawn, tmp_path):
    tree = shutil.copytree(drawn, tmp_path/'tree')
    table = read_data(tree)
    row = table[table.split==source].iloc[0]
    other = next(o for o in table.label.cat.categories if o!=row.label)
    root = aircraft_root(tree)
    line = f'\n{row.image} {other if relabel else row.label}\n'
    with (root/f'images_variant_{target}.txt').open('a') as f: f.write(line)
    with pytest.raises(ValueError, match=f'{row.image}.*{source}.*{target}'): read_data(tree)

def test_a_tree_without_one_of_its_lists(drawn, tmp_path):
    "`trainval` is then read too, and repeats the other one"
    for split in ('train','val'):
        root = aircraft_root(shutil.copytree(drawn, tmp_path/split))
        lists = [(root/f'images_variant_{o}.txt').read_text() for o in ('train','val')]
        (root/'images_variant_trainval.txt').write_text('\n'.join(lists))
        (root/f'images_variant_{split}.txt').unlink()
        table = read_data(root, train='trainval', valid='test')
        assert set(table.split)=={'train','val','trainval','test'}-{split}

def test_unknown_names_of_columns(flowers, tmp_path):
    csv = listed(tmp_path/'list.csv', [f'{o},{o.parent.name}' for o in flowers.glob('*/*')], 'path,label')
    for data in (csv, flowers):
        with pytest.raises(ValueError, match="'paths'.*path, label, split"): read_data(data, columns=dict(paths='x'))

# Weights that cannot be downloaded

def test_without_a_network_it_is_said_at_once(monkeypatch, tmp_path):
    from huggingface_hub import constants
    tried = []
    def no_address(host, *args):
        tried.append(host)
        raise OSError('Name or service not known')
    monkeypatch.setattr('fgvc_fisher.learner.socket.getaddrinfo', no_address)
    monkeypatch.setattr('fgvc_fisher.learner.getproxies', dict)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path))
    with pytest.raises(ValueError, match=f"'test_resnet'.*--weights.*{tmp_path}"): source_model('test_resnet')
    assert len(tried)==1 and not constants.HF_HUB_OFFLINE

def test_torchvisions_weights(monkeypatch, tmp_path):
    "A function of torchvision is asked for its weights; one without such a parameter makes its own"
    asked = []
    def fails(url, *args, **kwargs):
        asked.append(url)
        raise OSError('no route to host')
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', fails)
    name = 'torchvision.models:squeezenet1_1'
    with pytest.raises(ValueError, match=f"'{name}'.*no route to host.*--weights"): source_model(name)
    assert len(asked)==1 and n_outputs(source_model(name, None))==1000

def test_a_sweep_says_what_its_data_is(flowers, tiny_weights, tmp_path):
    grid = tmp_path/'grid.toml'
    grid.write_text(f'''data = "flowers"
arch = "tiny:network"
weights = "{tiny_weights}"
size = 32
bs = 4
epochs = 1
num_workers = 0
seeds = [1, 2]
[[arm]]
arm = "plain"
''')
    said = shell('fgvc-sweep', '--grid', grid, '--out', tmp_path/'out')
    assert said.code==0 and said.out.count('read as a folder for each class')==1, said.err
    assert 'read as' not in shell('fgvc-sweep', '--grid', grid, '--out', tmp_path/'out').out
    shutil.rmtree(flowers/'rose')
    (flowers/'rose').mkdir()
    said = shell('fgvc-sweep', '--grid', grid, '--out', tmp_path/'other')
    assert said.code==1 and 'rose' in said.err and 'Traceback' not in said.err and not (tmp_path/'other').exists()

def test_the_page_of_any_run(flowers, tiny_weights, tmp_path):
    "Its classes, its examples; what it does not know is said as that"
    from fgvc_fisher.explore.classifier import try_run
    run = Run(flowers, arch="tiny:network", weights=tiny_weights, size=32, bs=4, epochs=1, num_workers=0)
    do_run(run, tmp_path/"run", quiet=True)
    panel = try_run(tmp_path/'run')
    assert any(o in panel.text for o in NAMES) and len(panel.controls['example'].options)>3
    best = predict(load_run(tmp_path/'run'), [panel.controls['example'].value.path]).iloc[0]
    assert best.label in panel.text and f'{best.probability:.0%}' in panel.text
    assert ('does not know' in panel.text)==(best.probability<0.5)
    shutil.move(flowers, tmp_path/'gone')
    assert list(try_run(tmp_path/'run').controls['example'].options)==[('choose one', None)]
