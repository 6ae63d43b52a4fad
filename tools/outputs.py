"""Leave of what the notebooks printed what a terminal would show in the end: no bar that was drawn over itself, no
warning with the path of a file of this machine, no name of a temporary folder

    python tools/outputs.py

`make sync` calls it. GitHub and the documentation show an output as it is stored, with every state of a bar in a line.
"""
import json, re
from pathlib import Path

NBS = Path(__file__).parent.parent/'nbs'

def as_terminal(text):
    "What a terminal shows in the end: after a carriage return the line is written over. Temporary folders are `/tmp/…`"
    def shown(line):
        left = ''
        for part in line.split('\r'): left = part+left[len(part):]
        return left.rstrip()
    return re.sub(r'/tmp/tmp\w{8}', '/tmp/…', '\n'.join(shown(o) for o in text.split('\n')))

def says_something(output):
    "Is an output more than white space, or a warning, which has the path of a file?"
    text = ''.join(output.get('text', 'data'))
    return bool(text.strip()) and not ('Warning: ' in text and output.get('name')=='stderr')

def settle(cells):
    "Change the printed outputs of some cells; those of which nothing is left are removed"
    for cell in cells:
        for o in cell.get('outputs', []):
            for of,kind in ((o, 'text'), (o.get('data', {}), 'text/plain')):
                if kind in of: of[kind] = as_terminal(''.join(of[kind])).splitlines(keepends=True)
        if 'outputs' in cell: cell['outputs'] = [o for o in cell['outputs'] if says_something(o)]

if __name__=='__main__':
    for file in sorted(NBS.rglob('*.ipynb')):
        if '.ipynb_checkpoints' in file.parts: continue
        before = file.read_text(encoding='utf-8')
        notebook = json.loads(before)
        settle(notebook['cells'])
        after = json.dumps(notebook, sort_keys=True, indent=1, ensure_ascii=False)+'\n'
        if after!=before: file.write_text(after, encoding='utf-8')
