"""What the panels send, and when: a kernel, and a front end that speaks its messages without a browser.

Colab shows what a widget changes while the kernel handles a message, between its *busy* and its *idle*, and not what it
changes afterwards. `make test-ipywidgets7` runs this with Colab's ipywidgets and ipykernel, too.
"""
import time
from queue import Empty
import jupyter_client, pytest

pytestmark = [pytest.mark.widgets, pytest.mark.xdist_group('messages')]   # What its tests share is made once

PANELS = '''
import sys, time
import numpy as np, torch
from torch import nn
from fgvc_fisher.explore import explore_fisher, explore_penalty, explore_published, explore_training, live
from fgvc_fisher.explore.compromise import Compromise
from fgvc_fisher.explore.panels import Panel, Picture, slider
from fgvc_fisher.fisher import DiagFisher

# A panel whose work is left in steps
wave = Picture(2, 1.5)
line, = wave.axes.plot([0,1], [0,1])
wave.axes.set_ylim(0, 50)
def draw(x):
    line.set_ydata([0,x])
    return f'about {x:g}'
def settle(x):
    for i in range(3):
        line.set_ydata([10*i+10,x])
        yield f'step {i} at {x:g}'
toy = Panel('toy', 'A toy', dict(x=slider('x', [float(o) for o in range(50)], 0.)), [wave], draw, settle)

# Merged models of two small networks
def net(n):
    body = nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(4,n))
torch.manual_seed(0)
source,tuned = net(5),net(2)
for p in tuned.parameters(): nn.init.normal_(p)
fishers = [{n: torch.rand_like(p) for n,p in m.named_parameters()} for m in (source,tuned)]
batches = lambda n: [(torch.randn(8,3,6,6), torch.randint(n, (8,)))]
between = Compromise(source, tuned, *fishers, batches(2), batches(2), batches(5))
penalty = explore_penalty(between.measure_grid([0.,0.1], [0.,0.1,1.,10.], progress=False))

fisher = explore_fisher(DiagFisher(fishers[0], 8, 'exact', {}))
published = explore_published()

# A process that only says that it trains
live._CODE = """
import json, sys, time

def say(**said): print(json.dumps(said), flush=True)
if not sys.stdin.readline(): sys.exit()
for i in range(1, 9):
    say(stage=f'batch {i}', batch=[i/4, 3./i])
    time.sleep(0.1)
say(stage='done: well', over=True)
"""
training = explore_training(dict(data='tree'), sys.argv[-1], epochs=2)
'''
SHOWS = 'print({o}.controls[{control!r}].model_id, {o}.text, flush=True)'

class FrontEnd:
    "The part of a front end that speaks with the kernel"
    def __init__(self, folder):
        self.manager = jupyter_client.KernelManager(kernel_name='python3')
        self.manager.start_kernel(cwd=str(folder))
        self.kernel = self.manager.client()
        self.kernel.start_channels()
        self.kernel.wait_for_ready(timeout=120)
        self.models = {}                              # id -> state
        self.sent,self.done = set(),set()             # ids of messages, and of those that the kernel has handled
        self.heard = []                               # messages of the kernel in their order

    def close(self):
        self.kernel.stop_channels()
        self.manager.shutdown_kernel(now=True)

    def run(self, code):
        "Run a cell; returns what it prints"
        start = len(self.heard)
        asked = self.kernel.execute(code)
        self.sent.add(asked)
        self.listen(lambda: asked in self.done)
        errors = [o['content'] for o in self.heard[start:] if o['msg_type']=='error']
        assert not errors, '\n'.join(errors[0]['traceback'])
        return ''.join(o['content']['text'] for o in self.heard[start:] if o['msg_type']=='stream')

    def send(self, model, **state):
        "The message of a widget that has been moved"
        data = dict(method='update', state=state, buffer_paths=[])
        message = self.kernel.session.msg('comm_msg', dict(comm_id=model, data=data))
        self.kernel.shell_channel.send(message)
        self.sent.add(message['header']['msg_id'])
        return message['header']['msg_id']

    def listen(self, holds=lambda: False, quiet=None, seconds=120):
        "Take in messages until something holds, or all is handled and none has come for `quiet` seconds"
        end = time.monotonic()+seconds
        while not holds() and time.monotonic()<end:
            try: message = self.kernel.get_iopub_msg(timeout=quiet or 1)
            except Empty:
                if quiet and self.sent<=self.done: return
                continue
            self.heard.append(message)
            if is_idle(message): self.done.add(message['parent_header'].get('msg_id'))
            if message['msg_type'] in ('comm_open', 'comm_msg'): self._take_in(message['content'])
        assert holds() or quiet, f'not within {seconds} s'

    def _take_in(self, content):
        "Keep a model's state. The views of a box that is shown are made and removed, and counted"
        state = content['data'].get('state', {})
        model = self.models.setdefault(content['comm_id'], {})
        before = model.get('children', [])
        model.update(state)
        if 'children' not in state or content['data'].get('method')!='update': return
        for names,step in ((before, -1), (state['children'], 1)):
            for label in names: self._count(label.removeprefix('IPY_MODEL_'), step)

    def _count(self, label, step):
        model = self.models[label]
        if model.get('_view_count') is None: return
        model['_view_count'] += step
        self.send(label, _view_count=model['_view_count'])

