"A training in a process of its own: what it changes (nothing), how it ends, and what is left when it does not end well"
import json, math, os, random, re, shutil, signal, subprocess, sys, tempfile, threading, time
from dataclasses import asdict, replace
from pathlib import Path
import pandas as pd, pytest, torch
from fastai.callback.core import Callback
from filelock import FileLock
from fgvc_fisher.explore import live
from fgvc_fisher.explore.live import Training, _train
from fgvc_fisher.experiment import Run, do_run
from fgvc_fisher.experiment.run import KeepEpochs
from forks import Forked
from piped import SUBPROCESS

pytestmark = pytest.mark.xdist_group('live')   # What its tests share is made once

@pytest.fixture(scope='module')
def run(tiny_run): return tiny_run

KEPT = ['retention_target_bn', 'retention_source_bn']
def same(a, b, kept=KEPT):
    "Do two folders have the same result, bit for bit, but for times and retention after every epoch?"
    rows = [json.loads((o/'result.json').read_text()) | dict(seconds=0) for o in (a, b)]
    curves = [pd.read_csv(o/'curve.csv').drop(columns=['seconds', *kept], errors='ignore') for o in (a, b)]
    assert rows[0]==rows[1]
    pd.testing.assert_frame_equal(*curves, check_exact=True)
    assert (a/'model.safetensors').read_bytes()==(b/'model.safetensors').read_bytes()

class Heard(list):
    "The messages of a training in this process, as they come through a pipe"
    def __call__(self, **said): self.append(json.loads(json.dumps(said)))
    def of(self, key): return [o[key] for o in self if key in o]

class Stop(Callback):
    order = KeepEpochs.order+1
    def before_epoch(self):
        if self.epoch==1: raise KeyboardInterrupt

def until(holds, seconds=100):
    "Wait for something that has to come"
    end = time.monotonic()+seconds
    while not holds():
        assert time.monotonic()<end
        time.sleep(0.01)

def gone(pid):
    "Is there no such process? One that waits for being reaped by somebody else has ended"
    try: os.kill(pid, 0)
    except ProcessLookupError: return True
    try: stat = Path(f'/proc/{pid}/stat').read_text()
    except OSError: return Path('/proc/self/stat').exists()            # it went since, or this is no Linux
    return stat.rsplit(')', 1)[1].split()[0]=='Z'

def has(text, *words):
    "Are these words and numbers in a sentence, in this order?"
    return re.search(r'.*'.join(rf'(?<!\w){re.escape(o)}' for o in words), text) is not None

# What the process does, here in this one

@pytest.fixture(scope='module')
def watched(run, tmp_path_factory):
    "Folder and messages of a run that was watched, and how many epochs were safe when each message about epochs came"
    out,safe = tmp_path_factory.mktemp('watched'),[]
    class Looks(Heard):
        def __call__(self, **said):
            super().__call__(**said)
            if said.get('epochs'):
                safe.append(len(torch.load(out/'runs'/run.id/'checkpoint.pt', weights_only=True)['rows']))
    heard = Looks()
    _train(run, out, heard)
    return out/'runs'/run.id,heard,safe

def is_told(heard, row, run):
    "Does the last message say what the result is, with the retention where there is one?"
    accuracy = row['last'] if run.valid else row['test_last']
    assert heard[-1]['over'] and has(heard[-1]['stage'], 'accuracy', f'{100*accuracy:.1f} %')
    assert ('retention' in heard[-1]['stage'])==bool(run.source)
    last = heard.of('epochs')[-1][-1]
    if run.source and run.valid: assert [last[o] for o in KEPT]==[row[o] for o in KEPT]
    else: assert not set(KEPT) & last.keys()

def test_to_be_watched_changes_nothing(run, tiny_done, watched):
    same(tiny_done, watched[0])
    is_told(watched[1], json.loads((tiny_done/'result.json').read_text()), run)

@pytest.mark.parametrize('how', [
    dict(recipe='published', transforms='published', step='published', alpha=5e-4, beta=4e-5),
    dict(beta=0, source=''), dict(train='trainval', valid='')])
def test_to_be_watched_changes_nothing_in_any_kind_of_run(run, tmp_path, how):
    run,heard = replace(run, epochs=2, **how),Heard()
    row = do_run(run, tmp_path/'alone', tmp_path/'sources', quiet=True)
    _train(run, tmp_path, heard)
    same(tmp_path/'alone', tmp_path/'runs'/run.id)
    is_told(heard, row, run)

