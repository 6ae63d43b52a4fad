"settings.ini, pyproject.toml and the package say the same thing"
try: import tomllib
except ModuleNotFoundError: import tomli as tomllib
from configparser import ConfigParser
from pathlib import Path
import fgvc_fisher

root = Path(__file__).parent.parent
ini = ConfigParser(delimiters=['='])
ini.read(root/'settings.ini', encoding='utf-8')
ini,toml = ini['DEFAULT'],tomllib.loads((root/'pyproject.toml').read_text())

def test_version(): assert fgvc_fisher.__version__ == ini['version']

def test_project():
    p = toml['project']
    assert p['name'] == ini['lib_name'] and p['description'] == ini['description']
    assert p['requires-python'] == f">={ini['min_python']}"
    assert p['keywords'] == ini['keywords'].split()
    assert p['urls']['Repository'].endswith(f"{ini['user']}/{ini['repo']}")
    assert toml['tool']['nbdev']['tst_flags'] == ini['tst_flags'].split()
