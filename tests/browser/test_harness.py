"The harness itself: a notebook that is no panel of ours, under Voila and in JupyterLab"
import nbformat, pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from .conftest import new_page, none_of
from .drive import (
    burst, drag, fits, image, latency, new_picture, open_notebook, open_panel, picture, readout, run_cells, settled,
    shot,
    slide, steady, upload
)

PANEL = '''
import io, threading
import ipywidgets as w, matplotlib.pyplot as plt, numpy as np
from IPython.display import display

fig,ax = plt.subplots(figsize=(6, 3.5), dpi=100)
line, = ax.plot(np.linspace(0, 1, 200), np.zeros(200))
ax.set_ylim(-1, 1)
plt.close(fig)

def draw(f):
    line.set_ydata(np.sin(2*np.pi*f*np.linspace(0, 1, 200)))
    ax.set_title(f'{f:.3g} waves')
    out = io.BytesIO()
    fig.savefig(out, format='png')
    return out.getvalue()

class Latest(threading.Thread):
    "Draws the latest value only"
    def __init__(self, show):
        super().__init__(daemon=True)
        self.show,self.todo,self.changed = show,None,threading.Condition()
    def ask(self, value):
        with self.changed: self.todo = value; self.changed.notify()
    def run(self):
        while True:
            with self.changed:
                while self.todo is None: self.changed.wait()
                value,self.todo = self.todo,None
            self.show(value)

image = w.Image(format='png', layout=w.Layout(width='100%', max_width='600px', margin='0'))
def show(f): image.value = draw(f)
waves = w.FloatLogSlider(value=1, base=10, min=0, max=1.5, step=0.02, description='waves')
tone = w.SelectionSlider(options=[1, 2, 4, 8, 16], description='tone')
again = w.Button(description='one wave')
up = w.FileUpload(accept='.txt', multiple=False, description='a file')
note = w.HTML()
worker = Latest(show)
worker.start()
waves.observe(lambda c: worker.ask(c['new']), 'value')
tone.observe(lambda c: worker.ask(c['new']), 'value')
again.on_click(lambda b: setattr(waves, 'value', 1.))
up.observe(lambda c: setattr(note, 'value', f"{c['new'][0]['name']} has {len(c['new'][0]['content'])} bytes"), 'value')
show(1.)
display(w.VBox([w.HBox([waves, tone, again, up], layout=w.Layout(flex_flow='row wrap')), image, note]))
'''
KERNEL = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))
pytestmark = pytest.mark.xdist_group('harness of the browser')

@pytest.fixture(scope='session')
def notebook(tmp_path_factory):
    path = tmp_path_factory.mktemp('panel')/'waves.ipynb'
    nbformat.write(new_notebook(cells=[new_markdown_cell('# Waves'), new_code_cell(PANEL)], metadata=KERNEL), path)
    return path

@pytest.fixture(scope='module')
def shared(notebook, voila, browser):
    "The page that several tests take one after the other, and what it complains about"
    errors = []
    with new_page(browser, errors) as page: yield open_panel(page, voila(notebook)), errors

@pytest.fixture
def panel(shared):
    page,errors = shared
    yield page
    none_of(errors, page)

def test_every_move_changes_the_picture(panel):
    first = picture(panel)
    with new_picture(panel): slide(panel, 'waves')
    assert readout(panel, 'waves')=='1.05'
    with new_picture(panel): drag(panel, 'waves', 0.8)
    assert float(readout(panel, 'waves'))==pytest.approx(10**1.2, rel=0.1)
    with new_picture(panel): slide(panel, 'tone', 2)
    assert readout(panel, 'tone')=='4'
    with new_picture(panel): panel.get_by_role('button', name='one wave').click()
    assert settled(panel)==first

    the_last_of_many_moves_stays(panel)

def the_last_of_many_moves_stays(panel):
    with new_picture(panel): slide(panel, 'waves', 10)
    last = settled(panel)
    with new_picture(panel): slide(panel, 'waves', -10)
    seen = burst(panel, 'waves', 10)
    assert picture(panel)==last and seen['after']>0 and 1<=seen['pictures']<=10
    assert all(o>0 for o in latency(panel, 'waves', n=2))

def test_an_upload_arrives(panel, tmp_path):
    (tmp_path/'five.txt').write_text('abcde')
    upload(panel, 'a file', tmp_path/'five.txt')
    panel.get_by_text('five.txt has 5 bytes').wait_for()

def test_the_layout_is_looked_at(panel):
    assert fits(panel, 1200) and fits(panel, 420)
    shot(panel, 'harness-420')
    image(panel).evaluate("img => {img.style.maxWidth = 'none'; img.style.width = '700px'}")
    assert fits(panel, 1200)
    with pytest.raises(AssertionError, match='700'): fits(panel, 420)

def test_complaints_are_heard(page, errors):
    page.goto('about:blank')
    page.evaluate("() => {console.warn('no'); console.error('in the console');"
                  " setTimeout(() => {throw new Error('in a script')})}")
    page.wait_for_timeout(200)
    assert len(errors)==2 and 'in the console' in errors[0] and 'in a script' in errors[1]
    errors.clear()

def test_a_failing_cell_is_named(lab, voila, page, tmp_path, errors):
    nbformat.write(new_notebook(cells=[new_code_cell('1/0')], metadata=KERNEL), tmp_path/'fails.ipynb')
    with pytest.raises(AssertionError, match='ZeroDivisionError'): open_panel(page, voila(tmp_path/'fails.ipynb'))
    page.goto('about:blank')
    assert not errors
    with pytest.raises(AssertionError, match='ZeroDivisionError'):
        run_cells(open_notebook(page, lab(tmp_path/'fails.ipynb')))
    page.goto('about:blank')
    errors.clear()

FAILING = '''
import ipywidgets as w, threading
from IPython.display import display
a,b = w.IntSlider(description='callback'),w.IntSlider(description='thread')
a.observe(lambda c: {}['no such key'], 'value')
b.observe(lambda c: threading.Thread(target=lambda: 1/0).start(), 'value')
display(w.VBox([a, b]))
'''

@pytest.mark.parametrize('label', ['callback','thread'])
def test_a_failing_callback_is_heard(label, voila, page, tmp_path_factory, errors):
    path = tmp_path_factory.mktemp('failing')/'failing.ipynb'
    nbformat.write(new_notebook(cells=[new_code_cell(FAILING)], metadata=KERNEL), path)
    open_panel(page, voila(path))
    assert not errors
    slide(page, label)
    steady(page, lambda: len(errors), ok=bool)
    assert 'Traceback' in errors[0] or 'KeyError' in errors[0]     # a thread's last line may be a separate message
    errors.clear()
