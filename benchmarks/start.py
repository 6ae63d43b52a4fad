"""How long it takes until a command answers, and until a room is imported: CPU seconds of a fresh process.

    python benchmarks/start.py --before OLD        # OLD: a checkout of an earlier version, to compare with

CPU time is that of the process, so other work on the machine matters less than for seconds on a clock. The imports take
turns with `import torch`, which most of them contain.
"""
import os, resource, subprocess, sys
from pathlib import Path
import pandas as pd
from fastcore.script import call_parse

IMPORTS = ['torch', *[f'fgvc_fisher.{o}' for o in (
    'cli', 'distributed.ranks', 'penalty.quadratic', 'fisher.estimate', 'data.tables', 'data.loaders', 'learner',
    'callback', 'retention', 'experiment.results', 'experiment.run', 'experiment.demo', 'explore.classifier')]]
COMMANDS = {'fgvc-finetune --help': ['fgvc_finetune', '--help'],
            'fgvc-finetune --level colour': ['fgvc_finetune', '--level', 'colour'],
            'fgvc-finetune --data nowhere': ['fgvc_finetune', '--data', 'nowhere']}
RUN = """import sys
from fgvc_fisher import cli
f = getattr(cli, sys.argv[1])
sys.argv = ['command', *sys.argv[2:]]
getattr(f, 'main', f)()"""

def cpu_seconds(arguments, tree):
    "CPU seconds of a process that imports the package of a checkout"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | dict(PYTHONPATH=str(tree))
    subprocess.run([sys.executable, '-W', 'ignore', *arguments], env=environment, cwd=tree, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime+after.ru_stime-before.ru_utime-before.ru_stime

@call_parse
def main(
    before:str='', # A checkout of an earlier version
    rounds:int=3, # Processes for each row
    out:str='results/start', # Folder for the table
):
    "Measure, and write the medians."
    trees = dict(after=Path(__file__).resolve().parent.parent) | (dict(before=Path(before).resolve()) if before else {})
    script = Path(out).absolute()/'run.py'
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(RUN)
    tasks = {f'import {o}': ['-c', f'import {o}'] for o in IMPORTS}
    tasks |= {name: [str(script), *args] for name,args in COMMANDS.items()}
    rows = [(task, name, cpu_seconds(arguments, tree)) for _ in range(rounds) for task,arguments in tasks.items()
            for name,tree in trees.items()]
    script.unlink()
    rows = pd.DataFrame(rows, columns=['what','version','CPU s'])
    table = rows.groupby(['what','version'], sort=False)['CPU s'].median().unstack()
    table.to_csv(Path(out)/'table.csv', float_format='%.2f')
    print(table.round(2).to_string())
