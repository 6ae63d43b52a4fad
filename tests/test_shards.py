"Shards: exact however they are cut, done once whoever dies, and never added to another estimate"
import io, os, pickle, shutil, signal, sys, tarfile, time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
import numpy as np, pytest, torch
from filelock import FileLock
from fgvc_fisher.fisher import shards as on_shards
from fgvc_fisher.data import read_pictures
from fgvc_fisher.fisher import DiagFisher, estimate_fisher
from fgvc_fisher.fisher.estimate import draw_labels
from fgvc_fisher.cli import estimate_command
from fgvc_fisher.learner import source_dl
from fgvc_fisher.fisher import shard_batches, shard_fisher, stream_shards, tar_shards
from fgvc_fisher.fisher.shards import PartialSums, TarShard
from forks import Forked, shell
from tiny import network

def write_tar(path, pictures, labels=True, mode='w'):
    with tarfile.open(path, mode) as tar:
        for i,(data,label) in enumerate(pictures):
            for name,o in [(f'{i:04}.jpg', data)] + ([(f'{i:04}.cls', str(label).encode())] if labels else []):
                info = tarfile.TarInfo(name)
                info.size = len(o)
                tar.addfile(info, io.BytesIO(o))
    return str(path)

@pytest.fixture(scope='module')
def pictures(drawn_source):
    return [(Path(o.path).read_bytes(), o.label) for o in read_pictures(drawn_source).itertuples()]

@pytest.fixture(scope='module')
def tars(pictures, tmp_path_factory):
    "Sixteen tar files of two drawn pictures each"
    folder = tmp_path_factory.mktemp('tars')
    for i in range(16): write_tar(folder/f'drawn-{i:06}.tar', pictures[2*i:2*i+2])
    return folder

@pytest.fixture(scope='module')
def net(): return small()

def small(seed=0):
    layers = [torch.nn.Conv2d(3, 4, 5, stride=4), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(4*7*7, 4)]
    model = torch.nn.Sequential(*layers).double().eval()
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for o in model.parameters(): o.copy_(torch.randn(o.shape, generator=rng, dtype=o.dtype)/10)
    return model

def run(net, shards, out, **kw): return shard_fisher(net, shards, out, **dict(size=32, bs=2, quiet=True) | kw)
def one_estimate(net, shards, kind='sampled', **kw):
    return estimate_fisher(net, [b for o in shards for b in shard_batches(o, net, 32)], kind, progress=False, **kw)
def close(a, b, tol=1e-12):
    return a.n_images==b.n_images and all((a[k]-b[k]).norm() <= tol*b[k].norm() for k in b)
def files(folder):
    return sorted(o.name for o in Path(folder).iterdir() if o.suffix!='.lock' and o.name!='estimate.json')
def drawn(tars, n=16): return tar_shards(tars/f'drawn-{{000000..{n-1:06}}}.tar')
def times_read(tmp_path, n): return [len(o.read_text()) if (o := tmp_path/f'read{i}').exists() else 0 for i in range(n)]

@dataclass(frozen=True)
class Odd:
    "A shard with a habit: it fails so many times, or kills or keeps whoever reads it the first time"
    shard:TarShard
    log:str # A file that gets a letter each time that the shard is read
    fails:int=0
    kills:bool=False
    until:str='' # The first time, wait for this file
    def __str__(self): return str(self.shard)
    def __iter__(self):
        with open(self.log, 'a') as f: f.write('x')
        times = len(Path(self.log).read_text())
        if self.kills and times==1: os.kill(os.getpid(), signal.SIGKILL)
        while self.until and times==1 and not Path(self.until).exists(): time.sleep(0.02)
        if times<=self.fails: raise OSError('the cable is out')
        yield from self.shard

def odd(shards, tmp_path, habits=()):
    return [Odd(o, str(tmp_path/f'read{i}'), **dict(habits).get(i, {})) for i,o in enumerate(shards)]

# Exact

@pytest.mark.parametrize('n', [1,3,16])
def test_sum_over_shards_is_one_estimate(net, tars, tmp_path, n):
    parts,one = run(net, drawn(tars, n), tmp_path/'a', kind='exact'),one_estimate(net, drawn(tars, n), 'exact')
    assert close(parts, one) and torch.allclose(parts.moments, one.moments, rtol=1e-10)
    assert files(tmp_path/'a')==['sum-000.safetensors'] and 'shards' not in parts.provenance

