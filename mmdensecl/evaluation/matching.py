# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Whether features find the same spot in two views, without labels.

Where two views of one picture were cut is known, so it is known which of
their matches are right. The one rule is in docs/seeing.md.
"""
from typing import Callable, List, NamedTuple, Sequence

import torch
from torch import Tensor

from mmdensecl.models.correspondence import nearest_cells
from mmdensecl.models.modules import Features, backbone_features
from mmdensecl.models.correspondence import locate_positions, within_one_cell

Encode = Callable[[Tensor], Tensor]

STANDARD_ERRORS = 3
MIN_PAIRS = 8
BATCH = 16


class Pairs(NamedTuple):
    """Pairs of views.

    Attributes:
        query (Tensor): uint8, (N, 3, S, S).
        key (Tensor): uint8, (N, 3, S, S).
        views (Tensor): Crop coordinates, (N, 2, 5).
    """
    query: Tensor
    key: Tensor
    views: Tensor


class Accuracy(NamedTuple):
    """How many matches are right, pair by pair.

    All are shares of the query cells whose spot the key shows, and NaN where
    it shows none.

    Attributes:
        right (Tensor): Of the most similar cells, (N, ).
        same_place (Tensor): Of the cells at the same place in the other view:
            what features reach that know only where they are, (N, ).
        chance (Tensor): Of cells drawn at random, (N, ).
    """
    right: Tensor
    same_place: Tensor
    chance: Tensor


@torch.no_grad()
def match_accuracy(query: Features, key: Features, views: Tensor) -> Accuracy:
    """Share of matches within one cell of the true spot.

    Each query cell is matched with the most similar key cell, DenseCL's own
    rule. Counted are the cells whose spot the key shows: the same ones
    whatever the features are.

    Args:
        query (Features): With ``cells``.
        key (Features): With ``cells``, on a grid of the same shape.
        views (Tensor): Crop coordinates, (N, 2, 5).

    Returns:
        Accuracy: Of each pair.
    """
    there = locate_positions(views[:, 0], views[:, 1], query.shape, key.shape)
    found = nearest_cells(query.backbone_feats, key.backbone_feats)
    cells = torch.arange(key.backbone_feats.size(2), device=found.device)
    # Whether each key cell would be right, (R, N, P).
    near = within_one_cell(cells[:, None, None], there, key.shape)

    def share(index: Tensor) -> Tensor:
        right = within_one_cell(index, there, key.shape)
        return right.sum(dim=1) / there.inside.sum(dim=1)

    return Accuracy(
        share(found), share(cells.expand_as(found)),
        near.sum(dim=(0, 2)) / len(cells) / there.inside.sum(dim=1))


def measure(encode: Encode, pairs: Pairs) -> Accuracy:
    """The accuracy of an encoder on pairs of views.

    Args:
        encode (Callable): From uint8 views (N, 3, S, S) to maps, such as
            :class:`mmdensecl.FrozenBackbone`.
        pairs (Pairs): The views.
    """
    found: List[Accuracy] = []
    for start in range(0, len(pairs.query), BATCH):
        part = slice(start, start + BATCH)
        with torch.no_grad():
            query = backbone_features(encode(pairs.query[part]).float().cpu())
            key = backbone_features(encode(pairs.key[part]).float().cpu())
        found.append(match_accuracy(query, key, pairs.views[part]))
    return Accuracy(*map(torch.cat, zip(*found)))


def mean_accuracy(draws: Sequence[Accuracy]) -> Accuracy:
    """The mean of several draws of weights or views, pair by pair.

    Args:
        draws (Sequence[Accuracy]): Of as many pairs each.
    """
    return Accuracy(*(torch.stack(x).nanmean(dim=0) for x in zip(*draws)))


class Verdict(NamedTuple):
    """What pairs of views say of features.

    Attributes:
        right (float): Mean share of right matches.
        random (float): Of random weights of the same network.
        same_place (float): Of cells at the same place in the other view.
        chance (float): Of cells drawn at random.
        over_random (float): ``right`` less ``random`` in standard errors.
        over_place (float): ``right`` less ``same_place`` in standard errors.
        over_chance (float): ``right`` less ``chance`` in standard errors.
        pairs (int): How many pairs of views say so.
    """
    right: float
    random: float
    same_place: float
    chance: float
    over_random: float
    over_place: float
    over_chance: float
    pairs: int

    @property
    def matches_parts(self) -> bool:
        """All differences are above 3 standard errors, of 8 pairs at least.
        """
        return self.pairs >= MIN_PAIRS and min(
            self.over_random, self.over_place,
            self.over_chance) > STANDARD_ERRORS

    def sentence(self) -> str:
        """The verdict in words."""
        if self.pairs < MIN_PAIRS:
            return (f'It cannot be said: only {self.pairs} pairs of views '
                    f'have matches that can be checked, {MIN_PAIRS} are '
                    'needed.')
        if self.matches_parts:
            return ('These features match object parts: clearly more often '
                    'than random weights of the same network, than the place '
                    'alone, and than chance.')
        if self.over_chance <= STANDARD_ERRORS:
            return ('These features do not match object parts: they are right '
                    'no more often than chance.')
        if self.over_random <= STANDARD_ERRORS:
            return ('These features do not match object parts better than '
                    'random weights of the same network do.')
        return ('These features do not match object parts: they are right no '
                'more often than the same place in the other view.')


def judge(trained: Accuracy, random: Accuracy) -> Verdict:
    """Compare features with random weights, with the place, with chance.

    Pair by pair, so that easy and hard pairs cancel out.

    Args:
        trained (Accuracy): Of the features.
        random (Accuracy): Of random weights, on the same pairs.
    """
    known = trained.right.isfinite() & random.right.isfinite()
    right = trained.right[known]
    others = [
        random.right[known], trained.same_place[known], trained.chance[known]
    ]

    def errors(difference: Tensor) -> float:
        spread = difference.std() / len(difference)**0.5
        # Equal differences, such as all matches right, have no spread.
        return float(difference.mean() / spread.clamp(min=1e-9))

    if len(right) < 2:
        return Verdict(*[float('nan')] * 7, pairs=len(right))
    return Verdict(*(float(x.mean()) for x in (right, *others)),
                   *(errors(right - x) for x in others), len(right))
