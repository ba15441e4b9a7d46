# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from typing import NamedTuple, Optional, Tuple

import torch.nn.functional as F
from torch import Tensor


class Features(NamedTuple):
    """What an encoder says of N pictures. All are normalised over channels.

    Attributes:
        vector (Tensor): Global projections, (N, D).
        grid (Tensor, optional): Dense projections, (N, D, P), of the P = H*W
            cells of a grid, row by row.
        pooled (Tensor, optional): Mean dense projections, (N, D).
        cells (Tensor, optional): Backbone map on the same grid, (N, C, P).
        shape (tuple[int, int], optional): Height and width of the grid.
    """
    vector: Tensor
    grid: Optional[Tensor] = None
    pooled: Optional[Tensor] = None
    cells: Optional[Tensor] = None
    shape: Optional[Tuple[int, int]] = None


def l2_normalize(x: Tensor) -> Tensor:
    """Unit length over dim 1, in float32 at least (also under autocast)."""
    return F.normalize(x.float() if x.itemsize < 4 else x, dim=1)


def features_of(maps: Tensor) -> Features:
    """The maps of a backbone alone, as matching takes them.

    Args:
        maps (Tensor): (N, C, H, W).
    """
    return Features(
        vector=l2_normalize(maps.mean(dim=(2, 3))),
        cells=l2_normalize(maps.flatten(start_dim=2)),
        shape=tuple(maps.shape[2:]))


def gather_cells(grid: Tensor, index: Tensor) -> Tensor:
    """Picked cells of each picture as rows.

    Args:
        grid (Tensor): Vectors of cells, (N, D, R).
        index (Tensor): Cells to pick, long, (N, P) or (N, P, k).

    Returns:
        Tensor: (N * P, D) or (N * P, k, D).
    """
    flat = index.flatten(start_dim=1)[..., None].expand(-1, -1, grid.size(1))
    rows = grid.transpose(1, 2).gather(1, flat).flatten(0, 1)
    return rows if index.dim() == 2 else rows.unflatten(0, (-1, index.size(2)))