def test_retention_sees_pictures_as_the_tuned_model_expects_them(run, tmp_path):
    "With the source's own, the number would be another one: the test above can fail"
    kept = live._RunRetention(replace(run, transforms='published'), tmp_path)
    kept.begin()
    a,b = [next(iter(kept.pictures[o]))[0].as_subclass(torch.Tensor) for o in ('target','source')]
    assert not torch.allclose(a, b, atol=0.1)

def test_source_pictures_without_labels(run, tmp_path):
    "Have an agreement and a divergence, after every epoch and in the result, and nothing is called a retention"
    unlabelled = tmp_path/'pictures'
    shutil.copytree(run.source, unlabelled, ignore=shutil.ignore_patterns('labels.csv'))
    run,heard = replace(run, epochs=1, source=str(unlabelled), transforms='published', recipe='published'),Heard()
    row = do_run(run, tmp_path/'alone', tmp_path/'sources', quiet=True)
    names = [f'{o}_{norm}_bn' for o in ('agreement','divergence') for norm in ('target','source')]
    _train(run, tmp_path, heard)
    same(tmp_path/'alone', tmp_path/'runs'/run.id, names)
    assert math.isnan(row['before'])
    assert {k: heard.of('epochs')[-1][-1][k] for k in names}=={k: row[k] for k in names}
    assert not set(KEPT) & {*heard.of('epochs')[-1][-1], *row}
    assert has(heard[-1]['stage'], 'agreement', f"{100*row['agreement_target_bn']:.1f} %")
    assert 'retention' not in heard[-1]['stage']

def test_what_is_told(watched):
    folder,heard,_ = watched
    curve = pd.read_csv(folder/'curve.csv')
    assert [len(o) for o in heard.of('epochs')]==[0,1,2,3]
    assert heard.of('epochs')[-1]==curve.to_dict('records')
    batches = heard.of('batch')
    assert [o for o,_ in batches]==sorted(o for o,_ in batches) and batches[0][0]==1/4       # 16 pictures, 4 per batch
    assert [loss for o,loss in batches if o==int(o)]==curve.train_loss.tolist()
    stages = heard.of('stage')
    assert [sum(has(o, str(i), '3', '4', '4') for o in stages) for i in (1,2,3)]==[1,1,1]   # of 3 epochs, batch 4 of 4
    assert 'Fisher' in stages[0] and sum(has(o, '2', '3', 'measuring') for o in stages)==1

def test_an_epoch_is_told_when_it_is_safe(watched): assert watched[2]==[1,2,3]

@pytest.mark.parametrize('first', ['alone', 'watched'])
def test_either_goes_on_with_what_the_other_began(run, tiny_done, tmp_path, first):
    folder,heard = tmp_path/'runs'/run.id,Heard()
    shutil.copytree(tiny_done.parent/'sources', tmp_path/'sources')
    def stops(**said):
        if len(said.get('epochs', []))==1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        if first=='alone': do_run(run, folder, tmp_path/'sources', [Stop()], quiet=True)
        else: _train(run, tmp_path, stops)
    if first=='alone': _train(run, tmp_path, heard)
    else: do_run(run, folder, tmp_path/'sources', quiet=True)
    same(tiny_done, folder)
    kept = pd.read_csv(folder/'curve.csv')[KEPT].notna().all(axis=1)
    assert kept.tolist()==([False,True,True] if first=='alone' else [True,False,False])
    if first=='alone': assert [len(o) for o in heard.of('epochs')]==[1,2,3] and heard.of('batch')[0][0]==1.25

def test_one_that_died_after_the_last_epoch(run, tiny_done, tmp_path):
    def dies(**said):
        if len(said.get('epochs', []))==3: raise KeyboardInterrupt
    heard = Heard()
    shutil.copytree(tiny_done.parent/'sources', tmp_path/'sources')
    with pytest.raises(KeyboardInterrupt): _train(run, tmp_path, dies)
    _train(run, tmp_path, heard)
    same(tiny_done, tmp_path/'runs'/run.id)
    assert [len(o) for o in heard.of('epochs')]==[3] and not heard.of('batch')

def test_a_divergence_is_said(run, tmp_path):
    heard = Heard()
    _train(replace(run, arm='wild', beta=0, lr=1e20), tmp_path, heard)
    assert 'diverge' in heard[-1]['stage']

