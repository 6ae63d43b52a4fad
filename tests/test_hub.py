"The command, interrupted and in several processes; to the Hub and back through a server that answers as the Hub does"
import base64, copy, errno, importlib, json, math, os, re, signal, sys, time, warnings
from functools import partial, partialmethod
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from threading import Thread
import pytest, timm, torch
from safetensors.torch import save_file
from fgvc_fisher import cli
from fgvc_fisher.experiment import do_run
from fgvc_fisher.fisher import DiagFisher, estimate_fisher
from fgvc_fisher.fisher.estimate import Estimate
from fgvc_fisher.fisher.per_image import SquaredGradients
from fgvc_fisher.learner import source_model
from forks import Forked, shell, shells

@pytest.fixture(scope='module')
def made(drawn_source, tmp_path_factory):
    "The command's options for a small network, and what it makes of them in one process"
    folder = tmp_path_factory.mktemp('command')
    torch.save(timm.create_model('test_resnet', num_classes=1000).state_dict(), folder/'weights.pth')
    command = ['fgvc-fisher', '--arch', 'test_resnet', '--weights', folder/'weights.pth', '--images', drawn_source,
               '--size', '64', '--bs', '3', '--device', 'cpu', '--out']
    done = shell(*command, folder/'one.safetensors')
    assert done.code==0, done.err
    return command,DiagFisher.load(folder/'one.safetensors')

def test_two_processes_agree_with_one(made, tmp_path):
    command,one = made
    both = shells(*command, tmp_path/'two.safetensors')
    assert [o.code for o in both]==[0,0], both
    two = DiagFisher.load(tmp_path/'two.safetensors')
    assert two.n_images==one.n_images
    for k in one: assert (two[k]-one[k]).norm() <= 1e-6*one[k].norm(), k
    assert torch.allclose(two.moments, one.moments, rtol=1e-6)
    assert [o.name for o in tmp_path.iterdir()]==['two.safetensors']
    assert [o.out.count('two.safetensors') for o in both]==[1,0]      # the first says so, and nobody else

def estimate(checkpoint, out, pause=False):
    "A Fisher of 6 batches; with `pause` it never gets behind the fourth"
    torch.manual_seed(0)
    model,x = timm.create_model('test_resnet', num_classes=10),torch.randn(6,4,3,32,32)
    def batches():
        for i,o in enumerate(x):
            if pause and i==4:
                print('four', flush=True)
                time.sleep(1000)
            yield o
    estimate_fisher(model, batches(), checkpoint=checkpoint, checkpoint_every=0, progress=False).save(out)

def test_killed_and_started_again_ends_with_the_same_bits(tmp_path):
    killed = Forked(estimate, tmp_path/'b.checkpoint', tmp_path/'b', True)
    while 'four' not in killed.out:
        assert killed.poll() is None, killed.err
        time.sleep(0.01)
    killed.kill()
    assert DiagFisher.load(tmp_path/'b.checkpoint').n_images==16 and not (tmp_path/'b').exists()
    for o in 'ab': estimate(tmp_path/f'{o}.checkpoint', tmp_path/o)
    a,b = [DiagFisher.load(tmp_path/o) for o in 'ab']
    assert a.n_images==b.n_images==24 and a.provenance==b.provenance and torch.equal(a.moments, b.moments)
    assert all(torch.equal(a.sums[k], b.sums[k]) for k in a)
    assert not list(tmp_path.glob('*.checkpoint*'))

def by_command(run, out):
    "What `fgvc-fisher` does with a folder of pictures"
    model = source_model(run.arch, run.weights)
    cli._of_folder(model, run.source, out, False, run.size, run.bs, 'error', progress=False)
    return out
def by_run(run, out):
    do_run(run, out, quiet=True)
    return next(out.rglob('*-sampled.safetensors'))

