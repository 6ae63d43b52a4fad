"The commands, as somebody at a shell meets them"
import json, re, shutil, subprocess
from dataclasses import fields
from pathlib import Path
import pandas as pd, pytest
from safetensors.torch import load_file
from fgvc_fisher.callback import STRENGTH
from fgvc_fisher.cli import _expanded, command, command_parser, estimate_command, fgvc_demo, fgvc_finetune
from fgvc_fisher.cli import fgvc_predict, fgvc_sweep
from fgvc_fisher.data.forms import FORMS
from fgvc_fisher.data.tables import LEVELS, pictures_in
from fgvc_fisher.experiment import demo as on_demo
from fgvc_fisher.experiment.demo import demo, draw_task
from fgvc_fisher.experiment.predict import _table as predicted
from fgvc_fisher.experiment.run import RECIPES, Run
from fgvc_fisher.experiment.saved import read_header
from fgvc_fisher.fisher import DiagFisher
from forks import BIN, shell
from tiny import network

HELP = {'fgvc-demo': ['--out', '--seed'], 'fgvc-sweep': ['--grid', '--out', '--jobs', '--retry', '--track', 'TOML'],
        'fgvc-predict': ['run', 'pictures', '--out', '--head {target,source}'], 'fgvc-fisher': ['--images', '--arch'],
        'fgvc-finetune': ['--data', '--level', '--arch', '--weights', '--source', '--alpha', '--strength', '--beta',
                          '--epochs', '--size', '--out', 'labels.csv', '{variant,family,manufacturer}', '--form',
                          '--fraction', '--recipe', '--transforms', '--amp', '--cache', '--num-workers', '--on-bad',
                          '--train', '--valid', '--test', 'data:', 'network:', 'penalty:', 'training:', 'output:']}

@pytest.mark.parametrize('command', HELP)
def test_help(command):
    said = shell(command, '--help', env=dict(COLUMNS='200'))
    assert said.code==0, said.err
    for o in HELP[command]: assert o in said.out

@pytest.mark.slow
def test_an_interpreter_of_its_own():
    "As installed: the script's first line, and all that it imports"
    said = subprocess.run([BIN/'fgvc-demo', '--help'], capture_output=True, text=True)
    assert said.returncode==0 and '--seed' in said.stdout

def test_defaults_that_are_written_twice():
    "A command imports nothing heavy for its options, so these repeat what the library says"
    options = {o.dest: o for o in command_parser(fgvc_finetune)._actions}
    assert options['strength'].default==STRENGTH
    assert set(options['form'].choices)=={'', *FORMS} and set(options['level'].choices)==set(LEVELS)
    assert set(options['recipe'].choices)==set(RECIPES)
    run = Run('tree', strength=STRENGTH)
    shared = [o.name for o in fields(Run) if o.name in options and o.name not in ('size', 'weights', 'num_workers')]
    for o in shared: assert o=='data' or options[o].default==getattr(run, o), o

def test_finetune(drawn, drawn_source, tiny_weights, tmp_path):
    out = tmp_path/'out'
    said = shell('fgvc-finetune', '--data', drawn, '--level', 'family', '--arch', 'tiny:network',
                 '--weights', tiny_weights, '--source', drawn_source,
                 '--alpha', 0, '--beta', 10, '--epochs', 2, '--size', 32, '--bs', 8,
                 '--out', out)
    assert said.code==0, said.err
    assert re.search(r'last +\d\.\d{3}', said.out) and re.search(r'before +\d\.\d{3}', said.out)
    files = {'model.safetensors', 'run.json', 'data.json', 'curve.csv', 'result.json', 'sources', 'lock'}
    assert {o.name for o in out.iterdir()}==files
    classes = read_header(out/'model.safetensors').classes
    assert classes==(drawn/'data/families.txt').read_text().splitlines()
    tensors = load_file(out/'model.safetensors')
    tuned = {k: v for k,v in tensors.items() if not k.startswith('source/')}
    network(num_classes=len(classes)).load_state_dict(tuned)
    fisher = DiagFisher.load(next(out.glob('sources/*-sampled.safetensors')))
    assert fisher.n_images==16
    assert fisher.provenance['arch']=='Tiny' and fisher.provenance['file']==str(tiny_weights)
    assert len(pd.read_csv(out/'curve.csv'))==2 and json.loads((out/'result.json').read_text())['beta']==10

