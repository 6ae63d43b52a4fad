"The five panels under a hand: every slider moved, every button pressed, files uploaded, at two widths, under Voila and in JupyterLab"
import re
from pathlib import Path
import nbformat, pytest
from PIL import Image
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from fgvc_fisher.compromise import read_compromise
from fgvc_fisher.experiment import Run, draw_task

from .drive import control, drag, fits, image, new_picture, open_notebook, open_panel, picture, readout, run_cells, settled, shot_of, slide, steady, upload

KERNEL = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))
PANELS = ['penalty', 'fisher', 'published', 'training', 'classifier']
CELLS = dict(
    penalty='explore_penalty(read_compromise(run, home, 24, 24, progress=False).measure_grid([0.,1e-2], [0.,0.1,10.], progress=False))',
    fisher='explore_fisher(DiagFisher.load(next((home/"sources").glob("*.safetensors"))))',
    published='explore_published()', training='explore_training(task, home, epochs=30)', classifier='try_run(home/"runs"/run.id)')

@pytest.fixture(scope='session')
def home(tmp_path_factory):
    "Drawn pictures, and a run that is done"
    home = tmp_path_factory.mktemp('explored')
    run = Run(arm='plain', epochs=2, **draw_task(home, n_variants=4, n_per_split=8, n_source=6, size=32, num_workers=0))
    read_compromise(run, home, 24, 24, progress=False)
    return home

@pytest.fixture(scope='session')
def notebook(home):
    "All panels, one below the other"
    setup = f'''from pathlib import Path
from fgvc_fisher.compromise import read_compromise
from fgvc_fisher.experiment import Run, draw_task
from fgvc_fisher.explore import *
from fgvc_fisher.fisher import DiagFisher
home = Path({str(home)!r})
task = draw_task(home, n_variants=4, n_per_split=8, n_source=6, size=32, num_workers=0)
run = Run(arm='plain', epochs=2, **task)'''
    cells = [new_markdown_cell('# Five panels'), new_code_cell(setup)] + [new_code_cell(CELLS[o]) for o in PANELS]
    (home/'notebook').mkdir()
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), home/'notebook/panels.ipynb')
    return home/'notebook/panels.ipynb'

@pytest.fixture(params=['voila', 'lab'])
def either(request, notebook, page):
    if request.param=='voila': return opened(open_panel(page, request.getfixturevalue('voila')(notebook)))
    return opened(run_cells(open_notebook(page, request.getfixturevalue('lab')(notebook.parent), notebook.name)))

@pytest.fixture
def panel(notebook, voila, page): return opened(open_panel(page, voila(notebook)))

def opened(page):
    "All panels are there, each with its picture"
    for o in PANELS: page.locator(f'.fgvc-{o} img.widget-image').first.wait_for(timeout=120_000)
    return page

def first(page, name): # Number of a panel's first picture on the page
    return page.evaluate('''name => [...document.querySelectorAll('img.widget-image')].findIndex(o => o.closest('.fgvc-'+name))''', name)
def sentence(page, name): return page.locator(f'.fgvc-{name} [role=status]').inner_text()
def says(page, name, text, seconds=60): return steady(page, lambda: sentence(page, name), 0.3, ok=lambda o: re.search(text, o), seconds=seconds)
def select(page, label, option): control(page, label).locator('select').select_option(label=option)
def press(page, name): page.get_by_role('button', name=name, exact=True).click()

def test_sliders_move_their_pictures(either):
    i = first(either, 'penalty')
    with new_picture(either, i): slide(either, 'beta, to the source', 4)
    with new_picture(either, i+1): drag(either, 'alpha, to zero', 0.9)
    said = says(either, 'penalty', r'^alpha = [^0].*: \d')                     # rests: measured, not 'about'
    assert readout(either, 'alpha, to zero') in said and readout(either, 'beta, to the source') in said
    i = first(either, 'published')
    with new_picture(either, i): slide(either, 'mean of epochs', 5)
    with new_picture(either, i+1): select(either, 'accuracy', 'best epoch')
    says(either, 'published', '6 of 3,333')