@pytest.mark.parametrize('do', [by_command,by_run])
def test_nothing_is_lost_when_the_fisher_cannot_be_written(do, tiny_run, tmp_path, monkeypatch):
    "Its checkpoint stays until it is in its file, and the next call need not look at a picture again"
    wanted,save,add,added = DiagFisher.load(do(tiny_run, tmp_path/'wanted')),DiagFisher.save,Estimate.add,[]
    def full(self, path, *args):
        if 'checkpoint' not in Path(path).name: raise OSError(errno.ENOSPC, 'no space left')
        save(self, path, *args)
    def counted(self, x, *args):
        added.append(len(x))
        return add(self, x, *args)
    often = partial(estimate_fisher, checkpoint_every=0)
    for module in ('fgvc_fisher.fisher.estimate', 'fgvc_fisher.experiment.run'):
        monkeypatch.setattr(f'{module}.estimate_fisher', often)
    monkeypatch.setattr(Estimate, 'add', counted)
    with monkeypatch.context() as patch:
        patch.setattr(DiagFisher, 'save', full)
        with pytest.raises(OSError, match='no space left'): do(tiny_run, tmp_path/'again')
    assert sum(added)==wanted.n_images and list(tmp_path.rglob('*.checkpoint'))
    found = DiagFisher.load(do(tiny_run, tmp_path/'again'))
    assert sum(added)==wanted.n_images and not list(tmp_path.rglob('*.checkpoint*'))
    assert all(torch.equal(found.sums[k], v) for k,v in wanted.sums.items())

@pytest.fixture
def interruptible():
    "A background job ignores Ctrl-C"
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, usual)

def test_an_interrupt_waits_for_its_batch(interruptible, tmp_path, monkeypatch):
    "Ctrl-C in the middle of a batch: the same call ends as if there had been none; a second one loses the batch alone"
    net,x = torch.nn.Linear(4,3).double(),torch.randn(4,24,4, dtype=torch.float64)
    estimate = partial(estimate_fisher, net, x, checkpoint=tmp_path/'c', checkpoint_every=0, progress=False)
    wanted,add_batch = estimate(),SquaredGradients.add_batch
    def pressed(self, *args, times):
        found = add_batch(self, *args)
        pressed_now = times if next(calls)==4 else 0                   # in the second batch of three parts
        for _ in range(pressed_now): signal.raise_signal(signal.SIGINT)
        return found
    for times,left in ((1,48), (2,24)):
        calls = count()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(SquaredGradients, 'add_batch', partialmethod(pressed, times=times))
            estimate()
        assert DiagFisher.load(tmp_path/'c').n_images==left
        again = estimate()
        assert again.n_images==96 and all(torch.equal(again[k], wanted[k]) for k in wanted)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

def test_checkpoint_of_another_estimate(tmp_path):
    net,x = torch.nn.Linear(4,3),torch.randn(3,8,4)
    def broken():
        yield from x[:2]
        raise KeyboardInterrupt
    estimate = partial(estimate_fisher, checkpoint=tmp_path/'c', checkpoint_every=0, progress=False)
    with pytest.raises(KeyboardInterrupt): estimate(net, broken())
    with pytest.raises(ValueError, match=r'seed 0\b.*\b1\b'): estimate(net, x, seed=1)
    with pytest.raises(ValueError, match='kind sampled.*exact'): estimate(net, x, kind='exact')
    with pytest.raises(ValueError, match='weights_sha256'): estimate(torch.nn.Linear(4,3), x)
    with pytest.raises(ValueError, match='batch'): estimate(net, x.flatten(0,1).split(7))
    with pytest.raises(ValueError, match=r'shape \(4,\), and these have \(5, 4\)'): estimate(net, torch.randn(3,8,5,4))
    assert estimate(net, x).n_images==24 and not (tmp_path/'c').exists()

def test_command_says_what_is_wrong(made, tmp_path):
    command,_ = made
    def fails(*options):
        done = shell(*command, tmp_path/'f.safetensors', *options)
        assert done.code and 'Traceback' not in done.err and not list(tmp_path.iterdir())
        return done.err.strip().splitlines()[-1]
    assert str(tmp_path) in fails('--images', tmp_path)
    assert 'resnet18' in fails('--arch', 'resnet_18')
    assert "'true'" in fails('--kind', 'true')
    assert str(tmp_path/'no') in fails('--out', tmp_path/'no/f.safetensors')

# Files from somebody with ideas

@pytest.fixture
def fisher():
    about = dict(license='CC0', images='noise')
    return estimate_fisher(torch.nn.Linear(3,2), torch.randn(1,4,3), progress=False, provenance=about)

HOSTILE = dict(kind='"; rm -rf /', n_images='-3', names='["../../etc/passwd"]', provenance='[1,2]',
               rules='{"weight"', format='pickle', scales='[1e400]')

