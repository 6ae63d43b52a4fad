"The evidence: its rows, its tables made again from them, and its script on drawn pictures"
import json, shutil
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
import matplotlib, matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_model, save_file
from fgvc_fisher.experiment import load_run, table
from fgvc_fisher.experiment.results import ACCURACIES
from fgvc_fisher.data.synthetic import draw_aircraft, draw_source
from tiny import network

ROOT = Path(__file__).parent.parent
ROWS = ROOT/'results/evidence'

@pytest.fixture
def evidence(monkeypatch, unplaced_labels):
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    import evidence
    return evidence

def test_rows_are_one_a_run_and_name_no_machines_paths():
    runs,merged = [pd.read_csv(ROWS/o) for o in ('runs.csv','merged.csv')]
    for o in (runs, merged): assert not o.duplicated(['tree','network','arm','seed']).any() and o.machine.notna().all()
    assert not runs[['data','source','weights']].astype(str).apply(lambda c: c.str.contains('/')).any(axis=None)
    ended = runs[runs['last'].notna()]
    assert ended[['retention_target_bn','retention_source_bn','before']].notna().all(axis=None)
    assert set(runs[runs['last'].isna()].arm.str.split(',').str[0]) <= {'explicit step'}    # nothing else diverged

def test_tables_come_from_the_rows(evidence, tmp_path, capsys):
    "What is committed is what the rows give"
    for o in ('runs.csv','merged.csv'): shutil.copy(ROWS/o, tmp_path)
    evidence.report(tmp_path)
    made = {o.name for o in tmp_path.iterdir()}
    assert made == {o.name for o in ROWS.iterdir()}
    for o in made:
        if not o.endswith('.csv'): continue
        assert (tmp_path/o).read_text()==(ROWS/o).read_text(), f'{o}: run python benchmarks/evidence.py'

def test_the_script_from_pictures_to_tables(evidence, tmp_path, monkeypatch, capsys):
    "Drawn pictures and a tiny network; a second call does no run again"
    draw_aircraft(tmp_path/'data/airliners17', n_variants=2, n_per_split=2, size=48)
    draw_source(tmp_path/'data/imagenet_sample', n_classes=4, n_per_split=4, size=48)
    (tmp_path/'weights').mkdir()
    save_file(network(num_classes=4).state_dict(), tmp_path/'weights/tiny.safetensors')
    tiny = dict(trees=['airliners17'], arch='tiny:network', weights='tiny.safetensors', lr=0.01)
    monkeypatch.setattr(evidence, 'NETWORKS', dict(tiny=tiny))
    monkeypatch.setattr(evidence, 'PULLS', dict(tiny=1))
    monkeypatch.setattr(evidence, 'PARTS', [0.5])
    monkeypatch.setattr(evidence, 'BETAS', [0.1])
    plain,_,l2sp,fisher,_ = evidence.arms('tiny')
    few = [plain, l2sp | dict(l2sp=[0.1]), fisher | dict(beta=[10.])]
    monkeypatch.setattr(evidence, 'arms', lambda network: few)
    def call():
        evidence.main(photos=str(tmp_path), out=str(tmp_path/'out'), work=str(tmp_path/'work'), seeds=1, epochs=1,
                      size=32, more='')
    call()
    runs,merged = [pd.read_csv(tmp_path/f'out/{o}.csv') for o in ('runs','merged')]
    assert len(runs)==3
    assert set(runs.network)=={'tiny'} and set(runs.data)=={'airliners17'}
    assert list(merged.arm)==['Fisher merging, beta = 0.1', 'WiSE-FT, t = 0.5']
    assert len(table(pd.concat([runs, merged])))==5
    made = {o.name for o in (tmp_path/'out').iterdir()}
    name = 'airliners17-tiny'
    assert made>={f'table-{name}.csv', f'differences-{name}.csv'}
    before = {o: o.stat().st_mtime_ns for o in (tmp_path/'work/runs').rglob('*.*')}
    call()
    assert before=={o: o.stat().st_mtime_ns for o in (tmp_path/'work/runs').rglob('*.*')}

