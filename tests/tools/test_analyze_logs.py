# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import json
import runpy
import sys

import pytest
from runs import TOOLS

SCRIPT = TOOLS / 'analysis_tools/analyze_logs.py'


@pytest.fixture
def analyze(monkeypatch):
    def analyze(*args):
        monkeypatch.setattr(sys, 'argv', [str(SCRIPT), *map(str, args)])
        runpy.run_path(str(SCRIPT), run_name='__main__')

    return analyze


def write(folder, start, *rows, end=''):
    path = folder / start / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(map(json.dumps, rows)) + '\n' + end)


def step(step, loss, time=1.0, epoch=1):
    row = dict(step=step, iter=step, epoch=epoch, loss=loss, time=time)
    return dict(row, data_time=0.1)


@pytest.fixture
def run(tmp_path):
    """A run that was killed and resumed from iteration 2."""
    folder = tmp_path / 'run'
    old = [step(i, 10.0 - i) for i in (1, 2, 3)]
    write(folder, '1', *old, end='{"loss": 1, ')
    new = [(3, 5.0, 4.0, 2), (4, 4.0, 2.0, 2), (5, 3.0, 3.0, 2)]
    new = [step(*x) for x in new]
    new.insert(2, dict(knn_top1=70.0, step=2))
    write(folder, '2', *new)
    return folder


def test_a_resumed_run(run):
    """The last start counts; a validation lies at the step it followed."""
    read_rows = runpy.run_path(str(SCRIPT))['read_rows']
    rows = read_rows(run)
    losses = [(x['step'], x['loss']) for x in rows if 'loss' in x]
    assert losses == [(1, 9.0), (2, 8.0), (3, 5.0), (4, 4.0), (5, 3.0)]
    assert [x['step'] for x in rows if 'knn_top1' in x] == [4]


def test_plot_curve(run, analyze, tmp_path, monkeypatch):
    import matplotlib.axes

    drawn = {}
    plot = matplotlib.axes.Axes.plot

    def note(self, x, y, label, **kwargs):
        drawn[label] = [*zip(x, y, strict=True)]
        return plot(self, x, y, label=label, **kwargs)

    monkeypatch.setattr(matplotlib.axes.Axes, 'plot', note)
    out = tmp_path / 'curves.png'
    analyze('plot_curve', run, '--keys', 'loss', 'knn_top1', '--out', out)
    assert drawn['knn_top1'] == [(4, 70.0)]
    assert drawn['loss'][-1] == (5, 3.0)
    assert out.stat().st_size
    first = run / '1/vis_data/scalars.json'
    analyze('plot_curve', run, first, '--legend', 'a', 'b', '--out', out)
    assert drawn['a'] == drawn['loss']
    assert drawn['b'] == [(1, 9.0), (2, 8.0), (3, 7.0)]


@pytest.mark.parametrize(
    'flags, average', [([], '2.0000'), (['--include-outliers'], '2.2000')]
)
def test_cal_train_time(run, analyze, capsys, flags, average):
    analyze('cal_train_time', run, *flags)
    said = capsys.readouterr().out
    assert f'average iter time: {average} s/iter, 5%' in said
    assert 'slowest epoch 2' in said and 'fastest epoch 1' in said
