# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The report of a benchmark: what its runs measured, and how sure that is."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml
from markdown_it import MarkdownIt

from .plots import curves, examples, sweep_figure
from .results import Results, load_results
from .stats import compare

MODES = dict(frozen='frozen', finetune='fine-tuned')
NONE = '\N{EN DASH}'
GUIDE = """n: pre-trainings x downstream seeds; each seed draws random weights
anew. ±: standard deviation over pre-trainings, where there are several, else
over seeds. Differences to {}: with their 95 % interval, which counts how much
pre-trainings of one method differ (one variance for all rows of a table) and
how much random draws do. Not told apart: the interval includes 0, or there is
none. Bold: better than, and told apart from, all others. Published numbers are
not ours."""


@dataclass
class Section:
    """One task in one mode."""

    title: str
    task: dict
    mode: str
    runs: list[dict]
    tables: dict[str, pd.DataFrame]  # of each metric, see stats.compare
    notes: list[str]

    @property
    def main(self) -> pd.DataFrame:
        """The table of the main metric."""
        return self.tables[self.task['metrics'][0]['name']]


def sections(results: Results, baseline: str) -> Iterator[Section]:
    """The tables of a suite, for each task and mode that has runs."""
    tasks = results.suite['tasks'].values()
    titles = [task['title'] for task in tasks]
    for task in tasks:
        twin = f' ({task["model"]})' * (titles.count(task['title']) > 1)
        for mode, shown in MODES.items():
            key = dict(task=task['name'], mode=mode)
            runs = [x for x in results.runs if key.items() <= x.items()]
            if runs:
                own = results.values[list(key)].eq(key).all(axis=1)
                tables = {}
                for metric in task['metrics']:
                    named = results.values['metric'] == metric['name']
                    values = results.values[own & named]
                    tables[metric['name']] = compare(
                        values, baseline, metric['better']
                    )
                title = f'{task["title"]}{twin}, {shown}'
                part = Section(title, task, mode, runs, tables, task['notes'])
                part.notes = [*_notes(part, baseline), *task['notes']]
                yield part


def _notes(part: Section, baseline: str) -> Iterator[str]:
    """What a reader must know of a table."""
    told: dict[tuple[str, str], int] = {}
    for run in part.runs:
        for remark in (run['result'] or {}).get('remarks', ()):
            key = run['method'], remark
            told[key] = told.get(key, 0) + 1
        if run['status'] == 'failed':
            yield f'{run["name"]} failed; its seed counts for no method.'
    for (method, remark), count in told.items():
        total = sum(run['method'] == method for run in part.runs)
        yield f'{method}, {count} of {total} runs: {remark}.'
    table = part.main
    if len(table) and table['pretrainings'].max() == 1:
        yield (
            'No method has a second pre-training: how far one would be from '
            'the first is not known, and no interval here counts it.'
        )
    for method in table.index[(table['low'] == 0) & (table['high'] == 0)]:
        yield f'{method} and {baseline} are equal to the last digit.'


def number(value: float, digits: int, sign: str = '') -> str:
    """With a real minus, or the word for one that is not finite."""
    text = f'{value + 0.0:{sign}.{digits}f}'
    return text.replace('-', '\N{MINUS SIGN}')


def decimals(table: pd.DataFrame) -> int:
    """Digits that a column deserves: two of its largest spread."""
    spread = table['std'].astype(float).max()
    if not spread > 0 or math.isinf(spread):
        return 1 if table['mean'].abs().max() >= 1 else 3
    return min(3, max(1, 1 - math.floor(math.log10(spread))))


def told(row: pd.Series, digits: int) -> str:
    """A difference, such as '+5.1 (4.7 to 5.5)'."""
    if pd.isna(row['difference']):
        return NONE
    text = number(row['difference'], digits, '+')
    if not pd.isna(row['low']):
        low, high = (number(row[x], digits) for x in ('low', 'high'))
        text += f' ({low} to {high})'
    return text + ', not told apart' * (row['verdict'] == 'not told apart')


def sentence(part: Section, baseline: str) -> str:
    """What a table says about its main metric."""
    metric, table = part.task['metrics'][0], part.main
    shown = [
        f'{method} {told(row, decimals(table))}'
        for method, row in table.sort_values('mean').iterrows()
        if method != baseline
    ]
    unit = {'%': ', in points'}.get(metric['unit'], '')
    lower = ' (lower is better)' * (metric['better'] == 'lower')
    what = '; '.join(shown) or 'nothing to compare yet'
    return (
        f'{part.title}, {metric["name"]}{lower} against {baseline}{unit}: '
        f'{what}.'
    )


def rows_of(part: Section, baseline: str) -> list[list[str]]:
    """A table as texts, the heads first."""
    published = [x for x in part.task['published'] if x['mode'] == part.mode]
    names = [x['method'] for x in (*part.runs, *published)]
    rows = {name: [name, NONE] for name in dict.fromkeys(names)}
    heads = ['weights', 'n']
    for name, row in part.main.iterrows():
        count = row['pretrainings']
        rows[name][1] = f'{count} x {row["seeds"]}'
        if not count:
            rows[name][1] = f'{row["seeds"]} draw' + 's' * (row['seeds'] > 1)
    for metric in part.task['metrics']:
        table = part.tables[metric['name']]
        digits, unit = decimals(table), f' ({metric["unit"]})'
        lower = ', lower is better' * (metric['better'] == 'lower')
        title = metric['name'] + unit * bool(metric['unit']) + lower
        heads += [title, f'against {baseline}']
        others = [x for x in published if x['metric'] == metric['name']]
        heads += [f'{metric["name"]}, published'] * bool(others)
        for name, cells in rows.items():
            value = difference = NONE
            if name in table.index:
                row = table.loc[name]
                value, difference = (
                    number(row['mean'], digits),
                    told(row, digits),
                )
                if not pd.isna(row['std']):
                    value += f' ± {number(row["std"], digits)}'
                value = f'**{value}**' if row['best'] else value
            found = '; '.join(
                f'{x["value"]:+g} over {x["over"]} ({x["source"]})'
                if x['over']
                else f'{x["value"]:g} ({x["source"]})'
                for x in others
                if x['method'] == name
            )
            cells += [value, difference, *[found or NONE] * bool(others)]
    return [heads, *rows.values()]


