"A training in a process of its own: what it changes (nothing), how it ends, and what is left when it does not end well"
import json, math, os, random, signal, subprocess, sys, threading, time
from dataclasses import asdict, replace
from pathlib import Path
import pandas as pd, pytest, timm, torch
from fastai.callback.core import Callback
from filelock import FileLock
from safetensors.torch import save_file
from fgvc_fisher import live
from fgvc_fisher.live import Training, _train
from fgvc_fisher.runs import KeepEpochs, Run, do_run

@pytest.fixture(scope='module')
def run(drawn, drawn_source, tmp_path_factory):
    file = tmp_path_factory.mktemp('weights')/'w.safetensors'
    torch.manual_seed(0)
    save_file(timm.create_model('test_resnet', num_classes=4).state_dict(), file)
    return Run(drawn, 'L2-SP-Fisher, beta = 10', beta=10, arch='test_resnet', weights=str(file), source=drawn_source, test='test',
               size=32, bs=4, epochs=3, num_workers=0)

KEPT = ['retention_target_bn', 'retention_source_bn']
def same(a, b):
    "Do two folders have the same result, bit for bit? Retention after every epoch and what depends on the clock do not count"
    rows = [json.loads((o/'result.json').read_text()) | dict(seconds=0) for o in (a, b)]
    curves = [pd.read_csv(o/'curve.csv').drop(columns=['seconds', *KEPT], errors='ignore') for o in (a, b)]
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
    stat = Path(f'/proc/{pid}/stat')
    return stat.exists() and stat.read_text().rsplit(')', 1)[1].split()[0]=='Z'

# What the process does, here in this one

@pytest.mark.parametrize('how', [dict(), dict(recipe='published', transforms='published'), dict(step='published', alpha=5e-4, beta=4e-5),
                                 dict(beta=0, source=''), dict(train='trainval', valid='')])
def test_to_be_watched_changes_nothing(run, tmp_path, how):
    run,heard = replace(run, **how),Heard()
    row = do_run(run, tmp_path/'alone', tmp_path/'sources', quiet=True)
    _train(run, tmp_path, heard)
    same(tmp_path/'alone', tmp_path/'runs'/run.id)
    assert heard[-1]['over'] and heard[-1]['stage'].startswith('done: accuracy') and ('retention' in heard[-1]['stage'])==bool(run.source)
    last = heard.of('epochs')[-1][-1]
    if run.source and run.valid: assert [last[o] for o in KEPT]==[row[o] for o in KEPT]
    else: assert not set(KEPT) & last.keys()

def test_retention_sees_pictures_as_the_tuned_model_expects_them(run, tmp_path):
    "With the source's own, the number would be another one: the test above can fail"
    kept = live._Kept(replace(run, transforms='published'), tmp_path)
    kept.begin()
    a,b = [next(iter(kept.pictures[o]))[0].as_subclass(torch.Tensor) for o in ('target','source')]
    assert not torch.allclose(a, b, atol=0.1)

def test_what_is_told(run, tmp_path):
    heard = Heard()
    _train(run, tmp_path, heard)
    curve = pd.read_csv(tmp_path/'runs'/run.id/'curve.csv')
    assert [len(o) for o in heard.of('epochs')]==[0,1,2,3]
    assert heard.of('epochs')[-1]==curve.to_dict('records')
    batches = heard.of('batch')
    assert [o for o,_ in batches]==sorted(o for o,_ in batches) and batches[0][0]==1/4             # 16 pictures, 4 a batch
    assert [loss for o,loss in batches if o==int(o)]==curve.train_loss.tolist()
    assert [o for o in heard.of('stage') if 'batch 4' in o]==[f'epoch {i} of 3, batch 4 of 4' for i in (1,2,3)]
    assert heard[0]['stage'].startswith('the Fisher') and 'epoch 2 of 3, measuring' in heard.of('stage')

def test_an_epoch_is_told_when_it_is_safe(run, tmp_path):
    kept = []
    def say(**said):
        if not said.get('epochs'): return
        rows = torch.load(tmp_path/'runs'/run.id/'checkpoint.pt', weights_only=True)['rows']
        kept.append(len(rows)==len(said['epochs']))
    _train(run, tmp_path, say)
    assert kept==[True]*3

