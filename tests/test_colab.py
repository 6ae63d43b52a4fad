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
def test_nothing_is_replaced():
    "With all extras that are for users; an index is slow, so they are resolved together"
    extras = ' '.join(ini[f'{o}_requirements'] for o in ('cluster','streams'))
    found,why = resolve([*ini['requirements'].split(), *extras.split()])
    assert found, why
    assert {o: found.get(o) for o in PINNED}==PINNED
    assert {'captum', 'imagehash', 'timm', 'ray', 'webdataset'} <= found.keys()

@pytest.mark.slow
def test_what_colab_would_have_to_replace_is_found():
    found,why = resolve([*ini['requirements'].split(), 'ipywidgets>=8'])
    assert not found and 'ipywidgets' in why
