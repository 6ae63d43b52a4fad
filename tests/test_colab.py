"Installing the package in Colab replaces nothing that Colab has; this needs a package index"
import os, re, subprocess, sys
from configparser import ConfigParser
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
CONSTRAINTS = ROOT/'tests/colab-constraints.txt'
PINNED = dict(re.findall(r'^([\w-]+)==(\S+)$', CONSTRAINTS.read_text(), flags=re.M))
ini = ConfigParser(delimiters=['='])
ini.read(ROOT/'settings.ini', encoding='utf-8')
ini = ini['DEFAULT']

def resolve(requirements):
    "The versions to install beside those of Colab, and uv's explanation if there are none"
    command = [sys.executable, '-m', 'uv', 'pip', 'compile', '-', '--constraints', CONSTRAINTS, '--no-config',
               '--python-version', '3.13', '--python-platform', 'x86_64-manylinux_2_28',
               '--quiet', '--no-header', '--no-annotate']
    done = subprocess.run(command, input='\n'.join(requirements), capture_output=True, text=True, cwd=ROOT)
    unreachable = re.search(r'Failed to (fetch|download)|error sending request', done.stderr)
    if unreachable and not os.environ.get('CI'): pytest.skip(f'no package index here: {done.stderr.strip()}')
    return dict(re.findall(r'^([\w-]+)==(\S+)', done.stdout, flags=re.M)),done.stderr

@pytest.mark.slow
@pytest.mark.parametrize('extra', ['', 'cluster', 'streams'])
def test_nothing_is_replaced(extra):
    found,why = resolve([*ini['requirements'].split(), *(ini[f'{extra}_requirements'].split() if extra else [])])
    assert found, why
    assert {o: found.get(o) for o in PINNED}==PINNED
    assert {'captum', 'imagehash', 'timm'} <= found.keys()

@pytest.mark.slow
@pytest.mark.parametrize('requirement', ['matplotlib>=3.11', 'ipywidgets>=8', 'torch<2.11'])
def test_what_colab_would_have_to_replace_is_found(requirement):
    found,why = resolve([*ini['requirements'].split(), requirement])
    assert not found and re.match(r'[a-z]+', requirement)[0] in why
