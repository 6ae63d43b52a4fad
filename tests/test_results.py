"What the tables and figures make of experiments that are unfinished, failed, diverged or half measured"
import json, math, re
from itertools import product
import numpy as np, pandas as pd, pytest
from scipy import integrate, stats
import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
from fgvc_fisher.experiment import curves, differences, frontier, read_curves, read_runs, show_table, table
from fgvc_fisher.experiment.results import (
    ACCURACIES, DIVERGENCES, MEASURES, STYLES, at_retention, conclusions, equal_retention, read_errors, style
)
from fgvc_fisher.experiment.seeds import interval, paired, seeds_needed

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def write(out, id, run, curve=None, result=None, error=None):
    folder = out/'runs'/id
    folder.mkdir(parents=True)
    (folder/'run.json').write_text(json.dumps(run))
    if curve is not None: pd.DataFrame(curve).to_csv(folder/'curve.csv', index=False)
    if result is not None: (folder/'result.json').write_text(json.dumps(run | result | dict(id=id)))
    if error is not None: (folder/'error.txt').write_text(error)

def curve(n, top=0.7, shift=0.):
    t = np.arange(n)
    return dict(epoch=t, train_loss=2*0.6**t, valid_loss=2*0.7**t+shift, accuracy=top*(1-0.5**(t+1)), seconds=1.)

def measured(last, retention=0.2, **kwargs):
    retentions = dict(retention_target_bn=retention, retention_source_bn=retention/2)
    return dict(best=last, last=last, **retentions, seconds=9.) | kwargs

@pytest.fixture
def out(tmp_path):
    "Two arms of three seeds, written in another order than they are read"
    for seed in (2,0,1):
        strong = dict(arm='L2-SP-Fisher, beta = 10', beta=10., seed=seed)
        plain = dict(arm='plain', beta=0., seed=seed)
        write(tmp_path, f'b{seed}', strong, curve(3, 0.6, seed/10), measured(0.6+seed/100, 0.4))
        write(tmp_path, f'z{seed}', plain, curve(3, 0.7, seed/10), measured(0.7+seed/50, 0.1))
    return tmp_path

def rows(arm='plain', seeds=(0,), last=0.7, **kwargs):
    return [dict(arm=arm, seed=o, last=last+o/100) | kwargs for o in seeds]

class TestRead:
    def test_order(self, out):
        runs = read_runs(out)
        assert list(zip(runs.arm, runs.seed)) == [(a,s) for a in ('plain','L2-SP-Fisher, beta = 10') for s in range(3)]
        assert list(runs.columns[:3]) == ['id','arm','beta'] and list(runs.id[:3]) == ['z0','z1','z2']

    def test_sorts_by_strength(self, tmp_path):
        runs = dict(a=dict(beta=10), b=dict(beta=1, step='prox'), c=dict(alpha=5e-4), d=dict(l2sp=0.01), e={},
                    f=dict(beta=1, step='grad'))
        for id,run in runs.items():
            write(tmp_path, id, dict(arm=id, seed=0) | run, result=dict(last=0.5))
        assert list(read_runs(tmp_path).id) == list('efbadc')

    def test_path_as_text(self, out): assert read_runs(str(out)).equals(read_runs(out))

    def test_unfinished(self, out):
        write(out, 'u', dict(arm='plain', seed=3, beta=0.), curve(2))
        write(out, 'v', dict(arm='plain', seed=4, beta=0.))
        write(out, 'w', dict(arm='plain', seed=5, beta=0.), pd.DataFrame(curve(2))[:0])
        assert len(read_runs(out))==6
        c = read_curves(out)
        assert list(c.columns) == ['id','arm','seed','epoch','train_loss','valid_loss','accuracy','seconds']
        assert list(c[c.seed==3].epoch) == [0,1] and set(c.seed) == {0,1,2,3}

    def test_curve_with_columns_of_its_own(self, tmp_path):
        write(tmp_path, 'a', dict(arm='plain', seed=7), curve(2) | dict(seed=0, distance=1.))
        c = read_curves(tmp_path)
        assert set(c.seed)=={7} and 'distance' in c

    def test_a_folder_without_settings_is_none_of_ours(self, out):
        (out/'runs/just-made').mkdir()
        assert len(read_runs(out))==6

    def test_errors(self, out):
        write(out, 'f', dict(arm='L2', seed=0), error='Traceback\n  File\nOutOfMemoryError: made up\n\n')
        write(out, 'g', dict(arm='L2', seed=1), error='')
        write(out, 'h', dict(arm='L2', seed=2), result=measured(0.5), error='from before')
        assert read_errors(out).values.tolist() == [['L2',0,'OutOfMemoryError: made up','f'], ['L2',1,'','g']]
        assert list(read_runs(out).query("arm=='L2'").seed) == [2]

    def test_no_errors(self, out): assert read_errors(out).empty and 'error' in read_errors(out)

    def test_no_folder(self, tmp_path):
        for f in (read_runs, read_curves, read_errors, table, differences, curves, frontier):
            with pytest.raises(FileNotFoundError, match='none.runs'): f(tmp_path/'none')
            with pytest.raises(FileNotFoundError, match='runs'): f(tmp_path)

    def test_nothing_finished(self, tmp_path):
        (tmp_path/'runs').mkdir()
        assert read_runs(tmp_path).empty and read_curves(tmp_path).empty
        for f in (table, differences, frontier):
            with pytest.raises(ValueError, match='read_errors'): f(tmp_path)
        with pytest.raises(ValueError, match='train_loss'): curves(tmp_path)

    @pytest.mark.parametrize('name', ['run.json','result.json','curve.csv'])
    @pytest.mark.parametrize('content', [b'', b'\xff\xfe\x00', b'[1,2'])
    def test_broken(self, out, name, content):
        if name=='curve.csv' and content==b'[1,2': content = b'epoch,accuracy\n0,1,2,3\n0,1,2,3,4\n'
        (out/'runs/z1'/name).write_bytes(content)
        with pytest.raises(ValueError, match=f'z1.{name}'): (read_curves if name=='curve.csv' else read_runs)(out)

    @pytest.mark.parametrize('content', ['[]', '{"arm": "plain"}', '{"seed": 1}'])
    def test_other_json(self, out, content):
        (out/'runs/z1/run.json').write_text(content)
        with pytest.raises(ValueError, match='z1.run.json'): read_errors(out)

