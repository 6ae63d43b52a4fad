"""One callback or several, one training or several, finished or not: which model the penalty holds, from where its
distance counts, and what the recorder's table shows"""
import copy, json, math, pickle, warnings
from functools import partial
from itertools import product
import pandas as pd, pytest, torch
from torch import nn
from fastai.basics import Callback, CancelFitException, CrossEntropyLossFlat, DataLoaders, Learner, SGD, accuracy
from fastai.callback.all import CSVLogger, SaveModelCallback
from fastai.data.load import DataLoader
from fastai.callback.core import CancelEpochException, CancelTrainException, CancelValidException
from fgvc_fisher.callback import LIMIT, L2SPFisherCallback
from fgvc_fisher.experiment.paper import AsPublished
from fgvc_fisher.fisher import DiagFisher, estimate_fisher
from fgvc_fisher.fisher.diagonal import parameter_digests
from fgvc_fisher.learner import nesterov
from fgvc_fisher.retention import Retention

def network(n_out):
    return nn.Sequential(nn.Linear(4,4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4,4), nn.Linear(4,n_out))
def loader(n_classes, n=16, bs=8, drop_last=False):
    g = torch.Generator().manual_seed(0)
    ds = [(torch.randn(4, generator=g), torch.randint(n_classes, (), generator=g)) for _ in range(n)]
    return DataLoader(ds, bs=bs, num_workers=0, drop_last=drop_last)

@pytest.fixture(scope='module')
def source():
    torch.manual_seed(1)
    return network(5).eval()

@pytest.fixture(scope='module')
def fisher(source): return estimate_fisher(source, loader(5), kind='exact', progress=False)

def tunable(source, n_out=3, seed=2):
    "The source's body with a new head"
    torch.manual_seed(seed)
    model = network(n_out)
    model.load_state_dict({k: v for k,v in source.state_dict().items() if k[0]!='4'}, strict=False)
    return model

def learner(model, *cbs, train=None, loss=None, **kwargs):
    dls = DataLoaders(loader(3) if train is None else train, loader(3), device='cpu')
    kwargs = dict(loss_func=loss or CrossEntropyLossFlat(), opt_func=partial(SGD, mom=0.9), metrics=accuracy) | kwargs
    return Learner(dls, model, cbs=cbs, **kwargs)

def fit(learn, *cbs, n=1, lr=0.1, **kwargs):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, lr, cbs=cbs, **kwargs)
    return learn

def row(learn, i=-1): return dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[i]))
def states(a, b): return [torch.equal(p, q) for p,q in zip(a.state_dict().values(), b.state_dict().values())]
def from_source(learn, source):
    "How far the body is from the source"
    theta0 = dict(source.named_parameters())
    away = [(p-theta0[n]).detach().double().norm()**2 for n,p in learn.model.named_parameters() if n[0]!='4']
    return math.sqrt(sum(away))

# Which model

@pytest.mark.parametrize('attach', ['fit', 'learner', 'add_cb'])
@pytest.mark.parametrize('kw', [dict(), dict(anchor=True), dict(l2sp=3., fisher=None)])
def test_one_callback_for_several_learners(source, fisher, attach, kw):
    "Seeds: each training is the one that a callback of its own gives"
    kw = dict(fisher=fisher) | kw
    if kw.get('anchor'): kw['anchor'] = source
    shared = L2SPFisherCallback(**kw)
    def trained(cb, seed):
        if attach=='learner': return fit(learner(tunable(source, seed=seed), cb))
        learn = learner(tunable(source, seed=seed))
        if attach=='fit': return fit(learn, cb)
        learn.add_cb(cb)
        return fit(learn)
    for seed in (2,3,4):
        a,b = trained(shared, seed),trained(L2SPFisherCallback(**kw), seed)
        assert all(states(a.model, b.model)) and row(a)==row(b)
        assert row(a)['penalty']>0 or 'l2sp' in kw

