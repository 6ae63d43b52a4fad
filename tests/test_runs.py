"A run that is killed, goes on, and ends as if nothing had happened"
import io, json, math, os, random, re, shutil, time
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, replace
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.callback import fp16
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from filelock import FileLock
from safetensors.torch import load_file, save_file
from fgvc_fisher.data.synthetic import draw_source
from fgvc_fisher.data.tables import pictures_in
from fgvc_fisher.experiment import Run, do_run, fine_tune, grid, load_run, read_grid, sweep, table
from fgvc_fisher.experiment.results import read_errors
from fgvc_fisher.experiment.run import KeepEpochs, check_paths, make_learner, read_run, run_source
from fgvc_fisher.experiment.sweeps import _Progress
from fgvc_fisher.explore.live import Training
from fgvc_fisher.learner import source_model
from forks import Forked
from tiny import network

@pytest.fixture(scope='module')
def run(tiny_run): return tiny_run

@pytest.fixture
def sources(tiny_done):
    "Where runs find the Fisher of `tiny_run`, so that it is not estimated again"
    return tiny_done.parent/'sources'

def bits(folder):
    "What a run leaves, without what depends on the clock"
    row = json.loads((folder/'result.json').read_text())
    curve = pd.read_csv(folder/'curve.csv').drop(columns='seconds')
    return {k: v for k,v in row.items() if k!='seconds'}, curve, (folder/'model.safetensors').read_bytes()

def same(a, b):
    a,b = bits(a),bits(b)
    assert a[0]==b[0]
    pd.testing.assert_frame_equal(a[1], b[1], check_exact=True)
    assert a[2]==b[2]

def until(holds, process, seconds=120):
    "Wait for something that a process brings about; it may also end before"
    end = time.monotonic()+seconds
    while not holds() and process.poll() is None:
        assert time.monotonic()<end
        time.sleep(0.005)

def n_rows(folder):
    "How many epochs a curve has"
    with suppress(FileNotFoundError): return len((folder/'curve.csv').read_text().splitlines())-1
    return 0

def train(run, folder): do_run(run, folder, quiet=True)

