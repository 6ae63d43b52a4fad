"""What a training step costs if freed memory is given back to Linux, and if it is kept: page faults, CPU time, memory.

    python benchmarks/memory.py

Each row is a process of its own, with one thread; kept and given back take turns. CPU time is that of the process, so
other work on the machine matters less than for seconds on a clock.
"""
import resource, subprocess, sys
from pathlib import Path
import pandas as pd
from fastcore.script import call_parse

STEPS,WARM = 12,4

def steps(arch, size, bs, keep):
    "Train for some steps in this process, and print what a step took"
    import timm, torch
    from fgvc_fisher.cli import keep_memory
    torch.set_num_threads(1)
    if keep: keep_memory()
    model = timm.create_model(arch, num_classes=20).train()
    opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    x,y = torch.randn(bs, 3, size, size),torch.arange(bs) % 20
    for i in range(WARM+STEPS):
        if i==WARM: before = resource.getrusage(resource.RUSAGE_SELF)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = [o.ru_utime+o.ru_stime for o in (before, after)]
    print((after.ru_minflt-before.ru_minflt)/STEPS, (cpu[1]-cpu[0])/STEPS, after.ru_maxrss/2**20, sep=',')

@call_parse
def main(
    archs:str='tf_efficientnet_lite0,resnet50,inception_v4', # timm's names, separated by commas
    rounds:int=3, # Processes for each network, kept and given back
    out:str='results/memory', # Folder for the rows and the table
    one:str='', # Only one process: arch,size,bs,keep
):
    "Measure, and write the rows and their medians."
    if one:
        arch,size,bs,keep = one.split(',')
        return steps(arch, int(size), int(bs), keep=='True')
    sizes,rows = dict(inception_v4=(299,8), resnet50=(224,16)),[]
    for arch in archs.split(','):
        size,bs = sizes.get(arch, (160,32))
        for i in range(2*rounds):
            keep = i%2==1
            command = [sys.executable, '-W', 'ignore', __file__, '--one', f'{arch},{size},{bs},{keep}']
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(',')
            rows.append((arch, size, bs, 'kept' if keep else 'given back', *map(float, said)))
    columns = ['network','size','bs','freed memory','page faults a step','CPU s a step','GB at most']
    rows = pd.DataFrame(rows, columns=columns)
    Path(out).mkdir(parents=True, exist_ok=True)
    rows.to_csv(Path(out)/'rows.csv', index=False, float_format='%.4g')
    table = rows.groupby(columns[:4], sort=False).median()
    table.to_csv(Path(out)/'table.csv', float_format='%.4g')
    print(table.round(3).to_string())
