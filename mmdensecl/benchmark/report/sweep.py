# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Plots of an ablation: each metric against the value of the rows."""
import csv
import io
import math
from textwrap import fill
from typing import Dict, Iterator, List, Sequence, Tuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmdensecl.benchmark.plan import RANDOM
from . import text
from .plots import GRID, RC, TEXT, inline_svg, variable
from .results import Metric, Suite, Sweep
from .tables import Cell, Table

# One for each protocol: stand-ins for the page, colours for a picture.
COLOURS = {'#030001': '#0072b2', '#030002': '#d55e00'}
PRINTED = {TEXT: '#1b2129', GRID: '#c9cfd8', **COLOURS}
MARKERS = 'os'
WIDTH = 68  # characters of text below a panel
COLUMNS = 3  # panels side by side in a picture
ROOM = 36  # characters of names that fit below an axis
PANEL = 4.6, 3.1  # inches
CSV_COLUMNS = ('task', 'protocol', 'metric', 'unit', 'key', 'value', 'row',
               'n', 'mean', 'std')


def figures_title(suite: Suite) -> str:
    """What the plots of an ablation show.

    Args:
        suite (Suite): With a sweep.
    """
    return f'Metrics by {text.clean(suite.sweep.label)}'


def _panels(
        tables: Sequence[Table]) -> Iterator[Tuple[str, Metric, List[Table]]]:
    """Title, metric and a table for each protocol, plot by plot."""
    by_task: Dict[str, List[Table]] = {}
    for table in tables:
        by_task.setdefault(table.task.name, []).append(table)
    for group in by_task.values():
        for metric in group[0].task.metrics:
            yield text.clean(group[0].title), metric, group


def _colours(suite: Suite) -> Dict[str, str]:
    """A stand-in colour for each protocol."""
    return dict(zip(suite.protocols, COLOURS))


def _places(sweep: Sweep) -> Dict[str, float]:
    """Where a row stands on the axis."""
    if sweep.axis == 'category':
        return {row: float(i) for i, row in enumerate(sweep.values)}
    return sweep.values


def _is_known(cell: Cell) -> bool:
    return cell.own is not None and math.isfinite(cell.own.mean)


def _draw(ax: Axes, suite: Suite, metric: Metric, tables: Sequence[Table],
          colours: Dict[str, str]) -> None:
    """One metric of one task, each protocol a line of its own."""
    sweep, places = suite.sweep, _places(suite.sweep)
    for table in tables:
        colour = colours[table.protocol]
        number = suite.protocols.index(table.protocol)
        # Beside each other, where a place is no measure.
        shift = 0.12 * number if sweep.axis == 'category' else 0.
        cells = {row.name: row.cells[metric.key] for row in table.rows}
        points = sorted((places[row], cells[row].own) for row in places
                        if row in cells and _is_known(cells[row]))
        spread = [own.std for _, own in points]
        ax.errorbar([place + shift for place, _ in points],
                    [own.mean for _, own in points],
                    yerr=None if None in spread else spread,
                    marker=MARKERS[number],
                    linestyle='' if sweep.axis == 'category' else '-',
                    color=colour,
                    linewidth=1.6,
                    markersize=5,
                    capsize=4,
                    label=text.clean(table.protocol))
        if RANDOM in cells and _is_known(cells[RANDOM]):
            ax.axhline(
                cells[RANDOM].own.mean,
                color=colour,
                linewidth=1.2,
                linestyle='--',
                label=f'{text.clean(table.protocol)}, random weights')
    _draw_axis(ax, sweep, places)
    ax.set_ylabel(text.heading(metric))


def _draw_axis(ax: Axes, sweep: Sweep, places: Dict[str, float]) -> None:
    """All values of the sweep, also those that nothing was measured for."""
    if sweep.axis == 'log':
        ax.set_xscale('log')
        ax.minorticks_off()
    names = [
        value if sweep.axis == 'category' else f'{value:g}'
        for value in sweep.values.values()
    ]
    names = [text.clean(name) for name in names]
    ax.set_xticks([*places.values()], names)
    if sum(map(len, names)) > ROOM:
        ax.tick_params(axis='x', rotation=20, labelsize='small')
    if sweep.axis == 'category':
        ax.set_xlim(-0.5, len(places) - 0.5)
    ax.set_xlabel(text.clean(sweep.label))


