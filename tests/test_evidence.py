"The evidence: its rows, its tables made again from them, and its script on drawn pictures"
import shutil
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