class TestTable:
    def test_means(self, out):
        t = table(out)
        assert list(t.index) == ['plain','L2-SP-Fisher, beta = 10']
        assert t.loc['plain','last'].tolist() == pytest.approx(interval([0.7,0.72,0.74]))
        assert list(t.columns.get_level_values(0).unique()) == [
            'best','last','retention_target_bn','retention_source_bn','seconds','runs','diverged']
        assert t['runs',''].tolist()==[3,3] and t['diverged',''].tolist()==[0,0]

    def test_the_same_from_folder_table_and_dicts(self, out):
        runs = read_runs(out)
        pd.testing.assert_frame_equal(table(out), table(runs))
        pd.testing.assert_frame_equal(table(out), table(runs.to_dict('records')))
        assert 'diverged' not in runs

    def test_order_of_appearance(self):
        assert list(table(rows('b')+rows('a')+rows('b', [1])).index) == ['b','a']

    def test_measures(self, out):
        columns = [('last','mean'),('last','±'),('runs',''),('diverged','')]
        assert list(table(out, 'last')) == list(table(out, ['last'])) == columns
        assert list(table(out, ['last','beta'])['beta','mean']) == [0,10]
        assert 'test' not in table(out, ['test','last'])

    def test_missing(self, tmp_path):
        result = dict(last=0.7, test=None, retention_target_bn=float('nan'), seconds=3)
        write(tmp_path, 'a', dict(arm='plain', seed=0), result=result)
        t = table(tmp_path)
        assert list(t.columns.get_level_values(0).unique()) == ['last','seconds','runs','diverged']
        assert show_table(t).values.tolist() == [['70.0','3.0','1']]

    def test_measured_in_some_runs_only(self):
        t = show_table(table(rows('a', [0,1], test=0.5) + rows('b', [0], test=0.5) + rows('b', [1])))
        assert t[ACCURACIES['test']].tolist() == ['50.0 ± 0.0','–']

    def test_diverged(self):
        lost = dict(arm='b', seed=1, last=None, best=0.6, test=0.6, retention_target_bn=0, seconds=4)
        t = table(rows('a', [0,1]) + rows('b', [0]) + [lost])
        assert t.loc['b','diverged'].item()==1 and t.loc['b','runs'].item()==2
        assert t.loc['b','last'].isna().all() and not {'best','test','retention_target_bn'} & set(t)
        assert show_table(t).loc['b'].tolist() == ['–','–','2','1']

    def test_all_diverged(self):
        t = table([dict(arm='a', seed=o, last=None, retention_target_bn=0, seconds=4.) for o in (0,1)])
        assert show_table(t).values.tolist() == [['4.0 ± 0.0','2','2']]

    def test_whole_numbers(self):
        t = table([dict(arm='a', seed=0, last=1, retention_source_bn=0),
                   dict(arm='b', seed=0, last=math.nan, retention_source_bn=0)])
        assert show_table(t).values.tolist() == [['100.0','0.0','1','0'], ['–','–','1','1']]

    def test_without_seeds(self):
        t = table([dict(arm='a', last=0.5), dict(arm='a', last=0.5)])
        assert show_table(t).values.tolist() == [['50.0 ± 0.0','2']]

    @pytest.mark.parametrize('seed', [None, math.nan, ''])
    def test_empty_seeds(self, seed):
        t = table([dict(arm='a', seed=seed, last=0.5), dict(arm='a', seed=seed, last=0.5)] + rows('a', [1], 0.49))
        assert show_table(t).values.tolist() == [['50.0 ± 0.0','3']]

    def test_the_same_rows_twice(self, out):
        for f,t in ((table, read_runs(out)), (curves, read_curves(out))):
            with pytest.raises(ValueError, match=r"'plain'.*\b0\b.*\b2\b.*drop_duplicates") as e: f(pd.concat([t, t]))
            assert 'different' not in str(e.value)
            f(pd.concat([t, t]).drop_duplicates())

    def test_two_experiments_in_one(self):
        with pytest.raises(ValueError, match=r"'plain'.*\b0\b.*different arch\b"):
            table(rows(arch='a') + rows(arch=None))
        with pytest.raises(ValueError, match=r"'plain'.*\b1\b.*\b2\b.*arch, epochs"):
            table(rows(seeds=[0,1], arch='a', epochs=4) + rows(seeds=[1], arch='b', epochs=8))
        with pytest.raises(ValueError, match=r"'plain'.*\b0\b.*\b2\b.*results"): table(rows() + rows(last=0.9))

    def test_no_arm(self):
        with pytest.raises(ValueError, match='`arm`.*seed, last'): table([dict(seed=0, last=0.7)])

    def test_nothing(self):
        for none in ([], pd.DataFrame()):
            with pytest.raises(ValueError, match='read_errors'): table(none)

    def test_shown_in_html(self, out):
        assert '72.0 ± 5.0' in show_table(table(out)).to_html() and '72.0 ± 5.0' in show_table(table(out)).to_string()

