"Shards: exact however they are cut, done once whoever dies, and nobody else's"
import io, os, pickle, signal, subprocess, sys, tarfile, time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
import pytest, timm, torch
from filelock import FileLock
from fgvc_fisher import shards as S
from fgvc_fisher.data import read_pictures
from fgvc_fisher.fisher import DiagFisher, estimate_fisher, _draw
from fgvc_fisher.hub import fgvc_fisher
from fgvc_fisher.learner import source_dl
from fgvc_fisher.shards import TarShard, shard_batches, shard_fisher, stream_shards, tar_shards

BIN = Path(sys.executable).parent

def write_tar(path, pictures, labels=True, mode='w'):
    with tarfile.open(path, mode) as tar:
        for i,(data,label) in enumerate(pictures):
            for name,o in [(f'{i:04}.jpg', data)] + ([(f'{i:04}.cls', str(label).encode())] if labels else []):
                (info := tarfile.TarInfo(name)).size = len(o)
                tar.addfile(info, io.BytesIO(o))
    return str(path)

@pytest.fixture(scope='module')
def pictures(drawn_source): return [(Path(o.path).read_bytes(), o.label) for o in read_pictures(drawn_source).itertuples()]

@pytest.fixture(scope='module')
def tars(pictures, tmp_path_factory):
    "Sixteen tar files of two drawn pictures each"
    folder = tmp_path_factory.mktemp('tars')
    for i in range(16): write_tar(folder/f'drawn-{i:06}.tar', pictures[2*i:2*i+2])
    return folder

@pytest.fixture(scope='module')
def net(): return small()

def small(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 5, stride=4), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(4*7*7, 4)).double().eval()

def run(net, shards, out, **kw): return shard_fisher(net, shards, out, **dict(size=32, bs=2, quiet=True) | kw)
def same(a, b): return a.n_images==b.n_images and all(torch.equal(a.sums[k], b.sums[k]) for k in b) and torch.equal(a.moments, b.moments)
def close(a, b, tol=1e-12): return a.n_images==b.n_images and all((a[k]-b[k]).norm() <= tol*b[k].norm() for k in b)
def files(folder): return sorted(o.name for o in Path(folder).iterdir() if o.suffix!='.lock' and o.name!='estimate.json')
def drawn(tars, n=16): return tar_shards(tars/f'drawn-{{000000..{n-1:06}}}.tar')

@dataclass(frozen=True)
class Odd:
    "A shard with a habit: it fails so many times, or kills or keeps whoever reads it the first time"
    shard:TarShard
    log:str # A file that gets a letter each time that it is read
    fails:int=0
    kills:bool=False
    until:str='' # The first time, wait for this file
    def __str__(self): return str(self.shard)
    def __iter__(self):
        with open(self.log, 'a') as f: f.write('x')
        times = len(Path(self.log).read_text())
        if self.kills and times==1: os.kill(os.getpid(), signal.SIGKILL)
        while self.until and times==1 and not Path(self.until).exists(): time.sleep(0.1)
        if times<=self.fails: raise OSError('the cable is out')
        yield from self.shard

# Exact

@pytest.mark.parametrize('n', [1,2,3,5,16])
def test_sum_over_shards_is_one_estimate(net, tars, tmp_path, n):
    shards = drawn(tars, n)
    parts = run(net, shards, tmp_path/'a', kind='exact')
    whole = estimate_fisher(net, [b for o in shards for b in shard_batches(o, net, 32)], 'exact', progress=False)
    assert close(parts, whole) and torch.allclose(parts.moments, whole.moments, rtol=1e-10)
    assert files(tmp_path/'a')==[f'000000-{n-1:06}.safetensors']

