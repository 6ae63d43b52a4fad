"""Run a notebook where there is no repository around it, as Colab does: python elsewhere.py NOTEBOOK RESULTS

What it would download of the repository's results is copied from the folder RESULTS."""
import io, sys, urllib.request
from pathlib import Path

ADDRESS = 'https://raw.githubusercontent.com/fgvc-fisher/fgvc_fisher/main/results/'
real = urllib.request.urlopen

def urlopen(address, *args, **kwargs):
    if not str(address).startswith(ADDRESS): return real(address, *args, **kwargs)
    return io.BytesIO((Path(sys.argv[2])/address.removeprefix(ADDRESS)).read_bytes())

if __name__=='__main__':
    urllib.request.urlopen = urlopen
    import fgvc_fisher
    from nbdev.test import test_nb
    assert not (Path(fgvc_fisher.__file__).parent.parent/'nbs').exists(), 'the package is that of the repository'
    passed,_ = test_nb(sys.argv[1], skip_flags=['slow', 'cuda'], profile=False)
    sys.exit(not passed)
