# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Matches between two views, as lines."""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from mmdensecl.models.correspondence import (
    locate_positions,
    mutual_nearest_cells,
    within_one_cell,
)
from mmdensecl.models.modules import Features

RIGHT, WRONG, UNKNOWN = 'tab:green', 'tab:red', 'tab:blue'
SIMILARITY_COLORS = 'viridis'
FEW_MATCHES = 5  # fewer say nothing, even if all are right


class StrongMatches(NamedTuple):
    """The strongest mutual matches between two views of an image.

    Attributes:
        query: x and y of the query cells' centres as shares of the view,
            (M, 2).
        key: The same of the key cells, (M, 2).
        similarity: Cosine similarities, falling, (M, ).
        right: Whether they are within one cell of the true position, bool,
            (M, ); None where that is not known.
    """

    query: np.ndarray
    key: np.ndarray
    similarity: np.ndarray
    right: np.ndarray | None


def inner_cells(shape: tuple[int, int], margin: int) -> Tensor:
    """Indices of a grid's cells without ``margin`` rings; all if none remain.

    Args:
        shape: Height and width of the grid.
        margin: Rings to leave out.
    """
    index = torch.arange(shape[0] * shape[1]).view(shape)
    inner = index[margin : shape[0] - margin, margin : shape[1] - margin]
    return (inner if inner.numel() else index).flatten()


def _centres(index: Tensor, shape: tuple[int, int]) -> np.ndarray:
    row, column = index // shape[1], index % shape[1]
    centres = [(column + 0.5) / shape[1], (row + 0.5) / shape[0]]
    return torch.stack(centres, dim=1).cpu().numpy()


@torch.no_grad()
def strongest_matches(
    query: Features,
    key: Features,
    index: int,
    views: Tensor | None = None,
    top: int = 12,
    margin: int = 0,
    min_similarity: float = -1.0,
) -> StrongMatches:
    """Mutual nearest cells of one image by backbone features.

    Args:
        query: Of a batch.
        key: Of the same batch.
        index: Which image of the batch.
        views: Crop coordinates, (N, 2, 5).
        top: Number of matches at most.
        margin: Rings of outer cells to leave out: zero padding makes border
            cells alike whatever they show.
        min_similarity: Cosine similarity below which a match is left out.

    Returns:
        Strongest first.
    """
    one = slice(index, index + 1)
    q, k = query.backbone_feats[one], key.backbone_feats[one]  # (1, C, P)
    inner_q, inner_k = (
        inner_cells(x.shape, margin).to(q.device) for x in (query, key)
    )
    q, k = q[:, :, inner_q], k[:, :, inner_k]
    match = mutual_nearest_cells(q, k)
    similarity = torch.einsum('cp,cp->p', q[0], k[0][:, match.index[0]])
    assert match.valid is not None  # of mutual matches
    strong = match.valid[0] & (similarity >= min_similarity)
    similarity[~strong] = -torch.inf
    similarity, chosen = similarity.topk(min(top, int(strong.sum())))
    cells, partners = inner_q[chosen], inner_k[match.index[0, chosen]]
    right = None
    if views is not None:
        there = locate_positions(
            views[one, 0], views[one, 1], query.shape, key.shape
        )
        found = torch.zeros_like(there.inside, dtype=torch.long)
        found[0, cells] = partners
        near = within_one_cell(found, there, key.shape)
        right = near[0, cells].cpu().numpy()
    return StrongMatches(
        _centres(cells, query.shape),
        _centres(partners, key.shape),
        similarity.cpu().numpy(),
        right,
    )


