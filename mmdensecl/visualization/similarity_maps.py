# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from typing import List, Optional, Sequence, Tuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import FigureBase
from torch import Tensor

from mmdensecl.models.modules import Features
from mmdensecl.models.correspondence import locate_positions

HEAT = 'inferno'
MARK = 'deepskyblue'

Cell = Tuple[int, int]  # row, column


def spread_cells(shape: Tuple[int, int], count: int) -> List[Cell]:
    """Evenly spaced cells of a grid.

    Args:
        shape (tuple[int, int]): Height and width of the grid.
        count (int): How many in each direction, at most as there are.

    Returns:
        list[tuple[int, int]]: Rows and columns.
    """
    rows, columns = (((np.arange(n) + 0.5) * side / n).astype(int)
                     for side, n in ((x, min(count, x)) for x in shape))
    return [(int(r), int(c)) for r in rows for c in columns]


def similarity_maps(query: Features, key: Features,
                    cells: Sequence[Cell]) -> Tensor:
    """Cosine similarity of chosen query cells to every key cell.

    Args:
        query (Features): Of one picture, with ``cells``.
        key (Features): Of one picture, with ``cells``.
        cells (Sequence[tuple[int, int]]): Rows and columns of the query.

    Returns:
        Tensor: (len(cells), h, w).
    """
    chosen = [row * query.shape[1] + column for row, column in cells]
    maps = query.backbone_feats[0][:, chosen].t() @ key.backbone_feats[0]
    return maps.view(-1, *key.shape).cpu()


def draw_similarity_maps(figure: FigureBase,
                         query_view: Tensor,
                         key_view: Tensor,
                         cells: Sequence[Cell],
                         query_shape: Tuple[int, int],
                         maps: Tensor,
                         views: Optional[Tensor] = None) -> None:
    """The query with numbered cells, and over the key a map for each.

    A circle is the most similar cell; a cross is the true spot, where it is
    known and the key shows it.

    Args:
        figure (FigureBase): A figure, or a part of one, of its own.
        query_view (Tensor): uint8, (3, H, W).
        key_view (Tensor): uint8, (3, H, W).
        cells (Sequence[tuple[int, int]]): Rows and columns of the query.
        query_shape (tuple[int, int]): Height and width of the query's grid.
        maps (Tensor): From :func:`similarity_maps`.
        views (Tensor, optional): Crop coordinates, (2, 5). Defaults to None.
    """
    columns = int(np.ceil(np.sqrt(len(cells))))
    rows = -(-len(cells) // columns)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.4))
    ax = left.subplots()
    ax.imshow(query_view.permute(1, 2, 0))
    ax.set_axis_off()
    ax.set_title('query view, its cells', fontsize=9)
    height, width = (a / b for a, b in zip(query_view.shape[1:], query_shape))
    for number, (row, column) in enumerate(cells, 1):
        ax.add_patch(
            plt.Rectangle((column * width, row * height),
                          width,
                          height,
                          fill=False,
                          edgecolor=MARK,
                          linewidth=1.5))
        ax.text(
            (column + 0.5) * width, (row + 0.5) * height,
            str(number),
            color='white',
            fontsize=8,
            weight='bold',
            ha='center',
            va='center',
            bbox=dict(
                boxstyle='round,pad=0.15', fc='black', ec='none', alpha=0.6))
    there = None
    if views is not None:
        there = locate_positions(views[None, 0], views[None, 1], query_shape,
                             maps.shape[1:])
    scale = Normalize(float(maps.min()), float(maps.max()))
    grey = key_view.float().mean(dim=0)
    extent = (-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5)
    axes = right.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    to_pixels = np.array(
        [grey.shape[1] / maps.shape[2], grey.shape[0] / maps.shape[1]])
    for number, (ax, heat) in enumerate(zip(axes.flat, maps)):
        ax.imshow(grey, cmap='gray')
        ax.imshow(heat, cmap=HEAT, norm=scale, alpha=0.65, extent=extent)
        ax.set_title(f'cell {number + 1}', fontsize=8, pad=2)
        best = divmod(int(heat.argmax()), heat.shape[1])[::-1]
        ax.plot(
            *((np.array(best) + 0.5) * to_pixels),
            'o',
            color='none',
            markeredgecolor=MARK,
            markersize=7,
            markeredgewidth=1.5)
        if there is None:
            continue
        row, column = cells[number]
        cell = row * query_shape[1] + column
        if there.inside[0, cell]:
            spot = torch.stack([there.column[0, cell], there.row[0, cell]])
            ax.plot(
                *((spot.numpy() + 0.5) * to_pixels),
                'x',
                color='white',
                markersize=7,
                markeredgewidth=1.8)
    right.colorbar(
        ScalarMappable(scale, HEAT),
        ax=axes,
        label='cosine similarity to the query cell',
        shrink=0.8)
