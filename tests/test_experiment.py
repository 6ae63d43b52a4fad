"What an arm does to the model"
from dataclasses import replace
import torch
from fgvc_fisher.experiment import Run, fine_tune
from fgvc_fisher.learner import source_model
from fgvc_fisher.experiment.run import make_learner

def test_l2sp_holds_the_body_and_not_the_new_head(drawn):
    source = source_model('test_resnet', weights=None)
    run = Run(str(drawn), size=32, bs=8, epochs=1, num_workers=0)
    held,free = fine_tune(replace(run, l2sp=1e9), source).model,make_learner(run, source).model
    theta0 = dict(source.named_parameters())
    for n,p in held.named_parameters():
        if not n.startswith('fc.'): assert torch.allclose(p, theta0[n], atol=1e-5), n
    assert not torch.allclose(held.fc.weight, free.fc.weight, atol=1e-5)
