# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Intervals by hand, and what they allow to say."""

import math

import pytest
from made_up import values_of
from scipy.stats import t

from mmdensecl.benchmark.stats import compare

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
    assert (row['over'], row['verdict']) == ('seeds', 'above')
    assert (row['pretrainings'], row['seeds']) == (1, 3)


def test_several_pretrainings_are_counted():
    """Welch's t over the means of pre-trainings, by its formula."""
    table = compare(values_of(random=RANDOM, ours=TWO), 'random')
    row = table.loc['ours']
    assert (row['mean'], row['pretrainings']) == (16, 2)
    assert row['over'] == 'pre-trainings'
    assert row['std'] == pytest.approx(math.sqrt(2))  # of 15 and 17
    a, b = 2 / 2, 1 / 3  # variances of both means
    freedom = (a + b) ** 2 / (a**2 / 1 + b**2 / 2)
    half = t.ppf(0.975, freedom) * math.sqrt(a + b)
    assert (row['low'], row['high']) == pytest.approx((6 - half, 6 + half))
    # One pre-training alone would have said far more than is known.
    alone = compare(values_of(random=RANDOM, ours=TWO[0]), 'random')
    assert alone.loc['ours', 'high'] - alone.loc['ours', 'low'] < half


def test_both_methods_need_several():
    values = values_of(one=ONE, two=TWO)
    row = compare(values, 'one').loc['two']
    # Seed by seed: (14 + 16) / 2 - 14.3 and so on.
    assert row['over'] == 'seeds' and row['difference'] == pytest.approx(0.9)


def test_random_weights_are_drawn_by_each_seed():
    values = values_of(ours=TWO, random=RANDOM)
    row = compare(values, 'ours').loc['random']
    assert row['over'] == 'pre-trainings' and row['verdict'] != 'above'
    assert row['pretrainings'] == 1 and row['difference'] == -6


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
    values = values_of(random=RANDOM, a=(20.0, 21.0, 22.1), b=ONE)
    for better, best in (('higher', ['a']), ('lower', ['random'])):
        table = compare(values, 'random', better)
        assert table.index[table['best']].tolist() == best
    # Ahead, but not told apart from all others.
    values = values_of(random=RANDOM, a=(15.0, 15.2, 16.0), b=ONE)
    assert not compare(values, 'random')['best'].any()


def test_seeds_that_all_have():
    """Seed 1 of one pre-training is missing, so nobody's seed 1 counts."""
    values = values_of(random=RANDOM, ours=((14.0, None, 16.0), TWO[1]))
    table = compare(values, 'random')
    assert table['seeds'].tolist() == [2, 2]
    assert table.loc['random', 'mean'] == 10
    assert compare(values_of(random=(9.0, None), ours=(None, 15.0)), 'x').empty


def test_not_finite_is_never_averaged_away():
    table = compare(
        values_of(random=RANDOM, ours=(14.0, math.inf, 16.0)), 'random'
    )
    row = table.loc['ours']
    assert math.isinf(row['mean']) and row['verdict'] == 'not told apart'
    assert not row['best']
