"A sweep on a Ray cluster of two machines, of which workers, machines and drivers are taken away"
import errno, json, os, re, subprocess, sys, threading, time
from dataclasses import replace
from pathlib import Path
import pandas as pd, pytest, timm, torch
from safetensors.torch import save_file
from fgvc_fisher import cluster as on_cluster
from fgvc_fisher.cluster import Job, Unreachable
from fgvc_fisher.experiment import Run, fgvc_sweep, grid, read_curves, read_runs, sweep, table

pytest.importorskip('ray.tune', reason="Ray is not installed: pip install 'fgvc_fisher[cluster]'")
os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
import psutil, ray
from ray.cluster_utils import Cluster

NETWORKS = '''
import errno, os
def dies(**kw): os._exit(1)
def full(**kw): raise OSError(errno.ENOSPC, 'No space left on device')
'''

@pytest.fixture(scope='module')
def two(tmp_path_factory):
    "A cluster of two machines with a processor each"
    home = tmp_path_factory.mktemp('networks')
    (home/'networks_of_tests.py').write_text(NETWORKS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join([str(home), *filter(None, sys.path)]))
        patch.setenv('OMP_NUM_THREADS', '1')
        patch.setenv('RAY_worker_niceness', '0')                       # 15 without: on a busy machine no run would ever begin
        patch.syspath_prepend(home)
        there = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
        there.second = there.add_node(num_cpus=1)
        yield there
        there.shutdown()

@pytest.fixture(scope='module')
def common(tmp_path_factory, drawn, drawn_source):
    file = tmp_path_factory.mktemp('weights')/'w.safetensors'
    torch.manual_seed(0)
    save_file(timm.create_model('test_resnet', num_classes=4).state_dict(), file)
    return dict(data=str(drawn), arch='test_resnet', weights=str(file), source=str(drawn_source), test='test', size=32, bs=4, epochs=2, num_workers=0)

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
def bare(rows): return rows.drop(columns=['seconds','machine'])
def same(runs, rows, folder, alone):
    "The table and the models are those of the local engine, to the bit"
    want,there = alone(runs)
    pd.testing.assert_frame_equal(bare(rows), bare(want), check_exact=True)
    for o in runs:
        assert (folder/'runs'/o.id/'model.safetensors').read_bytes()==(there/'runs'/o.id/'model.safetensors').read_bytes()
        a,b = [pd.read_csv(p/'runs'/o.id/'curve.csv').drop(columns='seconds') for p in (folder, there)]
        pd.testing.assert_frame_equal(a, b, check_exact=True)

def until(f, seconds=120):
    "Wait for something that is true, and return it"
    end = time.time()+seconds
    while time.time()<end:
        if found := f(): return found
        time.sleep(0.02)
    raise AssertionError('it never came')

def begun(folder):
    "Folders of runs that have a checkpoint, and their curves"
    return [(o.parent, pd.read_csv(o.parent/'curve.csv')) for o in folder.glob('runs/*/checkpoint.pt') if not (o.parent/'result.json').exists()]
def holder(folder):
    "The worker that holds a run's lock"
    def is_it(p):
        try: return p.name().startswith('ray::') and any(o.path==str(folder/'lock') for o in p.open_files())
        except psutil.Error: return False                              # it has just ended
    return next(filter(is_it, psutil.process_iter()), None)
def is_on(machine, worker):
    "Is a worker one of a machine of the cluster?"
    return worker.pid in [o.pid for o in psutil.Process(machine.all_processes['raylet'][0].process.pid).children()]
def went_on(folder, curve):
    "The epochs that were there are the ones that are there: their seconds are those of the first time"
    pd.testing.assert_frame_equal(pd.read_csv(folder/'curve.csv')[:len(curve)], curve, check_exact=True)