@pytest.fixture
def aircraft(monkeypatch, tmp_path):
    "The script for FGVC-Aircraft's own pictures with a tiny network and drawn pictures, two a class and split"
    monkeypatch.syspath_prepend(ROOT/'benchmarks')
    import aircraft
    draw_aircraft(tmp_path/'data/fgvc20', n_variants=2, n_per_split=2, size=48)
    for o in ('imagenet_sample', 'imagenet_extra'):
        draw_source(tmp_path/'data'/o, n_classes=4, n_per_split=2, size=48)
    (tmp_path/'weights').mkdir()
    weights = network(num_classes=4).state_dict()
    save_file(weights, tmp_path/'weights/tiny.safetensors')
    tiny = dict(arch='tiny:network', weights='tiny.safetensors')
    for o in ('NETWORK', 'INCEPTION'): monkeypatch.setattr(aircraft, o, tiny)
    monkeypatch.setattr(aircraft, 'KERNEL', next(k for k,v in weights.items() if v.ndim==4))
    return aircraft

def tiny_arms(aircraft):
    "The stages that the accelerator's grid needs, each with an epoch"
    short = aircraft.PAPER | dict(epochs=1)
    return dict(main=[dict(arm='plain'), dict(arm='L2-SP-Fisher', strength=[0.5])], merged=[dict(arm='plain')],
                distilled=aircraft.STAGES['distilled'][-1:],
                inception=[short | o for o in aircraft.paper(aircraft.SUBSTITUTED)], starts=aircraft.STAGES['starts'])

def call(aircraft, folder, **kwargs):
    "Call the script as the command does. Returns its rows"
    aircraft.main(photos=str(folder), out=str(folder/'out'), work=str(folder/'work'), epochs=1, **kwargs)
    return pd.read_csv(folder/'out/runs.csv')

def test_every_stage_of_the_papers_pictures_makes_runs(aircraft, tmp_path):
    "No two runs of all stages have the same key, and none has a row of another"
    runs = aircraft.all_runs(tmp_path, tmp_path, aircraft.STAGES, range(5), size=160)
    keys = [tuple(getattr(run, o) for o in aircraft.KEY) for run in runs]
    assert len(keys)==len(set(keys))==len({run.id for run in runs})
    arms = {run.arm for run in runs if run.size==160}
    assert sum(o.startswith('L2-SP, ') for o in arms)==6 and sum(o.startswith('L2-SP-Fisher, ') for o in arms)==8
    assert {run.seed for run in runs if run.arm=='plain'}==set(range(5))
    assert {run.seed for run in runs if run.arm=='plain, family'}=={0}
    assert all('two tensors substituted' in o['arm'] for stage in aircraft.ON_GPU for o in aircraft.STAGES[stage])

def test_every_committed_row_is_of_a_run_of_a_stage(aircraft, tmp_path):
    "So a call that resumes does none of them again; a merged model comes from a plain run"
    key = [o for o in aircraft.KEY if o!='arch']                       # the fixture's is another
    runs = [run for size,amp in product((aircraft.SIZE,*aircraft.SIZES), (False,True))
            for run in aircraft.all_runs(tmp_path, tmp_path, aircraft.STAGES, range(42,52), size=size, amp=amp)]
    known = {tuple(getattr(run, o) for o in key) for run in runs}
    rows = pd.read_csv(ROOT/'results/aircraft/runs.csv')
    rows = rows.assign(arm=rows.arm.where(~rows.arm.str.contains('^WiSE-FT|^Fisher merging'), 'plain'))
    assert not {*rows[key].itertuples(index=False, name=None)}-known
    curves = pd.read_csv(ROOT/'results/aircraft/recipe_curves.csv')
    assert {*curves.arm}=={o['arm'] for o in aircraft.STAGES['inception']}

