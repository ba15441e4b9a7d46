# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The report as one HTML page that needs nothing else."""
from pathlib import Path
from typing import Dict, Sequence

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from . import text
from .examples import collect
from .grid import GUIDE, baseline_name, grid, overview, seeds_compared
from .plots import curve_plots, dot_plot, legend
from .provenance import provenance, resumed
from .results import Suite
from .sweep import figures_title, meaning, sweep_figures, sweep_legend
from .tables import Table

STYLE = Path(__file__).with_name('page.css')  # of every page


def template(folder: Path, name: str) -> Template:
    """A template that escapes what it is given and may include ``page.css``.

    Args:
        folder (Path): Where it is.
        name (str): Of its file.
    """
    return Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FileSystemLoader([folder, STYLE.parent])).get_template(name)


def as_html(suite: Suite, tables: Sequence[Table]) -> str:
    """One page that needs nothing else.

    Args:
        suite (Suite): The suite.
        tables (Sequence[Table]): From :func:`compare`.
    """
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
    return template(Path(__file__).parent, 'report.html.j2').render(
        suite=suite,
        guide=GUIDE.format(baseline_name(tables)),
        overview=overview(tables),
        sentences=[text.sentence(table) for table in tables],
        sections=[*sections.values()],
        provenance=source,
        resumed=resumed(source),
        sweep=_sweep(suite, tables) if suite.sweep else None,
        published=text.PUBLISHED,
        clean=text.clean)


def _sweep(suite: Suite, tables: Sequence[Table]) -> Dict[str, object]:
    return dict(
        title=figures_title(suite),
        legend=sweep_legend(suite),
        meaning=meaning(tables),
        figures=sweep_figures(suite, tables))
