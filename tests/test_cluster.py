"A sweep on a Ray cluster, of which workers, machines and drivers are killed"
import errno, os, re, sys, time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import pandas as pd, psutil, pytest, torch
from fgvc_fisher.experiment import ray as on_cluster
from fgvc_fisher.experiment.ray import Job
from fgvc_fisher.experiment import Run, grid, sweep
from fgvc_fisher.cli import fgvc_sweep
from fgvc_fisher.experiment.sweeps import _attempt
from forks import Forked

# The driver

@pytest.fixture
def no_ray(monkeypatch):
    "Ray as if it were installed, and found no cluster"
    def init(*args, **kw): raise AssertionError('Ray was started')
    monkeypatch.setitem(sys.modules, 'ray', SimpleNamespace(is_initialized=lambda: False, init=init))
    monkeypatch.setattr(on_cluster, 'find_spec', lambda name: True)

RUN = Run('tree')
INVALID = [
    (dict(engine='dask'), "'dask'"), (dict(gpus=1), 'gpus=1'), (dict(address='auto'), "address='auto'"),
    (dict(engine='ray', jobs=2), 'jobs=2'), (dict(engine='ray', retries=-1), 'retries=-1'),
    (dict(engine='ray', retries=1.5), 'retries=1.5'), (dict(engine='ray', cpus=-1), 'cpus=-1'),
    (dict(engine='ray', gpus='all'), "gpus='all'"), (dict(engine='ray', cpus=0), 'cpus=0 and gpus=0'),
    (dict(engine='ray', gpus=lambda run: float('nan')), 'gpus=nan'),
    (dict(engine='ray', address='somewhere'), 'host:port'), (dict(engine='ray', address='127.0.0.1:9'), '127.0.0.1:9'),
    (dict(engine='ray', address='127.0.0.1:999999'), '127.0.0.1:999999'),
    (dict(engine='ray', address='ray://127.0.0.1:10001'), 'ray://127.0.0.1:10001')]
@pytest.mark.parametrize('kw,said', INVALID)
def test_invalid_arguments_are_refused_at_once(kw, said, tmp_path, no_ray):
    with pytest.raises(ValueError, match=re.escape(said)): sweep([RUN], tmp_path/'out', **kw)
    assert not (tmp_path/'out').exists()

@pytest.mark.parametrize('engine', ['local','ray'])
@pytest.mark.parametrize('out,scheme', [('s3://bucket/x', 's3://'), ('ftp://ann:secret@127.0.0.1/x', 'ftp://'),
                                        (Path('gs://bucket/x'), 'gs://')])
def test_an_address_is_no_folder(out, scheme, engine, no_ray, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f'{scheme}.*name a folder') as said: sweep([RUN], out, engine=engine)
    assert 'secret' not in str(said.value) and not list(tmp_path.iterdir())

def test_an_address_that_a_cluster_left_behind(tmp_path, monkeypatch, no_ray):
    monkeypatch.setenv('RAY_TMPDIR', str(tmp_path))
    (tmp_path/'ray').mkdir()
    (tmp_path/'ray/ray_current_cluster').write_text('127.0.0.1:9')
    with pytest.raises(ValueError, match='127.0.0.1:9'): sweep([RUN], tmp_path/'out', engine='ray', address='auto')

def test_without_ray(monkeypatch, drawn, tmp_path):
    monkeypatch.setattr(on_cluster, 'find_spec', lambda name: None)
    (tmp_path/'grid.toml').write_text(f'data = "{drawn}"\n[[arm]]\narm = "a"')
    with pytest.raises(ValueError, match=r"needs ray.*pip install 'fgvc_fisher\[cluster\]'"):
        fgvc_sweep(str(tmp_path/'grid.toml'), str(tmp_path/'out'), engine='ray')

def test_more_than_there_is_is_said(monkeypatch, capsys):
    machines = [dict(Alive=True, Resources=dict(CPU=2.)), dict(Alive=False, Resources=dict(CPU=2., GPU=1.))]
    monkeypatch.setitem(sys.modules, 'ray', SimpleNamespace(nodes=lambda: machines))
    with pytest.raises(ValueError, match='cpus=1 and gpus=1'): on_cluster._check_room({'a': dict(CPU=1., GPU=1.)}, True)
    on_cluster._check_room({'a': dict(CPU=2.)}, True)
    assert not capsys.readouterr().out
    on_cluster._check_room({'a': dict(CPU=4.)}, False)
    assert 'cpus=4' in capsys.readouterr().out

