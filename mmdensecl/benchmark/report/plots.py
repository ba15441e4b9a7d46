# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Plots as inline SVG, in the colours and the font of the page."""
import io
import itertools
import math
import re
from typing import Dict, List, Sequence, Tuple

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .curves import Curve, read_curves
from .tables import Row, Table
from .text import clean, heading

# Stand-ins that no plot uses by itself, replaced by the page's variables.
TEXT, GRID = '#010101', '#020202'
VARIABLES = {TEXT: 'var(--plot-text)', GRID: 'var(--grid)'}
COLOURS = 7  # --row1 to --row7 of the page; --row0 is the baseline's
DASHES = ('-', '--', ':', '-.')
MAX_NAME = 20
RC = {
    'svg.fonttype': 'none',
    # Names are names: no mathematics between two dollars.
    'text.parse_math': False,
    'font.size': 11,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.edgecolor': GRID,
    'axes.labelcolor': TEXT,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': GRID,
    'grid.linewidth': 0.6,
    'text.color': TEXT,
    'xtick.color': GRID,
    'ytick.color': GRID,
    'xtick.labelcolor': TEXT,
    'ytick.labelcolor': TEXT,
}


def row_style(table: Table) -> Dict[str, Tuple[str, str]]:
    """A stand-in colour and a line style for each row.

    The hues are safe for the colour-blind; past them lines are dashed.

    Args:
        table (Table): The table.
    """
    others = itertools.count()
    style = {}
    for row in table.rows:
        number = 0, 0
        if row.name != table.baseline:
            dash, hue = divmod(next(others), COLOURS)
            number = hue + 1, dash % len(DASHES)
        style[row.name] = f'#0300{number[0]:02x}', DASHES[number[1]]
    return style


def variable(colour: str) -> str:
    """The page's CSS for a stand-in colour."""
    return VARIABLES.get(colour) or f'var(--row{int(colour[5:], 16)})'


def _short(name: str) -> str:
    name = clean(name)
    return name if len(name) <= MAX_NAME else name[:MAX_NAME - 1] + '…'


def inline_svg(figure: Figure, label: str, key: str) -> Markup:
    """The figure as an element of a page, with ids of its own.

    Args:
        figure (Figure): Drawn under ``RC``, in stand-in colours.
        label (str): What it shows, for who cannot see it.
        key (str): Tells it from the page's other figures.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({'svg.hashsalt': key}):
        figure.savefig(buffer, format='svg', transparent=True)
    text = buffer.getvalue()
    box = re.search(r'viewBox="([\d. ]+)"', text)[1]
    body = text[text.index('>', text.index('<svg')) + 1:]
    body = re.sub(r'<metadata>.*?</metadata>', '', body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', '<g', body)
    body = re.sub(f'{TEXT}|{GRID}|#0300[0-9a-f]{{2}}',
                  lambda m: variable(m[0]), body)
    return Markup(f'<svg viewBox="{box}" role="img" '
                  f'aria-label="{escape(label)}">{body}')


def dot_plot(table: Table, key: str) -> Markup:
    """Every seed of the main metric, with mean and standard deviation.

    Args:
        table (Table): The table.
        key (str): Tells this figure from the page's others.
    """
    metric = table.task.metrics[0]
    rows = [r for r in table.rows if r.cells[metric.key].values]
    style = row_style(table)
    with matplotlib.rc_context(RC):
        figure = Figure((4.6, max(2.9, 1. + 0.45 * len(rows))),
                        layout='constrained')
        ax = figure.subplots()
        for y, row in enumerate(rows):
            cell, colour = row.cells[metric.key], style[row.name][0]
            if math.isfinite(cell.own.mean):
                ax.errorbar(
                    cell.own.mean,
                    y,
                    xerr=cell.own.std,
                    fmt='D',
                    color=colour,
                    markersize=6,
                    linewidth=2,
                    capsize=4)
                if row.name == table.baseline:
                    ax.axvline(
                        cell.own.mean, color=colour, linewidth=1, ls='--')
            # Below the mean, so that neither hides the other.
            ax.scatter([*cell.values.values()], [y + 0.25] * len(cell.values),
                       s=16,
                       facecolors='none',
                       edgecolors=colour,
                       linewidths=1.2)
        ax.set_yticks(range(len(rows)), [_short(row.name) for row in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        ax.grid(axis='y', visible=False)
        ax.tick_params(axis='y', length=0)
        ax.set_xlabel(heading(metric))
        return inline_svg(figure, f'{heading(metric)} of each row and seed',
                          key)


def curve_plots(table: Table, key: str) -> List[Tuple[str, Markup]]:
    """Loss and main metric over the training; what was logged repeatedly.

    Args:
        table (Table): The table.
        key (str): Tells these figures from the page's others.

    Returns:
        List[Tuple[str, Markup]]: Caption and figure.
    """
    metric = table.task.metrics[0]
    curves = {
        row.name: [
            read_curves(row.runs[seed], metric)
            for seed in row.cells[metric.key].values
        ]
        for row in table.rows
    }
    plots = []
    for kind, label in (('loss', 'training loss'), ('metric',
                                                    heading(metric))):
        # A score at the end alone is in the table.
        if not any(len(x[kind]) > 1 for row in curves.values() for x in row):
            continue
        with matplotlib.rc_context(RC):
            figure = Figure((4.6, 2.9), layout='constrained')
            ax = figure.subplots()
            for row in table.rows:
                _draw_row(ax, [x[kind] for x in curves[row.name]],
                          *row_style(table)[row.name])
            ax.set_xlabel('iteration')
            ax.set_ylabel(label)
            caption = dict(
                loss='Training loss', metric=f'{label} during training')[kind]
            plots.append((caption, inline_svg(figure, caption,
                                              f'{key}-{kind}')))
    return plots


def _draw_row(ax: Axes, seeds: Sequence[Curve], colour: str,
              dash: str) -> None:
    """A thin line for each seed and a thick one for their mean."""
    for curve in seeds:
        steps = sorted(curve)
        ax.plot(
            steps, [curve[s] for s in steps],
            color=colour,
            linestyle=dash,
            linewidth=0.7,
            alpha=0.6)
    common = sorted(set(seeds[0]).intersection(*seeds)) if seeds else []
    ax.plot(
        common, [sum(c[s] for c in seeds) / len(seeds) for s in common],
        color=colour,
        linestyle=dash,
        linewidth=1.8,
        marker='o' if len(common) < 12 else '',
        markersize=4)


def legend(table: Table) -> List[Tuple[Row, str, bool]]:
    """Rows with the CSS of their colours, and whether they are dashed.

    Args:
        table (Table): The table.
    """
    style = row_style(table)
    return [(row, variable(style[row.name][0]), style[row.name][1] != '-')
            for row in table.rows if row.runs]
