"""Is the Fisher of every timm classifier of up to 30 million parameters exact?

    python benchmarks/every_classifier.py results/every_classifier

Each model is made with random weights and ten classes, and gets two images of noise, as small as it accepts. In float64
its empirical Fisher is compared with plain autograd, one image at a time, for all of its parameters. Nothing is
downloaded. Each model has a process and `minutes` of processor time of its own. First comes the smallest model of each
of timm's modules, the newest first, then the others, the smallest first. `table.csv` gets a row for each model when it
is done; the same call resumes with the models that have none. The columns:

- parameters: their number in millions, with ten classes
- size: the side of the images in pixels
- how: by which means each parameter was computed, whether it is exact, or why the model has no Fisher here
- by_rule, slowly, unused: how many parameters have a rule, go one image at a time, or do not reach the logits
- difference: the largest relative difference of a parameter to autograd, as root of the sum over both images; a
  millionth of the largest root is added to the divisor, since some gradients are zero but for rounding
- rounding: the same between autograd and autograd of images that are changed by a part in 10^14
- seconds: processor time of the estimate, in one thread
"""
import csv, importlib, inspect, multiprocessing, re, resource, signal, time, traceback, warnings
from pathlib import Path
import timm, torch
from fastcore.script import call_parse
from torch import nn
from fgvc_fisher.fisher import estimate_fisher
from fgvc_fisher.fisher.per_image import UNUSED, WHOLE

COLUMNS = ['model','parameters','size','how','by_rule','slowly','unused','difference','rounding','seconds']
LARGEST = 1e-6 # difference of what is called exact; a few networks compute a part in float32
SIZES = (64,96,128,160,192,224,240,256,288,320,384)

def year(module):
    "The newest year that the beginning of a module of timm names"
    beginning = inspect.getsource(importlib.import_module(f'timm.models.{module}'))[:3000]
    return max(map(int, re.findall(r'\b20[12]\d\b', beginning)), default=0)

def size_of(name):
    "Parameters of a model with ten classes, in millions, without making its weights; None if that fails"
    try:
        with torch.device('meta'): model = timm.create_model(name, num_classes=10)
        return sum(p.numel() for p in model.parameters())/1e6
    except Exception: return None

def in_order(largest):
    "Models of up to `largest` million parameters: one of each module, then the others"
    first,others = [],[]
    for module in sorted(timm.list_modules(), key=year, reverse=True):
        sizes = {name: size_of(name) for name in timm.list_models(module=module)}
        unknown = [name for name,size in sizes.items() if size is None]          # made for real, and reported
        small = sorted((size,name) for name,size in sizes.items() if size is not None and size<=largest)
        names = [name for _,name in small]+unknown
        first += names[:1]
        others += [(sizes[name] or 0, name) for name in names[1:]]
    return first+[name for _,name in sorted(others)]

def make(name):
    "The model in float64, the side of the smallest images that it accepts, and the reasons why others fail"
    cfg,why = timm.get_pretrained_cfg(name),{}
    sizes = sorted({*SIZES, cfg.input_size[-1]})
    for size in sizes:
        for options in (dict(img_size=size), {}):
            try:
                model = timm.create_model(name, num_classes=10, **options).double().eval()
                with torch.no_grad(): out = model(torch.randn(1, *cfg.input_size[:1], size, size, dtype=torch.float64))
                if isinstance(out, torch.Tensor) and out.shape!=(1,10):
                    raise ValueError(f"no classifier: its output has the shape {tuple(out.shape)}")
                return model,size
            except Exception as e: why[size] = e
    raise why[cfg.input_size[-1]]

def liven(model, x):
    "Parameters that begin at zero are moved, and normalisations get statistics that suit their input"
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim<2: p += 0.2*torch.rand_like(p)
            elif not p.any(): p.normal_(0, 0.02)
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm): m.momentum = 0.5
        model.train()
        model(x)
        model.eval()