def test_a_learner_that_lost_its_callback(source, fisher):
    cb = L2SPFisherCallback(fisher=fisher)
    first,second = learner(tunable(source), cb),learner(tunable(source), cb)
    with pytest.raises(ValueError, match='L2SPFisherCallback.*another Learner'): fit(first)
    assert len(first.validate())==2
    assert row(fit(second))['penalty']>0
    first.add_cb(cb)
    assert row(fit(first))['penalty']>0
    with pytest.raises(ValueError, match='another Learner'): fit(second)
    first.remove_cb(cb)
    assert 'penalty' not in row(fit(first))

def test_added_twice(source, fisher):
    "It stays, and acts once"
    cb = L2SPFisherCallback(fisher=fisher)
    learn = learner(tunable(source), cb)
    for again in (lambda: learn.add_cb(cb), lambda: fit(learn, cb)):
        with pytest.raises(ValueError, match='L2SPFisherCallback.*already'): again()
    assert row(fit(learn))==row(fit(learner(tunable(source), L2SPFisherCallback(fisher=fisher))))

def test_the_limit_of_the_explicit_step():
    "A parabola, and the optimizer of `aircraft_learner`: just below and above the stiffness from which it diverges"
    for lr,ends in ((0.49*LIMIT, True), (0.51*LIMIT, False)):
        p = nn.Linear(1, 1, bias=False)
        opt = nesterov([p.weight], lr=lr)
        for _ in range(1000):
            opt.zero_grad()
            p.weight.square().sum().backward()                           # stiffness 2*lr
            opt.step()
        assert (abs(p.weight.item())<1e-3)==ends

def test_each_training_warns_that_it_may_diverge(source, fisher):
    "Once; also after `lr_find`, which tries rates that diverge"
    learn = learner(tunable(source), L2SPFisherCallback(fisher=fisher, step='grad', anchor=source))
    for n in (1,2):
        with pytest.warns(UserWarning, match='may diverge') as found: fit(learn, n=n, lr=100.)
        assert sum('may diverge' in str(o.message) for o in found)==1

def test_an_optimizer_of_another_model(source, fisher):
    cb = L2SPFisherCallback(fisher=fisher)
    learn = fit(learner(tunable(source)), cb)
    learn.model = tunable(source)
    with pytest.raises(ValueError, match='optimizer.*create_opt'): fit(learn, cb)
    learn.create_opt()
    assert row(fit(learn, cb))['distance']==pytest.approx(from_source(learn, source), rel=1e-5)

def unchanged(learn): pass
def frozen(learn): learn.model[0].requires_grad_(False)
def compiled(learn): learn.model = torch.compile(learn.model, backend='eager')
def parallel(learn): learn.model = nn.DataParallel(learn.model)
def copied(learn): learn.model = copy.deepcopy(learn.model)
def in_doubles(learn): learn.model = copy.deepcopy(learn.model)
def new_head(learn): learn.model[4] = nn.Linear(4,3)
def other_head(learn): learn.model[4] = nn.Linear(4,6)
def new_optimizer(learn): learn.create_opt()
def loaded(learn):
    learn.save('x')
    learn.load('x')

CHANGES = [unchanged, frozen, compiled, parallel, copied, new_head, other_head, new_optimizer, loaded]

@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('kw', [dict(), dict(fisher=None, l2sp=1., new=['4']), dict(fisher=None, l2sp=1.)])
def test_the_same_training_continues(source, fisher, change, kw, tmp_path):
    "The distance still counts from the source, and the penalty acts on the present parameters"
    cb = L2SPFisherCallback(**(dict(fisher=fisher) | kw))
    learn = fit(learner(tunable(source), path=tmp_path), cb)
    change(learn)
    learn.opt = None
    fit(learn, cb, n=2)
    if change in (compiled, parallel): learn.model = next(learn.model.children())
    shared = [n for n in cb.penalty.shared if n[0]!='4']
    assert len(shared)==6
    for n,p in learn.model.named_parameters(): assert cb.penalty.params[n] is p
    for n in shared: assert torch.equal(cb.penalty.anchor[n], dict(source.named_parameters())[n])
    if not kw or 'new' in kw: assert row(learn)['distance']==pytest.approx(from_source(learn, source), rel=1e-5)
    assert row(learn)['penalty']>0

