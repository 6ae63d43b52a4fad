"Whole runs of networks that are unlike most: with two heads, with tied weights, with one layer before the logits"
from dataclasses import replace
from pathlib import Path
import pandas as pd, pytest, timm, torch
from fastai.callback.core import Callback
from safetensors.torch import load_file
from torch import nn
from fgvc_fisher.experiment import do_run, fine_tune
from fgvc_fisher.experiment import load_run
from fgvc_fisher.experiment.store import save_weights
from fgvc_fisher.learner import head_names, source_model

class Tied(nn.Module):
    "Two convolutions with the same weights"
    def __init__(self):
        super().__init__()
        self.stem,self.first,self.second = nn.Conv2d(3, 8, 3, 4),nn.Conv2d(8, 8, 3),nn.Conv2d(8, 8, 3)
        self.second.weight = self.first.weight
        self.fc = nn.Linear(8, 4)
    def forward(self, x):
        return self.fc(self.second(self.first(self.stem(x).relu()).relu()).relu().mean((2,3)))

class Versioned(nn.Conv2d):
    "As torchvision's MNASNet it takes only weights that say for which version of its class they are"
    _version = 2
    def _load_from_state_dict(self, state, prefix, metadata, *args):
        if metadata.get('version')!=2: raise ValueError(f"version {metadata.get('version')}")
        super()._load_from_state_dict(state, prefix, metadata, *args)

class Flattens(nn.Module):
    "A feature map goes through `view`, which raises an error in channels-last memory"
    def __init__(self):
        super().__init__()
        self.conv,self.fc = Versioned(3, 8, 3, 4),nn.Linear(8*8*8, 4)
    def forward(self, x): return self.fc(self.conv(x).relu().view(len(x), -1))

def two_heads():
    return timm.models.deit.VisionTransformerDistilled(img_size=32, patch_size=16, embed_dim=24, depth=2, num_heads=2,
                                                       num_classes=4)

class Stop(Callback):
    def before_epoch(self):
        if self.epoch==2: raise KeyboardInterrupt

@pytest.fixture
def run(tiny_run, monkeypatch):
    monkeypatch.setattr(timm.models, 'tied', Tied, raising=False)
    monkeypatch.setattr(timm.models, 'two_heads', two_heads, raising=False)
    monkeypatch.setattr(timm.models, 'flattens', Flattens, raising=False)
    return replace(tiny_run, weights=False, test='')

def test_auxiliary_outputs_are_refused_before_training(run, tmp_path):
    run = replace(run, arch='torchvision.models:googlenet')
    with pytest.raises(ValueError, match='GoogLeNetOutputs.*aux_logits=False'): do_run(run, tmp_path/'run', quiet=True)
    assert not (tmp_path/'run').exists()

@pytest.mark.parametrize('arch,heads,tune', [
    ('tied', ['fc'], 'all'), ('two_heads', ['head','head_dist'], 'head first'), ('flattens', ['fc'], 'all'),
    ('flattens', ['fc'], 'head')])
def test_a_run(arch, heads, tune, run, tmp_path):
    run = replace(run, arch=f'timm.models:{arch}', tune=tune, beta=0 if tune=='head' else run.beta)
    row = do_run(run, tmp_path/'whole', quiet=True)
    with pytest.raises(KeyboardInterrupt): do_run(run, tmp_path/'resumed', cbs=[Stop()], quiet=True)
    assert do_run(run, tmp_path/'resumed', quiet=True)['last']==row['last']
    whole,resumed = [load_file(tmp_path/o/'model.safetensors') for o in ('whole','resumed')]
    assert all(torch.equal(v, resumed[k]) for k,v in whole.items())
    learn,source = load_run(tmp_path/'whole'),source_model(run.arch, None)
    assert head_names(learn.model)==head_names(source)==heads
    if arch=='tied': assert learn.model.first.weight is learn.model.second.weight
    assert all(torch.equal(v.cpu(), whole[k]) for k,v in learn.model.state_dict().items())
    curve = pd.read_csv(tmp_path/'whole/curve.csv')
    assert curve.filter(like='retention').notna().all(axis=None)

def test_a_probe_trains_every_head_and_nothing_else(run):
    run = replace(run, arch='timm.models:two_heads', tune='head', beta=0)
    source = source_model(run.arch, None)
    model = fine_tune(run, source, quiet=True).model.cpu()
    theirs = dict(source.named_parameters())
    for n,p in model.named_parameters(): assert n.startswith('head') or torch.equal(p, theirs[n])
    assert not model.head.weight.equal(model.head_dist.weight)

@pytest.mark.parametrize('make', [
    Tied, lambda: nn.Sequential(layer := nn.Linear(3, 3), layer), lambda: nn.ModuleDict(dict(a=nn.Linear(3, 3)))])
def test_shared_memory_is_written(make, tmp_path):
    model = make()
    save_weights(model, tmp_path/'w.safetensors')
    saved = load_file(tmp_path/'w.safetensors')
    assert saved.keys()==model.state_dict().keys()
    assert all(torch.equal(v, saved[k]) for k,v in model.state_dict().items())

def test_every_classifier_of_timm_is_exact():
    "The committed table of `benchmarks/every_classifier.py`"
    t = pd.read_csv(Path(__file__).parents[1]/'results/every_classifier/table.csv')
    assert len(t)>600 and t.model.is_unique
    assert t.how.str.startswith('exact').all() and (t.difference<1e-6).all()
