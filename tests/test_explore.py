"The five panels without a browser; `make test-ipywidgets7` runs those marked `widgets` with Colab's ipywidgets"
import copy, io, math, os, re
from dataclasses import asdict, replace
from datetime import datetime, timezone
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from matplotlib import rcParams
from matplotlib.font_manager import findfont, get_font
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset
from fgvc_fisher.explore import classifier as classifier_panel, fisher as fisher_panel, live, panels
from fgvc_fisher.explore import penalty as penalty_panel, published, training as training_panel
from fgvc_fisher.explore.training import _finding, _labels
from fgvc_fisher.explore.compromise import Compromise, MEASURED, read_compromise
from fgvc_fisher.data import read_aircraft
from fgvc_fisher.experiment import Run, draw_task
from fgvc_fisher.explore import (
    explore_fisher, explore_penalty, explore_published, explore_training, try_classifier, try_run
)
from fgvc_fisher.fisher import DiagFisher
from fgvc_fisher.learner import n_outputs, remake_head
from fgvc_fisher.experiment.paper import published_summary
from fgvc_fisher.experiment import read_runs
from fgvc_fisher.experiment.results import style
from piped import SUBPROCESS
from tiny import network

pytestmark = pytest.mark.xdist_group('explore')   # What its tests share is made once

@pytest.fixture(scope='module', autouse=True)
def trainings_begin_at_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, 'subprocess', SUBPROCESS)
        yield

@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('explored')

@pytest.fixture(scope='module')
def task(home):
    save_file(network(num_classes=6).state_dict(), home/'tiny.safetensors')
    drawn = draw_task(home, n_variants=4, n_per_split=4, n_source=4, size=32, num_workers=0)
    return drawn | dict(arch='tiny:network', weights=str(home/'tiny.safetensors'))

@pytest.fixture(scope='module')
def run(task): return Run(arm='plain', epochs=2, **task)

@pytest.fixture(scope='module')
def compromise(run, home):
    found = read_compromise(run, home, n_pictures=24, n_fisher=24, progress=False)
    return found.measure_grid([0.,1e-2], [0.,1e-3,1.], progress=False)

@pytest.fixture(scope='module')
def fisher(home, compromise): return DiagFisher.load(next((home/'sources').glob('*.safetensors')))

# The penalty

@pytest.mark.widgets
def test_penalty_moves(compromise):
    "The distances always do; the points if other pictures are right"
    p = explore_penalty(compromise)
    sent,before = [bytes(o.widget.value) for o in p.pictures],compromise.at(**p.values)
    p.set(strength=0.)
    p.finish()
    frontier,layers = [bytes(o.widget.value)!=a for o,a in zip(p.pictures, sent)]
    assert layers and frontier==any(compromise.at(**p.values)[o]!=before[o] for o in MEASURED)

def test_penalty_is_estimated_then_measured(compromise):
    p = explore_penalty(compromise)
    p.controls['alpha'].value = p.controls['alpha'].options[7][1]
    assert 'about' in p.text
    text = p.finish()
    assert 'about' not in text
    exact = compromise.at(**p.values)
    assert all(f'{exact[o]:.0%}' in text for o in MEASURED)

def test_penalty_says_strength_and_beta(compromise):
    p = explore_penalty(compromise)
    p.set(strength=0.1)
    assert f'strength = 0.1 (beta = {0.1*compromise.beta_of_1:.3g})' in p.text

def test_a_strength_means_the_same_for_a_fisher_of_another_scale(compromise):
    "As in `QuadraticPenalty`: beta in units of the mean over the shared parameters, without the head's"
    c = compromise
    shared = [v for k,v in c.fishers[0].items() if not k.startswith('fc.')]
    mean = sum(o.double().sum() for o in shared)/sum(o.numel() for o in shared)
    assert c.beta_of_1==pytest.approx(1/mean.item(), rel=1e-6)
    batches = c.training,c.target,c.pictures['source']
    larger = Compromise(c.source, c.tuned, {k: 1000*v for k,v in c.fishers[0].items()}, c.fishers[1], *batches)
    for p,q in zip(c.model(0., 0.1).parameters(), larger.model(0., 0.1).parameters()): assert torch.allclose(p, q)
    with pytest.raises(ValueError, match='zero'):
        Compromise(c.source, c.tuned, {k: 0*v for k,v in c.fishers[0].items()}, c.fishers[1], *batches)

