"What the panels are made of; `make test-ipywidgets7` runs this with Colab's ipywidgets, too"
import base64, io, json, threading
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, pytest
from PIL import Image
from fgvc_fisher.explore import panels
from fgvc_fisher.explore.panels import Echo, Panel, Picture, choice, powers, slider

pytestmark = pytest.mark.widgets

def a_panel(draw=lambda x: f'x is {x:g}', settle=None, values=(0.,1.,2.), **kw):
    return Panel('test', 'A title', dict(x=slider('x', list(values), values[0])), [Picture(2, 1.5)], draw, settle, **kw)

def shown(picture): return np.array(Image.open(io.BytesIO(bytes(picture.widget.value))))

# Pictures

def test_png_is_what_was_drawn():
    p = Picture(2, 1)
    p.axes.plot([0,1], [0,1])
    p.show()
    assert np.array_equal(shown(p), p.pixels()) and shown(p).shape==(100,200,3)

def test_no_figure_of_pyplot():
    before = plt.get_fignums()
    a_panel()
    assert plt.get_fignums()==before

def test_only_what_moves_is_redrawn():
    "What is not named stays as it was, even if it is changed"
    p = Picture(3, 2)
    line,other = p.axes.plot([0,1], [0,1])[0],p.axes.plot([0,1], [1,0])[0]
    p.only(line)
    first = p.pixels()
    other.set_ydata([0.5,0.5])
    assert np.array_equal(p.pixels(), first)
    line.set_ydata([0.5,0.5])
    assert not np.array_equal(p.pixels(), first)

def test_layout_is_made_once():
    p = Picture(3, 2)
    p.pixels()
    at = p.axes.get_position().bounds
    p.axes.set_ylabel('a long label\nof two lines')
    p.pixels()
    assert p.axes.get_position().bounds==at

def test_drawing_from_many_threads():
    pictures = [Picture(2, 1.5) for _ in range(4)]
    for i,p in enumerate(pictures): p.axes.set_title(f'$x^{i}$')
    alone,found = [p.pixels() for p in pictures],[[] for _ in pictures]
    def work(i):
        for _ in range(5): found[i].append(pictures[i].pixels())
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for o in threads: o.start()
    for o in threads: o.join()
    assert all(len(f)==5 and all(np.array_equal(o, a) for o in f) for f,a in zip(found, alone))

# Work that is left

def show(echo):
    "What a front end does with the label that an `Echo` shows"
    echo.widget.children[0]._view_count += 1

def test_one_question_at_a_time():
    answers = []
    echo = Echo(lambda: answers.append(1))
    label, = echo.widget.children
    for _ in range(5): echo.ask()
    assert echo.widget.children!=(label,) and not answers
    show(echo)
    show(echo)                                        # the panel is shown in a second place
    assert answers==[1,1]
    for _ in range(9):
        echo.ask()
        assert echo.widget.children!=(label,) and len(echo.labels)<=4      # each question has a label of its own
        show(echo)

def test_a_label_that_is_gone_or_replaced_is_no_answer():
    answers = []
    echo = Echo(lambda: answers.append(1))
    old, = echo.widget.children
    old._view_count += 1
    echo.ask()
    old._view_count -= 1
    old._view_count += 1
    assert answers==[1]

def test_a_lost_question_is_asked_again(monkeypatch):
    echo = Echo(lambda: None)
    echo.ask()
    label, = echo.widget.children
    monkeypatch.setattr(Echo, 'patience', 0)
    echo.ask()
    assert echo.widget.children!=(label,)

def front_end(panel, most=1000):
    "Answer a panel's questions until it asks no more; returns their number"
    for n in range(most):
        if panel.echo.asked is None: return n
        show(panel.echo)
    raise AssertionError(f'still asking after {most} answers')

# Panels

