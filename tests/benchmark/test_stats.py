# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Intervals by hand, and what they allow to say."""

import math

import numpy as np
import pytest
from made_up import values_of
from scipy.stats import t

from mmdensecl.benchmark.stats import by_seed, compare, difference, pooled

RANDOM, ONE = (9.0, 10.0, 11.0), (14.3, 15.0, 16.0)
TWO = ((14.0, 15.0, 16.0), (16.0, 17.0, 18.0))  # means 15 and 17


def test_one_pretraining_is_paired_by_seed():
    table = compare(values_of(random=RANDOM, ours=ONE), 'random')
    row = table.loc['ours']
    assert table.loc['random', ['mean', 'std']].tolist() == [10, 1]
    assert (row['mean'], row['std']) == pytest.approx((15.1, 0.8544003745))
    # Seed by seed 5.3, 5.0, 5.0; t of 2 degrees is 4.30265.
    assert row['difference'] == pytest.approx(5.1)
    assert (row['low'], row['high']) == pytest.approx((4.6697347, 5.5302653))
    assert row['verdict'] == 'above'
    assert table['pretrainings'].tolist() == [0, 1]
    assert table['seeds'].tolist() == [3, 3]


def test_the_spread_of_pretrainings_is_pooled():
    """By hand: a pair alone would have t = 12.7, three pairs have 3.2."""
    pairs = dict(a=(15, 17), b=(20, 20.6), c=(11, 12))
    shift = np.array([-1.0, 0.2, 0.8])  # of the seeds, the same for all
    values = {
        name: [tuple(mean + shift) for mean in pair]
        for name, pair in pairs.items()
    }
    table = compare(values_of(**values), 'a')
    assert table['mean'].tolist() == pytest.approx([16, 20.3, 11.5])
    variance = (2**2 + 0.6**2 + 1**2) / 2 / 3  # of a pair half a square each
    half = t.ppf(0.975, 3) * math.sqrt(variance * (1 / 2 + 1 / 2))
    for name, value in dict(b=4.3, c=-4.5).items():
        row = table.loc[name]
        assert row['difference'] == pytest.approx(value)
        assert row['high'] - value == pytest.approx(half)
        assert value - row['low'] == pytest.approx(half)
    assert table.loc['b', 'std'] == pytest.approx(0.6 / math.sqrt(2))
    margin = half / math.sqrt(2)
    assert table['margin'].tolist() == pytest.approx([margin] * 3)
    # A single pre-training is as far from its method's mean as the others.
    one = compare(values_of(**{**values, 'd': values['b'][0]}), 'a')
    variance *= 1 + 1 / 2
    half = t.ppf(0.975, 3) * math.sqrt(variance)
    row = one.loc['d']
    assert row['high'] - row['difference'] == pytest.approx(half)
    assert row['pretrainings'] == 1


def test_random_weights_are_drawn_by_each_seed():
    table = compare(values_of(random=RANDOM, ours=TWO), 'random')
    row = table.loc['ours']
    assert (row['mean'], row['pretrainings']) == (16, 2)
    assert row['std'] == pytest.approx(math.sqrt(2))  # of 15 and 17
    # What both have in common goes: seed by seed the difference is 6.
    half = t.ppf(0.975, 1) * math.sqrt(2 / 2)
    assert (row['low'], row['high']) == pytest.approx((6 - half, 6 + half))
    # Seed by seed 8, 6, 4: the variance of their mean is added, 4 / 3.
    table = compare(values_of(random=(7.0, 10.0, 13.0), ours=TWO), 'random')
    a, b = 2 / 2, 4 / 3
    half = t.ppf(0.975, (a + b) ** 2 / (a**2 / 1 + b**2 / 2))
    half *= math.sqrt(a + b)
    row = table.loc['ours']
    assert (row['low'], row['high']) == pytest.approx((6 - half, 6 + half))
    assert table['pretrainings'].tolist() == [0, 2]
    other = compare(values_of(ours=TWO, random=(7.0, 10.0, 13.0)), 'ours')
    assert other.loc['random', 'low'] == pytest.approx(-row['high'])
    # One draw says nothing of the next one.
    alone = values_of(random=(7.0,), ours=((14.0,), (16.0,)))
    assert math.isnan(compare(alone, 'random').loc['ours', 'low'])


def test_intervals_hold_the_truth():
    """About 95 % of them; by seeds alone it would be a quarter."""
    rng, held = np.random.default_rng(0), []
    for _ in range(150):
        seeds, found = rng.normal(0, 3, 3), {}
        for name in 'abcd':
            own = rng.normal(0, 1, (2, 1)) + rng.normal(0, 0.3, (2, 3))
            found[name] = [*map(tuple, own + seeds)]
        found['random'] = tuple(rng.normal(0, 0.5, 3) + seeds)
        table = by_seed(values_of(**found))
        for name in ('b', 'random'):
            row = difference(table, pooled(table), name, 'a')
            held.append(row['low'] <= 0 <= row['high'])
    assert 0.91 < np.mean(held) < 0.99


def test_missing_and_infinite_values():
    """Seed 1 of one pre-training is missing, so nobody's seed 1 counts."""
    values = values_of(random=RANDOM, ours=((14.0, None, 16.0), TWO[1]))
    table = compare(values, 'random')
    assert table['seeds'].tolist() == [2, 2]
    assert table.loc['random', 'mean'] == 10
    assert compare(values_of(random=(9.0, None), ours=(None, 15.0)), 'x').empty
    values = values_of(random=RANDOM, ours=(14.0, math.inf, 16.0))
    row = compare(values, 'random').loc['ours']
    assert math.isinf(row['mean']) and row['verdict'] == 'not told apart'
    assert not row['best']


@pytest.mark.parametrize('ours, verdict', [
    ((12.0, 13.0, 14.5), 'above'),
    ((6.0, 7.0, 8.5), 'below'),
    ((9.0, 11.0, 10.9), 'not told apart'),
    ((9.0, 10.0, 11.0), 'not told apart'),  # equal to the last digit
    ((12.0,), 'not told apart'),  # no interval
])  # fmt: skip
def test_verdicts(ours, verdict):
    table = compare(values_of(random=RANDOM[: len(ours)], ours=ours), 'random')
    assert table.loc['ours', 'verdict'] == verdict


def test_best_in_the_good_direction():
    """Nothing, where one is ahead, but not told apart from all others."""
    for a, better, best in (
        ((20.0, 21.0, 22.1), 'higher', ['a']),
        ((20.0, 21.0, 22.1), 'lower', ['random']),
        ((15.0, 15.2, 16.0), 'higher', []),
    ):
        table = compare(values_of(random=RANDOM, a=a, b=ONE), 'random', better)
        assert table.index[table['best']].tolist() == best