def test_who_is_at_a_run_is_respected(run, tmp_path, monkeypatch):
    monkeypatch.setattr(live, '_PATIENCE', 0.1)
    folder = tmp_path/'runs'/run.id
    folder.mkdir(parents=True)
    with FileLock(folder/'lock'):
        with pytest.raises(ValueError, match=re.escape(str(folder))): _train(run, tmp_path, Heard())

def test_a_lock_that_comes_free_is_waited_for(run, tmp_path, monkeypatch):
    monkeypatch.setattr(live, 'do_claimed_run', lambda run, *args: dict(last=0.5))
    folder,heard = tmp_path/'runs'/run.id,Heard()
    folder.mkdir(parents=True)
    lock = FileLock(folder/'lock', thread_local=False)
    lock.acquire()
    threading.Timer(0.2, lock.release).start()
    _train(run, tmp_path, heard)
    assert has(heard[-1]['stage'], '50.0 %')

# Starting, stopping, dying, with a process that does what the arm's name says

FAKE = '''
import json, os, signal, subprocess, sys, time
def say(**said): print(json.dumps(said), flush=True)
line = sys.stdin.readline()
if not line: sys.exit()
told = json.loads(line)
arm = told['run']['arm']
if arm=='stubborn': signal.signal(signal.SIGTERM, signal.SIG_IGN)
if arm=='broken': sys.exit('no such thing')
if arm=='killed': os.kill(os.getpid(), signal.SIGKILL)
if arm=='half': os.write(1, b'{"stage": "ha'); sys.exit(3)
if arm=='parent':
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], stdout=subprocess.DEVNULL)
    say(stage=str(child.pid))
if arm=='mute': time.sleep(1000)
say(epochs=[])
if arm!='talkative': say(batch=[0.5, 2.])
if arm=='talkative':
    for i in range(20_000): say(batch=[0.5, 1.])
    say(stage='done: 20000 batches', over=True)
    sys.exit()
if arm=='flood':
    while True: say(batch=[0.5, 1.])
say(batch=[1., 1.5])
say(epochs=[dict(epoch=0, train_loss=1.5, valid_loss=1., accuracy=0.5)])
if arm!='quick': time.sleep(1000)
say(stage='done: quickly', over=True)
'''
@pytest.fixture
def training(tmp_path, monkeypatch):
    monkeypatch.setattr(live, '_CODE', FAKE)
    with Training(tmp_path/'out') as o: yield o

def fake(arm, **kwargs): return Run('tree', arm, epochs=2, **kwargs)
def at_work(training): return lambda: len(training.batches(training.run.id))>1
def an_epoch_on(training): return lambda: len(training.epochs(training.run.id))==1   # 'slow' says so after its batches

def test_it_ends_by_itself(training):
    assert training.stage=='ready' and training.run is None
    training.start(fake('quick'))
    assert training.wait(60)=='done: quickly' and training.run is None
    assert training.batches(fake('quick').id)==[(0.5,2.), (1.,1.5)]
    training.start(fake('quick', seed=1))
    assert training.wait(60)=='done: quickly'

def test_it_is_stopped_and_started_again(training):
    training.stop()
    assert training.stage=='ready'
    training.start(fake('slow'))
    with pytest.raises(ValueError, match='slow.*42'): training.start(fake('quick'))
    with pytest.raises(TimeoutError, match='0.01'): training.wait(0.01)
    until(an_epoch_on(training))
    process = training._process.popen
    assert training.epochs(training.run.id).accuracy.tolist()==[0.5]
    training.stop()
    assert gone(process.pid) and has(training.stage, 'stopped', '1', '2') and training.run is None
    training.start(fake('quick'))
    assert training.wait(60)=='done: quickly'

def test_stopped_before_it_says_a_word(training):
    for arm in ('mute','slow','mute'):
        training.start(fake(arm))
        training.stop()
        assert has(training.stage, 'stopped', '0', '2')
    training.start(fake('quick'))
    assert training.wait(60)=='done: quickly'

def test_what_a_stopped_one_has_still_to_say_is_not_heard(training):
    training.start(fake('flood'))
    until(at_work(training))
    training.stop()
    heard,stage = training.batches(fake('flood').id),training.stage
    time.sleep(0.1)
    assert training.batches(fake('flood').id)==heard and training.stage==stage
    training.start(fake('slow'))
    until(at_work(training))
    assert training.run==fake('slow') and training.batches(training.run.id)==[(0.5,2.), (1.,1.5)]