def test_drawn_labels_depend_on_shard_and_place_alone(net, tars, tmp_path):
    shards = drawn(tars, 3)
    total = {k: torch.zeros_like(p) for k,p in net.named_parameters()}
    for s,shard in enumerate(shards):
        for i,(x,_) in enumerate(shard_batches(shard, net, 32, bs=1)):
            logits = net(x.as_subclass(torch.Tensor).double()).log_softmax(-1)
            label = draw_labels(logits.exp().detach(), (s<<32)+i, 7, 1)[0,0]
            for k,g in zip(total, torch.autograd.grad(logits[0,label], [*net.parameters()])): total[k] += g**2
    for bs in (1,2):
        fisher = run(net, shards, tmp_path/f'{bs}', seed=7, bs=bs)
        for k in total: assert (fisher.sums[k]-total[k]).norm() <= 1e-12*total[k].norm(), k
    assert not close(run(net, shards[::-1], tmp_path/'turned', seed=7), fisher, 1e-3)

def test_mass_left_is_a_mean(net, tars, tmp_path):
    shards = drawn(tars, 3)
    one,parts = one_estimate(net, shards, 'exact', mass=0.4),run(net, shards, tmp_path/'a', kind='exact', mass=0.4)
    left = [float(o.provenance.pop('mass_left')) for o in (parts,one)]
    assert left[0]==pytest.approx(left[1], rel=1e-9) and parts.provenance==one.provenance

@pytest.mark.parametrize('name', ['source_dl', 'stream'])
def test_pixels(drawn_source, tars, name):
    model,table = network(num_classes=4).eval(),read_pictures(drawn_source)
    if name=='source_dl': theirs = source_dl(table, model, 40, bs=2, num_workers=0)
    else:
        parts = stream_shards('webdataset', data_files=str(tars/'*.tar'))
        theirs = (b for o in parts for b in shard_batches(o, model, 40, bs=2))
    ours = [b for o in drawn(tars) for b in shard_batches(o, model, 40, bs=2, num_workers=3)]
    for (a,y),(b,z) in zip(ours, theirs, strict=True):
        assert torch.equal(a.cpu(), b.cpu()) and torch.equal(y.cpu(), torch.as_tensor(z).cpu())

# Failures

def test_a_shard_that_fails_once(net, tars, tmp_path, capsys):
    shards = drawn(tars, 3)
    assert close(run(net, odd(shards, tmp_path, {1: dict(fails=1)}), tmp_path/'a'), run(net, shards, tmp_path/'b'))
    assert times_read(tmp_path, 3)==[1,2,1]
    said = capsys.readouterr().out
    assert 'shard 1, ' in said and '1 of 3: OSError: the cable is out' in said

def test_a_shard_that_always_fails(net, tars, tmp_path):
    shards = drawn(tars, 4)
    shy = odd(shards, tmp_path, {2: dict(fails=4)})
    with pytest.raises(RuntimeError, match=r'1 of 4 shards .*shard 2, .*000002\.tar: OSError: the cable is out'):
        run(net, shy, tmp_path/'a', retries=3)
    assert files(tmp_path/'a')==['000002.error','sum-000.safetensors'] and times_read(tmp_path, 4)==[1,1,4,1]
    assert close(run(net, shy, tmp_path/'a'), run(net, shards, tmp_path/'b'))
    assert files(tmp_path/'a')==['sum-000.safetensors'] and times_read(tmp_path, 4)==[1,1,5,1]

def test_bad_tars(net, pictures, tars, tmp_path):
    good = Path(drawn(tars, 1)[0].urls[0]).read_bytes()
    second = good.index(b'0001.jpg')
    bad = {'cut in a picture': good[:second+900], 'cut between files': good[:second],
           'no end': good.rstrip(b'\0')+b'\0'*300, 'no header': good[:second]+b'#'+good[second+1:],
           'two archives': good+good, 'a page': b'<html>404</html>'*100, 'nothing': b''}
    for name,data in bad.items(): (tmp_path/f'{name}.tar').write_bytes(data)
    write_tar(tmp_path/'text.tar', [(b'this is no picture', 1)])
    with tarfile.open(tmp_path/'lonely.tar', 'w') as tar: tar.addfile(tarfile.TarInfo('0000.cls'))
    said = {'text': 'text.tar: 0000 ', 'lonely': 'lonely.tar: 0000 has 0 '} | {k: f'shard 0, .*{k}.tar' for k in bad}
    for name,text in said.items():
        shards = tar_shards(tmp_path/f'{name}.tar')
        with pytest.raises(RuntimeError, match=text): run(net, shards, tmp_path/name, retries=0)

BAD = {'empty': lambda data: b'', 'cut short': lambda data: data[:-200], 'text': lambda data: b'404 not found',
       'damaged': lambda data: bytes(40)+data[40:], 'zip': lambda data: b'PK\3\4'+bytes(99)}