def draw_matches(
    ax: Axes,
    query_view: Tensor,
    key_view: Tensor,
    matches: StrongMatches,
    scale: Normalize | None = None,
) -> None:
    """Two views side by side, a line for each match.

    Green lines are within one cell of the true position, red ones are not,
    blue ones cannot be checked; or the colour is the similarity.

    Args:
        ax: Where to draw.
        query_view: uint8, (3, H, W).
        key_view: uint8, (3, H, W).
        matches: From :func:`strongest_matches`.
        scale: Which similarities the colours mean; None for right and wrong.
    """
    height, width = query_view.shape[1:]
    key_height, key_width = key_view.shape[1:]
    shift = width + max(1, width // 16)
    canvas = torch.full(
        (3, max(height, key_height), shift + key_width), 255, dtype=torch.uint8
    )
    canvas[:, :height, :width] = query_view
    canvas[:, :key_height, shift:] = key_view
    ax.imshow(canvas.permute(1, 2, 0))
    ax.set_axis_off()
    start = matches.query * [width, height]
    end = matches.key * [key_width, key_height] + [shift, 0]
    colors = plt.get_cmap(SIMILARITY_COLORS)
    # The strongest on top.
    for i in reversed(range(len(start))):
        color = UNKNOWN
        if scale is not None:
            color = colors(scale(matches.similarity[i]))
        elif matches.right is not None:
            color = RIGHT if matches.right[i] else WRONG
        ax.plot(
            *zip(start[i], end[i], strict=True),
            color=color,
            linewidth=1.4,
            marker='o',
            markersize=4,
            markeredgecolor='white',
            markeredgewidth=0.6,
        )


def similarity_scale(matches: Sequence[StrongMatches]) -> Normalize:
    """One scale of colours for several panels."""
    values = np.concatenate([x.similarity for x in matches])
    return Normalize(*(values.min(), values.max()) if len(values) else (0, 1))


def similarity_bar(
    figure: Figure, scale: Normalize, axes: Sequence[Axes]
) -> None:
    """Explain the colours of similarities, beside the axes."""
    figure.colorbar(
        ScalarMappable(scale, SIMILARITY_COLORS),
        ax=axes,
        label='cosine similarity',
        shrink=0.8,
    )


def legend(figure: Figure, unknown: bool = True) -> None:
    """Explain the colours, below the axes.

    Args:
        figure: Of constrained layout.
        unknown: Whether some lines cannot be checked.
    """
    meanings = {
        RIGHT: 'within one cell of the true position',
        WRONG: 'elsewhere, or nowhere in the other view',
    }
    if unknown:
        meanings[UNKNOWN] = 'not known'
    handles = [
        plt.Line2D([], [], color=color, marker='o', label=label)
        for color, label in meanings.items()
    ]
    figure.legend(
        handles=handles, loc='outside lower center', ncols=3, frameon=False
    )


class Panel(NamedTuple):
    """Two views and their matches.

    Attributes:
        name: Above them.
        query_view: uint8, (3, H, W).
        key_view: uint8, (3, H, W).
        matches: From :func:`strongest_matches`.
    """

    name: str
    query_view: Tensor
    key_view: Tensor
    matches: StrongMatches


def match_sheet(rows: Sequence[Sequence[Panel]], title: str) -> Figure:
    """Draw panels of matches, and count those that are right.

    Args:
        rows: Of the same length. Where it is not known which matches are
            right, the colour is the similarity.
        title: Above all.
    """
    size = 5.2 * len(rows[0]), 2.8 * len(rows) + 0.6
    figure = Figure(size, layout='constrained')
    grid = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    axes = [*grid.flat]
    panels = [panel for row in rows for panel in row]
    scale = None
    if any(x.matches.right is None for x in panels):
        scale = similarity_scale([x.matches for x in panels])
    for ax, (name, query, key, matches) in zip(axes, panels, strict=True):
        draw_matches(ax, query, key, matches, scale)
        count, right = len(matches.similarity), matches.right
        words = (
            f'{count} matches'
            if right is None
            else (f'{right.sum()} of {count} right')
        )
        if count < FEW_MATCHES:
            words += ', too few to tell'
        else:
            words += f', similarity {matches.similarity.mean():.2f}'
        ax.set_title(f'{name}: {words}', fontsize=10, parse_math=False)
    if scale is None:
        legend(figure, unknown=False)
    else:
        similarity_bar(figure, scale, axes)
    figure.suptitle(title)
    return figure