def test_drawn_labels_depend_on_shard_and_place_alone(net, tars, tmp_path):
    shards = drawn(tars, 3)
    total = {k: torch.zeros_like(p) for k,p in net.named_parameters()}
    for s,shard in enumerate(shards):
        for i,(x,_) in enumerate(b for b in shard_batches(shard, net, 32, bs=1)):
            logits = net(x.as_subclass(torch.Tensor).double()).log_softmax(-1)
            label = _draw(logits.exp().detach(), (s<<32)+i, 7, 1)[0,0]
            for k,g in zip(total, torch.autograd.grad(logits[0,label], [*net.parameters()])): total[k] += g**2
    for out,kw in (('one', dict(bs=1)), ('two', dict(jobs=2))):
        fisher = run(net, shards, tmp_path/out, seed=7, **kw)
        for k in total: assert (fisher.sums[k]-total[k]).norm() <= 1e-12*total[k].norm(), k
    assert not close(run(net, shards[::-1], tmp_path/'turned', seed=7), fisher, 1e-3)

def test_mass_left_is_a_mean(net, tars, tmp_path):
    shards = drawn(tars, 3)
    whole = estimate_fisher(net, [b for o in shards for b in shard_batches(o, net, 32)], 'exact', mass=0.4, progress=False)
    parts = run(net, shards, tmp_path/'a', kind='exact', mass=0.4)
    assert float(parts.provenance['mass_left'])==pytest.approx(float(whole.provenance['mass_left']), rel=1e-9)
    assert {k: v for k,v in parts.provenance.items() if k!='mass_left'}=={k: v for k,v in whole.provenance.items() if k!='mass_left'}

@pytest.mark.parametrize('name', ['source_dl', 'stream'])
def test_pixels(drawn_source, tars, name):
    model,table = timm.create_model('test_resnet', num_classes=4).eval(),read_pictures(drawn_source)
    if name=='source_dl': theirs = source_dl(table, model, 40, bs=2, num_workers=0)
    else: theirs = (b for o in stream_shards('webdataset', data_files=str(tars/'*.tar')) for b in shard_batches(o, model, 40, bs=2))
    ours = [b for o in drawn(tars) for b in shard_batches(o, model, 40, bs=2, num_workers=3)]
    for (a,y),(b,z) in zip(ours, theirs, strict=True): assert torch.equal(a.cpu(), b.cpu()) and torch.equal(y.cpu(), torch.as_tensor(z).cpu())

# Engines

def test_ray_then_processes_to_the_bit(net, tars, tmp_path):
    "By Ray one shard fails once and another always; processes do that one, and all is as if they had done everything"
    ray = pytest.importorskip('ray')
    shards,a = drawn(tars, 5),tmp_path/'a'
    odd = [Odd(o, str(tmp_path/f'log{i}'), fails={1:99, 2:1}.get(i, 0)) for i,o in enumerate(shards)]
    with pytest.raises(RuntimeError, match='1 of 5 shards failed; shard 1, .*000001.tar: OSError: the cable is out'): run(net, odd, a, engine='ray', retries=1)
    assert [(tmp_path/f'log{i}').read_text() for i in range(5)]==['x','xx','xx','x','x'] and not ray.is_initialized()
    assert files(a)==['000000-000000.safetensors','000001-000001.error','000002-000003.safetensors','000004-000004.safetensors']
    threads = torch.get_num_threads()
    torch.set_num_threads(1)                                           # as many as a task of Ray's has
    try: assert same(run(net, shards, a), run(net, shards, tmp_path/'b')) and files(a)==['000000-000004.safetensors']
    finally: torch.set_num_threads(threads)

def test_a_sum_that_somebody_else_is_about_to_make(net, tars, tmp_path, monkeypatch):
    "Another process has done the last shard, and is not yet at adding it up"
    shards = drawn(tars, 2)
    theirs = estimate_fisher(net, shard_batches(shards[1], net, 32), 'exact', progress=False)
    (tmp_path/'a').mkdir()
    lock = FileLock(S._file(tmp_path/'a', (1,2), '.lock'))
    lock.acquire()
    def meanwhile(_):
        S._save(tmp_path/'a', (1,2), theirs)
        lock.release()
    monkeypatch.setattr(S.time, 'sleep', meanwhile)
    assert same(run(net, shards, tmp_path/'a', kind='exact'), run(net, shards, tmp_path/'b', kind='exact'))

# Failures

