# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Whether features find the same position in two views, without labels.

Where two views of an image were cut is known, so it is known which of their
matches are right. docs/evaluation.md has the rule.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mmdensecl.models.correspondence import (
    locate_positions,
    nearest_cells,
    within_one_cell,
)
from mmdensecl.models.modules import Features, backbone_features

STANDARD_ERRORS = 3
MIN_PAIRS = 8
BATCH = 16


class Pairs(NamedTuple):
    """Pairs of views."""

    query: Tensor  # uint8, (N, 3, S, S)
    key: Tensor  # uint8, (N, 3, S, S)
    views: Tensor  # crop coordinates, (N, 2, 5)


class Accuracy(NamedTuple):
    """Right matches of each pair.

    All are shares of the query cells whose position the key shows, and NaN
    where it shows none.

    Attributes:
        right: Of the most similar cells, (N, ).
        same_position: Of the cells at the same position in the other view:
            what features reach that know only where they are, (N, ).
        chance: Of cells drawn at random, (N, ).
    """

    right: Tensor
    same_position: Tensor
    chance: Tensor


@torch.no_grad()
def match_accuracy(query: Features, key: Features, views: Tensor) -> Accuracy:
    """Share of matches within one cell of the true position.

    Each query cell is matched with the most similar key cell, DenseCL's own
    rule. Counted are the cells whose position the key shows: the same ones
    whatever the features are. ``views`` are crop coordinates, (N, 2, 5).
    """
    there = locate_positions(views[:, 0], views[:, 1], query.shape, key.shape)
    found = nearest_cells(query.backbone_feats, key.backbone_feats)
    cells = torch.arange(key.backbone_feats.size(2), device=found.device)
    # Whether each key cell would be right, (R, N, P).
    near = within_one_cell(cells[:, None, None], there, key.shape)
    counted = there.inside.sum(dim=1)

    def share(index: Tensor) -> Tensor:
        return within_one_cell(index, there, key.shape).sum(dim=1) / counted

    return Accuracy(
        share(found),
        share(cells.expand_as(found)),
        near.sum(dim=(0, 2)) / len(cells) / counted,
    )


def measure(encode: Callable[[Tensor], Tensor], pairs: Pairs) -> Accuracy:
    """The accuracy of an encoder, from views to maps, on pairs of views."""
    found = []
    for query, key, views in zip(
        *(x.split(BATCH) for x in pairs), strict=True
    ):
        with torch.no_grad():
            maps = [encode(x).float().cpu() for x in (query, key)]
        a, b = map(backbone_features, maps)
        found.append(match_accuracy(a, b, views))
    return Accuracy(*map(torch.cat, zip(*found, strict=True)))


def mean_accuracy(draws: Sequence[Accuracy]) -> Accuracy:
    """The mean of several draws of weights or views, pair by pair."""
    stacked = map(torch.stack, zip(*draws, strict=True))
    return Accuracy(*(x.nanmean(dim=0) for x in stacked))


class Comparison(NamedTuple):
    """Features compared with baselines, over pairs of views.

    Attributes:
        pairs: How many pairs have matches that can be checked.
        right: Mean share of right matches.
        baselines: The same of ``random weights`` of the same network, of
            ``the same position`` in the other view, and of ``chance``.
        errors: ``right`` less each of these, in standard errors.
    """

    pairs: int
    right: float
    baselines: dict[str, float]
    errors: dict[str, float]

    @property
    def matches_parts(self) -> bool:
        """Whether all differences are significant, of 8 pairs at least."""
        return (
            self.pairs >= MIN_PAIRS
            and min(self.errors.values()) > STANDARD_ERRORS
        )

    def sentence(self) -> str:
        """The comparison in words."""
        if self.pairs < MIN_PAIRS:
            return (
                f'It cannot be said: only {self.pairs} pairs of views have '
                f'matches that can be checked, {MIN_PAIRS} are needed.'
            )
        if self.matches_parts:
            return (
                'These features match object parts: clearly more often than '
                f'{", ".join(self.errors)}.'
            )
        below, close = (
            [k for k, x in self.errors.items() if lowest <= x <= highest]
            for lowest, highest in (
                (-float('inf'), -STANDARD_ERRORS),
                (-STANDARD_ERRORS, STANDARD_ERRORS),
            )
        )
        words = [f'not told apart from {" and ".join(close)}'] * bool(close)
        words += [f'worse than {" and ".join(below)}'] * bool(below)
        return (
            'It is not shown that these features match object parts: they '
            f'are {", and ".join(words)}.'
        )


def compare(trained: Accuracy, random: Accuracy) -> Comparison:
    """Compare features with random weights, with the position, with chance.

    Pair by pair, so that easy and hard pairs cancel out.
    """
    known = trained.right.isfinite() & random.right.isfinite()
    right = trained.right[known]
    others = {
        'random weights': random.right[known],
        'the same position': trained.same_position[known],
        'chance': trained.chance[known],
    }

    def errors(difference: Tensor) -> float:
        spread = difference.std(correction=1) / len(difference) ** 0.5
        # Equal differences, such as all matches right, have no spread.
        return float(difference.mean() / spread.clamp(min=1e-9))

    return Comparison(
        len(right),
        float(right.mean()),
        {k: float(x.mean()) for k, x in others.items()},
        {k: errors(right - x) for k, x in others.items()},
    )
