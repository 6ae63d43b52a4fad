"""A run by two processes: one result, one writer, one progress bar.
If one process dies, so does the other, and nothing is lost."""
import hashlib, json, os, signal, subprocess, time
from dataclasses import replace
from pathlib import Path
import pandas as pd, pytest, torch
from fastai.callback.core import Callback
from fastai.data.load import DataLoader as FastaiLoader
from fastai.distributed import DistributedDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from fgvc_fisher.data import read_aircraft, read_pictures
from fgvc_fisher.data.loaders import split_dls
from fgvc_fisher.fisher import DiagFisher, estimate_fisher
from fgvc_fisher.learner import distributed_training, source_model
from fgvc_fisher.distributed.ranks import shutdown_processes, processes
from fgvc_fisher.distributed.workers import python_path
from fgvc_fisher.retention import accuracy_on
from fgvc_fisher.experiment import do_run, load_run
from fgvc_fisher.experiment.run import KeepEpochs, make_learner
from forks import BIN, ranks, shells, succeed

pytestmark = pytest.mark.xdist_group('processes')   # What its tests share is made once

@pytest.fixture(scope='module')
def run(tiny_run): return tiny_run

class Watch(Callback):
    """Writes down the parameters after every step, behind the penalty's own.
    `how` says what happens to this process in its second epoch: it 'dies', or its loss is 'nan'"""
    order = KeepEpochs.order+1
    def __init__(self, file, how): self.file,self.how = file,how
    def after_loss(self):
        if not self.how or not self.training or self.train_iter!=6: return
        if self.how=='dies': os.kill(os.getpid(), signal.SIGKILL)
        self.learn.loss_grad,self.learn.loss = self.loss_grad*torch.nan,self.loss*torch.nan
    def after_batch(self):
        if not self.training: return
        bits = b''.join(p.detach().numpy().tobytes() for p in self.learn.model.parameters())
        penalty = next(o.penalty for o in self.learn.cbs if hasattr(o, 'penalty'))
        with open(self.file, 'a') as f: print(hashlib.sha256(bits).hexdigest(), penalty.value().item(), file=f)

def do(run, folder, how=''):
    "What each of the two processes does"
    _,i = processes()
    row = do_run(run, folder, cbs=[Watch(f'{folder}-{i}.steps', how if i else '')], quiet=True)
    print(i, row['last'])
    shutdown_processes()

@pytest.fixture(scope='module')
def together(run, tmp_path_factory):
    "The folder of a run that two processes have done"
    folder = tmp_path_factory.mktemp('together')/'run'
    succeed(ranks(do, run, folder))
    return folder

def test_both_take_the_same_steps(together):
    steps = [Path(f'{together}-{i}.steps').read_text().splitlines() for i in range(2)]
    assert len(steps[0])==3*4 and steps[0]==steps[1] and len(set(steps[0]))==12

def test_the_numbers_are_those_of_one_process(run, together, tmp_path):
    alone = do_run(run, tmp_path/'run', quiet=True)
    there = json.loads((together/'result.json').read_text())
    assert there['before']==alone['before'] and there['machine'].startswith('2 ')
    assert len(pd.read_csv(together/'curve.csv'))==3
    one,two = [DiagFisher.load(next(o.glob('*sampled*.safetensors'))) for o in (tmp_path/'run', together)]
    for k,v in one.items(): torch.testing.assert_close(two[k], v, rtol=1e-6, atol=1e-6*v.max().item())
    assert one.n_images==two.n_images
    learn = load_run(together, pictures=True)
    assert there['last']==pytest.approx(accuracy_on(learn.model, learn.dls.valid), abs=1e-12)