@pytest.mark.parametrize('n', [4, 3])
def test_the_head_is_new_with_any_number_of_classes(n):
    "The target keeps its own head, and it counts in no term, also where the source has as many classes"
    torch.manual_seed(0)
    source = network(num_classes=4)
    tuned = remake_head(copy.deepcopy(source), n)
    fishers = [{k: torch.rand_like(p) for k,p in o.named_parameters()} for o in (source,tuned)]
    def batches(c): return [(torch.randn(4,3,32,32), torch.randint(c, (4,)))]
    c = Compromise(source, tuned, *fishers, batches(n), batches(n), batches(4))
    body = torch.cat([v.flatten() for k,v in fishers[0].items() if not k.startswith('fc')])
    assert c.beta_of_1==pytest.approx(1/body.mean().item(), rel=1e-5)
    merged = c.model(0., 1e9)
    assert torch.equal(merged.fc.weight, tuned.fc.weight)
    assert torch.allclose(merged.conv1.weight, source.conv1.weight)
    assert c.at(0., 1.)['layers'].loc['fc','beta']==0

def small_compromise(training=None, target=None, pictures=None, tuned_pictures=None, wrap=nn.Sequential):
    "Of models without a hidden layer, whose answer is the brightest channel; every label is the right one"
    def net(n):
        layer = nn.Linear(3, n)
        with torch.no_grad():
            layer.weight.copy_(torch.eye(n, 3))
            layer.bias.zero_()
        return nn.Sequential(nn.Conv2d(3,3,1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), layer)
    source = net(3)
    with torch.no_grad():
        source[0].weight.copy_(torch.eye(3)[:,:,None,None])
        source[0].bias.zero_()
    tuned = copy.deepcopy(source)
    fishers = [{k: torch.ones_like(p) for k,p in source.named_parameters()} for _ in range(2)]
    given = [right_pictures() if o is None else o for o in (training, target, pictures)]
    return Compromise(wrap(source), wrap(tuned), *fishers, *given, tuned_pictures)

def right_pictures(n=30, **kwargs):
    "A loader of pictures with a bright channel, and its number as the label"
    y = torch.arange(n)%3
    x = torch.eye(3)[y][:,:,None,None].repeat(1,1,4,4)
    return DataLoader(TensorDataset(x, y), batch_size=10, **kwargs)

def test_every_argument_is_read_once():
    "A loader that shuffles has another order the second time, and a generator nothing"
    torch.manual_seed(0)
    mixed = [right_pictures(shuffle=True) for _ in range(4)]
    for o in (mixed, [iter(right_pictures()) for _ in range(4)], mixed[:3]):
        found = small_compromise(*o)
        assert found.before==1 and found.tuned_is==dict.fromkeys(MEASURED, 1.)
    images = [[x for x,_ in right_pictures()], DataLoader(torch.randn(30,3,4,4), 10, shuffle=True)]
    assert small_compromise(pictures=images[1]).before==1              # it agrees with itself in any order
    with pytest.raises(ValueError, match='same order'): small_compromise(pictures=images[0], tuned_pictures=images[1])

@pytest.mark.parametrize('name', ['training','target','pictures','tuned_pictures'])
def test_an_argument_without_pictures_is_named(name):
    for none in ([], right_pictures(n=3, drop_last=True), iter(()), [(torch.zeros(0,3,4,4), torch.zeros(0))]):
        with pytest.raises(ValueError, match=f'^{name}: there are no pictures'): small_compromise(**{name: none})

def test_models_in_wrappers():
    found = small_compromise(wrap=nn.DataParallel)
    assert found.at(0., 1.)['last']==1 and found.new==['3.weight','3.bias']

def test_a_fisher_that_is_not_finite(fisher):
    for v in (math.nan, math.inf):
        broken = DiagFisher({k: o.clone() for k,o in fisher.sums.items()}, 1, 'sampled')
        broken.sums['fc.bias'][0] = v
        with pytest.raises(ValueError, match='is not finite: estimate it again'): explore_fisher(broken)

def test_the_point_is_where_the_numbers_are(compromise):
    view = penalty_panel._PenaltyView(compromise)
    view.draw(alpha=1e-3, strength=0.3)
    found = compromise.estimate(1e-3, 0.3)
    for point,name in zip(view.points, ('retention_target_bn','retention_source_bn')):
        assert (point.get_xdata()[0], point.get_ydata()[0])==(found[name], found['last'])
    moved = [o.get_width() for o in view.moved]
    assert np.allclose(moved, found['layers'].moved.fillna(0))
    assert np.isclose(sum(o.get_width() for o in (*view.alpha, *view.beta)), 1)

