"""A Fisher of 1,000 ImageNet pictures in 16 tar files: is the sum exact, is the cost linear, and what does adding up cost?

    python benchmarks/shards.py PHOTOS

PHOTOS holds `data/imagenet_sample` (pictures with a `labels.csv`) and `weights/mobilenetv1_075_imagenet.safetensors`. The pictures are
written as WebDataset shards into a temporary folder. `agreement.csv`: the sum over shards, whoever did them, against one
estimate over all pictures, both in float32, and each against one in float64 (empirical kind: no drawn labels to differ by). `time.csv`:
the seconds of a call for a quarter, a half, three quarters and all of the shards, its processes started and all, and the most partial sums that lay in the folder at once.
`merging.csv`: fifteen additions of two files to one, as the tree makes them, alone.
"""
import copy, os, platform, tempfile, threading, time
from functools import partial
from pathlib import Path
import pandas as pd, torch, webdataset
from fastcore.script import call_parse
from timm.models.efficientnet import _gen_mobilenet_v1
from fgvc_fisher.data import read_pictures
from fgvc_fisher.fisher import DiagFisher, estimate_fisher
from fgvc_fisher.learner import source_dl, source_model
from fgvc_fisher.shards import shard_fisher, tar_shards

mobilenet = partial(_gen_mobilenet_v1, 'mobilenetv1_100', 0.75, pretrained=False, pad_type='same', bn_eps=1e-3)

def write_shards(table, folder, n):
    "The pictures as `n` tar files, neighbours together"
    for i in range(n):
        with webdataset.TarWriter(str(folder/f'pictures-{i:06}.tar')) as sink:
            for j,o in enumerate(table[i*len(table)//n:(i+1)*len(table)//n].itertuples()):
                sink.write({'__key__': f'{j:06}', 'jpg': Path(o.path).read_bytes(), 'cls': str(o.label)})
    return tar_shards(folder/'*.tar')

class Watch:
    "The most partial sums in a folder at once, by looking all the time"
    def __init__(self, folder): self.folder,self.most,self.on = folder,0,True
    def __enter__(self):
        self.thread = threading.Thread(target=self.look)
        self.thread.start()
        return self
    def look(self):
        while self.on:
            self.most = max(self.most, len(list(self.folder.glob('*.safetensors'))))
            time.sleep(0.02)
    def __exit__(self, *_): self.on = False; self.thread.join()

def timed(model, shards, folder, size, **kw):
    "A call in a new folder: the Fisher, the seconds, the most partial sums at once"
    folder.mkdir()
    with Watch(folder) as watch:
        begin = time.perf_counter()
        fisher = shard_fisher(model, shards, folder, 'empirical', size=size, quiet=True, **kw)
        return fisher,time.perf_counter()-begin,watch.most

def off(a, b):
    "The largest relative difference of a parameter's Fisher"
    return max(((a[k].double()-b[k].double()).norm()/b[k].double().norm()).item() for k in b)

def merging(fisher, n, folder):
    "Add `n` files up in a tree: the seconds that takes, the bytes of a file"
    folder.mkdir()
    files = [fisher.save(folder/f'{i}.safetensors') for i in range(n)]
    nbytes,begin = files[0].stat().st_size,time.perf_counter()
    while len(files)>1:
        for a,b in zip(files[::2], files[1::2]):
            (DiagFisher.load(a)+DiagFisher.load(b)).save(folder/'sum')
            b.unlink()
            os.replace(folder/'sum', a)
        files = files[::2]
    return time.perf_counter()-begin,nbytes

def unsharded(model, table, size):
    "One estimate over all pictures, and its seconds"
    begin = time.perf_counter()
    return estimate_fisher(model, source_dl(table, model, size), 'empirical', progress=False),time.perf_counter()-begin

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
    about = dict(machine=f'{os.cpu_count()} cores, {platform.machine()}, no GPU, {torch.get_num_threads()} threads alone; Python {platform.python_version()}, torch {torch.__version__}', note=note)
    def keep(rows, name): pd.DataFrame(rows).assign(**about).to_csv(out/name, index=False, float_format='%.4g'); print(pd.DataFrame(rows).to_string(), flush=True)
    model,table = source_model(mobilenet, photos/'weights/mobilenetv1_075_imagenet.safetensors'),read_pictures(photos/'data/imagenet_sample')
    shards = write_shards(table, home, n)
    nbytes = sum(o.stat().st_size for o in home.glob('*.tar'))
    one,seconds = unsharded(model, table, size)
    times = [dict(engine='one estimate, no shards', jobs=1, shards=n, pictures=len(table), seconds=seconds, bytes_read=nbytes)]
    found = {'one estimate': one}
    for i,(engine,jobs) in enumerate((('processes',1),('processes',2),('ray',1))):
        for k in ([n//4, n//2, 3*n//4, n] if engine=='processes' else [n]):
            fisher,seconds,most = timed(model, shards[:k], home/f'{i}-{k}', size, engine=engine, jobs=jobs)
            times.append(dict(engine=engine, jobs=jobs if engine=='processes' else os.cpu_count(), shards=k, pictures=fisher.n_images, seconds=seconds, most_partial_sums=most))
        found[f'{n} shards, {engine}' + (f', jobs={jobs}' if engine=='processes' else '')] = fisher
        keep(times, 'time.csv')
    seconds,each = merging(fisher, n, home/'merging')
    alone = next(o['seconds'] for o in times if (o['engine'],o['jobs'],o['shards'])==('processes',1,n))
    keep([dict(partial_sums=n, additions=n-1, bytes_each=each, seconds=seconds, share_of_jobs_1=seconds/alone)], 'merging.csv')
    double,_ = unsharded(copy.deepcopy(model).double(), table, size)
    keep([dict(estimate=k, images=v.n_images, to_one_estimate=off(v, one), to_float64=off(v, double)) for k,v in found.items()], 'agreement.csv')
