# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""How the benchmark_*.py scripts measure; nothing here depends on times."""

import argparse
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / 'tools/benchmarks'))
import measure  # noqa: E402

MIB = 2**20


def fill(mib):
    """Writes memory when run, so that it is there."""
    return lambda: torch.ones(mib * MIB // 4).sum().item()


def fill_before(mib):
    """Needs that much to be made, and nothing when run."""
    fill(mib)()
    return lambda: None


class TestTakeTurns:
    def test_order_and_count(self):
        calls = []
        runs = {x: lambda x=x: calls.append(x) for x in 'ab'}
        seconds = measure.take_turns(runs, 9, 'cpu')
        rounds = [calls[i : i + 2] for i in range(0, len(calls), 2)]
        assert len(rounds) == 10  # one is not timed
        assert all(sorted(x) == ['a', 'b'] for x in rounds)
        assert len(set(map(tuple, rounds))) == 2  # no one is always first
        assert {k: len(v) for k, v in seconds.items()} == dict(a=9, b=9)
        assert all(x >= 0 for times in seconds.values() for x in times)

    def test_each_has_its_own_time(self, monkeypatch):
        clock = [0.0]
        monkeypatch.setattr(measure.time, 'perf_counter', lambda: clock[0])

        def takes(seconds):
            clock[0] += seconds

        seconds = measure.take_turns(
            dict(a=lambda: takes(1.0), b=lambda: takes(4.0)), 2, 'cpu'
        )
        assert seconds == dict(a=[1.0, 1.0], b=[4.0, 4.0])


def test_ratio_is_of_the_same_round():
    # Medians of each alone would say 2 / 4.
    assert measure.ratio([1, 2, 8], [4, 4, 4]) == 0.5
    assert measure.ratio([1, 2, 30], [2, 8, 30]) == 0.5
    assert measure.ratio([3.0, 30.0], [1.0, 10.0]) == 3


class TestExtraMemory:
    def test_of_a_run(self):
        grown = measure.extra_memory(fill, 'cpu', 96) / MIB
        assert 90 < grown < 130

    @pytest.mark.skipif(
        not Path('/proc/self/clear_refs').exists(), reason='Linux only'
    )
    def test_not_of_what_came_before(self):
        assert measure.extra_memory(fill_before, 'cpu', 96) / MIB < 20


class TestReport:
    @pytest.fixture
    def report(self, tmp_path):
        args = argparse.Namespace(
            device='cpu', threads=1, out=tmp_path / 'new' / 'x.json', batch=3
        )
        report = measure.Report('Title', args)
        report.add('ours', time_ratio=0.123456, calls=2)
        report.add('theirs', time_ratio=1.0, calls='many')
        return report

    def test_markdown(self, report):
        assert report.markdown().splitlines() == [
            '| what | time ratio | calls |',
            '| --- | --- | --- |',
            '| ours | 0.123 | 2 |',
            '| theirs | 1 | many |',
        ]

    def test_show(self, report, capsys):
        report.show()
        assert report.markdown() in capsys.readouterr().out
        content = json.loads(report.out.read_text())
        assert content['rows'][0]['time_ratio'] == 0.123456
        assert content['settings']['batch'] == 3
        assert content['environment']['torch'] == torch.__version__


@pytest.mark.parametrize('flags', [['--rounds', '0'], ['--device', 'tpu']])
def test_bad_flags(flags, monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['x.py', *flags])
    with pytest.raises(SystemExit):
        measure.parse(measure.make_parser('x'))
