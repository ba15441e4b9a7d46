# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Matching rules: which key cell is the positive of each query cell.

The maths is in functions; a rule is a small class that picks what they look
at. A new rule is a subclass of :class:`MatchingRule`, registered in
``TASK_UTILS`` and named in a config: ``correspondence=dict(type='...')``.
"""
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from mmdensecl.registry import TASK_UTILS
from .features import Features
from .geometry import locate_cells


class Match(NamedTuple):
    """The key cell of each query cell.

    Attributes:
        index (Tensor): Index into the key's cells, long, (N, P).
        valid (Tensor, optional): Which query cells have a positive at all,
            bool, (N, P). None means all.
    """
    index: Tensor
    valid: Optional[Tensor] = None


def nearest_cells(query: Tensor, key: Tensor) -> Tensor:
    """Most similar key cell of every query cell (DenseCL, eq. 4).

    One-way, without a threshold. The length of a query cell cannot change
    which key is nearest, so only the key must be normalised.

    Args:
        query (Tensor): Query cells, (N, C, P).
        key (Tensor): Key cells, normalised over channels, (N, C, R).

    Returns:
        Tensor: Indices in 0..R-1, (N, P).
    """
    return torch.bmm(query.transpose(1, 2), key).argmax(dim=2)


def mutual_nearest_cells(query: Tensor, key: Tensor) -> Match:
    """Nearest key cells, valid where the key cell's nearest is the query.

    Args:
        query (Tensor): Query cells, normalised, (N, C, P).
        key (Tensor): Key cells, normalised, (N, C, R).

    Returns:
        Match: Each picture has at least one mutual pair, its most similar.
    """
    similarity = torch.bmm(query.transpose(1, 2), key)
    forth, back = similarity.argmax(dim=2), similarity.argmax(dim=1)
    own = torch.arange(forth.size(1), device=forth.device)
    return Match(forth, back.gather(1, forth) == own)


class MatchingRule:
    """What a rule has.

    Attributes:
        reads_backbone (bool): Whether it looks at ``Features.cells``; where
            not, the ranks need not exchange them.
    """

    reads_backbone = True

    def __call__(self,
                 query: Features,
                 key: Features,
                 views: Optional[Tensor] = None) -> Match:
        """Match the cells of N pairs of views.

        Args:
            query (Features): Of the query views.
            key (Features): Of the key views.
            views (Tensor, optional): Crop coordinates, (N, 2, 5), where the
                data carries them.

        Returns:
            Match: The key cell of each query cell.
        """
        raise NotImplementedError


@TASK_UTILS.register_module()
class BackboneSimilarity(MatchingRule):
    """Nearest cell by backbone features: DenseCL's rule and our default."""

    def __call__(self,
                 query: Features,
                 key: Features,
                 views: Optional[Tensor] = None) -> Match:
        return Match(nearest_cells(query.cells, key.cells))


@TASK_UTILS.register_module()
class ProjectionSimilarity(MatchingRule):
    """Nearest cell by the dense projections themselves.

    One of the matching ablations of the DenseCL paper.
    """

    reads_backbone = False

    def __call__(self,
                 query: Features,
                 key: Features,
                 views: Optional[Tensor] = None) -> Match:
        return Match(nearest_cells(query.grid, key.grid))


@TASK_UTILS.register_module()
class MutualNearestNeighbor(MatchingRule):
    """Pairs of cells that are each other's nearest by backbone features.

    Query cells without such a pair take no part in the dense loss.
    """

    def __call__(self,
                 query: Features,
                 key: Features,
                 views: Optional[Tensor] = None) -> Match:
        return mutual_nearest_cells(query.cells, key.cells)


@TASK_UTILS.register_module()
class RandomMatch(MatchingRule):
    """A random key cell for every query cell, an ablation of the paper."""

    reads_backbone = False

    def __call__(self,
                 query: Features,
                 key: Features,
                 views: Optional[Tensor] = None) -> Match:
        n, _, cells = query.grid.shape
        return Match(
            torch.randint(
                key.grid.size(2), (n, cells), device=query.grid.device))


@TASK_UTILS.register_module()
class GeometricMatch(MatchingRule):
    """The key cell that shows the same spot of the picture.

    From the crop and flip coordinates that the transforms carry. Query cells
    whose centre the key does not show take no part in the dense loss.

    Raises:
        ValueError: The batch carries no views.
    """

    reads_backbone = False

    def __call__(self,
                 query: Features,
                 key: Features,
                 views: Optional[Tensor] = None) -> Match:
        if views is None:
            raise ValueError(
                'GeometricMatch needs the crop coordinates of both views, and '
                'the data samples carry none. End the pipeline with '
                'mmdensecl.TwoViews and mmdensecl.PackViews.')
        there = locate_cells(views[:, 0], views[:, 1], query.shape, key.shape)
        height, width = key.shape
        # The cell that holds the point; centres lie at whole numbers.
        column = (there.column + 0.5).floor().long().clamp(0, width - 1)
        row = (there.row + 0.5).floor().long().clamp(0, height - 1)
        return Match(row * width + column, there.inside)
