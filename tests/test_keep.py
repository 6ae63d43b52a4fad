"Results that outlast the disk they were made on: a Drive with a bin, that fills up, goes away, and loses bytes"
import errno, os, random, shutil, time
from dataclasses import replace
from pathlib import Path
import pytest
from fastai.callback.core import Callback
from filelock import FileLock
from fgvc_fisher.distributed.files import copy_file, settle_copies
from fgvc_fisher.experiment import do_run, kept, space_needed, sweep
from fgvc_fisher.experiment import keep as module
from fgvc_fisher.experiment.run import KeepEpochs
from forks import Forked
from test_runs import same

class Drive:
    "A folder; `bin` is the bytes that were removed or replaced with their content"
    def __init__(self, folder, monkeypatch):
        self.folder,self.bin,self.largest = folder,0,0
        for name in ('unlink','remove'):
            def removes(path, *args, real=getattr(os, name), **kwargs):
                self.count(path)
                return real(path, *args, **kwargs)
            monkeypatch.setattr(os, name, removes)
        for name in ('replace','rename'):
            def replaces(a, b, *args, real=getattr(os, name), **kwargs):
                self.count(b)
                return real(a, b, *args, **kwargs)
            monkeypatch.setattr(os, name, replaces)
    def count(self, path):
        path = Path(path)
        if self.folder in path.parents and path.exists(): self.bin += path.stat().st_size
        self.largest = max(self.largest, self.size())
    def size(self):
        "Another thread may just have removed a file; an error about it would pass for one about the caller's own file"
        def bytes_of(path):
            try: return path.stat().st_size if path.is_file() else 0
            except FileNotFoundError: return 0
        return sum(bytes_of(o) for o in self.folder.rglob('*'))
    def names(self): return sorted(o.relative_to(self.folder).as_posix() for o in self.folder.rglob('*') if o.is_file())

@pytest.fixture
def drive(tmp_path, monkeypatch): return Drive(tmp_path/'drive', monkeypatch)

@pytest.fixture
def run(tiny_run): return tiny_run

class Stop(Callback):
    "Interrupt a training after an epoch, or do something there"
    order = KeepEpochs.order+1
    def __init__(self, epoch, does): self.at,self.does = epoch,does
    def after_epoch(self):
        if self.epoch==self.at: self.does()

class Trained(Callback):
    "Which epochs were trained"
    def __init__(self): self.epochs = []
    def after_train(self): self.epochs.append(self.epoch)

def interrupt(): raise KeyboardInterrupt
def do_kept(run, out, drive, cbs=(), **kwargs):
    with kept(out, drive.folder, [run], **kwargs):
        return do_run(run, out/'runs'/run.id, out/'sources', cbs, quiet=True)
def contents(folder): return {o.relative_to(folder): o.read_bytes() for o in folder.rglob('*') if o.is_file()}

@pytest.mark.parametrize('epoch', [0, 2])
def test_a_session_ends_with_its_disk(run, tiny_done, drive, tmp_path, epoch):
    "What was interrupted resumes from the copy and ends as if nothing had happened; the bin stays empty"
    with pytest.raises(KeyboardInterrupt): do_kept(run, tmp_path/'out', drive, [Stop(epoch, interrupt)])
    assert f'runs/{run.id}/checkpoint.pt' in drive.names()
    shutil.rmtree(tmp_path/'out')
    trained = Trained()
    do_kept(run, tmp_path/'out', drive, [trained])
    same(tiny_done, tmp_path/'out/runs'/run.id)
    assert trained.epochs==[*range(epoch+1, 3)] and drive.bin==0
    kept_files = ['curve.csv','data.json','model.safetensors','result.json','run.json']
    assert [o for o in drive.names() if o.startswith('runs')]==[f'runs/{run.id}/{o}' for o in kept_files]
    for path,content in contents(tmp_path/'out').items():
        if 'lock' not in path.name: assert (drive.folder/path).read_bytes()==content