def estimate(folder):
    "Of a loader with all pictures, and what is said of loaders with a part, or in an order of their own"
    from accelerate import Accelerator
    accelerator = Accelerator(cpu=True)
    data,model = TensorDataset(torch.arange(40.).view(10,4)),torch.nn.Linear(4,3)
    with torch.no_grad(): model.weight.zero_()
    loaders = [DataLoader(data, 2), DataLoader(data, 2, sampler=DistributedSampler(data)),
               accelerator.prepare(DataLoader(data, 2)), DistributedDL(FastaiLoader(data, bs=2, num_workers=0)),
               DataLoader(data, 2, shuffle=True)]
    def tried(loader):
        try: return f'{estimate_fisher(model, loader, progress=False).n_images} images'
        except ValueError as e: return str(e)
    (folder/f'{processes()[1]}').write_text('\n'.join(map(tried, loaders)))
    shutdown_processes()

def test_each_needs_a_loader_of_all_pictures(tmp_path):
    "One that is divided already would be divided twice, and half of the pictures left out without a word"
    succeed(ranks(estimate, tmp_path))
    for rank in '01':
        whole,*divided,shuffled = (tmp_path/rank).read_text().splitlines()
        assert whole=='10 images' and len(divided)==3 and 'without shuffling' in shuffled
        assert all('before it was divided' in o for o in divided)

def few(run, folder):
    do_run(run, folder, quiet=True)
    shutdown_processes()

def test_fewer_pictures_than_a_batch_for_each(run, tmp_path):
    "They train on the one smaller batch, as a single process does"
    succeed(ranks(few, replace(run, bs=16, fraction=0.75, epochs=1), tmp_path/'run'))
    curve = pd.read_csv(tmp_path/'run/curve.csv')
    assert curve.train_loss.notna().all() and (curve.distance>0).all()

def validated(drawn, folder):
    "The loss and the accuracy on 15 pictures, by two processes and by each alone"
    table = read_aircraft(drawn).drop(index=0)
    dls = split_dls(table[table.split!='test'], drawn, train='val', valid='train', size=32, bs=4, num_workers=0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3*32*32, 4))
    learn = Learner(dls, model, loss_func=CrossEntropyLossFlat(), metrics=accuracy)
    with distributed_training(learn), learn.no_bar(), learn.no_logging(): learn.fit(1, 0.)
    _,*found = learn.recorder.values[-1]
    with learn.no_bar(): torch.testing.assert_close(torch.tensor(found), torch.tensor(list(learn.validate())))
    (folder/str(processes()[1])).write_text(str(len(dls.valid_ds)))
    shutdown_processes()

def test_a_validation_loss_counts_each_picture_once(drawn, tmp_path):
    succeed(ranks(validated, drawn, tmp_path))
    assert {(tmp_path/o).read_text() for o in '01'}=={'15'}

def until_reached(folder, target, last):
    "An estimate up to an error, of which one of two processes dies before batch `last`"
    torch.manual_seed(0)
    model,x = torch.nn.Linear(4, 3),torch.randn(48, 4)
    class Batches:
        def __iter__(self):
            for i,o in enumerate(x.split(2)):
                if i==last and processes()[1]==1: os._exit(1)
                yield o,torch.zeros(2)
    fisher = estimate_fisher(model, Batches(), target_error=target, checkpoint=folder/'f', checkpoint_every=0,
                             progress=False)
    if not processes()[1]: fisher.save(folder/'fisher.safetensors')
    shutdown_processes()

@pytest.mark.parametrize('target', [0.001, 0.2])
def test_an_estimate_up_to_an_error_resumes(tmp_path, target):
    "Though one process had come further than the other: it ends where it would have ended"
    for o in ('whole','resumed'): (tmp_path/o).mkdir()
    succeed(ranks(until_reached, tmp_path/'whole', target, None))
    assert all([o.wait() for o in ranks(until_reached, tmp_path/'resumed', target, 7)])
    succeed(ranks(until_reached, tmp_path/'resumed', target, None))
    one,two = [DiagFisher.load(tmp_path/o/'fisher.safetensors') for o in ('whole','resumed')]
    assert one.n_images==two.n_images and (one.n_images<48)==(target==0.2)
    for k,v in one.items(): torch.testing.assert_close(two[k], v)