def driver(two, file, out, seeds, common):
    "`fgvc-sweep` in a process of its own"
    lines = [f'{k} = {json.dumps(v)}' for k,v in dict(seeds=seeds, **common).items()]
    for arm in ARMS: lines += ['[[arm]]', *(f'{k} = {json.dumps(v)}' for k,v in arm.items())]
    file.write_text('\n'.join(lines))
    command = [Path(sys.executable).parent/'fgvc-sweep', '--grid', file, '--out', str(out), '--engine', 'ray', '--address', two.address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
def did(said, runs):
    "How often each run was said to be done"
    return [sum(l.startswith(f'{o.arm}, seed {o.seed}: best') for l in said.splitlines()) for o in runs]

def test_the_table_is_the_local_engines(two, common, alone, tmp_path, capfd):
    runs = grid(ARMS, seeds=[1,2], **common)
    bad = replace(runs[0], arm='bad', weights=str(tmp_path/'missing.safetensors'))
    rows = sweep([bad, *runs], tmp_path/'out', quiet=True, engine='ray', address=two.address, cpus=lambda run: run.bs/4)
    said = capfd.readouterr()
    assert did(said.out, runs)==[1]*4 and 'Configuration for experiment' not in said.out and 'Traceback' not in said.out+said.err
    assert '1 of 5 runs failed' in said.out and 'there is no file' in (tmp_path/'out/runs'/bad.id/'error.txt').read_text() and rows.attrs['failed']==1
    same(runs, rows, tmp_path/'out', alone)
    again = sweep([bad, *runs], tmp_path/'out', engine='ray', address=two.address)
    pd.testing.assert_frame_equal(again, rows, check_exact=True)
    assert '5 of them done before' in capfd.readouterr().out and len(list((tmp_path/'out/sources').glob('*.safetensors')))==1

def test_workers_and_machines_come_and_go(two, common, alone, tmp_path):
    common = common | dict(epochs=30)
    runs = grid(ARMS, seeds=[1,2], **common)
    with driver(two, tmp_path/'grid.toml', tmp_path/'out', [1,2], common) as process:
        def at_work():
            "A run on the first machine with its worker, and one on the second"
            there = [(*o, p) for o in begun(tmp_path/'out') if (p := holder(o[0]))]
            second = [is_on(two.second, p) for *_,p in there]
            return set(second)=={True,False} and (there[second.index(False)], there[second.index(True)])
        (killed,curve,worker),(other,other_curve,_) = until(at_work)
        worker.kill()
        two.remove_node(two.second, allow_graceful=False)
        two.second = two.add_node(num_cpus=1)
        said = process.communicate(timeout=300)[0]
    assert process.returncode==0, said
    assert did(said, runs)==[1]*4 and said.count('its worker died; it goes on')>=2
    went_on(killed, curve)
    went_on(other, other_curve)
    same(runs, sweep(runs, tmp_path/'out', engine='ray'), tmp_path/'out', alone)
    assert not list((tmp_path/'out').rglob('checkpoint.pt')) and not list((tmp_path/'out').rglob('*.part'))

def test_the_driver_is_killed_and_started_again(two, common, alone, tmp_path):
    common = common | dict(epochs=5)
    runs = grid(ARMS, seeds=[1,2], **common)
    with driver(two, tmp_path/'grid.toml', tmp_path/'out', [1,2], common) as process:
        until(lambda: list((tmp_path/'out').glob('runs/*/result.json')))
        left = until(lambda: begun(tmp_path/'out'))
        process.kill()
    before = {o: o.stat().st_mtime_ns for o in (tmp_path/'out').glob('runs/*/result.json')}
    rows = sweep(runs, tmp_path/'out', quiet=True, engine='ray', address=two.address)
    assert 1<=len(before)<4 and before.items()<={o: o.stat().st_mtime_ns for o in (tmp_path/'out').glob('runs/*/result.json')}.items()
    for o in left: went_on(*o)
    same(runs, rows, tmp_path/'out', alone)

# A remote folder

@pytest.fixture
def ftp(tmp_path):
    "An FTP server of this machine: its address, and the folder behind it"
    from pyftpdlib.authorizers import DummyAuthorizer
    from pyftpdlib.handlers import FTPHandler
    from pyftpdlib.servers import ThreadedFTPServer
    (tmp_path/'server').mkdir()
    class Handler(FTPHandler): authorizer = DummyAuthorizer()
    Handler.authorizer.add_user('ann', 'secret', str(tmp_path/'server'), perm='elradfmwMT')
    server = ThreadedFTPServer(('127.0.0.1', 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'ftp://ann:secret@127.0.0.1:{server.address[1]}/exp/one',tmp_path/'server/exp/one'
    server.close_all()

def test_a_remote_folder(two, common, alone, ftp, tmp_path, capfd):
    "The driver is killed after an epoch; another one goes on from what is on the server"
    url,there = ftp
    common = common | dict(epochs=5)
    runs = grid(ARMS, seeds=[1], **common)
    with driver(two, tmp_path/'grid.toml', url, [1], common) as process:
        folder,curve = until(lambda: begun(there))[0]
        process.kill()
    rows = sweep(runs, url, quiet=True, engine='ray', address=two.address)
    said = capfd.readouterr()
    went_on(folder, curve)
    same(runs, rows, there, alone)
    assert 'secret' not in said.out+said.err
    assert {o.name for o in folder.iterdir()}=={'run.json','curve.csv','model.safetensors','result.json'}
    assert len(list(there.glob('sources/*.safetensors')))==1 and not list(there.rglob('*.part'))
    pd.testing.assert_frame_equal(read_runs(url), read_runs(there), check_exact=True)
    pd.testing.assert_frame_equal(read_curves(url), read_curves(there), check_exact=True)
    assert table(url).equals(table(rows))
    before = {o: o.stat().st_mtime_ns for o in there.rglob('*')}
    pd.testing.assert_frame_equal(sweep(runs, url, engine='ray'), rows, check_exact=True)
    assert before=={o: o.stat().st_mtime_ns for o in there.rglob('*')}

def test_a_result_is_sent_last_and_a_stumble_is_forgiven(ftp, tmp_path, monkeypatch):
    url,there = ftp
    here,put,sent = tmp_path/'run',[],{}
    here.mkdir()
    for o in ('result.json','checkpoint.pt','curve.csv','run.json'): (here/o).write_text(o)
    real,stumbles = on_cluster._put,[ConnectionResetError('stumbled'), EOFError()]
    def stumbling(fs, file, target):
        if stumbles and put: raise stumbles.pop()
        put.append(file.name)
        real(fs, file, target)
    monkeypatch.setattr(on_cluster, '_put', stumbling)
    monkeypatch.setattr(on_cluster, 'PAUSES', (0,0))
    on_cluster._stream(url, here, 'runs/a', sent)
    assert put[-1]=='result.json' and put.index('checkpoint.pt')>put.index('curve.csv') and len(put)==4
    (here/'checkpoint.pt').unlink()
    on_cluster._stream(url, here, 'runs/a', sent)
    assert len(put)==4 and sorted(o.name for o in there.glob('runs/a/*'))==['curve.csv','result.json','run.json']
    monkeypatch.setattr(on_cluster, '_put', lambda *args: (_ for _ in ()).throw(EOFError()))
    (here/'curve.csv').write_text('other')
    with pytest.raises(Unreachable, match=r'ann:\.\.\.@127.* does not answer: EOFError'): on_cluster._stream(url, here, 'runs/a', sent)

@pytest.mark.parametrize('store', ['ftp', 'memory'])                                      # folders, and a store that has none
def test_a_fisher_is_fetched_by_the_next_machine(ftp, tmp_path, store):
    url = ftp[0] if store=='ftp' else f'memory://{tmp_path.name}/exp'
    for o in ('first','second'): (tmp_path/o).mkdir()
    (tmp_path/'first/f.safetensors').write_bytes(b'x'*300_000)
    (tmp_path/'first/f.safetensors.32.checkpoint').write_bytes(b'half')
    on_cluster._share(url, tmp_path/'first')
    on_cluster._share(url, tmp_path/'second')
    assert [o.name for o in (tmp_path/'second').iterdir()]==['f.safetensors'] and (tmp_path/'second/f.safetensors').read_bytes()==b'x'*300_000

# Early stopping

def test_what_is_stopped_early_can_go_on(two, common, alone, tmp_path, capsys):
    good,poor = grid([dict(arm='good'), dict(arm='poor', lr=1e-6)], seeds=[1], **common | dict(epochs=4))
    sweep([good], tmp_path, quiet=True)
    folder,curve = tmp_path/'runs'/poor.id,tmp_path/'runs'/good.id/'curve.csv'
    pd.read_csv(curve).assign(accuracy=1.01).to_csv(curve, index=False)                     # nobody is better than that
    how = dict(quiet=True, engine='ray', address=two.address, stop_early=dict(grace_period=2, reduction_factor=2))
    rows = sweep([good, poor], tmp_path, **how)
    said = capsys.readouterr().out
    assert 'poor, seed 1: stopped early, after epoch 2' in said and '1 of 2 runs were stopped early' in said and 'failed' not in said
    assert rows.arm.tolist()==['good'] and rows.attrs['failed']==0 and (folder/'checkpoint.pt').exists()
    assert json.loads((folder/'stopped.json').read_text())['epoch']==2 and len(pd.read_csv(folder/'curve.csv'))==2
    before = {o: o.stat().st_mtime_ns for o in folder.iterdir()}
    sweep([good, poor], tmp_path, **how)
    assert before=={o: o.stat().st_mtime_ns for o in folder.iterdir()} and '2 of them done before' in capsys.readouterr().out
    first = pd.read_csv(folder/'curve.csv')
    rows = sweep([good, poor], tmp_path, quiet=True)
    went_on(folder, first)
    assert not (folder/'stopped.json').exists() and rows.arm.tolist()==['good','poor']
    same([poor], rows[1:].reset_index(drop=True), tmp_path, alone)

@pytest.mark.parametrize('options', [dict(grace=2), dict(reduction_factor=1), 'yes', 3])
def test_options_that_asha_has_not(options, common):
    with pytest.raises(ValueError, match='stop_early=.*dict.grace_period=2'): on_cluster._asha(options, grid(ARMS, **common), [])
def test_asha_needs_an_accuracy(common):
    with pytest.raises(ValueError, match='plain: stop_early goes by'): on_cluster._asha(True, grid(ARMS[:1], **common | dict(valid='')), [])

# What goes wrong

def test_a_worker_that_always_dies(two, common, tmp_path, capsys):
    bad,good = grid([dict(arm='bad', arch='networks_of_tests:dies'), dict(arm='good')], **common | dict(epochs=1))
    rows = sweep([bad, good], tmp_path, quiet=True, engine='ray', address=two.address, retries=1)
    said = capsys.readouterr().out
    assert rows.arm.tolist()==['good'] and said.count('bad, seed 42: its worker died')==1 and 'bad, seed 42: failed: WorkerDied: its process or its machine died 2 times' in said
    assert (tmp_path/'runs'/bad.id/'error.txt').read_text().strip().splitlines()[-1].startswith('WorkerDied')

def test_a_full_disk_ends_the_sweep(two, common, tmp_path):
    runs = grid([dict(arm='full', arch='networks_of_tests:full')], **common)
    with pytest.raises(OSError, match='No space left'): sweep(runs, tmp_path, quiet=True, engine='ray', address=two.address)
    assert not list(tmp_path.rglob('error.txt')) and not ray.is_initialized()

def test_a_folder_that_is_not_shared(common, tmp_path):
    run = Run('tree')
    job = Job(str(tmp_path/'nowhere'), None, {run.id: run}, {run.id: 1}, None, False, '.', '')
    with pytest.raises(Unreachable, match='does not see .*nowhere: it has to be on a disk that all machines share'): on_cluster._shared(job, run, None)

@pytest.mark.parametrize('out,error,ends', [('s3://bucket/x', Unreachable('no answer'), False), ('/x', Unreachable('not shared'), True), ('s3://bucket/x', OSError(errno.ENOSPC, 'full'), True), ('/x', OSError('broken'), False)])
def test_what_ends_a_sweep_and_what_is_tried_again(out, error, ends, monkeypatch):
    told,run = [],Run('tree')
    def fails(job, run, report): raise error
    for o in ('_shared','_streamed'): monkeypatch.setattr(on_cluster, o, fails)
    monkeypatch.setattr(ray.tune, 'report', told.append)
    job = Job(out, None, {run.id: run}, {run.id: torch.get_num_threads()}, None, False, os.getcwd(), '')
    if ends:
        on_cluster._trial(dict(run=run.id), job)
        assert list(told[0])==['ended']
    else:
        with pytest.raises(type(error)): on_cluster._trial(dict(run=run.id), job)
        assert not told

RUNS = [Run('tree')]
@pytest.mark.parametrize('kw,sentence', [(dict(engine='dask'), "engine='dask': choose 'local' or 'ray'"), (dict(gpus=1), "gpus=1 needs engine='ray'"), (dict(address='auto'), "address='auto' needs"),
    (dict(stop_early=True), 'stop_early=True needs'), (dict(engine='ray', jobs=2), "jobs=2 is for engine='local'"), (dict(engine='ray', retries=-1), 'retries=-1'),
    (dict(engine='ray', retries=1.5), 'retries=1.5'), (dict(engine='ray', cpus=-1), 'cpus=-1'), (dict(engine='ray', gpus='all'), "gpus='all'"), (dict(engine='ray', cpus=0), 'cpus=0 and gpus=0'),
    (dict(engine='ray', gpus=lambda run: float('nan')), 'gpus=nan'), (dict(engine='ray', address='somewhere'), 'give host:port'), (dict(engine='ray', address='127.0.0.1:9'), 'no Ray cluster answers at 127.0.0.1:9'),
    (dict(engine='ray', address='127.0.0.1:999999'), 'no Ray cluster answers'), (dict(engine='ray', address='ray://127.0.0.1:10001'), 'cannot be driven from outside')])
def test_nonsense_is_refused_at_once(kw, sentence, tmp_path):
    with pytest.raises(ValueError, match=re.escape(sentence)): sweep(RUNS, tmp_path/'out', **kw)
    assert not (tmp_path/'out').exists()

def test_an_address_that_a_cluster_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv('RAY_TMPDIR', str(tmp_path))
    (tmp_path/'ray').mkdir()
    (tmp_path/'ray/ray_current_cluster').write_text('127.0.0.1:9')
    with pytest.raises(ValueError, match='no Ray cluster answers at 127.0.0.1:9'): sweep(RUNS, tmp_path/'out', engine='ray', address='auto')

@pytest.mark.parametrize('out,kw,sentence', [('s3://bucket/x', {}, "an address needs engine='ray'"), ('ftp://ann:secret@127.0.0.1:9/x', dict(engine='ray'), 'ann:...@127.0.0.1:9/x does not answer'),
    ('nonsense://x', dict(engine='ray'), 'nonsense'), ('s3://bucket/x', dict(engine='ray', track='tensorboard'), 'is an address: leave it out')])
def test_an_address_that_cannot_be(out, kw, sentence, monkeypatch):
    monkeypatch.setattr(on_cluster, 'PAUSES', ())
    with pytest.raises((ValueError, Unreachable), match=re.escape(sentence)) as said: sweep(RUNS, out, **kw)
    assert 'secret' not in str(said.value)

def test_more_than_there_is_is_said(monkeypatch, capsys):
    monkeypatch.setattr(ray, 'nodes', lambda: [dict(Alive=True, Resources=dict(CPU=2.)), dict(Alive=False, Resources=dict(CPU=2., GPU=1.))])
    with pytest.raises(ValueError, match='cpus=1 and gpus=1: this machine has not got as much'): on_cluster._check_room({'a': dict(CPU=1., GPU=1.)}, True)
    on_cluster._check_room({'a': dict(CPU=2.)}, True)
    assert not capsys.readouterr().out
    on_cluster._check_room({'a': dict(CPU=4.)}, False)
    assert 'cpus=4: no machine of the cluster has as much now; waiting for one' in capsys.readouterr().out

class Trial:
    "A trial of Tune's, as the driver sees it after a failure"
    def __init__(self, run, file, failures): self.config,self.error_file,self.num_failures = dict(run=run.id),file,failures
def test_a_folder_out_of_reach_is_not_the_runs_fault(tmp_path, capsys):
    run,file = Run('tree'),tmp_path/'error'
    outcome = on_cluster._Outcome(Job(str(tmp_path), None, {run.id: run}, {}, None, False, '.', ''), on_cluster.tqdm(disable=True))
    file.write_text('Failure # 1\nRayActorError\nFailure # 2\nfgvc_fisher.cluster.Unreachable: s3://x does not answer\n')
    outcome.lost(Trial(run, file, 2), again=True)
    assert 'plain, seed 42: the folder was out of reach; it goes on' in capsys.readouterr().out and not outcome.ended
    outcome.lost(Trial(run, file, 2))
    assert outcome.ended.endswith('s3://x does not answer') and not list(tmp_path.rglob('error.txt'))

def test_without_ray(monkeypatch, tmp_path):
    monkeypatch.setattr(on_cluster, 'find_spec', lambda name: None)
    (tmp_path/'grid.toml').write_text('data = "a"\n[[arm]]\narm = "a"')
    with pytest.raises(SystemExit, match=r"needs ray.*pip install 'fgvc_fisher\[cluster\]'"): fgvc_sweep(str(tmp_path/'grid.toml'), str(tmp_path/'out'), engine='ray')
