# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Means over seeds, differences to a baseline, and what they allow to say.

A method's values are first averaged over downstream seeds within each of its
pre-training seeds. Where both methods have at least two pre-trainings, the
interval of their difference is Welch's t over these averages: pre-trainings
are independent draws, and both methods share the downstream seeds. Else it is
the t interval of the differences seed by seed, which says nothing of what
another pre-training would give. Random weights are drawn anew for each
downstream seed, so each seed counts as a pre-training of theirs.
"""

import warnings

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95
RANDOM = 'random'
COLUMNS = 'mean std pretrainings seeds difference low high over verdict best'


def by_seed(values: pd.DataFrame) -> pd.DataFrame:
    """Seeds by (method, pre-training); random weights are one column."""
    random = values['method'] == RANDOM
    flat = values.assign(pretrain_seed=values['pretrain_seed'].mask(random, 0))
    columns = ['method', 'pretrain_seed']
    return flat.pivot(index='seed', columns=columns, values='value')


def samples(table: pd.DataFrame, method: str) -> np.ndarray:
    """One value for each pre-training."""
    axis = int(method == RANDOM)
    return table[method].mean(axis=axis, skipna=False).to_numpy()


def difference(table: pd.DataFrame, method: str, base: str) -> dict:
    """The difference of two methods by the module's rule.

    Args:
        table: From :func:`by_seed`, of seeds that all have run.
        method: The one.
        base: What is subtracted.

    Returns:
        ``difference``; ``low`` and ``high`` of its interval, if there is one;
        ``over``: 'pre-trainings', 'seeds' or ''; ``verdict``: 'above',
        'below' or 'not told apart'.
    """
    own, other = samples(table, method), samples(table, base)
    found = dict(difference=own.mean() - other.mean(), low=None, high=None)
    found |= dict(over='', verdict='not told apart')
    paired = table[method].mean(axis=1), table[base].mean(axis=1)
    if not np.isfinite(found['difference']):
        return found
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of values that are all the same
        if min(len(own), len(other)) > 1:
            found['over'] = 'pre-trainings'
            test = stats.ttest_ind(own, other, equal_var=False)
        elif len(table) > 1:
            found['over'], test = 'seeds', stats.ttest_rel(*paired)
        else:
            return found
        found['low'], found['high'] = test.confidence_interval(CONFIDENCE)
    if found['low'] > 0 or found['high'] < 0:
        found['verdict'] = 'above' if found['low'] > 0 else 'below'
    return found


def compare(
    values: pd.DataFrame, baseline: str, better: str = 'higher'
) -> pd.DataFrame:
    """A metric of one task and mode, a row for each method.

    Only seeds count that all pre-trainings of all methods have run. A value
    that is not finite makes the mean so.

    Args:
        values: ``method``, ``pretrain_seed``, ``seed`` and ``value``.
        baseline: Method to which the others are compared.
        better: 'higher' or 'lower', which decides what is best.

    Returns:
        By method: ``mean``; ``std``, over pre-trainings where there are
        several, else over seeds; how many ``pretrainings`` and ``seeds``;
        :func:`difference` to the baseline; ``best``, whether it is told apart
        from all others, in the good direction.
    """
    complete = by_seed(values.assign(value=1.0)).dropna().index
    table, rows = by_seed(values).loc[complete], {}
    methods = [*dict.fromkeys(values['method'])] if len(table) else []
    for method in methods:
        own = samples(table, method)
        spread = own if len(own) > 1 else table[method].mean(axis=1)
        found = {x: difference(table, method, x) for x in methods}
        del found[method]
        good = 'above' if better == 'higher' else 'below'
        rows[method] = dict(
            mean=table[method].to_numpy().mean(),
            std=np.std(spread, ddof=1) if len(spread) > 1 else None,
            pretrainings=1 if method == RANDOM else len(own),
            seeds=len(table),
            best=bool(found)
            and all(x['verdict'] == good for x in found.values()),
            **found.get(baseline, {}),
        )
    return pd.DataFrame.from_dict(rows, 'index', columns=COLUMNS.split())