@pytest.mark.parametrize('kind', BAD)
def test_a_picture_that_cannot_be_decoded(kind, net, pictures, tmp_path, capsys):
    "It stops the estimate, which can go on without it; the Fisher is that of the others"
    (data,label),out = pictures[1],tmp_path/'sums'
    rows = [pictures[:2], [(BAD[kind](data), label), pictures[2]], pictures[3:5]]
    shards = tar_shards([write_tar(tmp_path/f'{i}.tar', o) for i,o in enumerate(rows)])
    with pytest.raises(RuntimeError, match=r'1 of 3 shards.*1.tar: 0000 .*on_bad'): run(net, shards, out, retries=0)
    with pytest.warns(UserWarning, match=r'\b1 of 6\b.*1.tar: 0000$') as said:
        fisher = run(net, shards, out, kind='sampled', on_bad='skip', quiet=False)
    assert len(said)==1 and 'shard 1, ' in capsys.readouterr().out
    good = tar_shards(write_tar(tmp_path/'good.tar', [*rows[0], rows[1][1], *rows[2]]))
    assert fisher.n_images==5 and '1.tar: 0000' in fisher.provenance['skipped']
    assert set(files(out))=={'000001.skipped','sum-000.safetensors'}
    with pytest.warns(UserWarning, match='1 of 6'):
        exact = run(net, shards, tmp_path/'b', kind='exact', on_bad='skip', jobs=2)
    assert close(exact, run(net, good, tmp_path/'c', kind='exact'))
    with pytest.raises(ValueError, match=r'sums.*1.tar: 0000.*on_bad'): run(net, shards, out)

def test_shards_without_a_picture_that_can_be_decoded(net, pictures, tmp_path):
    names = [write_tar(tmp_path/'a.tar', [(b'', 0), (b'?', 1)]), write_tar(tmp_path/'b.tar', pictures[:2])]
    both,bad = tar_shards(names),tar_shards(names[0])
    for _ in range(2):
        with pytest.warns(UserWarning, match=r'2 of 4.*a.tar: 0000.*a.tar: 0001'):
            assert run(net, both, tmp_path/'both', on_bad='skip').n_images==2
    with pytest.raises(ValueError, match=r'2 cannot be decoded.*a.tar: 0000'):
        run(net, bad, tmp_path/'bad', on_bad='skip')
    for on_bad in ('ignore', '', None, True):
        with pytest.raises(ValueError, match=f'on_bad={on_bad!r}'): run(net, both, tmp_path/'no', on_bad=on_bad)
    assert not (tmp_path/'no').exists()

def test_nothing_to_skip(net, tars, tmp_path, recwarn):
    a,b = [run(net, drawn(tars, 3), tmp_path/on_bad, on_bad=on_bad) for on_bad in ('error','skip')]
    assert close(a, b, 0) and a.provenance==b.provenance and files(tmp_path/'error')==files(tmp_path/'skip')
    assert not [o for o in recwarn if o.category is UserWarning]

def test_compressed(net, pictures, tars, tmp_path):
    url = write_tar(tmp_path/'a.tar.gz', pictures[:2], mode='w:gz')
    assert list(TarShard((url,)))[1].data==pictures[1][0]
    Path(url).write_bytes(Path(url).read_bytes()[:-9])
    with pytest.raises((EOFError, tarfile.ReadError)): list(TarShard((url,)))

