"The documentation: its pages and links, and notebooks that are opened without the repository"
import ast, importlib, json, re, shutil, sys
from pathlib import Path
import pytest
from elsewhere import run_elsewhere
from forks import Forked
from fgvc_fisher.experiment import results
from fgvc_fisher.experiment.results import results_file

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT/'tools'))
links,pages,outputs = [importlib.import_module(o) for o in ('links', 'pages', 'outputs')]

NOTEBOOKS = [o.relative_to(ROOT/'nbs').with_suffix('').as_posix() for o in sorted((ROOT/'nbs').rglob('*.ipynb'))
             if '.ipynb_checkpoints' not in o.parts]
INSTALL = re.compile(r"""(#\| hide\n)?import importlib\.util
if importlib\.util\.find_spec\('fgvc_fisher'\) is None: # on Colab
    %pip install -q (git\+https://github\.com/fgvc-fisher/fgvc_fisher|"fgvc_fisher\[\w+\] @ git\+\S+/fgvc_fisher")""")

def code_cells(name):
    cells = json.loads((ROOT/f'nbs/{name}.ipynb').read_text(encoding='utf-8'))['cells']
    return [''.join(o['source']) for o in cells if o['cell_type']=='code']

OPENED = [o for o in NOTEBOOKS if o not in ('index', 'app') and code_cells(o)]  # README, the page of `make app`

def mixes_imports(source):
    "Whether nbdev would run more than imports when it runs this cell alone, for the documentation"
    try: tree = ast.parse(source)
    except SyntaxError: return False                         # a magic: nbdev does not run it
    imports = ast.Import,ast.ImportFrom
    alone = all(isinstance(o, imports) for o in tree.body)
    return not alone and any(isinstance(o, imports) for o in ast.walk(tree))

@pytest.mark.parametrize('source,mixed', [
    ('import os', False), ('import os\nfrom a import b', False), ('x = 1', False), ('#| hide\nimport os', False),
    ('import os\nx = 1', True), ('x = y\nimport os', True), ('def f():\n    import os', True),
    ('if x:\n    from a import b', True), ('import os; os.x', True), ('%pip install a\nimport os', False)])
def test_mixed_imports_are_seen(source, mixed): assert mixes_imports(source)==mixed

@pytest.mark.parametrize('name', NOTEBOOKS)
def test_an_import_has_a_cell_of_its_own(name):
    cells = code_cells(name)
    if not any(o.startswith('#| default_exp') for o in cells): pytest.skip("nbdev runs no cell of it")
    own = [o for o in cells if not re.match(r'#\|\s*(export|exporti|eval: false)', o)]
    assert not [o for o in own if mixes_imports(o)]

@pytest.mark.parametrize('name', OPENED)
def test_install_cell(name):
    "The first cell of code, after `default_exp`, installs the package where it is missing"
    first = next(o for o in code_cells(name) if not o.startswith('#| default_exp'))
    assert INSTALL.fullmatch(first)

@pytest.mark.slow
@pytest.mark.parametrize('name', ['index', *[o for o in OPENED if o!='explore']])   # the browser's tests open that one
def test_from_an_empty_folder(name, tmp_path):
    "nbdev's own test of a notebook, without the repository around it; the process has the package already"
    skip = ['slow', 'cuda'] if name=='walkthrough' else ['cuda']          # whole, it trains for long
    shutil.copy(ROOT/f'nbs/{name}.ipynb', tmp_path)
    process = Forked(run_elsewhere, tmp_path/f'{Path(name).name}.ipynb', ROOT/'results', skip, cwd=tmp_path)
    assert process.wait(300)==0, (process.out+process.err)[-3000:]

@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    "An empty folder, and a folder in place of the repository's address"
    (tmp_path/'served/study').mkdir(parents=True)
    (tmp_path/'served/study/runs.csv').write_text('a\n1\n')
    (tmp_path/'empty/below').mkdir(parents=True)
    monkeypatch.setattr(results, 'RESULTS', (tmp_path/'served').as_uri())
    monkeypatch.chdir(tmp_path/'empty')
    return tmp_path

def test_results_are_downloaded_once(elsewhere, monkeypatch):
    file = results_file('study/runs.csv')
    assert file==elsewhere/'empty/results/study/runs.csv' and file.read_text()=='a\n1\n'
    assert [o.name for o in file.parent.iterdir()]==['runs.csv']
    monkeypatch.setattr(results, 'RESULTS', 'http://127.0.0.1:9/closed')
    monkeypatch.chdir('below')
    assert results_file('study/runs.csv')==file              # found above

