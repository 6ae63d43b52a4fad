"The ten lines of the README run as they stand, on drawn pictures and a smaller network"
import re, shutil
from pathlib import Path

def test_ten_lines(drawn, drawn_source, tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent/'README.md').read_text()
    code, = re.findall(r'```python\n(from fgvc_fisher.data.*?)```', text, flags=re.S)
    changes = {"'inception_v4'": "'test_resnet', weights=None", 'untar_aircraft()': "untar_aircraft('.')",
               'size=299': 'size=32, bs=8', 'fit_one_cycle(5': 'fit_one_cycle(1'}
    for old,new in changes.items():
        assert old in code
        code = code.replace(old, new)
    shutil.copytree(drawn, tmp_path/'fgvc-aircraft-2013b')
    shutil.copytree(drawn_source, tmp_path/'imagenet_pictures')
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names['fisher'].n_images==32
