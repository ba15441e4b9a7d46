# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The report as Markdown."""
from typing import Any, Dict, List, Sequence

from . import text
from .grid import GUIDE, baseline_name, grid, seeds_compared
from .provenance import provenance, resumed
from .results import Suite
from .sweep import figures_title
from .tables import Table

MARKDOWN_MARKS = str.maketrans({
    **{
        mark: f'\\{mark}'
        for mark in '\\`*_[]#|~$'
    }, '<': '&lt;',
    '>': '&gt;',
    '&': '&amp;'
})


def escape_markdown(value: object) -> str:
    """A text that Markdown shows as it is, in one line.

    Args:
        value (object): The text.
    """
    return text.clean(value).translate(MARKDOWN_MARKS)


def _markdown_table(heads: List[str],
                    rows: List[List[str]],
                    align: str = '---') -> List[str]:
    aligned = ['---'] + [align] * (len(heads) - 1)
    lines = [heads, aligned, *rows]
    return ['| ' + ' | '.join(line) + ' |' for line in lines] + ['']


def _code(lines: Sequence[str]) -> List[str]:
    """Indented, for no content can end that."""
    return [*(f'    {line}' for line in lines), '']


def as_markdown(suite: Suite, tables: Sequence[Table]) -> str:
    """The tables with what is needed to judge them.

    Args:
        suite (Suite): The suite.
        tables (Sequence[Table]): From :func:`compare`.
    """
    esc = escape_markdown
    source = provenance(suite, tables)
    lines = [f'# {esc(suite.title)}', '', esc(suite.description), '']
    lines += [f'- {esc(text.sentence(table))}' for table in tables] + ['']
    lines += [GUIDE.format(esc(baseline_name(tables))), '']
    if suite.sweep:
        lines += [f'![{esc(figures_title(suite))}](sweep.png)', '']
    for table in tables:
        lines += [
            f'## {esc(table.title)}, {esc(table.protocol)}', '',
            f'{esc(table.task.model)}. {esc(seeds_compared(table))}', ''
        ]
        lines += _markdown_grid(table)
        lines += [f'- {esc(note)}' for note in table.notes]
        lines += [''] if table.notes else []
    return '\n'.join(lines + _markdown_provenance(source))


def _markdown_grid(table: Table) -> List[str]:
    esc = escape_markdown
    content = grid(table)
    heads = ['weights', 'n']
    for head in content['heads']:
        heads += [
            esc(head['title']), f'difference to {esc(table.baseline)}',
            '95% interval'
        ]
        heads += [f'{text.PUBLISHED}'] if head['published'] else []
    rows = []
    for row in content['rows']:
        line = [esc(row['name']), str(row['n'])]
        for cell in row['cells']:
            value = esc(cell['value'])
            line += [
                f'**{value}**' if cell['best'] else value,
                esc(cell['difference']),
                esc(cell['interval']) or text.NOTHING
            ]
            if cell['has_published']:
                line.append('; '.join(f'{x["value"]} ({esc(x["source"])})'
                                      for x in cell['published'])
                            or text.NOTHING)
        rows.append(line)
    return _markdown_table(heads, rows, '---:')


def _markdown_provenance(source: Dict[str, Any]) -> List[str]:
    esc = escape_markdown
    lines = [
        '## Where these numbers come from', '',
        f'{source["finished"]} of {source["planned"]} runs have finished, in '
        f'{source["time"]} of run time{resumed(source)}.', ''
    ]
    lines += _markdown_table(
        ['weights', 'source', 'architecture', 'file', 'SHA-256'],
        [[esc(x[k]) for k in ('row', 'source', 'arch', 'path', 'sha256')]
         for x in source['checkpoints']])
    lines += _markdown_table(['shared by all runs', ''],
                             [[esc(k), esc(v)]
                              for k, v in source['shared'].items()])
    for table in source['tables']:
        lines += _markdown_table(
            [f'{esc(table["task"])}, {esc(table["protocol"])}', ''],
            [[esc(k), esc(v)] for k, v in table['settings'].items()])
    if source['unfinished']:
        lines += ['### Runs without a result', '']
    for run in source['unfinished']:
        where = ', '.join(esc(x) for x in (run['reason'], run['log']) if x)
        lines += [
            f'{esc(run["run"])}: {run["status"]}'
            f'{" (" + where + ")" if where else ""}', ''
        ]
        lines += _code(run['tail']) if run['tail'] else []
    if source['commands']:
        lines += ['### Commands', '', *_code([*source['commands'].values()])]
    for environment in source['environments']:
        lines += [f'### Environment of {environment["runs"]} runs', '']
        lines += _code([
            text.clean(f'{k}: {v}') for k, v in environment['values'].items()
        ])
    return lines
