"A run that two processes do together: one result, one writer, one bar; one that dies takes the other with it, and nothing is lost"
import json, os, signal, subprocess, sys, time
from dataclasses import asdict, replace
from pathlib import Path
import pandas as pd, pytest, timm, torch
from safetensors.torch import save_file
from fgvc_fisher.fisher import DiagFisher
from fgvc_fisher.learner import source_model
from fgvc_fisher.retention import accuracy_on
from fgvc_fisher.runs import Run, do_run, load_run, make_learner

BIN = Path(sys.executable).parent
DO = """
import hashlib, json, sys, torch
from fastai.callback.core import Callback
from fgvc_fisher.processes import part, processes
from fgvc_fisher.runs import KeepEpochs, Run, do_run
run,folder,spoil = Run(**json.loads(sys.argv[1])),sys.argv[2],sys.argv[3]=='spoil'
_,i = processes()
class Watch(Callback):
    "Writes down the parameters after every step, behind the penalty's own"
    order = KeepEpochs.order+1
    def after_loss(self):
        if spoil and i and self.train_iter==3: self.learn.loss_grad,self.learn.loss = self.loss_grad*torch.nan,self.loss*torch.nan
    def after_batch(self):
        if not self.training: return
        bits = b''.join(p.detach().numpy().tobytes() for p in self.learn.model.parameters())
        penalty = next(o.penalty for o in self.learn.cbs if hasattr(o, 'penalty'))
        print(hashlib.sha256(bits).hexdigest(), penalty.value().item(), flush=True, file=open(f'{folder}-{i}.steps', 'a'))
row = do_run(run, folder, cbs=[Watch()], quiet=True)
sys.stdout.write(f"{i} {row['last']}\\n")
sys.stdout.flush()
part()
"""

@pytest.fixture(scope='module')
def run(drawn, drawn_source, tmp_path_factory):
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp('weights')/'w.safetensors'
    save_file(timm.create_model('test_resnet', num_classes=4).state_dict(), file)
    return Run(drawn, 'L2-SP-Fisher, beta = 10', beta=10, arch='test_resnet', weights=str(file), source=drawn_source, test='test', size=32, bs=4, epochs=3, num_workers=0)

def start(run, folder, how='', **kwargs):
    folder.parent.joinpath('do.py').write_text(DO)
    command = [BIN/'torchrun', '--nproc-per-node', '2', folder.parent/'do.py', json.dumps(asdict(run)), folder, how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ|{'OMP_NUM_THREADS': '1'}, **kwargs)

@pytest.fixture(scope='module')
def together(run, tmp_path_factory):
    "The folder of a run that two processes have done"
    folder = tmp_path_factory.mktemp('together')/'run'
    process = start(run, folder)
    out,err = process.communicate()
    assert process.returncode==0, err[-3000:]
    return folder

def test_both_take_the_same_steps(together):
    steps = [Path(f'{together}-{i}.steps').read_text().splitlines() for i in range(2)]
    assert len(steps[0])==3*4 and steps[0]==steps[1] and len(set(steps[0]))==12

def test_the_numbers_are_those_of_one_process(run, together, tmp_path):
    alone = do_run(run, tmp_path/'run', quiet=True)
    there = json.loads((together/'result.json').read_text())
    assert there['before']==alone['before'] and there['machine'].startswith('2 processes') and len(pd.read_csv(together/'curve.csv'))==3
    one,two = [DiagFisher.load(next((o/'sources').glob('*.safetensors') if (o/'sources').exists() else o.glob('*sampled*.safetensors'))) for o in (tmp_path/'run', together)]
    for k,v in one.items(): torch.testing.assert_close(two[k], v, rtol=1e-6, atol=1e-6*v.max().item())
    assert one.n_images==two.n_images
    learn = load_run(run, together, source_model(run.arch, run.weights))
    assert there['last']==pytest.approx(accuracy_on(learn.model, learn.dls.valid), abs=1e-12)

def leaves(pid):
    "The two workers below torchrun, by their number"
    found = {}
    for o in Path('/proc').glob('[0-9]*/environ'):
        try: env = dict(v.split('=', 1) for v in o.read_text().split('\0') if '=' in v)
        except OSError: continue
        if Path(f'/proc/{o.parent.name}/stat').read_text().rsplit(')', 1)[1].split()[1]==str(pid) and 'RANK' in env: found[env['RANK']] = int(o.parent.name)
    return found