@pytest.mark.parametrize('arm,why', [
    ('killed', ['Killed','memory']), ('broken', ['1','no such thing']), ('half', ['3'])])
def test_it_dies(training, arm, why):
    training.start(fake(arm))
    assert has(training.wait(60), 'failed', *why) and ('no such thing' in training.log)==(arm=='broken')
    training.start(fake('quick'))
    assert training.wait(60)=='done: quickly'

def test_one_that_waits_dies(training):
    process = training._process.popen
    process.kill(), process.wait()
    assert training.stage=='ready'
    training.start(fake('quick'))
    assert training.wait(60)=='done: quickly'

def test_none_can_be_started(tmp_path, monkeypatch):
    monkeypatch.setattr(live, '_CODE', 'raise ImportError("no torch here")')
    with Training(tmp_path) as training:
        for _ in range(2):
            training.start(fake('quick'))
            assert has(training.wait(60), 'failed', '1', 'ImportError: no torch here')

def test_one_that_does_not_want_to_go(training):
    training.start(fake('stubborn'))
    until(at_work(training))
    pid = training._process.popen.pid
    training.stop()
    assert gone(pid) and training.run is None

@pytest.mark.skipif(os.name!='posix', reason='process groups')
@pytest.mark.parametrize('how', ['stop', 'killed'])
def test_what_it_has_started_ends_with_it(training, how):
    training.start(fake('parent'))
    until(lambda: training.stage.isdigit())
    child = int(training.stage)
    if how=='stop': training.stop()
    else: training._process.popen.kill()
    assert training.wait(60).startswith(dict(stop='stopped', killed='failed')[how])
    until(lambda: gone(child))

def test_close(training):
    training.start(fake('slow'))
    until(an_epoch_on(training))
    pid = training._process.popen.pid
    training.close(), training.close(), training.stop()
    assert gone(pid) and training._process is None and has(training.wait(0), 'stopped', '1', '2')
    with pytest.raises(ValueError, match='closed'): training.start(fake('quick'))

def test_close_while_one_is_starting(tmp_path, monkeypatch):
    monkeypatch.setattr(live, '_CODE', 'import time; time.sleep(1000)')
    with Training(tmp_path) as training: pid = training._process.popen.pid
    assert gone(pid)

def test_nobody_listens(training):
    "A training does not wait for a reader: more than a pipe holds is written while nobody asks"
    training.start(fake('talkative'))
    pid = training._process.popen.pid
    until(lambda: gone(pid))
    assert training.wait(60)=='done: 20000 batches' and len(training.batches(fake('talkative').id))==20_000

def test_what_has_changed_is_counted(training):
    before = training.heard
    training.start(fake('quick'))
    training.wait(60)
    after = training.heard
    assert after>before and training.heard==after

def test_no_file_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(live, '_CODE', FAKE)
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))
    with Training(tmp_path/'out') as training:
        training.start(fake('quick'))
        assert training.wait(60)=='done: quickly' and not [o for o in tmp_path.iterdir() if o.is_file()]

def test_many_at_once(training):
    "Threads start, stop and kill as they please: nothing hangs, and nothing is left over"
    pids,errors = set(),[]
    def press(seed):
        rng = random.Random(seed)
        for _ in range(12):
            try:
                match rng.choice(('start','start','stop','kill','look')):
                    case 'start':
                        arm = rng.choice(('quick','slow','flood','mute'))
                        training.start(fake(arm, seed=rng.randrange(3)))
                    case 'stop': training.stop()
                    case 'kill': training._process and training._process.popen.kill()
                    case 'look': training.stage, training.run and training.epochs(training.run.id)
            except ValueError as e: errors.append(str(e))
            if process := training._process: pids.add(process.popen.pid)
            time.sleep(rng.uniform(0, 0.05))
    threads = [threading.Thread(target=press, args=(random.random(),)) for _ in range(3)]
    for o in threads: o.start()
    for o in threads: o.join(60)
    assert not any(o.is_alive() for o in threads) and all(has(o, 'seed') for o in errors)
    training.stop()
    assert training.run is None and training.wait(0)
    training.start(fake('quick', seed=9))
    assert training.wait(60)=='done: quickly'
    training.close()
    until(lambda: all(map(gone, pids)))

