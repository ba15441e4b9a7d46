# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Numbers worth watching during training, beside the losses.

mmengine sums every key of a step's output that contains "loss" into the
objective, so none of these does. Shares and accuracies are in percent.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .correspondence import Match, locate_positions, within_one_cell
from .distributed import mean_over_positives
from .modules import Features

if TYPE_CHECKING:
    from .losses import InfoNCEResult


def weighted_mean(x: Tensor, weight: Tensor | None) -> Tensor:
    """Mean over the entries by weight, bool or float; 0 where none counts."""
    x = x.float()
    if weight is None:
        return x.mean()
    total = weight.sum()
    return (x * weight).sum() / total.where(total > 0, 1)


@torch.no_grad()
def contrast_metrics(
    result: 'InfoNCEResult', weight: Tensor | None = None
) -> dict[str, Tensor]:
    """How well the positives stand out from the negatives.

    Args:
        result: Similarities of each row.
        weight: What rows, (M, ), or positives, (M, k), count.

    Returns:
        ``pos_sim``, mean cosine similarity to the positive; ``neg_sim``, mean
        of the hardest negative's; ``acc``, percentage of rows whose positive
        beats every negative. Several positives of a row are averaged first.
    """
    hardest = result.hardest_negative
    beaten = hardest if result.positive.dim() == 1 else hardest[:, None]
    correct = (result.positive > beaten).float()
    positive, rows = mean_over_positives(result.positive, weight)
    correct, _ = mean_over_positives(correct, weight)
    return dict(
        pos_sim=weighted_mean(positive, rows),
        neg_sim=weighted_mean(hardest, rows),
        acc=100 * weighted_mean(correct, rows),
    )


@torch.no_grad()
def feature_std(vectors: Tensor) -> Tensor:
    """Spread of normalised vectors (N, D): 1 if isotropic, 0 if collapsed.

    Standard deviation over the batch, averaged over channels, in units of
    the 1/sqrt(D) of directions drawn uniformly (SimSiam, section 4.1).
    """
    return vectors.std(dim=0, correction=0).mean() * vectors.size(1) ** 0.5


@torch.no_grad()
def position_r2(dense_proj: Tensor) -> Tensor:
    """Percentage of the variance that a vector's position alone explains.

    An analysis of variance of normalised vectors, (N, D, P), with the noise
    of the positions' means taken out, so that 0 is expected where the
    position means nothing. Near 100 the vectors tell where a cell lies and
    nothing of what it shows: zero padding lets a network know the position,
    and no pooled negative of DenseCL, being a mean over all positions, speaks
    against it. 0 for one image, where it is unknown.
    """
    dense_proj = dense_proj.float()
    means = dense_proj.mean(dim=0)
    within = (dense_proj - means).square().sum(dim=1).mean()
    between = (means - means.mean(dim=1, keepdim=True)).square().sum(0).mean()
    num_images = len(dense_proj)
    if num_images == 1:
        return torch.zeros_like(within)
    noise = within / (num_images - 1)
    # Differences below float32's precision are none.
    return (
        100
        * (between - noise).clamp(min=0)
        / (between + within).clamp(min=1e-6)
    )


@torch.no_grad()
def match_metrics(
    match: Match, query: Features, key: Features, views: Tensor | None
) -> dict[str, Tensor]:
    """What the matching rule picks.

    Args:
        match: Of each query cell; of several key cells the best counts.
        query: Query features.
        key: Key features.
        views: Crop coordinates, (N, 2, 5), or None.

    Returns:
        ``match_coverage``, distinct key cells picked as a percentage of the
        key's cells; ``match_acc``, only where views are known, percentage of
        matches within one cell of the true position in both directions, among
        query cells whose position the key shows; 0 if no views overlap.
    """
    index = match.best.index
    valid = match.best.valid
    num_cells = key.dense_proj.size(2)
    # Picks that do not count go to an extra bin.
    counted = index if valid is None else index.where(valid, num_cells)
    picked = index.new_zeros(len(index), num_cells + 1)
    picked.scatter_(1, counted, 1)
    metrics = dict(match_coverage=100 * picked[:, :num_cells].float().mean())
    if views is not None:
        truth = locate_positions(
            views[:, 0], views[:, 1], query.shape, key.shape
        )
        near = within_one_cell(index, truth, key.shape)
        counts = truth.inside if valid is None else truth.inside & valid
        metrics['match_acc'] = 100 * weighted_mean(near, counts)
    return metrics


@torch.no_grad()
def category_metrics(
    labels: Tensor,
    own: Tensor,
    predicted: Tensor,
    num_categories: int,
    weight: Tensor | None,
) -> dict[str, Tensor]:
    """Whether categories are in use, and whether the views agree on them.

    Args:
        labels: Category of every key point of the mini-batch, (G, ).
        own: Category of the key point of each anchor, (M, ).
        predicted: Category that the anchor itself is nearest to, (M, ).
        num_categories: How many there are, at least 2.
        weight: What each anchor counts, (M, ).

    Returns:
        All in percent. ``category_used``, categories that hold a point;
        ``category_entropy``, of the points' spread over the categories, 100
        if even; ``category_agreement``, anchors in the category of their key
        point.
    """
    categories = torch.arange(num_categories, device=labels.device)
    share = (labels[:, None] == categories).float().mean(dim=0)
    entropy = torch.special.entr(share).sum() / math.log(num_categories)
    return dict(
        category_used=100 * (share > 0).float().mean(),
        category_entropy=100 * entropy,
        category_agreement=100 * weighted_mean(predicted == own, weight),
    )