# Processes that load pictures have their parent's lock for some seconds after it was killed
@pytest.mark.parametrize('num_workers,kills', [(0,2), pytest.param(1, 1, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_goes_on(run, sources, tmp_path, num_workers, kills):
    run,stopped,left = replace(run, num_workers=num_workers, epochs=4),tmp_path/'stopped',[]
    do_run(run, tmp_path/'whole', sources, quiet=True)
    for i in range(kills):
        process,before = Forked(train, run, stopped),n_rows(stopped)
        if i!=1: until(lambda: n_rows(stopped)>before, process)       # the second time anywhere, also while it begins
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        left.append(sorted(o.name for o in stopped.iterdir()))
        with FileLock(stopped/'lock', timeout=30): pass
    process = Forked(train, run, stopped)
    assert process.wait()==0, (left, process.err)
    same(tmp_path/'whole', stopped)
    assert not (stopped/'checkpoint.pt').exists()
    assert not [*stopped.glob('*.part'), *stopped.glob('epoch-*')]

def test_a_folder_of_a_version_with_fewer_fields_is_resumed(run, tmp_path):
    "A folder that an earlier version began, without the newest fields"
    do_run(replace(run, epochs=1), tmp_path, quiet=True)
    row = json.loads((tmp_path/'run.json').read_text())
    for o in ('tune','fisher_from','n_fisher'): del row[o]
    (tmp_path/'run.json').write_text(json.dumps(row))
    assert do_run(replace(run, epochs=1), tmp_path, quiet=True)['epochs']==1

class Stop(Callback):
    "Stop a training in the middle of a run, at a moment of our choice"
    order = KeepEpochs.order+1
    def __init__(self, event, epoch): self.event,self.at = event,epoch
    def before_epoch(self): self.stop('before_epoch')
    def after_epoch(self): self.stop('after_epoch')
    def after_train(self): self.stop('after_train')
    def stop(self, event):
        if event==self.event and self.epoch==self.at: raise KeyboardInterrupt

def stopped_and_gone_on(run, folder, sources, event, epoch):
    with pytest.raises(KeyboardInterrupt): do_run(run, folder, sources, [Stop(event, epoch)], quiet=True)
    do_run(run, folder, sources, quiet=True)

@pytest.mark.parametrize('event,epoch', [('after_train',0), ('before_epoch',2), ('after_epoch',2)])
def test_stopped_between_any_two_epochs_it_goes_on(run, tiny_done, sources, tmp_path, event, epoch):
    stopped_and_gone_on(run, tmp_path, sources, event, epoch)
    same(tiny_done, tmp_path)

# What a kind of run has of its own is in the checkpoint or made anew, at whatever point it stopped: one point each
@pytest.mark.parametrize('how,event,epoch', [
    (dict(step='grad', beta=0.1, freeze_bn=True), 'before_epoch', 1),
    (dict(recipe='published', transforms='published', step='published', alpha=5e-4, beta=4e-5), 'after_epoch', 0),
    (dict(recipe='strong', beta=0, strength=0.5, train='trainval', valid=''), 'after_train', 1)])
def test_a_run_of_any_kind_goes_on(run, sources, tmp_path, how, event, epoch):
    run = replace(run, epochs=2, **how)
    do_run(run, tmp_path/'whole', sources, quiet=True)
    stopped_and_gone_on(run, tmp_path/'stopped', sources, event, epoch)
    same(tmp_path/'whole', tmp_path/'stopped')

def test_every_epoch_has_an_order_of_its_own(run, sources):
    "And every seed; the same one has the same order each time"
    def orders(run):
        seen = {}
        class Look(Callback):
            def before_batch(self):
                if self.training: seen.setdefault(self.epoch, []).extend(self.yb[0].tolist())
        source = run_source(run, sources, progress=False)
        fine_tune(run, source.model, source.fisher, cbs=[Look()], quiet=True)
        return [tuple(o) for o in seen.values()]
    run = replace(run, epochs=2)
    first,again,other = orders(run),orders(run),orders(replace(run, seed=1))
    assert first==again and len({*first, *other})==4

def test_every_file_comes_by_a_rename(run, sources, tmp_path, monkeypatch):
    "Nobody ever sees half of one: each is written beside, and not touched after it has got its name"
    came,real = {},os.replace
    def stamp(file): return file.stat().st_ino,file.stat().st_mtime_ns
    def replaces(a, b):
        real(a, b)
        came[Path(b)] = stamp(Path(b))
    monkeypatch.setattr(os, 'replace', replaces)
    do_run(run, tmp_path/'run', sources, quiet=True)
    left = {o for o in (tmp_path/'run').iterdir() if o.name!='lock'}
    assert {o.name for o in left}=={'run.json','data.json','curve.csv','model.safetensors','result.json'}
    assert {o: came.get(o) for o in left}=={o: stamp(o) for o in left} and tmp_path/'run/checkpoint.pt' in came
    (tmp_path/'ordinary').touch()                              # safetensors writes for the owner alone
    made = [*left, *sources.glob('*.safetensors')]
    assert any(o.parent==sources for o in made)
    assert {o.stat().st_mode for o in made}=={(tmp_path/'ordinary').stat().st_mode}

def test_half_written_files_do_no_harm(run, tiny_done, sources, tmp_path, monkeypatch):
    def dies(state, file):
        Path(file).write_bytes(b'half')
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, 'save', dies)
    with pytest.raises(KeyboardInterrupt): do_run(run, tmp_path, sources, quiet=True)
    monkeypatch.undo()
    (tmp_path/'checkpoint.pt.0123456789ab.part').write_bytes(b'half')              # what a kill would have left
    do_run(run, tmp_path, sources, quiet=True)
    same(tiny_done, tmp_path)

def test_a_broken_checkpoint_is_named(run, tmp_path):
    (tmp_path/'run').mkdir()
    (tmp_path/'run/checkpoint.pt').write_bytes(b'not a checkpoint')
    with pytest.raises(ValueError, match='checkpoint.pt'): do_run(run, tmp_path/'run', quiet=True)

def test_the_tested_epoch_is_the_one_that_validation_chose(run, sources, tmp_path):
    "Every epoch's weights are kept aside, and the test accuracy is measured on those of the best"
    run,kept = replace(run, epochs=6, lr=0.3),{}
    class Aside(Callback):
        order = KeepEpochs.order+1
        def after_epoch(self): kept[self.epoch] = {k: v.clone() for k,v in self.learn.model.state_dict().items()}
    row = do_run(run, tmp_path/'run', sources, [Aside()], quiet=True)
    curve = pd.read_csv(tmp_path/'run/curve.csv')
    assert row['best_epoch']==curve.accuracy.idxmax() and row['best']==curve.accuracy.max()
    assert row['last']==curve.accuracy.iloc[-1]
    source = source_model('tiny:network', run.weights)
    learn = make_learner(replace(run, valid='test', beta=0), source)
    for name,epoch in (('test', row['best_epoch']), ('test_last', 5)):
        learn.model.load_state_dict(kept[epoch])
        with learn.no_bar(): assert float(learn.validate()[1])==pytest.approx(row[name], abs=1e-7)

def test_each_statistics_see_their_own_normalisation(run, tmp_path):
    "Published transforms normalise otherwise than the source does"
    source = run_source(replace(run, transforms='published'), tmp_path/'sources', progress=False)
    a,b = [next(iter(o))[0] for o in (source.pictures, source.tuned_pictures)]
    from fgvc_fisher.data.transforms import MEAN, STD
    cfg = source.model.pretrained_cfg
    mean,std,published_mean,published_std = [torch.tensor(o).view(3,1,1) for o in (cfg['mean'], cfg['std'], MEAN, STD)]
    a,b = [o.as_subclass(torch.Tensor) for o in (a, b)]
    picture = a*std+mean
    assert torch.allclose(b, (picture-published_mean)/published_std, atol=1e-5)

def test_one_half_estimates_and_the_other_measures(run, tmp_path):
    source = run_source(run, tmp_path, progress=False)
    assert source.fisher.n_images==16==len(source.pictures.dataset)

def test_the_same_values_make_the_same_run():
    "In every process, on every machine, in every version: folders bear these names"
    assert Run('tree', beta=10).id==Run('tree', beta=10.).id=='plain-42-394f6a12'
    assert Run('tree', 'L2', alpha=5e-4, seed=3).id=='l2-3-701a7c3b'

def test_no_validation_is_no_divergence(run, sources, tmp_path):
    row = do_run(replace(run, train='trainval', valid=''), tmp_path/'run', sources, quiet=True)
    assert math.isnan(row['best']) and math.isnan(row['test']) and 0<=row['test_last']<=1      # no epoch was chosen

def test_tables_are_read_once(run, tmp_path, monkeypatch):
    "Also with a test split and a Fisher of the target"
    from fgvc_fisher.experiment import run as module
    read = []
    for name in ('read_data','read_folder'):
        def reads(*args, name=name, real=getattr(module, name)):
            read.append(name)
            return real(*args)
        monkeypatch.setattr(module, name, reads)
    do_run(replace(run, fisher_from='target', epochs=1), tmp_path, quiet=True)
    assert sorted(read)==['read_data','read_folder']

def test_a_missing_split_is_named(run, tmp_path):
    with pytest.raises(ValueError, match='exam'): do_run(replace(run, test='exam'), tmp_path/'run')

# Many runs

@pytest.fixture
def runs(run):
    common = {k: v for k,v in asdict(run).items() if k not in ('arm','beta','seed')} | dict(epochs=2)
    return grid([dict(arm='plain'), dict(arm='L2-SP-Fisher', beta=10)], seeds=[1,2], **common)

def do_sweep(runs, out, jobs=1): sweep(runs, out, jobs, quiet=True)

def test_two_processes_share_the_work(runs, tmp_path):
    processes = [Forked(do_sweep, runs, tmp_path, threads=1) for _ in range(2)]
    assert [o.wait() for o in processes]==[0,0], [o.err for o in processes]
    said = [o for p in processes for o in p.out.splitlines()]
    did = {run.id: {o for o in said if o.startswith(f'{run.arm}, seed {run.seed}')} for run in runs}
    assert all(len(o)==1 for o in did.values()), did                     # done once: both tell of the same result

def test_a_killed_one_is_taken_over(runs, tmp_path):
    first = Forked(do_sweep, runs, tmp_path, threads=1)
    until(lambda: list(tmp_path.glob('runs/*/checkpoint.pt')), first)
    second = Forked(do_sweep, runs, tmp_path, threads=1)
    first.kill()
    assert second.wait()==0, second.err
    assert len(list(tmp_path.glob('runs/*/result.json')))==len(runs)

def test_what_fails_is_recorded_and_the_rest_goes_on(run, runs, tmp_path, capsys):
    bad = replace(run, arm='bad', weights=str(tmp_path/'missing.safetensors'))
    rows = sweep([bad, *runs[:1]], tmp_path/'out', quiet=True)
    error = tmp_path/'out/runs'/bad.id/'error.txt'
    assert rows.arm.tolist()==['plain'] and rows.attrs['failed']==1 and bad.weights in error.read_text()
    assert str(error) in capsys.readouterr().out
    written = error.stat().st_mtime_ns
    sweep([bad], tmp_path/'out', quiet=True)
    assert error.stat().st_mtime_ns==written                                             # not tried again by itself
    save_file(load_file(run.weights), bad.weights)
    assert len(sweep([bad], tmp_path/'out', retry=True, quiet=True))==1 and not error.exists()

def test_a_line_is_printed_in_a_quiet_training(runs, tmp_path, capsys):
    "Another run ends while this process is training"
    one,other = runs[:2]
    progress = _Progress([one, other], tmp_path/'out', quiet=True)
    do_run(other, tmp_path/'out/runs'/other.id, tmp_path/'out/sources', quiet=True)
    with redirect_stdout(io.StringIO()): progress()
    assert f'{other.arm}, seed {other.seed}: ' in capsys.readouterr().out

def test_invalid_arguments_of_a_sweep(runs, tmp_path):
    with pytest.raises(ValueError, match='jobs=0'): sweep(runs, tmp_path, jobs=0)
    for wrong in ([], [dict(arm='a')], 'runs'):
        with pytest.raises(ValueError, match='runs'): sweep(wrong, tmp_path)

@pytest.mark.parametrize('track', ['tensorboard', 'wandb'])
def test_trackers(track, runs, tmp_path, monkeypatch):
    pytest.importorskip(track)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    sweep([replace(runs[0], epochs=1)], tmp_path, track=track, quiet=True)
    assert not list(tmp_path.glob('runs/*/error.txt'))
    assert [o for o in (tmp_path/track).rglob('*') if o.is_file() and o.stat().st_size>100]

def test_an_unknown_tracker_is_refused(runs, tmp_path):
    with pytest.raises(ValueError, match='excel'): sweep(runs, tmp_path, track='excel')

@pytest.mark.parametrize('text,named', [('data = "a"', r'\[\[arm\]\]'), ('[[arm]]\narm="a"', 'data'),
    ('data = "a"\nfoo = 1\n[[arm]]\narm="a"', 'foo'), ('data = "a"\n[[arm]]\nbeta=1', 'arm'),
    ('data = "a"\nseeds = 3\n[[arm]]\narm="a"', 'seeds = 3'),
    ('data = "a"\n[[arm]]\narm="a"\nbeta="strong"', 'strong')])
def test_a_bad_grid_is_named(text, named, tmp_path):
    (tmp_path/'grid.toml').write_text(text)
    with pytest.raises(ValueError, match=f'grid.toml.*{named}'): read_grid(tmp_path/'grid.toml')

# Mixed precision, as on the T4, with the processor's own float16

def test_half_precision_and_channels_last(run, sources, tmp_path, autocast_on_cpu, monkeypatch):
    seen = []
    monkeypatch.setattr(fp16, 'GradScaler', lambda device, **kw: torch.amp.GradScaler('cpu', init_scale=1024., **kw))
    class Look(Callback):
        order = 5
        def after_pred(self):
            last = self.model.conv2.weight.is_contiguous(memory_format=torch.channels_last)
            if self.training: seen.append((self.pred.dtype, last))
    run = replace(run, amp=True, recipe='published', transforms='published', epochs=2)
    row = do_run(run, tmp_path/'run', sources, [Look()], quiet=True)
    assert math.isfinite(row['last']) and set(seen)=={(torch.float16, True)}

def test_autocast_ends_with_a_batch_that_fails(run, autocast_on_cpu):
    "A sweep goes on with its next run in the same process, which may be in float32"
    class Fails(Callback):
        def after_pred(self): raise RuntimeError('out of memory')
    with pytest.raises(RuntimeError, match='out of memory'):
        fine_tune(replace(run, beta=0, amp=True), source_model(run.arch, run.weights), cbs=[Fails()], quiet=True)
    assert not torch.is_autocast_enabled('cpu')

def test_the_scale_is_taken_up_again(run, sources, tmp_path, autocast_on_cpu, monkeypatch):
    def scaler(device, **kw): return torch.amp.GradScaler('cpu', init_scale=64., growth_interval=2, **kw)
    monkeypatch.setattr(fp16, 'GradScaler', scaler)
    run = replace(run, amp=True, epochs=2)
    do_run(run, tmp_path/'whole', sources, quiet=True)
    with pytest.raises(KeyboardInterrupt):
        do_run(run, tmp_path/'stopped', sources, [Stop('after_epoch', 0)], quiet=True)
    assert torch.load(tmp_path/'stopped/checkpoint.pt', weights_only=True)['scaler']['scale']>64
    do_run(run, tmp_path/'stopped', sources, quiet=True)
    same(tmp_path/'whole', tmp_path/'stopped')

# What a reviewer found

def test_a_run_that_diverges_at_once_does_not_end_the_sweep(run, runs, tmp_path, capsys):
    wild = replace(run, arm='wild', lr=1e20)
    rows = sweep([wild, runs[0]], tmp_path, quiet=True)
    assert rows.arm.tolist()==['wild','plain'] and math.isnan(rows['last'][0]) and rows['last'][1]>=0
    assert re.search(r'wild.*42.*diverge', capsys.readouterr().out)

@pytest.mark.parametrize('callback,match', [
    (lambda: EarlyStoppingCallback('accuracy', min_delta=1., patience=1), 'epoch 1.*of 3'),
    (lambda: SaveModelCallback('train_loss'), 'changed the weights')])
def test_a_callback_that_does_not_fit_a_run(callback, match, run, tiny_done, sources, tmp_path):
    "No divergence is recorded, and nothing is lost. What a callback writes is in the run's folder"
    with pytest.raises(ValueError, match=match): do_run(run, tmp_path, sources, callback(), quiet=True)
    do_run(run, tmp_path, sources, CSVLogger(), quiet=True)
    assert (tmp_path/'history.csv').exists()
    same(tiny_done, tmp_path)

def test_a_tilde_is_the_home_folder(run, tiny_done, tilde, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_done, tmp_path/'out/runs'/run.id)
    assert len(sweep([run], '~/out', quiet=True))==len(table('~/out'))==1
    assert do_run(run, f'~/out/runs/{run.id}', quiet=True)['id']==read_run(f'~/out/runs/{run.id}').id
    assert Training('~/out').known()
    assert load_run(f'~/out/runs/{run.id}') and draw_source('~/drawn', 2, 1, 48)==tmp_path/'drawn'
    assert not (tmp_path/'~').exists()

def test_the_same_run_under_other_paths(run, tiny_done, tmp_path, monkeypatch):
    "As from another working directory: it is not done a second time"
    shutil.copytree(tiny_done, tmp_path/'out/runs'/run.id)
    monkeypatch.chdir(Path(run.data).parent)
    relative = replace(run, data=Path(run.data).name)
    for other,said in ((relative, f'data = {run.data!r} instead of {relative.data!r}'),
                       (replace(run, num_workers=1), 'num_workers = 0 instead of 1')):
        with pytest.raises(ValueError, match=f'{run.id}.*{said}'): sweep([run, other], tmp_path/'out', quiet=True)
    for other in (run, replace(run, data='nowhere'), replace(relative, weights=False), replace(relative, lr=0.1)):
        check_paths([other], tmp_path/'out')

def test_what_a_dying_process_left_is_tidied_up(run, tiny_done, tmp_path):
    folder = tmp_path/'runs'/run.id
    shutil.copytree(tiny_done, folder)
    for o in ('checkpoint.pt','epoch-0.safetensors'): (folder/o).write_bytes(b'left')
    sweep([run], tmp_path, quiet=True)
    left = {'lock','run.json','data.json','curve.csv','model.safetensors','result.json'}
    assert {o.name for o in folder.iterdir()}==left

def test_the_curve_is_whole_where_the_checkpoint_is(run, tiny_done, sources, tmp_path, monkeypatch):
    "Killed right after the last checkpoint"
    real,checkpoints = os.replace,[]
    def dies(a, b):
        real(a, b)
        if Path(b).name=='checkpoint.pt': checkpoints.append(n_rows(tmp_path))
        if len(checkpoints)==run.epochs: raise KeyboardInterrupt
    monkeypatch.setattr(os, 'replace', dies)
    with pytest.raises(KeyboardInterrupt): do_run(run, tmp_path, sources, quiet=True)
    monkeypatch.undo()
    assert checkpoints==[1,2,3]
    do_run(run, tmp_path, sources, quiet=True)
    same(tiny_done, tmp_path)

@pytest.mark.parametrize('wrong,named', [
    (dict(size='32'), "size='32'"), (dict(epochs=4.0), 'epochs=4.0'), (dict(epochs=0), 'epochs=0'),
    (dict(freeze_bn='false'), "freeze_bn='false'"), (dict(lr=float('nan')), 'lr=nan'), (dict(lr=-1), 'lr=-1'),
    (dict(kind='nope'), "kind='nope'"), (dict(beta=-1), 'beta=-1'), (dict(weights=1), 'weights=1'),
    (dict(valid='', test=''), 'valid'), (dict(recipe='strong', transforms='published'), "recipe='strong'"),
    (dict(step='published', freeze_bn=True), "step='published'"), (dict(num_workers=1.5), 'num_workers=1.5'),
    (dict(num_workers=-1), 'num_workers=-1'), (dict(seed=-1), 'seed=-1'),
    (dict(data=['a','b']), 'data='), (dict(weights=''), "weights=''")])
def test_nonsense_is_refused_at_once(wrong, named):
    with pytest.raises(ValueError, match=re.escape(named)): Run(**dict(data='tree') | wrong)

def test_numbers_of_numpy_are_numbers():
    import numpy as np
    a = Run('tree', seed=np.int64(3), beta=np.float32(10), size=np.int32(64), freeze_bn=np.bool_(True))
    b = Run('tree', seed=3, beta=10, size=64, freeze_bn=True)
    assert a==b and a.id==b.id and Run(Path('tree'), beta=-0.).id==Run('tree').id

@pytest.mark.parametrize('arms,common,named', [
    ([dict(arm='a', seed=5)], {}, 'seed'), ([dict(arm='a')], dict(seed=7), 'seed'),
    ([dict(arm='a', beta=[])], {}, 'beta'), ([dict(arm=['a','b'])], {}, r"\['a', 'b'\]"), (['a'], {}, "'a'"),
    ([dict(arm='a'), dict(arm='a', beta=1)], {}, "'a'.* 1 "),
    ([dict(arm='a')], dict(size=[32,64]), r'size=\[32, 64\]')])
def test_invalid_grids(arms, common, named):
    with pytest.raises(ValueError, match=named): grid(arms, [1], data='tree', **common)

def test_strengths_have_names_of_their_own():
    arm = dict(arm='a', beta=[1.0000001, 1.0000002, 10], freeze_bn=[True,False])
    names = [o.arm for o in grid([arm], [1], data='tree')]
    assert len(set(names))==6 and 'a, beta = 10, freeze_bn = True' in names

def test_a_wrong_first_call_leaves_the_folder_free(run, sources, tmp_path):
    with pytest.raises(FileNotFoundError): do_run(replace(run, data='nowhere'), tmp_path/'run')
    with pytest.raises(ValueError, match='split'): do_run(replace(run, test='train'), tmp_path/'run')
    do_run(run, tmp_path/'run', sources, quiet=True)

def test_one_process_at_a_folder(run, tmp_path):
    with FileLock(tmp_path/'lock'), pytest.raises(ValueError, match=re.escape(str(tmp_path))): do_run(run, tmp_path)

@pytest.mark.parametrize('name', ['result.json', 'run.json'])
def test_a_broken_file_is_named(run, tiny_done, tmp_path, name):
    shutil.copytree(tiny_done, tmp_path/'run')
    (tmp_path/'run'/name).write_text('{"half')
    with pytest.raises(ValueError, match=name): do_run(run, tmp_path/'run')

def test_other_weights_in_the_same_file_have_another_fisher(run, tmp_path):
    file = tmp_path/'w.safetensors'
    there = []
    for seed in (0,1):
        torch.manual_seed(seed)
        save_file(network(num_classes=4).state_dict(), file)
        there.append(run_source(replace(run, weights=str(file)), tmp_path/'sources', progress=False).fisher)
    assert not torch.equal(there[0]['fc.weight'], there[1]['fc.weight'])

def test_helpers_end_with_their_parent(runs, tmp_path):
    parent = Forked(do_sweep, [replace(o, epochs=10_000) for o in runs], tmp_path, 2)
    until(lambda: len(list(tmp_path.glob('runs/*/checkpoint.pt')))==2, parent)
    parent.kill()
    for o in tmp_path.glob('runs/*/lock'):
        with FileLock(o, timeout=20): pass                              # who is at work at a run has its lock

def test_a_full_disk_ends_the_sweep_in_a_sentence(runs, tmp_path, monkeypatch):
    import errno
    def full(state, file):
        Path(file).write_bytes(b'half')
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(OSError, match='disk is full'): sweep(runs, tmp_path, quiet=True)
    assert not list(tmp_path.glob('runs/*/*.part')) and not list(tmp_path.glob('runs/*/error.txt'))

class TestWhatIsTrained:
    "`tune`: all layers, the head, or the head first"
    def test_the_head_alone_moves(self, run):
        run = replace(run, beta=0, tune='head', epochs=2)
        source = source_model(run.arch, run.weights)
        learn = fine_tune(run, source, quiet=True)
        own,tuned = source.state_dict(),learn.model.state_dict()
        moved = {k for k in own if k not in tuned or own[k].shape!=tuned[k].shape or not torch.equal(own[k], tuned[k])}
        assert moved=={'fc.weight','fc.bias'}                         # and none of BatchNorm's statistics
        started = make_learner(run, source).model.state_dict()
        assert not torch.equal(started['fc.weight'], tuned['fc.weight'])

    def test_head_first_is_a_probe_and_then_a_training(self, run):
        "The body's first gradients come through a head that an epoch has taught"
        run = replace(run, beta=0, tune='head first', epochs=2)
        source,heads = source_model(run.arch, run.weights),[]
        class Look(Callback):
            def before_epoch(self):
                trained = [p.requires_grad for p in self.model.parameters()]
                heads.append((self.model.fc.weight.detach().clone(), trained))
        learn = fine_tune(run, source, cbs=[Look()], quiet=True)
        probe = replace(run, tune='head', epochs=1)
        taught = make_learner(probe, source)
        taught.freeze()
        with taught.no_bar(), taught.no_logging(): taught.fit_one_cycle(1, run.lr)
        assert len(heads)==len(learn.keep_epochs.rows)==2 and all(heads[0][1])
        assert torch.equal(heads[0][0], taught.model.fc.weight)

    @pytest.mark.parametrize('tune', ['head','head first'])
    def test_it_goes_on(self, run, tmp_path, tune):
        run = replace(run, beta=0, tune=tune, epochs=2)
        source = source_model(run.arch, run.weights)
        with pytest.raises(KeyboardInterrupt):
            fine_tune(run, source, folder=tmp_path, cbs=[Stop('before_epoch', 1)], quiet=True)
        assert n_rows(tmp_path)==1
        whole,resumed = fine_tune(run, source, quiet=True),fine_tune(run, source, folder=tmp_path, quiet=True)
        for p,q in zip(whole.model.state_dict().values(), resumed.model.state_dict().values()): assert torch.equal(p, q)

class TestWhoseFisher:
    def fisher(self, run, tmp_path): return run_source(run, tmp_path, progress=False).fisher
    def test_of_the_target(self, run, tmp_path):
        "The source model on the training split, with labels that it draws itself"
        from fgvc_fisher.data import pick_split, read_aircraft
        from fgvc_fisher.fisher import estimate_fisher
        from fgvc_fisher.learner import channels_last, source_dl
        model = channels_last(source_model(run.arch, run.weights), run.size)
        pictures = pick_split(read_aircraft(run.data), 'train')
        want = estimate_fisher(model, source_dl(pictures, model, run.size, run.bs, 0), progress=False)
        found = self.fisher(replace(run, fisher_from='target'), tmp_path)
        assert found.n_images==want.n_images and all(torch.equal(found[k], want[k]) for k in want)
        assert self.fisher(replace(run, fisher_from='target', source=''), tmp_path) is not None

    def test_of_some_pictures(self, run, tmp_path):
        a,b,c = [self.fisher(replace(run, n_fisher=5, seed=s), tmp_path) for s in (1,1,2)]
        name = 'conv1.weight'
        assert a.n_images==c.n_images==5 and torch.equal(a[name], b[name]) and not torch.equal(a[name], c[name])
        assert len(list(tmp_path.glob('*.safetensors')))==2
        with pytest.raises(ValueError, match='n_fisher=1000000'): self.fisher(replace(run, n_fisher=10**6), tmp_path)

    def test_another_kind_another_file(self, run, tmp_path):
        target = replace(run, fisher_from='target')
        asked = [run, replace(run, kind='exact'), target, replace(run, n_fisher=5), replace(target, n_fisher=5)]
        for o in asked: self.fisher(o, tmp_path)
        assert len(list(tmp_path.glob('*.safetensors')))==len(asked)

    def test_invalid_fields(self, run):
        for kw,named in [(dict(n_fisher=-1), 'n_fisher=-1'), (dict(tune='body'), "tune='body'"),
                         (dict(tune='head'), "tune='head'"),
                         (dict(fisher_from='target', kind='empirical'), 'empirical'),
                         (dict(tune='head first', recipe='published', transforms='published'), "tune='head first'")]:
            with pytest.raises(ValueError, match=named): replace(run, **kw)

def test_a_strength_is_a_beta(run, tmp_path):
    "strength is beta times the mean of F: one frontier, other names for its points"
    source = run_source(run, tmp_path, progress=False)
    shared = [n for n,p in source.model.named_parameters() if not n.startswith('fc.')]
    mean = sum(source.fisher[n].double().sum() for n in shared)/sum(source.fisher[n].numel() for n in shared)
    a = fine_tune(replace(run, beta=0., strength=2.), source.model, source.fisher, quiet=True).model
    b = fine_tune(replace(run, beta=2./mean.item()), source.model, source.fisher, quiet=True).model
    for p,q in zip(a.parameters(), b.parameters()): assert torch.allclose(p, q, atol=1e-5, rtol=1e-4)

class TestDataThatChange:
    "A folder knows which data its run is of"
    @pytest.fixture
    def flowers(self, drawn_source, tmp_path):
        for i,o in enumerate(pictures_in(drawn_source)[:15]):
            (tmp_path/f'flowers/{"abc"[i%3]}').mkdir(parents=True, exist_ok=True)
            shutil.copy(o, tmp_path/f'flowers/{"abc"[i%3]}/{i}{o.suffix}')
        return tmp_path/'flowers'

    @pytest.fixture
    def small(self, flowers):
        return Run(flowers, arch='tiny:network', weights=False, size=32, bs=4, epochs=2, num_workers=0)

    def change(self, flowers, how):
        if how=='new':
            shutil.copytree(flowers/'a', flowers/'d')
            for i,o in enumerate((flowers/'d').iterdir()): o.write_bytes(o.read_bytes()+bytes([i]))
        if how=='renamed': (flowers/'a').rename(flowers/'z')
        if how=='fewer': next((flowers/'b').iterdir()).unlink()

    def test_a_run_is_not_resumed_with_other_data(self, small, flowers, tmp_path):
        with pytest.raises(KeyboardInterrupt):
            do_run(small, tmp_path/'run', cbs=[Stop('after_epoch', 0)], quiet=True)
        shutil.copytree(flowers, tmp_path/'first')
        for how,said in (('new', "new class 'd'"), ('renamed', "without the class 'a'.*new class 'z'"),
                         ('fewer', 'pictures in')):
            self.change(flowers, how)
            with pytest.raises(ValueError, match=f'{said}.*another folder'): do_run(small, tmp_path/'run', quiet=True)
            shutil.rmtree(flowers)
            shutil.copytree(tmp_path/'first', flowers)

    @pytest.mark.parametrize('done', [False, True])
    def test_what_it_rests_on(self, small, flowers, drawn_source, tmp_path, done):
        "Weights and pictures that are replaced under the same names are noticed"
        weights,source = tmp_path/'w.safetensors',tmp_path/'source'
        model = network(num_classes=6)
        save_file(model.state_dict(), weights)
        shutil.copytree(drawn_source, source)
        run = replace(small, weights=str(weights), source=str(source))
        with suppress(KeyboardInterrupt):
            do_run(run, tmp_path/'run', cbs=[] if done else [Stop('after_epoch', 0)], quiet=True)
        for file,said in ((weights, 'other pretrained weights'), (pictures_in(source)[0], 'other source pictures'),
                          (pictures_in(flowers)[0], 'pictures of other sizes')):
            before = file.read_bytes()
            if file==weights: save_file({k: v+1 for k,v in model.state_dict().items()}, weights)
            else: file.write_bytes(before+b'0')
            with pytest.raises(ValueError, match=f'{said}.*another folder'): do_run(run, tmp_path/'run', quiet=True)
            file.write_bytes(before)

    def test_the_same_data_elsewhere_and_written_otherwise(self, small, flowers, tmp_path, monkeypatch):
        "And the options that do not matter may change"
        monkeypatch.chdir(tmp_path)
        with pytest.raises(KeyboardInterrupt):
            do_run(replace(small, data='flowers'), 'run', cbs=[Stop('after_epoch', 0)], quiet=True)
        flowers.rename(tmp_path/'moved')
        moved = replace(small, data=f'{tmp_path}/moved/', num_workers=1, on_bad='skip')
        last = do_run(moved, 'run', quiet=True)['last']
        assert read_run('run').data==f'{tmp_path}/moved/'
        assert last==do_run(replace(small, data='moved'), 'alone', quiet=True)['last']

    def test_a_run_that_is_done(self, small, flowers, tmp_path, capsys):
        row = do_run(small, tmp_path/'run', quiet=True)
        capsys.readouterr()
        assert do_run(small, tmp_path/'run')==row and f"{tmp_path/'run'}: done before" in capsys.readouterr().out
        assert do_run(small, tmp_path/'run', quiet=True)==row and not capsys.readouterr().out
        self.change(flowers, 'new')
        with pytest.raises(ValueError, match="new class 'd'"): do_run(small, tmp_path/'run')
        shutil.rmtree(flowers)
        assert do_run(small, tmp_path/'run')==row

    def test_a_folder_of_an_earlier_version(self, small, flowers, tmp_path):
        row = do_run(small, tmp_path/'run', quiet=True)
        (tmp_path/'run/data.json').unlink()
        self.change(flowers, 'new')
        assert do_run(small, tmp_path/'run', quiet=True)==row and not (tmp_path/'run/data.json').exists()

    def test_a_sweep_does_nothing(self, small, flowers, tmp_path):
        runs = [small, replace(small, arm='b')]
        found = sweep(runs[:1], tmp_path/'out', quiet=True)
        assert sweep(runs[:1], tmp_path/'out', quiet=True).equals(found)
        self.change(flowers, 'new')
        with pytest.raises(ValueError, match="new class 'd'"): sweep(runs, tmp_path/'out', quiet=True)
        assert len(list(tmp_path.glob('out/runs/*')))==1
        shutil.rmtree(flowers)
        assert sweep(runs[:1], tmp_path/'out', quiet=True).equals(found)

    def test_a_failed_run_is_listed(self, small, tmp_path):
        sweep([replace(small, data='nowhere')], tmp_path/'out', quiet=True)
        assert 'nowhere' in read_errors(tmp_path/'out').error[0]

    def test_a_refused_run_leaves_nothing_in_a_folder_that_was_there(self, small, tmp_path):
        (tmp_path/'run').mkdir()
        with pytest.raises(FileNotFoundError): do_run(replace(small, data='nowhere'), tmp_path/'run')
        assert {o.name for o in (tmp_path/'run').iterdir()}<={'lock'}

def test_other_source_pictures_have_another_fisher(run, tmp_path):
    shutil.copytree(run.source, tmp_path/'source')
    run = replace(run, source=str(tmp_path/'source'))
    def made(): return {o.name for o in tmp_path.glob('shared/*') if o.suffix!='.lock'}
    run_source(run, tmp_path/'shared', progress=False)
    first = made()
    run_source(run, tmp_path/'shared', progress=False)
    assert made()==first and len(first)==2
    file = pictures_in(tmp_path/'source')[0]
    file.write_bytes(file.read_bytes()+b'0')
    run_source(run, tmp_path/'shared', progress=False)
    assert len(made())==4

def test_a_fisher_of_the_target_belongs_to_its_training_split(run, tmp_path):
    "With a validation split held out, or without one"
    pictures = pictures_in(run.source)
    table = pd.DataFrame(dict(path=pictures, label=['a','b']*(len(pictures)//2),
                              split=['train']*(len(pictures)-4)+['test']*4))
    table.to_csv(tmp_path/'pictures.csv', index=False)
    run = replace(run, data=str(tmp_path/'pictures.csv'), fisher_from='target', source='', n_fisher=3)
    runs = [run, replace(run, valid='')]
    found = [run_source(o, tmp_path/'shared', progress=False).fisher for o in runs]
    assert len(list(tmp_path.glob('shared/*.safetensors')))==2 and runs[0].fisher_pictures!=runs[1].fisher_pictures
    assert all(o.n_images==3 for o in found)

def test_a_line_without_validation_has_the_right_names(run, sources, tmp_path, capsys):
    do_run(replace(run, train='trainval', valid='', epochs=1), tmp_path, sources)
    said = capsys.readouterr().out
    assert re.search(r'^epoch 0, train_loss [\d.e+-]+, time \d+:\d+$', said, re.M)
    assert list(pd.read_csv(tmp_path/'curve.csv'))==['epoch','train_loss','seconds']

def test_a_batch_of_one_is_named(run):
    with pytest.raises(ValueError, match='^bs=1: BatchNorm'):
        fine_tune(replace(run, beta=0., bs=1, size=4), source_model(run.arch, run.weights), quiet=True)

def test_a_rate_that_the_recipe_ignores(tmp_path):
    (tmp_path/'grid.toml').write_text('data = "a"\nlr = 0.1\n[[arm]]\narm = "a"\nrecipe = "published"')
    with pytest.raises(ValueError, match="grid.toml: lr=0.1: recipe='published'"): read_grid(tmp_path/'grid.toml')
    with pytest.raises(ValueError, match="^lr=0.1: recipe='published'"): Run('a', recipe='published', lr=0.1)

def test_strengths_and_seeds_in_arrays():
    runs = grid([dict(arm='A', strength=np.array([0.25,1.]))], np.arange(2), data='x')
    found = [(o.arm, o.strength, o.seed) for o in runs[:3]]
    assert found==[('A, strength = 0.25', 0.25, 0), ('A, strength = 1', 1., 0), ('A, strength = 0.25', 0.25, 1)]
    with pytest.raises(ValueError, match=r'seeds=5.*\[42, 43\]'): grid([dict(arm='A')], 5, data='x')
    with pytest.raises(ValueError, match='strength=array'): Run('x', strength=np.array([0.25,1.]))
    with pytest.raises(ValueError, match='list of runs'): sweep(Run('x'), 'out')