@pytest.mark.parametrize('link', [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_link_is_no_picture(link, net, pictures, tmp_path):
    "It would be left out in silence"
    write_tar(tmp_path/'a.tar', pictures[:2])
    with tarfile.open(tmp_path/'a.tar', 'a') as tar:
        info = tarfile.TarInfo('0002.jpg')
        info.type,info.linkname = link,'0000.jpg'
        tar.addfile(info)
    with pytest.raises(RuntimeError, match='a.tar: 0002.jpg is a link.*hard-dereference'):
        run(net, tar_shards(tmp_path/'a.tar'), tmp_path/'out', retries=0)

@pytest.mark.parametrize('name,mode', [('a.tar', 'w:gz'), ('a.tar.bz2', 'w:bz2'), ('a.tar.xz', 'w:xz')])
def test_compressed_in_another_way(name, mode, net, pictures, tmp_path):
    write_tar(tmp_path/name, pictures[:2], mode=mode)
    with pytest.raises(RuntimeError, match='not compressed as its name says'):
        run(net, tar_shards(tmp_path/name), tmp_path/'out', retries=0)

def test_gzip_in_capitals(net, pictures, tmp_path):
    write_tar(tmp_path/'A.TAR.GZ', pictures[:2], mode='w:gz')
    assert run(net, tar_shards(tmp_path/'A.TAR.GZ'), tmp_path/'out').n_images==2

def test_labels_that_are_not_needed(net, pictures, tmp_path):
    write_tar(tmp_path/'a.tar', [(data, 'airliner') for data,_ in pictures[:2]])
    assert run(net, tar_shards(tmp_path/'a.tar'), tmp_path/'sampled').n_images==2
    with pytest.raises(RuntimeError, match="0000: its label is no class number, but .*airliner"):
        run(net, tar_shards(tmp_path/'a.tar'), tmp_path/'empirical', kind='empirical', retries=0)

def test_empty_shards(net, pictures, tars, tmp_path):
    empty = TarShard((write_tar(tmp_path/'empty.tar', []),))
    shards = drawn(tars, 2)
    mixed = odd([empty,*shards,empty,empty], tmp_path)
    expected = run(net, shards, tmp_path/'b', kind='exact')
    for _ in range(2): assert close(run(net, mixed, tmp_path/'a', kind='exact'), expected)
    assert times_read(tmp_path, 5)==[1]*5
    with pytest.raises(ValueError, match='2 shards'): run(net, [empty,empty], tmp_path/'c')

def test_without_labels(net, pictures, tmp_path):
    shards = tar_shards(write_tar(tmp_path/'a.tar', pictures[:3], labels=False))
    assert run(net, shards, tmp_path/'a').n_images==3
    with pytest.raises(RuntimeError, match='no labels'): run(net, shards, tmp_path/'b', kind='empirical', retries=0)

# Interrupted

def wait_for(what, seconds=150):
    end = time.monotonic()+seconds
    while not what():
        assert time.monotonic()<end
        time.sleep(0.02)

def at_work(shards, out): run(small(), shards, out)

def test_one_of_two_processes_is_killed(net, tars, tmp_path):
    "The first one has done shard 0 and is killed at shard 1; the second one takes that over, and nothing is done twice"
    shards,out = drawn(tars, 6),tmp_path/'a'
    slow = odd(shards, tmp_path, {1: dict(until=str(tmp_path/'never'))})
    first = Forked(at_work, slow, out, threads=1)
    wait_for(lambda: times_read(tmp_path, 6)==[1,1,0,0,0,0])
    second = Forked(at_work, slow, out, threads=1)
    wait_for(lambda: times_read(tmp_path, 6)==[1]*6 and len(PartialSums(out).done())==5)
    assert second.poll() is None
    first.kill()
    assert second.wait()==0, second.err
    assert times_read(tmp_path, 6)==[1,2,1,1,1,1]
    assert close(run(net, slow, out), run(net, shards, tmp_path/'alone')) and times_read(tmp_path, 6)==[1,2,1,1,1,1]

class Cut(BaseException): "As sudden as a signal"

@pytest.mark.parametrize('moment', ['before it is written','before it is renamed','after it was renamed'])
def test_cut_while_a_sum_is_written(net, tars, tmp_path, monkeypatch, moment):
    shards,out = drawn(tars, 4),tmp_path/'a'
    logged = odd(shards, tmp_path)
    real,writes = os.replace,[]
    def replace(a, b):
        if not str(b).endswith('.safetensors'): return real(a, b)
        writes.append(b)
        if len(writes)==3 and moment=='before it is renamed': raise Cut
        real(a, b)
        if len(writes)==3 and moment=='after it was renamed': raise Cut
    def add(self, i, fisher, skipped, real=PartialSums.add):
        if i==2 and not writes[2:] and moment=='before it is written': raise Cut
        real(self, i, fisher, skipped)
    monkeypatch.setattr(os, 'replace', replace)
    monkeypatch.setattr(PartialSums, 'add', add)
    with pytest.raises(Cut): run(net, logged, out)
    monkeypatch.undo()
    assert close(run(net, logged, out), run(net, shards, tmp_path/'alone'))
    assert times_read(tmp_path, 4)==[1, 1, 1 if moment=='after it was renamed' else 2, 1]
    assert files(out)==['sum-000.safetensors']

def test_a_shard_that_somebody_else_is_at(net, tars, tmp_path, monkeypatch):
    "The last shard is locked, and arrives in another sum while we wait"
    shards,out = drawn(tars, 2),tmp_path/'a'
    out.mkdir()
    theirs = estimate_fisher(net, shard_batches(shards[1], net, 32), 'exact', progress=False)
    lock = FileLock(out/'000001.lock')
    lock.acquire()
    def meanwhile(_):
        with FileLock(out/'sum-000.lock'): PartialSums(out).add(1, theirs)
        lock.release()
    monkeypatch.setattr(on_shards.time, 'sleep', meanwhile)
    assert close(run(net, shards, out, kind='exact'), one_estimate(net, shards, 'exact'))
    assert files(out)==['sum-000.safetensors','sum-001.safetensors']

@pytest.mark.slow
def test_a_helper_is_killed(net, tars, tmp_path, capfd):
    "The first process waits at shard 0 until the helper is at shard 1, which kills it"
    shards = drawn(tars, 4)
    slow = odd(shards, tmp_path, {0: dict(until=str(tmp_path/'read1')), 1: dict(kills=True)})
    assert close(run(net, slow, tmp_path/'a', jobs=2), run(net, shards, tmp_path/'alone'))
    assert times_read(tmp_path, 4)==[1,2,1,1] and 'worker' in capfd.readouterr().out

# Ray

def test_a_task_of_ray(net, tars, tmp_path):
    shards,out = odd(drawn(tars, 2), tmp_path),tmp_path/'a'
    settings = dict(kind='sampled', n_samples=1, mass=1., seed=0)
    work = on_shards._Work(net, shards, out, settings, 32, 2, 1, 0, {}, True, 'error')
    with pytest.raises(FileNotFoundError, match=str(out)): on_shards._ray_shard(work, 0, False, 1)
    on_shards._check_folder(work)
    for _ in range(2): on_shards._ray_shard(work, 1, False, torch.get_num_threads())
    assert work.sums.done()=={1} and times_read(tmp_path, 2)==[0,1]
    assert close(run(net, shards, out), run(net, drawn(tars, 2), tmp_path/'b')) and times_read(tmp_path, 2)==[1,1]

@pytest.mark.slow
@pytest.mark.xdist_group('ray')
def test_ray_then_processes(net, tars, tmp_path, ray_cluster):
    "By Ray one shard kills its worker, one fails once, and one always; processes do that one"
    shards,out = drawn(tars, 5),tmp_path/'a'
    shy = odd(shards, tmp_path, {1: dict(fails=99), 2: dict(kills=True), 3: dict(fails=1)})
    with pytest.raises(RuntimeError, match='1 of 5 shards .*shard 1, .*000001.tar: OSError: the cable is out'):
        run(net, shy, out, engine='ray', address=ray_cluster.address, retries=1)
    assert times_read(tmp_path, 5)==[1,2,2,2,1] and files(out)==['000001.error','sum-000.safetensors']
    import ray
    assert not ray.is_initialized()
    assert close(run(net, shards, out), run(net, shards, tmp_path/'alone')) and times_read(tmp_path, 5)==[1,2,2,2,1]

class LocalRay:
    "Ray as far as it is used, in this process"
    def __init__(self): self.calls = []
    def is_initialized(self): return False
    def init(self, *args, **kw): self.calls.append((args, kw))
    def shutdown(self): self.calls.append('shutdown')
    def put(self, o): return o
    def remote(self, **options): return lambda f: SimpleNamespace(remote=f)
    def get(self, o): return o

def test_ray_on_this_machine(net, tars, tmp_path, monkeypatch):
    "Ray is started for the occasion, its workers find the modules that this process finds, and it is ended"
    ray,shards = LocalRay(),drawn(tars, 2)
    monkeypatch.setitem(sys.modules, 'ray', ray)
    monkeypatch.delenv('RAY_ADDRESS', raising=False)
    monkeypatch.syspath_prepend('/where/my/shards/are')
    by_ray = run(net, shards, tmp_path/'a', engine='ray', cpus=torch.get_num_threads())
    ((address,),options),end = ray.calls
    path = options['runtime_env']['env_vars']['PYTHONPATH']
    assert address=='local' and '/where/my/shards/are' in path.split(os.pathsep) and end=='shutdown'
    assert close(by_ray, run(net, shards, tmp_path/'b'))

def test_a_cluster_that_is_not_there(net, tars, tmp_path, monkeypatch):
    pytest.importorskip('ray')
    monkeypatch.delenv('RAY_ADDRESS', raising=False)
    with pytest.raises(ValueError, match="'nowhere'"):
        run(net, drawn(tars, 2), tmp_path/'a', engine='ray', address='nowhere')

# The folder

def test_a_damaged_sum_costs_its_own_shards(net, tars, tmp_path, capsys):
    shards,out = drawn(tars, 4),tmp_path/'a'
    expected = run(net, shards, tmp_path/'b')
    logged = odd(shards, tmp_path)
    out.mkdir()
    for i,shard in enumerate(shards):                            # shards 0 and 1 in one file, 2 and 3 in another
        fisher = estimate_fisher(net, shard_batches(shard, net, 32), image_offset=i<<32, progress=False)
        with FileLock(out/f'sum-00{1-i//2}.lock'): PartialSums(out).add(i, fisher)
    assert files(out)==['sum-000.safetensors','sum-001.safetensors']
    (out/'sum-000.safetensors').write_bytes((out/'sum-000.safetensors').read_bytes()[:-9])
    assert close(run(net, logged, out), expected) and times_read(tmp_path, 4)==[1,1,0,0]
    assert 'sum-000.safetensors is damaged' in capsys.readouterr().out

def test_what_is_no_number_is_found_in_the_end(net, tars, tmp_path, capsys):
    "The header is whole, so that all shards seem to be done"
    shards,out = drawn(tars, 2),tmp_path/'a'
    expected = run(net, shards, out)
    file = out/'sum-000.safetensors'
    file.write_bytes(file.read_bytes()[:-8]+b'\xff'*8)
    with pytest.raises(RuntimeError, match='2 of 2 shards'): run(net, shards, out)
    assert 'sum-000.safetensors' in capsys.readouterr().out
    assert close(run(net, shards, out), expected)

def test_nothing_counts_twice(net, tars, tmp_path):
    shards,out = drawn(tars, 3),tmp_path/'a'
    expected = run(net, shards, out)
    part = out/'sum-000.safetensors.0123456789ab.part'
    part.write_bytes(b'half')
    (out/'notes.safetensors').write_bytes(b'not ours')
    assert close(run(net, shards, out), expected) and not part.exists()
    shutil.copy(out/'sum-000.safetensors', out/'sum-001.safetensors')
    with pytest.raises(ValueError, match='shard 0 .*sum-000.* and .*sum-001'): run(net, shards, out)

def test_another_estimate(net, tars, tmp_path):
    shards,out = drawn(tars, 3),tmp_path/'a'
    run(net, shards, out)
    before = (out/'sum-000.safetensors').read_bytes()
    for differs,args in {'kind sampled, not exact': dict(kind='exact'), 'seed 0, not 3': dict(seed=3),
                         'n_samples 1, not 2': dict(n_samples=2), 'size 32, not 36': dict(size=36)}.items():
        with pytest.raises(ValueError, match=differs): run(net, shards, out, **args)
    with pytest.raises(ValueError, match='weights_sha256'): run(small(1), shards, out)
    with pytest.raises(ValueError, match='3 shards, not 2'): run(net, shards[:2], out)
    turned = [shards[0],shards[2],shards[1]]
    with pytest.raises(ValueError, match='shard 1 .*000001.tar.*000002.tar'): run(net, turned, out)
    (out/'estimate.json').write_text('{')
    with pytest.raises(ValueError, match='estimate.json'): run(net, shards, out)
    assert (out/'sum-000.safetensors').read_bytes()==before
    with pytest.raises(ValueError, match='estimate.json is a file'): run(net, shards, out/'estimate.json')

def test_other_files_in_a_merged_shard(net, tars, tmp_path):
    a,b,c = [str(shutil.copy(tars/f'drawn-{i:06}.tar', tmp_path/f'{i}.tar')) for i in range(3)]
    run(net, tar_shards([a,b], 1), tmp_path/'out')
    with pytest.raises(ValueError, match='1.tar.*not.*2.tar'): run(net, tar_shards([a,c], 1), tmp_path/'out')
    with open(b, 'ab') as f: f.write(bytes(10240))
    with pytest.raises(ValueError, match='1.tar'): run(net, tar_shards([a,b], 1), tmp_path/'out')

def test_batch_size_may_change(net, tars, tmp_path):
    run(net, drawn(tars, 2), tmp_path/'a', bs=1)
    assert run(net, drawn(tars, 2), tmp_path/'a', bs=2).n_images==4

# Invalid arguments

def test_invalid_arguments(net, tars, tmp_path, monkeypatch):
    shards = drawn(tars, 2)
    for said,kw in {'jobs=0': dict(jobs=0), 'jobs=True': dict(jobs=True), 'retries=-1': dict(retries=-1),
                    'bs=0': dict(bs=0), "'dask'": dict(engine='dask'), "'true'": dict(kind='true'),
                    'jobs=2': dict(engine='ray', jobs=2), 'address and gpus': dict(address='auto')}.items():
        with pytest.raises(ValueError, match=said): run(net, shards, tmp_path/'a', **kw)
    with pytest.raises(ValueError, match='no shards'): run(net, [], tmp_path/'a')
    with pytest.raises(ValueError, match='num_shards=3.* 2,'): tar_shards(tars/'drawn-{000000..000001}.tar', 3)
    with pytest.raises(FileNotFoundError, match='no-\\*.tar'): tar_shards(tars/'no-*.tar')
    with pytest.raises(ValueError, match='parquet, train, data_files=no.parquet'):
        stream_shards('parquet', data_files='no.parquet')
    with pytest.raises(ValueError, match="'png'"):
        stream_shards('webdataset', image='png', data_files=str(tars/'*.tar'))
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='torchrun'): run(net, shards, tmp_path/'a')
    assert not (tmp_path/'a').exists()

def test_what_is_no_list_of_shards(net, tars, tmp_path):
    shard, = drawn(tars, 1)
    for o in (str(tars/'drawn-000000.tar'), shard, [tars/'drawn-000000.tar'], shard.urls):
        with pytest.raises(ValueError, match='the list that tar_shards'): run(net, o, tmp_path/'a')
    with pytest.raises(ValueError, match='out is empty'): run(net, [shard], '')
    for size in (-3, '32', (32,32)):
        with pytest.raises(ValueError, match='size='): run(net, [shard], tmp_path/'a', size=size)
    with pytest.raises(ValueError, match='Flatten has no parameters'): run(torch.nn.Flatten(), [shard], tmp_path/'a')
    assert not (tmp_path/'a').exists()

def test_numbers_of_numpy(net, tars, tmp_path):
    kw = dict(seed=3, n_samples=2, bs=4, size=32)
    a,b = [run(net, drawn(tars, 2), tmp_path/'out', **{k: f(v) for k,v in kw.items()}) for f in (int, np.int64)]
    assert close(a, b)

def test_other_files_in_the_folder_stay(net, tars, tmp_path):
    "A finished Fisher, somebody's log and a file without a number are not ours"
    fisher = run(net, drawn(tars, 2), tmp_path)
    fisher.save(tmp_path/'sum-all.safetensors')
    for o in ('train.error', 'x.empty', '12.error'): (tmp_path/o).write_text('mine')
    assert close(run(net, drawn(tars, 2), tmp_path), fisher)
    assert close(DiagFisher.load(tmp_path/'sum-all.safetensors'), fisher)
    assert all((tmp_path/o).read_text()=='mine' for o in ('train.error', 'x.empty', '12.error'))

def test_what_cannot_be_sent(net, tars, tmp_path):
    class Local(torch.nn.Linear): pass
    model = torch.nn.Sequential(torch.nn.Flatten(), Local(3*32*32, 4))
    with pytest.raises(ValueError, match='jobs'): run(model, drawn(tars, 2), tmp_path/'a', jobs=2)
    assert run(model, drawn(tars, 2), tmp_path/'a').n_images==4
    Local.__module__ = '__main__'
    with pytest.raises(ValueError, match='Local'): run(model, drawn(tars, 2), tmp_path/'b', jobs=2)

# Where shards come from

def test_streams_of_other_kinds(drawn_source, tars, tmp_path):
    datasets = pytest.importorskip('datasets')
    samples = [(o.data,o.label) for o in drawn(tars, 1)[0]]
    rows = datasets.Dataset.from_list([dict(image=dict(bytes=data, path=None), label=label) for data,label in samples])
    rows.cast_column('image', datasets.Image()).to_parquet(tmp_path/'a.parquet')
    parquet = stream_shards('parquet', data_files=str(tmp_path/'a.parquet'))
    assert [(o.data,o.label) for o in pickle.loads(pickle.dumps(parquet))[0]]==samples
    folder = stream_shards('imagefolder', data_dir=str(drawn_source))
    pictures = sorted(o.read_bytes() for o in (drawn_source/'images').glob('train*'))
    assert sorted(o.data for s in folder for o in s)==pictures
    decoding = datasets.load_dataset('parquet', data_files=str(tmp_path/'a.parquet'), split='train', streaming=True)
    label = samples[0][1]
    some = decoding.cast_column('image', datasets.Image(decode=False)).filter(lambda o: o['label']==label)
    assert {o.label for o in stream_shards(some)[0]}=={label}
    with pytest.raises(ValueError, match=r'Image\(decode=False\)'):
        list(stream_shards(decoding.filter(lambda o: True))[0])

def test_another_stream_in_the_same_folder(net, drawn_source, tars, tmp_path):
    "Other files, columns or pictures, though of the same name; the same again is read from the folder, also after use"
    datasets = pytest.importorskip('datasets')
    data = [o.data for o in drawn(tars, 1)[0]]
    def write(name, rows):
        table = datasets.Dataset.from_list([dict(left=dict(bytes=o, path=None), right=dict(bytes=p, path=None))
                                            for o,p in rows])
        for o in ('left','right'): table = table.cast_column(o, datasets.Image())
        table.to_parquet(tmp_path/name)
        return dict(path='parquet', data_files=str(tmp_path/name), split='train', streaming=True)
    a = datasets.load_dataset(**(of_a := write('a.parquet', [data, data[::-1]])))
    b = datasets.load_dataset(**write('b.parquet', [data[:1]*2]))
    first = run(net, stream_shards(a), tmp_path/'out')
    for again in (a, datasets.load_dataset(**of_a)): assert close(run(net, stream_shards(again), tmp_path/'out'), first)
    others = [stream_shards(o) for o in (b, a.take(1))] + [stream_shards(a, image='right')]
    time.sleep(0.01)
    write('a.parquet', [data])
    others.append(stream_shards(datasets.load_dataset(**of_a)))
    for shards in others:
        with pytest.raises(ValueError, match='another estimate.*digest'): run(net, shards, tmp_path/'out')

def test_what_is_no_stream():
    datasets = pytest.importorskip('datasets')
    table = datasets.Dataset.from_dict(dict(a=[1]))
    for o in (table, datasets.IterableDatasetDict(train=table.to_iterable_dataset())):
        with pytest.raises(ValueError, match='to_iterable_dataset'): stream_shards(o)

def test_a_row_without_a_picture(net, drawn_source, tars, tmp_path):
    datasets = pytest.importorskip('datasets')
    images = [dict(bytes=o.data, path=None) for o in drawn(tars, 1)[0]]
    rows = datasets.Dataset.from_list([dict(image=o) for o in (images[0], None, dict(bytes=b'', path=None), images[1])])
    rows.cast_column('image', datasets.Image()).to_parquet(tmp_path/'a.parquet')
    shards = stream_shards('parquet', data_files=str(tmp_path/'a.parquet'))
    with pytest.raises(RuntimeError, match='picture 1 cannot be decoded'): run(net, shards, tmp_path/'a', retries=0)
    with pytest.warns(UserWarning, match='2 of 4 .*picture 1, .*picture 2'):
        assert run(net, shards, tmp_path/'a', on_bad='skip').n_images==2

class Server(BaseHTTPRequestHandler):
    folder = None
    def log_message(self, *args): pass
    def do_GET(self):
        file = self.folder/self.path[1:]
        self.send_response(200 if file.is_file() else 404)
        self.end_headers()
        if file.is_file(): self.wfile.write(file.read_bytes())

def test_from_a_server(net, tars, tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '*')
    Server.folder = tars
    server = ThreadingHTTPServer(('127.0.0.1', 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/drawn-{{000000..000001}}.tar'
    assert close(run(net, tar_shards(url), tmp_path/'a'), run(net, drawn(tars, 2), tmp_path/'b'))
    missing = tar_shards(url.replace('{000000..000001}', '9'))
    with pytest.raises(RuntimeError, match='drawn-9.tar'): run(net, missing, tmp_path/'c', retries=0)
    server.shutdown()

# The command

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    file = tmp_path_factory.mktemp('weights')/'weights.pth'
    torch.save(network(num_classes=4).state_dict(), file)
    return str(file)

def test_command(tars, weights, tmp_path):
    given = ['--arch', 'tiny:network', '--weights', weights, '--size', 32, '--device', 'cpu', '--out', tmp_path/'a']
    there = shell('fgvc-fisher', *given, '--shards', f'{tars}/drawn-{{000000..000003}}.tar')
    assert there.code==0, there.err
    assert 'shard 3, ' in there.out and 'DiagFisher(sampled, ' in there.out and '8 images' in there.out
    estimate_command('tiny:network', out=str(tmp_path/'b'), weights=weights, size=32, device='cpu',
                stream=f'webdataset:{tars}/drawn-00000[0-3].tar', num_shards=4, half=True)
    a,b = [DiagFisher.load(tmp_path/o) for o in 'ab']
    assert close(a, b, 1e-3) and a.provenance['images']=='drawn-{000000..000003}.tar'
    failed = shell('fgvc-fisher', *given, '--shards', f'{tars}/*.tar')
    assert failed.code==1 and '4 shards, not 16' in failed.err and 'Traceback' not in failed.err
    assert failed.err.strip().splitlines()[-1].startswith('fgvc-fisher: ')

def test_the_command_hands_its_options_on(tars, weights, tmp_path, monkeypatch):
    given = {}
    def record(model, shards, out, kind, n_samples, mass, seed, size, bs, **kw):
        given.update(kw, shards=len(shards), out=out, kind=kind, seed=seed, bs=bs)
        raise ValueError('that is enough')
    monkeypatch.setattr('fgvc_fisher.fisher.shards.shard_fisher', record)
    options = dict(jobs=2, engine='ray', address='auto', retries=5)
    with pytest.raises(ValueError, match='that is enough'):
        estimate_command('tiny:network', out=str(tmp_path/'a'), weights=weights, device='cpu', shards=f'{tars}/*.tar',
                    num_shards=4, kind='exact', seed=3, bs=7, **options)
    assert given.items()>=(options | dict(shards=4, out=f'{tmp_path}/a.shards', kind='exact', seed=3, bs=7)).items()

@pytest.mark.parametrize('said, options', {
    'no.tar': dict(shards='no.tar'), '--images, --shards and --stream': dict(shards='a', stream='b'),
    '--target-error': dict(shards='a', target_error=0.1), 'give one of --images': {}, "'slurm'": dict(engine='slurm'),
    'labels.csv': dict(images='.', kind='empirical'), 'retries=-1': dict(retries=-1),
    'no/such': dict(out='no/such/f', shards='a'),
    'num_shards=99': dict(num_shards=99)}.items())
def test_command_says_what_is_wrong(tars, weights, tmp_path, monkeypatch, said, options):
    monkeypatch.chdir(tmp_path)
    given = {} if said=='give one of --images' or {'shards','images'} & set(options) else dict(shards=f'{tars}/*.tar')
    options = dict(weights=weights, device='cpu') | given | options
    with pytest.raises((ValueError,OSError), match=said): estimate_command('tiny:network', **options)