def test_the_last_copy_counts_when_a_session_dies(run, tiny_done, drive, tmp_path):
    "A copy is made while the training goes on; what came later is done again"
    def dies():
        "The drive as it is now; a copy that comes meanwhile may rename a file, so try again then"
        for _ in range(100):
            try: return shutil.copytree(drive.folder, tmp_path/'left')
            except (shutil.Error, FileNotFoundError): shutil.rmtree(tmp_path/'left')
        pytest.fail('the drive never came to rest')
    def waits():
        for _ in range(600):
            if f'runs/{run.id}/checkpoint.pt' in drive.names(): return dies()
            time.sleep(0.05)
        pytest.fail(f'no copy came: {drive.names()}')
    do_kept(run, tmp_path/'out', drive, [Stop(1, waits)], every=0.1)
    shutil.rmtree(tmp_path/'out')
    shutil.rmtree(drive.folder)
    (tmp_path/'left').rename(drive.folder)
    drive.bin = 0
    trained = Trained()
    do_kept(run, tmp_path/'out', drive, [trained])
    same(tiny_done, tmp_path/'out/runs'/run.id)
    assert trained.epochs and 0 not in trained.epochs and drive.bin==0

def keep_sweep(runs, out, drive, jobs=1):
    with kept(out, drive, runs, jobs, every=0.1): sweep(runs, out, jobs, quiet=True)

def test_killed_at_any_moment_with_its_disk(run, tiny_done, tmp_path):
    "Also while it copies"
    drive = tmp_path/'drive'
    for i in range(4):
        process = Forked(keep_sweep, [run], tmp_path/f'{i}/out', drive)
        end = time.monotonic()+60
        while process.poll() is None and time.monotonic()<end and i<3:
            if (tmp_path/f'{i}/out/runs'/run.id/'checkpoint.pt').exists(): break
            time.sleep(0.01)
        if i<3:
            time.sleep(random.uniform(0, 0.4))
            process.kill()
    assert process.wait()==0, process.err
    same(tiny_done, tmp_path/'3/out/runs'/run.id)
    same(tiny_done, drive/'runs'/run.id)
    assert not [*drive.rglob('*.copying'), *drive.rglob('*.before')]

def test_two_jobs_do_what_one_process_does_and_are_kept(run, tmp_path, capsys):
    "And each run has its line, whichever process has done it, and whatever this one was doing when it ended"
    runs = [replace(run, seed=o, epochs=1) for o in (1,2,3)]
    rows = sweep(runs, tmp_path/'out', 2, keep=tmp_path/'drive')
    assert rows.id.tolist()==[o.id for o in runs] and rows['last'].notna().all()
    said = capsys.readouterr().out
    for o in runs: assert said.count(f'{o.arm}, seed {o.seed}: ')==1
    shutil.rmtree(tmp_path/'out')
    assert sweep(runs, tmp_path/'out', quiet=True, keep=tmp_path/'drive').equals(rows)

def test_a_checkpoint_is_kept_at_most_every_so_often(run, drive, tmp_path, monkeypatch):
    copied = []
    def copies(source, path, *args):
        copied.append(path.name)
        return copy_file(source, path, *args)
    monkeypatch.setattr(module, 'copy_file', copies)
    do_kept(run, tmp_path/'out', drive, every=600)
    assert 'checkpoint.pt' not in copied and copied.count('model.safetensors')==1 and copied[-1]=='result.json'
    copied.clear()
    do_kept(run, tmp_path/'out', drive)
    assert not copied                                                     # everything is there already

def test_a_sweep_is_kept(run, drive, tmp_path, capsys):
    runs = [replace(run, epochs=1, seed=o) for o in (1,2)]
    rows = sweep(runs, tmp_path/'out', quiet=True, keep=drive.folder)
    assert 'MB at the end' in capsys.readouterr().out
    shutil.rmtree(tmp_path/'out')
    again = sweep(runs, tmp_path/'out', quiet=True, keep=str(drive.folder))
    assert again.equals(rows) and '2 of them done before' in capsys.readouterr().out