def averaged(model):
    return {k: v+0.01*torch.randn_like(v) if v.is_floating_point() else v for k,v in model.state_dict().items()}

def test_another_model_in_the_same_learner(source, fisher):
    "A fresh one is fine where the Fisher can tell; otherwise it must be said"
    def replaced(cb, model):
        learn = fit(learner(tunable(source)), cb)
        learn.model,learn.opt = model,None
        return fit(learn, cb)
    trained = tunable(source)
    trained.load_state_dict(averaged(trained))
    assert row(replaced(L2SPFisherCallback(fisher=fisher), tunable(source, seed=5)))['distance']>0
    for kw in (dict(fisher=fisher), dict(l2sp=1.)):
        with pytest.raises(ValueError, match='0.weight.*anchor=source'): replaced(L2SPFisherCallback(**kw), trained)
        learn = replaced(L2SPFisherCallback(anchor=source, **kw), copy.deepcopy(trained))
        assert row(learn)['distance']==pytest.approx(from_source(learn, source), rel=1e-5)

def test_the_table_is_of_the_model_that_is_asked_for(source, fisher):
    cb = L2SPFisherCallback(fisher=fisher)
    learn = fit(learner(tunable(source)), cb)
    assert cb.table(learn.model).moved.sum()>0 and cb.table(tunable(source)).moved.sum()==0

# From where

ANCHORS = dict(model=lambda s: s, compiled=torch.compile, state_dict=lambda s: s.state_dict(),
               parameters=lambda s: dict(s.named_parameters()), parallel=lambda s: nn.DataParallel(s).state_dict())

@pytest.mark.parametrize('anchor', ANCHORS.values(), ids=ANCHORS)
def test_a_model_that_was_trained_before(source, fisher, anchor):
    "A cell that is run again"
    learn = fit(learner(tunable(source)), L2SPFisherCallback(fisher=fisher))
    before = copy.deepcopy(learn.model)
    with pytest.raises(ValueError, match='0.weight.*anchor=source.*anchor=learn.model'):
        fit(learn, L2SPFisherCallback(fisher=fisher))
    assert all(states(before, learn.model))
    with pytest.raises(ValueError, match='anchor=source'): L2SPFisherCallback(fisher=fisher).table(learn.model)
    fit(learn, L2SPFisherCallback(fisher=fisher, anchor=anchor(source)))
    assert row(learn)['distance']==pytest.approx(from_source(learn, source), rel=1e-5)

def test_tasks_in_sequence(source, fisher):
    "The anchor is where the model is, if that is said; and stays there"
    learn = fit(learner(tunable(source)), L2SPFisherCallback(fisher=fisher))
    first = copy.deepcopy(learn.model)
    cb = L2SPFisherCallback(fisher=fisher, anchor=learn.model)
    fit(learn, cb)
    assert row(learn)['distance']==pytest.approx(from_source(learn, first), rel=1e-4)
    fit(learner(copy.deepcopy(first)), cb)
    for n in cb.penalty.shared: assert torch.equal(cb.penalty.anchor[n], dict(first.named_parameters())[n])
    own = estimate_fisher(first, loader(3), progress=False)
    assert row(fit(learner(copy.deepcopy(first)), L2SPFisherCallback(fisher=own)))['distance']>0

def probed(learn):
    "Linear probe first"
    learn.model[:4].requires_grad_(False)
    learn.model[1].eval()
    fit(learn, Frozen())
    learn.model.requires_grad_(True)
    learn.opt = None
class Frozen(Callback):
    def before_train(self): self.learn.model[1].eval()
