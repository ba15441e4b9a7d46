# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Tables as texts, the same for the terminal, Markdown and HTML."""
from typing import Dict, Sequence

from . import text
from .tables import Table

GUIDE = ('Differences to {} are between runs with the same seed: their mean ± '
         'standard deviation, and the 95% confidence interval of the mean. A '
         'number is marked where it leads all other rows by more than either '
         'standard deviation. Seeds vary the downstream run alone: each row '
         'is one pre-training, and what another one would give is not in '
         'these spreads.')


def grid(table: Table) -> Dict[str, list]:
    """A table as texts, the same for Markdown and HTML.

    Args:
        table (Table): From :func:`compare`.

    Returns:
        Dict[str, list]: ``heads`` of the metrics, and ``rows`` with their
        ``cells``.
    """
    published = {x.metric for x in table.published}
    heads = [
        dict(title=text.heading(metric), published=metric.key in published)
        for metric in table.task.metrics
    ]
    rows = []
    for row in table.rows:
        cells = []
        for metric, head in zip(table.task.metrics, heads):
            cell = row.cells[metric.key]
            digits = text.decimals(table, metric)
            cells.append(
                dict(
                    value=text.mean_std(cell.own, digits, row),
                    known=cell.own is not None,
                    best=cell.best,
                    difference='baseline' if row.name == table.baseline else
                    text.difference(cell, digits),
                    interval=text.interval(cell, digits),
                    has_published=head['published'],
                    published=[
                        dict(
                            value=f'{x.value:g}', source=text.clean(x.source))
                        for x in cell.published
                    ]))
        rows.append(
            dict(
                name=text.clean(row.name),
                n=len(next(iter(row.cells.values())).values),
                baseline=row.name == table.baseline,
                cells=cells))
    return dict(heads=heads, rows=rows)


def overview(tables: Sequence[Table]) -> Dict[str, list]:
    """The main metric of every table, one column each.

    Args:
        tables (Sequence[Table]): From :func:`compare`.

    Returns:
        Dict[str, list]: ``heads``, and ``rows`` of name and cells.
    """
    names = dict.fromkeys(row.name for t in tables for row in t.rows
                          if row.runs)
    heads, columns = [], []
    for table in tables:
        metric = table.task.metrics[0]
        digits = text.decimals(table, metric)
        heads.append(
            dict(
                task=text.clean(table.title),
                protocol=text.clean(table.protocol),
                metric=text.heading(metric),
                n=len(table.seeds)))
        columns.append({
            row.name:
            dict(
                value=text.mean_std(row.cells[metric.key].own, digits, row),
                known=row.cells[metric.key].own is not None,
                best=row.cells[metric.key].best,
                difference='' if row.cells[metric.key].difference is None else
                text.difference(row.cells[metric.key], digits))
            for row in table.rows
        })
    missing = dict(value=text.NOTHING, known=False, best=False, difference='')
    return dict(
        heads=heads,
        rows=[(name, [column.get(name, missing) for column in columns])
              for name in names])


def seeds_compared(table: Table) -> str:
    """Over which seeds a table's means are.

    Args:
        table (Table): From :func:`compare`.
    """
    seeds = ', '.join(map(str, table.seeds))
    if not seeds:
        return 'No seed has been finished by all rows that have started.'
    if not table.trained:
        return 'A probe of fixed weights: one run of each row, no spread.'
    if len(table.seeds) == 1:
        return f'Seed {seeds} only, so the spread is not known.'
    return f'Mean ± standard deviation over seeds {seeds}.'


def baseline_name(tables: Sequence[Table]) -> str:
    """The row to which all tables compare.

    Args:
        tables (Sequence[Table]): From :func:`compare`.
    """
    return text.clean(tables[0].baseline) if tables else ''
