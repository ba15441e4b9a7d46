# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Training curves, out of mmengine's logs."""
from typing import Any, Dict

from mmdensecl.benchmark.log import log_rows
from .results import Metric, Run

Curve = Dict[int, float]


def _is_number(value: Any, kind: tuple = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def read_curves(run: Run, metric: Metric) -> Dict[str, Curve]:
    """Loss and metric of a run over its iterations.

    What a resumed run repeats counts as it came out the second time.

    Args:
        run (Run): The run.
        metric (Metric): What to look for.

    Returns:
        Dict[str, Curve]: ``loss`` and ``metric``, by iteration.
    """
    loss: Curve = {}
    values: Curve = {}
    last = None
    for row in log_rows(run.folder):
        step = row.get('step')
        if not _is_number(step, (int, )):
            continue
        if _is_number(row.get('loss')):
            # mmengine counts a validation in epochs where the training is.
            last = step if 'epoch' in row else None
            loss[step] = float(row['loss'])
        elif _is_number(row.get(metric.key)):
            values[step if last is None else last] = (
                row[metric.key] * metric.scale)
    return dict(loss=loss, metric=values)