def test_sweep(drawn, drawn_source, tiny_weights, tmp_path):
    grid,done = tmp_path/'grid.toml',lambda: {o: o.stat().st_mtime_ns for o in tmp_path.glob('out/runs/*/result.json')}
    def sweep(out): return shell('fgvc-sweep', '--grid', 'grid.toml', '--out', out, cwd=tmp_path)
    grid.write_text(f'''data = "{drawn}"
arch = "tiny:network"
weights = "{tiny_weights}"
source = "{drawn_source}"
size = 32
bs = 8
epochs = 1
num_workers = 0
seeds = [1, 2]
[[arm]]
arm = "plain"
[[arm]]
arm = "L2-SP-Fisher"
beta = [1, 10]
''')
    said = sweep('out')
    assert said.code==0, said.err
    assert 'L2-SP-Fisher, beta = 10' in said.out and '±' in said.out
    assert len(first := done())==6
    again = sweep('out')
    assert again.code==0 and done()==first and 'L2-SP-Fisher, beta = 10' in again.out
    grid.write_text(grid.read_text().replace('tiny:network', 'resnet_18'))
    said = sweep('other')
    assert said.code==1 and "'resnet_18'" in said.out and '6 of 6' in said.out and '--retry' in said.out
    assert 'Traceback' not in said.err

@pytest.mark.parametrize('args,named', [
    ([], '--grid'), (['--grid', 'nowhere.toml'], 'nowhere.toml'), (['--grid', 'bad.toml'], "bad.toml.*'betta'"),
    (['--grid', 'gone.toml'], 'no file or folder.*gone'),
    (['--grid', 'good.toml', '--jobs', '0'], 'jobs=0'), (['--grid', 'good.toml', '--track', 'excel'], "'excel'")])
def test_sweep_says_what_is_wrong(args, named, drawn, tmp_path):
    (tmp_path/'bad.toml').write_text('data = "a"\n[[arm]]\narm = "a"\nbetta = 1')
    (tmp_path/'gone.toml').write_text('data = "gone"\n[[arm]]\narm = "a"')
    (tmp_path/'good.toml').write_text(f'data = "{drawn}"\n[[arm]]\narm = "a"')
    said = shell('fgvc-sweep', *args, cwd=tmp_path)
    assert said.code!=0 and re.search(named, said.err) and 'Traceback' not in said.err
    assert not (tmp_path/'sweep').exists()

@pytest.mark.parametrize('args,named', [
    (['--beta', '0'], '--data'),
    (['--data', 'DRAWN'], '--source'),
    (['--data', 'nowhere', '--strength', '0', '--arch', 'tiny:network', '--weights', 'WEIGHTS'], 'nowhere'),
    (['--data', 'DRAWN', '--strength', '0', '--arch', 'resnet_18'], "'resnet_18'"),
    (['--data', 'DRAWN', '--strength', '0', '--arch', 'test_vit', '--weights', 'WEIGHTS'], 'tiny.safetensors'),
    (['--data', 'DRAWN', '--arch', 'tiny:network', '--weights', 'WEIGHTS', '--source', 'nowhere'], 'nowhere'),
    (['--data', 'DRAWN', '--arch', 'tiny:network', '--weights', 'WEIGHTS', '--source', 'SOURCE', '--alpha', '-1'],
     'alpha=-1.0')])
