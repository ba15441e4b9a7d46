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
