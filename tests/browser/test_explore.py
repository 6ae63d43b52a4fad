"The panels in a browser: all sliders, buttons and uploads, five at two widths under Voila, and three in JupyterLab"
import re
from pathlib import Path
import nbformat, pytest
from PIL import Image
from elsewhere import changed
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from fgvc_fisher.explore.compromise import read_compromise
from fgvc_fisher.experiment import Run, draw_task

from .conftest import new_page, none_of
from .drive import (
    control, drag, fits, new_picture, open_notebook, open_panel, readout, run_cells, settled, shot, shot_of, slide,
    steady, upload
)

pytestmark = pytest.mark.xdist_group('browser')
KERNEL = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))
PANELS = ['penalty', 'fisher', 'published', 'training', 'classifier']
IN_LAB = ['penalty', 'published', 'classifier']        # the training's own process would import all libraries again
CELLS = dict(
    penalty='explore_penalty(read_compromise(run, home, 24, 24, progress=False)'
            '.measure_grid([0.,1e-2], [0.,1e-3,1.], progress=False))',
    fisher='explore_fisher(DiagFisher.load(next((home/"sources").glob("*.safetensors"))))',
    published='explore_published()', training='explore_training(task, home, epochs=300)',
    classifier='try_run(home/"runs"/run.id)')

@pytest.fixture(scope='session')
def home(tmp_path_factory):
    "Drawn pictures, and a run that is done"
    home = tmp_path_factory.mktemp('explored')
    run = Run(arm='plain', epochs=2, **draw_task(home, n_variants=4, n_per_split=8, n_source=4, size=32, num_workers=0))
    read_compromise(run, home, 24, 24, progress=False)
    return home

def written(home, panels):
    "A notebook with some panels, one below the other"
    setup = f'''from pathlib import Path
from fgvc_fisher.explore.compromise import read_compromise
from fgvc_fisher.experiment import Run, draw_task
from fgvc_fisher.explore import *
from fgvc_fisher.fisher import DiagFisher
home = Path({str(home)!r})
task = draw_task(home, n_variants=4, n_per_split=8, n_source=4, size=32, num_workers=0)
run = Run(arm='plain', epochs=2, **task)'''
    cells = [new_markdown_cell('# Panels'), new_code_cell(setup)] + [new_code_cell(CELLS[o]) for o in panels]
    (home/'notebooks').mkdir(exist_ok=True)
    file = home/f'notebooks/{len(panels)}-panels.ipynb'
    nbformat.write(new_notebook(cells=cells, metadata=KERNEL), file)
    return file

@pytest.fixture(scope='module')
def shared(home, voila, browser):
    "The page that several tests use, one after another, and the errors it reports"
    errors = []
    with new_page(browser, errors) as page: yield opened(open_panel(page, voila(written(home, PANELS)))), errors

@pytest.fixture
def heard(shared): return shared[1]

@pytest.fixture
def panel(shared, heard):
    page = shared[0]
    page.set_viewport_size(dict(width=1200, height=900))
    yield page
    none_of(heard, page)

@pytest.fixture
def in_lab(home, lab, page): return opened(run_cells(open_notebook(page, lab(written(home, IN_LAB)))), IN_LAB)

def opened(page, panels=PANELS):
    "The panels are there, each with its picture"
    for o in panels: page.locator(f'.fgvc-{o} img.widget-image').first.wait_for(timeout=120_000)
    return page

def first(page, name): # Number of a panel's first picture on the page
    images = "[...document.querySelectorAll('img.widget-image')]"
    return page.evaluate(f"name => {images}.findIndex(o => o.closest('.fgvc-'+name))", name)
def sentence(page, name): return page.locator(f'.fgvc-{name} [role=status]').text_content()
def says(page, name, text, seconds=60):
    return steady(page, lambda: sentence(page, name), 0.3, ok=lambda o: re.search(text, o), seconds=seconds)
def select(page, label, option): control(page, label).locator('select').select_option(label=option)
def press(page, name): page.get_by_role('button', name=name, exact=True).click()

