"The modes of the walkthrough that need the archive, downloads and a T4: on drawn pictures, with random weights"
import json, math, re, shutil, sys
from pathlib import Path
from types import SimpleNamespace
import matplotlib, pytest, torch
from fastai.callback import fp16
from elsewhere import changed
from fgvc_fisher.experiment import Run, run_arm
from fgvc_fisher.learner import source_model
from fgvc_fisher.data.synthetic import draw_aircraft

pytestmark = pytest.mark.usefixtures('unplaced_labels')
NOTEBOOK = Path(__file__).parent.parent/'nbs/walkthrough.ipynb'

def code(changes):
    "The code of the notebook with its settings changed"
    cells = [''.join(o['source']) for o in json.loads(NOTEBOOK.read_text())['cells'] if o['cell_type']=='code']
    return changed('\n'.join(o for o in cells if '%pip' not in o), changes)

def walk(changes):
    there = {}
    exec(code(changes), there)
    return there

def test_outputs_are_those_of_the_whole_demo():
    "`nbdev-test` has less in the cells; it may store what comes of them only with `--flags slow`"
    task = code({}).partition("MODE=='demo': task")[2]
    variants,per_split = [int(re.search(rf'{o}=(\d+)', task).group(1)) for o in ('n_variants','n_per_split')]
    kept = json.dumps([o.get('outputs') for o in json.loads(NOTEBOOK.read_text())['cells']])
    assert f'{3*variants*per_split} pictures of {variants} variants' in kept and 'seed 3' in kept

@pytest.fixture
def settings(drawn_source, tiny_weights, tmp_path, monkeypatch):
    "What the archive, the network, its weights, the downloads and the hours are replaced by"
    monkeypatch.setattr(matplotlib, 'use', lambda *a, **k: None)
    tree = draw_aircraft(tmp_path/'aircraft', n_variants=4, n_per_split=2, size=48)
    return {"data=untar_aircraft(keep=keep), source=untar_data(URLs.IMAGENETTE_320), arch='inception_v4'":
                f"data='{tree}', source='{drawn_source}', arch='tiny:network', weights='{tiny_weights}', num_workers=0",
            "OUT   = ''": f"OUT   = '{tmp_path}/out'", 'SEEDS = [1, 2, 3]': 'SEEDS = [1]', 'seconds=30': 'seconds=0'}

def test_paper(settings):
    "The whole control flow with the recipe's own outputs, transforms and schedule; the first run's Learner as it is"
    small = {'size=299, bs=32, epochs=80': 'size=75, bs=8, epochs=1'}
    names = walk(settings | small | {"MODE  = 'demo'": "MODE  = 'paper'"})
    rows = names['rows']
    learn = names['make_learner'](names['runs'][0], source_model('conftest:narrow_inception', weights=None))
    assert rows.arm.tolist()==['plain', 'as published, beta = 0.0004', 'L2-SP-Fisher, strength = 0.5',
                               'as published, alpha = 0.0005']
    assert rows[['best','last','test','test_last','retention_target_bn','retention_source_bn']].notna().all(axis=None)
    assert rows.amp.all() and (rows.recipe=='published').all() and (rows.transforms=='published').all()
    assert len(list(learn.model.parameters()))==449 and len(learn.splitter(learn.model))==3
    assert len(learn.metrics)==2 and hasattr(learn, 'mixed_precision')
    assert next(learn.model.parameters()).is_contiguous(memory_format=torch.channels_last)

def test_strong(settings):
    small = {'cache=True, size=448, bs=16, epochs=40': 'cache=False, size=32, bs=16, epochs=1'}
    rows = walk(settings | small | {"MODE  = 'demo'": "MODE  = 'strong'"})['rows']
    assert rows[['last','test']].isna().all(axis=None) and rows.test_last.notna().all()      # no epoch was chosen
    assert (rows.train=='trainval').all()
    assert rows.arm.tolist()==['plain', 'L2-SP-Fisher, strength = 0.5']

def test_two_sessions_with_a_drive(tmp_path, monkeypatch, capsys):
    "The local disk of the second is empty, and it has nothing left to train"
    monkeypatch.setattr(matplotlib, 'use', lambda *a, **k: None)
    mounted = []
    drive = SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, 'google.colab', SimpleNamespace(drive=drive))
    (tmp_path/'drive').mkdir()
    changes = {"OUT   = ''": f"OUT   = '{tmp_path}/drive/fgvc_fisher'", 'SEEDS = [1, 2, 3]': 'SEEDS = [1]',
               "OUT.startswith('/content/drive')": f"OUT.startswith('{tmp_path}/drive')",
               "Path('/content/fgvc_fisher')": f"Path('{tmp_path}/local')", 'seconds=30': 'seconds=0',
               'n_variants=6, n_per_split=24, n_source=40': 'n_variants=3, n_per_split=4, n_source=6, size=32',
               'dict(epochs=6)': 'dict(epochs=1)'}
    first = walk(changes)
    shutil.rmtree(tmp_path/'local')
    capsys.readouterr()
    second = walk(changes)
    said = capsys.readouterr().out
    assert len(mounted)==2 and 'MB are free' in said and f"{len(second['runs'])} of them done before" in said
    assert second['rows'].equals(first['rows']) and second['row']==first['row']
    names = [o.name for o in (tmp_path/'drive/fgvc_fisher').rglob('*') if o.is_file()]
    assert len(names)==5*len(second['runs'])+4                            # weights, Fisher, accuracy before, SHA256SUMS

@pytest.mark.parametrize('scale,is_skipped', [(1., False), (1024., True)])
def test_float16_of_the_whole_network(scale, is_skipped, drawn, autocast_on_cpu, monkeypatch):
    "Two steps under float16 and channels-last on the processor, all layers of Inception-v4; gradients may overflow"
    monkeypatch.setattr(fp16, 'GradScaler', lambda device, **kw: torch.amp.GradScaler('cpu', init_scale=scale, **kw))
    run = Run(drawn, 'as published', step='published', beta=4e-4, l2sp=0.004, arch='conftest:narrow_inception',
              recipe='published', transforms='published', amp=True, size=75, bs=8, epochs=1, num_workers=0)
    torch.manual_seed(0)
    row,curve,learn = run_arm(run, source_model(run.arch, weights=None))
    assert math.isfinite(row['last']) and math.isfinite(curve.train_loss[0])
    assert all(p.isfinite().all() and p.dtype==torch.float32 for p in learn.model.parameters())
    assert curve.penalty[0]==0 if is_skipped else 0<curve.penalty[0]<math.inf
