# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Means over rows, some of which do not count, on several ranks."""
from typing import Optional, Tuple

import torch
from mmengine.dist import all_reduce
from torch import Tensor


def mean_over_positives(
        x: Tensor,
        valid: Optional[Tensor] = None) -> Tuple[Tensor, Optional[Tensor]]:
    """One value of each row, so that all rows weigh the same.

    Args:
        x (Tensor): One value of a row, (M, ), or one of each of its
            positives, (M, k).
        valid (Tensor, optional): Which of them count, bool, of the shape of
            ``x``. None means all. Defaults to None.

    Returns:
        tuple[Tensor, Tensor | None]: The rows' means, (M, ), 0 where nothing
        counts; and the rows in which something does, bool, (M, ), or None.
    """
    if x.dim() == 1:
        return x, valid
    if valid is None:
        return x.mean(dim=1), None
    mean = (x * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)
    return mean, valid.any(dim=1)


def mean_over_ranks(x: Tensor, valid: Optional[Tensor] = None) -> Tensor:
    """Mean over the rows of all ranks that count, as DDP wants it.

    Args:
        x (Tensor): A value of each row of this rank, (M, ).
        valid (Tensor, optional): Rows that count, bool, (M, ). None means
            all. Defaults to None.

    Returns:
        Tensor: A scalar, 0 where no row is valid, whose mean over the ranks is
        the mean over the valid rows of all of them.
    """
    if valid is None:
        return x.mean()
    # DDP averages over ranks; each divides by the mean count, so that two
    # ranks give the loss that one process would.
    count = valid.sum().to(x)
    all_reduce(count, op='mean')
    count = count.where(count > 0, torch.ones_like(count))
    return (x * valid).sum() / count
