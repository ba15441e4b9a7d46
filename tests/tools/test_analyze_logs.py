# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import json
import runpy
import sys

import pytest
from runs import TOOLS

SCRIPT = TOOLS / 'analysis_tools/analyze_logs.py'


def analyze(*args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', [str(SCRIPT), *map(str, args)])
        runpy.run_path(str(SCRIPT), run_name='__main__')


@pytest.fixture
def read_rows():
    return runpy.run_path(str(SCRIPT))['read_rows']


def write(folder, start, *rows, end=''):
    path = folder / start / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(map(json.dumps, rows)) + '\n' + end)
    return path


def step(step, loss, time=1.0, epoch=1):
    return dict(
        step=step, iter=step, epoch=epoch, loss=loss, time=time, data_time=0.1
    )


@pytest.fixture
def run(tmp_path):
    """A run that was killed and resumed from iteration 2."""
    folder = tmp_path / 'run'
    write(
        folder,
        '1',
        step(1, 9.0),
        step(2, 8.0),
        step(3, 7.0),
        end='{"loss": 1, ',
    )
    write(
        folder,
        '2',
        step(3, 5.0, 4.0, 2),
        step(4, 4.0, 2.0, 2),
        dict(knn_top1=70.0, step=2),
        step(5, 3.0, 3.0, 2),
    )
    return folder


def test_a_resumed_run(run, read_rows):
    """The last start counts; a validation lies at the step it followed."""
    rows = read_rows(run)
    losses = [(x['step'], x['loss']) for x in rows if 'loss' in x]
    assert losses == [(1, 9.0), (2, 8.0), (3, 5.0), (4, 4.0), (5, 3.0)]
    assert [x['step'] for x in rows if 'knn_top1' in x] == [4]
    first = read_rows(run / '1/vis_data/scalars.json')
    assert [x['loss'] for x in first] == [9.0, 8.0, 7.0]


def test_plot_curve(run, tmp_path, monkeypatch):
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
    analyze(
        'plot_curve',
        run,
        run / '1/vis_data/scalars.json',
        '--legend',
        'both',
        'first',
        '--title',
        'A',
        '--out',
        out,
    )
    assert drawn['both'] == drawn['loss']
    assert drawn['first'][-1] == (3, 7.0)


@pytest.mark.parametrize(
    'flags, average',
    [
        ([], 'average iter time: 2.0000 s/iter, 5%'),
        (['--include-outliers'], 'average iter time: 2.2000 s/iter, 5%'),
    ],
)
def test_cal_train_time(run, capsys, flags, average):
    analyze('cal_train_time', run, *flags)
    said = capsys.readouterr().out
    assert average in said
    assert 'slowest epoch 2' in said and 'fastest epoch 1' in said


@pytest.mark.parametrize(
    'args, message',
    [
        (['plot_curve', 'none'], 'neither a scalars.json nor a work_dir'),
        (
            ['plot_curve', 'run', '--keys', 'mAP'],
            'has no "mAP", only data_time',
        ),
        (['plot_curve', 'run', '--legend', 'a', 'b'], '2 names for 1 curves'),
        (['cal_train_time', 'none'], 'neither a scalars.json nor a work_dir'),
    ],
)
def test_errors(run, monkeypatch, args, message):
    monkeypatch.chdir(run.parent)
    with pytest.raises(SystemExit, match=message):
        analyze(*args)