def test_every_picture_follows():
    "What the browser is sent after a move is what is drawn then"
    pictures = [Picture(2, 1.5) for _ in range(2)]
    lines = [o.axes.plot([0,1], [0,0])[0] for o in pictures]
    for o in pictures: o.axes.set_ylim(0, 3)
    def draw(x):
        for o in lines: o.set_ydata([x,x])
        return f'x is {x:g}'
    p = Panel('test', 'A title', dict(x=slider('x', [0.,1.,2.], 0.)), pictures, draw)
    seen = [[shown(o) for o in pictures]]
    for x in (1.,2.):
        p.controls['x'].value = x
        seen.append([shown(o) for o in pictures])
    for before,after in zip(seen, seen[1:]):
        for a,b in zip(before, after): assert not np.array_equal(a, b)
    for o,last in zip(pictures, seen[-1]): assert np.array_equal(o.pixels(), last)

def test_every_move_is_drawn_where_it_is_made():
    drawn = []
    p = a_panel(lambda x: drawn.append((x, threading.current_thread())) or f'x is {x:g}', values=range(41))
    for i in range(1, 41):
        p.controls['x'].value = i
        assert p.text==f'x is {i}'
    assert drawn==[(i, threading.current_thread()) for i in range(41)]

def two(draw, **kwargs):
    controls = dict(x=slider('x', [0.,1.,2.], 0.), y=slider('y', [0.,1.,2.], 0.))
    return Panel('test', 'A title', controls, [Picture(2, 1.5)], draw, **kwargs)

def test_several_controls_are_drawn_once():
    drawn = []
    p = two(lambda x, y: drawn.append((x, y)) or 'drawn')
    p.controls['x'].observe(lambda change: p.set(y=change['new']), 'value')
    p.set(x=1., y=2.)
    p.controls['x'].value = 2.
    p.set(x=2.)
    with pytest.raises(KeyError, match='z'): p.set(z=1)
    p.controls['y'].value = 0.
    assert drawn[0]==(0.,0.) and drawn[1][0]==1. and drawn[-2:]==[(2.,2.), (2.,0.)] and len(drawn)==4

def test_a_control_that_moves_another_is_drawn_once():
    drawn = []
    controls = dict(x=slider('x', [0.,1.,2.], 0.), y=slider('y', [0.,1.,2.], 0.))
    controls['x'].observe(lambda change: controls['y'].set_trait('value', change['new']), 'value')
    p = Panel('test', 'A title', controls, [Picture(2, 1.5)], lambda x, y: drawn.append((x, y)) or 'drawn')
    controls['x'].value = 1.
    assert drawn==[(0.,0.), (1.,1.)] and p.text=='drawn'

def test_settles_after_the_last_move():
    settled = []
    def settle(x):
        settled.append(x)
        yield f'exactly {x:g}'
    p = a_panel(settle=settle, values=range(21))
    for i in range(1, 21): p.controls['x'].value = i
    assert p.text=='x is 20' and settled==[0] and front_end(p)>1
    assert p.text=='exactly 20' and settled==[0,20] and front_end(p)==0

def test_what_has_no_sentence_is_not_shown():
    p = a_panel(settle=lambda x: iter([None, None]))
    assert p.text=='x is 0'

def test_a_move_drops_the_work_that_is_left(monkeypatch):
    monkeypatch.setattr(Panel, 'pause', 0)
    def settle(x):
        for i in range(5): yield f'{x:g}.{i}'
    p = a_panel(settle=settle)
    p.controls['x'].value = 1.
    for _ in range(3): show(p.echo)
    assert p.text=='1.2'
    p.controls['x'].value = 2.
    assert p.text=='x is 2' and front_end(p)>=5 and p.text=='2.4'

def test_no_step_before_the_pause(monkeypatch):
    monkeypatch.setattr(Panel, 'pause', 1000)
    p = a_panel(settle=lambda x: iter(['settled']))
    p.controls['x'].value = 1.
    for _ in range(5): show(p.echo)
    assert p.text=='x is 1' and p.echo.asked is not None and p.finish()=='settled'

def test_nobody_looks_at_it():
    "A panel that is not on a page does nothing, and goes on when it is shown"
    p = a_panel(settle=lambda x: iter([None, 'settled']))
    p.controls['x'].value = 1.
    before = threading.active_count()
    label, = p.echo.widget.children
    assert p.text=='x is 1' and label._view_count==0 and threading.active_count()==before
    front_end(p)
    assert p.text=='settled'

