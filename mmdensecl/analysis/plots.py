# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Curves of runs: one picture of all, and inline SVG for a page."""
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from mmdensecl.benchmark.report.page import STYLE
from mmdensecl.benchmark.report.plots import (COLOURS, DASHES, GRID, RC, TEXT,
                                              inline_svg)
from mmdensecl.benchmark.report.text import clean
from .run_log import Curve, RunLog, finite
from .verdict import LIMITS

MAX_POINTS = 1000  # of a curve; of longer ones each point is a mean
COLUMNS = 3
SHADE = 0.22
HUMP = 'queue-fill hump: the queue still fills (queue_fill < 100)'
NOT_FINITE = 'first value that is not finite'


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    Attributes:
        key (str): Tells it from the others.
        title (str): What it shows.
        unit (str): Of the vertical axis.
        curves (Dict[str, str]): Names in the log, and in the legend.
        queue (bool): Whether the numbers depend on how full the queue is.
            Defaults to False.
        limit (float, optional): Where a warning begins. Defaults to None.
        bottom (float, optional): Of the vertical axis. Defaults to None.
        log (bool): Whether the vertical axis is logarithmic. Defaults to
            False.
    """
    key: str
    title: str
    unit: str
    curves: Dict[str, str]
    queue: bool = False
    limit: Optional[float] = None
    bottom: Optional[float] = None
    log: bool = False


PANELS = (
    Panel('loss', 'Loss', 'loss', {'loss': 'sum'}, queue=True),
    Panel(
        'parts',
        'Parts of the loss, weighted',
        'loss', {
            'loss_global': 'global',
            'loss_dense': 'dense',
            'loss_category': 'category'
        },
        queue=True),
    Panel(
        'accuracy',
        'Positive beats all negatives',
        '% of queries', {
            'global_acc': 'global',
            'dense_acc': 'dense'
        },
        queue=True,
        bottom=0.),
    Panel(
        'global_similarity',
        'Global similarity',
        'mean cosine', {
            'global_pos_sim': 'positive',
            'global_neg_sim': 'hardest negative'
        },
        queue=True),
    Panel(
        'dense_similarity',
        'Dense similarity',
        'mean cosine', {
            'dense_pos_sim': 'positive',
            'dense_neg_sim': 'hardest negative'
        },
        queue=True),
    Panel(
        'spread',
        'Feature spread (1 isotropic, 0 collapsed)',
        'feat_std', {'feat_std': 'feat_std'},
        limit=LIMITS.min_std,
        bottom=0.),
    Panel(
        'position',
        'Explained by the place alone',
        '% of dense variance', {'position_r2': 'position_r2'},
        limit=LIMITS.max_position,
        bottom=0.),
    Panel(
        'matches',
        'Matches',
        '% of cells', {
            'match_acc': 'right, within a cell',
            'match_coverage': 'distinct key cells'
        },
        bottom=0.),
    Panel(
        'categories',
        'Categories',
        '%', {
            'category_used': 'in use',
            'category_entropy': 'entropy',
            'category_agreement': 'agreement'
        },
        bottom=0.),
    Panel(
        'knn',
        'kNN on labelled pictures',
        'top-1 accuracy, %', {
            'knn_top1': 'kNN',
            'knn_chance': 'most common class'
        },
        bottom=0.),
    Panel('lr', 'Learning rate', 'lr', {'lr': 'lr'}, bottom=0.),
    Panel(
        'time',
        'Time of a step',
        'seconds', {
            'time': 'whole',
            'data_time': 'waiting for pictures'
        },
        bottom=0.),
)


@lru_cache(maxsize=None)
def palette() -> Dict[str, str]:
    """The light colours of the reports' pages, by CSS variable."""
    found = re.findall(r'(--[\w-]+): (#[0-9a-f]+);',
                       STYLE.read_text(encoding='utf-8'))
    # The dark ones come later in the file.
    return dict(reversed(found))


def style(number: int) -> Tuple[str, str]:
    """A stand-in colour, as :func:`inline_svg` takes it, and a real one.

    The hues are safe for the colour-blind.

    Args:
        number (int): Of the run, from 1; 0 is a grey that no run has.
    """
    hue = number and (number - 1) % COLOURS + 1
    return f'#0300{hue:02x}', palette()[f'--row{hue}']


def panels_of(runs: Sequence[RunLog]) -> List[Panel]:
    """Those for which a run has logged something.

    Args:
        runs (Sequence[RunLog]): The runs.
    """
    return [
        panel for panel in PANELS if any(
            run.curve(name) for run in runs for name in panel.curves)
    ]