def test_what_fails_is_kept_and_tried_again(run, drive, tmp_path):
    bad = replace(run, arm='bad', weights=str(tmp_path/'missing.safetensors'), epochs=1)
    sweep([bad], tmp_path/'out', quiet=True, keep=drive.folder)
    assert f'runs/{bad.id}/error.txt' in drive.names()
    shutil.copy(run.weights, bad.weights)
    shutil.rmtree(tmp_path/'out')
    assert len(sweep([bad], tmp_path/'out', quiet=True, keep=drive.folder))==0
    assert len(sweep([bad], tmp_path/'out', quiet=True, keep=drive.folder, retry=True))==1
    assert f'runs/{bad.id}/error.txt' not in drive.names() and drive.bin==0

def test_a_checkpoint_is_copied_with_its_weights(tmp_path, monkeypatch):
    "A new checkpoint comes, and the weights of the epoch that was the best go, while the files are opened"
    folder = tmp_path/'runs/a'
    folder.mkdir(parents=True)
    for name in ('checkpoint.pt','epoch-0.safetensors'): (folder/name).write_bytes(b'0')
    later = iter([1])
    def names(root, folder, real=module._names):
        found = real(root, folder)
        for epoch in later:
            (root/folder/f'epoch-{epoch}.safetensors').write_bytes(b'1')
            (root/folder/'new').write_bytes(b'1')
            os.replace(root/folder/'new', root/folder/'checkpoint.pt')
            (root/folder/'epoch-0.safetensors').unlink()
        return found
    monkeypatch.setattr(module, '_names', names)
    with module._opened(tmp_path, Path('runs/a')) as files: found = {k: f.read() for k,f in files.items()}
    assert found=={'epoch-1.safetensors': b'1', 'checkpoint.pt': b'1'}

# A Drive that does not do what it should

def fails(monkeypatch, number, name):
    "Writing a copy of a file with this in its name fails in the middle"
    real = open
    def opens(file, mode='r', *args, **kwargs):
        f = real(file, mode, *args, **kwargs)
        if mode=='wb' and name in str(file) and str(file).endswith('.copying'):
            f.write(b'half')
            f.flush()
            def write(data): raise OSError(number, os.strerror(number))
            f.close()
            class Full:
                def __enter__(self): return self
                def __exit__(self, *args): return None
                def write(self, data): raise OSError(number, os.strerror(number))
            return Full()
        return f
    monkeypatch.setattr('builtins.open', opens)

def test_a_copy_that_fails_is_an_error_and_nothing_is_lost(run, tiny_done, drive, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fails(patch, errno.EROFS, 'model.safetensors')
        with pytest.raises(OSError, match='model.safetensors') as e: do_kept(run, tmp_path/'out', drive)
    assert e.value.errno==errno.EROFS and str(tmp_path/'out') in str(e.value)
    assert f'runs/{run.id}/result.json' not in drive.names() and not [o for o in drive.names() if 'copying' in o]
    same(tiny_done, tmp_path/'out/runs'/run.id)
    do_kept(run, tmp_path/'out', drive)                                   # it has room again
    assert f'runs/{run.id}/result.json' in drive.names() and drive.bin==0

def test_a_problem_is_printed_once_while_training_continues(run, drive, tmp_path, monkeypatch, capsys):
    said = []
    def waits():
        for _ in range(600):
            if len(said)>2: return
            time.sleep(0.05)
    def raises(*args):
        said.append(args)
        raise OSError(errno.ENOSPC, 'full')
    with monkeypatch.context() as patch:
        patch.setattr(module, 'copy_file', raises)
        with pytest.raises(OSError, match='NOT KEPT'): do_kept(run, tmp_path/'out', drive, [Stop(1, waits)], every=0.1)
    assert len(said)>2 and capsys.readouterr().out.count('NOT KEPT')==1
    assert (tmp_path/'out/runs'/run.id/'result.json').exists()

def test_a_drive_that_goes_away(run, drive, tmp_path):
    "Nothing is written where it was mounted"
    with pytest.raises(OSError, match='is gone'):
        do_kept(run, tmp_path/'out', drive, [Stop(0, lambda: drive.folder.rename(tmp_path/'elsewhere'))])
    assert not drive.folder.exists() and (tmp_path/'out/runs'/run.id/'result.json').exists()

@pytest.mark.parametrize('name,content', [('checkpoint.pt', b'half'), ('epoch', None), ('run.json', b'')])
def test_what_arrived_in_part_is_not_used(run, tiny_done, drive, tmp_path, name, content, capsys):
    with pytest.raises(KeyboardInterrupt): do_kept(run, tmp_path/'out', drive, [Stop(1, interrupt)])
    file, = [o for o in (drive.folder/'runs'/run.id).iterdir() if o.name.startswith(name)]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1]+bytes([whole[-1]^1]) if content is None else content)     # None: one bit differs
    shutil.rmtree(tmp_path/'out')
    do_kept(run, tmp_path/'out', drive)
    assert f'{file} is damaged' in capsys.readouterr().out
    same(tiny_done, tmp_path/'out/runs'/run.id)

