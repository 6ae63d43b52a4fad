"The modules stand in one order: each imports only from those before it"
import ast
from pathlib import Path
import pytest, fgvc_fisher

ROAD = ['archive', 'tables', 'check', 'pictures', 'transforms', 'data', 'synthetic', 'learner', 'budget', 'squares', 'parts', 'processes', 'helpers', 'fisher', 'shards', 'hub', 'penalty', 'merging',
        'callback', 'retention', 'seeds', 'published', 'runs', 'cluster', 'sweep', 'results', 'experiment', 'panels', 'compromise', 'live', 'recognise', 'explore']
folder = Path(fgvc_fisher.__file__).parent

def imported(module):
    "Names of the modules of this package that a module imports"
    for node in ast.walk(ast.parse((folder/f'{module}.py').read_text())):
        if isinstance(node, ast.ImportFrom) and node.level==1 and node.module: yield node.module     # from .data import ...
        names = [node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names] if isinstance(node, ast.Import) else []
        yield from (n.split('.')[1] for n in names if n and n.startswith('fgvc_fisher.'))

def test_all_are_listed():
    assert {o.stem for o in folder.glob('*.py') if o.stem[0]!='_'} == set(ROAD)

def test_imports_are_seen():
    assert set(imported('hub')) == {'data', 'fisher', 'learner', 'processes', 'shards'}

@pytest.mark.parametrize('module', ROAD)
def test_no_import_upwards(module):
    assert set(imported(module)) <= set(ROAD[:ROAD.index(module)])

@pytest.mark.parametrize('module', ['squares', 'parts', 'fisher', 'penalty'])
def test_mathematics_knows_no_fastai(module):
    text = (folder/f'{module}.py').read_text()
    assert 'import fastai' not in text and 'from fastai' not in text and set(imported(module)) <= {'squares', 'parts'}
