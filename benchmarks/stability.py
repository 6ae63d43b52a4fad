"""How far training moves a real network from its source at every beta, with the proximal and with the explicit step.

    python benchmarks/stability.py PATH

PATH is as for `warbirds.py`: MobileNet-v1 0.75, its Fisher from ImageNet pictures, batches of aircraft, SGD with
Nesterov momentum at a constant rate of 0.02. Every training starts from the source and sees the same batches; it ends
when its loss is NaN or infinite.
"""
import copy, math
from pathlib import Path
import matplotlib.pyplot as plt, pandas as pd, torch
from fastcore.script import call_parse
from fastai.torch_core import set_seed
from fgvc_fisher.data import aircraft_dls
from fgvc_fisher.fisher import estimate_fisher
from fgvc_fisher.learner import aircraft_learner, nesterov
from fgvc_fisher.penalty import QuadraticPenalty, find_new
from warbirds import machine, task

BETAS = [0., 0.01, 0.1, 0.3, 1., 10., 1e3, 1e6, 1e9, 1e12]

def train(model, source, fisher, batches, beta, step, lr):
    "Yield loss and distance to the source after each step, while the loss is finite"
    model = copy.deepcopy(model).train()
    theta0 = dict(source.named_parameters())
    penalty = QuadraticPenalty(model, theta0, fisher, beta=beta, new=find_new(model, theta0))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    for x,y in batches:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        if not loss.isfinite(): return
        loss.backward()
        if step=='grad': penalty.add_grad_()
        optimizer.step()
        if step=='prox': penalty.prox_(optimizer)
        optimizer.zero_grad()
        yield dict(beta=beta, step=step, loss=loss.item(), distance=penalty.distance(),
                   stiffness=penalty.stiffest(lr)[0])

def plot(table):
    "Distance by training step, and the greatest one by beta"
    fig,(left,right) = plt.subplots(1, 2, figsize=(10,4), layout='constrained')
    names,colors = dict(prox='proximal step', grad='explicit step'),plt.get_cmap('viridis')
    shown = [0., 0.1, 0.3, 1., 10., 1e12]
    for (beta,step),t in table[table.beta.isin(shown)].groupby(['beta','step']):
        prox = step=='prox'
        left.plot(t.i, t.distance, color=colors(shown.index(beta)/len(shown)), ls='-' if prox else ':',
                  label=f'beta = {beta:g}' if prox else None)
    for step,t in table[table.beta>0].groupby('step', sort=False):
        greatest = t[t.distance.map(math.isfinite)].groupby('beta').distance.max()
        right.plot(greatest, 'o-' if step=='prox' else 'x:', label=names[step],
                   color='#1f5a99' if step=='prox' else '#a33c3c')
    limit = 1/(table.stiffness/2/table.beta)[table.beta>0].iloc[0]
    right.axvline(limit, color='#999999', lw=1, ls=':', label='2 lr beta max(F) = 2')
    left.set(yscale='log', xlabel='training step', ylabel='distance to theta0',
             title='Proximal (solid) and explicit (dotted)')
    right.set(xscale='log', yscale='log', xlabel='beta', ylabel='greatest distance to theta0', title='By beta')
    for ax in (left,right): ax.legend(frameon=False, fontsize=8)
    return fig

@call_parse
def main(
    photos:str, # Folder with data/ and weights/
    out:str='results/stability', # Folder for the table and the picture
    size:int=128, # Side of the pictures in pixels
    n_steps:int=30, # Training steps each
    lr:float=0.02, # Learning rate
):
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    tree,source,for_fisher,_ = task(photos, size)
    device = next(source.parameters()).device.type
    fisher = estimate_fisher(source, for_fisher)
    set_seed(42, reproducible=True)
    learn = aircraft_learner(aircraft_dls(tree, size=size, bs=32), source, opt_func=nesterov)
    learn.model.to(device)
    batches = [[o.as_subclass(torch.Tensor) for o in b] for _,b in zip(range(n_steps), learn.dls.train)]
    rows = []
    for beta in BETAS:
        for step in ('prox','grad'):
            run = [dict(i=i, **o) for i,o in enumerate(train(learn.model, source, fisher, batches, beta, step, lr), 1)]
            rows += run
            print(f"beta {beta:g}, {step}: {len(run)} steps, distance {run[-1]['distance']:.4g}", flush=True)
    table = pd.DataFrame(rows).assign(machine=machine(device))
    table.to_csv(out/'steps.csv', index=False, float_format='%.6g')
    plot(table).savefig(out/'stability.png', dpi=100)
