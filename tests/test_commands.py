"The commands, as somebody at a shell meets them"
import os, re, subprocess, sys
from pathlib import Path
import pandas as pd, pytest, timm
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from fgvc_fisher.experiment import demo
from fgvc_fisher.fisher import DiagFisher

def run(command, *args, cwd=None):
    file = Path(sys.executable).parent/command
    return subprocess.run([file, *map(str, args)], capture_output=True, text=True, cwd=cwd, env=os.environ|{'COLUMNS': '200'})

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp('weights')/'w.safetensors'
    save_file(timm.create_model('test_resnet').state_dict(), file)
    return file

@pytest.mark.parametrize('command,words', [('fgvc-demo', ['--out', '--seed']), ('fgvc-finetune', ['--data', '--level', '--arch', '--weights', '--source',
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
    assert re.search(r'target +\d\.\d{3}', said.stdout) and 'retention_before' in said.stdout
    assert {o.name for o in out.iterdir()}=={'model.safetensors', 'fisher.safetensors', 'curve.csv', 'result.csv'}
    with safe_open(out/'model.safetensors', 'pt') as f: classes = f.metadata()['classes'].split('\n')
    assert classes==(drawn/'data/families.txt').read_text().splitlines()
    timm.create_model('test_resnet', num_classes=len(classes)).load_state_dict(load_file(out/'model.safetensors'))
    fisher = DiagFisher.load(out/'fisher.safetensors')
    assert fisher.n_images==16 and fisher.provenance['arch']=='test_resnet' and fisher.provenance['file']==str(weights)
    assert len(pd.read_csv(out/'curve.csv'))==2 and pd.read_csv(out/'result.csv').beta[0]==10

@pytest.mark.parametrize('args,sentence', [
    (['--beta', '0'], 'give --data PATH'),
    (['--data', 'DRAWN'], '--beta 10.0 needs a Fisher, and that needs pictures: give --source PATH'),
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
    tables = [demo(tmp_path/o, seed=s, **small).drop(columns='seconds') for o,s in (('a',3), ('b',3))]
    assert tables[0].equals(tables[1])
    page = (tmp_path/'a/report.html').read_text()
    for name in re.findall(r'src="([^"]+)"', page): assert (tmp_path/'a'/name).stat().st_size>1000
    assert page.count('<img')==3 and 'L2-SP-Fisher' in page
