"""A Fisher of 1,000 ImageNet pictures in 16 tar files: is the sum exact, and what does it take?

    python benchmarks/shards.py PHOTOS

PHOTOS contains `data/imagenet_sample` (pictures with a `labels.csv`) and
`weights/mobilenetv1_075_imagenet.safetensors`. The pictures are written as WebDataset shards into a temporary
folder. `agreement.csv`: the sum over shards with each engine against one estimate over all pictures, both in
float32, and each against one in float64 (the empirical kind, which draws no labels). `time.csv`: the seconds of
a whole call, the start of its processes included. `adding.csv`: the seconds it takes to add as many shards to a
running sum in a file, without the estimates.
"""
import copy, os, platform, tempfile, time
from functools import partial
from pathlib import Path
import pandas as pd, torch, webdataset
from fastcore.script import call_parse
from timm.models.efficientnet import _gen_mobilenet_v1
from fgvc_fisher.data import read_pictures
from fgvc_fisher.fisher import estimate_fisher
from fgvc_fisher.learner import source_dl, source_model
from fgvc_fisher.fisher import shard_fisher, tar_shards
from fgvc_fisher.fisher.shards import PartialSums

mobilenet = partial(_gen_mobilenet_v1, 'mobilenetv1_100', 0.75, pretrained=False, pad_type='same', bn_eps=1e-3)

def write_shards(table, folder, n):
    "The pictures as `n` tar files, neighbours together"
    for i in range(n):
        with webdataset.TarWriter(str(folder/f'pictures-{i:06}.tar')) as sink:
            for j,o in enumerate(table[i*len(table)//n:(i+1)*len(table)//n].itertuples()):
                sink.write({'__key__': f'{j:06}', 'jpg': Path(o.path).read_bytes(), 'cls': str(o.label)})
    return tar_shards(folder/'*.tar')

def timed(f, *args, **kw):
    "What a call returns, and its seconds"
    begin = time.perf_counter()
    return f(*args, **kw),time.perf_counter()-begin

def largest_difference(a, b):
    "The largest relative difference of a parameter's Fisher"
    return max(((a[k].double()-b[k].double()).norm()/b[k].double().norm()).item() for k in b)

def add_all(fisher, n, folder):
    "Add `n` shards to a running sum"
    folder.mkdir()
    for i in range(n): PartialSums(folder).add(i, fisher)

def unsharded(model, table, size):
    "One estimate over all pictures"
    return estimate_fisher(model, source_dl(table, model, size), 'empirical', progress=False)

@call_parse
def main(
    photos:str, # Folder with data/ and weights/
    out:str='results/shards', # Folder for the rows
    n:int=16, # Shards
    size:int=128, # Side of the pictures in pixels
    note:str='', # What else the machine was doing, for the rows
):
    photos,out,home = Path(photos),Path(out),Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    machine = (f'{os.cpu_count()} cores, {platform.machine()}, no GPU, {torch.get_num_threads()} threads alone; '
               f'Python {platform.python_version()}, torch {torch.__version__}')
    def keep(rows, name):
        pd.DataFrame(rows).assign(machine=machine, note=note).to_csv(out/name, index=False, float_format='%.4g')
        print(pd.DataFrame(rows).to_string(), flush=True)
    model = source_model(mobilenet, photos/'weights/mobilenetv1_075_imagenet.safetensors')
    table = read_pictures(photos/'data/imagenet_sample')
    shards = write_shards(table, home, n)
    one,seconds = timed(unsharded, model, table, size)
    found = {'one estimate': one}
    times = [dict(engine='one estimate, no shards', jobs=1, shards=n, pictures=len(table), seconds=seconds)]
    for engine,jobs in (('processes',1), ('processes',2), ('ray',1)):
        name = f'{engine}, jobs={jobs}' if engine=='processes' else engine
        how = dict(kind='empirical', size=size, engine=engine, jobs=jobs, quiet=True)
        found[f'{n} shards, {name}'],seconds = timed(shard_fisher, model, shards, home/name, **how)
        at_a_time = jobs if engine=='processes' else os.cpu_count()
        times.append(dict(engine=engine, jobs=at_a_time, shards=n, pictures=len(table), seconds=seconds))
        keep(times, 'time.csv')
    _,seconds = timed(add_all, one, n, home/'adding')
    nbytes = (home/'adding/sum-000.safetensors').stat().st_size
    share = seconds/times[1]['seconds']
    keep([dict(shards=n, bytes_each=nbytes, seconds=seconds, share_of_jobs_1=share)], 'adding.csv')
    double = unsharded(copy.deepcopy(model).double(), table, size)
    keep([dict(estimate=k, images=v.n_images, to_one_estimate=largest_difference(v, one),
               to_float64=largest_difference(v, double)) for k,v in found.items()], 'agreement.csv')