def test_if_one_dies_the_run_ends_and_can_be_resumed(run, together, tmp_path):
    folder = tmp_path/'run'
    one,two = ranks(do, run, folder, 'dies')
    assert two.wait()==-signal.SIGKILL and one.wait()!=0              # without it there is no average of gradients
    assert len(torch.load(folder/'checkpoint.pt', weights_only=True)['rows'])==1
    assert not (folder/'result.json').exists()
    succeed(ranks(do, run, folder))
    assert (folder/'model.safetensors').read_bytes()==(together/'model.safetensors').read_bytes()
    a,b = [pd.read_csv(o/'curve.csv').drop(columns='seconds') for o in (folder, together)]
    pd.testing.assert_frame_equal(a, b, check_exact=True)

def options(run, out):
    "Those of the command that trains"
    return ['--data', run.data, '--arch', run.arch, '--weights', run.weights, '--source', run.source,
            '--size', '32', '--bs', '4', '--num-workers', '0', '--out', str(out)]

def leaves(pid):
    "The two workers below torchrun, by their number"
    found = {}
    for o in Path('/proc').glob('[0-9]*/environ'):
        try: env = dict(v.split('=', 1) for v in o.read_text().split('\0') if '=' in v)
        except OSError: continue
        parent = Path(f'/proc/{o.parent.name}/stat').read_text().rsplit(')', 1)[1].split()[1]
        if parent==str(pid) and 'RANK' in env: found[env['RANK']] = int(o.parent.name)
    return found

@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='looks for processes in /proc')
def test_as_torchrun_starts_and_ends_them(run, tmp_path):
    "The only test with torchrun itself, which ends one process when the other is killed; the run can be resumed"
    command = [BIN/'torchrun', '--nproc-per-node', '2', '--no-python', BIN/'fgvc-finetune', '--epochs', '12']
    command = [*map(str, command), *options(run, tmp_path/'out')]
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=python_path())
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env) as first:
        until = time.monotonic()+100
        while not (tmp_path/'out/checkpoint.pt').exists() and time.monotonic()<until: time.sleep(0.01)
        os.kill(leaves(first.pid)['1'], signal.SIGKILL)
        first.communicate(timeout=60)
    assert first.returncode!=0
    assert (tmp_path/'out/checkpoint.pt').exists() and not (tmp_path/'out/result.json').exists()
    again = shells('fgvc-finetune', *options(run, tmp_path/'out'), '--epochs', '12')
    assert [o.code for o in again]==[0,0], again
    assert len(pd.read_csv(tmp_path/'out/curve.csv'))==12 and (tmp_path/'out/result.json').exists()

def test_a_nan_loss_in_one_ends_both(run, tmp_path):
    both = ranks(do, run, tmp_path/'run', 'nan')
    succeed(both)
    assert [o.out.split() for o in both]==[['0','nan'], ['1','nan']]
    assert len(pd.read_csv(tmp_path/'run/curve.csv'))==1

def test_the_command_with_one_bar_and_one_table(run, tmp_path):
    both = shells('fgvc-finetune', *options(run, tmp_path/'out'), '--epochs', '2')
    assert [o.code for o in both]==[0,0], both
    said = both[0].out+both[1].out
    lines = 'train_loss', 'L2SPFisherCallback', 'pictures: ', f'Written to {tmp_path}'
    assert [said.count(o) for o in lines]==[2,1,1,1]                # a line for each epoch, and one of each other
    assert 'shadowing' not in both[0].err+both[1].err               # fastai's warning
    assert json.loads((tmp_path/'out/result.json').read_text())['machine'].startswith('2 ')