def test_results_of_the_repository_come_first(monkeypatch):
    monkeypatch.chdir(ROOT/'nbs/data')
    assert results_file('warbirds30/runs.csv')==ROOT/'results/warbirds30/runs.csv'

@pytest.mark.parametrize('address', [None, 'http://127.0.0.1:9/closed', 'file:///nowhere'])
def test_results_that_cannot_be_had(address, elsewhere, monkeypatch):
    if address: monkeypatch.setattr(results, 'RESULTS', address)
    with pytest.raises(OSError, match='study/others.csv'): results_file('study/others.csv')
    assert not (elsewhere/'empty/results').exists()

@pytest.mark.parametrize('name', ['', '.', '..', 'study', '../served/study/runs.csv', 'study/../../a.csv', '/a.txt'])
def test_names_of_results_that_cannot_be_meant(name, elsewhere):
    with pytest.raises(ValueError, match=re.escape(repr(name))): results_file(name)

# Outputs as they are stored

BAR = '█\r\r |-----| 0% [0/2]\r |█████| 100% [2/2]\r'+20*' '+'\r'
@pytest.mark.parametrize('text,left', [
    ('a\nb\n', 'a\nb\n'), (BAR+'done\n', 'done\n'), ('epoch  loss   \n'+BAR+'0  0.5   \n', 'epoch  loss\n0  0.5\n'),
    ('12345\rab', 'ab345'), ('a\r\nb', 'a\nb'), ('a\n\n  b', 'a\n\n  b')])
def test_what_a_terminal_shows(text, left): assert outputs.as_terminal(text)==left

def test_an_output_of_which_nothing_is_left():
    kept = [dict(output_type='stream', text=['a\n', 'b']), dict(output_type='display_data', data={'image/png': ''})]
    cells = [dict(cell_type='markdown'), dict(outputs=[dict(output_type='stream', text=BAR.splitlines(True)), *kept])]
    outputs.settle(cells)
    assert cells==[dict(cell_type='markdown'), dict(outputs=kept)]

def test_no_output_draws_over_itself():
    for name in NOTEBOOKS:
        cells = json.loads((ROOT/f'nbs/{name}.ipynb').read_text(encoding='utf-8'))['cells']
        texts = [''.join(o.get('text', '')) for cell in cells for o in cell.get('outputs', [])]
        assert not any('\r' in o for o in texts), f'{name}: make sync'

# Links

DOCS,GIT = 'https://who.github.io/what','https://github.com/who/what'

@pytest.fixture(scope='module')
def checker(tmp_path_factory):
    root = tmp_path_factory.mktemp('root')
    for o in ('nbs/room/module.ipynb', 'nbs/room/picture.png', 'README.md', '.github/workflows/test.yml'):
        (root/o).parent.mkdir(parents=True, exist_ok=True)
        (root/o).touch()
    texts = {'index.html': '# Start', 'guide.html': '## Two words\n\ntext', 'room/module.html': '### Class.method'}
    return links.Checker({k: links.read_page([v]) for k,v in texts.items()}, root, DOCS, GIT)

@pytest.mark.parametrize('link', [
    '', '#two-words', 'guide.html', 'guide.ipynb#two-words', './guide.qmd', 'room/module.ipynb#class.method',
    'room/picture.png', 'index.md', DOCS, f'{DOCS}/', f'{DOCS}/room/module.html.md', f'{DOCS}/guide.html#two-words',
    f'{GIT}/blob/main/README.md', f'{GIT}/blob/main/README.md#L7', f'{GIT}/tree/main/nbs/room', GIT,
    f'{GIT}/actions/workflows/test.yml/badge.svg', 'https://raw.githubusercontent.com/who/what/main/nbs/room/picture.png',
    'https://colab.research.google.com/github/who/what/blob/main/nbs/room/module.ipynb',
    'https://elsewhere.org/nothing', 'mailto:who@where.org', 'https://who.github.io/other/nothing.html'])
def test_links_that_are_right(link, checker): assert not checker(link, 'guide.html')