class TestDifferences:
    def test_paired(self, out):
        d = differences(out)
        measures = 'best','last','retention_target_bn','retention_source_bn'
        assert list(d.index) == [('L2-SP-Fisher, beta = 10',o) for o in measures]
        row = d.loc[('L2-SP-Fisher, beta = 10','last')]
        assert row[['difference','low','high']].tolist() == pytest.approx(paired([0.6,0.61,0.62], [0.7,0.72,0.74]))
        assert row.seeds==3 and row.seeds_for_1==seeds_needed(0.01)

    def test_seeds_in_any_order(self):
        b = [o | dict(last=o['last']+0.01+o['seed']**2/1000) for o in rows('b', [0,1,2])]
        d = differences(rows('plain', [2,0,1]) + b).loc[('b','last')]
        assert d.tolist() == pytest.approx([0.035/3, *paired([0.01,0.011,0.014], [0,0,0])[1:], 3, 3])

    def test_equal_differences_have_no_interval(self):
        runs = rows('plain', [0,1,2]) + rows('b', [0,1,2], last=0.71)
        d = differences(runs).loc[('b','last')]
        assert d.tolist() == pytest.approx([0.01,math.nan,math.nan,3,math.nan], nan_ok=True)
        assert 'the same for all 3 seeds' in conclusions(runs)[0] and 'nan' not in conclusions(runs)[0]

    def test_seeds_that_one_lacks(self):
        d = differences(rows('plain', [0,1,2]) + rows('b', [1,2,3], last=0.6) + rows('c', [2]) + rows('d', [9]))
        assert d.loc['b'].seeds.item()==2 and d.loc['b'].difference.item()==pytest.approx(-0.1)
        assert d.loc['c'].seeds.item()==1 and d.loc['c'].difference.item()==0
        assert d.loc['c'][['low','high','seeds_for_1']].isna().all(axis=None)
        assert d.loc['d'].seeds.item()==0 and d.loc['d'].drop(columns='seeds').isna().all(axis=None)

    def test_diverged(self):
        d = differences(rows('plain', [0,1]) + rows('b', [0]) + [dict(arm='b', seed=1, last=None)]).loc[('b','last')]
        assert d.seeds==2 and d.drop('seeds').isna().all()

    def test_control(self, out):
        d = differences(out, 'L2-SP-Fisher, beta = 10', 'last')
        assert d.loc[('plain','last')].difference == pytest.approx(0.11)
        with pytest.raises(ValueError, match="'L3'.*plain, L2-SP-Fisher, beta = 10"): differences(out, 'L3')

    def test_only_the_control(self):
        d = differences(rows())
        assert d.empty and list(d)==['difference','low','high','seeds','seeds_for_1']
        assert d.index.names==['arm','measure']

    def test_no_seeds(self):
        with pytest.raises(ValueError, match='`seed`'): differences([dict(arm='plain', last=0.5)])

def lines(fig, panel=1): return {o.get_label(): o for o in fig.axes[panel].lines}

class TestCurves:
    def test_mean_and_range(self, out):
        fig = curves(out)
        assert [o.get_text() for o in fig.legends[0].get_texts()] == ['plain','L2-SP-Fisher, beta = 10']
        loss = lines(fig, 0)['plain']
        assert loss.get_xdata().tolist()==[1,2,3] and loss.get_ydata() == pytest.approx(2*0.7**np.arange(3)+0.1)
        band = fig.axes[0].collections[0].get_paths()[0].get_extents()
        assert (band.y0,band.y1) == pytest.approx((2*0.7**2, 2.2))
        assert all(o.get_xlabel() and o.get_ylabel() and o.get_title() for o in fig.axes)

    def test_from_a_table(self, out): assert len(lines(curves(read_curves(out))))==2

    def test_without_seeds(self):
        assert lines(curves(pd.DataFrame(curve(4)).assign(arm='plain')))['plain'].get_xdata()[-1]==4

    def test_unfinished_and_failed(self, out):
        write(out, 'u', dict(arm='plain', seed=3), curve(2))
        write(out, 'f', dict(arm='L2', seed=0), curve(1), error='Error: made up')
        drawn = lines(curves(out))
        assert len(drawn['plain'].get_xdata())==3 and len(drawn['L2'].get_xdata())==1

    def test_diverged(self, out):
        lost = dict(train_loss=[1,math.nan], valid_loss=[1,math.nan], accuracy=[0.5,math.nan])
        write(out, 'n', dict(arm='L2', seed=0), curve(2) | lost)
        assert math.isnan(lines(curves(out))['L2'].get_ydata()[1])

    def test_published_behind(self, out):
        one = pd.DataFrame(curve(5)).rename(columns=dict(valid_loss='val_loss'))
        published = pd.concat([one.assign(run=o) for o in ('x','y')])
        fig = curves(out, published)
        drawn = lines(fig)
        x,y = [next(line for label,line in drawn.items() if label.endswith(f' {o}')) for o in 'xy']
        assert x.get_zorder() < drawn['plain'].get_zorder()
        assert x.get_linestyle() != y.get_linestyle()
        assert x.get_xdata().tolist() == [1,2,3,4,5]
        with pytest.raises(ValueError, match='published.*val_loss'): curves(out, published.drop(columns='val_loss'))

    def test_arms_of_a_family_are_told_apart(self):
        t = pd.concat([pd.DataFrame(curve(3)).assign(arm=f'L2, {o}') for o in range(4)])
        assert len({str(o._dash_pattern) for o in lines(curves(t)).values() if o.get_marker()=='s'})==4

    def test_two_experiments_in_one(self, out):
        write(out, 'twice', dict(arm='plain', seed=1, arch='other'), curve(3))
        with pytest.raises(ValueError, match=r"'plain'.*\b1\b.*\b2\b.*\bid\b"): curves(out)

    def test_missing_column(self, out):
        with pytest.raises(ValueError, match='accuracy'): curves(read_curves(out).drop(columns='accuracy'))