def test_the_papers_pictures_resume(aircraft, tmp_path, monkeypatch, capsys):
    "What is finished has a row when a call is interrupted, and is not done again, also where its folder is gone"
    monkeypatch.setattr(aircraft, 'STAGES', tiny_arms(aircraft))
    sweep = aircraft.sweep
    def interrupted(runs, *args, **kwargs):
        sweep(runs[:1], *args, **kwargs)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(aircraft, 'sweep', interrupted)
        call(aircraft, tmp_path, stages='main', seeds=1, size=32)
    first = pd.read_csv(tmp_path/'out/runs.csv')
    shutil.rmtree(tmp_path/'work/runs')
    rows = call(aircraft, tmp_path, stages='main', seeds=1, size=32)
    assert first.arm.tolist()==['plain'] and len(list(tmp_path.glob('work/runs/*')))==1
    assert set(rows.num_workers)=={0}                                  # it is part of a run's id
    assert set(rows.arm)=={'plain','L2-SP-Fisher, strength = 0.5'}
    assert not rows[['data','source','weights']].apply(lambda c: c.str.contains('/')).any(axis=None)
    assert rows[['last','test','retention_source_bn','before']].notna().all(axis=None)
    shutil.rmtree(tmp_path/'work/runs')
    assert call(aircraft, tmp_path, stages='main', seeds=1, size=32).equals(rows)
    assert not list(tmp_path.glob('work/runs/*'))
    assert len(call(aircraft, tmp_path, stages='main', seeds=2, size=32))==4
    assert len(list(tmp_path.glob('work/runs/*')))==2

def test_ewc_is_clipped(aircraft, tmp_path, monkeypatch, capsys):
    "The penalty's gradient is clipped with the loss's: a step that would diverge does not"
    arms = [dict(arm=o, strength=[1e6], epochs=5, **aircraft.EWC) for o in ('EWC', aircraft.CLIPPED[0])]
    monkeypatch.setattr(aircraft, 'STAGES', dict(others=arms))
    rows = call(aircraft, tmp_path, stages='others', seeds=1, size=32).set_index('arm')
    assert rows['last'].isna().to_dict()=={'EWC, strength = 1000000': True, 'EWC, clipped, strength = 1000000': False}

def test_unprotected_channels_are_put_back(aircraft, tmp_path, monkeypatch, capsys):
    "With a high limit most channels are unprotected; as trained the accuracy is the run's retention"
    import unprotected
    monkeypatch.setattr(aircraft, 'STAGES', tiny_arms(aircraft))
    monkeypatch.setattr(unprotected, 'ALMOST_NONE', 1e9)
    runs = call(aircraft, tmp_path, stages='main', seeds=1, size=32).set_index('arm')
    for _ in range(2): unprotected.main(work=str(tmp_path/'work'), out=str(tmp_path/'out'))
    rows = pd.read_csv(tmp_path/'out/unprotected.csv')
    assert rows.arm.tolist()==['L2-SP-Fisher, strength = 0.5']
    row = rows.iloc[0]
    assert abs(row.tuned-runs.loc[row.arm,'retention_source_bn'])<1e-5
    assert row.unprotected>row.of/2 and 0<=row.first_back<=1
    assert row.moved>0 and row.deviation>0 and 0<=row.seen<=1 and row['values']>2
    assert capsys.readouterr().out.count('unprotected channels back')==1

def test_a_saturated_channel_passes_a_gradient_on_by_the_batchs_statistics(aircraft, tmp_path, monkeypatch, capsys):
    "Running statistics under which a channel is cut off: no gradient by them, one by those of a batch"
    import saturated
    state = network(num_classes=4).state_dict()
    state['bn1.running_mean'][1],state['bn1.running_var'][1] = 1e3,4.
    save_file(state, tmp_path/'weights/tiny.safetensors')
    monkeypatch.setattr(saturated, 'CHANNEL', ('conv1.weight',1))
    monkeypatch.setattr(saturated, 'SIZES', (32,48))
    saturated.main(str(tmp_path), str(tmp_path))
    rows = pd.read_csv(tmp_path/'saturated.csv').set_index('statistics')
    running,batch = rows.loc['running'],rows.loc['batch']
    assert len(running)==len(batch)==4 and running.deviation.eq(2).all() and (batch.deviation!=2).all()
    assert running[['open','gradient']].eq(0).all(axis=None) and (batch[['open','gradient']]>0).all(axis=None)

def test_one_layer_keeps_its_statistics(aircraft, tmp_path, monkeypatch, capsys):
    "A training with a layer kept leaves its running statistics as they were, and only those"
    monkeypatch.setattr(aircraft, 'STAGES', dict(kept=aircraft.STAGES['kept']))
    monkeypatch.setattr(aircraft, 'KEPT_NORM', 'bn1')
    call(aircraft, tmp_path, stages='kept', seeds=1, size=32)
    folder, = tmp_path.glob('work/runs/*')
    source = network(num_classes=4)
    load_model(source, tmp_path/'weights/tiny.safetensors')
    tuned,source = load_run(folder).model.state_dict(),source.state_dict()
    changed = {k for k in source if k.endswith('running_var') and not torch.equal(tuned[k], source[k])}
    assert changed=={k for k in source if k.endswith('running_var')}-{'bn1.running_var'}