def test_what_is_wrong_is_said_in_a_sentence(args, named, drawn, drawn_source, tiny_weights, tmp_path):
    known = dict(DRAWN=drawn, SOURCE=drawn_source, WEIGHTS=tiny_weights)
    said = shell('fgvc-finetune', *[known.get(o, o) for o in args], '--out', tmp_path/'out', cwd=tmp_path)
    assert said.code!=0 and 'Traceback' not in said.err
    assert named in said.err

def test_demo_is_the_same_for_the_same_seed(tmp_path, monkeypatch, unplaced_labels):
    plain,l2sp,fisher = on_demo.ARMS
    monkeypatch.setattr(on_demo, 'ARMS', [plain, l2sp | dict(l2sp=[0.1]), fisher | dict(strength=[STRENGTH])])
    small = dict(n_variants=2, n_per_split=4, n_source=2, epochs=1, size=32, n_seeds=2, jobs=1)
    found = [demo(tmp_path/o, seed=3, **small) for o in 'ab']
    assert found[0][0].equals(found[1][0]) and found[0][1]==found[1][1]
    page = (tmp_path/'a/report.html').read_text()
    for name in re.findall(r'src="([^"]+)"', page): assert (tmp_path/'a'/name).stat().st_size>1000
    assert page.count('<img')==2 and 'L2-SP-Fisher' in page
    table,sentences = found[0]
    assert len(sentences)==3 and all(o.split(':')[0][:40] in page for o in sentences)
    assert table['runs',''].tolist()==[2]*3

def test_a_source_network_for_each_size(tmp_path):
    small = dict(n_variants=2, n_per_split=1, n_source=2, num_workers=0)
    weights = [draw_task(tmp_path, size=o, **small)['weights'] for o in (32,48)]
    assert len({Path(o).read_bytes() for o in weights})==2

def damaged(tree, copy):
    "A copy of a tree in which the first picture is cut, and that picture"
    shutil.copytree(tree, copy)
    file = pictures_in(copy)[0]
    file.write_bytes(file.read_bytes()[:400])
    return copy,file

@pytest.mark.parametrize('where', ['data','source'])
def test_a_bad_picture_in_a_training(where, drawn, drawn_source, tiny_weights, tmp_path):
    "One sentence, though it comes out of a worker process; or it is skipped, which is said once"
    trees = dict(data=drawn, source=drawn_source)
    trees[where],bad = damaged(trees[where], tmp_path/'tree')
    options = ['--arch', 'tiny:network', '--weights', tiny_weights, '--epochs', 1, '--size', 32, '--bs', 4,
               '--data', trees['data'], '--source', trees['source'], '--out', tmp_path/'out']
    said = shell('fgvc-finetune', *options)
    assert said.code==1 and said.err.strip().splitlines()[-1].startswith(f'fgvc-finetune: {bad} cannot be decoded')
    assert 'Traceback' not in said.err and '--on-bad skip' in said.err
    said = shell('fgvc-finetune', *options, '--on-bad', 'skip')
    assert said.code==0, said.err
    assert 'fgvc-finetune: skipping 1 of ' in said.err
    assert ('; 1 that cannot be decoded are left out' in said.out)==(where=='data')
    assert said.err.count(bad.name)==1 and json.loads((tmp_path/'out/result.json').read_text())['on_bad']=='skip'

def test_a_bad_picture_in_a_sweep(drawn, tiny_weights, tmp_path):
    tree,bad = damaged(drawn, tmp_path/'tree')
    (tmp_path/'grid.toml').write_text(f'''data = "{tree}"
arch = "tiny:network"
weights = "{tiny_weights}"
size = 32
bs = 4
epochs = 1
num_workers = 1
[[arm]]
arm = "plain"
[[arm]]
arm = "careful"
on_bad = "skip"
''')
    said = shell('fgvc-sweep', '--grid', tmp_path/'grid.toml', '--out', tmp_path/'out')
    assert said.code==1 and 'Traceback' not in said.out+said.err
    failed, = [o for o in said.out.splitlines() if 'failed: ' in o]
    assert f'{bad} cannot be decoded' in failed and len(list((tmp_path/'out').rglob('result.json')))==1