def texts(ax): return {o.get_text(): o for o in ax.texts}

def marks(ax):
    one = [o for o in ax.collections if hasattr(o, 'get_sizes') and len(o.get_offsets())==1]
    return [o.get_offsets()[0].tolist() for o in one]

class TestFrontier:
    def test_marks(self, out):
        ax = frontier(out)
        assert [o.get_text() for o in ax.get_legend().get_texts()] == ['plain','L2-SP-Fisher']
        assert list(texts(ax)) == ['beta = 10']
        assert marks(ax) == [pytest.approx(o) for o in ([0.1,0.72],[0.05,0.72],[0.4,0.61],[0.2,0.61])]
        assert ACCURACIES['last'] in ax.get_ylabel() and 'BatchNorm' in ax.get_title()

    def test_without_batchnorm_there_is_one_retention(self, out):
        runs = read_runs(out)
        ax = frontier(runs.assign(retention_source_bn=runs.retention_target_bn))
        assert marks(ax) == [pytest.approx(o) for o in ([0.1,0.72],[0.4,0.61])]
        assert 'BatchNorm' not in ax.get_title()

    def test_target(self, out):
        runs = read_runs(out).assign(test_last=0.3)
        assert ACCURACIES['test_last'] in frontier(runs).get_ylabel()
        assert ACCURACIES['best'] in frontier(runs, 'best').get_ylabel()
        with pytest.raises(ValueError, match="'test'.*best, last, test_last"): frontier(runs, 'test')

    def test_before(self, out):
        "An upright line from the bottom to the top"
        def at(ax): return [o.get_xdata()[0] for o in ax.lines if list(o.get_ydata())==[0,1]]
        runs = read_runs(out)
        assert at(frontier(runs))==[] and at(frontier(runs, before=0.5))==[0.5]
        assert at(frontier(runs.assign(before=0.6))) == pytest.approx([0.6])
        assert at(frontier(runs.assign(before=0.6), before=0.5))==[0.5]
        assert at(frontier(runs.assign(before=None)))==[]

    def test_where(self, out):
        fig,ax = plt.subplots()
        ax.plot([0,0.9], [0.2,0.9], label='mine')
        assert frontier(out, ax=ax) is ax
        assert 'mine' in [o.get_text() for o in ax.get_legend().get_texts()]
        assert ax.get_xlim()[1]>=0.9 and ax.get_ylim()[0]<=0.2

    def test_one_arm(self): assert marks(frontier(rows(retention_target_bn=0.1)))==[[0.1,0.7]]

    def test_one_seed_without_the_sources_statistics(self):
        ax = frontier(rows(retention_target_bn=0.1) + rows('L2, 5e-4', retention_target_bn=0.2))
        assert list(texts(ax)) == ['5e-4']

    def test_diverged(self, out):
        runs = read_runs(out).to_dict('records') + [dict(arm='L2-SP-Fisher, beta = 1, explicit', seed=0, last=None)]
        ax = frontier(runs)
        assert 'L2-SP-Fisher, beta = 1, explicit' in ax.get_xlabel()
        assert list(texts(ax)) == ['beta = 10']
        with pytest.raises(ValueError, match='`curves`'): frontier(runs[-1:])
        with pytest.raises(ValueError, match='`curves`'): frontier([runs[0], dict(arm='plain', seed=7, last=None)])

    def test_not_measured(self, out):
        "An arm that is not drawn is named, with the reason"
        gone = [dict(arm='L2, lost', seed=0, last=None)]
        half = rows('L2, half', retention_target_bn=0.3) + rows('L2, half', [1])
        ax = frontier(read_runs(out).to_dict('records') + gone + half + rows('L2, none'))
        assert ax.get_xlabel().splitlines()[1:]==['not shown, diverged: L2, lost',
                                                  'not shown, not measured in every run: L2, half; L2, none']
        assert list(texts(ax))==['beta = 10']

    @pytest.mark.parametrize('a,b,chosen', [
        (dict(last=0.5), dict(last=0.5, test_last=0.4), 'last'),
        (dict(test_last=0.5), dict(last=0.5, test_last=0.4), 'test_last'),
        (dict(last=0.5, test_last=0.4), dict(last=0.5, test_last=0.4), 'test_last'),
        (dict(last=0.5), dict(test_last=0.4), 'test_last')])
    def test_the_target_that_all_arms_have(self, a, b, chosen):
        found = [dict(arm=arm, seed=0, retention_target_bn=0.2) | o for arm,o in (('plain',a),('L2',b),('lost',{}))]
        assert ACCURACIES[chosen] in frontier(found).get_ylabel()

    def test_no_retention(self):
        with pytest.raises(ValueError, match='retention'): frontier(rows())

    def test_some_without_retention(self, out):
        runs = read_runs(out).to_dict('records')
        assert list(texts(frontier(runs + rows('L2, 5e-4')))) == ['beta = 10']
        assert list(texts(frontier(runs + rows('L2, 5e-4', retention_target_bn=0.3)))) == ['beta = 10','5e-4']
        with pytest.raises(ValueError, match="'last'.*'retention_target_bn'"):
            frontier(rows(retention_target_bn=0.1) + rows(seeds=[1]))

    @pytest.mark.parametrize('near', [1e-6, 0.003])
    def test_texts_do_not_cover_each_other(self, near):
        spread = [dict(arm='plain', seed=0, last=0.2, retention_target_bn=0.9)]
        cluster = [dict(arm=f'L2-SP-Fisher, beta = {o}', seed=0, last=0.7+near*o, retention_target_bn=0.1+near*o)
                   for o in range(6)]
        ax = frontier(spread + cluster)
        ax.figure.draw_without_rendering()
        boxes = [o.get_window_extent() for o in ax.texts]
        assert len(boxes)==6
        for i,a in enumerate(boxes):
            assert ax.bbox.x0<=a.x0 and a.x1<=ax.bbox.x1 and ax.bbox.y0<=a.y0 and a.y1<=ax.bbox.y1
            for b in boxes[:i]: assert not a.padded(-1).overlaps(b.padded(-1))

    def test_long_intervals_do_not_stretch_the_axes(self, out):
        runs = read_runs(out).query('seed<2')
        assert frontier(runs).get_ylim()[0] > 0.55

    def test_joined_by_strength(self, out):
        at = [dict(arm=f'L2-SP-Fisher, beta = {o}', beta=o, seed=0, last=0.7-o/100, retention_target_bn=o/100)
              for o in (10,1,5)]
        joined = [o for o in frontier(at).lines if len(o.get_xdata())==3]
        assert len(joined)==1 and joined[0].get_xdata() == pytest.approx([0.01,0.05,0.1])
        same = frontier([o | dict(beta=1) for o in at])
        assert not [o for o in same.lines if len(o.get_xdata())==3]

