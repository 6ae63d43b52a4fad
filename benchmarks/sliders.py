"""How fast the panels respond: milliseconds from a move of a slider in a real browser to the new picture on the screen.

    make test-browser    # once; it installs what the script needs
    python benchmarks/sliders.py

Voila, its kernel and a headless Chromium run on one machine, with the drawn task of `make demo` and a ResNet with 0.5 M
parameters at 64 pixels. `a move` is one arrow key, timed until the browser has decoded the new picture, or the last one
if the move changes several pictures of a panel. `at rest` is the time from the last move to the measured value, which
replaces the estimate. `forty moves` are arrow keys in the fastest succession, timed from the last of them until the
picture no longer changes.
"""
import os, statistics, sys
from pathlib import Path
import nbformat, pandas as pd
from fastcore.script import call_parse
from nbformat.v4 import new_code_cell, new_notebook
from playwright.sync_api import sync_playwright
from fgvc_fisher.explore.compromise import read_compromise
from fgvc_fisher.experiment import Run, draw_task
from fgvc_fisher.experiment.run import machine_name

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/'tools')]
from browser import find
from tests.browser.conftest import serve
from tests.browser.drive import METER, burst, control, open_panel, settled, since_move, slide, steady

PANELS = '''
import warnings; warnings.simplefilter('ignore')
from pathlib import Path
from fgvc_fisher.explore.compromise import read_compromise
from fgvc_fisher.experiment import Run, draw_task
from fgvc_fisher.explore import explore_fisher, explore_penalty, explore_published
from fgvc_fisher.fisher import DiagFisher
home = Path({home!r})
compromise = read_compromise(Run(arm='plain', epochs=6, **draw_task(home)), home, progress=False)
alphas,strengths = [0., 1e-3],[0., 1e-4, 1e-3, 1e-2, 0.1, 1., 10.]
explore_penalty(compromise.measure_grid(alphas, strengths, progress=False))
---
explore_fisher(DiagFisher.load(next((home/'sources').glob('*.safetensors'))))
---
explore_published()
'''

# An estimate says 'about'. When the sentence gives the measured value, the browser receives the picture, too
ESTIMATED = "() => document.querySelector('.fgvc-penalty [role=status]').textContent.includes('about')"
MEASURED = f'() => ({ESTIMATED})() ? null : performance.now()-meter.moves.at(-1)'

def moves(page, label, i, n, move):
    "Milliseconds from each of `n` single moves to the new picture, and to the measured value"
    first,measured = [],[]
    for k in range(n):
        settled(page, i, 1.)
        move(page, label, k)
        if label=='strength, to source':
            page.wait_for_function(ESTIMATED, polling='raf')
            measured.append(page.wait_for_function(MEASURED, polling='raf').json_value())
        steady(page, lambda: since_move(page, i), 0.1, ok=bool)
        first.append(since_move(page, i)['first'])
    return first, measured

def by_slider(page, label, k): slide(page, label, -1 if k%2 else 1)
def by_list(page, label, k):
    control(page, label).locator('select').focus()
    page.keyboard.press('ArrowDown')                      # another parameter every time

@call_parse
def main(
    out:str='results/sliders', # Folder for the table
    home:str='demo', # Folder for the drawn pictures and the run
    n:int=30, # Moves of each slider
):
    home = Path(home).resolve()
    read_compromise(Run(arm='plain', epochs=6, **draw_task(home)), home, progress=False)
    notebook = home/'sliders.ipynb'
    kernel = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))
    cells = [new_code_cell(o.strip()) for o in PANELS.format(home=str(home)).split('---')]
    nbformat.write(new_notebook(cells=cells, metadata=kernel), notebook)
    rows = []
    def note(panel, what, values):
        rows.append(dict(panel=panel, what=what, median=statistics.median(values), least=min(values),
                         greatest=max(values), n=len(values)))
    args = [notebook.name, '--no-browser', '--Voila.ip=127.0.0.1']
    env = os.environ | dict(MPLBACKEND='agg')
    with serve('voila', args, home, env) as url, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=find(), args=['--no-sandbox','--disable-dev-shm-usage'])
        page = browser.new_page(viewport=dict(width=1200, height=900))
        page.add_init_script(METER)
        page.set_default_timeout(120_000)
        open_panel(page, url)
        for o in ('penalty','fisher','published'): page.locator(f'.fgvc-{o} img').first.wait_for()
        for panel,label,i,move in (('penalty', 'strength, to source', 1, by_slider),
                                   ('fisher', 'parameter', 3, by_list),
                                   ('published', 'mean of epochs', 4, by_slider)):
            first,measured = moves(page, label, i, n, move)
            note(panel, 'a move', first)
            if measured: note(panel, 'at rest', measured)
            if panel=='penalty':
                after = []
                for k in range(5): after.append(burst(page, label, 40 if k%2==0 else -40, i, quiet=1.)['after'])
                note(panel, 'forty moves', after)
    table = pd.DataFrame(rows).assign(unit='ms', machine=machine_name())
    Path(out).mkdir(parents=True, exist_ok=True)
    table.to_csv(Path(out)/'voila.csv', index=False, float_format='%.0f')
    print(table.drop(columns='machine').round(0).to_string())
