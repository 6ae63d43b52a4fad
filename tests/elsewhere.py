"Code of a document somewhere else: made small, or a notebook in an empty folder without the repository, as on Colab"
import io, sys, urllib.request
from pathlib import Path

ADDRESS = 'https://raw.githubusercontent.com/fgvc-fisher/fgvc_fisher/main/results/'

def changed(
    text, # Code
    changes, # What is in it exactly once -> what to put in its place
):
    "Code with some of its settings changed, so that it takes seconds."
    for old,new in changes.items():
        assert text.count(old)==1, old
        text = text.replace(old, new)
    return text

def run_elsewhere(
    notebook, # Its file, in the folder where it runs
    folder, # The folder of the repository's results, in place of a download
    skip, # Which cells not to run: nbdev's flags
):
    "Run a notebook; the process ends with its success."
    from nbdev.test import test_nb
    from fgvc_fisher.experiment import results
    from fgvc_fisher.explore import live
    from piped import SUBPROCESS
    live.subprocess = SUBPROCESS                            # trainings begin at once
    download = urllib.request.urlopen
    def urlopen(address, *args, **kwargs):
        if not str(address).startswith(ADDRESS): return download(address, *args, **kwargs)
        return io.BytesIO((Path(folder)/address.removeprefix(ADDRESS)).read_bytes())
    urllib.request.urlopen = results.urlopen = urlopen      # for what the notebook imports, and what is there already
    passed,_ = test_nb(notebook, skip_flags=skip, profile=False)
    sys.exit(not passed)
