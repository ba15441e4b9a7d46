# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Runs on one HTML page that needs nothing else."""
from pathlib import Path
from typing import Sequence

from mmdensecl.benchmark.report.page import template
from mmdensecl.benchmark.report.plots import variable
from mmdensecl.benchmark.report.text import clean
from .plots import HUMP, NOT_FINITE, panel_plots, style
from .run_log import RunLog, finite
from .verdict import in_one_line, judge, key_numbers


def as_html(runs: Sequence[RunLog]) -> str:
    """One page that needs nothing else.

    Args:
        runs (Sequence[RunLog]): The runs.
    """
    rows = []
    for number, run in enumerate(runs, 1):
        findings = judge(run)
        rows.append(
            dict(
                name=clean(run.name),
                colour=variable(style(number)[0]),
                numbers=key_numbers(run),
                verdict=in_one_line(findings),
                findings=findings))
    broken = any(
        len(finite(curve)) < len(curve) for run in runs
        for curve in run.curves.values())
    return template(Path(__file__).parent, 'runs.html.j2').render(
        title=' and '.join(row['name'] for row in rows),
        rows=rows,
        hump=HUMP if any(run.hump for run in runs) else None,
        hump_colour=variable(style(0)[0]),
        not_finite=NOT_FINITE if broken else None,
        plots=panel_plots(runs))
