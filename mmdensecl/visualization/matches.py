# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from typing import NamedTuple, Optional, Sequence, Tuple

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from torch import Tensor

from mmdensecl.models.correspondence import mutual_nearest_cells
from mmdensecl.models.modules import Features
from mmdensecl.models.correspondence import locate_positions, within_one_cell

RIGHT, WRONG, UNKNOWN = 'tab:green', 'tab:red', 'tab:blue'
SIMILARITY_COLORS = 'viridis'


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


def inner_cells(shape: Tuple[int, int], margin: int) -> Tensor:
    """Cells of a grid without its outer rings; all if none were left.

    Args:
        shape (tuple[int, int]): Height and width of the grid.
        margin (int): Rings to leave out.

    Returns:
        Tensor: Indices, rising, (P, ).
    """
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
                      margin: int = 0,
                      min_similarity: float = -1.) -> StrongMatches:
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
        min_similarity (float): Cosine similarity below which a match is left
            out. Defaults to -1.

    Returns:
        StrongMatches: Strongest first.
    """
    one = slice(index, index + 1)
    inner_q = inner_cells(query.shape, margin).to(query.backbone_feats.device)
    inner_k = inner_cells(key.shape, margin).to(key.backbone_feats.device)
    q, k = query.backbone_feats[one][:, :, inner_q], key.backbone_feats[one][:, :, inner_k]
    match = mutual_nearest_cells(q, k)
    similarity = torch.einsum('cp,cp->p', q[0], k[0][:, match.index[0]])
    strong = match.valid[0] & (similarity >= min_similarity)
    similarity[~strong] = -torch.inf
    top = min(top, int(strong.sum()))
    similarity, chosen = similarity.topk(top)
    cells, partners = inner_q[chosen], inner_k[match.index[0, chosen]]
    right = None
    if views is not None:
        there = locate_positions(views[one, 0], views[one, 1], query.shape,
                             key.shape)
        index = torch.zeros_like(there.inside, dtype=torch.long)
        index[0, cells] = partners
        near = within_one_cell(index, there, key.shape)
        right = near[0, cells].cpu().numpy()
    return StrongMatches(
        _centres(cells, query.shape), _centres(partners, key.shape),
        similarity.cpu().numpy(), right)


def draw_matches(ax: Axes,
                 query_view: Tensor,
                 key_view: Tensor,
                 matches: StrongMatches,
                 scale: Optional[Normalize] = None) -> None:
    """Two views side by side, a line for each match.

    Green lines are within one cell of the true spot, red ones are not, blue
    ones cannot be checked; or the colour is the similarity.

    Args:
        ax (Axes): Where to draw.
        query_view (Tensor): uint8, (3, H, W).
        key_view (Tensor): uint8, (3, H, W).
        matches (StrongMatches): From :func:`strongest_matches`.
        scale (Normalize, optional): Which similarities the colours mean.
            Defaults to None: right and wrong.
    """
    (height, width), (key_height, key_width) = (
        x.shape[1:] for x in (query_view, key_view))
    gap = max(1, width // 16)
    canvas = torch.full((3, max(height, key_height), width + gap + key_width),
                        255,
                        dtype=torch.uint8)
    canvas[:, :height, :width] = query_view
    canvas[:, :key_height, width + gap:] = key_view
    ax.imshow(canvas.permute(1, 2, 0))
    ax.set_axis_off()
    start = matches.query * [width, height]
    end = matches.key * [key_width, key_height] + [width + gap, 0]
    colors = plt.get_cmap(SIMILARITY_COLORS)
    # The strongest on top.
    for i in reversed(range(len(start))):
        color = UNKNOWN
        if scale is not None:
            color = colors(scale(matches.similarity[i]))
        elif matches.right is not None:
            color = RIGHT if matches.right[i] else WRONG
        ax.plot(
            *zip(start[i], end[i]),
            color=color,
            linewidth=1.4,
            marker='o',
            markersize=4,
            markeredgecolor='white',
            markeredgewidth=0.6)


def similarity_scale(matches: Sequence[StrongMatches]) -> Normalize:
    """One scale of colours for several panels.

    Args:
        matches (Sequence[StrongMatches]): What they draw.
    """
    values = np.concatenate([x.similarity for x in matches])
    if not len(values):
        return Normalize(0, 1)
    return Normalize(values.min(), values.max())


def similarity_bar(figure: plt.Figure, scale: Normalize,
                   axes: Sequence[Axes]) -> None:
    """Say which similarities the colours mean, beside the axes."""
    figure.colorbar(
        ScalarMappable(scale, SIMILARITY_COLORS),
        ax=axes,
        label='cosine similarity',
        shrink=0.8)


def legend(figure: plt.Figure, unknown: bool = True) -> None:
    """Say what the colours mean, below the axes.

    Args:
        figure (plt.Figure): Of constrained layout.
        unknown (bool): Whether some lines cannot be checked. Defaults to
            True.
    """
    meanings = {
        RIGHT: 'within one cell of the true spot',
        WRONG: 'elsewhere, or nowhere in the other view',
        UNKNOWN: 'not known'
    }
    handles = [
        plt.Line2D([], [], color=color, marker='o', label=label)
        for color, label in meanings.items() if unknown or color != UNKNOWN
    ]
    figure.legend(
        handles=handles, loc='outside lower center', ncols=3, frameon=False)
