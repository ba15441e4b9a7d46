# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Figures and example images of the report, as data addresses."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mmdensecl.visualization.figures import data_uri, to_array

from .plan import RANDOM
from .results import log_rows

EXAMPLES, SIZE = 4, (480, 300)  # of each table, pixels at most


def _label(ax: Axes, x: str, y: str) -> None:
    ax.set(xlabel=x, ylabel=y)
    ax.grid(alpha=0.3)
    ax.legend(fontsize='small', loc='best')


def curves(runs: Sequence[dict], metric: dict, heading: str) -> str:
    """Loss and metric over the training, a line for each run."""
    methods = [*dict.fromkeys(run['method'] for run in runs)]
    figure = Figure((9.2, 2.9), dpi=120, layout='constrained')
    left, right = figure.subplots(1, 2, sharex=True)
    for run in runs:
        loss: dict[int, float] = {}
        scores: dict[int, float] = {}
        last = None
        for row in log_rows(run['folder']):
            step = row.get('step', 0)
            if 'loss' in row:
                # mmengine counts validations in epochs where training is.
                last = step if 'epoch' in row else None
                loss[step] = row['loss']
            elif metric['key'] in row:
                score = row[metric['key']] * metric['scale']
                scores[step if last is None else last] = score
        number = methods.index(run['method'])
        new = run['method'] not in left.get_legend_handles_labels()[1]
        style = dict(color=f'C{number}', label=run['method'] if new else None)
        for ax, points in ((left, loss), (right, scores)):
            steps = sorted(points)
            marker = '.' if len(steps) < 12 else ''
            ax.plot(steps, [points[x] for x in steps], marker, ls='-', **style)
    _label(left, 'iteration', 'training loss')
    _label(right, 'iteration', heading)
    return data_uri(Image.fromarray(to_array(figure)), 'PNG')


def sweep_figure(
    sweep: Mapping[str, Any], panels: Mapping[str, Mapping[str, pd.DataFrame]]
) -> bytes:
    """Each metric against the values of a sweep, a line for each mode.

    Args:
        sweep: ``values`` of each method, ``label`` and ``axis``: 'linear',
            'log' or 'category'.
        panels: By the panel's title, of each mode the table of means.
    """
    numbers = sweep['axis'] != 'category'
    values = [*sweep['values'].values()]
    places = values if numbers else range(len(values))
    at = dict(zip(sweep['values'], places, strict=True))
    size = 5.2, 3.1 * len(panels)
    figure = Figure(size, dpi=120, layout='constrained')
    axes = figure.subplots(len(panels), squeeze=False)[:, 0]
    for ax, (title, modes) in zip(axes, panels.items(), strict=True):
        for number, (mode, table) in enumerate(modes.items()):
            own = table[table.index.isin(at)].rename(at).sort_index()
            own = own.astype(dict(std=float))
            style: dict[str, Any] = dict(color=f'C{number}', label=mode)
            style |= dict(ls='-' if numbers else '', capsize=4, marker='o')
            ax.errorbar(own.index, own['mean'], own['std'], **style)
            if RANDOM in table.index:
                style = dict(color=f'C{number}', label=f'{mode}, random')
                ax.axhline(table['mean'][RANDOM], ls='--', **style)
        if sweep['axis'] == 'log':
            ax.set_xscale('log')
            ax.minorticks_off()
        ax.set_xticks([*places], [str(x) for x in values])
        _label(ax, sweep['label'], title)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png')
    return buffer.getvalue()


def examples(runs: Sequence[dict]) -> dict[str, list[str]]:
    """The same images for every method, beside the ground truth.

    Args:
        runs: One of each method.
    """
    folders = {x['method']: Path(x['folder'], 'predictions') for x in runs}
    folders = {k: x for k, x in folders.items() if any(x.glob('*_pred.png'))}
    found = [
        {x.name[:5] for x in f.glob('*_pred.png')} for f in folders.values()
    ]
    shared = sorted(set.intersection(*found))[:EXAMPLES] if found else []
    if not shared:
        return {}
    columns = {'ground truth': ([*folders.values()][0], 'gt')}
    columns |= {method: (x, 'pred') for method, x in folders.items()}
    return {
        name: [_embed(folder / f'{x}_{kind}.png') for x in shared]
        for name, (folder, kind) in columns.items()
    }


def _embed(path: Path) -> str:
    """Drawn anew, so that a page holds pixels and nothing else of a file."""
    try:
        with Image.open(path) as image:
            image = image.convert('RGB')
    except (OSError, ValueError, SyntaxError):
        return ''
    image.thumbnail(SIZE, Image.Resampling.LANCZOS)
    return data_uri(image, 'JPEG')