@pytest.mark.parametrize('first', ['alone', 'watched'])
def test_either_goes_on_with_what_the_other_began(run, tmp_path, first):
    folder,heard = tmp_path/'runs'/run.id,Heard()
    do_run(run, tmp_path/'whole', tmp_path/'sources', quiet=True)
    def stops(**said):
        if len(said.get('epochs', []))==1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        if first=='alone': do_run(run, folder, tmp_path/'sources', [Stop()], quiet=True)
        else: _train(run, tmp_path, stops)
    if first=='alone': _train(run, tmp_path, heard)
    else: do_run(run, folder, tmp_path/'sources', quiet=True)
    same(tmp_path/'whole', folder)
    assert pd.read_csv(folder/'curve.csv')[KEPT].notna().all(axis=1).tolist()==([False,True,True] if first=='alone' else [True,False,False])
    if first=='alone': assert [len(o) for o in heard.of('epochs')]==[1,2,3] and heard.of('batch')[0][0]==1.25

def test_one_that_died_after_the_last_epoch(run, tmp_path):
    def dies(**said):
        if len(said.get('epochs', []))==3: raise KeyboardInterrupt
    heard = Heard()
    do_run(run, tmp_path/'whole', tmp_path/'sources', quiet=True)
    with pytest.raises(KeyboardInterrupt): _train(run, tmp_path, dies)
    _train(run, tmp_path, heard)
    same(tmp_path/'whole', tmp_path/'runs'/run.id)
    assert [len(o) for o in heard.of('epochs')]==[3] and not heard.of('batch')

def test_a_divergence_is_said(run, tmp_path):
    heard = Heard()
    _train(replace(run, arm='wild', beta=0, lr=1e20), tmp_path, heard)
    assert 'diverged' in heard[-1]['stage']

def test_who_is_at_a_run_is_respected(run, tmp_path, monkeypatch):
    monkeypatch.setattr(live, '_PATIENCE', 0.1)
    folder = tmp_path/'runs'/run.id
    folder.mkdir(parents=True)
    with FileLock(folder/'lock'), pytest.raises(ValueError, match='another process is at this run'): _train(run, tmp_path, Heard())