def test_layers_agree_with_the_penalty_of_the_callback(compromise, home, run):
    "What the layers pay adds up to Omega, as `QuadraticPenalty` computes it"
    from fgvc_fisher.penalty import QuadraticPenalty
    merged = compromise.model(1e-3, 0.2)
    theta0 = dict(compromise.source.named_parameters())
    omega = QuadraticPenalty(merged, theta0, compromise.fishers[0], alpha=1e-3, strength=0.2, new=['fc'])
    omega = omega.value().item()
    assert compromise.at(1e-3, 0.2)['layers'][['alpha','beta']].to_numpy().sum()==pytest.approx(omega, rel=1e-5)

def test_ends_of_the_compromise(compromise):
    tuned,far = compromise.model(0., 0.),compromise.model(0., 1e12)
    theta0 = dict(compromise.source.named_parameters())
    for n,p in tuned.named_parameters(): assert torch.equal(p, dict(compromise.tuned.named_parameters())[n])
    for n,p in far.named_parameters():
        sure = compromise.fishers[0][n]>1e-6
        if not n.startswith('fc.'): assert torch.allclose(p[sure], theta0[n][sure], atol=1e-4)

def test_retention_with_the_source_put_back_is_the_source(compromise):
    assert compromise.at(0., 1e15)['retention_source_bn']==pytest.approx(compromise.before, abs=0.05)

def test_models_are_left_alone(compromise):
    before = {n: p.clone() for n,p in compromise.tuned.state_dict().items()}
    compromise.at(1e-2, 1.)
    assert all(torch.equal(p, before[n]) for n,p in compromise.tuned.state_dict().items())

def test_measuring_pauses_after_every_batch(compromise):
    "And leaves PyTorch as it was, so that other code can run in between"
    grads,steps = [],compromise.steps(0., 0.1)
    for _ in steps: grads.append(torch.is_grad_enabled())
    n = len(compromise.training)+len(compromise.target)+sum(len(o) for o in compromise.pictures.values())
    assert grads==[True]*n

def test_statistics_are_those_of_update_bn(compromise):
    merged = compromise.model(1e-3, 0.1)
    theirs = compromise.model(0., 0.)
    theirs.load_state_dict(merged.state_dict())
    update_bn((x for x,_ in compromise.training), theirs)
    ours,theirs = [[v for k,v in o.state_dict().items() if 'running' in k] for o in (merged, theirs)]
    assert ours and all(torch.allclose(a, b) for a,b in zip(ours, theirs))

def test_the_fine_tuned_model_is_the_one_that_was_trained(compromise, run, home):
    from fgvc_fisher.retention import accuracy_on
    from fgvc_fisher.experiment import load_run
    learn = load_run(home/'runs'/run.id, pictures=True)
    assert compromise.tuned_is['last']==pytest.approx(accuracy_on(learn.model, compromise.target))

def test_settings_beside_a_compromise_are_refused(compromise):
    with pytest.raises(ValueError, match='n_pictures'): explore_penalty(compromise, n_pictures=3)

def test_no_source_no_penalty_panel(run, home):
    with pytest.raises(ValueError, match='source'): explore_penalty(replace(run, source=''), home)

def test_a_grid_begins_with_zero(compromise):
    for bad in ([1.,2.], [], [0.], [0.,2.,1.]):
        with pytest.raises(ValueError, match='strengths='): compromise.measure_grid([0.,1.], bad)
        with pytest.raises(ValueError, match='alphas='): compromise.measure_grid(bad, [0.,1.])

# The Fisher

def labels_fit(panel):
    "Is all that is drawn inside of its picture?"
    found = [o.fig.get_tightbbox() for o in panel.pictures]
    return all(o.x0>=0 and o.y0>=0 for o in found)

@pytest.mark.widgets
def test_fisher_every_choice(fisher):
    p = explore_fisher(fisher)
    for name in p.controls['parameter'].options[1::48]:
        p.controls['parameter'].value = name
        for axis in ('log','linear'):
            for measure in ('mean','share'):
                p.controls['axis'].value,p.controls['measure'].value = axis,measure
                assert p.text and labels_fit(p)
        assert name in p.text