def by_autograd(model, x, y):
    """Parameter name -> root of the sum of its squared gradients, one image at a time. Each image is a batch of two
    equal ones, since PyTorch's gradient of `batch_norm` may be wrong for one (see `fisher.per_image`)"""
    params = dict(model.named_parameters())
    sums = {n: torch.zeros_like(p) for n,p in params.items()}
    for image,label in zip(x.split(1), y):
        loss = model(image.expand(2, -1, -1, -1)).log_softmax(-1)[:,label].mean()
        grads = torch.autograd.grad(loss, list(params.values()), allow_unused=True, retain_graph=True)
        for n,g in zip(params, grads): sums[n] += 0 if g is None else g**2
    return {n: v.sqrt() for n,v in sums.items()}

def largest_difference(found, expected):
    longest = max(v.norm().item() for v in expected.values())
    return max(((found[n]-v).norm()/(v.norm()+1e-6*longest)).item() for n,v in expected.items())

def examine(name):
    "The row of a model"
    torch.manual_seed(0)
    model,size = make(name)
    x,y = torch.randn(2, timm.get_pretrained_cfg(name).input_size[0], size, size).double(),torch.tensor([3,7])
    liven(model, x)
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fisher = estimate_fisher(model, [(x,y)], 'empirical', progress=False)
    seconds = time.process_time()-begin
    expected = by_autograd(model, x, y)
    again = by_autograd(model, x*(1+1e-14*torch.randn_like(x)), y)
    rules = fisher.coverage().rule
    slow,unused = [[n for n,how in rules.items() if how==o] for o in (WHOLE,UNUSED)]
    how = 'exact, by rule'
    if slow: how = f"exact, one image at a time for {', '.join(slow[:3])}" + (', ...' if slow[3:] else '')
    if unused: how += f"; the logits do not depend on {', '.join(unused[:3])}" + (', ...' if unused[3:] else '')
    found = {n: (v*2).sqrt() for n,v in fisher.items()}
    difference,rounding = largest_difference(found, expected),largest_difference(again, expected)
    if difference>max(LARGEST, 100*rounding): how = how.replace('exact', 'wrong')
    return [name, f'{sum(p.numel() for p in model.parameters())/1e6:.2f}', size, how, len(rules)-len(slow)-len(unused),
            len(slow), len(unused), f'{difference:.0e}', f'{rounding:.0e}', f'{seconds:.1f}']

def write(table, row):
    with open(table, 'a', newline='') as f: csv.writer(f, lineterminator='\n').writerow(row)

def work(table, name, seconds):
    "In a process of its own: examine a model and write its row"
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds+10))
    torch.set_num_threads(1)
    try: row = examine(name)
    except Exception as e:
        traceback.print_exc()
        why = ' '.join(f'{type(e).__name__}: {e}'.split())[:300]
        row = [name,'','',why,'','','','','','']
    write(table, row)

@call_parse
def main(
    out:str, # Folder for table.csv
    largest:float=30., # Parameters of the largest model, in millions
    minutes:float=10., # Limit of a model's processor time
    only:str='', # A name, with * for any letters: examine only these models
):
    "Examine all models that have no row in the table yet."
    table = Path(out)/'table.csv'
    table.parent.mkdir(parents=True, exist_ok=True)
    if not table.exists(): write(table, COLUMNS)
    names = timm.list_models(only) if only else in_order(largest)
    def done(): return {row[0] for row in csv.reader(table.open(encoding='utf-8'))}
    for i,name in enumerate(names):
        if name in done(): continue
        print(f'{i+1} of {len(names)}: {name}', flush=True)
        process = multiprocessing.get_context('fork').Process(target=work, args=(table, name, int(60*minutes)))
        process.start()
        process.join()
        too_long = process.exitcode==-signal.SIGXCPU
        why = f'it takes longer than {minutes:g} minutes here' if too_long else 'its process died'
        if name not in done(): write(table, [name,'','',why,'','','','','',''])
