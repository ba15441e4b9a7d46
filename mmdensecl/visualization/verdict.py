# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Whether features match object parts, without labels.

Where two views of one picture were cut is known, so it is known which of
their matches are right.
"""
from typing import Callable, List, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from mmdensecl.models.correspondence import mutual_nearest_cells
from mmdensecl.models.features import Features, features_of
from mmdensecl.models.geometry import locate_cells, within_one_cell
from .matches import inner_cells
from .views import Pairs

Encode = Callable[[Tensor], Tensor]

STANDARD_ERRORS = 3
MIN_PAIRS = 8
BATCH = 16


class Accuracy(NamedTuple):
    """How many mutual matches are right, pair by pair.

    Attributes:
        right (Tensor): Share of right ones, (N, ); NaN where no query cell
            that is matched is shown by the key.
        chance (Tensor): What matches by chance would have, (N, ).
    """
    right: Tensor
    chance: Tensor


@torch.no_grad()
def match_accuracy(query: Features,
                   key: Features,
                   views: Tensor,
                   margin: int = 0) -> Accuracy:
    """Share of mutual matches within one cell of the true spot.

    Counted are matches of query cells whose true spot has a key cell within
    one cell. By chance each key cell is as likely as any other.

    Args:
        query (Features): With ``cells``.
        key (Features): With ``cells``.
        views (Tensor): Crop coordinates, (N, 2, 5).
        margin (int): Rings of outer cells to leave out. Defaults to 0.

    Returns:
        Accuracy: Of each pair.
    """
    inner_q = inner_cells(query.shape, margin).to(query.cells.device)
    inner_k = inner_cells(key.shape, margin).to(key.cells.device)
    match = mutual_nearest_cells(query.cells[:, :, inner_q],
                                 key.cells[:, :, inner_k])
    there = locate_cells(views[:, 0], views[:, 1], query.shape, key.shape)
    # Of each key cell, (R, N, P).
    near = within_one_cell(inner_k[:, None, None], there, key.shape)
    near = near[:, :, inner_q].permute(1, 2, 0)
    counted = match.valid & near.any(dim=2)
    right = near.gather(2, match.index[..., None])[..., 0] & counted
    chance = near.float().mean(dim=2) * counted
    number = counted.sum(dim=1)
    return Accuracy(right.sum(dim=1) / number, chance.sum(dim=1) / number)


class Verdict(NamedTuple):
    """What pairs of views say of features.

    Attributes:
        right (float): Mean share of right mutual matches.
        chance (float): Of matches by chance.
        random (float): Of random weights of the same network.
        over_chance (float): ``right`` less ``chance`` in standard errors.
        over_random (float): ``right`` less ``random`` in standard errors.
        pairs (int): How many pairs of views say so.
    """
    right: float
    chance: float
    random: float
    over_chance: float
    over_random: float
    pairs: int

    @property
    def matches_parts(self) -> bool:
        """Both differences are above 3 standard errors, of 8 pairs at least.
        """
        return self.pairs >= MIN_PAIRS and min(
            self.over_chance, self.over_random) > STANDARD_ERRORS

    def sentence(self) -> str:
        """The verdict in words."""
        if self.pairs < MIN_PAIRS:
            return (f'It cannot be said: only {self.pairs} pairs of views '
                    f'have matches that can be checked, {MIN_PAIRS} are '
                    'needed.')
        if self.matches_parts:
            return ('These features match object parts: clearly more often '
                    'than chance, and than random weights of the same '
                    'network.')
        if self.over_chance > STANDARD_ERRORS:
            return ('These features do not match object parts better than '
                    'random weights of the same network do.')
        return ('These features do not match object parts: they are right '
                'no more often than chance.')


def judge(trained: Accuracy, random: Accuracy) -> Verdict:
    """Compare features with chance and with random weights.

    Pair by pair, so that easy and hard pairs cancel out.

    Args:
        trained (Accuracy): Of the features.
        random (Accuracy): Of random weights, on the same pairs.
    """
    known = trained.right.isfinite() & random.right.isfinite()
    right, chance = trained.right[known], trained.chance[known]
    other = random.right[known]

    def errors(difference: Tensor) -> float:
        spread = difference.std() / len(difference)**0.5
        # Equal differences, such as all matches right, have no spread.
        return float(difference.mean() / spread.clamp(min=1e-9))

    if len(right) < 2:
        return Verdict(*[float('nan')] * 5, pairs=len(right))
    return Verdict(
        float(right.mean()), float(chance.mean()), float(other.mean()),
        errors(right - chance), errors(right - other), len(right))


def measure(encode: Encode, pairs: Pairs, margin: int = 0) -> Accuracy:
    """The accuracy of an encoder on pairs of views.

    Args:
        encode (Callable): From uint8 views (N, 3, S, S) to maps.
        pairs (Pairs): The views.
        margin (int): Rings of outer cells to leave out. Defaults to 0.
    """
    found: List[Accuracy] = []
    for start in range(0, len(pairs.query), BATCH):
        part = slice(start, start + BATCH)
        with torch.no_grad():
            query = features_of(encode(pairs.query[part]).cpu())
            key = features_of(encode(pairs.key[part]).cpu())
        found.append(match_accuracy(query, key, pairs.views[part], margin))
    return Accuracy(*map(torch.cat, zip(*found)))


def settle_statistics(backbone: nn.Module, images: Tensor) -> None:
    """Give the batch norms of random weights the statistics of pictures.

    As they start out, with mean 0 and variance 1, they would normalise
    nothing, and any training would beat them.

    Args:
        backbone (nn.Module): In eval mode before and after.
        images (Tensor): What it takes, (N, 3, H, W).
    """
    norms = {
        module: module.momentum
        for module in backbone.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    }
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    with torch.no_grad():
        for batch in images.split(BATCH):
            backbone(batch)
    for norm, momentum in norms.items():
        norm.momentum = momentum
        norm.eval()
