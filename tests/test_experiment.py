"What an arm does to the model"
from dataclasses import replace
import pandas as pd, pytest, torch
from fgvc_fisher.experiment import Run, fine_tune
from fgvc_fisher.experiment.demo import _conclusions
from fgvc_fisher.learner import source_model
from fgvc_fisher.experiment.run import make_learner

def test_l2sp_holds_the_body_and_not_the_new_head(drawn):
    source = source_model('tiny:network', weights=None)
    run = Run(str(drawn), size=32, bs=8, epochs=1, num_workers=0)
    held,free = fine_tune(replace(run, l2sp=1e9), source).model,make_learner(run, source).model
    theta0 = dict(source.named_parameters())
    for n,p in held.named_parameters():
        if not n.startswith('fc.'): assert torch.allclose(p, theta0[n], atol=1e-5), n
    assert not torch.allclose(held.fc.weight, free.fc.weight, atol=1e-5)

@pytest.mark.parametrize('shift,said', [(0., 'not significantly different'), (0.2, '20.0 points higher'),
                                        (-0.2, '20.0 points lower')])
def test_the_demos_conclusions(shift, said):
    "A difference whose interval includes zero is called none; which one is larger is read from the rows"
    default,noise = 'L2-SP-Fisher, strength = 0.5',[0.01,-0.01,0.02,-0.02]
    def rows(arm, more): return [dict(id=f'{arm}{i}', arm=arm, seed=i, before=0.9, test_last=0.5+more+o,
                                      retention_target_bn=0.4+more-o) for i,o in enumerate(noise)]
    flat = [dict(o, test_last=0.5, retention_target_bn=0.4) for o in rows('plain', 0.)]
    sentences = _conclusions(pd.DataFrame([*flat, *rows('L2-SP, l2sp = 1', 0.), *rows(default, shift)]), default)
    assert len(sentences)==3 and '90.0%' in sentences[0] and '40.0%' in sentences[0] and '50.0%' in sentences[0]
    assert default in sentences[1] and sentences[1].count(said)==2