def test_batches_of_an_epoch_that_begins_anew_are_forgotten(training):
    run = fake('mute')
    training.start(run)
    row = dict(epoch=0, train_loss=1., valid_loss=1., accuracy=0.5)
    for said in (dict(batch=[0.5,3]), dict(batch=[1.,2]), dict(epochs=[row]), dict(batch=[1.5,1])):
        training._record(**said)
    training.stop()
    assert training.batches(run.id)==[(0.5,3), (1.,2), (1.5,1)]
    training.start(run)
    training._record(epochs=[row])
    assert training.batches(run.id)==[(0.5,3), (1.,2)]

# The folder

def write(folder, run, curve=None, result=None):
    folder.mkdir(parents=True)
    (folder/'run.json').write_text(json.dumps(run) if isinstance(run, dict) else run)
    if curve is not None: (folder/'curve.csv').write_text(curve)
    if result is not None: (folder/'result.json').write_text(json.dumps(result) if isinstance(result, dict) else result)

def test_what_is_there_is_known_and_what_is_broken_is_named(training):
    assert training.known()=={} and training.problems==[]
    runs,there = training.out/'runs',[Run('tree', seed=o) for o in range(3)]
    write(runs/there[0].id, asdict(there[0]))
    write(runs/there[1].id, asdict(there[1]), 'epoch,train_loss,valid_loss,accuracy\n0,2.0,1.0,0.25\n')
    curve = 'epoch,train_loss,valid_loss,accuracy\n0,2.0,1.0,0.25\n'
    write(runs/there[2].id, asdict(there[2]), curve, dict(last=0.25, test=None))
    write(runs/'a', '{"half')
    write(runs/'b', asdict(there[0]) | dict(colour='red'))
    write(runs/'c', asdict(there[0]) | dict(size=-1))
    write(runs/'d', asdict(there[0]), curve='')
    write(runs/'e', asdict(there[0]), result='[1]')
    write(runs/'f', dict(arm='plain'))
    (runs/'g').mkdir()
    assert training.known()=={o.id: o for o in there}
    broken = ['a/run.json','b/run.json','c/run.json','d/curve.csv','e/result.json','f/run.json']
    for file,said in zip(broken, training.problems, strict=True): assert str(runs/file) in said
    assert [len(training.epochs(o.id)) for o in there]==[0,1,1]
    assert list(training.epochs(there[0].id))==['epoch','train_loss','valid_loss','accuracy']
    assert training.result(there[1].id) is None
    row = training.result(there[2].id)
    assert row['last']==0.25 and math.isnan(row['test'])
    with pytest.raises(ValueError, match='curve.csv'): training.epochs('d')
    with pytest.raises(ValueError, match='result.json'): training.result('e')
    assert training.epochs('unheard of').empty
    assert training.result('unheard of') is None and training.batches('unheard of')==[]

def test_a_curve_from_before_is_there_while_it_starts(training):
    run = fake('mute')
    write(training.out/'runs'/run.id, asdict(run), 'epoch,train_loss,valid_loss,accuracy\n0,2.0,1.0,0.25\n')
    training.start(run)
    assert training.epochs(run.id).accuracy.tolist()==[0.25]
    training.stop()
    assert has(training.stage, 'stopped', '1', '2')

def test_broken_files_of_a_run_keep_it_from_starting(training):
    run = fake('quick')
    write(training.out/'runs'/run.id, asdict(run), '')
    with pytest.raises(ValueError, match='curve.csv'): training.start(run)
    assert training.run is None and training.wait(0)=='ready'

def test_what_is_done_is_read(training):
    run = fake('broken')
    write(training.out/'runs'/run.id, asdict(run), None, dict(last=0.25, retention_target_bn=0.5))
    training.start(run)
    assert training.run is None and has(training.wait(0), '25.0 %', '50.0 %')

# The process itself

def serve(fifo, said):
    "What the process of a training does, with a named pipe for its standard input and a file for what it says"
    os.setsid()
    os.dup2(os.open(fifo, os.O_RDONLY), 0)
    sys.stdin = open(0)
    live._serve(os.open(said, os.O_WRONLY))

posix = pytest.mark.skipif(os.name!='posix', reason='signals and fork')

