# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The report as one HTML page that needs nothing else."""
from pathlib import Path
from typing import Dict, Sequence

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from . import text
from .examples import collect
from .grid import GUIDE, baseline_name, grid, overview, seeds_compared
from .plots import curve_plots, dot_plot, legend
from .provenance import provenance, resumed
from .results import Suite
from .tables import Table


def as_html(suite: Suite, tables: Sequence[Table]) -> str:
    """One page that needs nothing else.

    Args:
        suite (Suite): The suite.
        tables (Sequence[Table]): From :func:`compare`.
    """
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader(Path(__file__).parent))
    sections: Dict[str, dict] = {}
    for number, table in enumerate(tables):
        task = sections.setdefault(
            table.task.name,
            dict(
                task=table.task,
                title=table.title,
                id=f'task{len(sections)}',
                tables=[]))
        key = f'table{number}'
        task['tables'].append(
            dict(
                table=table,
                id=key,
                grid=grid(table),
                seeds=seeds_compared(table),
                legend=legend(table),
                dots=dot_plot(table, key) if table.seeds else None,
                curves=curve_plots(table, key) if table.seeds else [],
                examples=collect(table)))
    source = provenance(suite, tables)
    return environment.get_template('report.html.j2').render(
        suite=suite,
        guide=GUIDE.format(baseline_name(tables)),
        overview=overview(tables),
        sentences=[text.sentence(table) for table in tables],
        sections=[*sections.values()],
        provenance=source,
        resumed=resumed(source),
        published=text.PUBLISHED,
        clean=text.clean)
