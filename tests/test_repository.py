"What the repository says to GitHub, to those who cite it and to those who release it"
import importlib, re, shutil, sys
from pathlib import Path
import pytest, yaml

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT/'tools'))
release = importlib.import_module('release')
FILES = sorted([*(ROOT/'.github').rglob('*.yml'), ROOT/'CITATION.cff', ROOT/'.pre-commit-config.yaml'])
WORKFLOWS = sorted((ROOT/'.github/workflows').glob('*.yml'))

def read(file): return yaml.safe_load((ROOT/file).read_text(encoding='utf-8'))

@pytest.mark.parametrize('file', FILES, ids=lambda o: o.name)
def test_yaml(file): assert isinstance(read(file), dict)

def test_citation():
    "The fields that the Citation File Format 1.2.0 requires, of the package and of what it refers to"
    found = read('CITATION.cff')
    assert found['cff-version']=='1.2.0' and found['type']=='software' and found['license']=='Apache-2.0'
    assert {'message', 'title', 'authors', 'abstract', 'repository-code', 'url'} <= found.keys()
    for o in [found, *found['references']]:
        assert o['title'] and o['type'] in ('software', 'article', 'conference-paper')
        for author in o['authors']: assert author.keys()=={'name'} or author.keys()=={'given-names', 'family-names'}
    assert 'Distill Inception-v4 to classify fine-grained aircraft images' in [o['title'] for o in found['references']]

@pytest.mark.parametrize('file', sorted((ROOT/'.github/ISSUE_TEMPLATE').glob('[!c]*.yml')), ids=lambda o: o.name)
def test_issue_forms(file):
    form = read(file)
    assert form['name'] and form['description']
    ids = [o['id'] for o in form['body'] if o['type']!='markdown']
    assert len(ids)==len(set(ids)) and all(o['attributes']['label'] for o in form['body'])

def test_dependabot():
    found = read('.github/dependabot.yml')
    assert found['version']==2 and {o['package-ecosystem'] for o in found['updates']}=={'github-actions', 'pip'}

@pytest.mark.parametrize('file', WORKFLOWS, ids=lambda o: o.name)
def test_workflows(file):
    "Every job that is needed or called exists, and so does every script that a step runs"
    found = read(file)
    assert found[True]                                       # YAML reads the key `on` as true
    for job in found['jobs'].values():
        needs = job.get('needs', [])
        assert set([needs] if isinstance(needs, str) else needs) <= found['jobs'].keys()
        if 'uses' in job: assert 'workflow_call' in read(job['uses'])[True]
        else: assert job['runs-on'] and job['steps']
    for script in re.findall(r'python (tools/\S+)', file.read_text(encoding='utf-8')): assert (ROOT/script).is_file()

def test_nothing_is_released_untested():
    jobs = read('.github/workflows/release.yml')['jobs']
    assert set(jobs['publish']['needs'])=={'wheel', 'everything'} and jobs['wheel']['needs']=='build'
    assert jobs['publish']['permissions']=={'id-token': 'write'} and 'password' not in str(jobs)
    assert 'tools/release.py' in str(jobs['build']) and 'nbdev-test' in str(jobs['wheel'])

def test_the_version_is_the_same_everywhere():
    versions = release.versions(ROOT)
    assert len(set(versions.values()))==1, versions
    release.check(f"v{versions['settings.ini']}")

@pytest.fixture
def released(tmp_path):
    "A copy of the files that name the version"
    for o in release.versions(ROOT):
        (tmp_path/o).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT/o, tmp_path/o)
    return tmp_path

@pytest.mark.parametrize('tag', ['0.0.1', 'v0.0.2', 'v0.0.10', 'v0.0.1rc1', 'v', ''])
def test_another_tag(tag, released):
    (released/'settings.ini').write_text('[DEFAULT]\nversion = 0.0.1\n')
    with pytest.raises(ValueError, match='settings.ini has version 0.0.1'): release.check(tag, released)

@pytest.mark.parametrize('file', ['settings.ini', 'fgvc_fisher/__init__.py', 'CITATION.cff', 'CHANGELOG.md'])
def test_a_file_with_another_version(file, released):
    tag = f"v{release.versions(released)['settings.ini']}"
    text = (released/file).read_text()
    (released/file).write_text(text.replace(tag[1:], '9.9.9'))
    with pytest.raises(ValueError, match=tag): release.check(tag, released)
