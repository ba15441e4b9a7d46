# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The table of an ablation, of runs that are made up."""

import json
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / 'tools' / 'benchmarks'
LOG = dict(position_r2=0.25, match_acc=0.5, match_coverage=0.75, time=0.1)


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Function that prints the table of scores, by config and pre-training."""
    monkeypatch.syspath_prepend(TOOLS)
    import ablation

    def call(scores, **rows):
        configs = []
        for name, pretrainings in scores.items():
            config = tmp_path / f'{name}_r18w16_1xb64-coslr-11e.py'
            config.write_text('model = dict(backbone=dict())\n')
            configs.append(str(config))
            for seed, values in enumerate(pretrainings):
                run = tmp_path / 'out' / config.stem / f'seed{seed}'
                log = run / '20260101_000000/vis_data/scalars.json'
                log.parent.mkdir(parents=True)
                log.write_text(json.dumps(LOG))
                own = {**rows, 'random weights': [9.0, 10.0, 11.0]}
                own['epoch_11.pth'] = values
                content = json.dumps(dict(values={'street, mIoU': own}))
                (run / 'probe.json').write_text(content)
        args = ['--score', 'x', '--report', '--seeds', '3']
        args += ['--out', str(tmp_path / 'out')]
        monkeypatch.setattr(sys, 'argv', ['ablation.py', *configs, *args])
        ablation.main()
        lines = capsys.readouterr().out.splitlines()
        return [[x.strip() for x in line.split('|')[1:-1]] for line in lines]

    return call


def test_table(report, tmp_path):
    a, b = [13.0, 14.0, 15.0], [15.0, 16.0, 17.0]
    rows = report(dict(mocov2=[a, b], densecl=[b, a, b]))
    assert rows[0][1:4] == [
        'pre-trainings',
        'street, mIoU',
        'street, mIoU, over mocov2_r18w16_1xb64-coslr-11e',
    ]
    # Pooled over 14, 16 and 16, 14, 16: 14/9 of three degrees of freedom.
    assert rows[2:] == [
        ['random weights, padding zeros', '0', '10.0 ± 2.5']
        + ['-5.0 (-7.8 to -2.2)', '', '', '', ''],
        ['densecl', '3', '15.3 ± 2.3', '+0.3 (-3.3 to 4.0)']
        + ['0.25', '0.5', '0.75', '0.1'],
        ['mocov2', '2', '15.0 ± 2.8', '', '0.25', '0.5', '0.75', '0.1'],
    ]
    assert (tmp_path / 'out/ablation.png').stat().st_size > 5000
