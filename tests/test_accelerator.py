"The accelerator's script on a CPU, with tiny networks: every row is measured, and no row twice"
import gc, sys
from pathlib import Path
import pandas as pd, pytest, torch
from torch.nn import functional as F
from fgvc_fisher.fisher.per_image import RULES, conv_rule
from forks import Forked

ROOT = Path(__file__).parent.parent
ROWS = dict(fisher=8, penalty=4, memory=6, training=6)

@pytest.fixture
def accelerator(monkeypatch):
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    import accelerator
    gc.freeze()                                   # the script collects garbage often, and there is much to look at here
    yield accelerator
    gc.unfreeze()
    for name in ('accelerator','fisher','penalty','warbirds'): del sys.modules[name]

def tables(accelerator, out, *names):
    "Make some tables, as text"
    accelerator.main(out=str(out), only=','.join(names), tiny=True)
    return {name: next(out.glob(f'*/{name}.csv')) for name in names}

@pytest.mark.parametrize('name', ['fisher','penalty','memory',pytest.param('training', marks=pytest.mark.slow)])
def test_tables(accelerator, tmp_path, name, capsys):
    file = tables(accelerator, tmp_path, name)[name]
    table = pd.read_csv(file)
    assert len(table)==ROWS[name] and table.note.isna().all(), table
    if name=='fisher': assert (table.error<1e-4).all() and (table.images_s>0).all()
    if name=='training': assert (table.hours_80>0).all()
    capsys.readouterr()
    text = file.read_text()
    tables(accelerator, tmp_path, name)
    assert file.read_text()==text and f'{name}, ' not in capsys.readouterr().out    # measured no more
    assert RULES[F.conv2d] is conv_rule and (file.parent/'machine.txt').read_text().count(torch.__version__)==1

def test_a_row_that_is_missing_is_measured_and_no_other(accelerator, tmp_path, capsys):
    "A measurement that fails, such as for a lack of memory, leaves a note, and the others go on"
    table,measured = accelerator.Table(tmp_path/'table.csv', ['network','bs']),[]
    def measure(bs):
        measured.append(bs)
        yield dict(mib=3*bs)
        if bs==64: raise torch.cuda.OutOfMemoryError('no room')
        yield dict(images_s=0.1)
    def measure_all():
        for bs in (32,64,128): table.add(lambda: measure(bs), network='a', bs=bs)
        return table.file.read_text().splitlines()
    lines = measure_all()
    assert lines==['network,bs,note,mib,images_s', 'a,32,,96,0.1', 'a,64,OutOfMemoryError: no room,192,',
                   'a,128,,384,0.1']
    assert measure_all()==lines and measured==[32,64,128]
    table.file.write_text('\n'.join([*lines[:2], lines[3]])+'\n')
    assert measure_all()==[*lines[:2], lines[3], lines[2]] and measured==[32,64,128,64]

def in_a_fork(command, cwd, env):
    "As `subprocess.run` of `python -m pytest`"
    assert command[:3]==[sys.executable, '-m', 'pytest']
    Forked(pytest.main, command[3:], cwd=cwd, env=env).wait(timeout=250)

@pytest.mark.slow
def test_the_tests_have_a_row_each(accelerator, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(accelerator.subprocess, 'run', in_a_fork)
    table = pd.read_csv(tables(accelerator, tmp_path, 'tests')['tests'])
    assert len(table)>40 and (table.ended=='skipped').all()!=torch.cuda.is_available()