@pytest.mark.parametrize('axis', ['log','linear'])
def test_histogram_counts_every_value(fisher, axis):
    view = fisher_panel._FisherView(fisher)
    for name,v in [*fisher.items(), (fisher_panel._ALL, torch.cat([o.flatten() for o in fisher.values()]))]:
        counts,edges,zeros = view._histogram(name, axis)
        assert zeros==(v==0).sum() and counts.sum()==(v.numel() if axis=='linear' else v.numel()-zeros)
        assert edges[0]<=v[v>0].min()*1.001 and edges[-1]>=v.max()*0.999

def test_fisher_with_a_dead_parameter(fisher):
    dead = list(fisher)[3]
    sums = {k: v*(k!=dead) for k,v in fisher.sums.items()}
    zeroed = DiagFisher(sums, fisher.n_images, fisher.kind, fisher.provenance)
    p = explore_fisher(zeroed)
    for axis in ('log','linear'):
        p.controls['parameter'].value,p.controls['axis'].value = dead,axis
        assert dead in p.text and '0.00%' in p.text

@pytest.mark.parametrize('values', [[.0303929839,.0303929877]*24, [3.]*5, [1e-45]*4, [1e-45,0.,1e-44], [5e-324,1e-323]],
                         ids=['nearly equal','equal','denormal','denormal and zero','denormal float64'])
def test_values_that_hardly_differ_have_a_histogram(values):
    dtype = torch.float64 if max(values)<1e-300 else torch.float32
    v = torch.tensor(values, dtype=dtype, requires_grad=True)
    p = explore_fisher(DiagFisher(dict(a=v, b=torch.ones(2)), 1, 'exact'))
    view = fisher_panel._FisherView(DiagFisher(dict(a=v), 1, 'exact'))
    for axis in ('log','linear'):
        p.set(parameter='a', axis=axis)
        counts,edges,zeros = view._histogram('a', axis)
        assert zeros==values.count(0) and counts.sum()==len(values)-zeros*(axis=='log') and 'a: ' in p.text
        assert edges[0]<=v.min() or axis=='log' and zeros
        assert edges[-1]>=v.max()*0.999

def test_a_fisher_that_is_zero_or_empty():
    p = explore_fisher(DiagFisher(dict(a=torch.zeros(2), b=torch.zeros(3)), 1, 'exact'))
    for name in p.controls['parameter'].options:
        for axis in ('log','linear'):
            p.set(parameter=name, axis=axis, measure='share')
            assert 'zero everywhere' in p.text and 'nan' not in p.text
    with pytest.raises(ValueError, match='no parameters'): explore_fisher(DiagFisher({}, 1, 'exact'))

# The published runs

@pytest.mark.widgets
@pytest.mark.parametrize('epoch', ['best','last','last5'])
def test_published_says_what_the_summary_says(epoch):
    p = explore_published()
    p.controls['epoch'].value = epoch
    control,claim = published_summary()[epoch][['new-0-0','new-0.0004-0']]
    text = p.text
    assert f'{control:.2%}' in text and f'{claim:.2%}' in text
    ahead = re.search(rf'(control|claim)\D*{100*abs(control-claim):.2f}', text).group(1)
    assert ahead==('control' if control>claim else 'claim')

@pytest.mark.widgets
def test_published_without_runs_and_smoothed():
    p = explore_published()
    p.controls['runs'].value = ()
    p.controls['smooth'].value = 15
    p.controls['runs'].value = tuple(o for _,o in p.controls['runs'].options)
    assert p.text

def test_published_colours_are_those_of_the_arms():
    "Beside a run's name are the colour and the dashes of its curve"
    view = published._PublishedView()
    def look(line): return line.get_color(), line._dash_pattern, line.get_linewidth()
    keys = [o for o in view.bars.axes.lines if len(o.get_xdata())==2]
    assert list(map(look, keys))==list(map(look, view.lines.values()))
    for run,arm in {'new-0-0': 'plain', 'new-0.0004-0': 'as published', 'new-0-0.0005': 'L2'}.items():
        assert view.lines[run].get_color()==style(arm)['color']

# Training

@pytest.fixture
def training(task, tmp_path):
    p = explore_training(task, tmp_path, epochs=2)
    yield p
    p.training.close()

def all_done(p):
    p.finish()
    return all(p.training.result(o) for o in p.view.runs)

