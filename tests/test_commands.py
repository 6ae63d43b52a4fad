"The commands, as somebody at a shell meets them"
import json, os, re, subprocess, sys
from pathlib import Path
import pandas as pd, pytest, timm
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from fgvc_fisher.experiment import demo, fgvc_sweep
from fgvc_fisher.fisher import DiagFisher

def run(command, *args, cwd=None):
    file = Path(sys.executable).parent/command
    return subprocess.run([file, *map(str, args)], capture_output=True, text=True, cwd=cwd, env=os.environ|{'COLUMNS': '200'})

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp('weights')/'w.safetensors'
    save_file(timm.create_model('test_resnet').state_dict(), file)
    return file

@pytest.mark.parametrize('command,words', [('fgvc-demo', ['--out', '--seed']), ('fgvc-sweep', ['--grid', '--out', '--jobs', '--retry', '--track', 'TOML']), ('fgvc-finetune', ['--data', '--level', '--arch', '--weights', '--source',
    '--alpha', '--beta', '--epochs', '--size', '--out', 'labels.csv', 'variant, family or manufacturer'])])
def test_help(command, words):
    said = run(command, '--help')
    assert said.returncode==0
    for o in words: assert o in said.stdout

def test_finetune(drawn, drawn_source, weights, tmp_path):
    out = tmp_path/'out'
    said = run('fgvc-finetune', '--data', drawn, '--level', 'family', '--arch', 'test_resnet', '--weights', weights, '--source', drawn_source,
               '--alpha', 0, '--beta', 10, '--epochs', 2, '--size', 32, '--bs', 8, '--out', out)
    assert said.returncode==0, said.stderr
    assert re.search(r'last +\d\.\d{3}', said.stdout) and re.search(r'before +\d\.\d{3}', said.stdout)
    assert {o.name for o in out.iterdir()}=={'model.safetensors', 'run.json', 'curve.csv', 'result.json', 'sources', 'lock'}
    with safe_open(out/'model.safetensors', 'pt') as f: classes = f.metadata()['classes'].split('\n')
    assert classes==(drawn/'data/families.txt').read_text().splitlines()
    timm.create_model('test_resnet', num_classes=len(classes)).load_state_dict(load_file(out/'model.safetensors'))
    fisher = DiagFisher.load(next(out.glob('sources/*-sampled.safetensors')))
    assert fisher.n_images==16 and fisher.provenance['arch']=='test_resnet' and fisher.provenance['file']==str(weights)
    assert len(pd.read_csv(out/'curve.csv'))==2 and json.loads((out/'result.json').read_text())['beta']==10

def test_sweep(drawn, drawn_source, weights, tmp_path):
    (tmp_path/'grid.toml').write_text(f'''data = "{drawn}"
arch = "test_resnet"
weights = "{weights}"
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
    said = run('fgvc-sweep', '--grid', 'grid.toml', '--out', 'out', '--jobs', 2, cwd=tmp_path)
    assert said.returncode==0, said.stderr
    assert '6 runs, 0 of them done before' in said.stdout and 'L2-SP-Fisher, beta = 10' in said.stdout and '±' in said.stdout
    assert '6 runs, 6 of them done before' in run('fgvc-sweep', '--grid', 'grid.toml', '--out', 'out', cwd=tmp_path).stdout
    (tmp_path/'grid.toml').write_text((tmp_path/'grid.toml').read_text().replace('test_resnet', 'resnet_18'))
    said = run('fgvc-sweep', '--grid', 'grid.toml', '--out', 'other', cwd=tmp_path)
    assert said.returncode==1 and "arch 'resnet_18': timm has no such model" in said.stdout and '6 of 6 runs failed' in said.stdout and 'Traceback' not in said.stderr

@pytest.mark.parametrize('args,sentence', [({}, 'give --grid FILE'), (dict(grid='nowhere.toml'), 'there is no file nowhere.toml'), (dict(grid='bad.toml'), "bad.toml: 'betta' is nothing that a run has"),
    (dict(grid='good.toml', jobs=0), 'jobs=0'), (dict(grid='good.toml', track='excel'), "track 'excel'")])
def test_sweep_says_what_is_wrong(args, sentence, tmp_path, monkeypatch):
    (tmp_path/'bad.toml').write_text('data = "a"\n[[arm]]\narm = "a"\nbetta = 1')
    (tmp_path/'good.toml').write_text('data = "a"\n[[arm]]\narm = "a"')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=re.escape(sentence)): fgvc_sweep(**args)

@pytest.mark.parametrize('args,sentence', [
    (['--beta', '0'], 'give --data PATH'),
    (['--data', 'DRAWN'], '--beta 10 needs a Fisher, and that needs pictures: give --source PATH'),
    (['--data', 'nowhere', '--beta', '0', '--arch', 'test_resnet', '--weights', 'WEIGHTS'], 'nowhere is no FGVC-Aircraft tree'),
    (['--data', 'DRAWN', '--beta', '0', '--arch', 'resnet_18'], "arch 'resnet_18': timm has no such model; did you mean"),
    (['--data', 'DRAWN', '--beta', '0', '--arch', 'test_vit', '--weights', 'WEIGHTS'], 'holds the weights of another architecture'),
    (['--data', 'DRAWN', '--arch', 'test_resnet', '--weights', 'WEIGHTS', '--source', 'DRAWN'], 'has no labels.csv'),
    (['--data', 'DRAWN', '--arch', 'test_resnet', '--weights', 'WEIGHTS', '--source', 'SOURCE', '--alpha', '-1'], 'alpha=-1.0: a coefficient')])
def test_what_is_wrong_is_said_in_a_sentence(args, sentence, drawn, drawn_source, weights, tmp_path):
    known = dict(DRAWN=drawn, SOURCE=drawn_source, WEIGHTS=weights)
    said = run('fgvc-finetune', *[known.get(o, o) for o in args], '--out', tmp_path/'out', cwd=tmp_path)
    assert said.returncode!=0 and 'Traceback' not in said.stderr
    assert sentence in said.stderr

def test_demo_is_the_same_for_the_same_seed(tmp_path):
    small = dict(n_variants=2, n_per_split=6, n_source=2, epochs=1, size=32, num_workers=0)
    tables = [demo(tmp_path/o, seed=s, **small).drop(columns='seconds', level=0) for o,s in (('a',3), ('b',3))]
    assert tables[0].equals(tables[1])
    page = (tmp_path/'a/report.html').read_text()
    for name in re.findall(r'src="([^"]+)"', page): assert (tmp_path/'a'/name).stat().st_size>1000
    assert page.count('<img')==3 and 'L2-SP-Fisher' in page
