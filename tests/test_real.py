"Real photographs and real weights"
import runpy
from pathlib import Path
import pandas as pd, pytest, torch
from fastai.torch_core import set_seed
from torchvision.models import squeezenet1_1
from fgvc_fisher.data import aircraft_dls, read_aircraft, read_pictures
from fgvc_fisher.experiment import grid, read_curves, sweep
from fgvc_fisher.fisher import estimate_fisher
from fgvc_fisher.learner import aircraft_learner, source_dl, source_model
from fgvc_fisher.penalty import interpolate, merge
from fgvc_fisher.retention import accuracy_on, retention

@pytest.mark.parametrize('name,train,val,classes', [('warbirds30', 5213, 1148, 30), ('airliners17', 476, 102, 17)])
def test_trees_are_read_as_they_lie(photos, name, train, val, classes):
    table = read_aircraft(photos/'data'/name)
    assert table.split.value_counts().to_dict()=={'train': train, 'val': val}
    assert len(table.label.cat.categories)==table.label.nunique()==classes
    assert read_aircraft(photos/'data'/name/'data', 'manufacturer').label.nunique() <= classes

def test_a_batch_of_photographs(photos):
    dls = aircraft_dls(photos/'data/warbirds30', size=64, bs=8, num_workers=0)
    x,y = dls.one_batch()
    assert x.shape==(8,3,64,64) and 0<=x.min()<x.max()<=1 and y.max()<30
    again = [next(iter(dls.valid))[0] for _ in range(2)]
    assert torch.equal(*again)

@pytest.mark.slow
def test_real_weights_know_imagenet(photos, mobilenet_075):
    "0.840 and 0.623 on all 1,000 pictures; here every sixteenth"
    pictures = read_pictures(photos/'data/imagenet_sample')[::16].reset_index(drop=True)
    assert accuracy_on(mobilenet_075, source_dl(pictures, mobilenet_075, num_workers=2)) > 0.76
    squeezenet = source_model(squeezenet1_1, photos/'weights/squeezenet1_1_imagenet_fp16.safetensors')
    assert accuracy_on(squeezenet, source_dl(pictures, squeezenet, size=227, num_workers=2)) > 0.53

def test_fisher_of_real_weights_against_autograd(photos, mobilenet_075):
    "In float32, on photographs"
    pictures = read_pictures(photos/'data/imagenet_sample')[:3]
    x,y = source_dl(pictures, mobilenet_075, size=96, num_workers=0).one_batch()
    fisher = estimate_fisher(mobilenet_075, [(x,y)], 'empirical', progress=False)
    total = {n: torch.zeros_like(p) for n,p in mobilenet_075.named_parameters()}
    for xi,yi in zip(x, y):
        logp = mobilenet_075(xi[None].as_subclass(torch.Tensor)).log_softmax(-1)[0]
        grads = torch.autograd.grad(logp[int(yi)], [*mobilenet_075.parameters()])
        for n,g in zip(total, grads): total[n] += g**2/3
    for n,f in total.items(): assert (fisher[n]-f).norm() <= 1e-3*f.norm(), n

@pytest.mark.slow
def test_kinds_on_photographs_agree_as_their_errors_say(photos, mobilenet_075):
    dl = source_dl(read_pictures(photos/'data/imagenet_sample')[:40], mobilenet_075, size=64, num_workers=2)
    sampled = estimate_fisher(mobilenet_075, dl, n_samples=3, progress=False)
    exact = estimate_fisher(mobilenet_075, dl, kind='exact', mass=0.7, progress=False)
    assert exact.n_images==sampled.n_images==40 and 0 < float(exact.provenance['mass_left']) < 0.3
    a,b = sampled.error().loc['total'],exact.error().loc['total']
    assert abs(a.total-b.total) < 4*(a.error**2+b.error**2)**0.5 + 0.3*b.total
    assert not exact.coverage().rule.str.startswith('the whole network').any()
    stopped = estimate_fisher(mobilenet_075, dl, target_error=2*sampled.error().relative['total'], progress=False)
    assert 30 <= stopped.n_images < 40

def test_retention_of_the_source_itself_is_its_accuracy(photos, mobilenet_075):
    pictures = read_pictures(photos/'data/imagenet_sample')[:64]
    dl = source_dl(pictures, mobilenet_075, size=96, num_workers=0)
    dls = aircraft_dls(photos/'data/airliners17', size=96, bs=8, num_workers=0)
    untrained = aircraft_learner(dls, mobilenet_075).model
    assert set(retention(untrained, mobilenet_075, dl).values())=={accuracy_on(mobilenet_075, dl)}

@pytest.mark.slow
def test_inception_v4_on_one_real_batch(photos):
    one_batch = runpy.run_path(str(Path(__file__).parent.parent/'benchmarks/inception_v4.py'))['one_batch']
    _,learn,fisher,cb = one_batch(photos, size=96, bs=4)
    assert sum(p.numel() for p in learn.model.parameters())==41_304_201
    assert fisher.n_images==4 and len(fisher)==449 and all(v.isfinite().all() for v in fisher.values())
    assert len(cb.penalty.shared)==447 and len(learn.opt.param_lists)==3
    assert torch.isfinite(torch.tensor(learn.recorder.values[-1])).all() and cb.penalty.value().isfinite()