def move_sliders(page):
    i = first(page, 'penalty')+1          # distances always change; accuracies on 24 pictures may not
    with new_picture(page, i): slide(page, 'strength, to source', 4)
    with new_picture(page, i): drag(page, 'alpha, to zero', 0.9)
    said = says(page, 'penalty', r'^(?!.*about).*alpha = 0\.\d+')                 # at rest: measured, not estimated
    assert readout(page, 'alpha, to zero') in said and readout(page, 'strength, to source') in said
    slide(page, 'strength, to source', -40)                                   # quick moves: the last value counts
    def shows_last_value(text): return f"strength = {readout(page, 'strength, to source')} (" in text
    steady(page, lambda: sentence(page, 'penalty'), 0.3, ok=shows_last_value)
    i = first(page, 'published')
    with new_picture(page, i): slide(page, 'mean of epochs', 5)
    with new_picture(page, i+1): select(page, 'accuracy', 'best epoch')
    says(page, 'published', '6 of 3,333')

def train_stop_and_remove(page):
    i = first(page, 'training')
    assert page.get_by_role('button', name='Stop').is_disabled()
    select(page, 'arm', 'as published')
    steady(page, lambda: readout(page, 'beta, as published'), ok=lambda o: o=='0.0004')
    for o in ('alpha','beta, as published','l2sp','learning rate'):
        before = readout(page, o)
        slide(page, o)
        assert readout(page, o)!=before
    slide(page, 'learning rate', -1)
    control(page, 'seed').locator('input').fill('42')
    select(page, 'arm', 'L2-SP-Fisher')
    steady(page, lambda: readout(page, 'strength'), ok=lambda o: o=='0.5')
    with new_picture(page, i+1):
        press(page, 'Train')
        says(page, 'training', r'\b([2-9]|\d\d+)\D+300', seconds=90)
    with new_picture(page, first(page, 'penalty')+1): drag(page, 'strength, to source', 0.95)  # while it trains
    assert page.get_by_role('button', name='Stop').is_enabled()
    press(page, 'Stop')
    steady(page, page.get_by_role('button', name='Stop').is_disabled, ok=bool)
    rows = page.locator('.fgvc-training table tr', has_text='seed')
    there = rows.count()
    assert rows.filter(has_text='L2-SP-Fisher, strength = 0.5, seed 42').count()==1
    control(page, 'on the chart').locator('select').select_option(label='L2-SP-Fisher, strength = 0.5, seed 42')
    press(page, 'Remove from the chart')
    steady(page, rows.count, ok=lambda o: o==there-1)
    assert page.get_by_role('button', name='Stop').is_disabled()
    assert page.get_by_role('button', name='Train').is_enabled()

SURE = r'\d+ ?%' # the classifier gives a probability for a picture that it can read

def upload_some(page, folder):
    i = first(page, 'classifier')
    with new_picture(page, i): upload(page, 'Upload a photograph', photograph(folder/'noise.jpg'))
    says(page, 'classifier', SURE)
    (folder/'letter.pdf').write_bytes(b'%PDF-1.4 nothing')
    upload(page, 'Upload a photograph', folder/'letter.pdf')
    says(page, 'classifier', r'letter\.pdf')
    with new_picture(page, i): upload(page, 'Upload a photograph', photograph(folder/'large.png', (1950,1400)))
    assert 6e6<(folder/'large.png').stat().st_size<10e6
    says(page, 'classifier', SURE)
    options = control(page, 'or an example').locator('option').all_inner_texts()
    with new_picture(page, i): select(page, 'or an example', options[-1])

def test_sliders_and_training(panel):
    move_sliders(panel)
    train_stop_and_remove(panel)