def test_an_error_in_a_step_is_said_once():
    def settle(x):
        yield None
        if x: raise OSError('no disk')
    p = a_panel(settle=settle)
    p.controls['x'].value = 1.
    with pytest.raises(OSError): front_end(p)
    assert 'no disk' in p.text and p.echo.asked is None and p.finish()==p.text
    p.controls['x'].value = 0.
    front_end(p)
    assert p.text=='x is 0'

def test_an_error_is_a_sentence():
    def draw(x):
        if x: raise KeyError('<b>no such thing</b>')
        return 'fine'
    p = a_panel(draw)
    with pytest.raises(KeyError): p.controls['x'].value = 1.
    assert 'KeyError' in p.said.value and '<b>no such' not in p.said.value and '&lt;b&gt;' in p.said.value
    p.controls['x'].value = 0.
    assert p.text=='fine'

def test_title_and_sentence_are_escaped():
    p = Panel('test', '<i>title</i>', dict(x=slider('x', [1.], 1.)), [Picture(2, 1)], lambda x: 'a < b & c')
    assert '<i>' not in p.box.children[0].value and 'a &lt; b &amp; c' in p.said.value and 'aria-live' in p.said.value

def test_still_is_the_whole_panel():
    p = a_panel()
    img = Image.open(io.BytesIO(p.still()))
    assert img.size[0]==200 and img.size[1]>150+30

def outputs(monkeypatch, panel, kernel):
    found = []
    monkeypatch.setattr(panels, 'display', lambda data, raw: found.append(data))
    monkeypatch.setattr(panels, '_has_kernel', lambda: kernel)
    panel._ipython_display_()
    return found[0]

def test_without_a_front_end_a_picture(monkeypatch):
    p = a_panel()
    data = outputs(monkeypatch, p, False)
    assert set(data)=={'text/plain','image/png'} and data['image/png']==p.still() and 'x is 0' in data['text/plain']

def test_with_a_front_end_widgets_and_the_picture(monkeypatch):
    p = a_panel()
    data = outputs(monkeypatch, p, True)
    assert data['application/vnd.jupyter.widget-view+json']['model_id']==p.box.model_id and 'image/png' in data

def test_same_width_for_all_controls():
    assert slider('a', [1.], 1.).layout.width==choice('b', ['x']).layout.width=='100%'

def test_powers():
    assert powers(-2, 1, 1)==[0., 0.01, 0.1, 1., 10.]
    assert all(a<b for a,b in zip(powers(-6, 4), powers(-6, 4)[1:]))
    assert slider('x', powers(-2, 2, 1), 7.).value==10. and slider('x', powers(-2, 2, 1), 0.).value==0.

# Notebooks as they are kept

NOTEBOOKS = sorted((Path(__file__).parent.parent/'nbs').rglob('*.ipynb'))

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda o: f'{o.parent.name}/{o.stem}')
def test_no_widget_is_saved(notebook):
    "GitHub refuses notebooks with widgets' states, and others show an error where there is only a widget"
    nb = json.loads(notebook.read_text())
    assert 'widgets' not in nb['metadata']
    for cell in nb['cells']:
        for o in cell.get('outputs', []): assert 'application/vnd.jupyter.widget-view+json' not in o.get('data', {})

@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda o: f'{o.parent.name}/{o.stem}')
def test_no_warning_is_saved(notebook):
    "Warnings and bars of one machine teach nobody, and name its folders"
    for cell in json.loads(notebook.read_text())['cells']:
        assert not [o for o in cell.get('outputs', []) if o.get('name')=='stderr'], ''.join(cell['source'])

@pytest.mark.parametrize('panel', ['penalty', 'fisher', 'published', 'training', 'classifier'])
def test_panels_are_kept_as_pictures(panel):
    nb = json.loads((Path(__file__).parent.parent/f'nbs/explore/{panel}.ipynb').read_text())
    kept = [o['data'] for cell in nb['cells'] for o in cell.get('outputs', []) if 'image/png' in o.get('data', {})]
    assert kept
    for o in kept: assert Image.open(io.BytesIO(base64.b64decode(o['image/png']))).size[0]>=900
