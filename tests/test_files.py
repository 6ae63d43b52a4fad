"Files that several processes share, and errors that all ranks raise"
import copy, errno, os, shutil, sys, threading
from contextlib import contextmanager
from pathlib import Path
import pytest, torch
from torch import nn
from fgvc_fisher.distributed import files, ranks
from fgvc_fisher.distributed.files import replace_file, write_text
from fgvc_fisher.experiment.run import Run, _made_once, do_run
from fgvc_fisher.fisher import DiagFisher, estimate_fisher
from fgvc_fisher.fisher.estimate import Estimate, LabelPlan, model_restored
from fgvc_fisher.penalty import merge
sys.path.append(str(Path(__file__).parent.parent/'tools'))
import faults

def test_two_writers_of_one_file(tmp_path):
    "Each finds a whole file at any time, and no temporary one is left"
    file,wrong = tmp_path/'a.txt',[]
    def write(text):
        for _ in range(100):
            write_text(file, text*10_000)
            if file.read_text() not in ('a'*10_000, 'b'*10_000): wrong.append(text)
    threads = [threading.Thread(target=write, args=(o,)) for o in 'ab']
    for o in threads: o.start()
    for o in threads: o.join()
    assert not wrong and os.listdir(tmp_path)==['a.txt']

def left_by_a_kill(file):
    part = file.with_name(f'{file.name}.0123456789ab.part')
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(b'half')
    return part

def test_what_a_killed_estimate_had_written(tmp_path):
    "The checkpoint's temporary file goes, one of another file stays"
    data = [torch.randn(4, 3)]
    gone,stays = left_by_a_kill(tmp_path/'a.checkpoint'),left_by_a_kill(tmp_path/'b[1].checkpoint')
    estimate_fisher(nn.Linear(3, 2), data, checkpoint=tmp_path/'a.checkpoint', progress=False)
    assert not gone.exists() and stays.exists()
    estimate_fisher(nn.Linear(3, 2), data, checkpoint=tmp_path/'b[1].checkpoint', progress=False)
    assert not os.listdir(tmp_path)

def test_what_a_killed_run_had_written_of_its_source(tmp_path):
    gone,stays = left_by_a_kill(tmp_path/'a.safetensors'),left_by_a_kill(tmp_path/'b.safetensors')
    _made_once(tmp_path/'a.safetensors', Path.touch, Path.exists)
    assert not gone.exists() and stays.exists()

def test_a_system_that_flushes_no_file_opened_for_reading(tmp_path, monkeypatch):
    "As Windows"
    fcntl,real = pytest.importorskip('fcntl'),os.fsync
    def fsync(fd):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE==os.O_RDONLY: raise OSError(errno.EBADF, 'read only')
        real(fd)
    monkeypatch.setattr(files.os, 'fsync', fsync)
    write_text(tmp_path/'a.txt', 'a')
    assert (tmp_path/'a.txt').read_text()=='a'

@pytest.mark.parametrize('error', [RuntimeError('unexpected pos'), OSError(errno.ENOSPC, 'no space')])
def test_a_full_disk(tmp_path, monkeypatch, error):
    "Whatever a library raises then"
    def write(part):
        part.write_bytes(b'half')
        raise error
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(files.shutil, 'disk_usage', lambda o: full)
    with pytest.raises(OSError, match=f"{tmp_path/'a'} cannot be written, the disk is full") as e:
        replace_file(tmp_path/'a', write)
    assert e.value.errno==errno.ENOSPC and not os.listdir(tmp_path)

@pytest.mark.parametrize('rank', [0, 1])
@pytest.mark.parametrize('error,kind', [(ValueError('why'), ValueError),
                                        (UnicodeDecodeError('utf-8', b'a', 0, 1, 'why'), RuntimeError)])
def test_an_error_of_rank_0(monkeypatch, rank, error, kind):
    "The others raise it, too, if its type can be made of a message"
    def fail(): raise error
    told = [None, type(error), str(error)]
    monkeypatch.setattr(ranks, 'processes', lambda: (2, rank))
    monkeypatch.setattr('accelerate.utils.broadcast_object_list', lambda o: told)
    with pytest.raises(kind if rank else type(error), match='why'): ranks.on_rank0(fail)

def test_a_run_that_is_refused_touches_no_other(tmp_path, monkeypatch):
    "Another process claims the new folder before this one can: its files stay"
    file = tmp_path/'run/run.json'
    @contextmanager
    def taken(lock, message):
        file.write_text('theirs')
        raise ValueError(message)
        yield
    monkeypatch.setattr('fgvc_fisher.experiment.run.shared_lock', taken)
    with pytest.raises(ValueError, match='another process'): do_run(Run('nowhere'), file.parent, quiet=True)
    assert file.read_text()=='theirs'

