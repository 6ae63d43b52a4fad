"""Count photographs that a data set contains twice, by the distance of their perceptual hashes.

    python benchmarks/duplicates.py PATH

PATH contains `data/warbirds30` and `data/airliners17`, FGVC-Aircraft trees. `table.csv` counts what `check_aircraft`
calls duplicates; `distances.csv` counts the pairs at every distance up to 60 of 256 bits, plain and mirrored, which
shows up to which distance pairs are duplicates.
"""
import os, time
from pathlib import Path
import pandas as pd
from fastcore.script import call_parse
from fgvc_fisher.data import check_aircraft

def counts(tree):
    "One row: the duplicates of a tree"
    start = time.perf_counter()
    check = check_aircraft(tree, quiet=True)
    seconds = time.perf_counter()-start
    row = dict(tree=tree.name, pictures=check.counts.loc[['train','val'], 'pictures'].sum(),
               errors=(check.findings.severity=='error').sum())
    for name,pairs in (('across', check.across), ('within', check.within)):
        row |= {name: len(pairs)} | {f'{name}, {o}': (pairs.kind==o).sum() for o in ('same pixels','near','mirrored')}
        row |= {f'{name}, other label': (pairs.label_1!=pairs.label_2).sum()}
    return row | dict(seconds=seconds, cores=os.cpu_count())

def distances(tree):
    "Pairs at each distance"
    pairs = check_aircraft(tree, distance=60, quiet=True).pairs
    mirrored = (pairs.kind=='mirrored').rename('mirrored')
    return pairs.groupby([mirrored, 'distance']).size().rename('pairs').reset_index().assign(tree=tree.name)

@call_parse
def main(
    photos:str, # Folder with data/
    out:str='results/duplicates', # Folder for the tables
):
    out,trees = Path(out),[Path(photos)/'data'/o for o in ('warbirds30','airliners17')]
    out.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame([counts(o) for o in trees])
    table.to_csv(out/'table.csv', index=False, float_format='%.3g')
    table = pd.concat([distances(o) for o in trees])[['tree','mirrored','distance','pairs']]
    table.to_csv(out/'distances.csv', index=False)
    print(table.T.to_string(header=False))