@pytest.mark.widgets
def test_train_to_the_end(training, tmp_path):
    training.controls['arm'].value = 'L2-SP-Fisher'
    training.train()
    assert all_done(training) and labels_fit(training)
    rows = read_runs(tmp_path)
    assert rows.arm.tolist()==['L2-SP-Fisher, strength = 0.5'] and rows.strength.tolist()==[0.5]
    assert rows.retention_target_bn.notna().all()
    assert not training.buttons['train'].disabled and training.buttons['stop'].disabled
    assert all(o in training.view.legend.value for o in ('L2-SP-Fisher, strength = 0.5, seed 42','2 of 2'))
    training.train()                                   # the same again is read, not trained
    assert training.training.run is None and all_done(training) and len(training.view.runs)==1
    reopened = explore_training(training.task, tmp_path, epochs=2)
    assert list(reopened.view.runs)==list(training.view.runs)
    reopened.training.close()
    assert training.buttons['remove'].disabled
    training.chosen.value = (rows.id[0],)
    assert not training.buttons['remove'].disabled
    training.remove()
    assert training.buttons['remove'].disabled
    assert not training.view.runs and training.chosen.options==()
    assert (tmp_path/'runs'/rows.id[0]/'result.json').exists()

def shown_until(p, holds):
    "Answer a panel's questions, as a front end does, until something holds"
    while not holds():
        assert p.echo.asked is not None
        p.echo.widget.children[0]._view_count += 1

def test_curves_follow_the_training(training):
    training.epochs = 1000
    training.train()
    def epoch(): return int((re.search(r'Epoch (\d+) of 1000', training.text) or [0, 0])[1])
    shown_until(training, epoch)
    sent = bytes(training.pictures[0].widget.value)
    training.controls['seed'].value = 7               # a move meanwhile does not lose the training
    now = epoch()
    shown_until(training, lambda: epoch()>now)
    assert bytes(training.pictures[0].widget.value)!=sent and training.buttons['train'].disabled
    training.stop()
    shown_until(training, lambda: training.echo.asked is None)
    assert not training.buttons['train'].disabled and training.buttons['stop'].disabled

def test_a_press_waits_for_a_slider_that_is_on_its_way(training):
    "While a move is drawn the front end keeps the next one, and sends a press"
    training.buttons['train'].click()
    training.buttons['train'].click()
    training.controls['lr'].value = 0.01
    shown_until(training, lambda: training.training.run)
    assert training.training.run.lr==0.01 and 'still in training' not in training.text

def test_a_training_that_was_waited_for_is_drawn(training):
    "`wait` has heard the news before the panel"
    training.train()
    training.training.wait(120)
    assert 'Done' not in training.text
    shown_until(training, lambda: 'Done' in training.text)

@pytest.mark.widgets
def test_stop_and_go_on(training, tmp_path):
    training.epochs = 1000
    training.train()
    run = training.training.run
    shown_until(training, lambda: training.training.batches(run.id))
    training.train()                                   # a second press of the button
    assert 'still in training' in training.text
    training.stop()
    assert 'still in training' not in training.text
    assert training.training.run is None and '1000' in training.finish()
    assert not list(tmp_path.glob('runs/*/result.json'))

@pytest.mark.widgets
def test_arm_sets_the_sliders(training):
    training.controls['arm'].value = 'as published'
    assert (training.values['alpha'], training.values['beta'], training.values['l2sp'])==(0., 4e-4, 4e-3)
    assert not any(training.controls[o].disabled for o in ('alpha','beta','l2sp'))
    training.controls['arm'].value = 'L2'
    assert (training.values['alpha'], training.values['beta'], training.values['l2sp'])==(5e-4, 0., 0.)
    assert [training.controls[o].disabled for o in ('alpha','beta','l2sp')]==[False,True,True]

@pytest.mark.widgets
def test_a_cell_run_again_closes_the_panel_before(training, tmp_path):
    again = explore_training(training.task, tmp_path, epochs=2)
    run = training_panel._run_of(training.task, 2, **training.values)
    with pytest.raises(ValueError, match='closed'): training.training.start(run)
    again.training.close()

def test_the_rate_begins_with_the_tasks(task, tmp_path):
    p = explore_training(task | dict(lr=0.0123), tmp_path)
    assert training_panel._run_of(p.task, 2, **p.values).arm=='plain' and p.values['lr']==0.0123
    p.training.close()

