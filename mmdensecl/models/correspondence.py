# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Correspondence: which key cells are the positives of each query cell.

The maths is in functions; a rule is a small class that picks what they look
at. A new rule is a subclass of :class:`MatchingRule`, registered in
``TASK_UTILS`` and named in a config: ``correspondence=dict(type='...')``.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from mmdensecl.registry import TASK_UTILS

from .clustering import sinkhorn
from .distributed import to_device
from .modules import Features, check_at_least, check_positive

# Crop coordinates of both views, (N, 2, 5), where the data carries them: left,
# top, width and height of a crop in pixels of the source image, and 1 if it
# was mirrored, else 0.
Views: TypeAlias = Tensor | None


class Match(NamedTuple):
    """The key cell, or the key cells, of each query cell.

    Attributes:
        index: Index into the key's cells, long, (N, P); of a rule with
            several positives (N, P, k), best first.
        weight: What each counts in the dense loss, bool or a float of at
            least 0, of the shape of ``index``. None means 1.
    """

    index: Tensor  # type: ignore[assignment]  # hides the tuple's method
    weight: Tensor | None = None

    @property
    def valid(self) -> Tensor | None:
        """Which matches count at all, bool, or None for all."""
        return None if self.weight is None else self.weight > 0

    @property
    def best(self) -> 'Match':
        """The first key cell of each query cell alone, (N, P)."""
        if self.index.dim() == 2:
            return self
        weight = None if self.weight is None else self.weight[..., 0]
        return Match(self.index[..., 0], weight)


def similarities(query: Tensor, key: Tensor) -> Tensor:
    """Dot products of all pairs: (N, C, P), (N, C, R) -> (N, P, R)."""
    return torch.bmm(query.transpose(1, 2), key)


def nearest_cells(query: Tensor, key: Tensor) -> Tensor:
    """Most similar key cell of every query cell (DenseCL, eq. 4).

    One-way, without a threshold. The length of a query cell cannot change
    which key is nearest, so only the key must be normalised.

    Args:
        query: Query cells, (N, C, P).
        key: Key cells, normalised over channels, (N, C, R).

    Returns:
        Indices in 0..R-1, (N, P).
    """
    return similarities(query, key).argmax(dim=2)


def mutual_nearest_cells(query: Tensor, key: Tensor) -> Match:
    """Nearest key cells, valid where the key cell's nearest is the query.

    Both normalised, (N, C, P) and (N, C, R). Each image has at least one such
    pair, its most similar.
    """
    similarity = similarities(query, key)  # (N, P, R)
    index = similarity.argmax(dim=2)  # (N, P)
    back = similarity.argmax(dim=1).gather(1, index)  # (N, R) -> (N, P)
    return Match(index, back == torch.arange(index.size(1), device=key.device))


class KeyPositions(NamedTuple):
    """True positions of query cells in the key's grid."""

    column: Tensor  # fractional, (N, P); column c has its centre at c
    row: Tensor  # fractional, (N, P)
    inside: Tensor  # whether the key's crop shows that point, bool, (N, P)


def stack_views(
    data_samples: Sequence | None, device: torch.device
) -> Tensor | None:
    """The two views of each sample as one tensor; None if one has none.

    Args:
        data_samples: Samples that carry ``views``, two rows of five numbers,
            as :class:`mmdensecl.datasets.PackViews` writes them.
        device: Where the tensor goes.
    """
    if not data_samples or not all('views' in s for s in data_samples):
        return None
    views = torch.tensor([s.views for s in data_samples], dtype=torch.float32)
    return to_device(views, device)


def locate_positions(
    query_view: Tensor,
    key_view: Tensor,
    query_shape: tuple[int, int],
    key_shape: tuple[int, int],
) -> KeyPositions:
    """Find the centres of the query's cells in the key's grid.

    From the crops (N, 5) of both views, see `Views`, and height and width of
    their grids.
    """
    height, width = query_shape
    x = (torch.arange(width, device=query_view.device) + 0.5) / width
    y = (torch.arange(height, device=query_view.device) + 0.5) / height
    y, x = (a.flatten() for a in torch.meshgrid(y, x, indexing='ij'))
    # In the query crop (0..1) -> source pixels -> in the key crop (0..1).
    left, top, w, h, flip = query_view[:, :, None].unbind(1)
    x, y = left + torch.where(flip > 0, 1 - x, x) * w, top + y * h
    left, top, w, h, flip = key_view[:, :, None].unbind(1)
    x, y = (x - left) / w, (y - top) / h
    inside = (x >= 0) & (x < 1) & (y >= 0) & (y < 1)
    x = torch.where(flip > 0, 1 - x, x)
    height, width = key_shape
    return KeyPositions(x * width - 0.5, y * height - 0.5, inside)


def within_one_cell(
    index: Tensor, truth: KeyPositions, key_shape: tuple[int, int]
) -> Tensor:
    """Whether matched cells (N, P) lie at most one cell from the truth.

    False where the key does not show the position.
    """
    row = torch.div(index, key_shape[1], rounding_mode='floor')
    column = index % key_shape[1]
    return (
        truth.inside
        & ((row - truth.row).abs() <= 1)
        & ((column - truth.column).abs() <= 1)
    )