class Cut(BaseException): "The session ends here"

@pytest.mark.parametrize('n', range(8))
def test_cut_off_between_any_two_steps(tmp_path, monkeypatch, n):
    "Of a file that is replaced, one of both whole contents is there"
    folder = tmp_path/'drive'
    folder.mkdir()
    (folder/'a').write_bytes(b'old')
    (tmp_path/'a').write_bytes(b'new')
    steps = iter(range(n))
    def step(real):
        def does(*args, **kwargs):
            if next(steps, None) is None: raise Cut
            return real(*args, **kwargs)
        return does
    with monkeypatch.context() as patch, open(tmp_path/'a', 'rb') as f:
        for name in ('replace','truncate','unlink','fsync'): patch.setattr(os, name, step(getattr(os, name)))
        try: copy_file(f, folder/'a')
        except Cut: pass
    settle_copies(folder)
    assert [o.name for o in folder.iterdir()]==['a'] and (folder/'a').read_bytes() in (b'old', b'new')
    if n>5: assert (folder/'a').read_bytes()==b'new'

def test_a_copy_that_differs_is_noticed(tmp_path, monkeypatch):
    (tmp_path/'a').write_bytes(b'new')
    (tmp_path/'b').write_bytes(b'old')
    monkeypatch.setattr(os, 'fsync', lambda f: os.pwrite(f, b'?', 0))
    with open(tmp_path/'a', 'rb') as f, pytest.raises(OSError, match='b .*differs'): copy_file(f, tmp_path/'b')
    assert (tmp_path/'b').read_bytes()==b'old' and len(list(tmp_path.iterdir()))==2

# What is refused before anything begins, and what belongs to others

@pytest.mark.parametrize('keep,named', [('OUT', 'separate'), ('OUT/kept', 'separate'), ('.', 'separate'), (3, '3'),
    ('s3://bucket/folder', 's3:/'), ('missing/drive', 'missing'), ('file', 'is a file'), (True, 'True')])
def test_a_folder_that_cannot_be_used_is_refused(run, tmp_path, monkeypatch, keep, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'file').write_text('')
    with pytest.raises((ValueError,OSError), match=named): sweep([run], 'OUT', keep=keep)
    assert [o.name for o in tmp_path.iterdir()]==['file']

def test_too_little_space_is_refused(run, drive, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda folder: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match='1 MB are free') as e: sweep([run], tmp_path/'out', keep=drive.folder)
    assert e.value.errno==errno.ENOSPC and not (tmp_path/'out').exists() and not drive.folder.exists()

def test_a_folder_that_cannot_be_written_is_refused(run, drive, tmp_path, monkeypatch):
    def mkdir(self, *args, **kwargs): raise OSError(errno.EROFS, 'Read-only file system')
    with monkeypatch.context() as patch:
        patch.setattr(Path, 'mkdir', mkdir)
        with pytest.raises(OSError, match='drive.*Read-only'): sweep([run], tmp_path/'out', keep=drive.folder)
    assert not (tmp_path/'out').exists()

def test_it_takes_no_more_than_was_said(run, drive, tmp_path):
    runs = [replace(run, arch='test_resnet', weights=False, seed=o) for o in (1,2)]
    remains,most = space_needed(runs)
    for o in runs: do_kept(o, tmp_path/'out', drive, every=0.1)
    assert 0.5*remains<drive.size()<1.1*remains+1e5 and drive.largest<=most+1e5
    assert space_needed(runs, drive.folder)==(0, 0)

