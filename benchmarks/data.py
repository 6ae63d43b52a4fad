"""How many pictures per second two cores load: timm's loader, fastai's usual pipeline, and ours.

    python benchmarks/data.py PICTURES

PICTURES is a folder of photographs of any size; the script resizes them to 1024 x 695 pixels, the size of the archive's
pictures. Every loader has the same number of worker processes, for training (with the published transforms; fastai with
its usual ones, presizing and `aug_transforms`) and for evaluation.

Our loader reads the originals or smaller copies. `pictures/s` counts batches (32, 3, 299, 299) as they reach the
device. With a GPU this is all that the cores have to do. The batches are bytes; timm's are already mixed. `with the
device's part` counts normalised floats, mixed and erased; without a GPU the same cores do this work, too. `decoding
alone` is the lower bound: Pillow decodes, nothing else. The loaders take turns, round after round, and ratios are taken
within a round; a row has medians. `MB a worker` is a worker's unshared memory in the middle of an epoch.
"""
import os, platform, shutil, tempfile, time
from pathlib import Path
from statistics import median
import pandas as pd, psutil, torch
from fastcore.script import call_parse
from fastai.data.core import TfmdDL
from fastai.vision.all import ImageDataLoaders, Normalize, Resize, aug_transforms, get_image_files
from fasttransform import Pipeline
from PIL import Image, ImageOps
from timm.data import FastCollateMixup, ImageDataset, create_loader
from timm.data.loader import PrefetchLoader
from torch.utils.data import DataLoader
from fgvc_fisher.data import cache_images, picture_dl, read_image_folder
from fgvc_fisher.data.transforms import MEAN, STD, named_transforms

def make_pictures(source, folder, n):
    "Resize `n` photographs to 1024 x 695, in two folders, because the loaders expect classes"
    files = sorted(get_image_files(source))
    for i in range(n):
        file = folder/f'{i%2}'/f'{i:05}.jpg'
        file.parent.mkdir(parents=True, exist_ok=True)
        ImageOps.fit(Image.open(files[i%len(files)]).convert('RGB'), (1024,695), Image.BICUBIC).save(file, quality=90)

class Decode(torch.utils.data.Dataset):
    "Only decode"
    def __init__(self, files): self.files = list(files)
    def __len__(self): return len(self.files)
    def __getitem__(self, i):
        Image.open(self.files[i]).convert('RGB')
        return 0

def timm_loader(folder, train, size, bs, workers):
    if train:
        mixup = FastCollateMixup(mixup_alpha=0.2, label_smoothing=0.1, num_classes=2)
        kw = dict(re_prob=0.5, re_mode='pixel', auto_augment='rand-m9-mstd0.5-inc1', scale=(0.08,1.), ratio=(3/4,4/3),
                  hflip=0.5, interpolation='random', collate_fn=mixup)
    else: kw = dict(interpolation='bicubic', crop_pct=0.875)
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    return create_loader(ImageDataset(str(folder)), (3,size,size), bs, is_training=train, mean=MEAN, std=STD,
                         num_workers=workers, device=device, persistent_workers=False, **kw)

def fastai_loader(folder, train, size, bs, workers):
    batch_tfms = [*aug_transforms(size=size, min_scale=0.75), Normalize.from_stats(MEAN, STD)]
    dls = ImageDataLoaders.from_folder(folder, valid_pct=0.5, item_tfms=Resize(round(size*1.5)), bs=bs,
                                       num_workers=workers, batch_tfms=batch_tfms)
    return dls.train if train else dls.test_dl(get_image_files(folder))

def loaders(folder, copies, train, size, bs, workers):
    "Name -> a function that makes the loader"
    table = read_image_folder(folder)
    small = cache_images(table, named_transforms('published', size, train, 2).copy_side, dest=copies, quiet=True)
    def ours(o): return picture_dl(o, size, bs, train, workers, 'published')
    def decode(o): return DataLoader(Decode(o.path), bs, num_workers=workers)
    return {'timm': lambda: timm_loader(folder, train, size, bs, workers),
            'fastai, its own transforms': lambda: fastai_loader(folder, train, size, bs, workers),
            'ours': lambda: ours(table), 'ours, smaller copies': lambda: ours(small),
            'decoding alone': lambda: decode(table), 'decoding alone, smaller copies': lambda: decode(small)}

def without_device(loader):
    "The same loader, without the work on the device"
    if isinstance(loader, PrefetchLoader): return loader.loader
    if isinstance(loader, TfmdDL): loader.after_batch = Pipeline([])
    return loader

def pace(loader):
    "Pictures per second after the first two batches, and a worker's unshared memory in MB"
    n,n_batches,memory = 0,len(loader),0.
    for k,batch in enumerate(loader):
        if torch.cuda.is_available(): torch.cuda.synchronize()
        if k==1: start = time.perf_counter()
        if k>1: n += len(batch[0] if isinstance(batch, (tuple,list)) else batch)
        if k==n_batches//2:
            pause = time.perf_counter()
            memory = median(o.memory_full_info().uss for o in psutil.Process().children(recursive=True))/1e6
            start += time.perf_counter()-pause
    return n/(time.perf_counter()-start),memory

def row(paces, timm):
    "Medians over the rounds: speed and ratio to timm's in the same round, with the range of the ratio"
    ratios = [a/b for a,b in zip(paces, timm)]
    return median(paces),median(ratios),f'{min(ratios):.2f} to {max(ratios):.2f}'

@call_parse
def main(
    pictures:str, # A folder of photographs
    out:str='results/data_speed', # Folder for the table
    n:int=960, # Pictures
    size:int=299, # Side of the network's pictures in pixels
    bs:int=32, # Pictures per batch
    workers:int=2, # Worker processes
    rounds:int=5, # Times that each loader is measured
):
    folder = Path(tempfile.mkdtemp())
    make_pictures(pictures, folder/'pictures', n)
    rows = []
    for train in (True, False):
        phase = 'training' if train else 'evaluation'
        makers = loaders(folder/'pictures', folder/'copies', train, size, bs, workers)
        found = {o: [] for o in makers}
        for r in range(rounds):
            for name,make in makers.items():
                loading,memory = pace(without_device(make()))
                complete,_ = pace(make())
                found[name].append((loading, memory, complete))
                print(f'{phase:<10} {name:<32} round {r}: {loading:.0f}, {complete:.0f} pictures/s', flush=True)
        columns = {name: list(zip(*o)) for name,o in found.items()}
        timm_loading,_,timm_complete = columns['timm']
        for name,(loading,memory,complete) in columns.items():
            first,second = row(loading, timm_loading),row(complete, timm_complete)
            rows.append({'for': phase, 'loader': name, 'pictures/s': first[0], 'to timm': first[1], 'range': first[2],
                         "with the device's part": second[0], 'so to timm': second[1], 'so range': second[2],
                         'MB a worker': median(memory)})
    shutil.rmtree(folder)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'
    machine = (f'{os.cpu_count()} cores, {platform.machine()}, {device}; '
               f'Python {platform.python_version()}, torch {torch.__version__}')
    table = pd.DataFrame(rows).assign(machine=machine)
    Path(out).mkdir(parents=True, exist_ok=True)
    table.to_csv(Path(out)/f"{'cuda' if torch.cuda.is_available() else 'cpu'}.csv", index=False, float_format='%.4g')
    print(table.drop(columns='machine').to_string(index=False, float_format='{:.2f}'.format))
