"""Write what is made from other files: the sidebar, the list of notebooks, the command reference, the cited version.

    python tools/pages.py

`make sync` calls it. The order of rooms and modules is that of tests/test_order.py. Titles and descriptions are those
of the notebooks, options and defaults those of the commands.
"""
import ast, json, re
from importlib.metadata import EntryPoint
from pathlib import Path
import yaml
from fgvc_fisher.cli import command_parser
try: import tomllib
except ModuleNotFoundError: import tomli as tomllib

ROOT = Path(__file__).parent.parent
NBS = ROOT/'nbs'
GUIDES = 'index', 'walkthrough', 'explore', 'evidence', 'app'
REFERENCE = 'notebooks', 'commands', 'speed', 'verified'
ABOUT = {
    'distributed': 'which of several processes this is, sharded tensors, shared files, workers',
    'data': 'from an address or a folder to batches of pictures',
    'learner': 'a pretrained network and its new head as a fastai Learner',
    'penalty': 'the penalty in plain PyTorch',
    'callback': "the penalty in fastai's training loop",
    'fisher': 'the Fisher information, its plots and its files',
    'retention': 'what a fine-tuned model still knows of its source',
    'experiment': 'runs, sweeps, tables, figures, and the paper',
    'explore': 'panels of sliders and pictures',
    'cli': 'the commands',
}
HEAD = '''---
title: {title}
description: {description}
---

<!-- Written by tools/pages.py: `make sync` -->

{text}
'''

def rooms():
    "Room -> its modules, in order"
    tree = ast.parse((ROOT/'tests/test_order.py').read_text(encoding='utf-8'))
    found, = [o.value for o in tree.body if isinstance(o, ast.Assign) and o.targets[0].id=='ROOMS']
    return ast.literal_eval(found)

def page(name):
    "The file of a page, below nbs/; None if there is none"
    return next((f'{name}{o}' for o in ('.ipynb', '.qmd') if (NBS/f'{name}{o}').exists()), None)

def title_and_description(name):
    "Of a notebook, from its first cell of text"
    cells = json.loads((NBS/f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    text = next(''.join(o['source']) for o in cells if o['cell_type']=='markdown')
    title,description = [re.search(rf'^{mark} (.+)$', text, flags=re.M) for mark in '#>']
    return title[1], description[1] if description else ''

def sidebar():
    contents = [page(o) for o in GUIDES if page(o)]
    contents.append(dict(section='Reference', contents=[page(o) for o in REFERENCE if page(o)]))
    for room,modules in rooms().items():
        about = f'{room}: {ABOUT[room]}'
        if modules: contents.append(dict(section=about, contents=[f'{room}/{o}.ipynb' for o in modules]))
        else: contents.append(dict(text=about, href=f'{room}.ipynb'))
    return yaml.safe_dump(dict(website=dict(sidebar=dict(contents=contents))), sort_keys=False, width=120)

def row(name):
    title,description = title_and_description(name)
    return f"| [`{name.replace('/', '.')}`]({name}.ipynb) | {title} | {description} |"

def notebooks():
    "The list of notebooks, by room"
    text = ('Every module is exported from the notebook of the same name. A room imports only from rooms above it,\n'
            'and a module only from modules above it in its room.')
    lines = [HEAD.format(title='Notebooks', description='What each notebook is about, room by room', text=text)]
    table = ['| notebook | title | contents |', '|---|---|---|']
    lines += ['## To read first', '', *table, *[row(o) for o in GUIDES if o!='index' and page(o)], '']
    for room,modules in rooms().items():
        names = [f'{room}/{o}' for o in modules] or [room]
        lines += [f'## {room}', '', f'{ABOUT[room][0].upper()}{ABOUT[room][1:]}.', '', *table, *map(row, names), '']
    return '\n'.join(lines)

def in_cell(text): return ' '.join(str(text).split()).replace('|', r'\|')

def option(action):
    "The row of an option"
    flags = ', '.join(f'`{flag}`' for flag in action.option_strings) or f'`{action.dest}`'
    default = '' if action.default is None or action.default is False or action.default=='' else f'`{action.default}`'
    meaning = re.sub(r' \(default:.*?\)$', '', action.help or '')
    choices = f' ({", ".join(o for o in action.choices if o)})' if action.choices else ''
    return f'| {flags} | {default} | {in_cell(meaning+choices)} |'

def command(name, function):
    "One command: what it does, and its options"
    parser = command_parser(function)
    lines = [f'## {name}', '', in_cell(parser.description), '', '| option | default | meaning |', '|---|---|---|']
    for group in parser._action_groups:
        shown = [o for o in group._group_actions if o.dest not in ('help', 'pdb', 'xtra')]
        if shown and group.title not in ('options', 'positional arguments'): lines.append(f'| **{group.title}** | | |')
        lines += [option(o) for o in shown]
    return lines + ['']

def commands():
    "The command reference"
    scripts = tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))['project']['scripts']
    text = ('`fgvc-finetune --help` shows the same in a shell. An option without a default is off unless it is given.\n'
            '[The notebook of the commands](cli.ipynb) shows them at work.')
    lines = [HEAD.format(title='Commands', description='Options and defaults of every command', text=text)]
    for name,address in scripts.items():
        lines += command(name, EntryPoint(name, address.removesuffix('.main'), '').load())
    return '\n'.join(lines)

def citation():
    "CITATION.cff with the version of settings.ini"
    settings,text = [(ROOT/o).read_text(encoding='utf-8') for o in ('settings.ini', 'CITATION.cff')]
    version = re.search(r'^version *= *(\S+)', settings, flags=re.M)[1]
    return re.sub(r'^version: .*$', f'version: {version}', text, flags=re.M)

PAGES = {'nbs/notebooks.qmd': notebooks, 'nbs/commands.qmd': commands, 'nbs/sidebar.yml': sidebar,
         'CITATION.cff': citation}

def main():
    for file,write in PAGES.items():
        text = write().rstrip()+'\n'
        if not (ROOT/file).exists() or (ROOT/file).read_text(encoding='utf-8')!=text:
            (ROOT/file).write_text(text, encoding='utf-8')

if __name__=='__main__': main()