# A trial, without a cluster

def job_of(out, attempt):
    return Job(str(out), attempt, {RUN.id: RUN}, {RUN.id: torch.get_num_threads()}, None, os.getcwd())
def fails(error):
    def attempt(run, out, track): raise error
    return attempt

def test_what_ends_a_sweep_and_what_is_tried_again(tmp_path):
    def trial(out, error): return on_cluster._trial(dict(run=RUN.id), job_of(out, fails(error)))
    assert re.search('does not see .*nowhere', trial(tmp_path/'nowhere', AssertionError())['ended'])
    (tmp_path/'runs'/RUN.id).mkdir(parents=True)
    assert 'No space left' in trial(tmp_path, OSError(errno.ENOSPC, 'No space left'))['ended']
    with pytest.raises(OSError, match='stale'): trial(tmp_path, OSError('stale'))

def test_a_full_disk_is_no_fault_of_the_run(tmp_path, monkeypatch):
    "It is not recorded as one"
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left')
    monkeypatch.setattr('fgvc_fisher.experiment.sweeps.do_claimed_run', full)
    (tmp_path/'runs'/RUN.id).mkdir(parents=True)
    with pytest.raises(OSError, match='No space left'): _attempt(RUN, tmp_path, None)
    assert not list(tmp_path.rglob('error.txt'))

def trial_of(said, file=None, failures=0):
    "A trial of Tune's, as the driver sees it"
    return SimpleNamespace(config=dict(run=RUN.id), last_result=said, error_file=file, num_failures=failures)

def test_what_the_driver_says_and_writes(tmp_path, capsys):
    (tmp_path/'runs'/RUN.id).mkdir(parents=True)
    outcome = on_cluster._Outcome(job_of(tmp_path, None), on_cluster.progress_bar(shown=False))
    (tmp_path/'trace').write_text('RayActorError: the actor died')
    outcome.resumes(trial_of({}))
    outcome.lost(trial_of({}, tmp_path/'trace', 2))
    outcome.done(trial_of(dict(said='best 50.0 %')))
    lines = capsys.readouterr().out.splitlines()
    assert [o.partition(': ')[0] for o in lines]==['plain, seed 42']*3 and not outcome.ended
    assert 'worker died' in lines[0] and 'WorkerDied' in lines[1] and '2 times' in lines[1]
    assert lines[2].endswith('best 50.0 %')
    error = (tmp_path/'runs'/RUN.id/'error.txt').read_text()
    assert 'the actor died' in error and error.strip().splitlines()[-1].startswith('WorkerDied')

def test_what_ends_the_sweep_is_kept(tmp_path, capsys):
    outcome = on_cluster._Outcome(job_of(tmp_path, None), on_cluster.progress_bar(shown=False))
    outcome.done(trial_of(dict(ended='No space left')))
    outcome.done(trial_of(dict(said='best 50.0 %')))
    assert outcome.ended=='No space left' and not capsys.readouterr().out
    (tmp_path/'trace').write_text('died')
    outcome.lost(trial_of({}, tmp_path/'trace', 1))                    # its folder is gone: nothing can be written
    assert RUN.id in outcome.ended

# On a cluster

@pytest.fixture(scope='module')
def common(drawn, drawn_source, tiny_weights):
    return dict(data=str(drawn), arch='tiny:network', weights=str(tiny_weights), source=str(drawn_source), test='test',
                size=32, bs=4, epochs=2, num_workers=0)

@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    "What the local engine makes of runs: a table and a folder, made once"
    out,before = tmp_path_factory.mktemp('local'),torch.get_num_threads()
    def do(runs):
        torch.set_num_threads(1)
        try: return sweep(runs, out, quiet=True),out
        finally: torch.set_num_threads(before)
    return do

ARMS = [dict(arm='plain'), dict(arm='L2-SP-Fisher', beta=10.)]
def check_same(runs, rows, folder, alone):
    "The table, the curves and the models are those of the local engine, to the bit"
    expected,there = alone(runs)
    rows,expected = [o.drop(columns=['seconds','machine']) for o in (rows, expected)]
    pd.testing.assert_frame_equal(rows, expected, check_exact=True)
    for o in runs:
        a,b = folder/'runs'/o.id,there/'runs'/o.id
        assert (a/'model.safetensors').read_bytes()==(b/'model.safetensors').read_bytes()
        curves = [pd.read_csv(p/'curve.csv').drop(columns='seconds') for p in (a,b)]
        pd.testing.assert_frame_equal(*curves, check_exact=True)

