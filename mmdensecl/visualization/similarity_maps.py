# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Similarity of chosen cells of one view to all cells of another."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import FigureBase
from torch import Tensor

from mmdensecl.models.correspondence import locate_positions
from mmdensecl.models.modules import Features

HEAT = 'inferno'
MARK = 'deepskyblue'

Cell = tuple[int, int]  # row, column


def spread_cells(shape: tuple[int, int], count: int) -> list[Cell]:
    """Evenly spaced cells of a grid.

    Args:
        shape: Height and width of the grid.
        count: How many in each direction, at most as there are.
    """
    rows, columns = (
        ((np.arange(n) + 0.5) * side / n).astype(int)
        for side, n in ((x, min(count, x)) for x in shape)
    )
    return [(int(r), int(c)) for r in rows for c in columns]


def similarity_maps(
    query: Features, key: Features, cells: Sequence[Cell]
) -> Tensor:
    """Cosine similarity of chosen query cells to every key cell.

    Args:
        query: Of one image.
        key: Of one image.
        cells: Rows and columns of the query.

    Returns:
        (len(cells), h, w).
    """
    chosen = [row * query.shape[1] + column for row, column in cells]
    maps = query.backbone_feats[0][:, chosen].t() @ key.backbone_feats[0]
    return maps.view(-1, *key.shape).cpu()


def shared_scale(maps: Sequence[Tensor]) -> Normalize:
    """One scale of colours for the maps of several backbones."""
    low = min(float(x.min()) for x in maps)
    return Normalize(low, max(float(x.max()) for x in maps))


def draw_similarity_maps(
    figure: FigureBase,
    query_view: Tensor,
    key_view: Tensor,
    cells: Sequence[Cell],
    query_shape: tuple[int, int],
    maps: Tensor,
    views: Tensor | None = None,
    scale: Normalize | None = None,
) -> None:
    """The query with numbered cells, and over the key a map for each.

    A circle is the most similar cell; a cross is the true position, where it
    is known and the key shows it.

    Args:
        figure: A figure, or a part of one, of its own.
        query_view: uint8, (3, H, W).
        key_view: uint8, (3, H, W).
        cells: Rows and columns of the query.
        query_shape: Height and width of the query's grid.
        maps: From :func:`similarity_maps`.
        views: Crop coordinates, (2, 5).
        scale: From :func:`shared_scale`; None for one of these maps alone.
    """
    scale = scale or shared_scale([maps])
    count = int(np.ceil(np.sqrt(len(cells))))
    parts: Any = figure.subfigures(1, 2, width_ratios=(1, 1.4))
    left, right = parts
    _draw_cells(left.subplots(), query_view, cells, query_shape)
    axes = right.subplots(-(-len(cells) // count), count, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    there, (rows, columns) = None, maps.shape[1:]
    if views is not None:
        there = locate_positions(
            views[None, 0], views[None, 1], query_shape, (rows, columns)
        )
    grey = key_view.float().mean(dim=0)
    extent = (-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5)
    to_pixels = np.divide(grey.shape, maps.shape[1:])
    mark = dict(markersize=7, markeredgewidth=1.5)
    for i, (ax, heat) in enumerate(zip(axes.flat, maps, strict=False)):
        ax.imshow(grey, cmap='gray')
        ax.imshow(heat, cmap=HEAT, norm=scale, alpha=0.65, extent=extent)
        ax.set_title(f'cell {i + 1}', fontsize=8, pad=2)
        best = divmod(int(heat.argmax()), heat.shape[1])
        y, x = (np.array(best) + 0.5) * to_pixels
        ax.plot(x, y, 'o', color='none', markeredgecolor=MARK, **mark)
        cell = cells[i][0] * query_shape[1] + cells[i][1]
        if there is not None and there.inside[0, cell]:
            true = float(there.row[0, cell]), float(there.column[0, cell])
            y, x = (np.array(true) + 0.5) * to_pixels
            ax.plot(x, y, 'x', color='white', **mark)
    right.colorbar(
        ScalarMappable(scale, HEAT),
        ax=axes,
        label='cosine similarity to the query cell',
        shrink=0.8,
    )


def _draw_cells(
    ax: Axes, view: Tensor, cells: Sequence[Cell], shape: tuple[int, int]
) -> None:
    """The query view with its numbered cells."""
    ax.imshow(view.permute(1, 2, 0))
    ax.set_axis_off()
    ax.set_title('query view, its cells', fontsize=9)
    height, width = view.shape[1] / shape[0], view.shape[2] / shape[1]
    box = dict(boxstyle='round,pad=0.15', fc='black', ec='none', alpha=0.6)
    middle: dict = dict(ha='center', va='center', weight='bold', fontsize=8)
    for number, (row, column) in enumerate(cells, 1):
        x, y = column * width, row * height
        ax.add_patch(
            plt.Rectangle(
                (x, y), width, height, fill=False, ec=MARK, linewidth=1.5
            )
        )
        x, y = x + width / 2, y + height / 2
        ax.text(x, y, str(number), color='white', bbox=box, **middle)
