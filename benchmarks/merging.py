"""Merge one fine-tuned MobileNet-v1 with its source, weighted by their Fishers and linearly.

    python benchmarks/merging.py PATH

PATH is as for `warbirds.py`, and the training is that script's plain arm with seed 42. Both frontiers come from this
one training. Every point has the accuracy on the target's validation pictures and the retention on ImageNet pictures.
A merged model needs BatchNorm statistics of its own: they are estimated on the pictures of the target's Fisher.
Retention is also measured with the source's statistics.
"""
from pathlib import Path
import matplotlib.pyplot as plt, pandas as pd
from fastcore.script import call_parse
from torch.optim.swa_utils import update_bn
from fgvc_fisher.data import picture_dl, pick_split, read_aircraft
from fgvc_fisher.experiment import Run, fine_tune, frontier
from fgvc_fisher.fisher import estimate_fisher
from fgvc_fisher.learner import normalise
from fgvc_fisher.penalty import interpolate, merge
from fgvc_fisher.retention import accuracy_on, retention
from warbirds import machine, task

BETAS = [1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1., 10., 100.]
PARTS = [1., 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.]

def points(source, tuned, fishers):
    "`(method, strength, model)` along both curves"
    for t in PARTS: yield 'straight, WiSE-FT',t,interpolate(source, tuned, t)
    for beta in BETAS: yield 'Fisher-weighted',beta,merge(source, tuned, *fishers, beta)

def plot(table, others, before):
    "Both curves, and the arms that were fine-tuned one by one"
    ax = plt.subplots(figsize=(9,5), layout='constrained')[1]
    for (method,t),color in zip(table.groupby('method', sort=False), ('#7a3b8f','#d2691e')):
        for column,ls in (('retention_target_bn','-'), ('retention_source_bn',':')):
            label = f'{method} ({column[10:16]} statistics)'
            ax.plot(t[column], t['last'], ls=ls, marker='.', ms=5, color=color, label=label)
    frontier(others, before=before, ax=ax)
    ax.set_title("One fine-tuned model merged with its source, and separate trainings\n"
                 "(hollow and dotted: with the source's BatchNorm statistics)")
    return ax.figure

@call_parse
def main(
    photos:str, # Folder with data/ and weights/
    out:str='results/merging', # Folder for the table and the picture
    arms:str='results/warbirds30/runs.csv', # Arms that were fine-tuned one by one, for the picture
    size:int=128, # Side of the pictures in pixels
    n_images:int=1000, # Pictures of the training split for the target's Fisher and for BatchNorm's statistics
):
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tree,source,for_fisher,for_retention = task(photos, size)
    device = next(source.parameters()).device.type
    tuned = fine_tune(Run(str(tree), size=size), source).model.eval()
    pictures = read_aircraft(tree)
    train = pick_split(pictures, 'train').sample(n_images, random_state=0)
    train,val = [normalise(picture_dl(o, size), source) for o in (train, pick_split(pictures, 'val'))]
    fishers = estimate_fisher(source, for_fisher),estimate_fisher(tuned, train)
    rows = []
    for method,strength,model in points(source, tuned, fishers):
        update_bn(train, model, device=device)
        kept = retention(model, source, for_retention)
        rows.append(dict(method=method, strength=strength, last=accuracy_on(model, val),
                         retention_target_bn=kept['target'], retention_source_bn=kept['source']))
        print(rows[-1], flush=True)
    table = pd.DataFrame(rows).assign(before=accuracy_on(source, for_retention), machine=machine(device))
    table.to_csv(out/'points.csv', index=False, float_format='%.6g')
    plot(table, pd.read_csv(arms), table.before[0]).savefig(out/'frontier.png', dpi=100)