@pytest.mark.parametrize('fault', faults.FAULTS.values(), ids=lambda o: o.what)
def test_the_faults_can_be_inserted(fault):
    assert (faults.ROOT/'fgvc_fisher'/fault.file).read_text(encoding='utf-8').count(fault.old)==1

# Fishers that are added, looked at in between, and merged

@pytest.fixture
def net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12,5), torch.nn.Tanh(), torch.nn.Linear(5,3))

def test_an_estimate_that_is_looked_at_in_between(net):
    with model_restored(net):
        estimate = Estimate(net, LabelPlan('exact'), {})
        estimate.add(torch.randn(4,3,2,2))
        early = estimate.fisher()
        before = {k: v.clone() for k,v in early.items()}
        estimate.add(torch.randn(4,3,2,2))
    assert all(torch.equal(early[k], v) for k,v in before.items()) and early.n_images==4

def test_no_more_batches_are_taken_than_are_needed(net):
    batches = iter([torch.randn(2,3,2,2) for _ in range(4)])
    estimate_fisher(net, batches, n_images=4, progress=False)
    assert len(list(batches))==2

@pytest.mark.parametrize('seed', [None, 3.0, 'a'])
def test_a_seed_that_is_none(net, seed):
    with pytest.raises(ValueError, match='seed='): estimate_fisher(net, [torch.randn(2,3,2,2)], seed=seed)

def test_a_sum_of_fishers():
    sums = dict(a=torch.ones(2), b=2*torch.ones(3))
    turned = dict(b=sums['b'], a=sums['a'])
    one = DiagFisher(sums, 2, 'exact', dict(images='cats', seed='0'), torch.tensor([1.,2.,3.]))
    two = DiagFisher(turned, 2, 'exact', dict(seed='0', license='free'), torch.tensor([20.,10.,30.]))
    both = one+two
    assert both.moments.tolist()==[11.,22.,33.]
    assert both.provenance==dict(images='cats + unknown', seed='0', license='unknown + free')
    assert (both+two).provenance==both.provenance
    with pytest.raises(TypeError): one+sums

def test_a_fisher_of_zeros():
    table = DiagFisher(dict(a=torch.zeros(2)), 2, 'exact').summary()
    assert table['mean'].tolist()==[0.] and table.share.isna().all()

@pytest.mark.parametrize('dtype,beta', [(torch.float32, 1e300), (torch.float32, 1e39), (torch.float16, 1e6)])
@pytest.mark.parametrize('alpha', [0., 1e-9])
def test_merging_with_a_large_weight_and_small_fishers(net, dtype, beta, alpha):
    source,tuned = net.to(dtype),copy.deepcopy(net).to(dtype)
    with torch.no_grad():
        for p in tuned.parameters(): p.add_(1)
    fisher = {n: torch.full(p.shape, 1e-9) for n,p in net.named_parameters()}
    found = merge(source, tuned, fisher, fisher, beta=beta, alpha=alpha).state_dict()
    for n,p in source.named_parameters(): assert torch.allclose(found[n], p, atol=1e-3)

# Folders and files of something else

def content(folder): return {o.relative_to(folder).as_posix(): o.read_bytes() for o in folder.rglob('*') if o.is_file()}

@pytest.mark.parametrize('name', ['checkpoint.pt', 'curve.csv', 'result.json', 'model.safetensors', 'data.json',
                                  'epoch-3.safetensors', 'run.json'])
def test_a_run_takes_no_folder_of_something_else(name, tmp_path):
    for o in (name, 'error.txt', 'epoch-10.pth', 'film.part', 'downloads/a.tar.part'):
        (tmp_path/o).parent.mkdir(exist_ok=True)
        (tmp_path/o).write_text('{"mine": 1}')
    before = content(tmp_path)
    run = Run(str(tmp_path/'data'))
    with pytest.raises(ValueError, match=f'(?i){name}.*empty folder'): do_run(run, tmp_path, quiet=True)
    after = content(tmp_path)
    after.pop('lock', None)
    assert after==before

def test_a_run_leaves_what_is_not_its_own(drawn, tiny_weights, tmp_path):
    others = 'error.txt','epoch-10.pth','epoch-notes.txt','film.part','downloads/a.tar.part','epoch-1/x'
    for o in others:
        (tmp_path/o).parent.mkdir(exist_ok=True)
        (tmp_path/o).write_text('mine')
    run = Run(str(drawn), arch='tiny:network', weights=str(tiny_weights), epochs=1, size=32, bs=8, num_workers=0)
    do_run(run, tmp_path, quiet=True)
    assert all((tmp_path/o).read_text()=='mine' for o in others) and (tmp_path/'result.json').exists()
