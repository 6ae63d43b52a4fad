"""Do smaller copies cost accuracy? MobileNet-v1 0.75 fine-tuned on photographs of 30 aircraft types.

    python benchmarks/cached.py PATH

PATH is as for `warbirds.py`. Each run trains on the originals or on smaller copies, with the plain transforms or with
the published ones, whose random crops are the smallest. The photographs have 224 pixels and the network sees 96, so the
copies for training (144 pixels) are reduced in the same proportion as copies of 448 pixels of the real archive, whose
pictures have 695. Each finished run is a row of `runs.csv`; a second call does only the runs that are missing.
Whichever pictures a run was trained on, `on_copies` is its accuracy on copies of the validation pictures and
`on_originals` its accuracy on the validation pictures themselves.
"""
import tempfile
from pathlib import Path
import pandas as pd
from fastai.torch_core import set_seed
from fastcore.script import call_parse
from fgvc_fisher.data import aircraft_dls
from fgvc_fisher.learner import aircraft_learner, source_model
from warbirds import machine, mobilenet

@call_parse
def main(
    photos:str, # Folder with data/ and weights/
    out:str='results/cached', # Folder for the rows and the table
    epochs:int=4, # Passes over the training split
    size:int=96, # Side of the network's pictures in pixels
    seeds:int=2, # Runs of each kind
    first:int=42, # The first seed; the others follow
):
    out,tree,copies = Path(out),Path(photos)/'data/warbirds30',tempfile.mkdtemp()
    out.mkdir(parents=True, exist_ok=True)
    for transforms in ('plain', 'published'):
        for seed in range(first, first+seeds):
            for cached in (False, True):
                file = out/'runs.csv'
                done = pd.read_csv(file) if file.exists() else pd.DataFrame(columns=['transforms','cached','seed'])
                if ((done.transforms==transforms) & (done.cached==cached) & (done.seed==seed)).any(): continue
                print(f"{transforms}, {'copies' if cached else 'originals'}, seed {seed}", flush=True)
                set_seed(seed, reproducible=True)
                loaders = [aircraft_dls(tree, size=size, transforms=transforms, cache=o) for o in (False, copies)]
                source = source_model(mobilenet, Path(photos)/'weights/mobilenetv1_075_imagenet.safetensors')
                # both loaders get the source's normalisation
                learn,_ = [aircraft_learner(o, source) for o in (loaders[cached], loaders[not cached])]
                with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(epochs, 0.02)
                with learn.no_bar():
                    accuracy = {name: float(learn.validate(dl=dls.valid)[1])
                                for name,dls in zip(('on_originals','on_copies'), loaders)}
                row = dict(transforms=transforms, cached=cached, seed=seed, **accuracy, epochs=epochs, size=size,
                           machine=machine(next(learn.model.parameters()).device.type))
                pd.concat([done, pd.DataFrame([row])]).to_csv(file, index=False, float_format='%.6g')
    runs = pd.read_csv(out/'runs.csv')
    table = runs.pivot_table(index=['transforms','cached'], values=['on_originals','on_copies'],
                             aggfunc=['mean','min','max'])
    table.to_csv(out/'table.csv', float_format='%.4g')
    print(table.to_string(float_format='{:.3f}'.format))