def test_a_bad_picture_in_an_estimate(drawn_source, tiny_weights, tmp_path):
    tree,bad = damaged(drawn_source, tmp_path/'tree')
    options = ['--arch', 'tiny:network', '--weights', tiny_weights, '--images', tree, '--size', 32, '--device', 'cpu',
               '--out', tmp_path/'f.safetensors']
    said = shell('fgvc-fisher', *options)
    assert said.code==1 and said.err.strip().splitlines()[-1].startswith(f'fgvc-fisher: {bad} cannot be decoded')
    assert 'Traceback' not in said.err
    said = shell('fgvc-fisher', *options, '--on-bad', 'skip')
    assert said.code==0 and said.err.count(bad.name)==1 and 'fgvc-fisher: skipping 1 of 32 ' in said.err
    assert DiagFisher.load(tmp_path/'f.safetensors').n_images==31
    for o in pictures_in(tree): o.write_bytes(b'')
    said = shell('fgvc-fisher', *options, '--on-bad', 'skip')
    assert said.code==1 and 'none of 32 pictures' in said.err and 'Traceback' not in said.err
    assert "'ignore'" in shell('fgvc-fisher', *options, '--on-bad', 'ignore').err

# What is refused before anything is loaded

@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for o in ('folder', 'run', 'pictures', 'more'): (tmp_path/o).mkdir()
    for o in ('file', 'list.csv', 'pictures/a.png', 'more/b.png', 'run/curve.csv', 'run/model.safetensors'):
        (tmp_path/o).write_text('path\n')
    (tmp_path/'grid.toml').write_text('data = "folder"\n[[arm]]\narm = "a"')
    return tmp_path

@pytest.mark.parametrize('call,options,named', [
    (estimate_command, dict(images='pictures', out='folder'), '--out folder is a folder'),
    (estimate_command, dict(images='pictures', size=-3), '--size -3'),
    (estimate_command, dict(images='pictures', bs=0), '--bs 0'),
    (estimate_command, dict(images='pictures', jobs=2, num_shards=3), '--num-shards, --jobs'),
    (estimate_command, dict(images='pictures', split='val'), '--split'),
    (estimate_command, dict(shards='0.tar', split='val'), '--split val'),
    (fgvc_finetune, dict(data='folder', strength=0., out='file'), '--out file: file is a file'),
    (fgvc_finetune, dict(data='folder', strength=0., out='file/below'), '--out file/below: file is a file'),
    (fgvc_finetune, dict(data='folder', strength=0., recipe='published', lr=0.1, arch='tiny:network'),
     'lr=0.1: recipe'),
    (fgvc_sweep, dict(grid='grid.toml', out='file'), '--out file: file is a file'),
    (fgvc_demo, dict(out='file'), '--out file: file is a file'), (fgvc_demo, dict(seed=-1), '--seed -1'),
    (fgvc_predict, dict(run='run', pictures=['pictures'], out='folder'), '--out folder is a folder'),
    (fgvc_predict, dict(run='run', pictures=['list.csv'], out='list.csv'), '--out list.csv would overwrite'),
    (fgvc_predict, dict(run='run', pictures=['pictures'], out='pictures/a.png'), 'a.png exists, and this command'),
    (fgvc_predict, dict(run='run', pictures=['pictures'], out='run/curve.csv'), 'curve.csv would overwrite'),
    (fgvc_predict, dict(run='run', pictures=['pictures'], out='run/model.safetensors'), 'model.safetensors exists'),
    (estimate_command, dict(images='pictures', out='pictures/a.png'), 'a.png exists'),
    (estimate_command, dict(images='pictures', weights='run/model.safetensors', out='run/model.safetensors'),
     'model.safetensors would overwrite the weights')])
