# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Where the cells of two crops of one picture lie.

A view is a row of five numbers: left, top, width and height of the crop in
pixels of the source picture, and 1 if it was mirrored, else 0.
"""
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor


class CellPositions(NamedTuple):
    """Positions of query cells in the key's grid.

    Attributes:
        column (Tensor): Fractional column, (N, P); column c has its centre at
            c exactly.
        row (Tensor): Fractional row, (N, P).
        inside (Tensor): Whether the key's crop shows that point, bool,
            (N, P).
    """
    column: Tensor
    row: Tensor
    inside: Tensor


def stack_views(data_samples: Optional[Sequence],
                device: torch.device) -> Optional[Tensor]:
    """The two views of each sample as one tensor.

    Args:
        data_samples (Sequence[DataSample], optional): Samples that carry
            ``views``, two rows of five numbers, as
            :class:`mmdensecl.datasets.PackViews` writes them.
        device (torch.device): Where the tensor goes.

    Returns:
        Tensor | None: (N, 2, 5), float32; None if a sample has no views.
    """
    if not data_samples or not all('views' in s for s in data_samples):
        return None
    views = torch.tensor([s.views for s in data_samples], dtype=torch.float32)
    return views.to(device, non_blocking=True)


def locate_cells(query_view: Tensor, key_view: Tensor, query_shape: Tuple[int,
                                                                          int],
                 key_shape: Tuple[int, int]) -> CellPositions:
    """Find the centres of the query's cells in the key's grid.

    Args:
        query_view (Tensor): Views of the query crops, (N, 5).
        key_view (Tensor): Views of the key crops, (N, 5).
        query_shape (tuple[int, int]): Height and width of the query's grid.
        key_shape (tuple[int, int]): Height and width of the key's grid.

    Returns:
        CellPositions: One position for each query cell.
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
    return CellPositions(x * width - 0.5, y * height - 0.5, inside)


def within_one_cell(index: Tensor, there: CellPositions,
                    key_shape: Tuple[int, int]) -> Tensor:
    """Whether matched cells lie at most one cell from the true spot.

    Args:
        index (Tensor): Key cell of each query cell, (N, P).
        there (CellPositions): Where the query cells truly lie.
        key_shape (tuple[int, int]): Height and width of the key's grid.

    Returns:
        Tensor: bool, (N, P); False where the key does not show the spot.
    """
    row = torch.div(index, key_shape[1], rounding_mode='floor')
    column = index % key_shape[1]
    return there.inside & ((row - there.row).abs() <= 1) & (
        (column - there.column).abs() <= 1)
