"""Insert faults one at a time into a copy of the package, and show which tests fail.

    python tools/faults.py                    # every fault, by the tests that should catch it
    python tools/faults.py 3 7                # some of them
    python tools/faults.py --all 3            # by the whole suite that `make test` runs
"""
import argparse, os, re, shlex, shutil, subprocess, sys, tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent

class Fault(NamedTuple):
    what:str
    file:str # Module, below fgvc_fisher/
    old:str # Occurs exactly once in it
    new:str
    tests:str # Test files that should catch it

FAULTS = {
    1: Fault("the proximal step takes the first group's rate for all", 'callback.py',
             "by_id = {id(p): hyper['lr'] for group",
             "by_id = {id(p): opt.hypers[0]['lr'] for group",
             'test_loops test_callback'),
    2: Fault('a step that the gradient scaler skipped still pulls', 'callback.py',
             'self.skipped = True',
             'self.skipped = False',
             'test_loops'),
    3: Fault("the penalty's order puts it before unscaling", 'callback.py',
             'MixedPrecision.order+0.5',
             'MixedPrecision.order-0.5',
             'test_loops'),
    4: Fault('the Fisher divides by batches, not images', 'fisher/estimate.py',
             'self.n_images += len(x)',
             'self.n_images += 1',
             'test_fisher'),
    5: Fault("BatchNorm's running statistics are left changed by an estimate", 'fisher/estimate.py',
             'for o,old in tensors: o.data.copy_(old)',
             'for o,old in tensors: o.data.copy_(old+old/8)',
             'test_fisher test_callback'),
    6: Fault("a depthwise convolution's rule sums over positions before squaring", 'fisher/per_image.py',
             'convolution_backward(gs[i], xs[i], w, None, *settings, [False,True,False])\n',
             """convolution_backward(gs[i], xs[i], w, None, *settings, [False,True,False])
        if settings[-1]>1:
            squares = gs[i]**2,xs[i]**2
            found = torch.ops.aten.convolution_backward(*squares, w, None, *settings, [False,True,False])
            return found[1][None].sqrt()
""",
             'test_fisher'),
    7: Fault("a checkpoint is written before its epoch's row", 'experiment/run.py',
             """    write_text(self.folder/'curve.csv', self.curve().to_csv(index=False))
    scaler,smooth = getattr(self.learn, 'scaler', None),self.recorder.smooth_loss
    save_checkpoint(""",
             """    scaler,smooth = getattr(self.learn, 'scaler', None),self.recorder.smooth_loss
    def save_then_write(state, file):
        save_checkpoint(state, file)
        write_text(self.folder/'curve.csv', self.curve().to_csv(index=False))
    save_then_write(""",
             'test_runs'),
    8: Fault('a result file is written in place', 'distributed/files.py',
             '        write(temporary)\n',
             """        if path.suffix!='.pt': return write(path)
        write(temporary)
""",
             'test_runs test_live'),
    9: Fault('a resumed run reseeds from the run, not the epoch', 'experiment/run.py',
             'epoch {self.epoch}{crops}',
             'epoch {self.epoch-self.start}{crops}',
             'test_runs test_live test_processes'),
    10: Fault('two processes average Fishers instead of adding', 'fisher/estimate.py',
              "{k: reduce(v, 'sum') for",
              "{k: reduce(v, 'mean') for",
              'test_hub test_processes'),
    11: Fault('an archive member with .. is written', 'data/archive.py',
              'return tarfile.data_filter(member, folder)',
              'return member',
              'test_archive'),
    12: Fault('a validation picture gets into training', 'data/loaders.py',
              """    check_splits(*tables)
    return tables""",
              """    check_splits(*tables)
    return [pd.concat([tables[0], tables[1][:1]]), tables[1]]""",
              'test_data test_tables'),
    13: Fault('retention uses the tuned head', 'retention.py',
              'from_source = {k for k in own if k.startswith(head) or k not in tuned}',
              'from_source = {k for k in own if k not in tuned}',
              'test_callback test_runs test_real'),
    14: Fault('the published penalty forgets one block', 'experiment/paper.py',
              "if 'bn' in n: continue",
              "if 'bn' in n or n.startswith('features.7.'): continue",
              'test_published'),
    15: Fault("a slider's picture does not follow", 'explore/panels.py',
              'for picture in self.pictures: picture.show()',
              'for picture in [o for o in self.pictures if not o.widget.value]: picture.show()',
              'test_panels test_explore'),
}

def insert(fault, folder):
    file = folder/'fgvc_fisher'/fault.file
    text = file.read_text()
    if text.count(fault.old)!=1: sys.exit(f'{fault.file} has {text.count(fault.old)} times, not once: {fault.old}')
    file.write_text(text.replace(fault.old, fault.new))

def failing(folder, files, options):
    "The tests of these files that fail in a copy of the repository"
    env = os.environ | dict(PYTHONPATH=str(folder), OMP_NUM_THREADS='1')
    quiet = ['-q', '--no-header', '-p', 'no:cacheprovider', '--tb=no', '-r', 'fE']
    command = [sys.executable, '-m', 'pytest', *quiet, *options, *files]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    found = re.findall(r'^(?:FAILED|ERROR) (\S+)', done.stdout, flags=re.M)
    if done.returncode not in (0, 1): sys.exit(f'{done.stdout[-3000:]}{done.stderr[-3000:]}')
    return [o.partition('::')[2] or o for o in found]

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('faults', nargs='*', type=int, help='numbers; default: all')
    parser.add_argument('--all', action='store_true', help='run the whole quick suite on each')
    parser.add_argument('--options', default='', help='further options of pytest')
    args = parser.parse_args()
    missed = 0
    for i in args.faults or FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder)/'repository'
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns('.git', '.venv', 'demo', '__pycache__'))
            insert(FAULTS[i], copy)
            files = [] if args.all else [f'tests/{o}.py' for o in FAULTS[i].tests.split()]
            caught = failing(copy, files, shlex.split(args.options))
        missed += not caught
        print(f"{i}. {FAULTS[i].what}: {', '.join(caught) or 'NOT CAUGHT'}", flush=True)
    sys.exit(missed)

if __name__=='__main__': main()
