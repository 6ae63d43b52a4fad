"The evidence: its rows, its tables made again from them, and its script on drawn pictures"
import shutil
from itertools import product
from pathlib import Path
import pandas as pd, pytest, timm
from safetensors.torch import save_file
from fgvc_fisher.experiment import results, table
from fgvc_fisher.data.synthetic import draw_aircraft, draw_source

ROOT = Path(__file__).parent.parent
ROWS = ROOT/'results/evidence'

@pytest.fixture
def evidence(monkeypatch):
    "The script; labels lie where they fall: `test_results` looks at that, and it takes seconds a picture"
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    monkeypatch.setattr(results, 'adjust_text', lambda *args, **kwargs: None)
    import evidence
    return evidence

def test_rows_are_one_a_run_and_name_no_machines_paths():
    runs,merged = [pd.read_csv(ROWS/o) for o in ('runs.csv','merged.csv')]
    for o in (runs, merged): assert not o.duplicated(['tree','network','arm','seed']).any() and o.machine.notna().all()
    assert not runs[['data','source','weights']].astype(str).apply(lambda c: c.str.contains('/')).any(axis=None)
    ended = runs[runs['last'].notna()]
    assert ended[['retention_target_bn','retention_source_bn','before']].notna().all(axis=None)
    assert set(runs[runs['last'].isna()].arm.str.split(',').str[0]) <= {'explicit step'}    # nothing else diverged

def test_tables_come_from_the_rows(evidence, tmp_path, capsys):
    "What is committed is what the rows give"
    for o in ('runs.csv','merged.csv'): shutil.copy(ROWS/o, tmp_path)
    evidence.report(tmp_path)
    made = {o.name for o in tmp_path.iterdir()}
    assert made == {o.name for o in ROWS.iterdir() if not o.name.startswith('cost')}
    for o in made:
        if not o.endswith('.csv'): continue
        assert (tmp_path/o).read_text()==(ROWS/o).read_text(), f'{o}: run python benchmarks/evidence.py'

def test_the_script_from_pictures_to_tables(evidence, tmp_path, monkeypatch, capsys):
    "Drawn pictures and a tiny network; a second call does no run again"
    draw_aircraft(tmp_path/'data/airliners17', n_variants=2, n_per_split=6, size=48)
    draw_source(tmp_path/'data/imagenet_sample', n_classes=4, n_per_split=4, size=48)
    (tmp_path/'weights').mkdir()
    save_file(timm.create_model('test_resnet', num_classes=4).state_dict(), tmp_path/'weights/tiny.safetensors')
    tiny = dict(trees=['airliners17'], arch='test_resnet', weights='tiny.safetensors', lr=0.01)
    monkeypatch.setattr(evidence, 'NETWORKS', dict(tiny=tiny))
    monkeypatch.setattr(evidence, 'PULLS', dict(tiny=1))
    monkeypatch.setattr(evidence, 'PARTS', [0.5])
    monkeypatch.setattr(evidence, 'BETAS', [0.1])
    def call():
        evidence.main(photos=str(tmp_path), out=str(tmp_path/'out'), work=str(tmp_path/'work'), seeds=1, epochs=1,
                      size=32, more='')
    call()
    runs,merged = [pd.read_csv(tmp_path/f'out/{o}.csv') for o in ('runs','merged')]
    assert len(runs)==1+1+6+6+1
    assert set(runs.network)=={'tiny'} and set(runs.data)=={'airliners17'}
    assert list(merged.arm)==['Fisher merging, beta = 0.1', 'WiSE-FT, t = 0.5']
    assert len(table(pd.concat([runs, merged])))==17
    made = {o.name for o in (tmp_path/'out').iterdir()}
    name = 'airliners17-tiny'
    assert made>={f'table-{name}.csv', f'differences-{name}.csv', f'frontier-{name}.png'}
    before = {o: o.stat().st_mtime_ns for o in (tmp_path/'work/runs').rglob('*.*')}
    call()
    assert before=={o: o.stat().st_mtime_ns for o in (tmp_path/'work/runs').rglob('*.*')}

@pytest.fixture
def aircraft(monkeypatch, tmp_path):
    "The script for FGVC-Aircraft's own pictures with a tiny network and drawn pictures, two a class and split"
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    import aircraft
    draw_aircraft(tmp_path/'data/fgvc20', n_variants=2, n_per_split=2, size=48)
    for o in ('imagenet_sample', 'imagenet_extra'):
        draw_source(tmp_path/'data'/o, n_classes=4, n_per_split=2, size=48)
    (tmp_path/'weights').mkdir()
    weights = timm.create_model('test_resnet', num_classes=4).state_dict()
    save_file(weights, tmp_path/'weights/tiny.safetensors')
    tiny = dict(arch='test_resnet', weights='tiny.safetensors')
    for o in ('NETWORK', 'INCEPTION'): monkeypatch.setattr(aircraft, o, tiny)
    monkeypatch.setattr(aircraft, 'KERNEL', next(k for k,v in weights.items() if v.ndim==4))
    return aircraft