def test_options_that_are_refused_at_once(call, options, named, files):
    before = {o: o.read_text() for o in files.rglob('*') if o.is_file()}
    if call is estimate_command: options = dict(arch='tiny:network') | options
    with pytest.raises((ValueError,OSError), match=re.escape(named)): call(**options)
    assert before=={o: o.read_text() for o in files.rglob('*') if o.is_file()}

def test_no_abbreviations(capsys):
    with pytest.raises(SystemExit): command_parser(fgvc_finetune).parse_args(['--data', 'a', '--num', '3'])
    assert '--num' in capsys.readouterr().err

def test_the_home_folder_in_a_path(monkeypatch):
    monkeypatch.setenv('HOME', '/somebody')
    asked = dict(out='~/x', label='~', pictures=['~/a','b'], grid='a/~')
    assert _expanded(asked)==dict(out='/somebody/x', label='~', pictures=['/somebody/a','b'], grid='a/~')
    heard = {}
    def fake(out:str='out'): heard.update(out=out)
    monkeypatch.setattr('sys.argv', ['fake', '--out=~/x'])
    command('fake')(fake).main()
    assert heard==dict(out='/somebody/x')

def test_several_folders_and_files_to_predict(drawn_source, tmp_path):
    pictures = pictures_in(drawn_source)
    for i,o in enumerate(['a/1.jpg', 'b/deep/2.jpg', '3.jpg']):
        (tmp_path/o).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pictures[i], tmp_path/o)
    found = predicted([tmp_path/'a', str(tmp_path/'b'), tmp_path/'3.jpg'])
    assert [o.name for o in found.path]==['1.jpg', '2.jpg', '3.jpg'] and len(predicted(tmp_path/'b'))==1
    (tmp_path/'none').mkdir()
    with pytest.raises(FileNotFoundError, match='none has no pictures'): predicted([tmp_path/'a', tmp_path/'none'])

@pytest.mark.parametrize('command', ['fgvc-finetune', 'fgvc-sweep', 'fgvc-demo', 'fgvc-predict', 'fgvc-fisher'])
def test_an_empty_name_for_what_is_written(command, drawn, drawn_source, tiny_weights, tmp_path):
    (tmp_path/'grid.toml').write_text(f"data = '{drawn}'\nepochs = 1\n[[arm]]\narm = 'plain'\n")
    args = {'fgvc-finetune': ['--data', drawn, '--strength', 0], 'fgvc-sweep': ['--grid', tmp_path/'grid.toml'],
            'fgvc-demo': [], 'fgvc-predict': [tmp_path, drawn_source],
            'fgvc-fisher': ['--arch', 'tiny:network', '--weights', tiny_weights, '--images', drawn_source]}[command]
    said = shell(command, *args, '--out', '', cwd=tmp_path)
    assert said.code and '--out is empty' in said.err and [o.name for o in tmp_path.iterdir()]==['grid.toml']

def test_a_file_of_something_else_is_not_overwritten(drawn_source, tiny_weights, tmp_path):
    shutil.copytree(drawn_source, tmp_path/'source')
    shutil.copy(tiny_weights, tmp_path/'mine.safetensors')
    estimate = ['--arch', 'tiny:network', '--weights', tiny_weights, '--images', drawn_source, '--size', 32]
    said = shell('fgvc-fisher', *estimate, '--out', tmp_path/'mine.safetensors')
    assert said.code and 'mine.safetensors exists' in said.err
    assert (tmp_path/'mine.safetensors').read_bytes()==tiny_weights.read_bytes()
    for _ in range(2): assert shell('fgvc-fisher', *estimate, '--out', tmp_path/'f.safetensors').code==0
    said = shell('fgvc-predict', tmp_path, tmp_path/'source', '--out', tmp_path/'source/labels.csv')
    assert said.code and 'labels.csv exists' in said.err
    assert (tmp_path/'source/labels.csv').read_bytes()==(drawn_source/'labels.csv').read_bytes()
