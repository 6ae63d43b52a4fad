"""Fine-tuning with the source's BatchNorm statistics frozen, compared with the usual way.

    python benchmarks/frozen_bn.py PATH

PATH and the training settings are as for `warbirds.py`. At its learning rate of 0.02 training with frozen statistics
fails, as one arm shows; the other arms use 0.002.
"""
from pathlib import Path
from fastcore.script import call_parse
from warbirds import report, rows, run_arms

ARMS = {'L2-SP-Fisher, beta = 10, lr 0.02, kept': dict(beta=10., freeze_bn=True),
        'plain, usual': dict(lr=0.002), 'plain, kept': dict(lr=0.002, freeze_bn=True),
        'L2-SP-Fisher, beta = 100, usual': dict(beta=100., lr=0.002),
        'L2-SP-Fisher, beta = 100, kept': dict(beta=100., lr=0.002, freeze_bn=True)}

@call_parse
def main(
    photos:str, # Folder with data/ and weights/
    out:str='results/frozen_bn', # Folder for the rows, the table and the picture
    epochs:int=4, # Passes over the training split
    size:int=128, # Side of the pictures in pixels
    seed:int=42, # Of the head, the order of the pictures and their crops
):
    run_arms(ARMS, photos, out, size, epochs, [seed])
    report(rows(Path(out)/'runs.csv'), out)
