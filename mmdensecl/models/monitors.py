# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Numbers worth watching during training, beside the losses.

mmengine sums every key of a step's output that contains "loss" into the
objective, so none of these does. Shares and accuracies are in percent.
"""
import math
from typing import TYPE_CHECKING, Dict, Optional

import torch
from torch import Tensor

from .correspondence import Match
from .features import Features
from .geometry import locate_cells, within_one_cell
from .row_means import mean_over_positives

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
        valid (Tensor, optional): Rows that count, bool, (M, ), or positives
            that do, (M, k).

    Returns:
        dict[str, Tensor]: ``pos_sim``, mean cosine similarity to the positive;
        ``neg_sim``, mean of the hardest negative's; ``acc``, percentage of
        rows whose positive beats every negative. Of several positives of a
        row the mean is taken first.
    """
    hardest = result.hardest_negative
    beaten = hardest if result.positive.dim() == 1 else hardest[:, None]
    right = (result.positive > beaten).float()
    positive, rows = mean_over_positives(result.positive, valid)
    right, _ = mean_over_positives(right, valid)
    return dict(
        pos_sim=masked_mean(positive, rows),
        neg_sim=masked_mean(hardest, rows),
        acc=100 * masked_mean(right, rows))


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
        match (Match): Of each query cell; of several key cells the best
            counts.
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
    index, valid = match.best
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


@torch.no_grad()
def category_monitors(labels: Tensor, own: Tensor, found: Tensor,
                      num_categories: int,
                      valid: Optional[Tensor]) -> Dict[str, Tensor]:
    """Whether categories are in use, and whether the views agree on them.

    Args:
        labels (Tensor): Category of every key point of the mini-batch, (G, ).
        own (Tensor): Category of the key point of each anchor, (M, ).
        found (Tensor): Category that the anchor itself is nearest to, (M, ).
        num_categories (int): How many there are, at least 2.
        valid (Tensor, optional): Anchors that count, bool, (M, ).

    Returns:
        dict[str, Tensor]: All in percent. ``category_used``, categories that
        hold a point; ``category_entropy``, entropy of the points' spread over
        the categories, 100 if all hold as many, 0 if one holds them all;
        ``category_agreement``, anchors of the category of their key point.
    """
    categories = torch.arange(num_categories, device=labels.device)
    share = (labels[:, None] == categories).float().mean(dim=0)
    entropy = torch.special.entr(share).sum() / math.log(num_categories)
    return dict(
        category_used=100 * (share > 0).float().mean(),
        category_entropy=100 * entropy,
        category_agreement=100 * masked_mean(found == own, valid))