def sweep_figures(suite: Suite,
                  tables: Sequence[Table]) -> List[Tuple[str, Markup]]:
    """The plots for the page.

    Args:
        suite (Suite): With a sweep.
        tables (Sequence[Table]): From :func:`compare`.

    Returns:
        List[Tuple[str, Markup]]: Caption and figure.
    """
    plots = []
    for number, (title, metric, group) in enumerate(_panels(tables)):
        with matplotlib.rc_context(RC):
            figure = Figure((4.6, 2.9), layout='constrained')
            _draw(figure.subplots(), suite, metric, group, _colours(suite))
            caption = f'{title}: {text.heading(metric)}'
            plots.append((caption, inline_svg(figure, caption,
                                              f'sweep{number}')))
    return plots


def sweep_legend(suite: Suite) -> List[Tuple[str, str]]:
    """The protocols with the CSS of their colours.

    Args:
        suite (Suite): With a sweep.
    """
    return [(protocol, variable(colour))
            for protocol, colour in _colours(suite).items()]


def meaning(tables: Sequence[Table]) -> str:
    """What the points, bars and lines of the plots are.

    Args:
        tables (Sequence[Table]): From :func:`compare`.
    """
    seeds = max((len(table.seeds) for table in tables), default=0)
    point = (f'Points: mean over {seeds} seeds of the downstream run; bars: '
             'standard deviation' if seeds > 1 else
             'Points: one seed of the downstream run, so the spread is not '
             'known')
    return f'{point}. Each is one pre-training. Dashed: random weights.'


def sweep_png(suite: Suite, tables: Sequence[Table]) -> bytes:
    """All plots in one picture.

    Args:
        suite (Suite): With a sweep.
        tables (Sequence[Table]): From :func:`compare`.

    Returns:
        bytes: A PNG.
    """
    # A task begins a row.
    lines: List[list] = []
    for panel in _panels(tables):
        same = lines and lines[-1][0][0] == panel[0]
        if not same or len(lines[-1]) == COLUMNS:
            lines.append([])
        lines[-1].append(panel)
    rows, columns = len(lines), max(map(len, lines))
    colours = {
        protocol: PRINTED[colour]
        for protocol, colour in _colours(suite).items()
    }
    rc = {
        name: PRINTED.get(value, value) if isinstance(value, str) else value
        for name, value in RC.items()
    }
    with matplotlib.rc_context(rc):
        figure = Figure((max(6.4, columns * PANEL[0]), rows * PANEL[1] + 1.1),
                        layout='constrained')
        axes = figure.subplots(rows, columns, squeeze=False)
        for row, line in zip(axes, lines):
            for ax, (title, metric, group) in zip(row, line):
                _draw(ax, suite, metric, group, colours)
                ax.set_title(title, fontsize='medium')
            for ax in row[len(line):]:
                ax.set_axis_off()
        handles = {
            label: handle
            for ax in axes.flat
            for handle, label in zip(*ax.get_legend_handles_labels())
        }
        figure.suptitle(text.clean(suite.title))
        labels = sorted(handles)
        figure.legend([handles[label] for label in labels],
                      labels,
                      loc='outside lower center',
                      ncols=4 if columns > 1 else 2,
                      frameon=False,
                      title=fill(meaning(tables), WIDTH * columns),
                      title_fontsize='small')
        buffer = io.BytesIO()
        figure.savefig(buffer, format='png', dpi=110)
    return buffer.getvalue()


def sweep_csv(suite: Suite, tables: Sequence[Table]) -> str:
    """The points of the plots: one line for each row and metric.

    Args:
        suite (Suite): With a sweep.
        tables (Sequence[Table]): From :func:`compare`.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, CSV_COLUMNS, lineterminator='\n')
    writer.writeheader()
    for table in tables:
        for metric in table.task.metrics:
            for row in table.rows:
                if row.name not in (RANDOM, *suite.sweep.values):
                    continue
                own = row.cells[metric.key].own
                known = {
                    'task': table.task.name,
                    'protocol': table.protocol,
                    'metric': metric.name,
                    'unit': metric.unit,
                    'key': suite.sweep.key,
                    'value': suite.sweep.values.get(row.name, ''),
                    'row': row.name,
                    'n': own.n if own else 0,
                    'mean': own.mean if own else '',
                    'std': '' if own is None or own.std is None else own.std
                }
                writer.writerow({
                    k:
                    text.no_formula(v) if isinstance(v, str) else v
                    for k, v in known.items()
                })
    return buffer.getvalue()
