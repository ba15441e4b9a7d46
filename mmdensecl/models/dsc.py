# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from typing import Dict, Optional

import torch
from mmengine.dist import get_dist_info
from torch import Tensor

from mmdensecl.registry import MODELS
from .correspondence import Match
from .densecl import DenseCL
from .features import Features, gather_cells
from .shared_randomness import SharedRandomness


@MODELS.register_module()
class DSC(DenseCL):
    """DenseCL with several neighbours and categories across pictures.

    Our interpretation of the paper `Dense Semantic Contrast for
    Self-Supervised Visual Representation Learning
    <https://arxiv.org/abs/2109.07756>`_: its code was never published and its
    abstract alone was at hand, so none of its numbers is claimed. The loss is
    ``(1 - loss_lambda) * global + loss_lambda * neighbours + category_weight *
    category``. With one neighbour and ``category_weight=0`` this is DenseCL,
    bit for bit, also from the same seed.

    Args:
        category (dict): Config of a category head:
            :class:`KMeansCategoryHead` is DSC-KM,
            :class:`PrototypeCategoryHead` DSC-PM.
        category_weight (float): Weight of the category loss. Defaults to 0.5,
            that of the other two losses.
        num_samples (int, optional): Query cells of a picture, drawn anew in
            each step, that take part in the category loss; None means all.
            Defaults to 16: a third of a 7 x 7 grid, so that a head of a large
            batch needs no more memory than the encoders leave.
        correspondence (dict): Config of the matching rule, which gives the
            neighbours. An anchor's partner in the category loss is its first.
            Defaults to ``dict(type='mmdensecl.NearestNeighbors')``.
        **kwargs: The arguments of :class:`DenseCL`.

    Raises:
        ValueError: ``category_weight`` is negative, or ``num_samples`` is
            below 1 or above the number of cells.
    """

    def __init__(self,
                 *args,
                 category: dict,
                 category_weight: float = 0.5,
                 num_samples: Optional[int] = 16,
                 correspondence: dict = dict(
                     type='mmdensecl.NearestNeighbors'),
                 **kwargs) -> None:
        super().__init__(*args, correspondence=correspondence, **kwargs)
        if category_weight < 0:
            raise ValueError('category_weight must not be negative, got '
                             f'{category_weight}')
        if num_samples is not None and num_samples < 1:
            raise ValueError(
                f'num_samples must be None or at least 1, got {num_samples}')
        self.category_weight = category_weight
        self.num_samples = num_samples
        self.category_head = MODELS.build(category)
        self.category_randomness = SharedRandomness()

    def contrast_cells(self, query: Features, key: Features,
                       match: Match) -> Dict[str, Tensor]:
        """Losses and monitors of matched cells and of their categories."""
        outputs = super().contrast_cells(query, key, match)
        generator = self.category_randomness.next_generator(query.grid.device)
        anchors = self.draw_anchors(query, generator)
        index, valid = match.best
        # Also at weight 0: DDP waits for a gradient of every parameter.
        loss, monitors = self.category_head.loss(
            gather_cells(query.grid, anchors),
            gather_cells(key.grid, index.gather(1, anchors)),
            None if valid is None else valid.gather(1, anchors).flatten(),
            generator)
        return dict(
            **outputs, loss_category=self.category_weight * loss, **monitors)

    def draw_anchors(self, query: Features,
                     generator: torch.Generator) -> Tensor:
        """Query cells for the category loss, each at most once.

        Drawn for the pictures of all ranks, so that the number of ranks
        changes nothing.

        Args:
            query (Features): Of this rank's N pictures.
            generator (torch.Generator): In the same state on all ranks.

        Returns:
            Tensor: Indices, long, (N, num_samples).
        """
        pictures, _, cells = query.grid.shape
        if self.num_samples is None:
            every = torch.arange(cells, device=query.grid.device)
            return every.expand(pictures, -1)
        if self.num_samples > cells:
            raise ValueError(
                f'num_samples={self.num_samples} cells cannot be drawn from a '
                f'grid of {query.shape[0]} x {query.shape[1]}. Lower '
                'num_samples, set it to None for all cells, or enlarge the '
                'views or neck.num_grid.')
        rank, world_size = get_dist_info()
        lots = torch.rand(
            world_size * pictures,
            cells,
            generator=generator,
            device=query.grid.device)
        own = lots[rank * pictures:(rank + 1) * pictures]
        return own.topk(self.num_samples, dim=1).indices
