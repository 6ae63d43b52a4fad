"""The Fisher of two networks with ImageNet weights on real photographs: does the kind or the number of images matter?

    python benchmarks/fisher_kinds.py PATH

PATH contains `data/imagenet_sample` (pictures with a `labels.csv`), `weights/mobilenetv1_075_imagenet.safetensors` and
`weights/squeezenet1_1_imagenet_fp16.safetensors`. The script writes a summary by layer, with standard errors, and a
table that compares the estimates. It saves the Fishers in the folder `keep` and estimates only those that are missing.
"""
import itertools, time
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, pandas as pd
from fastcore.script import call_parse
from torchvision.models import squeezenet1_1
from warbirds import machine, mobilenet
from fgvc_fisher.data import read_pictures
from fgvc_fisher.fisher import DiagFisher, estimate_fisher
from fgvc_fisher.learner import source_dl, source_model

NETWORKS = {'mobilenetv1_075': (mobilenet, 'mobilenetv1_075_imagenet.safetensors', 224),
            'squeezenet1_1': (squeezenet1_1, 'squeezenet1_1_imagenet_fp16.safetensors', 227)}
ESTIMATES = {'exact': dict(kind='exact', mass=0.99), 'sampled': dict(kind='sampled'),
             'sampled, 10 labels': dict(kind='sampled', n_samples=10),
             'empirical': dict(kind='empirical'), 'sampled, other seed': dict(kind='sampled', seed=1),
             'sampled, first 100': dict(kind='sampled', n_images=100),
             'sampled, first 30': dict(kind='sampled', n_images=30)}

def estimate(photos, name, what, size, keep):
    "The Fisher from the folder `keep`, estimated if it is missing; its provenance has the seconds"
    file = keep/f'{name} {what}.safetensors'
    if not file.exists():
        make,weights,full = NETWORKS[name]
        model = source_model(make, photos/'weights'/weights)
        start,dl = time.perf_counter(),source_dl(read_pictures(photos/'data/imagenet_sample'), model, size or full)
        fisher = estimate_fisher(model, dl, checkpoint=f'{file}.checkpoint', provenance=dict(images='imagenet_sample'),
                                 **ESTIMATES[what])
        fisher.provenance['seconds'] = f'{time.perf_counter()-start:.0f}'
        fisher.save(file)
    return DiagFisher.load(file)

def compare(name, what, fisher, exact):
    "One row: an estimate compared with the exact Fisher, by value and by layer"
    a,b = [np.concatenate([v.flatten().double().numpy() for v in o.values()]) for o in (fisher,exact)]
    layers = [np.array([v.double().sum().item() for v in o.values()]) for o in (fisher,exact)]
    low,high = np.quantile(layers[0]/layers[1], [0.05, 0.95])
    return dict(network=name, estimate=what, images=fisher.n_images,
                mass_left=float(fisher.provenance.get('mass_left', 'nan')), mean=a.mean(), median=np.median(a),
                max=a.max(), total=a.sum(), standard_error=fisher.error().relative['total'],
                total_to_exact=a.sum()/b.sum(), correlation=np.corrcoef(a, b)[0,1], layer_ratio_low=low,
                layer_ratio_high=high, seconds=float(fisher.provenance['seconds']))

def picture(fishers):
    "Total Fisher of each parameter, as a ratio to the exact one"
    fig,axs = plt.subplots(1, len(fishers), figsize=(10,4), layout='constrained', sharey=True)
    for ax,(name,by) in zip(axs, fishers.items()):
        exact = by['exact'].error()
        for what,style in {'sampled': '.', 'sampled, 10 labels': 'x', 'empirical': '+'}.items():
            e = by[what].error()
            ax.errorbar(exact.total[:-1], (e.total/exact.total)[:-1], (e.error/exact.total)[:-1], fmt=style,
                        markersize=5, linewidth=0.5, label=what)
        ax.axhline(1, color='k', linewidth=0.8)
        ax.set(xscale='log', yscale='log', title=name, xlabel='exact Fisher of a parameter, summed over its values')
    axs[0].set_ylabel('ratio to the exact one')
    axs[0].legend(frameon=False)
    return fig

@call_parse
def main(
    photos:str, # Folder with data/ and weights/
    out:str='results/fisher_kinds', # Folder for the tables and the picture
    keep:str='.keep', # Folder for the Fishers, outside version control
    size:int=0, # Side of the pictures in pixels; 0: each network's own
):
    photos,out,keep = Path(photos),Path(out),Path(keep)
    for o in (out,keep): o.mkdir(parents=True, exist_ok=True)
    fishers = {n: {w: estimate(photos, n, w, size, keep) for w in ESTIMATES} for n in NETWORKS}
    pairs = [(n,w) for n,w in itertools.product(NETWORKS, ESTIMATES)]
    table = pd.DataFrame([compare(n, w, fishers[n][w], fishers[n]['exact']) for n,w in pairs])
    table = table.assign(machine=machine('cpu'))
    table.to_csv(out/'table.csv', index=False, float_format='%.4g')
    layers = pd.concat([fishers[n][w].summary().assign(network=n, estimate=w) for n,w in pairs
                        if w in ('exact','sampled','empirical')])
    layers.to_csv(out/'layers.csv', index=False, float_format='%.4g')
    picture(fishers).savefig(out/'kinds.png', dpi=100)
    print(table.drop(columns='machine').to_string(index=False, float_format='{:.4g}'.format))
