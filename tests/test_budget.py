"Measuring a training leaves no trace of it"
import copy, re
import pytest, timm, torch
from fastai.callback.all import Callback, CSVLogger, EarlyStoppingCallback, ProgressCallback, SaveModelCallback
from fgvc_fisher.experiment.budget import TimeEstimate, estimate_time, picture_cost
from fgvc_fisher.callback import L2SPFisherCallback
from fgvc_fisher.data import aircraft_dls
from fgvc_fisher.learner import aircraft_learner
from tiny import network

def learner(tree, workers=0, **kw):
    return aircraft_learner(aircraft_dls(tree, size=32, bs=4, num_workers=workers), 'tiny:network', weights=None, **kw)

def state(learn): return {k: v.clone() for k,v in learn.model.state_dict().items()}

def test_multiplications_of_inception_v4():
    "timm's own table has 12.28 thousand million multiply-adds, without the head's and poolings' details"
    with torch.device('meta'): model = timm.create_model('inception_v4')
    cost = picture_cost(model, 299)
    assert abs(cost['forward']/2 - 12.28e9) < 0.05e9 and 2.9 < cost['training']/cost['forward'] < 3.01

def test_attention_is_counted():
    "timm's own table has 1.26 thousand million; 0.18 of them compare every patch with every other"
    with torch.device('meta'): model = timm.create_model('vit_tiny_patch16_224')
    assert abs(picture_cost(model, 224)['forward']/2 - 1.26e9) < 0.01e9

def test_cost_leaves_the_model_alone():
    model = network().eval()
    before = {k: v.clone() for k,v in model.state_dict().items()}
    picture_cost(model, 64)
    assert not model.training and all(torch.equal(v, before[k]) for k,v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())

@pytest.mark.parametrize('workers', [0, 2])
def test_as_if_nothing_had_happened(drawn, workers, tmp_path):
    cbs = [CSVLogger(), SaveModelCallback(), EarlyStoppingCallback(), L2SPFisherCallback(alpha=1e-3, l2sp=1e-2, new=[])]
    learn = learner(drawn, workers, path=tmp_path, cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.02)
    files = {o: o.stat().st_mtime_ns for o in tmp_path.rglob('*') if o.is_file()}
    weights = state(learn)
    moments = copy.deepcopy(learn.opt.state_dict()['state'])
    values = copy.deepcopy(learn.recorder.values)
    mode,random_state,cbs = learn.model.training,torch.get_rng_state(),list(learn.cbs)
    estimate = estimate_time(learn, 10, n_batches=2, skip=1)
    assert {o: o.stat().st_mtime_ns for o in tmp_path.rglob('*') if o.is_file()}==files and len(files)==2
    assert all(torch.equal(v, weights[k]) for k,v in state(learn).items()) and learn.model.training==mode
    restored = learn.opt.state_dict()['state']
    assert moments and all(torch.equal(restored[i]['momentum_buffer'], o['momentum_buffer']) for i,o in moments.items())
    assert learn.recorder.values==values and torch.equal(torch.get_rng_state(), random_state)
    assert {type(o) for o in learn.cbs}=={type(o) for o in cbs}
    assert (estimate.n_train, estimate.n_valid)==(4,4) and 0<=estimate.waiting<=1
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 0.02)

@pytest.mark.parametrize('groups', [1, 4, 32])
def test_operations_of_groups(groups):
    "A training has two more products a layer, however many groups there are"
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1, bias=False), torch.nn.Conv2d(32, 32, 3, 1, 1, 1, groups, False))
    cost = picture_cost(net.requires_grad_(False), 8)
    assert cost['forward']==2*64*(3*32+9*32*32/groups) and cost['training']==3*cost['forward']

def test_bars_stay_as_they_were(drawn):
    learn = learner(drawn)
    bars = [o for o in learn.cbs if isinstance(o, ProgressCallback)]
    for _ in range(2): estimate_time(learn, 1, n_batches=1, skip=0)
    assert [o for o in learn.cbs if isinstance(o, ProgressCallback)]==bars==[learn.progress]
    with learn.no_bar(): assert not any(isinstance(o, ProgressCallback) for o in learn.cbs)

def test_before_the_first_training(drawn):
    learn = learner(drawn)
    weights = state(learn)
    estimate_time(learn, 1, n_batches=1, skip=0)
    assert learn.opt is None and all(torch.equal(v, weights[k]) for k,v in state(learn).items())

def test_a_training_goes_as_it_would_have_gone(drawn):
    from fastai.torch_core import set_seed
    def train(measure):
        set_seed(3, reproducible=True)
        learn = learner(drawn)
        if measure: estimate_time(learn, 1, n_batches=2, skip=0)
        with learn.no_bar(), learn.no_logging(): learn.fit(2, 0.02)
        return state(learn)
    a,b = train(False),train(True)
    assert all(torch.equal(v, b[k]) for k,v in a.items())

def test_put_back_after_an_error(drawn):
    class Breaks(Callback):
        def after_batch(self):
            if self.iter==1: raise RuntimeError('broken')
    learn = learner(drawn, cbs=Breaks())
    weights = state(learn)
    with pytest.raises(RuntimeError, match='broken'): estimate_time(learn, 1)
    assert all(torch.equal(v, weights[k]) for k,v in state(learn).items())
    assert not hasattr(learn, 'lr_finder') and not any(o.name=='lr_finder' for o in learn.cbs)

def test_time_runs_out(drawn):
    "No further batch is started after `seconds`, but one is timed"
    seen = []
    class Counts(Callback):
        def before_batch(self): seen.append(self.iter)
    learn = learner(drawn, cbs=Counts())
    estimate_time(learn, 1, skip=1, seconds=0)
    assert len(seen)==2+2

def test_sum():
    estimate = TimeEstimate(epochs=80, n_train=104, n_valid=105, train=0.39, valid=0.13, start=1., waiting=0.25)
    assert abs(estimate.epoch-(1+104*0.39+105*0.13))<1e-9 and estimate.total==80*estimate.epoch
    assert re.search(r'80 .*1:13:37.*55\.2 s.*104 .*0\.390 s.*105 .*0\.130 s.*1\.0 s.*25 %', str(estimate))