def test_styles():
    assert {'plain','L2','L2-SP','L2-SP-Fisher','as published','last layer only','linear probe first',
            'LwF','linear probe'} < set(STYLES)
    assert style('of my own, 3')['marker'] not in {o for _,o in STYLES.values()}
    assert set(MEASURES) == {*ACCURACIES,*DIVERGENCES,'seconds'}

def agreed(agreement, both=False, **kwargs):
    "What a run has without labels; `both`: with labels, as well"
    found = dict(agreement_target_bn=agreement, agreement_source_bn=agreement/2, divergence_target_bn=3*(1-agreement),
                 divergence_source_bn=4*(1-agreement))
    return found | kwargs | (dict(retention_target_bn=0.9*agreement, retention_source_bn=0.4*agreement) if both else {})

class TestWithoutLabels:
    "Agreement with the source, instead of a retention or beside it"
    NEW = *list(ACCURACIES)[-2:],*DIVERGENCES
    OLD = 'retention_target_bn','retention_source_bn'

    def runs(self, both=False):
        return rows(seeds=(0,1), **agreed(0.2, both)) + rows('L2-SP, 1', (0,1), 0.6, **agreed(0.6, both))

    def test_names(self): assert all(re.match('(agreement|divergence)_(target|source)_bn', o) for o in self.NEW)

    def shown(self, runs): return [o for o in (*self.OLD,*self.NEW) if o in table(runs)]

    def test_which_are_shown(self):
        old = rows('old', **dict(retention_target_bn=0.3, retention_source_bn=0.2))
        nothing = rows('none') + [dict(arm='lost', seed=0, last=None) | agreed(0.4)]
        assert self.shown(self.runs())==[*self.NEW]
        assert self.shown(self.runs(both=True))==self.shown(old)==self.shown(self.runs(both=True)+old)==[*self.OLD]
        assert self.shown(self.runs()+old)==[*self.OLD,*self.NEW] and self.shown(nothing)==[]
        assert self.shown(self.runs(both=True)+nothing[1:])==[*self.OLD]      # a diverged run has no agreement
        assert [o for o in self.NEW if o in table(self.runs(both=True), self.NEW)]==[*self.NEW]

    def test_a_table_names_them(self):
        t = show_table(table(self.runs()))
        assert t.loc['L2-SP, 1','agreement with the source']=='60.0 ± 0.0'
        assert t.loc['L2-SP, 1','divergence from the source (nats)']=='1.200 ± 0.000'
        assert not [o for o in t if 'retention' in o]

    def test_some_arms_with_labels(self):
        mixed = self.runs()[:2] + rows('old', (0,1), retention_target_bn=0.3)
        t = show_table(table(mixed))
        assert t.loc['plain','retention']==t.loc['old','agreement with the source']=='–'
        assert t.loc['old','retention']=='30.0 ± 0.0' and t.loc['plain','agreement with the source']=='20.0 ± 0.0'

    def test_diverged(self):
        lost = dict(arm='plain', seed=1, last=math.nan) | agreed(0.)
        t = table(rows(**agreed(0.4)) + [lost] + rows('L2', **agreed(0.5)))
        assert t.loc['plain',[(o,'mean') for o in self.NEW]].isna().all()
        assert t.loc['L2',('divergence_target_bn','mean')]==1.5

    def test_differences(self):
        d = differences(self.runs())
        assert list(d.index)==[('L2-SP, 1',o) for o in ('last', *self.NEW[:2])]
        assert d.loc[('L2-SP, 1','agreement_target_bn')].difference==pytest.approx(0.4)
        nats = differences(self.runs(), measures='divergence_target_bn')
        assert nats.difference.item()==pytest.approx(-1.2)
        assert list(differences(self.runs(both=True)).index.get_level_values(1))==['last', *self.OLD]

    def test_sentences(self):
        def varied(t): return t.assign(**{o: t[o]*(1+t.seed/50) for o in t.select_dtypes(float)})
        last,agreement,_ = conclusions(varied(pd.DataFrame(self.runs())))
        assert 'agreement with the source' in agreement and '+40.4 points' in agreement and 'higher' in agreement
        nats, = conclusions(varied(pd.DataFrame(self.runs())), measures='divergence_target_bn')
        assert '-1.212 nats' in nats and 'lower' in nats and 'point' not in nats and '0.01 nats' in nats
        missing = conclusions(self.runs() + rows('old', (0,1), retention_target_bn=0.3), measures='agreement_target_bn')
        assert 'nan' not in ''.join(missing) and missing[1].startswith('old, agreement')

    def test_frontier(self):
        ax = frontier(self.runs())
        assert marks(ax)==[pytest.approx(o) for o in ([0.2,0.705],[0.1,0.705],[0.6,0.605],[0.3,0.605])]
        assert ax.get_xlabel().startswith('agreement') and 'agreement with the source' in ax.get_title()
        assert 'retention' not in ax.get_xlabel()+ax.get_title()

    def test_frontier_of_both(self):
        both = self.runs(both=True)
        assert frontier(both).get_xlabel()==frontier(both, source='retention').get_xlabel()
        assert frontier(both).get_xlabel().startswith('retention')
        assert marks(frontier(both, source='agreement'))==marks(frontier(self.runs()))
        one_old = rows('old', retention_target_bn=0.3)
        assert frontier(self.runs()+one_old).get_xlabel().startswith('agreement')
        assert frontier(self.runs()[:1]+one_old).get_xlabel().startswith('retention')

    def test_before_is_an_accuracy(self):
        "So it is no line among agreements, unless it is given"
        def lines_at(ax): return [o.get_xdata()[0] for o in ax.lines if list(o.get_ydata())==[0,1]]
        runs = pd.DataFrame(self.runs(both=True)).assign(before=0.8)
        assert lines_at(frontier(runs))==[pytest.approx(0.8)] and lines_at(frontier(runs, source='agreement'))==[]
        assert lines_at(frontier(runs, before=1., source='agreement'))==[1.]

    @pytest.mark.parametrize('bad,named', [
        ('agreement', 'no agreement'), ('retention_target_bn', 'retention, agreement'), ('accuracy', 'accuracy')])
    def test_what_is_not_there(self, out, bad, named):
        with pytest.raises(ValueError, match=named): frontier(out, source=bad)

    def test_at_equal_agreement(self):
        strong = rows('L2-SP, 2', (0,1), 0.5, **agreed(0.8))
        found = at_retention(self.runs()+strong, 0.7, retention='agreement_target_bn')
        assert found['last'].tolist()==pytest.approx([0.55,0.56])
        with pytest.raises(ValueError, match='agreement with the source 0.9'):
            at_retention(self.runs()+strong, 0.9, retention='agreement_target_bn')