def tiny_arms(aircraft):
    "The stages that the accelerator's grid needs, each with an epoch"
    short = dict(recipe='published', transforms='published', epochs=1)
    return dict(main=[dict(arm='plain'), dict(arm='L2-SP-Fisher', strength=[0.5])], merged=[dict(arm='plain')],
                inception=[short | o for o in aircraft.paper(aircraft.SUBSTITUTED)], starts=aircraft.STAGES['starts'])

def call(aircraft, folder, **kwargs):
    "Call the script as the command does. Returns its rows"
    aircraft.main(photos=str(folder), out=str(folder/'out'), work=str(folder/'work'), epochs=1, **kwargs)
    return pd.read_csv(folder/'out/runs.csv')

def test_every_stage_of_the_papers_pictures_makes_runs(aircraft, tmp_path):
    "No two runs of all stages have the same key, and none has a row of another"
    runs = aircraft.all_runs(tmp_path, tmp_path, aircraft.STAGES, range(5), size=160)
    keys = [tuple(getattr(run, o) for o in aircraft.KEY) for run in runs]
    assert len(keys)==len(set(keys))==len({run.id for run in runs})
    arms = {run.arm for run in runs}
    assert sum(o.startswith('L2-SP, ') for o in arms)==6 and sum(o.startswith('L2-SP-Fisher, ') for o in arms)==8
    assert {run.seed for run in runs if run.arm=='plain'}==set(range(5))
    assert {run.seed for run in runs if run.arm=='plain, family'}=={0}
    assert all('two tensors substituted' in o['arm'] for stage in aircraft.ON_GPU for o in aircraft.STAGES[stage])

def test_the_papers_pictures_resume(aircraft, tmp_path, monkeypatch, capsys):
    "Rows come run by run; what has a row is not done again, also where its folder is gone"
    monkeypatch.setattr(aircraft, 'STAGES', tiny_arms(aircraft))
    seen,collect = [],aircraft.collect
    def watched(*args):
        collect(*args)
        seen.append(len(aircraft.rows_of(tmp_path/'out/runs.csv')))
    monkeypatch.setattr(aircraft, 'collect', watched)
    rows = call(aircraft, tmp_path, stages='main', seeds=1, size=32)
    assert seen==[0,1,2] and set(rows.arm)=={'plain','L2-SP-Fisher, strength = 0.5'}
    assert not rows[['data','source','weights']].apply(lambda c: c.str.contains('/')).any(axis=None)
    assert rows[['last','test','retention_source_bn','before']].notna().all(axis=None)
    shutil.rmtree(tmp_path/'work/runs')
    assert call(aircraft, tmp_path, stages='main', seeds=1, size=32).equals(rows)
    assert not list(tmp_path.glob('work/runs/*'))
    assert len(call(aircraft, tmp_path, stages='main', seeds=2, size=32))==4
    assert len(list(tmp_path.glob('work/runs/*')))==2

def test_the_accelerators_call_with_two_pictures_a_class(aircraft, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(aircraft, 'STAGES', tiny_arms(aircraft))
    for o,v in dict(SIZES=(32,48), PAPER_SIZE=48).items(): monkeypatch.setattr(aircraft, o, v)
    monkeypatch.setattr('evidence.PARTS', [0.5])
    monkeypatch.setattr('evidence.BETAS', [0.1])
    rows = call(aircraft, tmp_path, seeds=1, accelerator=True)
    said = capsys.readouterr().out
    assert 'all 10 runs: ' in said and said.index('hours with 1 at a time')<said.index('done before')
    assert len(rows)==2*(2+2)+3+3 and rows[['last','retention_source_bn','machine']].notna().all(axis=None)
    named = rows[rows.arm.str.startswith(aircraft.SUBSTITUTED)]
    assert len(named)==6 and set(named.source)=={'imagenet_sample'} and named.weights.nunique()==3
    merged = rows[rows.arm.str.contains('Fisher merging|WiSE-FT')]
    assert {*zip(merged.arm, merged['size'])}=={*product(['Fisher merging, beta = 0.1','WiSE-FT, t = 0.5'], [32,48])}

@pytest.mark.parametrize('asked,named', [(dict(stages='main,nonsense'), 'nonsense'), (dict(stages=''), 'choose from'),
                                         (dict(photos='/no/such/folder'), '/no/such/folder')])
def test_nonsense_is_refused_before_anything_is_written(aircraft, tmp_path, asked, named):
    with pytest.raises(SystemExit, match=named):
        aircraft.main(**dict(photos=str(tmp_path)) | dict(out=str(tmp_path/'out'), work=str(tmp_path/'work')) | asked)
    assert not (tmp_path/'out').exists() and not (tmp_path/'work').exists()
