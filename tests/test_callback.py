"The callback in a Learner on pictures: export, columns, retention, BatchNorm"
import copy, pickle
import pytest, torch
from fastai.basics import load_learner
from fastai.callback.tracker import SaveModelCallback
from fastai.torch_core import set_seed
from fgvc_fisher.callback import STRENGTH, L2SPFisherCallback
from fgvc_fisher.data import aircraft_dls
from fgvc_fisher.fisher import estimate_fisher
from fgvc_fisher.learner import aircraft_learner, source_dl, source_model
from fgvc_fisher.retention import Retention, accuracy_on, with_source_head

@pytest.fixture(scope='module')
def parts(drawn_source):
    torch.manual_seed(0)
    source = source_model('tiny:network', weights=None)
    dl = source_dl(drawn_source, source, size=64, bs=8, num_workers=0)
    return source,dl,estimate_fisher(source, dl, n_images=8, progress=False)

def learner(drawn, source, **kwargs):
    set_seed(3, reproducible=True)
    return aircraft_learner(aircraft_dls(drawn, size=64, bs=8, num_workers=0), source, **kwargs)

def fit(learn, *cbs, n=1):
    with learn.no_bar(), learn.no_logging(): learn.fit(n, 0.01, cbs=cbs)
    return learn

def test_export_leaves_anchor_fisher_and_source_behind(drawn, parts, tmp_path):
    source,dl,fisher = parts
    learn = learner(drawn, source, path=tmp_path)
    learn.export('small.pkl')
    penalty = L2SPFisherCallback(beta=1., fisher=fisher, anchor=dict(source.named_parameters()))
    learn.add_cbs([penalty, Retention(source, dl)])
    fit(learn).export('export.pkl')
    assert (tmp_path/'export.pkl').stat().st_size < 1.1*(tmp_path/'small.pkl').stat().st_size
    back = load_learner(tmp_path/'export.pkl')
    assert all(torch.equal(p, q) for p,q in zip(back.model.parameters(), learn.model.parameters()))
    with learn.no_bar(), back.no_bar():
        assert back.predict(next((drawn/'data/images').glob('*.jpg')))[0] in back.dls.vocab
        assert len(learn.validate())==2 and len(back.get_preds(dl=learn.dls.valid)[0])==len(learn.dls.valid_ds)
    with pytest.raises(ValueError, match='L2SPFisherCallback.*fisher, anchor, penalty'): back.fit(1)
    with pytest.raises(ValueError, match='Retention.*source, pictures'):
        fit(learner(drawn, source), pickle.loads(pickle.dumps(Retention(source, dl))))

def test_columns_come_and_go(drawn, parts):
    source,dl,fisher = parts
    learn,cb = learner(drawn, source),L2SPFisherCallback(beta=1., fisher=fisher)
    fit(learn, cb, Retention(source, dl), n=2)
    names,values = learn.recorder.metric_names,learn.recorder.values
    ours = ['penalty','penalty_to_loss','distance','retention_target_bn','retention_source_bn']
    assert names==['epoch','train_loss','valid_loss','accuracy',*ours,'time']
    last = dict(zip(names[1:], values[-1]))
    assert last['penalty']==cb.penalty.value().item() and last['distance']==cb.penalty.distance() > 0
    assert last['penalty_to_loss']==pytest.approx(last['penalty']/last['train_loss'])
    assert last['retention_source_bn']==accuracy_on(with_source_head(learn.model, source, 'source'), dl)
    assert [o.name for o in learn.metrics]==['accuracy']
    fit(learn)
    assert learn.recorder.metric_names==['epoch','train_loss','valid_loss','accuracy','time']

def test_without_a_strength_it_is_the_default(drawn, parts):
    source,dl,fisher = parts
    def tuned(**kw): return dict(fit(learner(drawn, source), L2SPFisherCallback(**kw)).model.named_parameters())
    a,b,none = tuned(fisher=fisher),tuned(fisher=fisher, strength=STRENGTH),tuned()
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], none[k]) for k in a)
    with pytest.raises(ValueError, match='both'): L2SPFisherCallback(fisher=fisher, beta=1., strength=1.)