def test_every_choice(panel):
    i = first(panel, 'fisher')
    with new_picture(panel, i+1): select(panel, 'parameter', 'conv1.3.weight')
    says(panel, 'fisher', r'^conv1\.3\.weight')
    with new_picture(panel, i): press(panel, 'linear')
    with new_picture(panel, i): press(panel, 'share of the total')
    i = first(panel, 'published')
    with new_picture(panel, i):
        control(panel, 'runs').locator('select').select_option(label=['original', 'control: beta = 0'])
    with new_picture(panel, i): control(panel, 'runs').locator('select').select_option(label=[])
    by_keyboard(panel)

def by_keyboard(page):
    "From one control to the next with Tab, and a slider moved with an arrow"
    control(page, 'alpha, to zero').locator('.noUi-handle').focus()
    alpha,strength = readout(page, 'alpha, to zero'),float(readout(page, 'strength, to source'))
    for _ in range(2): page.keyboard.press('Tab')                                 # past its number, which can be edited
    with new_picture(page, first(page, 'penalty')+1):
        for _ in range(8): page.keyboard.press('ArrowLeft')
    assert readout(page, 'alpha, to zero')==alpha and float(readout(page, 'strength, to source'))<strength

def test_layout(panel):
    for width in (1200, 420):
        assert fits(panel, width)
        settled(panel)
        for o in PANELS:
            shot_of(panel, o, f'{o}-{width}')
            box = panel.locator(f'.fgvc-{o} img.widget-image').first.bounding_box()
            assert box['width']>=min(300, 0.7*width), (o, box)

def photograph(path, size=(300,200), **kw):
    Image.effect_noise(size, 80).convert('RGB').save(path, **kw)
    return path

def test_uploads(panel, tmp_path, heard):
    "The last of them is too large: Jupyter's servers drop messages above 10 MB and connect anew, and the panel goes on"
    upload_some(panel, tmp_path)
    assert not heard
    upload(panel, 'Upload a photograph', photograph(tmp_path/'huge.png', (2600,1900)))
    panel.wait_for_timeout(3000)
    options = control(panel, 'or an example').locator('option').all_inner_texts()
    with new_picture(panel, first(panel, 'classifier')): select(panel, 'or an example', options[1])
    heard.clear()

def test_the_page_of_its_own(voila, page, home, tmp_path):
    "`nbs/app.ipynb`, with the classifier of a run"
    run = next(o.parent for o in (home/'runs').glob('plain*/result.json'))
    app = tmp_path/'app.ipynb'
    nb = nbformat.read(Path(__file__).parents[2]/'nbs/app.ipynb', 4)
    nb.cells.insert(1, new_code_cell(f'import os; os.environ["FGVC_FISHER_RUN"] = {str(run)!r}'))
    nbformat.write(nb, app)
    open_panel(page, voila(app))
    says(page, 'classifier', SURE)
    assert fits(page, 420)
    shot_of(page, 'classifier', 'app-420')
    assert fits(page, 1200)
    with new_picture(page): upload(page, 'Upload a photograph', photograph(tmp_path/'noise.png'))
    shot_of(page, 'classifier', 'app-1200')

def test_the_page_to_play_in(voila, page, tmp_path):
    "`nbs/explore.ipynb`, from an empty folder, with fewer pictures and epochs"
    notebook,text = tmp_path/'explore.ipynb',(Path(__file__).parents[2]/'nbs/explore.ipynb').read_text('utf-8')
    less = {'n_per_split=48, n_source=40': 'n_per_split=8, n_source=8', "'plain', epochs=20": "'plain', epochs=2",
            'n_pictures=96, n_fisher=96': 'n_pictures=24, n_fisher=24'}
    notebook.write_text(changed(text, less), 'utf-8')
    opened(open_panel(page, voila(notebook)))
    with new_picture(page, first(page, 'penalty')+1): drag(page, 'strength, to source', 0.9)
    says(page, 'penalty', r'^(?!.*about)')
    for width in (1200, 420):
        assert fits(page, width)
        shot(page, f'explore-{width}')

def test_in_lab(in_lab, tmp_path):
    move_sliders(in_lab)
    upload_some(in_lab, tmp_path)
