# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Settings, cache and table; no peer is installed and nothing is trained."""

import json
import sys
from pathlib import Path

import pytest
from runs import TOOLS

sys.path.insert(0, str(TOOLS / 'benchmarks'))
import peers  # noqa: E402

COLUMN = 'street: mIoU, linear'


@pytest.fixture
def run(tmp_path):
    settings = dict(batch_size=64, packages=['a==1.0', 'b==2'])
    command = ['python', '{work_dir}', 'x={y}']
    return peers.Run('a', tmp_path / 'a', settings, command, 'w.pth', 'c.py')


@pytest.fixture
def calls(monkeypatch):
    """Pretend to train at 0.5 seconds a step, and to probe."""
    made = []

    def call(command, log):
        made.append(command)
        if '--json' in command:
            root = command[command.index('--data-root') + 1]
            values = {peers.RANDOM: [10.0, 12.0], 'trained': [20.0, 23.0]}
            content = dict(max_images=9, data=[dict(data_root=root)])
            content['values'] = {COLUMN: values}
            Path(command[-1]).write_text(json.dumps(content))
            return True
        Path(command[1]).mkdir()
        lines = [dict(time=x) for x in (9, 0.5, 0.5)] + [dict(lr=1)]
        text = '\n'.join(map(json.dumps, lines))
        Path(command[1], 'scalars.json').write_text(text)
        return len(made) > 1  # the first is stopped

    monkeypatch.setattr(peers, 'call', call)
    return made


def test_what_is_done_is_not_repeated(run, calls):
    assert not peers.train(run)
    assert not run.folder.exists()
    (run.folder.with_name('a.partial') / 'left.txt').touch()
    assert peers.train(run) and peers.train(run)
    assert len(calls) == 2 and calls[1][2] == 'x={y}'
    assert not (run.folder / 'left.txt').exists()
    with pytest.raises(ValueError, match='another batch_size, lr: name'):
        other = dict(run.settings, lr=1, batch_size=2)
        peers.train(run._replace(settings=other))
    for root in ('x', 'x', 'y'):  # other labelled images are scored anew
        assert peers.score(run, [root], 9)
    assert len(calls) == 4


def test_table(run, calls):
    peers.train(run)  # stopped
    other = run._replace(name='b', folder=run.folder.with_name('b'))
    again = run._replace(folder=run.folder.with_name('a-seed1'))
    runs = [run, other, again]
    for x in runs:
        assert peers.train(x)
    assert len(peers.make_table(runs).splitlines()) == 2  # not scored yet
    for x in (run, again):
        assert peers.score(x, ['x'], 9)
    head, rule, random, row = (
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in peers.make_table(runs).splitlines()
    )
    assert head[3] == COLUMN and len(rule) == 5
    assert random == [peers.RANDOM, '', '', '11.0 ± 1.2', '']
    # Two pre-trainings are a row; 64 images in half a second.
    assert row == ['a', '128', '0.0', '21.5 ± 1.7 (+10.5)', 'a 1.0, b 2']