def details(results: Results) -> dict[str, dict]:
    """Where the numbers come from, by title."""
    weights: dict[str, Any] = {}
    settings, shared, failed = {}, {}, {}
    for run in results.runs:
        if run['status'] == 'failed':
            failed[run['name']] = run['failure']
        elif run['result']:
            kept = dict(run['result']['settings'])
            kept['length'] = run['result']['length']
            shared = {key: kept.pop(key) for key in ('code', 'stack')}
            settings[f'{run["task"]}, {MODES[run["mode"]]}'] = kept
            number, found = run['pretrain_seed'], run['result']['weights']
            if found:
                weights.setdefault(run['method'], {})[number] = found
            else:
                weights[run['method']] = 'drawn by each seed'
    parts = {
        'Runs that failed': failed,
        'Weights, by pre-training seed': weights,
        'Code and software of all runs': shared,
        'Settings of each table': settings,
    }
    return {title: content for title, content in parts.items() if content}


def markdown(
    results: Results, parts: Sequence[Section], baseline: str, images: bool
) -> str:
    """The report as Markdown, with its images inside for a page."""
    suite = results.suite
    lines = [f'# {suite["title"]}', '', suite['description'], '']
    lines += [f'* {sentence(part, baseline)}' for part in parts]
    lines += ['', GUIDE.format(baseline), '']
    for part in parts:
        lines += [f'## {part.title}', '', part.task['model'], '']
        lines += table_lines(rows_of(part, baseline))
        lines += [*(f'* {note}' for note in part.notes), '']
        lines += _images(part) if images else []
    lines += ['## Where these numbers come from', '']
    for title, content in details(results).items():
        text = yaml.safe_dump(content, sort_keys=False, width=1000)
        lines += [f'### {title}', '', '~~~~yaml', text, '~~~~', '']
    return '\n'.join(lines)


def table_lines(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown; the first row has the heads."""
    rows = [rows[0], ['---', *['---:'] * (len(rows[0]) - 1)], *rows[1:]]
    cells = ((x.replace('|', '\\|') for x in row) for row in rows)
    return [*(f'| {" | ".join(row)} |' for row in cells), '']


def _images(part: Section) -> list[str]:
    """Curves, and the same validation images as each method sees them."""
    metric = part.task['metrics'][0]
    done = [run for run in part.runs if run['result']]
    if not done or done[0]['result']['length'].startswith('0'):
        return []
    found = examples([*{x['method']: x for x in done[::-1]}.values()][::-1])
    shown = [[f'![{k}]({x})' for x in found[k]] for k in found]
    table = [[*found], *zip(*shown, strict=True)]
    address = curves(done, metric, metric['name'])
    return [
        f'![Curves]({address})',
        '',
        *(table_lines(table) if found else []),
    ]


def write_report(
    folder: str | Path, out: str | Path | None = None, base: str | None = None
) -> dict[str, Path]:
    """Write the report of a suite in all its forms.

    Args:
        folder: With ``suite.json``.
        out: Where to, by default ``report`` in the folder.
        base: Method to which the others are compared, by default the first.

    Returns:
        By name report.csv (each value), summary.csv (means and intervals),
        report.md, report.html, and of a sweep sweep.png.
    """
    results = load_results(folder)
    suite, sweep = results.suite, results.suite['sweep']
    methods = [*dict.fromkeys(run['method'] for run in results.runs)]
    baseline = base or methods[0]
    if baseline not in methods:
        raise ValueError(
            f'There is no method "{baseline}", only {", ".join(methods)}'
        )
    parts, frames = [*sections(results, baseline)], []
    panels: dict[str, dict[str, pd.DataFrame]] = {}
    for part in parts:
        for name, table in part.tables.items():
            frame = table.rename_axis('method').reset_index()
            key = dict(task=part.task['name'], mode=part.mode, metric=name)
            frames.append(frame.assign(**key))
            panel = panels.setdefault(f'{part.task["title"]}: {name}', {})
            panel[MODES[part.mode]] = table
    summary, page = pd.concat(frames), markdown(results, parts, baseline, True)
    files: dict[str, str | bytes] = {}
    if sweep:
        summary[sweep['key']] = summary['method'].map(sweep['values'])
        files['sweep.png'] = sweep_figure(sweep, panels)
    files['report.csv'] = results.values.to_csv(index=False)
    files['summary.csv'] = summary.to_csv(index=False)
    files['report.md'] = markdown(results, parts, baseline, False)
    body = MarkdownIt(options_update=dict(html=False)).enable('table')
    template = Path(__file__).with_name('report.html.j2')
    files['report.html'] = jinja2.Template(
        template.read_text(encoding='utf-8'), autoescape=True
    ).render(title=suite['title'], body=body.render(page))
    target = Path(out or Path(folder, 'report'))
    target.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        data = value if isinstance(value, bytes) else value.encode()
        (target / name).write_bytes(data)
    return {name: target / name for name in files}