@pytest.mark.parametrize('link,named', [
    ('#two', '#two'), ('nothing.html', 'nothing.html'), ('nothing.ipynb', 'nothing.html'),
    ('guide.html#class.method', 'guide'),
    ('room/module.ipynb#method', '#method'), ('room/other.png', 'other.png'), ('module.ipynb', 'module.html'),
    ('room/', 'room/index.html'), ('../README.md', 'out of the site'), ('room/../../README.md', 'out of the site'),
    (f'{DOCS}/module.html', 'module.html'), (f'{DOCS}/nothing.html.md', 'nothing.html'), (f'{DOCS}/guide.html#x', '#x'),
    (f'{GIT}/blob/main/nothing.md', 'nothing.md'), (f'{GIT}/tree/main/rooms', 'rooms'),
    (f'{GIT}/blob/main/../outside', 'outside'), (f'{GIT}/actions/workflows/none.yml', 'none.yml'),
    ('https://colab.research.google.com/github/who/what/blob/main/nbs/none.ipynb', 'none.ipynb'),
    ('https://raw.githubusercontent.com/who/what/main/none.png', 'none.png')])
def test_links_that_are_wrong(link, named, checker): assert named in checker(link, 'guide.html')

def test_links_of_a_page_in_a_folder(checker):
    page = 'room/module.html'
    for o in ('module.html', '../guide.html#two-words', 'picture.png', '#class.method'): assert not checker(o, page)
    for o in ('guide.html', '../../README.md', 'room/module.html'): assert checker(o, page)

def test_links_of_the_readme(checker):
    for o in ('README.md', 'nbs/room/picture.png', '#start', f'{DOCS}/guide.html'): assert not checker(o)
    for o in ('none.md', 'guide.html', '../README.md', f'{DOCS}/README.html'): assert checker(o)

@pytest.mark.parametrize('heading,anchor', [
    ('Two words', 'two-words'), ('`code`, and *more*!', 'code-and-more'), ('Class.method', 'class.method'),
    ('1. First', 'first'), ('A [link](b.html)', 'a-link'), ('A_b - c', 'a_b---c'), ('Named {#here}', 'here'),
    ('42', 'section')])
def test_anchors_are_those_of_pandoc(heading, anchor): assert links.slug(heading)==anchor

def test_what_a_page_holds():
    page = links.read_page(['# A\n\n[x](a.html) ![y](b.png "title") `[z](code.html)`\n\n```md\n# B\n[c](in)\n```',
                            '<a href="d.html">d</a> <img src="e.png"> <b id="f"></b>',
                            '# A\n\n[ref]: g.html\n\n<!-- [h](h) -->'])
    assert page.links==['a.html', 'b.png', 'd.html', 'e.png', 'g.html']
    assert page.anchors=={'a', 'a-1', 'f'}

def test_names_in_backticks():
    page = links.read_page(['`room.module`, `room.gone`, `fgvc_fisher.room.lost`, `room.error`, `other.x`, `room.x()`'])
    assert list(links.unknown_modules(page, {'room.module', 'other'}, {'error'}))==['room.gone', 'room.lost']

def test_a_method_that_links_elsewhere():
    page = links.read_page(['### Class.table', '[`table`](https://x.org/results.html#table) [`other`](https://x.org/a.html)'])
    assert [o for o,_ in links.strangers('room/module.html', page)]==['table']
    assert not list(links.strangers('results.html', page))

# Pages that are made from others

@pytest.mark.parametrize('file', pages.PAGES)
def test_pages_are_in_step(file):
    assert (ROOT/file).read_text(encoding='utf-8').rstrip()==pages.PAGES[file]().rstrip(), 'make sync'

def test_every_notebook_is_in_the_sidebar():
    names = [*NOTEBOOKS, *[o.stem for o in (ROOT/'nbs').glob('*.qmd')]]
    site = {f'{o}.html': None for o in names}
    assert not list(links.wrong_sidebar(site, pages.sidebar()))

@pytest.mark.parametrize('site,named', [(['a.html', 'b.html', 'd/e.html'], 'd/e.html is missing'),
                                        (['a.html'], 'b.html: there will be no'),
                                        (['a.html', 'b.html', 'c.html'], 'c.html is missing')])
def test_what_is_wrong_with_a_sidebar(site, named):
    sidebar = 'website: {sidebar: {contents: [a.ipynb, {section: s, contents: [b.qmd, a.ipynb]}]}}'
    wrong = list(links.wrong_sidebar(dict.fromkeys(site), sidebar))
    assert any(named in o for o in wrong) and 'sidebar.yml: a.html is there twice' in wrong

def test_the_command_reference_has_every_option():
    text = (ROOT/'nbs/commands.qmd').read_text(encoding='utf-8')
    for o in ('## fgvc-demo', '## fgvc-finetune', '`--epochs` | `4`', '`--retry` |  |', '`--seed` | `0`'):
        assert o in text
    assert text.count('| option |')==5 and '| **penalty** | | |' in text