def test_every_choice(panel):
    i = first(panel, 'fisher')
    with new_picture(panel, i+1): select(panel, 'parameter', 'conv1.3.weight')
    says(panel, 'fisher', r'^conv1\.3\.weight')
    with new_picture(panel, i): press(panel, 'linear')
    with new_picture(panel, i): press(panel, 'share of the total')
    i = first(panel, 'published')
    with new_picture(panel, i): control(panel, 'runs').locator('select').select_option(label=['original', 'control: beta = 0'])
    with new_picture(panel, i): control(panel, 'runs').locator('select').select_option(label=[])

def test_keyboard_alone(panel):
    "From one control to the next with Tab, and a slider moved with an arrow"
    control(panel, 'alpha, to zero').locator('.noUi-handle').focus()
    panel.keyboard.press('Tab')
    i = first(panel, 'penalty')
    with new_picture(panel, i): panel.keyboard.press('ArrowLeft')
    assert readout(panel, 'alpha, to zero')=='0' and readout(panel, 'beta, to the source')!='0.1'

@pytest.mark.parametrize('width', [1200, 420])
def test_layout(panel, width):
    assert fits(panel, width)
    settled(panel)
    for o in PANELS:
        shot_of(panel, o, f'{o}-{width}')
        box = panel.locator(f'.fgvc-{o} img.widget-image').first.bounding_box()
        assert box['width']>=min(300, 0.7*width), (o, box)

def test_train_stop_and_remove(either):
    i = first(either, 'training')
    assert either.get_by_role('button', name='Stop').is_disabled()
    select(either, 'arm', 'L2-SP-Fisher')
    steady(either, lambda: readout(either, 'beta'), ok=lambda o: o=='10')
    with new_picture(either, i+1):
        press(either, 'Train')
        says(either, 'training', 'Epoch [2-9]', seconds=90)
    j = first(either, 'penalty')
    with new_picture(either, j): slide(either, 'beta, to the source', 3)          # the other panels answer meanwhile
    assert sentence(either, 'training').startswith('Epoch')
    press(either, 'Stop')
    says(either, 'training', 'topped after')
    rows = either.locator('.fgvc-training table tr', has_text='seed')
    assert rows.count()==2 and 'L2-SP-Fisher, beta = 10, seed 42' in rows.last.inner_text()
    control(either, 'on the chart').locator('select').select_option(label='L2-SP-Fisher, beta = 10, seed 42')
    press(either, 'Remove from the chart')
    steady(either, rows.count, ok=lambda o: o==1)
    assert either.get_by_role('button', name='Stop').is_disabled() and either.get_by_role('button', name='Train').is_enabled()

def photograph(path, size=(300,200), **kw):
    Image.effect_noise(size, 80).convert('RGB').save(path, **kw)
    return path

def test_uploads(either, tmp_path):
    i = first(either, 'classifier')
    with new_picture(either, i): upload(either, 'Upload a photograph', photograph(tmp_path/'noise.jpg'))
    says(either, 'classifier', '^The fine-tuned model says')
    (tmp_path/'letter.pdf').write_bytes(b'%PDF-1.4 nothing')
    upload(either, 'Upload a photograph', tmp_path/'letter.pdf')
    says(either, 'classifier', 'PDF')
    with new_picture(either, i): upload(either, 'Upload a photograph', photograph(tmp_path/'large.png', (2600,1900)))       # 15 MB
    says(either, 'classifier', '^The fine-tuned model says')
    options = control(either, 'or an example').locator('option').all_inner_texts()
    with new_picture(either, i): select(either, 'or an example', options[-1])

def test_the_page_of_its_own(voila, page, home, tmp_path):
    "`nbs/app.ipynb`, with the classifier of a run"
    run = next(o.parent for o in (home/'runs').glob('plain*/result.json'))
    app = tmp_path/'app.ipynb'
    nb = nbformat.read(Path(__file__).parents[2]/'nbs/app.ipynb', 4)
    nb.cells.insert(1, new_code_cell(f'import os; os.environ["FGVC_FISHER_RUN"] = {str(run)!r}'))
    nbformat.write(nb, app)
    open_panel(page, voila(app))
    says(page, 'classifier', '^The fine-tuned model says')
    assert fits(page, 420)
    shot_of(page, 'classifier', 'app-420')
    assert fits(page, 1200)
    with new_picture(page): upload(page, 'Upload a photograph', photograph(tmp_path/'noise.png'))
    shot_of(page, 'classifier', 'app-1200')
