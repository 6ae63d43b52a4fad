"""Why does a run of `benchmarks/aircraft.py` lose its source although the Fisher term protects it?

    python benchmarks/unprotected.py --work .keep/aircraft

A channel is a row of a weight of two or more dimensions. One is called unprotected if its Fisher information is below a
millionth of the median of its weight's channels: then hardly a source picture has a gradient there, and the Fisher term
lets it move freely. For each finished run under the Fisher term or L2-SP this puts unprotected channels back to the
source's values and measures again what is left of ImageNet, with the source's head and BatchNorm statistics: all at
once, and the one alone that has moved the furthest for its size. A row each, in `results/aircraft/unprotected.csv`:

- tuned, all_back, first_back: accuracy on ImageNet as trained, with all of them back, and with the first of them back
- valid, valid_back: accuracy on the target's validation pictures, as trained and with all of them back
- unprotected: how many there are, of how many channels
- parameter, channel: the first, the one that has moved the furthest
- moved, norm: by how much it has moved, and how long it is in the source
- deviation, typical_deviation: of its output on ImageNet, as BatchNorm has it; and the median of the layer's channels
- fisher, typical_fisher: its Fisher information, summed over its weights, and the median of the layer's channels
- seen: the share of the Fisher's pictures that have a gradient there which is not zero
- values: how many different values its activation takes on ImageNet; a saturated one takes two
"""
import copy
from dataclasses import replace
from pathlib import Path
import pandas as pd, torch
from fastcore.script import call_parse
from torch import nn
from aircraft import KEY
from evidence import add_rows, rows_of
from fgvc_fisher.data.tables import read_folder
from fgvc_fisher.experiment import load_run, read_runs
from fgvc_fisher.experiment.run import read_run, run_source
from fgvc_fisher.learner import head_names, source_dl
from fgvc_fisher.retention import accuracy_on, source_parts

ALMOST_NONE = 1e-6 # of the median

def body(model):
    "The parameters of a source model before its head"
    heads = tuple(f'{o}.' for o in head_names(model))
    return {n: p.detach() for n,p in model.named_parameters() if not n.startswith(heads)}

def channels(source, fisher, tuned):
    "A row for each channel, the furthest moved first"
    rows = []
    for name,p in body(source).items():
        if p.ndim<2: continue
        moved,norm = (tuned[name]-p).flatten(1).norm(dim=1),p.flatten(1).norm(dim=1)
        f = fisher[name].flatten(1).sum(1)
        rows += [dict(parameter=name, channel=i, moved=moved[i].item(), norm=norm[i].item(), fisher=f[i].item(),
                      typical_fisher=f.median().item()) for i in range(len(p))]
    t = pd.DataFrame(rows)
    return t.loc[(t.moved/t.norm).sort_values(ascending=False).index]

def put_back(model, source, found):
    "Give a model the source's values in the channels of a table"
    own = body(source)
    with torch.no_grad():
        for o in found.itertuples(): model.get_parameter(o.parameter)[o.channel] = own[o.parameter][o.channel]

def accuracy(tuned, source, found, pictures):
    "Accuracy on the source, with some channels put back"
    model = copy.deepcopy(tuned)
    put_back(model, source, found)
    return accuracy_on(model, pictures)

def on_target(folder, source, found):
    "Accuracy on the target as trained, and with some channels put back"
    learn = load_run(folder, pictures=True)
    with learn.no_bar():
        before = learn.validate()[1]
        put_back(learn.model, source, found)
        return before,learn.validate()[1]

def norm_after(model, images):
    "Name of a convolution's weight -> the BatchNorm that gets its output"
    found,makers = {},{}
    def made(name): return lambda module, args, out: makers.__setitem__(id(out), (name, out))
    def used(module, args):
        if id(args[0]) in makers: found[makers[id(args[0])][0]] = module
    hooks = [m.register_forward_hook(made(f'{n}.weight')) for n,m in model.named_modules() if isinstance(m, nn.Conv2d)]
    hooks += [m.register_forward_pre_hook(used) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad(): model(images)
    for o in hooks: o.remove()
    return found

def gradient(model, images, parameter):
    "The gradient of the log-likelihood of each image's most likely class, their mean"
    most_likely = model(images).log_softmax(-1).max(-1).values.mean()
    return torch.autograd.grad(most_likely, model.get_parameter(parameter))[0]

def share_seen(model, pictures, parameter, channel):
    "The share of pictures whose gradient is not zero in a channel"
    seen = [gradient(model, image, parameter)[channel].any().item() for x,_ in pictures for image in x.split(1)]
    return sum(seen)/len(seen)

def n_values(model, pictures, norm, channel):
    "How many different values a channel takes after BatchNorm, and after the activation if that is a part of it"
    found = set()
    def look(module, args, out): found.update(out[:,channel].unique().tolist())
    hook = norm.register_forward_hook(look)
    with torch.no_grad():
        for x,_ in pictures: model(x)
    hook.remove()
    return len(found)

def examine(folder, work):
    "The row of a run"
    run = read_run(folder)
    found = run_source(replace(run, strength=1.), work/'sources', progress=False) # with the Fisher, also for L2-SP
    source,pictures = found.model.eval(),list(found.pictures)
    tuned = load_run(folder, head='source').model              # with the source's head and BatchNorm statistics
    t = channels(source, found.fisher, body(tuned))
    free = t[t.fisher<=ALMOST_NONE*t.typical_fisher]
    first = free[:1]
    row = {k: getattr(run, k) for k in KEY} | dict(
        tuned=accuracy(tuned, source, free[:0], pictures), all_back=accuracy(tuned, source, free, pictures),
        first_back=accuracy(tuned, source, first, pictures), unprotected=len(free), of=len(t))
    row['valid'],row['valid_back'] = on_target(folder, source, free)
    if first.empty: return row
    norm = norm_after(source, pictures[0][0]).get(first.parameter.item())
    if norm is not None:
        deviations = norm.running_var.sqrt()
        row |= dict(deviation=deviations[first.channel.item()].item(), typical_deviation=deviations.median().item(),
                    values=n_values(source, pictures, norm, first.channel.item()))
    for_fisher,_ = source_parts(read_folder(run.source))
    pictures = source_dl(for_fisher, source, run.size, run.bs, num_workers=run.num_workers)
    seen = share_seen(source, pictures, first.parameter.item(), first.channel.item())
    return row | first.iloc[0].to_dict() | dict(seen=seen)

@call_parse
def main(
    work:str='.keep/aircraft', # The folder of the runs, as for `benchmarks/aircraft.py`
    out:str='results/aircraft', # Folder for the table
):
    "Examine the finished runs under the Fisher term or L2-SP that have no row yet."
    work,file = Path(work),Path(out)/'unprotected.csv'
    runs = read_runs(work)
    runs = runs[(runs.strength+runs.l2sp>0) & (runs.fisher_from=='source') & (runs.kind=='sampled')]
    done = {*rows_of(file).reindex(columns=KEY).itertuples(index=False, name=None)}
    for run in runs.itertuples():
        if tuple(getattr(run, o) for o in KEY) in done: continue
        row = examine(work/'runs'/run.id, work)
        add_rows(pd.DataFrame([row]), file, KEY)
        back = f"{row['tuned']:.1%}, with all unprotected channels back {row['all_back']:.1%}"
        print(f'{run.arm}, seed {run.seed}: {back}', flush=True)
    print(rows_of(file).to_string())