@pytest.mark.parametrize('key', HOSTILE)
def test_a_hostile_header(fisher, tmp_path, key):
    header = dict(format='fgvc_fisher.DiagFisher/1', kind='exact', n_images='4', names='["weight","bias"]',
                  provenance='{}', rules='{}')
    save_file(dict(fisher.sums), tmp_path/'f', metadata=header)
    assert len(DiagFisher.load(tmp_path/'f'))==2
    save_file(dict(fisher.sums), tmp_path/'f', metadata=header | {key: HOSTILE[key]})
    with pytest.raises(ValueError, match=re.escape(str(tmp_path/'f'))): DiagFisher.load(tmp_path/'f')

def test_hostile_files(fisher, tmp_path):
    class Boom:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/boom',)
    torch.save(Boom(), tmp_path/'pickle.safetensors')
    (tmp_path/'huge').write_bytes((2**60).to_bytes(8, 'little')+b'{}')
    (tmp_path/'empty').touch()
    whole = fisher.save(tmp_path/'whole').read_bytes()
    for n in (5, 100, len(whole)//2, len(whole)-1):
        (tmp_path/'cut').write_bytes(whole[:n])
        with pytest.raises(ValueError, match='cut'): DiagFisher.load(tmp_path/'cut')
    for o in ('pickle.safetensors','huge','empty'):
        with pytest.raises(ValueError, match=o): DiagFisher.load(tmp_path/o)
    assert not (tmp_path/'boom').exists()
    header = json.loads(whole[8:8+int.from_bytes(whole[:8], 'little')])
    save_file({k: -v for k,v in fisher.sums.items()}, tmp_path/'negative', metadata=header['__metadata__'])
    with pytest.raises(ValueError, match='weight, bias'): DiagFisher.load(tmp_path/'negative')

def test_other_weights_are_warned_of(tmp_path):
    net = torch.nn.Linear(3,2)
    file = estimate_fisher(net, torch.randn(1,4,3), progress=False).save(tmp_path/'f')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        DiagFisher.load(file, net)
    name = re.escape(str(file))
    with pytest.warns(UserWarning, match=f'{name}.*weights'): DiagFisher.load(file, torch.nn.Linear(3,2))
    with pytest.raises(ValueError, match=f'{name}.*Linear.*bias, weight'): DiagFisher.load(file, torch.nn.Linear(3,5))

def test_the_same_weights_in_another_type(tmp_path, recwarn):
    net = torch.nn.Sequential(torch.nn.Linear(3,2), torch.nn.BatchNorm1d(2)).eval()
    file = estimate_fisher(net, torch.randn(1,4,3), progress=False).save(tmp_path/'f')
    DiagFisher.load(file, copy.deepcopy(net).double())
    assert not recwarn.list
    net[1].running_mean += 1
    with pytest.warns(UserWarning, match='other weights'): DiagFisher.load(file, net.double())

def test_what_load_would_refuse_is_not_saved(tmp_path):
    fisher = estimate_fisher(torch.nn.Linear(3,2), torch.randn(1,4,3), progress=False)
    fisher.sums['bias'][0] = math.nan
    with pytest.raises(ValueError, match='was not written.*not finite: bias'): fisher.save(tmp_path/'f')
    assert not (tmp_path/'f').exists()

def test_sums_of_which_one_does_not_tell_its_mass():
    a = estimate_fisher(torch.nn.Linear(3,2), torch.randn(1,4,3), 'exact', mass=0.6, progress=False)
    b = DiagFisher(a.sums, a.n_images, a.kind, {k: v for k,v in a.provenance.items() if k!='mass_left'}, a.moments)
    assert 'mass_left' in (a+a).provenance and 'mass_left' not in (a+b+a).provenance

def test_half_is_half(tmp_path):
    fisher = estimate_fisher(timm.create_model('test_resnet'), torch.randn(1,4,3,64,64), progress=False)
    whole,half = [fisher.save(tmp_path/str(o), half=o) for o in (False,True)]
    assert half.stat().st_size < 0.55*whole.stat().st_size
    again = DiagFisher.load(half)
    assert 'float16' in again.provenance['rounding']
    for k in fisher: assert (again[k]-fisher[k]).norm() <= 5e-4*fisher[k].norm(), k

# The Hub

class FakeHub(BaseHTTPRequestHandler):
    "What huggingface_hub asks for when it makes a repository, commits small files and downloads one"
    files,log = {},[]
    def log_message(self, *args): pass
    def answer(self, code, body=b'', **headers):
        self.send_response(code)
        self.send_header('Content-Length', str(len(body)))
        for k,v in headers.items(): self.send_header(k.replace('_','-'), v)
        self.end_headers()
        if self.command!='HEAD': self.wfile.write(body)
    def do_POST(self):
        sent = self.rfile.read(int(self.headers.get('Content-Length', 0)))
        self.log.append(self.path)
        url = f"http://{self.headers['Host']}/somebody/fisher"
        if self.path.endswith('/repos/create'): return self.json(dict(url=url, name='somebody/fisher'))
        if '/preupload/' in self.path:
            plain = dict(uploadMode='regular', shouldIgnore=False, oid=None)
            return self.json(dict(files=[dict(path=o['path']) | plain for o in json.loads(sent)['files']]))
        if '/commit/' in self.path:
            for line in map(json.loads, sent.decode().splitlines()):
                if line['key']=='file': self.files[line['value']['path']] = base64.b64decode(line['value']['content'])
            commit = 'a'*40
            made = dict(commitUrl=f'{url}/commit/{commit}', commitOid=commit)
            return self.json(made | dict(pullRequestUrl=None, success=True))
        self.json({})
    def do_GET(self):
        name = self.path.split('?')[0].rpartition('/')[2]
        if '/resolve/' not in self.path:
            return self.json(dict(id='somebody/fisher', modelId='somebody/fisher', sha='a'*40, siblings=[]))
        if name not in self.files: return self.answer(404, X_Error_Code='EntryNotFound')
        self.answer(200, self.files[name], ETag=f'"{sha1(self.files[name]).hexdigest()}"', X_Repo_Commit='a'*40)
    do_HEAD = do_GET
    def json(self, o): self.answer(200, json.dumps(o).encode(), Content_Type='application/json')

def hub():
    "`fgvc_fisher.fisher.hub` with huggingface_hub as it is imported now: that reads its environment only then"
    for o in [*sys.modules]:
        if o.partition('.')[0]=='huggingface_hub' or o=='fgvc_fisher.fisher.hub': del sys.modules[o]
    return importlib.import_module('fgvc_fisher.fisher.hub')

def round_trip():
    here = hub()
    print(here.push_to_hub(DiagFisher.load('f.safetensors'), 'somebody/fisher', token='hf_x'))
    here.from_hub('somebody/fisher').save('back.safetensors')

def from_cache(): print(hub().from_hub('somebody/fisher'))

def test_to_the_hub_and_back(fisher, tmp_path, monkeypatch):
    server = ThreadingHTTPServer(('127.0.0.1', 0), FakeHub)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    for o in [o for o in os.environ if 'proxy' in o.lower()]: monkeypatch.delenv(o)
    env = dict(HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', HF_HOME=str(tmp_path/'hf'), HF_HUB_DISABLE_XET='1',
               HF_HUB_DISABLE_TELEMETRY='1')
    fisher.save(tmp_path/'f.safetensors')
    first = Forked(round_trip, cwd=tmp_path, env=env | dict(HF_HUB_OFFLINE='0'))
    assert first.wait()==0, first.err
    assert 'commit' in first.out and set(FakeHub.files)=={'README.md','fisher.safetensors'}
    back = DiagFisher.load(tmp_path/'back.safetensors')
    assert back.provenance==fisher.provenance and all(torch.equal(back.sums[k], fisher.sums[k]) for k in fisher)
    card = FakeHub.files['README.md'].decode()
    assert card.startswith('---') and 'library_name: fgvc_fisher' in card and "from_hub('somebody/fisher')" in card
    assert '| n_images | 4 |' in card and '| images | noise |' in card and 'CC0' in card
    server.shutdown()
    asked = len(FakeHub.log)
    again = Forked(from_cache, cwd=tmp_path, env=env | dict(HF_HUB_OFFLINE='1'))
    assert again.wait()==0, again.err
    assert 'DiagFisher(sampled, 2 parameters, 4 images)' in again.out and len(FakeHub.log)==asked
