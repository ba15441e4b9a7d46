# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Projection heads."""

import warnings
from collections.abc import Sequence

import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor

from mmdensecl.registry import MODELS

from .modules import check_at_least


@MODELS.register_module()
class DenseCLNeck(BaseModule):
    """Global and dense projection heads side by side (DenseCL, section 3.2).

    The global branch is average pool, linear, ReLU, linear; the dense branch
    is an optional pool to a grid, 1x1 conv, ReLU, 1x1 conv. No batch norm in
    either. Parameters carry the names of the authors' code (``mlp``,
    ``mlp2``).

    Args:
        in_channels: Channels of the backbone map.
        hid_channels: Channels between the two layers of a branch.
        out_channels: Channels of the projections.
        num_grid: The dense branch pools the map to
            ``num_grid x num_grid`` cells; None keeps the map's own size.
        init_cfg: Initialisation. Defaults to the authors': linear layers
            Kaiming normal, fan-in, zero bias; 1x1 convs as PyTorch leaves
            them (openselfsup/models/necks.py).
    """

    def __init__(
        self,
        in_channels: int,
        hid_channels: int,
        out_channels: int,
        num_grid: int | None = None,
        init_cfg: dict | list[dict] | None = dict(
            type='Kaiming', layer='Linear', mode='fan_in'
        ),
    ) -> None:
        super().__init__(init_cfg)
        if num_grid is not None:
            check_at_least(1, num_grid=num_grid)
        self.num_grid = num_grid
        self.mlp = nn.Sequential(
            nn.Linear(in_channels, hid_channels),
            nn.ReLU(inplace=True),
            nn.Linear(hid_channels, out_channels),
        )
        self.mlp2 = nn.Sequential(
            nn.Conv2d(in_channels, hid_channels, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hid_channels, out_channels, 1),
        )

    def pool(self, feature_map: Tensor) -> Tensor:
        """The map on the dense branch's grid, (N, C, H, W) -> (N, C, S, S).

        Matching looks at the same cells as the loss, so it pools here too.
        """
        if self.num_grid is None:
            return feature_map
        rows, columns = feature_map.shape[2:]
        if self.num_grid > min(rows, columns):
            warnings.warn(
                f'num_grid={self.num_grid} is more than the {rows} x '
                f'{columns} cells of the map, so cells repeat each other: '
                'lower it, or enlarge the views or the map of the backbone',
                stacklevel=1,  # once, not for each caller
            )
        return F.adaptive_avg_pool2d(feature_map, self.num_grid)

    def forward(self, x: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Project the last map of a backbone. Nothing is normalised yet.

        Args:
            x: Backbone maps; the last one, (N, C, H, W), is used.

        Returns:
            Global projections (N, D), dense projections (N, D, S*S), and the
            spatial mean of the latter (N, D), the published dense negative.
        """
        feature_map = x[-1]
        vector = self.mlp(feature_map.mean(dim=(2, 3)))  # (N, D)
        dense = self.mlp2(self.pool(feature_map)).flatten(2)  # (N, D, S*S)
        return vector, dense, dense.mean(dim=2)
