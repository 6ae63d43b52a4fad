"""Check that a tag is that of the version to be released.

    python tools/release.py v0.1.0
"""
import re, sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent

def versions(root):
    "File -> the version that it names, `''` if none"
    ini = ConfigParser(delimiters=['='])
    ini.read(root/'settings.ini', encoding='utf-8')
    patterns = {'fgvc_fisher/__init__.py': r'^__version__ = "(.+)"$', 'CITATION.cff': r'^version: (.+)$',
                'CHANGELOG.md': r'^## (\S+)'}
    found = {'settings.ini': ini['DEFAULT']['version']}
    for file,pattern in patterns.items():
        match = re.search(pattern, (root/file).read_text(encoding='utf-8'), flags=re.M)
        found[file] = match[1] if match else ''
    return found

def check(tag, root=ROOT):
    "Raises `ValueError` unless the tag is `v` and the version that all files name"
    for file,version in versions(root).items():
        if tag!=f'v{version}': raise ValueError(f"the tag is {tag}, but {file} has version {version or 'none'}")

if __name__=='__main__':
    try: check(sys.argv[1])
    except ValueError as e: sys.exit(str(e))