def is_idle(message): return message['msg_type']=='status' and message['content']['execution_state']=='idle'

def has_picture(message):
    paths = message['content'].get('data', {}).get('buffer_paths', [])
    return message['msg_type']=='comm_msg' and ['value'] in [list(o) for o in paths]

def check_handled(front_end, heard):
    "Every change of a widget lies between the busy and the idle of a message that the front end has sent"
    busy = set()
    for message in heard:
        parent = message['parent_header'].get('msg_id')
        if message['msg_type']=='status':
            state = message['content']['execution_state']
            busy.add(parent) if state=='busy' else busy.discard(parent)
        elif message['msg_type'].startswith('comm_'): assert parent in busy and parent in front_end.sent, message

@pytest.fixture(scope='module')
def front_end(tmp_path_factory):
    folder = tmp_path_factory.mktemp('kernel')
    front_end = FrontEnd(folder)
    front_end.run(f'import sys; sys.argv = ["", {str(folder/"out")!r}]')
    front_end.run(PANELS)
    yield front_end
    front_end.close()

def moved(front_end, panel, control, values, quiet=1.):
    "What the kernel sends when a control moves, as fast as it can be moved"
    model = front_end.run(SHOWS.format(o=panel, control=control)).split()[0]
    start = len(front_end.heard)
    for o in values: front_end.send(model, index=o)
    front_end.listen(quiet=quiet)
    heard = front_end.heard[start:]
    check_handled(front_end, heard)
    return heard, front_end.run(f'print({panel}.text)').strip()

@pytest.mark.parametrize('panel,control', [
    ('toy','x'), ('penalty','strength'), ('penalty','alpha'), ('fisher','parameter'), ('published','smooth')])
def test_pictures_come_while_a_message_is_handled(front_end, panel, control):
    heard,text = moved(front_end, panel, control, [1])
    assert any(map(has_picture, heard))
    assert not text.startswith('about') and ': about' not in text and 'Error' not in text

def test_work_that_is_left_is_done_in_steps(front_end):
    heard,text = moved(front_end, 'toy', 'x', [7])
    pictures = [o['parent_header']['msg_id'] for o in heard if has_picture(o)]
    assert text=='step 2 at 7' and len(pictures)==4 and len(set(pictures))==4     # one for the move, one a step

def test_forty_moves(front_end):
    heard,text = moved(front_end, 'toy', 'x', [*range(1, 41)])
    assert text=='step 2 at 40' and sum(map(has_picture, heard))>=41

def test_a_training_is_followed(front_end):
    "The front end is quiet but for its answers; when the training is over, it is no longer asked"
    front_end.run('')
    button = front_end.run('print(training.buttons["train"].model_id)').strip()
    start = len(front_end.heard)
    content = dict(comm_id=button, data=dict(method='custom', content=dict(event='click')))
    message = front_end.kernel.session.msg('comm_msg', content)
    front_end.sent.add(message['header']['msg_id'])
    front_end.kernel.shell_channel.send(message)
    front_end.listen(quiet=2.)
    heard = front_end.heard[start:]
    check_handled(front_end, heard)
    parents = {o['parent_header']['msg_id'] for o in heard if has_picture(o)}
    assert len(parents)>=2 and front_end.run('print(training.text)').startswith('Done: well')
    asked = len(front_end.sent)
    front_end.listen(quiet=1.)
    assert len(front_end.sent)==asked

def test_nothing_runs_beside_the_kernel(front_end):
    "The panels have started no thread"
    code = 'import threading; print([o.name for o in threading.enumerate() if "fgvc" in repr(vars(o))])'
    assert front_end.run(code).strip()=='[]'
