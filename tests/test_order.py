"""The house stands in one order: a room imports only from rooms above it, and so does a module within its room.
No module imports a private name of another, and what should be light imports nothing heavy when it is imported."""
import ast
from pathlib import Path
import pytest, fgvc_fisher

ROOMS = {
    'distributed': ['ranks', 'files', 'sharded', 'wrappers', 'workers'],
    'data': ['batches', 'archive', 'tables', 'forms', 'pictures', 'check', 'transforms', 'loaders', 'synthetic'],
    'learner': [],
    'penalty': ['quadratic', 'merging'],
    'callback': [],
    'fisher': ['per_image', 'diagonal', 'plots', 'estimate', 'shards', 'hub'],
    'retention': [],
    'experiment': ['store', 'saved', 'seeds', 'results', 'budget', 'paper', 'run', 'predict', 'keep', 'ray', 'sweeps',
                   'demo'],
    'explore': ['panels', 'compromise', 'live', 'recognise', 'penalty', 'fisher', 'published', 'training',
                'classifier'],
    'cli': [],
}
MODULES = [f'{room}.{o}' for room,modules in ROOMS.items() for o in modules or ['']]
MODULES = [o.rstrip('.') for o in MODULES]
FOLDER = Path(fgvc_fisher.__file__).parent

# What a module may not import at its top; a function may, when it is called
HEAVY = {'fastai', 'timm', 'torchvision', 'matplotlib', 'pandas', 'ray', 'ipywidgets', 'accelerate', 'datasets',
         'huggingface_hub'}
LIGHT = {
    'distributed.ranks': HEAVY, 'distributed.files': HEAVY, 'distributed.sharded': HEAVY, 'distributed.workers': HEAVY,
    'distributed.wrappers': HEAVY,
    'data.batches': HEAVY,
    'penalty.quadratic': HEAVY, 'penalty.merging': HEAVY,
    'fisher.per_image': HEAVY, 'fisher.diagonal': HEAVY, 'fisher.plots': HEAVY, 'fisher.estimate': HEAVY,
    'experiment.store': HEAVY-{'pandas'}, 'experiment.seeds': HEAVY,
    'experiment.results': HEAVY-{'pandas', 'matplotlib'},
    'cli': HEAVY|{'torch'},
}

def imports(module, everywhere=True):
    "`(module of this package or None, first part of an absolute name or None, names)` of each import"
    room = module.split('.')[:-1]
    tree = ast.parse((FOLDER/f"{module.replace('.', '/')}.py").read_text())
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            for o in node.names: yield None,o.name.split('.')[0],[]
        if not isinstance(node, ast.ImportFrom): continue
        names = [o.name for o in node.names]
        if not node.level: yield None,node.module.split('.')[0],names
        else:
            base = room[:len(room)-(node.level-1)]
            yield '.'.join([*base, *([node.module] if node.module else [])]),None,names

def test_every_module_has_its_place():
    files = [o.relative_to(FOLDER).with_suffix('') for o in FOLDER.rglob('*.py') if o.stem[0]!='_']
    there = {'.'.join(o.parts) for o in files}
    assert there==set(MODULES)

def test_every_module_has_its_notebook():
    notebooks = FOLDER.parent/'nbs'
    for o in MODULES: assert (notebooks/f"{o.replace('.', '/')}.ipynb").is_file(), o

def test_imports_are_seen():
    assert {o for o,_,_ in imports('fisher.hub') if o}=={'fisher.diagonal'}
    assert 'torch' in {o for _,o,_ in imports('penalty.quadratic')}

@pytest.mark.parametrize('module', MODULES)
def test_no_import_upwards(module):
    assert {o for o,_,_ in imports(module) if o} <= set(MODULES[:MODULES.index(module)])

@pytest.mark.parametrize('module', MODULES)
def test_no_private_import(module):
    assert not [f'{o}.{n}' for o,_,names in imports(module) if o for n in names if n[0]=='_']

@pytest.mark.parametrize('module', LIGHT)
def test_light_modules(module):
    "Neither the module nor one that it imports has a heavy import at its top"
    todo,seen = [module],set()
    while todo:
        here = todo.pop()
        if here in seen: continue
        seen.add(here)
        for own,other,_ in imports(here, everywhere=False):
            assert other not in LIGHT[module], f'{here} imports {other}'
            if own: todo.append(own)

@pytest.mark.parametrize('room', [o for o,modules in ROOMS.items() if modules])
def test_the_face_of_a_room(room):
    "What a room's `__init__.pyi` lists is there, and comes from the module that it names"
    stub = FOLDER/room/'__init__.pyi'
    if not stub.exists(): return
    face = __import__(f'fgvc_fisher.{room}', fromlist=['_'])
    for node in ast.parse(stub.read_text()).body:
        for o in node.names: assert getattr(face, o.name).__module__.startswith(f'fgvc_fisher.{room}.'), o.name