def test_a_lock_that_comes_free_is_waited_for(run, tmp_path, monkeypatch):
    monkeypatch.setattr(live, '_do', lambda run, *args: dict(last=0.5))
    folder,heard = tmp_path/'runs'/run.id,Heard()
    folder.mkdir(parents=True)
    lock = FileLock(folder/'lock', thread_local=False)
    lock.acquire()
    threading.Timer(0.2, lock.release).start()
    _train(run, tmp_path, heard)
    assert heard[-1]['stage']=='done: accuracy 50.0 %'

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
if arm=='parent': say(stage=str(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)'], stdout=subprocess.DEVNULL).pid))
if arm=='mute': time.sleep(1000)
say(epochs=[])
say(batch=[0.5, 2.])
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
    with pytest.raises(ValueError, match='slow, seed 42, is going on: stop it first'): training.start(fake('quick'))
    with pytest.raises(TimeoutError, match='still going on after 0.01 s'): training.wait(0.01)
    until(at_work(training))
    process = training._process.popen
    assert training.epochs(training.run.id).accuracy.tolist()==[0.5]
    training.stop()
    assert gone(process.pid) and training.stage=='stopped after 1 of 2 epochs' and training.run is None
    training.start(fake('quick'))
    assert training.wait(60)=='done: quickly'

def test_stopped_before_it_says_a_word(training):
    for arm in ('mute','slow','mute'):
        training.start(fake(arm))
        training.stop()
        assert training.stage=='stopped after 0 of 2 epochs'
    training.start(fake('quick'))
    assert training.wait(60)=='done: quickly'

def test_what_a_stopped_one_has_still_to_say_is_not_heard(training):
    training.start(fake('flood'))
    until(at_work(training))
    old = training._process
    training.stop()
    heard,stage = training.batches(fake('flood').id),training.stage
    training._hear(old, dict(batch=[9,9], stage='old', over=True))
    training._ended(old)
    assert training.batches(fake('flood').id)==heard and training.stage==stage
    training.start(fake('slow'))
    training._hear(old, dict(batch=[9,9], stage='old', over=True))
    training._ended(old)
    until(at_work(training))
    assert training.run==fake('slow') and training.batches(training.run.id)==[(0.5,2.), (1.,1.5)]

@pytest.mark.parametrize('arm,sentence', [('killed', 'failed: the process ended: Killed, as it is where memory runs out'),
    ('broken', 'failed: the process ended with code 1: no such thing'), ('half', 'failed: the process ended with code 3: ')])
def test_it_dies(training, arm, sentence):
    training.start(fake(arm))
    assert training.wait(60)==sentence and ('no such thing' in training.log)==(arm=='broken')
    training.start(fake('quick'))
    assert training.wait(60)=='done: quickly'

@pytest.mark.parametrize('noticed', [True, False])
def test_one_that_waits_dies(training, noticed):
    process = training._process.popen
    process.kill(), process.wait()
    if noticed: until(lambda: training._process is None)
    assert training.stage=='ready'
    training.start(fake('quick'))
    assert training.wait(60)=='done: quickly'

def test_none_can_be_started(tmp_path, monkeypatch):
    monkeypatch.setattr(live, '_CODE', 'raise ImportError("no torch here")')
    with Training(tmp_path) as training:
        for _ in range(2):
            training.start(fake('quick'))
            assert training.wait(60)=='failed: the process ended with code 1: ImportError: no torch here'

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
    until(lambda: gone(child))
    assert training.wait(60).startswith(dict(stop='stopped', killed='failed')[how])

def test_close(training):
    training.start(fake('slow'))
    until(at_work(training))
    pid = training._process.popen.pid
    training.close(), training.close(), training.stop()
    assert gone(pid) and training._process is None and training.wait(0)=='stopped after 1 of 2 epochs'
    with pytest.raises(ValueError, match='closed: make a new one'): training.start(fake('quick'))

def test_close_while_one_is_starting(tmp_path, monkeypatch):
    monkeypatch.setattr(live, '_CODE', 'import time; time.sleep(1000)')
    with Training(tmp_path) as training: pid = training._process.popen.pid
    assert gone(pid)

def test_whoever_is_told_may_do_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(live, '_CODE', FAKE)
    left,closed = [fake('quick'), fake('slow'), fake('quick', seed=1)],threading.Event()
    def changed():
        if training.run is None and left: training.start(left.pop(0))
        elif training.run is None: training.close(); closed.set()
        elif training.run.arm=='slow' and at_work(training)(): training.stop()
    training = Training(tmp_path, changed)
    training._news.set()
    assert closed.wait(60) and not left and training.stage=='done: quickly'

def test_whoever_is_told_may_be_wrong(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(live, '_CODE', FAKE)
    told = []
    def changed():
        told.append(training.stage)
        raise RuntimeError('the panel is broken')
    with Training(tmp_path, changed) as training:
        training.start(fake('quick'))
        assert training.wait(60)=='done: quickly'
        until(lambda: told[-1]=='done: quickly')
        training.start(fake('quick', seed=1))
        assert training.wait(60)=='done: quickly'
    assert capfd.readouterr().err.count('RuntimeError: the panel is broken')==1

def test_a_slow_panel_keeps_nobody_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(live, '_CODE', FAKE)
    go,told = threading.Event(),[]
    def changed(): told.append(go.wait(60))
    with Training(tmp_path, changed) as training:
        training.start(fake('quick'))
        training.wait(60)
        assert len(told)==0
        go.set()
        until(lambda: told)

def test_many_at_once(training):
    "Threads start, stop and kill as they please: nothing hangs, and nothing is left over"
    pids,errors = set(),[]
    def press(seed):
        rng = random.Random(seed)
        for _ in range(12):
            try:
                match rng.choice(('start','start','stop','kill','look')):
                    case 'start': training.start(fake(rng.choice(('quick','slow','flood','mute')), seed=rng.randrange(3)))
                    case 'stop': training.stop()
                    case 'kill': training._process and training._process.popen.kill()
                    case 'look': training.stage, training.run and training.epochs(training.run.id)
            except ValueError as e: errors.append(str(e))
            if process := training._process: pids.add(process.popen.pid)
            time.sleep(rng.uniform(0, 0.05))
    threads = [threading.Thread(target=press, args=(random.random(),)) for _ in range(3)]
    for o in threads: o.start()
    for o in threads: o.join(60)
    assert not any(o.is_alive() for o in threads) and all('is going on' in o for o in errors)
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
    for said in (dict(batch=[0.5,3]), dict(batch=[1.,2]), dict(epochs=[row]), dict(batch=[1.5,1])): training._hear(training._process, said)
    training.stop()
    assert training.batches(run.id)==[(0.5,3), (1.,2), (1.5,1)]
    training.start(run)
    training._hear(training._process, dict(epochs=[row]))
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
    write(runs/there[2].id, asdict(there[2]), 'epoch,train_loss,valid_loss,accuracy\n0,2.0,1.0,0.25\n', dict(last=0.25, test=None))
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
    assert training.epochs('unheard of').empty and training.result('unheard of') is None and training.batches('unheard of')==[]

def test_a_curve_from_before_is_there_while_it_starts(training):
    run = fake('mute')
    write(training.out/'runs'/run.id, asdict(run), 'epoch,train_loss,valid_loss,accuracy\n0,2.0,1.0,0.25\n')
    training.start(run)
    assert training.epochs(run.id).accuracy.tolist()==[0.25]
    training.stop()
    assert training.stage=='stopped after 1 of 2 epochs'

def test_broken_files_of_a_run_keep_it_from_starting(training):
    run = fake('quick')
    write(training.out/'runs'/run.id, asdict(run), '')
    with pytest.raises(ValueError, match='curve.csv: is not a table'): training.start(run)
    assert training.run is None and training.wait(0)=='ready'

def test_what_is_done_is_read(training):
    run = fake('broken')
    write(training.out/'runs'/run.id, asdict(run), None, dict(last=0.25, retention_target_bn=0.5))
    training.start(run)
    assert training.run is None and training.wait(0)=='done: accuracy 25.0 %, retention 50.0 %'

# The process itself

def test_ended_at_any_moment_it_goes_on(run, tmp_path, monkeypatch):
    "With processes that load pictures, which hold the lock of their run too, and a folder that has changed after the process was started"
    monkeypatch.setenv('OMP_NUM_THREADS', str(torch.get_num_threads()))
    with Training(tmp_path) as training:
        monkeypatch.chdir(Path(run.data).parent)
        run = replace(run, data=Path(run.data).name, num_workers=2, epochs=6)
        do_run(run, tmp_path/'whole', tmp_path/'sources', quiet=True)
        for n,how in enumerate(('killed','stopped')):
            training.start(run)
            until(lambda: len(training.epochs(run.id))>2*n or training.run is None)
            time.sleep(random.uniform(0, 0.3))
            training._process.popen.kill() if how=='killed' else training.stop()
            ended = training.wait(100)
            assert ended.startswith(dict(killed='failed: the process ended: Killed', stopped='stopped after')[how]), training.log
        training.start(run)
        assert training.wait(100).startswith('done: accuracy'), training.log
        assert training.epochs(run.id)[KEPT].notna().all(axis=None)
    same(tmp_path/'whole', tmp_path/'runs'/run.id)

KILLED = """
import json, sys, time
from fgvc_fisher.live import Training, Run
run = Run(**json.loads(sys.argv[1]))
busy = Training(sys.argv[2])
busy.start(run)
while not len(busy.epochs(run.id)) and busy.run: time.sleep(0.01)
young = Training(sys.argv[2])
print(busy.stage, busy._process.popen.pid, young._process.popen.pid, sep='|', flush=True)
time.sleep(1000)
"""
EXITS = """
import json, os, sys, time
from fgvc_fisher import live
live._CODE = sys.argv[3]
busy,idle = live.Training(sys.argv[2]),live.Training(sys.argv[2])
busy.start(live.Run(**json.loads(sys.argv[1])))
while not len(busy.batches(busy.run.id)): time.sleep(0.01)
print(busy.run.arm, busy._process.popen.pid, idle._process.popen.pid, sep='|', flush=True)
"""
PIPE = """
read,write = os.pipe()
say = live._speaker(write)
if not (forked := os.fork()): time.sleep(1000)
say(stage='a')
del say
print(os.read(read, 100), os.read(read, 100), flush=True)
os.kill(forked, 9)
"""
@pytest.mark.skipif(os.name!='posix', reason='signals and fork')
def test_nothing_outlives_its_parent(run, tmp_path):
    "Neither what trains, with those that load its pictures, nor what has just been started. A script that ends does not hang, a fork keeps no pipe open"
    run = replace(run, num_workers=2, epochs=10_000)
    def parent(code, run, *args):
        command = [sys.executable, '-c', code, json.dumps(asdict(run)), str(tmp_path), *args]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS='1'))
    with parent(KILLED, run) as killed, parent(EXITS+PIPE, fake('slow'), FAKE) as exits:
        said = [o.stdout.readline().strip().split('|') for o in (exits, killed)]
        killed.kill()
        assert exits.wait(100)==0 and exits.stdout.read()=="b'{\"stage\": \"a\"}\\n' b''\n"
    assert said[0][0]=='slow' and said[1][0].startswith('epoch')
    until(lambda: all(gone(int(o)) for _,*pids in said for o in pids))
    with FileLock(tmp_path/'runs'/run.id/'lock', timeout=30): pass