def until(f, seconds=240):
    "Wait for something that is true, and return it"
    end = time.time()+seconds
    while time.time()<end:
        if found := f(): return found
        time.sleep(0.02)
    raise AssertionError('it never came')

def begun(folder):
    "Folders of runs that have a checkpoint, and their curves"
    there = [o.parent for o in folder.glob('runs/*/checkpoint.pt')]
    return [(o, pd.read_csv(o/'curve.csv')) for o in there if not (o/'result.json').exists()]
def holder(folder):
    "The worker that holds a run's lock"
    def is_it(p):
        try: return p.name().startswith('ray::') and any(o.path==str(folder/'lock') for o in p.open_files())
        except psutil.Error: return False                              # it has just ended
    return next(filter(is_it, psutil.process_iter()), None)
def is_on(machine, worker):
    "Is a worker one of a machine of the cluster?"
    return worker.pid in [o.pid for o in psutil.Process(machine.all_processes['raylet'][0].process.pid).children()]
def check_resumed(folder, curve):
    "The epochs that were there are the ones that are there: their seconds are those of the first time"
    pd.testing.assert_frame_equal(pd.read_csv(folder/'curve.csv')[:len(curve)], curve, check_exact=True)

def drive(runs, out, address):
    print('failed:', sweep(runs, out, quiet=True, engine='ray', address=address).attrs['failed'])

def kill_all(runs, out, cluster):
    """The worker of one run and the machine of the other; when the first has resumed and gone on, the driver.
    Returns what was there of each run when it was killed"""
    second = cluster.add_machine()
    cluster.held.touch()
    driver = Forked(drive, runs, out, cluster.address)
    def both():
        "A run on the first machine with its worker, and one on the second"
        there = [(*o, p) for o in begun(out) if (p := holder(o[0]))]
        on_second = [is_on(second, p) for *_,p in there]
        return set(on_second)=={True,False} and (there[on_second.index(False)], there[on_second.index(True)])
    here,there = until(both)
    here[2].kill()
    cluster.remove_machine(second)
    psutil.wait_procs([here[2],there[2]], timeout=60)
    first = {o: len(curve) for o,curve in begun(out)}
    resumed = until(lambda: [(o, curve) for o,curve in begun(out) if len(curve)>first[o] and holder(o)])
    driver.kill()
    cluster.held.unlink()
    assert 'its worker died; it resumes' in driver.out, driver.out+driver.err
    return [here[:2], there[:2], *resumed]

@pytest.mark.slow
@pytest.mark.timeout(900)        # alone 80 s; beside other tests Ray's workers begin three times as slowly
@pytest.mark.xdist_group('ray')
def test_a_sweep_of_which_everything_is_killed(ray_cluster, common, alone, tmp_path, capfd):
    "The next sweep goes on, also when the process of a further run dies, and has the local engine's table"
    runs,out = grid(ARMS, **common | dict(arch='ray_cluster:waits', epochs=6)),tmp_path/'out'
    killed = kill_all(runs, out, ray_cluster)
    dies = replace(runs[0], arm='dies', arch='ray_cluster:dies')
    how = dict(quiet=True, engine='ray', address=ray_cluster.address)
    capfd.readouterr()
    rows = sweep([*runs, dies], out, cpus=lambda run: run.bs/4, retries=0, **how)
    said = capfd.readouterr()
    assert 'Configuration for experiment' not in said.out and 'Traceback' not in said.out+said.err
    assert rows.attrs['failed']==1 and '1 of 3 runs failed' in said.out
    assert 'dies, seed 42: failed: WorkerDied' in said.out
    assert 'WorkerDied' in (out/'runs'/dies.id/'error.txt').read_text()
    for folder,curve in killed: check_resumed(folder, curve)
    check_same(runs, rows, out, alone)
    assert not list(out.rglob('checkpoint.pt')) and not list(out.rglob('*.part'))
    assert len(list((out/'sources').glob('*.safetensors')))==1
    pd.testing.assert_frame_equal(sweep([*runs, dies], out, **how), rows, check_exact=True)
    assert '3 of them done before' in capfd.readouterr().out