def half(learn): learn.model.half().float()
def bfloat16(learn): learn.model.bfloat16().float()
def double_and_back(learn): learn.model.double().float()
def nothing(learn): pass

@pytest.mark.parametrize('before', [nothing, probed, half, bfloat16, double_and_back, compiled])
@pytest.mark.parametrize('n_out', [3, 5])
def test_what_is_no_training_of_the_body(source, fisher, before, n_out):
    "The last layer may differ, in shape or in values: it is new"
    learn = learner(tunable(source, n_out))
    before(learn)
    cb = L2SPFisherCallback(fisher=fisher)
    fit(learn, cb)
    assert cb.penalty.shared==[n for n,_ in source.named_parameters() if n[0]!='4']

TYPES = torch.float32,torch.float16,torch.bfloat16,torch.float64
ROUNDED_TWICE = {torch.float16, torch.bfloat16}

@pytest.mark.parametrize('estimated_in,trained_in', [o for o in product(TYPES, TYPES) if set(o)!=ROUNDED_TWICE])
@pytest.mark.parametrize('moved', ['0.weight', '1.weight', '3.bias', None])
def test_a_small_change_is_seen_in_any_type(source, fisher, estimated_in, trained_in, moved):
    "Also of a weight of 1 in BatchNorm, which is 1 in 16 bits before and after"
    given = {n: p.detach().clone() for n,p in source.named_parameters()}
    f = DiagFisher(fisher.sums, 1, 'exact')
    digests = parameter_digests({n: p.to(estimated_in) for n,p in given.items()})
    f.provenance['parameters_sha256'] = json.dumps(digests)
    if moved: given[moved] += 0.1 if ROUNDED_TWICE & {estimated_in, trained_in} else 1e-3
    assert f.other_values({n: p.to(trained_in) for n,p in given.items()})==([moved] if moved else [])

def test_a_fisher_that_does_not_tell(source, fisher):
    "From an older file, or a plain dictionary: nothing is refused"
    about = {k: v for k,v in fisher.provenance.items() if k!='parameters_sha256'}
    old = DiagFisher(fisher.sums, fisher.n_images, fisher.kind, about)
    for f in (old, dict(fisher), old+fisher, fisher+old):
        learn = fit(learner(tunable(source)), L2SPFisherCallback(fisher=f))
        assert row(fit(learn, L2SPFisherCallback(fisher=f)))['distance']>0

def test_a_fisher_from_a_file_tells(source, fisher, tmp_path):
    for f in (DiagFisher.load(fisher.save(tmp_path/'f.safetensors', half=True)), fisher+fisher):
        learn = fit(learner(tunable(source)), L2SPFisherCallback(fisher=f))
        with pytest.raises(ValueError, match='anchor=source'): fit(learn, L2SPFisherCallback(fisher=f))

@pytest.mark.parametrize('bad', [5, 'source', [torch.ones(2)], 'fisher'])
@pytest.mark.parametrize('kw', ['anchor', 'fisher'])
def test_no_anchor_and_no_fisher(source, bad, kw):
    if bad=='fisher': bad = source if kw=='fisher' else {'0.weight': torch.ones(1)}
    model = tunable(source)
    with pytest.raises(ValueError, match='anchor|Fisher|no parameter'):
        fit(learner(model), L2SPFisherCallback(l2sp=1., **{kw: bad}))
    assert all(states(model, tunable(source)))

@pytest.mark.parametrize('known,is_warned', [
    (lambda source, fisher: {}, True), (lambda source, fisher: dict(new=[]), False),
    (lambda source, fisher: dict(new='4'), False), (lambda source, fisher: dict(anchor=source), False),
    (lambda source, fisher: dict(fisher=fisher), False)])
def test_a_new_head_that_nobody_names(source, fisher, known, is_warned):
    "It would be pulled to its random values: that is said at the first training, and once"
    cb = L2SPFisherCallback(l2sp=0.1, **known(source, fisher))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        fit(fit(learner(tunable(source)), cb), cb)
    assert ['anchor=source' in str(o.message) for o in found if 'L2SPFisher' in str(o.message)]==[True]*is_warned

