"""How long a large tree of pictures takes before the first step of a training, and how that grows with the tree.

    python benchmarks/large_tree.py LISTS [--rows 1000,10000,100000] [--decoded 10000]

LISTS is a folder with the text files of FGVC-Aircraft: 10,000 pictures. Fewer rows are taken evenly from each list,
more are the lists again, with other image names. The pictures are noise of 48 x 32 pixels, no two alike, so the seconds
are those of the package and the file system rather than of decoding. Each step is a fork of its own, and `MB` is what
its memory has grown by at most.

`read`: `read_aircraft`. `first batch`: `aircraft_dls` and one training batch. `copies`: `cache_images`, and `copies
again` when they are there. `check`: `check_aircraft`. These three open every picture, so they are measured up to
`--decoded` rows. `duplicates`: the search for near pairs alone, among random hashes. `growth` is the exponent between
the processor's seconds of this row and of the one with fewer rows: 1 is linear, 2 quadratic.
"""
import math, multiprocessing, os, platform, resource, shutil, tempfile, time
from pathlib import Path
import numpy as np, pandas as pd, torch
from fastcore.script import call_parse
from PIL import Image
from fgvc_fisher.data import aircraft_dls, cache_images, check_aircraft, read_aircraft
from fgvc_fisher.data.check import near_pairs

SPLITS = {'train': 3334, 'val': 3333, 'test': 3333}

def spread(lines, n):
    "`n` lines of a list, evenly taken, or the list again and again"
    return [lines[i*len(lines)//n if n<len(lines) else i%len(lines)] for i in range(n)]

def make_tree(lists, root, n):
    "A tree with `n` pictures in the proportions of the official splits"
    (root/'images').mkdir(parents=True)
    rng = np.random.default_rng(0)
    for file in lists.glob('*s.txt'): shutil.copy(file, root)
    boxes = []
    for split,size in SPLITS.items():
        own = [f'{split}{i:07}' for i in range(round(n*size/10_000))]
        for level in ('variant', 'family', 'manufacturer'):
            lines = spread((lists/f'images_{level}_{split}.txt').read_text().splitlines(), len(own))
            rows = [f'{name} {line.split(maxsplit=1)[1]}' for name,line in zip(own, lines)]
            (root/f'images_{level}_{split}.txt').write_text('\n'.join(rows)+'\n')
        for name in own:
            blots = Image.fromarray(rng.integers(0, 256, (8,12,3), dtype=np.uint8))
            blots.resize((48,32), Image.Resampling.BICUBIC).save(root/f'images/{name}.jpg')
        boxes += [f'{name} 1 1 48 32' for name in own]
    (root/'images_box.txt').write_text('\n'.join(boxes)+'\n')

def first_batch(root): aircraft_dls(root, size=24, bs=32, credit=0, num_workers=0).one_batch()
def copies(root): cache_images(read_aircraft(root, credit=0), 24, quiet=True)
def duplicates(root):
    bits = np.random.default_rng(0).random((len(read_aircraft(root)),256)) < 0.5
    near_pairs(bits, bits, 32)
STEPS = {'read': read_aircraft, 'first batch': first_batch, 'copies': copies, 'copies again': copies,
         'check': lambda root: check_aircraft(root, quiet=True), 'duplicates': duplicates}

def most_memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
def measure(step, root, found):
    "Put the seconds of a step, those of the processor, and the memory that it adds into a queue"
    before,began,cpu = most_memory(),time.perf_counter(),time.process_time()
    STEPS[step](root)
    found.put((time.perf_counter()-began, time.process_time()-cpu, most_memory()-before))
def in_a_fork(step, root):
    context = multiprocessing.get_context('fork')
    found = context.SimpleQueue()
    process = context.Process(target=measure, args=(step, root, found))
    process.start()
    process.join()
    if process.exitcode: raise RuntimeError(f'{step} failed')
    return found.get()

@call_parse
def main(
    lists:str, # Folder with the text files of FGVC-Aircraft
    rows:str='1000,10000,100000', # Numbers of pictures
    decoded:int=10_000, # Neither copy nor check the pictures of a larger tree
    out:str='results/large_tree', # Folder for table.csv
):
    measured,machine = [],f'{os.cpu_count()} CPU cores, {platform.machine()}; torch {torch.__version__}; other work ran'
    for n in map(int, rows.split(',')):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)/'tree'
            make_tree(Path(lists), root, n)
            for step in STEPS:
                if step in ('copies', 'copies again', 'check') and n>decoded: continue
                seconds,cpu,mb = in_a_fork(step, root)
                fewer = next((o for o in reversed(measured) if o['step']==step), None)
                growth = math.log(cpu/fewer['cpu_s'])/math.log(n/fewer['rows']) if fewer else math.nan
                row = dict(step=step, rows=n, seconds=seconds, cpu_s=cpu, MB=mb, growth=growth, machine=machine)
                print(row, flush=True)
                measured.append(row)
                Path(out).mkdir(parents=True, exist_ok=True)
                pd.DataFrame(measured).to_csv(Path(out)/'table.csv', index=False, float_format='%.4g')