def test_files_of_others_stay_as_they_are(run, drive, tmp_path):
    "In the same folder of the Drive"
    drive.folder.mkdir()
    others = {'big.safetensors': b'x', 'thesis.before': b'x', 'film.copying': b'x', 'film.part': b'x', 'runs.txt': b'x'}
    for name,content in others.items(): (drive.folder/name).write_bytes(content)
    do_kept(replace(run, epochs=1), tmp_path/'out', drive)
    assert {o: (drive.folder/o).read_bytes() for o in others}==others
    assert not (tmp_path/'out/big.safetensors').exists()

def test_few_files(run, drive, tmp_path):
    "Pictures, locks and smaller copies stay where they are"
    (tmp_path/'out/aircraft/images').mkdir(parents=True)
    for i in range(50): (tmp_path/f'out/aircraft/images/{i}.jpg').write_bytes(b'x')
    (tmp_path/'out/source.safetensors').write_bytes(b'weights')
    do_kept(replace(run, epochs=1), tmp_path/'out', drive)
    assert len(drive.names())==5+2+1+1, drive.names()                 # a run, two of its source, weights, SHA256SUMS
    shutil.rmtree(tmp_path/'out')
    with kept(tmp_path/'out', drive.folder): assert (tmp_path/'out/source.safetensors').read_bytes()==b'weights'

def test_the_folder_of_a_single_run(run, tiny_done, drive, tmp_path):
    with pytest.raises(KeyboardInterrupt), kept(tmp_path/'out', drive.folder):
        do_run(run, tmp_path/'out', cbs=[Stop(1, interrupt)], quiet=True)
    shutil.rmtree(tmp_path/'out')
    with kept(tmp_path/'out', drive.folder): do_run(run, tmp_path/'out', quiet=True)
    same(tiny_done, tmp_path/'out')
    assert 'result.json' in drive.names() and 'checkpoint.pt' not in drive.names() and drive.bin==0

def test_a_run_of_another_process_is_left_alone(run, drive, tmp_path):
    with pytest.raises(KeyboardInterrupt): do_kept(run, tmp_path/'out', drive, [Stop(0, interrupt)])
    shutil.rmtree(tmp_path/'out')
    (tmp_path/'out/runs'/run.id).mkdir(parents=True)
    with FileLock(tmp_path/'out/runs'/run.id/'lock'), kept(tmp_path/'out', drive.folder): pass
    assert [o.name for o in (tmp_path/'out/runs'/run.id).iterdir()]==['lock']
    assert f'runs/{run.id}/checkpoint.pt' in drive.names()

def test_a_folder_of_an_earlier_version_is_resumed(run, tiny_done, drive, tmp_path):
    "Where a session worked on the Drive itself"
    with pytest.raises(KeyboardInterrupt):
        do_run(run, drive.folder/'runs'/run.id, drive.folder/'sources', [Stop(1, interrupt)], quiet=True)
    do_kept(run, tmp_path/'out', drive)
    same(tiny_done, tmp_path/'out/runs'/run.id)

def test_one_that_has_come_further_wins(run, drive, tmp_path):
    "A run that was interrupted here, and finished elsewhere"
    with pytest.raises(KeyboardInterrupt): do_kept(run, tmp_path/'out', drive, [Stop(0, interrupt)])
    do_kept(run, tmp_path/'elsewhere', drive)
    rows = sweep([run], tmp_path/'out', quiet=True, keep=drive.folder)
    same(tmp_path/'elsewhere/runs'/run.id, tmp_path/'out/runs'/run.id)
    assert len(rows)==1 and not (tmp_path/'out/runs'/run.id/'checkpoint.pt').exists()

def test_a_network_that_cannot_be_made_takes_no_room(run):
    "Its run fails, and says why; the others are done"
    assert space_needed([run, replace(run, arch='nonexist')], jobs=1)[0]==space_needed([run])[0]