def test_stable_at_every_beta_with_a_real_fisher(photos, mobilenet_075, monkeypatch):
    "The proximal step never goes further for a larger beta; the explicit one breaks where it says it will"
    monkeypatch.syspath_prepend(Path(__file__).parent.parent/'benchmarks')
    from stability import train
    set_seed(0)                                                # of the new head and of the order of the pictures
    pictures = read_pictures(photos/'data/imagenet_sample')[:64]
    fisher = estimate_fisher(mobilenet_075, source_dl(pictures, mobilenet_075, size=64, num_workers=0), progress=False)
    learn = aircraft_learner(aircraft_dls(photos/'data/airliners17', size=64, bs=8, num_workers=0), mobilenet_075)
    batches = [[o.as_subclass(torch.Tensor) for o in b] for _,b in zip(range(6), learn.dls.train)]
    def run(beta, step): return list(train(learn.model, mobilenet_075, fisher, batches, beta, step, lr=0.02))
    last = None
    for beta in (0., 1., 100., 1e6, 1e12):
        distance = [o['distance'] for o in run(beta, 'prox')]
        assert len(distance)==6 and (last is None or distance[-1] < last*1.001)
        last = distance[-1]
    broken = run(100., 'grad')
    assert broken[0]['stiffness']>2 and (len(broken)<6 or broken[-1]['distance'] > 100*run(0., 'prox')[-1]['distance'])

def test_merging_ends_at_both_models(photos, mobilenet_075):
    "On photographs: the far ends of both curves know what source and tuned model know"
    pictures = read_pictures(photos/'data/imagenet_sample')[:64]
    dl = source_dl(pictures, mobilenet_075, size=64, num_workers=0)
    learn = aircraft_learner(aircraft_dls(photos/'data/airliners17', size=64, bs=8, num_workers=0), mobilenet_075)
    with torch.no_grad():
        for p in learn.model.parameters(): p.add_(0.05*torch.randn_like(p)*p.abs().mean())
    both = (mobilenet_075, dl), (learn.model, learn.dls.valid)
    fishers = [estimate_fisher(m, d, n_images=16, progress=False) for m,d in both]
    source_end,tuned_end = [merge(mobilenet_075, learn.model, *fishers, beta) for beta in (1e30, 0.)]
    source,ends = dict(mobilenet_075.named_parameters()),[interpolate(mobilenet_075, learn.model, t) for t in (0., 1.)]
    for n,p in source_end.named_parameters():
        if p.shape!=source[n].shape: continue
        seen = fishers[0][n]>0          # elsewhere the tuned model's value stays: sixteen pictures saw no Fisher
        assert torch.allclose(p[seen], source[n][seen], rtol=1e-5, atol=1e-7), n
    assert all(torch.equal(p, q) for p,q in zip(tuned_end.parameters(), learn.model.parameters()))
    assert retention(ends[0], mobilenet_075, dl)['source']==accuracy_on(mobilenet_075, dl)
    assert retention(ends[1], mobilenet_075, dl)==retention(tuned_end, mobilenet_075, dl)
    kept = retention(ends[0], mobilenet_075, dl)
    for k,v in retention(source_end, mobilenet_075, dl).items(): assert abs(v-kept[k]) <= 3/64, k

@pytest.mark.slow
def test_the_published_arm_beside_its_control(photos, tmp_path):
    "The paper's recipe and penalty on photographs: after an epoch the arm is close to its control, and not the same"
    arms = [dict(arm='plain'), dict(arm='as published', step='published', alpha=5e-4, beta=4e-4, l2sp=0.004)]
    sample = pd.read_csv(photos/'data/imagenet_sample/labels.csv')[::10]
    sample.assign(path=[str(photos/'data/imagenet_sample'/o) for o in sample.path]).to_csv(tmp_path/'labels.csv')
    runs = grid(arms, [1], data=photos/'data/airliners17', source=tmp_path,
                arch='conftest:mobilenet', weights=str(photos/'weights/mobilenetv1_075_imagenet.safetensors'),
                recipe='published', transforms='published', size=64, epochs=1, fraction=0.5, num_workers=0)
    plain,published = sweep(runs, tmp_path/'out', quiet=True).to_dict('records')
    curves = read_curves(tmp_path/'out').set_index('arm')
    assert plain['before']==published['before']>0.1 and curves.penalty['as published']>0.001
    assert 0<abs(curves.valid_loss['plain']-curves.valid_loss['as published'])<0.1
    shares = 'best', 'last', 'retention_target_bn', 'retention_source_bn'
    assert all(0<=o[k]<=1 for o in (plain,published) for k in shares)