@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='looks for processes in /proc')
def test_one_that_dies_ends_the_run_and_loses_nothing(run, together, tmp_path):
    folder = tmp_path/'run'
    process = start(run, folder)
    while not (folder/'checkpoint.pt').exists() and process.poll() is None: time.sleep(0.02)
    os.kill(leaves(process.pid)['1'], signal.SIGKILL)
    killed = time.monotonic()
    process.communicate(timeout=60)
    assert process.returncode!=0 and time.monotonic()-killed<60
    assert 1<=len(torch.load(folder/'checkpoint.pt')['rows'])<=3 and not (folder/'result.json').exists()
    process = start(run, folder)
    out,err = process.communicate()
    assert process.returncode==0, err[-3000:]
    assert (folder/'model.safetensors').read_bytes()==(together/'model.safetensors').read_bytes()
    a,b = [pd.read_csv(o/'curve.csv').drop(columns='seconds') for o in (folder, together)]
    pd.testing.assert_frame_equal(a, b, check_exact=True)

def test_a_loss_that_is_no_number_in_one_ends_both(run, tmp_path):
    process = start(run, tmp_path/'run', 'spoil')
    out,err = process.communicate(timeout=120)
    assert process.returncode==0, err[-3000:]
    assert sorted(out.split())==['0','1','nan','nan']

def test_the_command_with_one_bar_and_one_table(run, tmp_path):
    "By accelerate's own starter, which takes CPUs for GPUs here"
    command = [BIN/'accelerate', 'launch', '--multi_gpu', '--num_processes', '2', '--no_python', BIN/'fgvc-finetune', '--data', run.data, '--arch', 'test_resnet', '--weights',
               run.weights, '--source', run.source, '--size', '32', '--bs', '4', '--epochs', '2', '--out', tmp_path/'out']
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, env=os.environ|dict(OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true'))
    assert done.returncode==0, done.stderr[-3000:]
    assert done.stdout.count('train_loss')==1 and done.stdout.count('Written to')==1 and done.stdout.count('L2SPFisherCallback:')==1
    assert json.loads((tmp_path/'out/result.json').read_text())['machine'].startswith('2 processes')

def test_a_sweep_ends_with_a_run_that_fails_and_goes_on_with_the_rest(run, tmp_path):
    common = [f"{o} = {json.dumps(getattr(run, o))}" for o in ('data','source','arch','weights','size','bs','num_workers')]
    arms = ['[[arm]]','arm = "too few"','beta = 1','n_fisher = 999', '[[arm]]','arm = "L2"','alpha = 0.001']
    (tmp_path/'grid.toml').write_text('\n'.join([*common, 'epochs = 1', 'seeds = [1]', *arms]))
    command = [*map(str, (BIN/'torchrun', '--nproc-per-node', '2', '--no-python', BIN/'fgvc-sweep', '--grid', tmp_path/'grid.toml', '--out', tmp_path/'out'))]
    first,second = [subprocess.run(command, capture_output=True, text=True, env=os.environ|dict(OMP_NUM_THREADS='1')) for _ in range(2)]
    assert first.returncode and 'source pictures for the Fisher' in first.stderr and '2 runs, 0 of them done before' in first.stdout
    assert second.stdout.count('2 runs, 1 of them done before')==1 and second.stdout.count('L2, seed 1: best')==1 and second.stdout.count('1 of 2 runs failed')==1
    assert len(list((tmp_path/'out/runs').glob('*/result.json')))==1 and len(list((tmp_path/'out/runs').glob('*/error.txt')))==1

@pytest.mark.parametrize('kw,said', [(dict(bs=3), 'bs=3: 2 processes cannot share a batch alike; choose a multiple of 2'), (dict(step='published'), 'start one process')])
def test_what_several_processes_cannot_do(run, monkeypatch, kw, said):
    monkeypatch.setattr('fgvc_fisher.runs.processes', lambda: (2,0))
    with pytest.raises(ValueError, match=said): make_learner(replace(run, **kw), source_model(run.arch, run.weights))