class TestSeeds:
    def test_interval_as_scipy(self):
        rng = np.random.default_rng()
        for n in (2,3,10):
            for level in (0.5,0.95,0.99):
                v = rng.normal(0.8, 0.01, n)
                mean,half = interval(v, level)
                low,high = stats.ttest_1samp(v, 0).confidence_interval(level)
                assert (mean-half,mean+half) == pytest.approx((low,high), abs=1e-12)

    def test_forms(self):
        assert interval(pd.Series([1,2,3], index=[7,8,9])) == interval((1,2,3)) == interval([1,2,3])
        assert interval([0.5,0.5]) == (0.5,0.)
        assert all(isinstance(o, float) for o in (*interval([1,2]), *paired([1,2], [2,4])))
        for bad in ([], 0.5, [[1,2]]):
            with pytest.raises(ValueError, match=f'values.*{re.escape(str(np.shape(bad)))}'): interval(bad)
        for level in (0, 1, 95, math.nan):
            with pytest.raises(ValueError, match=f'level.*{level}'): interval([1,2], level)

    def test_paired_ignores_an_index(self):
        a,b = pd.Series([1.,2.], index=[5,6]),pd.Series([0.,3.], index=[6,5])
        assert paired(a, b)[0]==0

    @pytest.mark.parametrize('sd', [0.003,0.008,0.02,0.1])
    @pytest.mark.parametrize('power', [0.5,0.8,0.95])
    @pytest.mark.parametrize('level', [0.9,0.95,0.99])
    def test_power_by_integration(self, sd, power, level):
        "The t statistic is normal over the root of chi squared: integrated, without the non-central t distribution"
        def of(n):
            t = stats.t.ppf((1+level)/2, n-1)
            centre = 0.01/sd*math.sqrt(n)
            chi = stats.chi(n-1)
            def tails(c):
                return stats.norm.sf(t*c/math.sqrt(n-1)-centre) + stats.norm.cdf(-t*c/math.sqrt(n-1)-centre)
            return integrate.quad(lambda c: chi.pdf(c)*tails(c), *chi.ppf([1e-13,1-1e-13]), limit=200)[0]
        n = seeds_needed(sd, 0.01, power, level)
        assert of(n) >= power-1e-7 and (n==2 or of(n-1) < power+1e-7)

    def test_units(self): assert seeds_needed(0.8, 1) == seeds_needed(0.008, 0.01)

    def test_extremes(self):
        assert seeds_needed(1e-12)==2
        assert seeds_needed(0.5, 1e-3)==pytest.approx((1.959964+0.841621)**2*250000, rel=1e-4)
        for sd in (-1, math.nan, math.inf):
            with pytest.raises(ValueError, match=f'sd.*{sd}'): seeds_needed(sd)