@pytest.mark.widgets
def test_the_controls_begin_with_the_tasks_values(task, tmp_path):
    "Its arm by its family, strengths between those of the sliders, its seed and its epochs; else the usual ones"
    own = dict(arm='L2-SP-Fisher, strength = 0.123', strength=0.123, alpha=1e-4, l2sp=9., seed=2**32-1, epochs=3)
    for given,expected in ((task | own, dict(arm='L2-SP-Fisher', strength=0.123, alpha=1e-4, l2sp=0., seed=2**32-1)),
                           (task | dict(arm='L2'), dict(arm='L2', strength=0., alpha=5e-4, l2sp=0., seed=42)),
                           (task | dict(arm='LwF', strength=0.5), dict(arm='plain', strength=0., alpha=0., seed=42))):
        p = explore_training(given, tmp_path)
        assert p.values.items()>=expected.items() and p.epochs==given.get('epochs', 6)
        p.training.close()
    p = explore_training(task | own, tmp_path, epochs=5)
    assert p.epochs==5
    p.training.close()

def test_only_the_strengths_of_an_arm_count(task, tmp_path):
    "A task made of a run's fields may have others, and a rate, a seed, a step: the controls decide"
    own = asdict(Run(arm='L2-SP-Fisher', strength=0.5, l2sp=0.1, step='grad', epochs=9, seed=5, **task))
    for arm,used in (('plain',{}), ('L2',dict(alpha=5e-4)), ('as published',dict(beta=4e-4, l2sp=4e-3))):
        values = dict(alpha=0., strength=0., beta=0., l2sp=0.) | used
        run = training_panel._run_of(own, 1, arm, lr=0.05, seed=42, **values)
        assert {o: getattr(run, o) for o in values}==values and (run.epochs,run.seed)==(1,42)
        assert run.step==('published' if arm=='as published' else 'grad')

def test_runs_of_every_control_are_found_again(task, tmp_path):
    own = task | dict(seed=5, strength=0.5)
    p = explore_training(own, tmp_path, epochs=1)
    p.set(lr=0.1)
    p.train()
    assert all_done(p)
    reopened = explore_training(own, tmp_path, epochs=2)
    assert [o.arm for o in reopened.view.runs.values()]==['plain, lr = 0.1']
    reopened.training.close()

def view_of(task, *runs):
    "The view of a folder with some runs, without a process"
    training = SimpleNamespace(known=lambda: {o.id: o for o in runs}, run=None, stage='ready', problems=[],
                               batches=lambda id: [], result=lambda id: None, epochs=lambda id: pd.DataFrame())
    return training_panel._TrainingView(training, task)

def test_only_runs_of_the_task_are_shown():
    "Whatever the task leaves out has its default value; a folder may be written in several ways"
    run = Run('pictures', seed=7, lr=0.3, epochs=9, source='source', weights='w.safetensors')
    others = [replace(run, **{k: v}) for k,v in dict(size=64, bs=7, freeze_bn=True, data='other', source='').items()]
    for data in ('pictures', 'pictures/', './pictures', os.path.abspath('pictures')):
        view = view_of(dict(data=data, source=os.path.abspath('source'), weights='./w.safetensors'), run, *others)
        assert list(view.runs.values())==[run]

def ended(run, **last):
    return run, pd.DataFrame([dict(epoch=i, **last) for i in range(run.epochs)])

def test_runs_of_an_arm_and_seed_are_told_apart():
    "In the legend, in the list and in the sentence"
    short,long,other = Run('x', epochs=1), Run('x', epochs=3), Run('x', epochs=3, lr=0.5)
    both = _labels([short, long, Run('x', seed=1)])
    assert list(both.values())==['plain, seed 42, 1 epoch','plain, seed 42, 3 epochs','plain, seed 1']
    assert _labels([long, other])[other.id]=='plain, seed 42, lr = 0.5'
    for best in (short, long):
        drawn = [ended(o, accuracy=0.9 if o is best else 0.5) for o in (short, long)]
        assert _finding(drawn, 'retention_target_bn')==f'Highest accuracy: {both[best.id]} (90.0%).'
    view = view_of(dict(data='x'), short, long)
    view.draw()
    assert all(o in view.legend.value for o in list(both.values())[:2])

def test_a_tie_names_all():
    drawn = [ended(Run('x', arm), accuracy=a) for arm,a in (('plain',0.5), ('L2',0.5), ('L2-SP',0.25))]
    text = 'Highest accuracy: plain, seed 42 and L2, seed 42 (50.0%).'
    assert _finding(drawn, 'retention_target_bn')==text

def test_without_source_pictures(task, tmp_path):
    p = explore_training(task | dict(source='', test=''), tmp_path, epochs=1)
    p.train()
    assert all_done(p) and p.view.legend.value.count('–')==1
    reopened = explore_training(p.task, tmp_path, epochs=1)
    assert len(reopened.view.runs)==1 and 'Error' not in reopened.text
    reopened.training.close()