def test_a_shard_that_fails_once(net, tars, tmp_path, capsys):
    shards = drawn(tars, 3)
    odd = Odd(shards[1], str(tmp_path/'log'), fails=1)
    fisher = run(net, [shards[0],odd,shards[2]], tmp_path/'a')
    assert same(fisher, run(net, shards, tmp_path/'b')) and (tmp_path/'log').read_text()=='xx'
    assert 'shard 1, ' in (said := capsys.readouterr().out) and 'attempt 1 of 3: OSError: the cable is out' in said

def test_a_shard_that_always_fails(net, tars, tmp_path):
    shards,log = drawn(tars, 4),tmp_path/'log'
    odd = [*shards[:2], Odd(shards[2], str(log), fails=4), shards[3]]
    with pytest.raises(RuntimeError, match=r'1 of 4 shards failed; shard 2, .*000002\.tar: OSError: the cable is out\. The others are done and kept in'):
        run(net, odd, tmp_path/'a', retries=3)
    assert files(tmp_path/'a')==['000000-000001.safetensors','000002-000002.error','000003-000003.safetensors'] and log.read_text()=='x'*4
    assert same(run(net, odd, tmp_path/'a'), run(net, shards, tmp_path/'b')) and log.read_text()=='x'*5      # it alone
    assert files(tmp_path/'a')==['000000-000003.safetensors']

def test_bad_tars(net, pictures, tars, tmp_path):
    whole = Path(drawn(tars, 1)[0].urls[0]).read_bytes()
    second = whole.index(b'0001.jpg')
    bad = {'cut in a picture': whole[:second+900], 'cut between files': whole[:second], 'no end': whole.rstrip(b'\0')+b'\0'*300, 'no header': whole[:second]+b'#'+whole[second+1:],
           'two archives': whole+whole, 'a page': b'<html>404</html>'*100, 'nothing': b''}
    for name,data in bad.items():
        (tmp_path/f'{name}.tar').write_bytes(data)
        with pytest.raises(RuntimeError, match=f'1 of 1 shards failed; shard 0, .*{name}.tar'): run(net, tar_shards(tmp_path/f'{name}.tar'), tmp_path/name, retries=0)
    write_tar(tmp_path/'text.tar', [(b'this is no picture', 1)])
    with pytest.raises(RuntimeError, match='text.tar: 0000 cannot be decoded'): run(net, tar_shards(tmp_path/'text.tar'), tmp_path/'text', retries=0)
    with tarfile.open(tmp_path/'lonely.tar', 'w') as tar: tar.addfile(tarfile.TarInfo('0000.cls'))
    with pytest.raises(RuntimeError, match='0000 has 0 pictures, not one, among its files cls'): run(net, tar_shards(tmp_path/'lonely.tar'), tmp_path/'lonely', retries=0)

def test_compressed(net, pictures, tars, tmp_path):
    url = write_tar(tmp_path/'a.tar.gz', pictures[:2], mode='w:gz')
    assert list(TarShard((url,)))[1].data==pictures[1][0]
    Path(url).write_bytes(Path(url).read_bytes()[:-9])
    with pytest.raises((EOFError, tarfile.ReadError)): list(TarShard((url,)))

def test_empty_shards(net, pictures, tars, tmp_path):
    empty = TarShard((write_tar(tmp_path/'empty.tar', []),))
    shards = drawn(tars, 2)
    fisher = run(net, [empty,shards[0],shards[1],empty,empty], tmp_path/'a', kind='exact')
    assert close(fisher, run(net, shards, tmp_path/'b', kind='exact')) and files(tmp_path/'a')==['000000-000004.safetensors']
    with pytest.raises(ValueError, match='none of the 2 shards has a picture'): run(net, [empty,empty], tmp_path/'c')

def test_without_labels(net, pictures, tmp_path):
    shards = tar_shards(write_tar(tmp_path/'a.tar', pictures[:3], labels=False))
    assert run(net, shards, tmp_path/'a').n_images==3
    with pytest.raises(RuntimeError, match="kind 'empirical' needs batches"): run(net, shards, tmp_path/'b', kind='empirical', retries=0)

# Interrupted

def wait_for(what, seconds=150):
    end = time.monotonic()+seconds
    while not what():
        assert time.monotonic()<end
        time.sleep(0.05)