def thin(curve: Curve, most: int = MAX_POINTS) -> Curve:
    """A curve of few points, each the mean of neighbours where it was long.

    Args:
        curve (Curve): The curve.
        most (int): Points at most. Defaults to MAX_POINTS.
    """
    steps = sorted(curve)
    count = -(-len(steps) // most)
    groups = (steps[i:i + count] for i in range(0, len(steps), count or 1))
    return {g[-1]: sum(curve[s] for s in g) / len(g) for g in groups}


def draw_panel(ax: Axes, panel: Panel, runs: Sequence[RunLog],
               colours: Sequence[str]) -> None:
    """Draw one panel: a colour for each run, a dash for each curve.

    Args:
        ax (Axes): Where to.
        panel (Panel): What.
        runs (Sequence[RunLog]): Of which runs.
        colours (Sequence[str]): That of the queue-fill hump, then the runs'.
    """
    names = [
        name for name in panel.curves if any(run.curve(name) for run in runs)
    ]
    humps = {run.hump for run in runs if run.hump and panel.queue}
    for hump in sorted(humps):
        ax.axvspan(*hump, color=colours[0], alpha=SHADE, linewidth=0)
    for run, colour in zip(runs, colours[1:]):
        for name, dash in zip(names, DASHES):
            curve = run.curve(name)
            points = thin(finite(curve))
            ax.plot(
                points.keys(),
                points.values(),
                color=colour,
                linestyle=dash,
                linewidth=1.5,
                marker='o' if len(points) < 12 else '',
                markersize=3)
            broken = sorted(curve.keys() - finite(curve).keys())
            if broken:
                ax.axvline(broken[0], color=colour, linestyle=':')
    if panel.limit is not None:
        ax.axhline(panel.limit, color=matplotlib.rcParams['text.color'], lw=.8)
    if panel.bottom is not None:
        ax.set_ylim(bottom=panel.bottom)
    ax.set_xlabel('training step')
    ax.set_ylabel(panel.unit)
    handles = [
        _line(panel.curves[name], dash) for name, dash in zip(names, DASHES)
    ]
    if panel.limit is not None:
        handles.append(_line('limit of the warning', '-', 0.8))
    if len(handles) > 1:
        # Above the axes, where no curve can run into it.
        ax.legend(
            handles=handles,
            loc='lower left',
            bbox_to_anchor=(0, 1),
            borderaxespad=0.2,
            ncols=len(handles),
            fontsize='small',
            frameon=False)


def _line(label: str, dash: str, width: float = 1.5) -> Line2D:
    return Line2D([], [],
                  color=matplotlib.rcParams['text.color'],
                  linestyle=dash,
                  linewidth=width,
                  label=label)


def panel_plots(runs: Sequence[RunLog]) -> List[Tuple[str, Markup]]:
    """Every panel for a page in the style of the reports.

    Args:
        runs (Sequence[RunLog]): The runs.

    Returns:
        List[Tuple[str, Markup]]: Caption and figure.
    """
    plots = []
    for panel in panels_of(runs):
        with matplotlib.rc_context(RC):
            figure = Figure((4.6, 3.1), layout='constrained')
            draw_panel(figure.subplots(), panel, runs,
                       [style(i)[0] for i in range(len(runs) + 1)])
            plots.append(
                (panel.title, inline_svg(figure, panel.title, panel.key)))
    return plots


def figure_of_all(runs: Sequence[RunLog]) -> Figure:
    """All panels as one figure, with one legend.

    Args:
        runs (Sequence[RunLog]): The runs.
    """
    real = {TEXT: palette()['--plot-text'], GRID: palette()['--grid']}
    panels = panels_of(runs)
    colours = [style(i)[1] for i in range(len(runs) + 1)]
    with matplotlib.rc_context({k: real.get(v, v) for k, v in RC.items()}):
        rows = -(-len(panels) // COLUMNS)
        figure = Figure((4.4 * COLUMNS, 3.1 * rows + 0.6),
                        layout='constrained',
                        facecolor='white')
        axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
        for ax, panel in zip(axes, panels):
            draw_panel(ax, panel, runs, colours)
            # Above the legend.
            ax.set_title(panel.title, loc='left', fontsize='medium', pad=21)
        for ax in axes[len(panels):]:
            ax.remove()
        figure.legend(
            handles=legend(runs, colours),
            loc='outside upper left',
            ncols=3,
            frameon=False)
    return figure


def legend(runs: Sequence[RunLog], colours: Sequence[str]) -> list:
    """What the colours of a figure mean.

    Args:
        runs (Sequence[RunLog]): The runs.
        colours (Sequence[str]): As of :func:`draw_panel`.
    """
    handles = [
        Line2D([], [], color=colour, linewidth=3, label=clean(run.name))
        for run, colour in zip(runs, colours[1:])
    ]
    if any(run.hump for run in runs):
        handles.append(Patch(color=colours[0], alpha=SHADE, label=HUMP))
    if any(len(finite(c)) < len(c) for r in runs for c in r.curves.values()):
        handles.append(
            Line2D([], [], color=colours[1], linestyle=':', label=NOT_FINITE))
    return handles


def save_picture(runs: Sequence[RunLog], path: Path) -> None:
    """Write :func:`figure_of_all` as a PNG.

    Args:
        runs (Sequence[RunLog]): The runs.
        path (Path): The file.
    """
    with matplotlib.rc_context({'text.parse_math': False}):
        figure_of_all(runs).savefig(path, dpi=100)
