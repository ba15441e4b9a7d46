# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from typing import NamedTuple, Optional, Tuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from mmdensecl.models.correspondence import mutual_nearest_cells
from mmdensecl.models.features import Features
from mmdensecl.models.geometry import locate_cells, within_one_cell

RIGHT, WRONG, UNKNOWN = 'tab:green', 'tab:red', 'tab:blue'


class StrongMatches(NamedTuple):
    """The strongest mutual matches between two views of one picture.

    Attributes:
        query (np.ndarray): x and y of the query cells' centres as shares of
            the view, (M, 2).
        key (np.ndarray): The same of the key cells, (M, 2).
        similarity (np.ndarray): Cosine similarities, falling, (M, ).
        right (np.ndarray, optional): Whether they are within one cell of the
            true spot, bool, (M, ); None where the truth is not known.
    """
    query: np.ndarray
    key: np.ndarray
    similarity: np.ndarray
    right: Optional[np.ndarray]


def _inner_cells(shape: Tuple[int, int], margin: int) -> Tensor:
    index = torch.arange(shape[0] * shape[1]).view(shape)
    inner = index[margin:shape[0] - margin, margin:shape[1] - margin]
    return (inner if inner.numel() else index).flatten()


def _centres(index: Tensor, shape: Tuple[int, int]) -> np.ndarray:
    row = torch.div(index, shape[1], rounding_mode='floor')
    column = index % shape[1]
    return torch.stack([(column + 0.5) / shape[1], (row + 0.5) / shape[0]],
                       dim=1).cpu().numpy()


@torch.no_grad()
def strongest_matches(query: Features,
                      key: Features,
                      index: int,
                      views: Optional[Tensor] = None,
                      top: int = 12,
                      margin: int = 0) -> StrongMatches:
    """Mutual nearest cells of one picture by backbone features.

    Args:
        query (Features): Query features with ``cells``, of a batch.
        key (Features): Key features with ``cells``, of the same batch.
        index (int): Which picture of the batch.
        views (Tensor, optional): Crop coordinates, (N, 2, 5). Defaults to
            None.
        top (int): How many to keep at most. Defaults to 12.
        margin (int): Rings of outer cells to leave out. Zero padding makes
            border cells alike whatever they show. Defaults to 0.

    Returns:
        StrongMatches: Strongest first.
    """
    one = slice(index, index + 1)
    inner_q = _inner_cells(query.shape, margin).to(query.cells.device)
    inner_k = _inner_cells(key.shape, margin).to(key.cells.device)
    q, k = query.cells[one][:, :, inner_q], key.cells[one][:, :, inner_k]
    match = mutual_nearest_cells(q, k)
    similarity = torch.einsum('cp,cp->p', q[0], k[0][:, match.index[0]])
    similarity[~match.valid[0]] = -torch.inf
    top = min(top, int(match.valid.sum()))
    similarity, chosen = similarity.topk(top)
    cells, partners = inner_q[chosen], inner_k[match.index[0, chosen]]
    right = None
    if views is not None:
        there = locate_cells(views[one, 0], views[one, 1], query.shape,
                             key.shape)
        index = torch.zeros_like(there.inside, dtype=torch.long)
        index[0, cells] = partners
        near = within_one_cell(index, there, key.shape)
        right = near[0, cells].cpu().numpy()
    return StrongMatches(
        _centres(cells, query.shape), _centres(partners, key.shape),
        similarity.cpu().numpy(), right)


def draw_matches(ax: Axes, query_view: Tensor, key_view: Tensor,
                 matches: StrongMatches) -> None:
    """Two views side by side, a line for each match.

    Green lines are within one cell of the true spot, red ones are not, blue
    ones cannot be checked.

    Args:
        ax (Axes): Where to draw.
        query_view (Tensor): uint8, (3, H, W).
        key_view (Tensor): uint8, (3, H, W).
        matches (StrongMatches): From :func:`strongest_matches`.
    """
    height, width = query_view.shape[1:]
    gap = torch.full((3, height, max(1, width // 16)), 255, dtype=torch.uint8)
    ax.imshow(torch.cat([query_view, gap, key_view], 2).permute(1, 2, 0))
    ax.set_axis_off()
    scale = np.array([width, height])
    start = matches.query * scale
    end = matches.key * scale + [width + gap.shape[2], 0]
    for i, (a, b) in enumerate(zip(start, end)):
        color = UNKNOWN
        if matches.right is not None:
            color = RIGHT if matches.right[i] else WRONG
        ax.plot([a[0], b[0]], [a[1], b[1]],
                color=color,
                linewidth=1.4,
                marker='o',
                markersize=4,
                markeredgecolor='white',
                markeredgewidth=0.6)


def legend(figure: plt.Figure) -> None:
    """Say what the colours mean, below the axes."""
    handles = [
        plt.Line2D([], [], color=color, marker='o', label=label)
        for color, label in ((RIGHT, 'within one cell of the true spot'),
                             (WRONG, 'elsewhere'), (UNKNOWN, 'not known'))
    ]
    figure.legend(
        handles=handles, loc='outside lower center', ncols=3, frameon=False)