def test_statistics_of_the_target(aircraft, tmp_path, monkeypatch, capsys):
    "Without those of the target the accuracy is the source's; the model that lends its layers stays as it is"
    import norm_statistics
    monkeypatch.setattr(norm_statistics, 'NETWORKS', [(dict(arch='tiny:network', weights='tiny.safetensors'), 32)])
    monkeypatch.setattr(aircraft, 'STAGES', dict(main=[dict(arm='plain')]))
    before = call(aircraft, tmp_path, stages='main', seeds=1, size=32).before
    norm_statistics.main(str(tmp_path), str(tmp_path/'out'), str(tmp_path/'work'))
    rows = pd.read_csv(tmp_path/'out/norm_statistics.csv').set_index('layers')
    assert rows.accuracy['none']==pytest.approx(before[0], abs=1e-5) and rows.pictures.eq(4).all()
    assert rows.n_layers['all']==rows.n_layers.sum()/2>0

def test_two_tasks_in_sequence(aircraft, tmp_path, monkeypatch, capsys):
    "What a first run knew is its row's; a penalty that holds all keeps both, and another call does nothing again"
    import sequence
    draw_aircraft(tmp_path/'data/warbirds30', n_variants=3, n_per_split=2, size=48)
    monkeypatch.setattr(aircraft, 'STAGES', tiny_arms(aircraft))
    plain,fisher = [o['arm'] for o in aircraft.STAGES['main']][0],'L2-SP-Fisher, strength = 0.5'
    held = dict(strength=1e9),('source','first')
    monkeypatch.setattr(sequence, 'ARMS', [(plain, {}, ()), (fisher, *held), (fisher, dict(strength=0.5), ('first',))])
    runs = call(aircraft, tmp_path, stages='main', seeds=1, size=32).set_index('arm')
    for _ in range(2): sequence.main(str(tmp_path), str(tmp_path/'out'), str(tmp_path/'work'), 1)
    rows = pd.read_csv(tmp_path/'out/sequence.csv').set_index('arm')
    assert len(rows)==3 and capsys.readouterr().out.count('warbirds ')==3
    for arm,row in rows.iterrows():
        first = runs.loc[plain if arm==plain else fisher]
        assert abs(row.first_before-first.test)<1e-5 and abs(row.source_before-first.retention_source_bn)<1e-5
    both = rows.loc[f'{fisher}, by both Fishers']
    assert both['first']==both.first_before and both.source==both.source_before and both.weighed_by=='source and first'

def test_what_the_arms_cost(aircraft, tmp_path, monkeypatch, capsys):
    "A row an arm and a row a kind of Fisher; memory is measured in a process of its own, which this test leaves out"
    import cost
    make = cost.one_epoch_run
    monkeypatch.setattr(cost, 'one_epoch_run', lambda *args: replace(make(*args), bs=2, fraction=1.))  # two batches
    monkeypatch.setattr(cost, 'memory', lambda *args: 1.)
    cost.main(str(tmp_path), str(tmp_path), size=32, rounds=1)
    arms,kinds = [pd.read_csv(tmp_path/f'{o}.csv').set_index(k) for o,k in (('cost','arm'),('cost_fisher','what'))]
    assert list(arms.index)==list(cost.ARMS) and arms.ratio['plain']==1 and (arms.step_ms>0).all()
    assert list(kinds.index)==['training',*cost.ESTIMATES] and (kinds.pictures_s>0).all()
    run = cost.one_epoch_run(tmp_path, tmp_path, 'LwF, weight = 1', 32)
    assert cost.peak_memory(tmp_path, tmp_path, run.arm, 32)>100

def test_both_fishers_weigh_the_same(aircraft):
    "Each is divided by its mean over the parameters that both have"
    import sequence
    fisher = dict(a=torch.tensor([1.,3.]), b=torch.tensor([[8.]]), head=torch.tensor([1e9]))
    made = sequence.normalised(fisher, ['a','b'])
    assert made.keys()=={'a','b'} and torch.allclose(torch.cat([made['a'],made['b'][0]]), torch.tensor([0.25,0.75,2.]))

