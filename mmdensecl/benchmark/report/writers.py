# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Write a report: JSON and CSV here, and the terminal's table."""
import csv
import io
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, Optional, Sequence, Union

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from . import text
from .grid import overview
from .markdown import as_markdown
from .page import as_html
from .provenance import provenance
from .results import Metric, Suite, load_suite
from .sweep import sweep_csv, sweep_png
from .tables import Cell, Statistics, Table, compare

SCHEMA = 1
CSV_COLUMNS = ('task', 'protocol', 'row', 'metric', 'unit', 'seed', 'status',
               'value', 'compared', 'baseline', 'difference', 'published',
               'published_source')


def write_report(suite_dir: Union[str, Path],
                 out_dir: Optional[Union[str, Path]] = None,
                 baseline: Optional[str] = None) -> Dict[str, Path]:
    """Write the report of a suite in all its forms.

    Args:
        suite_dir (str | Path): Folder with ``suite.json``.
        out_dir (str | Path, optional): Where to. Defaults to None,
            ``report`` in the suite's folder.
        baseline (str, optional): Row to which the others are compared.
            Defaults to None, the first one of the suite.

    Returns:
        Dict[str, Path]: The files ``md``, ``csv``, ``json`` and ``html``; of
        an ablation ``sweep.png`` and ``sweep.csv``, too.

    Raises:
        ValueError: There is no row of that name.
        ResultsError: A file of the suite is broken.
        DifferentSettingsError: Runs that would share a table must not.
    """
    suite = load_suite(suite_dir)
    tables = compare(suite, baseline)
    content = dict(
        json=as_json(suite, tables),
        csv=as_csv(tables),
        md=as_markdown(suite, tables),
        html=as_html(suite, tables))
    names = {kind: f'report.{kind}' for kind in content}
    if suite.sweep:
        content['sweep.csv'] = sweep_csv(suite, tables)
        content['sweep.png'] = sweep_png(suite, tables)
    folder = Path(out_dir or Path(suite_dir, 'report'))
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for kind, value in content.items():
        paths[kind] = folder / names.get(kind, kind)
        if isinstance(value, str):
            # Half of a surrogate pair is valid in JSON and in no file.
            value = value.encode('utf-8', errors='replace')
        paths[kind].write_bytes(value)
    return paths


def _plain(value: Any) -> Any:
    """For JSON, which knows no NaN: it becomes a text, never a gap."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _statistics(value: Optional[Statistics]) -> Optional[dict]:
    return None if value is None else asdict(value)


def as_json(suite: Suite, tables: Sequence[Table]) -> str:
    """Everything that the tables show.

    Args:
        suite (Suite): The suite.
        tables (Sequence[Table]): From :func:`compare`.
    """
    value = dict(
        schema=SCHEMA,
        name=suite.name,
        title=suite.title,
        description=suite.description,
        baseline=tables[0].baseline if tables else None,
        summary=[text.sentence(table) for table in tables],
        tables=[
            dict(
                task=table.task.name,
                title=table.task.title,
                model=table.task.model,
                protocol=table.protocol,
                seeds=table.seeds,
                notes=table.notes,
                metrics=[asdict(metric) for metric in table.task.metrics],
                rows=[
                    dict(
                        row=row.name,
                        status=row.status,
                        runs={
                            s: run.status
                            for s, run in row.runs.items()
                        },
                        metrics={
                            key:
                            dict(
                                values=cell.values,
                                own=_statistics(cell.own),
                                difference=_statistics(cell.difference),
                                best=cell.best)
                            for key, cell in row.cells.items()
                        }) for row in table.rows
                ],
                # Apart from ours.
                published_not_ours=[asdict(x) for x in table.published])
            for table in tables
        ],
        sweep=asdict(suite.sweep) if suite.sweep else None,
        provenance=provenance(suite, tables))
    return json.dumps(_plain(value), indent=1, allow_nan=False) + '\n'


def as_csv(tables: Sequence[Table]) -> str:
    """One line for each run and metric.

    ``compared`` says whether the seed counts in the tables; ``published`` is
    a column of its own and never a line. A name that a spreadsheet would take
    for a formula begins with an apostrophe.

    Args:
        tables (Sequence[Table]): From :func:`compare`.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, lineterminator='\n')
    writer.writeheader()
    for table in tables:
        for row in table.rows:
            for metric in table.task.metrics:
                cell = row.cells[metric.key]
                for seed, run in row.runs.items():
                    done = run.status == 'finished'
                    writer.writerow(
                        dict(
                            task=text.no_formula(table.task.name),
                            protocol=text.no_formula(table.protocol),
                            row=text.no_formula(row.name),
                            metric=text.no_formula(metric.name),
                            unit=text.no_formula(metric.unit),
                            seed=seed,
                            status=run.status,
                            value=run.value(metric) if done else '',
                            compared='yes' if seed in cell.values else 'no',
                            baseline=text.no_formula(table.baseline),
                            difference=_seed_difference(
                                table, cell, metric, row.name, seed),
                            published='; '.join(f'{x.value:g}'
                                                for x in cell.published),
                            published_source=text.no_formula('; '.join(
                                x.source for x in cell.published))))
    return buffer.getvalue()


def _seed_difference(table: Table, cell: Cell, metric: Metric, row: str,
                     seed: int) -> Union[float, str]:
    base = next((x for x in table.rows if x.name == table.baseline), None)
    if row == table.baseline or base is None:
        return ''
    other = base.cells[metric.key].values
    if seed not in cell.values or seed not in other:
        return ''
    return cell.values[seed] - other[seed]


def print_tables(suite_dir: Union[str, Path],
                 baseline: Optional[str] = None,
                 console: Optional[Console] = None) -> None:
    """Print the main metric of every task, one column each.

    Args:
        suite_dir (str | Path): Folder with ``suite.json``.
        baseline (str, optional): Row to which the others are compared.
            Defaults to None, the first one of the suite.
        console (Console, optional): Where to. Defaults to None, a new one.
    """
    console = console or Console()
    suite = load_suite(suite_dir)
    tables = compare(suite, baseline)
    content = overview(tables)
    # Text, for a name may look like rich's markup.
    table = RichTable(title=Text(text.clean(suite.title)))
    table.add_column(Text('weights'), overflow='fold')
    for head in content['heads']:
        title = '\n'.join((head['task'], head['protocol'], head['metric'],
                           f'n = {head["n"]}'))
        table.add_column(Text(title), justify='right')
    for name, cells in content['rows']:
        line = [Text(text.clean(name))]
        for cell in cells:
            shown = Text(cell['value'], 'bold' if cell['best'] else '')
            if cell['difference']:
                shown.append(f'\n{cell["difference"]}', 'dim')
            line.append(shown)
        table.add_row(*line, end_section=True)
    console.print(table)
    for item in tables:
        console.print(Text(text.sentence(item)))