def test_a_failed_run_ends_a_sweep_and_the_next_sweep_does_the_rest(run, tmp_path):
    names = ('data','source','arch','weights','size','bs','num_workers')
    common = [f"{o} = {json.dumps(getattr(run, o))}" for o in names]
    arms = ['[[arm]]','arm = "too few"','beta = 1','n_fisher = 999', '[[arm]]','arm = "L2"','alpha = 0.001']
    (tmp_path/'grid.toml').write_text('\n'.join([*common, 'epochs = 1', 'seeds = [1]', *arms]))
    def there(name): return [o.parent.name.rpartition('-1-')[0] for o in (tmp_path/'out/runs').glob(f'*/{name}')]
    first = shells('fgvc-sweep', '--grid', tmp_path/'grid.toml', '--out', tmp_path/'out')
    assert all(o.code and 'n_fisher=999' in o.err for o in first), first
    assert there('error.txt')==['too-few'] and not there('result.json')
    second = shells('fgvc-sweep', '--grid', tmp_path/'grid.toml', '--out', tmp_path/'out')
    said = second[0].out+second[1].out
    assert there('error.txt')==['too-few'] and there('result.json')==['l2'] and said.count('L2, seed 1')==1
    assert said.count('error.txt')==1                        # where to read why the other one failed

@pytest.mark.parametrize('kw,named', [(dict(bs=3), 'bs=3.*2'), (dict(step='published'), "step='published'")])
def test_what_several_processes_cannot_do(run, monkeypatch, kw, named):
    monkeypatch.setattr('fgvc_fisher.experiment.run.processes', lambda: (2,0))
    with pytest.raises(ValueError, match=named): make_learner(replace(run, **kw), source_model(run.arch, run.weights))

def test_a_part_that_cannot_be_mixed_in_pairs(run, monkeypatch):
    for o in ('experiment.run','learner'): monkeypatch.setattr(f'fgvc_fisher.{o}.processes', lambda: (4,0))
    odd = replace(run, bs=32, fraction=0.75, transforms='published')
    model = source_model(run.arch, run.weights)
    with pytest.raises(ValueError, match='bs=32.*4 processes has 3'): make_learner(odd, model)

def skip(table, folder):
    "Leaves out bad pictures, and writes down which of them this process opened"
    from fgvc_fisher.data import pictures
    _,i = processes()
    opened,open_picture = [],pictures.open_picture
    def counted(path, **kwargs):
        opened.append(path.name)
        return open_picture(path, **kwargs)
    pictures.open_picture = counted
    good, = pictures.skip_bad([table])
    try: pictures.skip_bad([table[:1]])
    except OSError as e: said = str(e)
    found = dict(opened=sorted(opened), good=[o.name for o in good.path], said=said)
    (folder/f'{i}.json').write_text(json.dumps(found))
    shutdown_processes()

def test_one_process_looks_for_bad_pictures(drawn_source, tmp_path):
    table = read_pictures(drawn_source)[:4]
    names = [o.name for o in table.path]
    bad = tmp_path/names[0]
    bad.write_bytes(b'')
    table = table.assign(path=[bad, *table.path[1:]])
    processes = ranks(skip, table, tmp_path)
    succeed(processes)
    first,second = [json.loads((tmp_path/f'{i}.json').read_text()) for i in range(2)]
    assert first['opened']==sorted([*names, names[0]]) and second['opened']==[]
    assert first['good']==second['good']==names[1:]
    assert first['said']==second['said'] and names[0] in first['said']
    assert [o.err.count('skipping 1 of 4') for o in processes]==[1,0]

def test_memory_is_kept_or_nothing_happens(monkeypatch):
    from fgvc_fisher.distributed import workers
    set_options = []
    monkeypatch.setattr(workers.sys, 'platform', 'linux')
    class Glibc:
        def mallopt(self, *pair): set_options.append(pair)
    monkeypatch.setattr(workers.ctypes, 'CDLL', lambda _: Glibc())
    workers.keep_memory()
    assert len(set_options)==2
    monkeypatch.setattr(workers.sys, 'platform', 'win32')
    workers.keep_memory()
    monkeypatch.setattr(workers.sys, 'platform', 'linux')
    for error in (OSError, AttributeError):
        def other(_): raise error('no glibc')
        monkeypatch.setattr(workers.ctypes, 'CDLL', other)
        workers.keep_memory()
    assert len(set_options)==2