class TestAtRetention:
    "The frontier read off at a level"
    def curve(self, family, seeds=(0,1), n=4, slope=-0.5, top=0.9):
        retentions = np.linspace(0.1, 0.7, n)
        return [dict(arm=f'{family}, {k}', seed=s, last=top+slope*x+s/50, retention_target_bn=x)
                for s in seeds for k,x in enumerate(retentions)]

    def test_on_a_straight_line_it_is_the_line(self):
        rng = np.random.default_rng()
        level,slope = rng.uniform(0.11, 0.69),rng.uniform(-1, 1)
        found = at_retention(self.curve('L2-SP', slope=slope) + self.curve('L2-SP-Fisher', slope=slope, top=1.), level)
        assert found.arm.tolist()==['L2-SP','L2-SP','L2-SP-Fisher','L2-SP-Fisher']
        assert np.allclose(found['last'], [t+slope*level+s/50 for t in (0.9,1.) for s in (0,1)], atol=1e-12)

    def test_two_families_compare(self):
        found = at_retention(self.curve('L2-SP') + self.curve('L2-SP-Fisher', top=0.93), 0.3)
        d = differences(found, 'L2-SP').loc['L2-SP-Fisher','last']
        assert d.difference==pytest.approx(0.03) and d.seeds==2

    def test_along_the_curves_is_level_by_level(self):
        slope = np.random.default_rng().uniform(-1, 1)
        runs = self.curve('L2-SP') + self.curve('L2-SP-Fisher', seeds=[0], slope=slope)
        runs += self.curve('L2-SP-Fisher', seeds=[1], slope=slope, top=0.85)
        levels = 0.2,0.35,0.6
        found = equal_retention(runs, 'L2-SP', 'L2-SP-Fisher', levels)
        assert found.index.tolist()==list(levels)
        for level in levels:
            one = at_retention(runs, level)
            d = differences(one, 'L2-SP').loc['L2-SP-Fisher','last']
            means = one.groupby('arm')['last'].mean()
            row = [means['L2-SP'], means['L2-SP-Fisher'], d.difference, d.low, d.high, 2]
            assert found.loc[level].tolist()==pytest.approx(row, abs=1e-12, nan_ok=True)

    def test_a_level_that_one_seed_does_not_reach_is_left_out(self):
        short = [o for o in self.curve('L2-SP-Fisher') if o['seed']==0 or o['retention_target_bn']<0.5]
        assert equal_retention(self.curve('L2-SP') + short, 'L2-SP', 'L2-SP-Fisher', (0.3,0.6)).index.tolist()==[0.3]
        found = equal_retention(self.curve('L2-SP') + short, 'L2-SP', 'L2-SP-Fisher', (0.9,))
        assert found.empty and found.difference.dtype==float
        with pytest.raises(ValueError, match="'L1'.*L2-SP"): equal_retention(short + self.curve('L2-SP'), 'L1', 'L2-SP')

    def test_the_control_is_the_weak_end_of_all(self):
        runs = rows(last=0.9, retention_target_bn=0.)
        runs += [dict(arm=f'L2-SP, {k}', seed=0, last=0.9-k, retention_target_bn=k) for k in (0.2,0.4)]
        assert at_retention(runs, 0.1)['last'].tolist()==[pytest.approx(0.8)]
        with pytest.raises(ValueError, match='level.*0.1'): at_retention(runs, 0.1, weakest=None)

    def test_no_extrapolation(self):
        less = [o | dict(retention_target_bn=o['retention_target_bn']-0.1) for o in self.curve('L2-SP', seeds=[1])]
        runs = self.curve('L2-SP', seeds=[0]) + less
        assert at_retention(runs, 0.65).seed.tolist()==[0] and at_retention(runs, 0.05).seed.tolist()==[1]
        with pytest.raises(ValueError, match='level.*0.8'): at_retention(runs, 0.8)

    def test_arms_that_stand_alone_and_diverged_ones(self):
        alone = rows('last layer only', seeds=(0,1), retention_target_bn=0.7)
        lost = dict(arm='L2-SP, 9', seed=0, last=None, retention_target_bn=0.5)
        runs = self.curve('L2-SP') + alone + [lost]
        assert set(at_retention(runs, 0.5).arm)=={'L2-SP'} and at_retention(runs, 0.5)['last'].notna().all()

    def test_one_frontier_is_equal_to_itself(self):
        "A concave one, with arms that only some seeds have, that diverged, or that are far apart"
        rng = np.random.default_rng()
        def runs(family, retentions, seeds):
            return [dict(arm=f'{family}, {k}', seed=s, last=0.9-0.4*x**3, retention_target_bn=x+rng.normal(0, 0.004))
                    for s in seeds for k,x in enumerate(retentions)]
        plain,all_of_it = runs('plain', [0.05], range(5)),runs('L2-SP', np.linspace(0.1, 0.7, 13), range(5))
        plain = [o | dict(arm='plain') for o in plain]
        levels = np.linspace(0.1, 0.65, 12)
        def compare(of): return equal_retention(plain+all_of_it+of, 'L2-SP', 'Fisher', levels).difference
        assert len(compare(runs('Fisher', np.linspace(0.1, 0.7, 4), range(5))))>5
        for of in (runs('Fisher', [0.6], range(5)), runs('Fisher', [0.6], range(1, 5))+runs('Fisher', [0.6,0.3], [0]),
                   runs('Fisher', [0.15,0.65], range(5))):
            assert compare(of).drop([o for o in levels if o<0.16 or o>0.64], errors='ignore').empty
        some_lost = runs('Fisher', [0.1,0.25,0.4,0.55], range(5))
        for o in some_lost[6:12:4]: o['last'] = None
        assert (compare(some_lost).abs()<0.02).all() and 0.3 not in compare(some_lost).index

    @pytest.mark.parametrize('column', ['arm','seed'])
    def test_a_run_without_a_name_or_a_seed(self, column):
        runs = pd.DataFrame(self.curve('L2-SP')+self.curve('plain', n=1)).astype(dict(seed=float))
        runs.loc[0,column] = None
        for compare in (lambda: differences(runs, 'plain, 0'), lambda: equal_retention(runs, 'L2-SP', 'plain')):
            with pytest.raises(ValueError, match=f'1 of 10 runs have no .?{column}'): compare()

    def test_what_is_not_there(self):
        for kw in (dict(target='test'), dict(retention='retention_source_bn')):
            with pytest.raises(ValueError, match=repr(*kw.values())): at_retention(self.curve('L2-SP'), 0.3, **kw)