def test_without_a_validation_split_the_test_is_shown(task, tmp_path):
    p = explore_training(task | dict(valid=''), tmp_path, epochs=1)
    p.train()
    assert all_done(p) and p.view.legend.value.count('–')==0
    p.training.close()

def test_what_cannot_be_a_run_is_said(task, tmp_path):
    p = explore_training(task | dict(freeze_bn=True), tmp_path)
    p.controls['arm'].value = 'as published'
    p.train()
    assert 'freeze_bn' in p.text and p.training.run is None
    p.training.close()
    with pytest.raises(ValueError, match='epochs'): explore_training(task | dict(epochs=-1), tmp_path/'other')

def test_runs_of_an_arm_have_dashes_of_their_own(training):
    runs = [training_panel._run_of(training.task, 2, 'L2-SP-Fisher', 0., o, 0., 0., 0.1, 1) for o in (1., 10., 100.)]
    for o in runs: training.view.add(o)
    looks = [training.view.looks[o.id] for o in runs]
    assert len({str(o['ls']) for o in looks})==3 and len({o['color'] for o in looks})==1
    training.view.remove([runs[0].id])
    training.view.add(new := training_panel._run_of(training.task, 2, 'L2-SP-Fisher', 0., 1000., 0., 0., 0.1, 1))
    assert [training.view.looks[o.id] for o in runs]==looks and training.view.looks[new.id] not in looks
    assert all(panels.DASHES[o['ls']] in training_panel._key(o) for o in looks)

def test_a_note_ends_with_its_run(task, tmp_path):
    p = explore_training(task, tmp_path, epochs=9)
    p.train()
    p.train()                                          # refused
    assert 'still in training' in p.text
    assert 'still in training' not in p.finish() and 'Done' in p.text
    p.training.close()

def test_a_run_that_diverged_is_a_dash(task, tmp_path):
    p = explore_training(task | dict(lr=1e6), tmp_path, epochs=2)
    p.train()
    assert 'diverged' in p.finish() and ', diverged' in p.view.legend.value and 'nan' not in p.view.legend.value.lower()
    p.training.close()

@pytest.mark.parametrize('arm', training_panel._ARMS)
def test_every_arm_is_a_run(task, arm):
    run = training_panel._run_of(task, 3, arm, 1e-3, 1., 1e-4, 1e-2, task['lr'], 7)
    for k in ('alpha','strength','beta','l2sp'): assert (getattr(run, k)>0)==(k in training_panel._ARMS[arm])
    assert run.arm.split(',')[0]==arm and run.seed==7 and style(run.arm)==style(arm)

def test_what_fails_is_said(task, tmp_path):
    p = explore_training(task | dict(data=str(tmp_path/'none')), tmp_path, epochs=1)
    p.train()
    assert 'ailed' in p.finish() and 'none' in p.text
    p.training.close()

# The classifier

def content(mode='RGB', size=(60,40), format='JPEG', **kw):
    Image.new(mode, size, 128 if mode!='RGB' else (200,30,30)).save(f := io.BytesIO(), format, **kw)
    return f.getvalue()

def give(upload, name, data):
    "As a browser would, in either version of ipywidgets"
    if panels.widgets.__version__[0]=='7':
        return upload.set_trait('value', {name: dict(metadata=dict(name=name), content=data)})
    now = datetime.now(timezone.utc)
    upload.value = (dict(name=name, type='', size=len(data), content=memoryview(data), last_modified=now),)

@pytest.fixture(scope='module')
def classifier(compromise, run, home): return try_run(home/'runs'/run.id)

@pytest.fixture(scope='module')
def says_which(task):
    "Whether a sentence names a label"
    labels = read_aircraft(task['data'], task['level']).label.cat.categories
    return lambda text: any(o in text for o in labels)

@pytest.mark.widgets
def test_classifier_example_and_upload(classifier, says_which):
    p = classifier
    first,options = p.text,p.controls['example'].options
    assert says_which(first) and len(p.pictures)==3
    give(p.controls['upload'], 'red.jpg', content())
    uploaded = p.text
    sent = bytes(p.pictures[0].widget.value)
    p.controls['example'].value = options[-1][1]
    assert not p.controls['upload'].value
    assert bytes(p.pictures[0].widget.value)!=sent and says_which(uploaded)
    give(p.controls['upload'], 'red.jpg', content())                  # the same file once more
    assert p.text==uploaded and p.controls['example'].value is None
    p.controls['example'].value = options[1][1]
    assert p.text==first