@posix
def test_it_ends_where_its_input_ends(run, tmp_path):
    "With those that load its pictures, which hold the lock of the run too"
    run = replace(run, beta=0, source='', num_workers=2, epochs=10_000)
    os.mkfifo(tmp_path/'in')
    (tmp_path/'said').touch()
    told = os.open(tmp_path/'in', os.O_RDWR)                          # this does not wait for a reader
    process = Forked(serve, tmp_path/'in', tmp_path/'said')
    os.write(told, json.dumps(dict(run=asdict(run), out=str(tmp_path), cwd=str(tmp_path))).encode()+b'\n')
    until(lambda: process.poll() is not None or '"accuracy"' in (tmp_path/'said').read_text())
    os.close(told)
    assert process.wait()==-signal.SIGTERM, process.err
    with FileLock(tmp_path/'runs'/run.id/'lock', timeout=30): pass

def test_a_training(run, tiny_done, tmp_path, monkeypatch):
    "In a folder that has changed after its process was started"
    with Training(tmp_path) as training:
        monkeypatch.setattr(live, '_CODE', FAKE)              # the next one would load the libraries for nothing
        monkeypatch.chdir(tmp_path)
        training.start(run)
        assert has(training.wait(200), 'done', 'accuracy'), training.log
        assert training.epochs(run.id)[KEPT].notna().all(axis=None) and len(training.batches(run.id))>=3
    same(tiny_done, tmp_path/'runs'/run.id)

@pytest.mark.slow
def test_ended_at_any_moment_it_goes_on(run, tmp_path, monkeypatch):
    "With processes that load pictures, which hold the lock of their run too"
    monkeypatch.setenv('OMP_NUM_THREADS', str(torch.get_num_threads()))
    monkeypatch.setattr(live, 'subprocess', SUBPROCESS)
    with Training(tmp_path) as training:
        monkeypatch.chdir(Path(run.data).parent)
        run = replace(run, data=Path(run.data).name, num_workers=2, epochs=6)
        do_run(run, tmp_path/'whole', tmp_path/'sources', quiet=True)
        for n,how in enumerate(('killed','stopped')):
            training.start(run)
            until(lambda: len(training.epochs(run.id))>2*n or training.run is None)
            time.sleep(random.uniform(0, 0.3))
            os.kill(training._process.popen.pid, signal.SIGKILL) if how=='killed' else training.stop()
            assert has(training.wait(100), *dict(killed=['failed','Killed'], stopped=['stopped'])[how]), training.log
        monkeypatch.setattr(live, '_CODE', FAKE)
        training.start(run)
        assert has(training.wait(100), 'done', 'accuracy'), training.log
        assert training.epochs(run.id)[KEPT].notna().all(axis=None)
    same(tmp_path/'whole', tmp_path/'runs'/run.id)

def is_killed(run, out):
    live.subprocess = SUBPROCESS
    busy = Training(out)
    busy.start(run)
    while not len(busy.epochs(run.id)) and busy.run: time.sleep(0.01)
    young = Training(out)
    print(busy.stage, busy._process.popen.pid, young._process.popen.pid, sep='|')
    time.sleep(1000)

EXITS = """
import json, sys, time
from fgvc_fisher.explore import live
live._CODE = sys.argv[3]
busy,idle = live.Training(sys.argv[2]),live.Training(sys.argv[2])
busy.start(live.Run(**json.loads(sys.argv[1])))
while not len(busy.batches(busy.run.id)): time.sleep(0.01)
print(busy.run.arm, busy._process.popen.pid, idle._process.popen.pid, sep='|', flush=True)
"""

@posix
@pytest.mark.slow
def test_nothing_outlives_its_parent(run, tmp_path):
    """Neither what trains, with those that load its pictures, nor what has just been started.
    A script that ends does not hang"""
    run = replace(run, beta=0, source='', num_workers=2, epochs=10_000)
    killed = Forked(is_killed, run, tmp_path)
    command = [sys.executable, '-c', EXITS, json.dumps(asdict(fake('slow'))), str(tmp_path), FAKE]
    exits = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert exits.returncode==0, exits.stderr
    until(lambda: '\n' in killed.out or killed.poll() is not None)
    killed.kill()
    said = [o.strip().split('|') for o in (exits.stdout, killed.out)]
    assert said[0][0]=='slow' and has(said[1][0], 'epoch')
    until(lambda: all(gone(int(o)) for _,*pids in said for o in pids))
    with FileLock(tmp_path/'runs'/run.id/'lock', timeout=30): pass
