# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Gradients that are summed in the order of ranks."""

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from mmengine.dist import get_world_size
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def mean_in_rank_order(
    state: None, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    """Average gradients over ranks, adding up each in the order of ranks.

    An all-reduce adds in an order that depends on where a number lies in its
    bucket, and DDP deals its buckets out anew after the first iteration of a
    process, so that after a resume the sum of three ranks or more is rounded
    in another way. This one sends as many bytes, but waits for them. A hook
    for `DistributedDataParallel.register_comm_hook`.

    Args:
        state: Not used.
        bucket: Gradients of this rank.

    Returns:
        Of the mean.
    """
    ranks = dist.get_world_size()
    buffer = bucket.buffer()
    mine = F.pad(buffer, (0, -len(buffer) % ranks))
    # Each rank adds up one part of the bucket, and hands it to all.
    parts = torch.empty_like(mine)
    dist.all_to_all_single(parts, mine)
    total, *others = parts.view(ranks, -1)
    for part in others:
        total = total + part
    dist.all_gather_into_tensor(mine, total / ranks)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(mine[: len(buffer)])
    return done


def fix_order_of_sums(model: nn.Module) -> None:
    """Make DDP's gradients independent of its buckets.

    Of one rank there is no sum, and of two only one.

    Args:
        model: Changed in place, if it is wrapped by DDP.
    """
    if isinstance(model, DistributedDataParallel) and get_world_size() > 2:
        model.register_comm_hook(None, mean_in_rank_order)
