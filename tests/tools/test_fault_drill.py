# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The drill counts what is lost, and its runs are those it hurts."""
import sys
from types import SimpleNamespace

import pytest
from runs import TOOLS, run

sys.path.append(str(TOOLS / 'analysis_tools'))
import fault_drill  # noqa: E402


class Stub:
    """A site whose starts end with these statuses; None is killed."""

    random = SimpleNamespace(uniform=lambda low, high: 0)
    seconds = 0
    folder = TOOLS

    def __init__(self, statuses, same=True):
        self.statuses = iter(statuses)
        self.same = lambda name: same
        self.finish = lambda name: True

    def start(self, name):
        status = next(self.statuses)
        return SimpleNamespace(poll=lambda: status)


@pytest.mark.parametrize(
    'statuses, same, expected',
    [
        ([None, None, None], True, [True] * 3),
        ([None, 0, None, None], True, [True] * 3),
        ([None, None, None], False, [False] * 3),
        # A start that failed, though a later one did not.
        ([None, 1, None, None], True, [False, True, True]),
        ([1, 1, 1], True, [False] * 3),
    ])
def test_kills_are_counted(statuses, same, expected, monkeypatch):
    monkeypatch.setattr(fault_drill, 'kill', lambda process: None)
    site = Stub(statuses, same)
    assert [*fault_drill.kill_anywhere(site, 3)] == expected


@pytest.mark.slow
def test_a_row(tmp_path):
    done = run(
        sys.executable,
        TOOLS / 'analysis_tools/fault_drill.py',
        '--only',
        'break_pictures',
        '--count',
        '1',
        '--folder',
        tmp_path / 'drill',
        cwd=tmp_path)
    row, = [x for x in done.stdout.splitlines() if x.startswith('| 0.1%')]
    assert [x.strip() for x in row.split('|')[2:5]] == ['1', '1', '0']
