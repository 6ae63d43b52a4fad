"What the panels are made of; `make test-ipywidgets7` runs this with Colab's ipywidgets, too"
import base64, io, json, threading, time
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, pytest
from PIL import Image
from fgvc_fisher.explore import panels
from fgvc_fisher.explore.panels import Latest, Panel, Picture, choice, powers, slider

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

# The last request

def test_never_two_at_a_time():
    inside,most = [],[]
    def work(request, is_stale):
        inside.append(request)
        most.append(len(inside))
        time.sleep(0.003)
        inside.pop()
    latest = Latest(work)
    threads = [threading.Thread(target=lambda: [latest(i) or time.sleep(0.001) for i in range(20)]) for _ in range(4)]
    for o in threads: o.start()
    for o in threads: o.join()
    latest.wait()
    assert set(most)=={1}

def test_latest_request_is_always_done():
    for n in range(1, 60):
        done = []
        latest = Latest(lambda request, is_stale: done.append(request))
        for i in range(n): latest(i)
        latest.wait()
        assert done[-1]==n-1

def test_no_thread_is_left():
    latest = Latest(lambda request, is_stale: None)
    for i in range(20):
        latest(i)
        latest.wait()
    time.sleep(0.05)
    assert not [o for o in threading.enumerate() if '_work_off' in o.name]

def test_a_stale_request_knows():
    told,begun = [],threading.Event()
    def work(request, is_stale):
        begun.set()
        while request==0 and not is_stale(): time.sleep(0.001)
        told.append((request,is_stale()))
    latest = Latest(work)
    latest(0)
    begun.wait()
    latest(1)
    latest.wait()
    assert told==[(0,True),(1,False)]

def test_wait_times_out():
    stop = threading.Event()
    latest = Latest(lambda request, is_stale: stop.wait(20))
    latest(0)
    with pytest.raises(TimeoutError, match='0.05'): latest.wait(0.05)
    stop.set()
    latest.wait()

def test_an_error_is_raised_once_and_work_goes_on():
    done = []
    latest = Latest(lambda request, is_stale: done.append(1/request))
    latest(0)
    with pytest.raises(ZeroDivisionError): latest.wait()
    latest(2)
    latest.wait()
    assert done==[0.5]

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
        p.wait()
        seen.append([shown(o) for o in pictures])
    for before,after in zip(seen, seen[1:]):
        for a,b in zip(before, after): assert not np.array_equal(a, b)
    for o,last in zip(pictures, seen[-1]): assert np.array_equal(o.pixels(), last)

def test_forty_quick_moves():
    drawn = []
    def draw(x):
        drawn.append(x)
        time.sleep(0.02)
        return f'x is {x:g}'
    p = a_panel(draw, values=range(41))
    for i in range(1, 41): p.controls['x'].value = i
    assert p.wait()=='x is 40' and drawn[-1]==40 and len(drawn)<=4

def test_settles_after_the_last_move():
    settled = []
    p = a_panel(settle=lambda is_stale, x: settled.append(x) or f'exactly {x:g}', values=range(21))
    for i in range(1, 21):
        p.controls['x'].value = i
        time.sleep(0.002)
    assert p.wait()=='exactly 20' and settled==[0,20]

def test_what_gave_up_is_not_shown():
    p = a_panel(settle=lambda is_stale, x: None)
    assert p.text=='x is 0'

def test_a_move_while_it_settles():
    begun = threading.Event()
    def settle(is_stale, x):
        if x!=1: return f'exactly {x:g}'
        begun.set()
        while not is_stale(): time.sleep(0.001)
    p = a_panel(settle=settle)
    p.controls['x'].value = 1.
    begun.wait()
    p.controls['x'].value = 2.
    assert p.wait()=='exactly 2'

def test_an_error_is_a_sentence():
    def draw(x):
        if x: raise KeyError('<b>no such thing</b>')
        return 'fine'
    p = a_panel(draw)
    p.controls['x'].value = 1.
    with pytest.raises(KeyError): p.wait()
    assert 'KeyError' in p.said.value and '<b>no such' not in p.said.value and '&lt;b&gt;' in p.said.value
    p.controls['x'].value = 0.
    assert p.wait()=='fine'

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
