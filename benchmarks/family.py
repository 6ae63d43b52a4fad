"""Other ways to retain the source task, on the task of `warbirds.py`: last layer, linear probe first, distillation.

    python benchmarks/family.py PATH

PATH and the training settings are as for `warbirds.py`, and the table and the picture include that script's arms. These
methods serve only as a comparison; the package does not contain them.
"""
import copy
from functools import partial
from pathlib import Path
import pandas as pd, torch, torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.tracker import TerminateOnNaNCallback
from fastai.torch_core import set_seed
from fastcore.script import call_parse
from fgvc_fisher.callback import L2SPFisherCallback
from fgvc_fisher.data import aircraft_dls
from fgvc_fisher.learner import aircraft_learner, head_names
from warbirds import report, rows, run_arms

def start(run, source):
    "A Learner that freezes BatchNorm's parameters together with their group"
    set_seed(run.seed, reproducible=True)
    return aircraft_learner(aircraft_dls(run.data, run.level, size=run.size, bs=run.bs), source, train_bn=False)

def probe(run, learn, epochs):
    "Train only the last layer, with BatchNorm's statistics frozen"
    learn.freeze()
    learn.fit_one_cycle(epochs, run.lr, cbs=[L2SPFisherCallback(freeze_bn=True), TerminateOnNaNCallback()])
    return learn

def last_layer(run, source, fisher): return probe(run, start(run, source), run.epochs)

def probe_first(run, source, fisher):
    "Train the last layer for an epoch, then all layers (LP-FT, Kumar et al. 2022)"
    learn = probe(run, start(run, source), 1)
    learn.unfreeze()
    learn.fit_one_cycle(run.epochs, run.lr, cbs=TerminateOnNaNCallback())
    return learn

class LwF(Callback):
    """Learning without Forgetting (Li and Hoiem 2016): keep the source's outputs on the target's pictures.
    The source's head is fixed, because retention is measured with that head. By default the source normalises by
    the batch, as the tuned model does; with its own statistics (`own_bn`) the two differ by 12 nats before the first
    step."""
    run_valid = False
    def __init__(self, source, weight, own_bn=False, temperature=2.):
        self.source = copy.deepcopy(source).requires_grad_(False).train(not own_bn)
        self.weight,self.temperature = weight,temperature
    def before_fit(self):
        head = self.learn.model.get_submodule(head_names(self.learn.model)[-1])
        self.hook = head.register_forward_pre_hook(lambda module, args: setattr(self, 'features', args[0]))
    def after_loss(self):
        with torch.no_grad(): wanted = self.source(self.x)/self.temperature
        now = self.source.get_submodule(head_names(self.source)[-1])(self.features)/self.temperature
        loss = F.kl_div(now.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction='batchmean')
        loss = loss*self.temperature**2
        self.learn.loss_grad = self.loss_grad + self.weight*loss
    def after_fit(self): self.hook.remove()

def distil(run, source, fisher, **kwargs):
    learn = start(run, source)
    learn.fit_one_cycle(run.epochs, run.lr, cbs=[LwF(source, **kwargs), TerminateOnNaNCallback()])
    return learn

ARMS = {'last layer only': dict(tune=last_layer), 'linear probe first': dict(tune=probe_first),
        'LwF, 1': dict(tune=partial(distil, weight=1.)),
        'LwF, 1, own statistics': dict(tune=partial(distil, weight=1., own_bn=True)),
        'LwF, 10, own statistics': dict(tune=partial(distil, weight=10., own_bn=True))}

@call_parse
def main(
    photos:str, # Folder with data/ and weights/
    out:str='results/family', # Folder for the rows, the table and the picture
    arms:str='results/warbirds30/runs.csv', # The rows of `warbirds.py`
    epochs:int=4, # Passes over the training split
    size:int=128, # Side of the pictures in pixels
    seed:int=42, # Of the head, the order of the pictures and their crops
):
    run_arms(ARMS, photos, out, size, epochs, [seed])
    report(pd.concat([pd.read_csv(arms), rows(Path(out)/'runs.csv')]), out)