@pytest.mark.parametrize('name,data,said', [
    ('empty.jpg', b'', 'empty.jpg'), ('paper.pdf', b'%PDF-1.7 ...', 'paper.pdf'),
    ('cut.jpg', content(size=(400,400))[:900], 'cut.jpg'),
    ('phone.heic', b'\0\0\0\x18ftypheic\0\0\0\0mif1heic', 'phone.heic'),
    ('bomb.png', content('1', (10_000,10_000), 'PNG'), '50 million'),
    ('<img src=x onerror=alert(1)>.jpg', b'nonsense', 'img')])
def test_classifier_nonsense(classifier, name, data, said):
    give(classifier.controls['upload'], name, data)
    text = classifier.text
    assert said in text and 'Error' not in text
    assert '<img' not in classifier.said.value.replace('<p role', '')

def test_classifier_transparent(classifier, says_which):
    give(classifier.controls['upload'], 'clear.png', content('RGBA', format='PNG'))
    text = classifier.text
    assert 'white' in text and says_which(text)

def test_classifier_without_source(compromise, run, home):
    from fgvc_fisher.experiment import load_run
    p = try_classifier(load_run(home/'runs'/run.id, pictures=True))
    assert len(p.pictures)==2 and 'source' not in p.text

def test_try_run_takes_every_argument(compromise, run, home):
    folder = home/'runs'/run.id
    assert len(try_run(folder, source=None).pictures)==2
    n = n_outputs(compromise.source)
    p = try_run(folder, names=[f'thing {i}' for i in range(n)])
    assert 'Its source predicts thing' in p.text
    assert 'Its source predicts thing' in try_run(folder, source=compromise.source, names=['thing']*n).text

def test_answers_that_are_nan_are_said(compromise, run, home):
    from fgvc_fisher.experiment import load_run
    learn = load_run(home/'runs'/run.id, pictures=True)
    broken = copy.deepcopy(compromise.source)
    with torch.no_grad(): next(broken.parameters()).fill_(math.nan)
    assert "source model's answers are NaN" in try_classifier(learn, broken).text
    with torch.no_grad(): next(learn.model.parameters()).fill_(math.nan)
    for source in (None, compromise.source):
        assert "fine-tuned model's answers are NaN" in try_classifier(learn, source).text

def test_one_example_and_a_folder(compromise, run, home, says_which, tmp_path):
    folder,file = home/'runs'/run.id,tmp_path/'red.jpg'
    file.write_bytes(content())
    for one in (str(file), file):
        p = try_run(folder, examples=one)
        assert [o for o,_ in p.controls['example'].options]==['choose one','red.jpg'] and says_which(p.text)
    assert f'{tmp_path} is a folder' in try_run(folder, examples=[file, tmp_path][1:]).text

def test_try_run_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match='run.json'): try_run(tmp_path)

def test_a_long_label_does_not_break_the_bars():
    assert len(classifier_panel._short('x'*500))==44 and classifier_panel._short('short')=='short'

def test_classifier_without_examples(compromise, run, home, says_which):
    p = try_run(home/'runs'/run.id, examples=[])
    assert 'example' in p.text and not says_which(p.text)
    give(p.controls['upload'], 'red.jpg', content())
    assert says_which(p.text)

def test_dollars_in_a_label_are_no_mathematics():
    view = classifier_panel._ClassifierView(SimpleNamespace(source=None))
    view._bars(view.variants.axes, [r'$\frac$', '$'], [np.array([0.6,0.4])], ['k'], 'title')
    view.variants.show()

def test_names_are_drawn_in_a_font_that_has_them(recwarn):
    "As far as one is installed: here a sign that of matplotlib's own fonts only STIX has"
    own,other = [set(get_font(findfont(o)).get_charmap()) for o in ('DejaVu Sans','STIXGeneral')]
    sign = chr(max(o for o in other-own if chr(o).isprintable()))
    assert classifier_panel._families('plain')==rcParams['font.family']
    found = classifier_panel._families(f'A {sign}')
    assert len(found)==1+len(rcParams['font.family']) and 'Last Resort' not in found[-1]
    view = classifier_panel._ClassifierView(SimpleNamespace(source=None))
    view._bars(view.variants.axes, [f'A {sign}','B'], [np.array([0.6,0.4])], ['k'], 'title')
    view.variants.show()
    assert not [o for o in recwarn if 'missing from' in str(o.message)]
    classifier_panel._families('中文')                  # with or without a font for it
