# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Numbers worth watching during training, beside the losses.

mmengine sums every key of a step's output that contains "loss" into the
objective, so none of these does. Shares and accuracies are in percent.
"""
from typing import TYPE_CHECKING, Dict, Optional

import torch
from torch import Tensor

from .correspondence import Match
from .features import Features
from .geometry import locate_cells, within_one_cell

if TYPE_CHECKING:
    from .losses import InfoNCEResult


def masked_mean(x: Tensor, mask: Optional[Tensor]) -> Tensor:
    """Mean over the entries that count; 0 where none does."""
    x = x.float()
    if mask is None:
        return x.mean()
    return (x * mask).sum() / mask.sum().clamp(min=1)


@torch.no_grad()
def contrast_monitors(result: 'InfoNCEResult',
                      valid: Optional[Tensor] = None) -> Dict[str, Tensor]:
    """How well the positives stand out from the negatives.

    Args:
        result (InfoNCEResult): Similarities of each row.
        valid (Tensor, optional): Rows that count, bool, (M, ).

    Returns:
        dict[str, Tensor]: ``pos_sim``, mean cosine similarity to the positive;
        ``neg_sim``, mean of the hardest negative's; ``acc``, percentage of
        rows whose positive beats every negative.
    """
    right = result.positive > result.hardest_negative
    return dict(
        pos_sim=masked_mean(result.positive, valid),
        neg_sim=masked_mean(result.hardest_negative, valid),
        acc=100 * masked_mean(right, valid))


@torch.no_grad()
def feature_std(vector: Tensor) -> Tensor:
    """Spread of normalised vectors: 1 if isotropic, 0 if collapsed.

    Standard deviation over the batch, averaged over channels, in units of
    the 1/sqrt(D) of directions drawn uniformly (SimSiam, section 4.1).

    Args:
        vector (Tensor): Normalised vectors, (N, D).

    Returns:
        Tensor: A 0-d tensor.
    """
    return vector.std(dim=0, correction=0).mean() * vector.size(1)**0.5


@torch.no_grad()
def position_share(grid: Tensor) -> Tensor:
    """How far the place of a cell alone says what its vector is.

    The variance between places as a percentage of the whole (an analysis of
    variance with the noise of the places' means taken out, so that 0 is
    expected where the place means nothing). Near 100 the vectors tell where a
    cell lies and nothing of what it shows: zero padding lets a network know
    the place, and no negative of DenseCL, being a mean over all places, speaks
    against it.

    Args:
        grid (Tensor): Normalised vectors, (N, D, P).

    Returns:
        Tensor: A 0-d tensor; 0 also if all vectors are the same, if there is
        one place, and for one picture, of which nobody can tell.
    """
    grid = grid.float()
    places = grid.mean(dim=0)
    within = (grid - places).square().sum(dim=1).mean()
    between = (places -
               places.mean(dim=1, keepdim=True)).square().sum(0).mean()
    pictures = len(grid)
    if pictures == 1:
        return torch.zeros_like(within)
    noise = within / (pictures - 1)
    # Differences below float32's precision are none.
    return 100 * (between - noise).clamp(min=0) / (between +
                                                   within).clamp(min=1e-6)


@torch.no_grad()
def match_monitors(match: Match, query: Features, key: Features,
                   views: Optional[Tensor]) -> Dict[str, Tensor]:
    """What the matching rule picks.

    Args:
        match (Match): Key cell of each query cell, (N, P).
        query (Features): Query features.
        key (Features): Key features.
        views (Tensor, optional): Crop coordinates, (N, 2, 5).

    Returns:
        dict[str, Tensor]: ``match_distinct``, distinct key cells picked as a
        percentage of the key's cells (100 / P if all query cells pick the
        same); ``match_right``, percentage of matches within one cell of the
        true spot in both directions, among query cells whose spot the key
        shows, only where views are known; 0 if no views overlap.
    """
    index, valid = match.index, match.valid
    cells = key.grid.size(2)
    # Picks that do not count go to an extra bin.
    counted = index if valid is None else index.where(valid, cells)
    picked = index.new_zeros(len(index), cells + 1)
    picked.scatter_(1, counted, 1)
    monitors = dict(match_distinct=100 * picked[:, :cells].float().mean())
    if views is not None:
        there = locate_cells(views[:, 0], views[:, 1], query.shape, key.shape)
        near = within_one_cell(index, there, key.shape)
        counts = there.inside if valid is None else there.inside & valid
        monitors['match_right'] = 100 * masked_mean(near, counts)
    return monitors
