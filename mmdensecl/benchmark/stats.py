# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Means over seeds, differences to a baseline, and what they allow to say.

All methods run the same downstream seeds, so what a seed does to all of them
cancels in a difference. What another pre-training would change does not: the
variance between pre-trainings of a method, each averaged over the downstream
seeds, is pooled over all methods of a table (one-way analysis of variance),
because two or three values say next to nothing of their own spread.

Random weights have no pre-training; each downstream seed draws them anew.
Their part of a variance is that of the differences seed by seed. So it is
where no method has a second pre-training: such an interval says nothing of
what another pre-training would give. Variances of both kinds are added, with
the degrees of freedom of Welch and Satterthwaite.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

CONFIDENCE = 0.95
COLUMNS = 'mean std pretrainings seeds margin difference low high verdict best'
DRAWN = -1  # in the place of a pre-training seed


class Variance(NamedTuple):
    """An estimate of a variance, and its degrees of freedom."""

    value: float
    freedom: int


def half_width(*parts: Variance) -> float | None:
    """Half of the interval of a mean with the sum of these variances.

    Returns:
        None where one is not known.
    """
    if not all(part.freedom and math.isfinite(part.value) for part in parts):
        return None
    total = sum(part.value for part in parts)
    if not total:
        return 0.0
    freedom = total**2 / sum(x.value**2 / x.freedom for x in parts)
    t = stats.t.ppf((1 + CONFIDENCE) / 2, freedom)
    return float(t * math.sqrt(total))


def by_seed(values: pd.DataFrame) -> pd.DataFrame:
    """Seeds by (method, pre-training); drawn weights are one column."""
    flat = values.astype(dict(pretrain_seed=float)).fillna(
        dict(pretrain_seed=DRAWN)
    )
    columns = ['method', 'pretrain_seed']
    return flat.pivot(index='seed', columns=columns, values='value')


def pooled(table: pd.DataFrame) -> Variance:
    """Between the pre-trainings of a method, one for all methods.

    Args:
        table: From :func:`by_seed`, of seeds that all have run.
    """
    means = table.mean(skipna=False).drop(DRAWN, level=1, errors='ignore')
    means = means[np.isfinite(means)]
    methods = means.groupby(level='method')
    freedom = int((methods.size() - 1).sum())
    squares = ((means - methods.transform('mean')) ** 2).sum()
    return Variance(squares / freedom if freedom else math.nan, freedom)


def variances(
    table: pd.DataFrame, between: Variance, method: str, base: str | None
) -> list[Variance]:
    """Of the mean of a method, or of its difference to another, in parts."""
    used = [method] if base is None else [method, base]
    trained = [table[x] for x in used if DRAWN not in table[x]]
    parts: list[Variance] = []
    if between.freedom and trained:
        shares = sum(1 / x.shape[1] for x in trained)
        parts.append(Variance(between.value * shares, between.freedom))
    if not parts or len(trained) < len(used):
        paired = table[method].mean(axis=1)
        if base is not None:
            paired = paired - table[base].mean(axis=1)
        parts.append(Variance(paired.var() / len(paired), len(paired) - 1))
    return parts


def difference(
    table: pd.DataFrame, between: Variance, method: str, base: str
) -> dict:
    """The difference of two methods by the module's rule.

    Returns:
        ``difference``; ``low`` and ``high`` of its interval, if there is one;
        ``verdict``: 'above', 'below' or 'not told apart'.
    """
    value = float(table[method].to_numpy().mean())
    value -= float(table[base].to_numpy().mean())
    verdict = 'not told apart'
    found = dict(difference=value, low=None, high=None, verdict=verdict)
    parts = variances(table, between, method, base)
    margin = half_width(*parts) if math.isfinite(value) else None
    if margin is not None:
        low, high = value - margin, value + margin
        verdict = 'above' if low > 0 else 'below' if high < 0 else verdict
        found |= dict(low=low, high=high, verdict=verdict)
    return found


@np.errstate(invalid='ignore')  # of what is not finite
def compare(
    values: pd.DataFrame, baseline: str | None, better: str = 'higher'
) -> pd.DataFrame:
    """A metric of one task and mode, a row for each method.

    Only seeds count that all pre-trainings of all methods have run. A value
    that is not finite makes the mean so.

    Args:
        values: ``method``, ``pretrain_seed`` (none of random weights),
            ``seed`` and ``value``.
        baseline: Method to which the others are compared.
        better: 'higher' or 'lower', which decides what is best.

    Returns:
        By method: ``mean``; ``std``, over pre-trainings where there are
        several, else over seeds; how many ``pretrainings`` and ``seeds``;
        ``margin``, half of the mean's own interval; :func:`difference` to the
        baseline; ``best``, whether it is told apart from all others, in the
        good direction.
    """
    complete = by_seed(values.assign(value=1.0)).dropna().index
    table, rows = by_seed(values).loc[complete], {}
    methods = [*dict.fromkeys(values['method'])] if len(table) else []
    between = pooled(table)
    for method in methods:
        own = table[method]
        spread = own.mean(axis=int(own.shape[1] == 1), skipna=False)
        found = {x: difference(table, between, method, x) for x in methods}
        del found[method]
        good = 'above' if better == 'higher' else 'below'
        rows[method] = dict(
            mean=own.to_numpy().mean(),
            std=np.std(spread, ddof=1) if len(spread) > 1 else None,
            pretrainings=0 if DRAWN in own else own.shape[1],
            seeds=len(table),
            margin=half_width(*variances(table, between, method, None)),
            best=bool(found)
            and all(x['verdict'] == good for x in found.values()),
            **found.get(baseline, {}),
        )
    return pd.DataFrame.from_dict(rows, 'index', columns=COLUMNS.split())