def test_retention_is_measured_with_the_sources_head(drawn, drawn_source, tiny_weights):
    "As many outputs before and after, so that the tuned head would fit, too"
    source = source_model('tiny:network', weights=tiny_weights)
    dl = source_dl(drawn_source, source, size=64, bs=8, num_workers=0)
    learn = fit(learner(drawn, source), Retention(source, dl))
    by_hand = copy.deepcopy(learn.model)
    by_hand.fc = source.fc
    assert learn.model.fc.weight.shape==source.fc.weight.shape
    x = dl.one_batch()[0].as_subclass(torch.Tensor)
    with torch.no_grad(): assert torch.equal(with_source_head(learn.model, source)(x), by_hand.eval()(x))
    last = dict(zip(learn.recorder.metric_names[1:], learn.recorder.values[-1]))
    assert last['retention_target_bn']==accuracy_on(by_hand, dl)

def test_columns_after_an_interrupted_training(drawn, parts):
    "Ctrl-C leaves the columns; the next training has each of them once"
    class Stop(L2SPFisherCallback):
        def after_batch(self): raise KeyboardInterrupt
    learn = learner(drawn, parts[0])
    with pytest.raises(KeyboardInterrupt): fit(learn, Stop())
    fit(learn, L2SPFisherCallback())
    assert learn.recorder.metric_names.count('penalty')==1

def test_measuring_retention_changes_nothing(drawn, parts):
    source,dl,_ = parts
    a,b = fit(learner(drawn, source), n=2),fit(learner(drawn, source), Retention(source, dl), n=2)
    for k,v in a.model.state_dict().items(): assert torch.equal(v, b.model.state_dict()[k]), k

def test_resuming_in_a_new_learner_is_the_same_to_the_bit(drawn, parts, tmp_path):
    "Model, optimizer, schedule and penalty; fastai shuffles and crops differently, unless each epoch is seeded"
    source,_,fisher = parts
    class Seeded(SaveModelCallback):
        def before_epoch(self):
            set_seed(self.epoch, reproducible=True)
            self.dls.train.rng.seed(self.epoch)
    def train(**kwargs):
        learn = learner(drawn, source, path=tmp_path)
        if kwargs: learn.load('epoch_0')
        cbs = [L2SPFisherCallback(1e-3, 1., fisher, anchor=dict(source.named_parameters())),
               Seeded(every_epoch=True, fname='epoch', with_opt=True)]
        with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(3, 0.02, cbs=cbs, **kwargs)
        return learn
    whole = copy.deepcopy(train().model.state_dict())
    for k,v in train(start_epoch=1).model.state_dict().items(): assert torch.equal(v, whole[k]), k

def test_frozen_batch_norm_keeps_the_sources_statistics(drawn, parts):
    source = parts[0]
    learn = fit(learner(drawn, source), L2SPFisherCallback(freeze_bn=True))
    buffers = dict(source.named_buffers())
    assert all(torch.equal(v, buffers[n]) for n,v in learn.model.named_buffers())
    assert not torch.equal(learn.model.bn1.weight, source.bn1.weight)

def test_a_table_before_training(drawn, parts):
    source,_,fisher = parts
    learn,cb = learner(drawn, source),L2SPFisherCallback(5e-4, 1., fisher, alpha_on='new', beta_on='weights')
    table = cb.table(learn.model).set_index('parameter')
    assert set(table[table.terms=='alpha'].index)==set(table[table.part=='new'].index)=={'fc.weight','fc.bias'}
    assert set(table[table.terms=='beta F'].index)==set(table[(table.kind=='weight') & (table.part=='shared')].index)
    assert cb.penalty is None
    assert len(fit(learn, cb).model.state_dict()) and cb.table().moved.sum()>0

@pytest.mark.parametrize('kind', ['fisher', 'nan', 'inf', 'state_dict with nan', 'no values'])
def test_an_anchor_that_is_none_is_refused_before_the_first_step(kind, drawn, parts):
    source,_,fisher = parts
    wrong = copy.deepcopy(source)
    if kind!='fisher': wrong.conv2.weight.data[0] = torch.inf if kind=='inf' else torch.nan
    if kind=='no values': wrong = wrong.to('meta')
    anchor = fisher if kind=='fisher' else wrong.state_dict() if kind.startswith('state_dict') else wrong
    learn = learner(drawn, source)
    before = copy.deepcopy(learn.model.state_dict())
    with pytest.raises(ValueError, match='anchor'): fit(learn, L2SPFisherCallback(fisher=fisher, anchor=anchor))
    assert all(torch.equal(v, before[k]) for k,v in learn.model.state_dict().items())
    fit(learn, L2SPFisherCallback(fisher=fisher, anchor=source))                # and the Learner can still be trained