# The table

def names(learn): return learn.recorder.metric_names[1:]
OURS = ['penalty','penalty_to_loss','distance']
PLAIN = ['train_loss','valid_loss','accuracy']

def test_columns_of_two_callbacks(source, fisher):
    a,b = L2SPFisherCallback(fisher=fisher),L2SPFisherCallback(l2sp=0.1, anchor=source)
    learn = fit(learner(tunable(source)), a, Retention(source, [(torch.randn(3,4), torch.arange(3))]), b, n=2)
    for _ in range(2):
        retained = ['retention_target_bn','retention_source_bn']
        assert names(learn)==[*PLAIN, *OURS, *retained, *[f'{o}_2' for o in OURS], 'time']
        assert row(learn)['penalty']==a.penalty.value().item() and row(learn)['penalty_2']==b.penalty.value().item()
        assert [len(o) for o in learn.recorder.values]==[len(names(learn))-1]*len(learn.recorder.values)
        fit(learn, a, Retention(source, [(torch.randn(3,4), torch.arange(3))]), b)

def test_columns_in_the_order_of_callbacks(source):
    "The published penalty runs before ours, though it was added later"
    model = tunable(source)
    published = AsPublished(copy.deepcopy(model))
    learn = fit(learner(model), L2SPFisherCallback(l2sp=0.1, new=[]), published)
    assert names(learn)==[*PLAIN, 'penalty', 'penalty_2', 'penalty_to_loss', 'distance', 'time']
    assert row(learn)['penalty']==torch.stack(published.values).mean().item()

class Raise(Callback):
    "Raise an error at an event"
    def __init__(self, event, error, order=0):
        self.error,self.order = error,order
        setattr(self, event, self._raise)
    def _raise(self):
        if not self.learn.lock.locked(): raise self.error

OUT_OF_MEMORY = torch.OutOfMemoryError('CUDA out of memory')
EVENTS = [('before_fit',20), ('before_fit',70), ('before_epoch',0), ('before_batch',0), ('after_step',20),
          ('after_epoch',0), ('after_epoch',70), ('before_validate',0), ('after_fit',0), ('after_train',70)]

@pytest.mark.parametrize('error,kept', [(KeyboardInterrupt,True), (OUT_OF_MEMORY,True), (OUT_OF_MEMORY,False)])
@pytest.mark.parametrize('event,order', EVENTS)
def test_after_an_error_anything_works(source, fisher, error, event, order, kept):
    cb,pictures = L2SPFisherCallback(fisher=fisher),[(torch.randn(3,4), torch.arange(3))]
    ours = [cb, Retention(source, pictures)]
    learn = learner(tunable(source), *(ours if kept else []))
    with pytest.raises(BaseException): fit(learn, *([] if kept else ours), Raise(event, error, order))
    assert [o.name for o in learn.metrics]==['accuracy']
    assert len(learn.validate())==2 and len(learn.get_preds()[0])==16
    with learn.no_bar(): assert 'Linear' in str(learn.summary())
    pickle.loads(pickle.dumps(learn))
    again = fit(learn, *([] if kept else ours))
    assert names(again)==[*PLAIN, *OURS, 'retention_target_bn', 'retention_source_bn', 'time']
    assert len(row(again))==len(names(again))-1
    assert 'penalty' not in names(fit(learn)) or kept

CANCELLED = [('before_batch', CancelFitException), ('after_step', CancelFitException),
             ('after_step', CancelEpochException), ('after_step', CancelTrainException),
             ('before_validate', CancelValidException)]

@pytest.mark.parametrize('event,error', CANCELLED)
def test_cancelled(source, fisher, event, error):
    learn = fit(learner(tunable(source)), L2SPFisherCallback(fisher=fisher), Raise(event, error), n=2)
    assert len(learn.validate())==2 and row(fit(learn, L2SPFisherCallback(fisher=fisher, anchor=source)))['penalty']>=0

