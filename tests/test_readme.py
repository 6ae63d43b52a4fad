"The code of the README runs as it stands, on fewer drawn pictures and a smaller network; its pictures are found"
import re, shutil
from pathlib import Path
import pytest
from elsewhere import changed

FOLDER = Path(__file__).parent.parent
README = (FOLDER/'README.md').read_text()

def code(begin, changes):
    "The block of code that begins so, changed to be small"
    found, = [o for o in re.findall(r'```python\n(.*?)```', README, flags=re.S) if o.startswith(begin)]
    return changed(found, changes)

def test_quick_start(tmp_path, monkeypatch, capsys):
    small = {"draw_task('quick')": "draw_task('quick', n_variants=2, n_per_split=8, n_source=4, size=32)",
             'model, 64)': 'model, 32)', 'size=64, bs=16': 'size=32, bs=8', 'fit_one_cycle(8': 'fit_one_cycle(1'}
    monkeypatch.chdir(tmp_path)
    exec(code('from fgvc_fisher.callback', small), {})
    said = capsys.readouterr().out
    assert re.findall(r'(\w+): [\d.]+% of the aircraft, [\d.]+% of the source', said)==['plain','L2SPFisher']
    assert 'beta F on' in said                                # as the README's printed output, what the callback says

def test_ten_lines_on_the_archive(drawn, drawn_source, tmp_path, monkeypatch):
    small = {"'inception_v4'": "'tiny:network', weights=None", 'untar_aircraft()': "untar_aircraft('.')",
             'size=299': 'size=32, bs=8', 'fit_one_cycle(5': 'fit_one_cycle(1'}
    shutil.copytree(drawn, tmp_path/'fgvc-aircraft-2013b')
    shutil.copytree(drawn_source, tmp_path/'imagenet_pictures')
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code('from fgvc_fisher.data', small), names)
    assert names['fisher'].n_images==32

@pytest.mark.parametrize('step', ['sgd', 'adam'])
def test_plain_pytorch(step, drawn_source):
    import torch
    from torch import nn
    from fgvc_fisher.fisher import estimate_fisher
    source = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    batches = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(3)]
    model = nn.Sequential(*source[:2], nn.Linear(5, 2))
    names = dict(model=source, fisher=estimate_fisher(source, batches, progress=False), tuned=model,
                 batches=[(x, y%2) for x,y in batches], loss_fn=nn.functional.cross_entropy,
                 optimizer=dict(sgd=torch.optim.SGD, adam=torch.optim.Adam)[step](model.parameters(), 0.01))
    exec(code('from fgvc_fisher.penalty', {"new=['fc']": "new=['2']"}), names)
    assert names['penalty'].distance()>0

def test_it_is_short_and_its_pictures_are_here():
    assert len(README)<=9000
    pictures = re.findall(r'!\[([^\]]*)\]\((\S+/results/readme/\S+)\)', README)
    assert len(pictures)==2
    for text,address in pictures:
        assert len(text)>20 and address.startswith('https://')
        assert (FOLDER/'results/readme'/address.rpartition('/')[2]).is_file()
