"The harness itself hears what fails and sees what does not fit, in notebooks that are none of ours"
import nbformat, pytest
from nbformat.v4 import new_code_cell, new_notebook
from .drive import fits, image, open_notebook, open_panel, run_cells, slide, steady

KERNEL = dict(kernelspec=dict(name='python3', display_name='Python 3', language='python'))
pytestmark = pytest.mark.xdist_group('browser')   # one Chromium, Voila and JupyterLab for all

def saved(path, code):
    nbformat.write(new_notebook(cells=[new_code_cell(code)], metadata=KERNEL), path)
    return path

def test_complaints_are_heard(page, errors):
    page.goto('about:blank')
    page.evaluate("() => {console.warn('no'); console.error('in the console');"
                  " setTimeout(() => {throw new Error('in a script')})}")
    page.wait_for_timeout(200)
    assert len(errors)==2 and 'in the console' in errors[0] and 'in a script' in errors[1]
    errors.clear()

def test_a_failing_cell_is_named(lab, voila, page, tmp_path, errors):
    file = saved(tmp_path/'fails.ipynb', '1/0')
    with pytest.raises(AssertionError, match='ZeroDivisionError'): open_panel(page, voila(file))
    page.goto('about:blank')
    assert not errors
    with pytest.raises(AssertionError, match='ZeroDivisionError'): run_cells(open_notebook(page, lab(file)))
    page.goto('about:blank')
    errors.clear()

PANEL = '''
import io, threading
import ipywidgets as w
from IPython.display import display
from PIL import Image
a,b = w.IntSlider(description='callback'),w.IntSlider(description='thread')
a.observe(lambda c: {}['no such key'], 'value')
b.observe(lambda c: threading.Thread(target=lambda: 1/0).start(), 'value')
Image.new('RGB', (300,200), 'red').save(file := io.BytesIO(), 'png')
display(w.VBox([w.HBox([a, b], layout=w.Layout(flex_flow='row wrap')),
                w.Image(value=file.getvalue(), layout=w.Layout(width='100%', max_width='600px', margin='0'))]))
'''
def test_a_panel_that_fails_and_does_not_fit(voila, page, tmp_path, errors):
    open_panel(page, voila(saved(tmp_path/'panel.ipynb', PANEL)))
    assert not errors
    for label in ('callback','thread'):
        slide(page, label)
        steady(page, lambda: len(errors), ok=bool)
        assert 'Traceback' in errors[0] or 'KeyError' in errors[0]     # a thread's last line may be a separate message
        page.wait_for_timeout(500)
        errors.clear()
    assert fits(page, 1200) and fits(page, 420)
    image(page).evaluate("img => {img.style.maxWidth = 'none'; img.style.width = '700px'}")
    assert fits(page, 1200)
    with pytest.raises(AssertionError, match='700'): fits(page, 420)
    errors.clear()