@pytest.mark.parametrize('kept', [True, False])
def test_before_any_training(source, fisher, kept):
    "Summary, validation, predictions and the search for a learning rate change nothing; the anchor is still to come"
    cb = L2SPFisherCallback(fisher=fisher)
    learn = learner(tunable(source), *[cb][:kept])
    with learn.no_bar():
        learn.summary()
        learn.validate(cbs=None if kept else cb)
        learn.get_preds(cbs=None if kept else cb)
    assert cb.penalty is None
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        learn.lr_find(show_plot=False, num_it=6)
    assert all(states(learn.model, tunable(source))[:2])
    fit(learn, *[] if kept else [cb])
    assert row(learn)['distance']==pytest.approx(from_source(learn, source), rel=1e-5)

def test_no_batch_at_all(source, fisher):
    learn = fit(learner(tunable(source), train=loader(3, n=4, drop_last=True)), L2SPFisherCallback(fisher=fisher))
    assert row(learn)['penalty']==0 and math.isnan(row(learn)['penalty_to_loss']) and len(row(learn))==6

@pytest.mark.parametrize('alpha,ratio', [(0., math.nan), (1., math.inf)])
def test_a_loss_of_zero(source, alpha, ratio):
    learn = learner(tunable(source), loss=lambda x, y: 0*x.sum())
    learn.metrics = []
    fit(learn, L2SPFisherCallback(alpha=alpha))
    assert row(learn)['penalty_to_loss']==pytest.approx(ratio, nan_ok=True)

def test_loggers_and_monitors(source, fisher, tmp_path):
    learn = learner(tunable(source), path=tmp_path)
    cbs = [CSVLogger(), SaveModelCallback(monitor='distance'), L2SPFisherCallback(fisher=fisher)]
    with learn.no_bar(): learn.fit(2, 0.1, cbs=cbs)
    log = pd.read_csv(tmp_path/'history.csv')
    assert list(log.columns)==['epoch',*names(learn)] and log.distance.notna().all()

def test_no_recorder(source, fisher):
    learn,cb = learner(tunable(source), default_cbs=False),L2SPFisherCallback(fisher=fisher, l2sp=1e9)
    learn.fit(1, 0.1, cbs=cb)
    assert cb.penalty.distance()<1e-3                                  # held to the source

# What a Retention is given

@pytest.mark.parametrize('pictures,named', [
    (pd.DataFrame(dict(path=['a'])), 'DataFrame.*source_dl'), ('folder', 'str.*source_dl'), ([], 'empty'),
    ((o for o in []), 'generator.*once'), (5, 'int'),
    ([(torch.randn(3,4), torch.tensor([0,1,5]))], '0 to 5.*5 classes'),
    ([(torch.randn(3,4), torch.tensor([0,-1,2]))], '-1 to 2')])
def test_pictures_that_do_not_fit(source, pictures, named):
    model = tunable(source)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=named): fit(learner(model), Retention(source, pictures))
    assert all(states(before, model))

def test_the_source_is_not_the_model_in_training(source):
    model = tunable(source)
    for same in (model, nn.DataParallel(model), nn.Sequential(model[0], nn.Linear(4,5))):
        with pytest.raises(ValueError, match='source.*cop'): fit(learner(model), Retention(same, loader(5)))
        with pytest.raises(ValueError, match='source.*cop'): fit(learner(model), AsPublished(same))

def test_retention_and_published_penalty_in_several_learners(source):
    kept = Retention(source, loader(5))
    for seed in (2,3):
        model = tunable(source, seed=seed)
        a = fit(learner(model), kept, AsPublished(copy.deepcopy(model)))
        cbs = Retention(source, loader(5)),AsPublished(tunable(source, seed=seed))
        b = fit(learner(tunable(source, seed=seed)), *cbs)
        assert row(a)==row(b)