def test_a_helper_is_killed(net, tars, tmp_path, capfd):
    "The first process waits at shard 0 until the helper is at shard 1, which kills it"
    shards = drawn(tars, 4)
    odd = [Odd(shards[0], str(tmp_path/'here'), until=str(tmp_path/'log')), Odd(shards[1], str(tmp_path/'log'), kills=True), *shards[2:]]
    fisher = run(net, odd, tmp_path/'a', jobs=2)
    assert (tmp_path/'log').read_text()=='xx' and 'a helper process ended with an error' in capfd.readouterr().out
    assert close(fisher, run(net, shards, tmp_path/'b')) and files(tmp_path/'a')==['000000-000003.safetensors']

PARENT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_shards import Odd, drawn, run, small
if __name__=='__main__':
    out = Path(sys.argv[3])
    shards = drawn(Path(sys.argv[2]), 5)
    shards[3] = Odd(shards[3], str(out)+'.log', until='never')
    run(small(), shards, out, jobs=int(sys.argv[4]))
"""

def test_the_parent_is_killed(net, tars, tmp_path):
    out,log,jobs = tmp_path/'a',tmp_path/'a.log',2
    (tmp_path/'parent.py').write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(tmp_path/'parent.py'), str(Path(__file__).parent), str(tars), str(out), str(jobs)])
    wait_for(lambda: log.exists() and (out/'000000-000001.safetensors').exists() and (out/'000004-000004.safetensors').exists())
    helpers = subprocess.run(['pgrep', '-P', str(parent.pid)], capture_output=True, text=True).stdout.split()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not any(Path(f'/proc/{o}').exists() for o in helpers), 10)
    assert len(helpers)==jobs-1 and '000003-000003.safetensors' not in files(out)
    shards = drawn(tars, 5)
    again = [Odd(o, str(tmp_path/f'read{i}')) for i,o in enumerate(shards)]
    assert close(run(net, again, out), run(net, shards, tmp_path/'b'))
    assert [i for i in range(5) if (tmp_path/f'read{i}').exists()]==[3]
    assert files(out)==['000000-000004.safetensors']

# The folder

def fill(folder, shards, net):
    "A folder with every node of the tree over four shards, and what each should be"
    made = {}
    for node in ((0,1),(1,2),(2,3),(3,4)): made[node] = run(net, shards[node[0]:node[1]], folder.with_name(f'leaf{node[0]}'), kind='exact')
    made[0,2],made[2,4] = made[0,1]+made[1,2],made[2,3]+made[3,4]
    return made

def test_leftovers_are_not_counted(net, tars, tmp_path, monkeypatch):
    shards,out = drawn(tars, 4),tmp_path/'a'
    made = fill(out, shards, net)
    want = run(net, shards, out, kind='exact')
    done = []
    monkeypatch.setattr(S, '_do_shard', lambda work, i, do=S._do_shard: done.append(i) or do(work, i))
    for there,todo in (([(0,1),(1,2),(0,2)], [2,3]), ([(0,2),(2,3)], [3]), ([(0,1),(0,2),(3,4)], [2]), ([(0,1),(1,2),(2,4)], []), ([(1,2)], [0,2,3])):
        (out/'000000-000003.safetensors').unlink()
        for o in there: made[o].save(S._file(out, o))
        (out/'000002-000002.safetensors.part').write_bytes(b'half')
        (out/'notes.safetensors').write_bytes(b'not ours')
        done.clear()
        assert same(run(net, shards, out, kind='exact'), want) and done==todo, there
        assert set(files(out)) - {'000002-000002.safetensors.part'} == {'000000-000003.safetensors','notes.safetensors'}

def test_a_damaged_partial_sum_is_made_again(net, tars, tmp_path, capsys):
    shards,out = drawn(tars, 3),tmp_path/'a'
    want = run(net, shards, out)
    (out/'000000-000002.safetensors').rename(out/'000000-000001.safetensors')
    (out/'000000-000001.safetensors').write_bytes(b'')
    assert same(run(net, shards, out), want) and '000000-000001.safetensors is damaged' in capsys.readouterr().out
    (out/'000000-000002.safetensors').write_bytes(b'')
    with pytest.raises(ValueError, match='000000-000002.safetensors is damaged .* It was removed, so that'): run(net, shards, out)
    assert same(run(net, shards, out), want)

def test_never_many_partial_sums(net, tars, tmp_path, monkeypatch):
    most = []
    monkeypatch.setattr(S, '_climb', lambda folder, node, n, climb=S._climb: (most.append(len(list(Path(folder).glob('*.safetensors')))), climb(folder, node, n)))
    run(net, drawn(tars), tmp_path/'a')
    assert max(most)==5                                                # log2(16) + 1

def test_another_estimate(net, tars, tmp_path):
    shards,out = drawn(tars, 3),tmp_path/'a'
    run(net, shards, out)
    before = (out/'000000-000002.safetensors').read_bytes()
    for differs,args in {'kind sampled, not exact': dict(kind='exact'), 'seed 0, not 3': dict(seed=3), 'n_samples 1, not 2': dict(n_samples=2), 'mass 1.0, not 0.5': dict(mass=0.5),
                         'size 32, not 36': dict(size=36)}.items():
        with pytest.raises(ValueError, match=f'belongs to another estimate: {differs}. Remove it, or name another folder'): run(net, shards, out, **args)
    with pytest.raises(ValueError, match='weights_sha256'): run(small(1), shards, out)
    with pytest.raises(ValueError, match='3 shards, not 2'): run(net, shards[:2], out)
    with pytest.raises(ValueError, match='shard 1 is .*000001.tar, not .*000002.tar'): run(net, [shards[0],shards[2],shards[1]], out)
    (out/'estimate.json').write_text('{')
    with pytest.raises(ValueError, match='estimate.json cannot be read'): run(net, shards, out)
    assert (out/'000000-000002.safetensors').read_bytes()==before
    with pytest.raises(ValueError, match='is a file; name a folder'): run(net, shards, out/'estimate.json')

def test_batch_size_may_change(net, tars, tmp_path):
    run(net, drawn(tars, 2), tmp_path/'a', bs=1)
    assert run(net, drawn(tars, 2), tmp_path/'a', bs=2).n_images==4

# Nonsense

def test_nonsense(net, tars, tmp_path, monkeypatch):
    shards = drawn(tars, 2)
    for said,kw in {"jobs=0: a whole number, at least 1": dict(jobs=0), "jobs=True": dict(jobs=True), "retries=-1": dict(retries=-1), "bs=0": dict(bs=0), "engine 'dask': choose": dict(engine='dask'),
                    "kind 'true': choose": dict(kind='true'), "jobs=2: Ray runs": dict(engine='ray', jobs=2), "address and gpus are for": dict(address='auto')}.items():
        with pytest.raises(ValueError, match=said): run(net, shards, tmp_path/'a', **kw)
    with pytest.raises(ValueError, match='there are no shards'): run(net, [], tmp_path/'a')
    with pytest.raises(ValueError, match="num_shards=3: a whole number from 1 to 2, as many as there are tar files"): tar_shards(tars/'drawn-{000000..000001}.tar', 3)
    with pytest.raises(FileNotFoundError, match='there is no tar file .*no-\\*.tar'): tar_shards(tars/'no-*.tar')
    with pytest.raises(ValueError, match='the dataset parquet, train, data_files=no.parquet cannot be opened'): stream_shards('parquet', data_files='no.parquet')
    with pytest.raises(ValueError, match="there is no column 'png': choose from"): stream_shards('webdataset', image='png', data_files=str(tars/'*.tar'))
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='start this once, without torchrun'): run(net, shards, tmp_path/'a')
    assert not (tmp_path/'a').exists()

def test_what_cannot_be_sent(net, tars, tmp_path):
    class Local(torch.nn.Linear): pass
    model = torch.nn.Sequential(torch.nn.Flatten(), Local(3*32*32, 4))
    with pytest.raises(ValueError, match='cannot be sent to another process'): run(model, drawn(tars, 2), tmp_path/'a', jobs=2)
    assert run(model, drawn(tars, 2), tmp_path/'a').n_images==4

def test_streams_of_other_kinds(drawn_source, tars, tmp_path):
    datasets = pytest.importorskip('datasets')
    rows = datasets.Dataset.from_list([dict(image=dict(bytes=o.data, path=None), label=o.label) for o in drawn(tars, 1)[0]])
    rows.cast_column('image', datasets.Image()).to_parquet(tmp_path/'a.parquet')
    parquet = stream_shards('parquet', data_files=str(tmp_path/'a.parquet'))
    assert [(o.data,o.label) for o in parquet[0]]==[(o.data,o.label) for o in drawn(tars, 1)[0]]
    assert [o.data for o in pickle.loads(pickle.dumps(parquet))[0]]==[o.data for o in parquet[0]]
    folder = stream_shards('imagefolder', data_dir=str(drawn_source))
    assert sorted(o.data for s in folder for o in s)==sorted(o.read_bytes() for o in (drawn_source/'images').glob('train*'))
    decoding = datasets.load_dataset('parquet', data_files=str(tmp_path/'a.parquet'), split='train', streaming=True)
    one = {o.label for o in parquet[0]}.pop()
    assert {o.label for o in stream_shards(decoding.cast_column('image', datasets.Image(decode=False)).filter(lambda o: o['label']==one))[0]}=={one}
    with pytest.raises(ValueError, match='the stream decodes its pictures'): list(stream_shards(decoding.filter(lambda o: True))[0])

class Server(BaseHTTPRequestHandler):
    folder,turn_away = None,[]
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
    with pytest.raises(RuntimeError, match='1 of 1 shards failed'): run(net, tar_shards(url.replace('{000000..000001}', '9')), tmp_path/'c', retries=0)
    server.shutdown()

# The command

def test_command(tars, tmp_path):
    torch.save(timm.create_model('test_resnet', num_classes=4).state_dict(), tmp_path/'weights.pth')
    command = [str(BIN/'fgvc-fisher'), '--arch', 'test_resnet', '--weights', str(tmp_path/'weights.pth'), '--size', '32', '--device', 'cpu', '--out']
    say = lambda out,*options: subprocess.run([*command, str(tmp_path/out), *options], capture_output=True, text=True)
    there = say('a', '--shards', f'{tars}/drawn-{{000000..000003}}.tar', '--jobs', '2')
    assert there.returncode==0, there.stderr
    assert 'shard 3, ' in there.stdout and 'DiagFisher(sampled, ' in there.stdout and '8 images) written to' in there.stdout
    fgvc_fisher('test_resnet', out=str(tmp_path/'b'), weights=str(tmp_path/'weights.pth'), size=32, device='cpu', stream=f'webdataset:{tars}/drawn-00000[0-3].tar', num_shards=4, half=True)
    a,b = [DiagFisher.load(tmp_path/o) for o in 'ab']
    assert close(a, b, 1e-3) and a.provenance['images']=='drawn-{000000..000003}.tar'
    failed = say('a', '--shards', f'{tars}/*.tar')
    assert failed.returncode==1 and failed.stderr.strip().splitlines()[-1].startswith('fgvc-fisher: ') and 'belongs to another estimate: 4 shards, not 16' in failed.stderr
    assert 'Traceback' not in failed.stderr

@pytest.mark.parametrize('said, options', {'there is no tar file': dict(shards='no.tar'), 'give one of --images': dict(shards='a', stream='b'), 'are for --images': dict(shards='a', until=0.1),
                                           'give --arch and': {}, "engine 'slurm'": dict(engine='slurm'), 'retries=-1': dict(retries=-1), 'there is no folder': dict(out='no/such/f', shards='a'),
                                           'num_shards=99: a whole number from 1 to 16': dict(num_shards=99)}.items())
def test_command_says_what_is_wrong(tars, tmp_path, monkeypatch, said, options):
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model('test_resnet', num_classes=4).state_dict(), 'weights.pth')
    given = {} if said=='give --arch and' or 'shards' in options else dict(shards=f'{tars}/*.tar')
    with pytest.raises(SystemExit, match=said): fgvc_fisher('test_resnet', weights='weights.pth', device='cpu', **given | options)