def test_the_accelerators_call_with_two_pictures_a_class(aircraft, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(aircraft, 'STAGES', tiny_arms(aircraft))
    for o,v in dict(SIZES=(32,48), PAPER_SIZE=48).items(): monkeypatch.setattr(aircraft, o, v)
    monkeypatch.setattr('evidence.PARTS', [0.5])
    monkeypatch.setattr('evidence.BETAS', [0.1])
    weights = []
    class Watched(aircraft.LwF):
        def after_loss(self):
            super().after_loss()
            weights.append(self.weight)
    monkeypatch.setattr(aircraft, 'LwF', Watched)
    rows = call(aircraft, tmp_path, seeds=1, num_workers=0, accelerator=True)
    said = capsys.readouterr().out
    assert 'all 12 runs: ' in said and said.index('hours with 1 at a time')<said.index('done before')
    assert len(rows)==2*(3+2)+3+3 and rows[['last','retention_source_bn','machine']].notna().all(axis=None)
    named = rows[rows.arm.str.startswith(aircraft.SUBSTITUTED)]
    assert len(named)==6 and set(named.source)=={'imagenet_sample'} and named.weights.nunique()==3
    assert weights==[10.,10.]                                          # a batch at each size
    merged = rows[rows.arm.str.contains('Fisher merging|WiSE-FT')]
    assert {*zip(merged.arm, merged['size'])}=={*product(['Fisher merging, beta = 0.1','WiSE-FT, t = 0.5'], [32,48])}

@pytest.mark.parametrize('asked,named', [(dict(stages='main,nonsense'), 'nonsense'), (dict(stages=''), 'choose from'),
                                         (dict(stages=' main'), "' main'"), (dict(jobs=0), 'jobs=0'),
                                         (dict(seeds=0), 'seeds=0'), (dict(seeds=-3, accelerator=True), 'seeds=-3'),
                                         (dict(epochs=0), 'epochs=0'), (dict(size=-1), 'size=-1'),
                                         (dict(photos='/no/such/folder'), '/no/such/folder'),
                                         (dict(missing='weights/tiny.safetensors'), 'tiny.safetensors is missing'),
                                         (dict(missing='data/imagenet_extra/labels.csv'), 'labels.csv is missing')])
def test_nonsense_is_refused_before_anything_is_written(aircraft, tmp_path, asked, named):
    asked = dict(asked)
    if missing := asked.pop('missing', None): (tmp_path/missing).unlink()
    with pytest.raises(SystemExit, match=named):
        aircraft.main(**dict(photos=str(tmp_path)) | dict(out=str(tmp_path/'out'), work=str(tmp_path/'work')) | asked)
    assert not (tmp_path/'out').exists() and not (tmp_path/'work').exists()

def test_the_table_of_the_papers_pictures_comes_from_its_rows(aircraft, tmp_path, capsys):
    "What is committed is what the rows give, one row a run, with no path of a machine"
    committed = ROOT/'results/aircraft'
    shutil.copy(committed/'runs.csv', tmp_path)
    aircraft.report(tmp_path)
    assert (tmp_path/'table.csv').read_text()==(committed/'table.csv').read_text(), 'run python benchmarks/aircraft.py'
    rows = pd.read_csv(committed/'runs.csv')
    assert not rows.duplicated(aircraft.KEY).any() and rows.machine.notna().all()
    assert not rows[['data','source','weights']].astype(str).apply(lambda c: c.str.contains('/')).any(axis=None)

# What the notebook says, of any number of rows

NOTEBOOK = json.loads((ROOT/'nbs/evidence.ipynb').read_text(encoding='utf-8'))

def made_up(scripts_runs, seeds):
    "Rows of all stages with drawn numbers; a strong explicit step diverges; a merged model has no test pictures"
    rng = np.random.default_rng(0)
    found = []
    for run in scripts_runs:
        if run.seed not in seeds: continue
        held = run.strength+run.l2sp
        row = asdict(run) | {o: 0.7-0.02*held+rng.normal(0, 0.01) for o in ('best','last','test','test_last')}
        row |= {f'{o}_{k}_bn': 0.1+0.5*held/(held+1)+rng.normal(0, 0.01) for o in ('retention','agreement')
                for k in ('target','source')}
        if run.arm=='EWC, strength = 0.03': row |= {o: np.nan for o in row if o in ACCURACIES}
        found.append(row | dict(before=0.75, seconds=1., machine='drawn'))
        if run.arm=='plain': found.append({k: v for k,v in found[-1].items() if not k.startswith('test')}
                                          | dict(arm='WiSE-FT, t = 0.5', strength=0.5))
    return pd.DataFrame(found)

def examined(rows):
    "Rows of `benchmarks/unprotected.py`; the first run has no unprotected channel"
    t = rows[rows.strength>0].reset_index(drop=True)
    t = t[[o for o in t if o in ('arm','seed','arch','size','epochs','lr','level','amp')]]
    t = t.assign(tuned=0.2, first_back=np.linspace(0.2, 0.6, len(t)), all_back=0.7, valid=0.7, valid_back=0.69,
                 unprotected=3, of=9, parameter='a.weight', channel=1., moved=0.3, norm=0.1, deviation=0.1,
                 typical_deviation=5., seen=0., values=2)
    t.loc[:0, ['parameter','channel','moved','norm','deviation','typical_deviation','seen','values']] = np.nan
    return t

PARTS = dict( # Of the rows: what may have been measured so far
    choices=lambda t: t[t.arm.str.contains('^plain, .*epochs')],
    nothing=lambda t: t[:0], one=lambda t: t[t.arm=='plain'][:1],
    no_plain=lambda t: t[t.arm!='plain'], one_seed=lambda t: t[t.seed==42],
    diverged=lambda t: t[t.arm.str.startswith('EWC, strength')],
    uneven=lambda t: t[(t.seed==42) | t.arm.isin(['plain','L2-SP, l2sp = 0.1'])],
    apart=lambda t: t[(t.seed==42)==(t.arm=='plain')],               # no seed in common with plain
    accelerator=lambda t: pd.concat([t, *(t.assign(size=o, amp=True) for o in (224,299))]),
    two_settings=lambda t: pd.concat([t, t.assign(epochs=30)]))

@pytest.mark.parametrize('part', PARTS)
def test_the_notebook_holds_for_any_rows(aircraft, unplaced_labels, tmp_path, monkeypatch, capsys, part):
    "Its cells about the paper's pictures, on drawn rows: at most five sentences, no NaN among them"
    matplotlib.use('Agg')
    runs = aircraft.all_runs(tmp_path, tmp_path, aircraft.STAGES, range(42, 45), size=160)
    rows = PARTS[part](made_up(runs, range(42, 45))).drop_duplicates(aircraft.KEY)
    (tmp_path/'results/aircraft').mkdir(parents=True)
    rows.to_csv(tmp_path/'results/aircraft/runs.csv', index=False)
    examined(rows).to_csv(tmp_path/'results/aircraft/unprotected.csv', index=False)
    for o in ('norm_statistics','saturated','recipe_curves','cost','cost_fisher'):
        shutil.copy(ROOT/f'results/aircraft/{o}.csv', tmp_path/'results/aircraft')
    sequence = pd.read_csv(ROOT/'results/aircraft/sequence.csv')
    if part=='one_seed': sequence = sequence[sequence.seed==42]
    sequence.to_csv(tmp_path/'results/aircraft/sequence.csv', index=False)
    (tmp_path/'results/strength').mkdir()
    shutil.copy(ROOT/'results/strength/table.csv', tmp_path/'results/strength')
    monkeypatch.chdir(tmp_path)
    shown,names = [],{}
    monkeypatch.setattr('IPython.display.display', lambda *args: shown.extend(args))
    for cell in NOTEBOOK['cells']:
        source = ''.join(cell['source'])
        if source.startswith('## MobileNet and SqueezeNet'): break
        if cell['cell_type']=='code' and '%pip' not in source: exec(source, names)
    plt.close('all')
    said = [o.data for o in shown if hasattr(o, 'data')]
    page = said[0].splitlines()
    assert 1<=len(page)<=5 and not any('nan' in o for o in said)
    assert any('Not measured yet' in o for o in said)
    assert ('± ' in page[0])==(part not in ('choices','nothing','one','no_plain','one_seed','diverged','apart'))
