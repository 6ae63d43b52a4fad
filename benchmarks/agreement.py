"""How well does agreement with the source stand for retention? Both, of runs and of models between them and the source.

    python benchmarks/agreement.py --work WORK                  # every finished run of an experiment; resumes
    python benchmarks/agreement.py                              # only the sentences, from `results/agreement`

WORK is the folder of an experiment whose runs have labelled source pictures. Between the source and each run there are
interpolated models, so that the rows cover all of the way from one to the other. A run and position that has a row in
OUT is not measured again. `nbs/retention.ipynb` shows the rows.
"""
from dataclasses import replace
from pathlib import Path
import pandas as pd
from fastcore.script import call_parse
from evidence import add_rows, rows_of
from fgvc_fisher.experiment import read_runs
from fgvc_fisher.experiment.run import machine_name, read_run, run_source
from fgvc_fisher.experiment.saved import load_model
from fgvc_fisher.penalty import interpolate
from fgvc_fisher.retention import compare_with_source

KEY = ['id', 'position']

def measure(folder, shared, positions):
    "A row for each position between the source, 0, and the fine-tuned model of a run, 1"
    run = read_run(folder)
    source = run_source(replace(run, beta=0., strength=0.), shared, progress=False)
    tuned = load_model(folder/'model.safetensors', run.arch)[0].to(next(source.model.parameters()).device)
    pictures = list(source.pictures)                                   # decoded once for all positions
    tuned_pictures = None if run.transforms=='plain' else list(source.tuned_pictures)
    about = dict(id=folder.name, arm=run.arm, seed=run.seed, arch=run.arch, data=Path(run.data).name,
                 pictures=len(source.pictures.dataset), before=source.before, machine=machine_name())
    for position in positions:
        model = tuned if position==1 else interpolate(source.model, tuned, position)
        yield about | dict(position=position) | compare_with_source(model, source.model, pictures, tuned_pictures)

def report(rows):
    "Say how closely the two go together"
    for norm in ('target','source'):
        kept,agreed = rows[f'retention_{norm}_bn'],rows[f'agreement_{norm}_bn']
        lost = (rows.before-kept).abs()
        print(f"{norm}'s BatchNorm statistics: {len(rows)} models, correlation of agreement and retention "
              f"{kept.corr(agreed):.3f}, of their orders {kept.corr(agreed, method='spearman'):.3f}; retention lost "
              f"{100*lost.mean():.1f} points on average, answers changed {100*(1-agreed).mean():.1f} %.")

@call_parse
def main(
    work:str='', # Folder of an experiment; empty: only the sentences
    out:str='results/agreement', # Folder for the rows
    positions:str='0.25,0.5,0.75,1', # Between the source, 0, and the fine-tuned model, 1, separated by commas
):
    "Measure what has no row yet."
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for id in read_runs(work).id if work else ():
        known = rows_of(out/'runs.csv').reindex(columns=KEY)
        left = [o for o in map(float, positions.split(',')) if not ((known.id==id) & (known.position==o)).any()]
        if not left: continue
        for row in measure(Path(work)/'runs'/id, Path(work)/'sources', left):
            add_rows(pd.DataFrame([row]), out/'runs.csv', KEY)
    report(rows_of(out/'runs.csv'))
