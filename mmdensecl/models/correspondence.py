# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Matching rules: which key cells are the positives of each query cell.

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
    """The key cell, or the key cells, of each query cell.

    Attributes:
        index (Tensor): Index into the key's cells, long, (N, P); of a rule
            with several positives (N, P, k), best first.
        valid (Tensor, optional): Which of them are positives at all, bool, of
            the shape of ``index``. None means all.
    """
    index: Tensor
    valid: Optional[Tensor] = None

    @property
    def best(self) -> 'Match':
        """Match: The first key cell of each query cell alone, (N, P)."""
        if self.index.dim() == 2:
            return self
        valid = None if self.valid is None else self.valid[..., 0]
        return Match(self.index[..., 0], valid)


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


def _top(similarity: Tensor, k: int, dim: int) -> Tensor:
    """Indices of the k largest, largest first."""
    if k == 1:  # of equal ones the first, as nearest_cells
        return similarity.argmax(dim=dim, keepdim=True)
    return similarity.topk(k, dim=dim).indices


def neighbor_cells(query: Tensor,
                   key: Tensor,
                   k: int,
                   mutual: bool = False,
                   min_similarity: Optional[float] = None) -> Match:
    """The k most similar key cells of every query cell.

    Args:
        query (Tensor): Query cells, normalised over channels, (N, C, P).
        key (Tensor): Key cells, normalised, (N, C, R).
        k (int): How many, 1 to R.
        mutual (bool): Whether only those count that have the query cell among
            their own k most similar. Defaults to False.
        min_similarity (float, optional): Cosine similarity below which a key
            cell does not count. Defaults to None.

    Returns:
        Match: (N, P) for one neighbour, else (N, P, k). Without a threshold
        each picture has mutual ones, its most similar pair at least.
    """
    similarity = torch.bmm(query.transpose(1, 2), key)
    index = _top(similarity, k, dim=2)
    valid = None
    if mutual:
        back = _top(similarity, min(k, similarity.size(1)), dim=1)
        chosen = torch.zeros_like(similarity, dtype=torch.bool)
        valid = chosen.scatter_(1, back, True).gather(2, index)
    if min_similarity is not None:
        strong = similarity.gather(2, index) >= min_similarity
        valid = strong if valid is None else valid & strong
    match = Match(index, valid)
    return match.best if k == 1 else match


def mutual_nearest_cells(query: Tensor, key: Tensor) -> Match:
    """Nearest key cells, valid where the key cell's nearest is the query.

    Args:
        query (Tensor): Query cells, normalised, (N, C, P).
        key (Tensor): Key cells, normalised, (N, C, R).

    Returns:
        Match: Each picture has at least one mutual pair, its most similar.
    """
    return neighbor_cells(query, key, k=1, mutual=True)


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
class NearestNeighbors(MatchingRule):
    """Several nearest cells by backbone features.

    Pixels of one object share a category, so a query cell has more than one
    positive. Our interpretation of DSC's pixel neighbours
    (https://arxiv.org/abs/2109.07756); with one neighbour it is
    :class:`BackboneSimilarity`.

    Args:
        k (int): Neighbours of a query cell. Defaults to 4: a query cell that
            lies between the key's cells touches a patch of 2 x 2.
        mutual (bool): Whether only those count that have the query cell among
            their own k nearest. Defaults to False, as DenseCL's are one-way.
        min_similarity (float, optional): Cosine similarity below which a
            neighbour does not count. Defaults to None: no value suits the
            whole of a run.

    Raises:
        ValueError: ``k`` is below 1 or above the number of the key's cells,
            or ``min_similarity`` is not in [-1, 1].
    """

    def __init__(self,
                 k: int = 4,
                 mutual: bool = False,
                 min_similarity: Optional[float] = None) -> None:
        if k < 1:
            raise ValueError(f'k must be at least 1, got {k}')
        if min_similarity is not None and not -1 <= min_similarity <= 1:
            raise ValueError('min_similarity must be None or a cosine in '
                             f'[-1, 1], got {min_similarity}')
        self.k = k
        self.mutual = mutual
        self.min_similarity = min_similarity

    def __call__(self,
                 query: Features,
                 key: Features,
                 views: Optional[Tensor] = None) -> Match:
        if self.k > key.cells.size(2):
            height, width = key.shape
            raise ValueError(
                f'NearestNeighbors looks for k={self.k} neighbours in a grid '
                f'of {height} x {width} cells. Lower correspondence.k, or '
                'enlarge the views or neck.num_grid.')
        return neighbor_cells(query.cells, key.cells, self.k, self.mutual,
                              self.min_similarity)


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