@pytest.mark.parametrize('measure,unit,needed', [('last', ' points', True), ('divergence_target_bn', ' nats', True),
                                                 ('seconds', '', False), ('best_epoch', '', False)])
def test_the_unit_of_a_conclusion(measure, unit, needed):
    rows = [dict(arm=a, seed=s, last=0.5) | {measure: v+s*s/10} for a,v in (('plain',0.2),('x',0.4)) for s in (1,2,3)]
    rows[-1][measure] += 0.1
    said, = conclusions(rows, measures=measure)
    scale,digits = dict(last=(100,1), seconds=(1,1)).get(measure, (1,3))
    assert f': {scale*(0.2+0.1/3):+.{digits}f}{unit} against plain (95' in said
    assert ('seeds would show' in said)==needed

@pytest.mark.parametrize('values,shown', [
    ((0.612,0.614), '0.613 ± 0.013'), ((0.05,0.11), '0.080 ± 0.381'), ((1234,1236), '1235 ± 13'),
    ((0,0), '0.00 ± 0.00'), ((0.00612,), '0.00612'), ((0.6,None), '–')])
def test_the_digits_of_other_columns(values, shown):
    t = show_table(table([dict(arm='a', seed=i, last=0.5, f1=o) for i,o in enumerate(values)], 'f1'))
    assert t.f1.tolist()==[shown]

def test_a_small_difference_is_not_zero():
    f1 = dict(plain=(0.61,0.62,0.65), x=(0.59,0.59,0.60))
    said, = conclusions([dict(arm=a, seed=i, f1=o) for a,v in f1.items() for i,o in enumerate(v)], measures='f1')
    assert ': -0.0333 against plain (95 % interval -0.0713 to +0.0046, 3 seeds)' in said

class TestText:
    "Rows as `csv.DictReader` reads them: all values are text"
    def text(self, t): return [{k: '' if pd.isna(v) else str(v) for k,v in o.items()} for o in t.to_dict('records')]

    def test_the_same_as_numbers(self, out):
        runs = read_runs(out).assign(f1=lambda t: t['last']/2)
        for f in (table, differences):
            for measures in (None, ['f1','beta']):
                pd.testing.assert_frame_equal(f(self.text(runs), measures=measures), f(runs, measures=measures))
        family = runs.assign(arm=[f'b, {o}' for o in runs.beta], retention_target_bn=runs.retention_target_bn/2)
        pd.testing.assert_frame_equal(at_retention(self.text(family), 0.1, 'f1'), at_retention(family, 0.1, 'f1'))

    def test_curves(self, out):
        c = read_curves(out)
        published = c[c.id=='z0'].rename(columns=dict(valid_loss='val_loss', id='run'))
        a,b = [lines(curves(f(c), pd.DataFrame(f(published)))) for f in (lambda t: t, self.text)]
        assert [o.get_xydata().tolist() for o in a.values()]==[o.get_xydata().tolist() for o in b.values()]

    @pytest.mark.parametrize('name', ['alpha','l2sp','beta','strength'])
    def test_joined_by_strength(self, name):
        at = [{'arm': f'L2, {o}', name: o, 'seed': '0', 'last': '0.7', 'retention_target_bn': str(int(o)/200)}
              for o in ('100','20','3')]
        joined, = [o for o in frontier(at).lines if len(o.get_xdata())==3]
        assert joined.get_xdata()==pytest.approx([0.015,0.1,0.5])

    def test_seeds(self):
        with pytest.raises(ValueError, match=r"'plain'.*\b0\b.*\b2\b"):
            table(rows() + [dict(arm='plain', seed='0', last=0.8)])
        assert differences(rows() + [dict(arm='b', seed='0', last='0.6')]).seeds.tolist()==[1]
        named = [dict(arm=a, seed=o, last=0.7) for a in ('plain','b') for o in ('first','second')]
        assert differences(named).seeds.tolist()==[2]

    @pytest.mark.parametrize('column,value', [('last','80%'), ('f1','high'), ('beta','0,5'), ('accuracy','x'),
                                              ('epoch','one'), ('seconds',[1,2])])
    def test_no_number(self, out, column, value):
        if column in ('accuracy','epoch'): f,t = curves,read_curves(out)
        else: f,t = (frontier if column=='beta' else lambda o: table(o, ['last','f1','seconds'])),read_runs(out)
        broken = t.to_dict('records')
        broken[1][column] = value
        with pytest.raises(ValueError, match=f"'{column}'.*{re.escape(repr(value))}"): f(broken)

def test_names_with_an_underscore_are_in_the_legends():
    c = pd.DataFrame(curve(3)).assign(arm='_mine, 1')
    arms = rows('_mine, 1', retention_target_bn=0.1) + rows('b', retention_target_bn=0.2)
    for legend,name in ((curves(c).legends[0], '_mine, 1'), (frontier(arms).get_legend(), '_mine')):
        legend.figure.draw_without_rendering()
        assert name in [o.get_text().lstrip('\u200b') for o in legend.get_texts()]

def test_arms_that_are_numbers():
    rows = [dict(arm=a, seed=s, last=0.5+a/10, retention_target_bn=0.4) for a in (1,2) for s in (1,2)]
    assert table(rows).index.tolist()==['1','2'] and differences(rows, '1').index[0][0]=='2'
    frontier(rows)

def test_one_level():
    cases = product('AB', (1,2), (0.3,0.5))
    rows = [dict(arm=f'{a}, {k}', seed=seed, last=k, retention_target_bn=k) for a,seed,k in cases]
    assert equal_retention(rows, 'A', 'B', 0.4, weakest=None).index.tolist()==[0.4]