class MatchingRule:
    """Interface of a matching rule.

    Attributes:
        reads_backbone: Whether it looks at ``Features.backbone_feats``; where
            not, the ranks need not exchange them.
    """

    reads_backbone = True

    def __call__(self, query: Features, key: Features, views: Views) -> Match:
        """Match the cells of N pairs of views."""
        raise NotImplementedError


@TASK_UTILS.register_module()
class BackboneSimilarity(MatchingRule):
    """Nearest cell by backbone features: DenseCL's rule and our default.

    Args:
        weight_power: Matches count by their cosine similarity to this power
            (negative ones not at all), after PixCon (WACV 2024). At 0 all
            count the same, as published.
    """

    def __init__(self, weight_power: float = 0.0) -> None:
        check_at_least(0, weight_power=weight_power)
        self.weight_power = weight_power

    def __call__(self, query: Features, key: Features, views: Views) -> Match:
        cells = query.backbone_feats, key.backbone_feats
        if not self.weight_power:
            return Match(nearest_cells(*cells))
        similarity, index = similarities(*cells).max(dim=2)
        return Match(index, similarity.clamp(min=0) ** self.weight_power)


@TASK_UTILS.register_module()
class BalancedSimilarity(MatchingRule):
    """Best cell by backbone features when no key cell may be crowded.

    The similarities of an image become an assignment in which all key cells
    get as much (Sinkhorn-Knopp), and each query cell takes its largest share.
    A remedy against matches that crowd on few cells, ours, not published.

    Args:
        epsilon: Softness of the assignment; the default is SwAV's.
        num_iters: Iterations of Sinkhorn-Knopp; the default is SwAV's.
    """

    def __init__(self, epsilon: float = 0.05, num_iters: int = 3) -> None:
        check_positive(epsilon=epsilon)
        check_at_least(1, num_iters=num_iters)
        self.epsilon = epsilon
        self.num_iters = num_iters

    def __call__(self, query: Features, key: Features, views: Views) -> Match:
        similarity = similarities(query.backbone_feats, key.backbone_feats)
        shares = sinkhorn(similarity / self.epsilon, self.num_iters)
        return Match(shares.argmax(dim=2))


@TASK_UTILS.register_module()
class ProjectionSimilarity(MatchingRule):
    """Nearest cell by the dense projections, an ablation of the paper."""

    reads_backbone = False

    def __call__(self, query: Features, key: Features, views: Views) -> Match:
        return Match(nearest_cells(query.dense_proj, key.dense_proj))


@TASK_UTILS.register_module()
class MutualNearestNeighbor(MatchingRule):
    """Pairs of cells that are each other's nearest by backbone features.

    Query cells without such a pair take no part in the dense loss.
    """

    def __call__(self, query: Features, key: Features, views: Views) -> Match:
        return mutual_nearest_cells(query.backbone_feats, key.backbone_feats)


@TASK_UTILS.register_module()
class NearestNeighbors(MatchingRule):
    """Several nearest cells by backbone features.

    Pixels of one object share a category, so a query cell has more than one
    positive. Our interpretation of DSC's pixel neighbours
    (https://arxiv.org/abs/2109.07756); one-way, without a threshold.

    Args:
        k: Neighbours of a query cell. Defaults to 4: a query cell that lies
            between the key's cells touches a patch of 2 x 2.
    """

    def __init__(self, k: int = 4) -> None:
        check_at_least(1, k=k)
        self.k = k

    def __call__(self, query: Features, key: Features, views: Views) -> Match:
        if self.k > key.backbone_feats.size(2):
            height, width = key.shape
            raise ValueError(
                f'NearestNeighbors looks for k={self.k} neighbours in a grid '
                f'of {height} x {width} cells. Lower correspondence.k, or '
                'enlarge the views or neck.num_grid.'
            )
        cells = query.backbone_feats, key.backbone_feats
        if self.k == 1:  # of equal ones the first
            return Match(nearest_cells(*cells))
        return Match(similarities(*cells).topk(self.k, dim=2).indices)


@TASK_UTILS.register_module()
class RandomMatch(MatchingRule):
    """A random key cell for every query cell, an ablation of the paper."""

    reads_backbone = False

    def __call__(self, query: Features, key: Features, views: Views) -> Match:
        n, _, p = query.dense_proj.shape
        r, device = key.dense_proj.size(2), key.dense_proj.device
        return Match(torch.randint(r, (n, p), device=device))


@TASK_UTILS.register_module()
class GeometricMatch(MatchingRule):
    """The key cell that shows the same point of the image.

    From the crop and flip coordinates that the transforms carry. Query cells
    whose centre the key does not show take no part in the dense loss.
    """

    reads_backbone = False

    def __call__(self, query: Features, key: Features, views: Views) -> Match:
        if views is None:
            raise ValueError(
                'GeometricMatch needs the crop coordinates of both views, and '
                'the data samples carry none. End the pipeline with '
                'mmdensecl.TwoViews and mmdensecl.PackViews.'
            )
        truth = locate_positions(
            views[:, 0], views[:, 1], query.shape, key.shape
        )
        height, width = key.shape
        # The cell that holds the point; centres lie at whole numbers.
        column = (truth.column + 0.5).floor().long().clamp(0, width - 1)
        row = (truth.row + 0.5).floor().long().clamp(0, height - 1)
        return Match(row * width + column, truth.inside)
