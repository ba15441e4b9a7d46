# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Shuffle BN across ranks (MoCo, section 3.3).

Batch norm sees the pictures of one rank together. Were the two views of a
picture normalised with the same companions, the statistics would give the
pair away, so the keys' batches are mixed over the ranks and sorted back
afterwards. Ranks send each other just the rows that the other needs.
"""
from typing import Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from mmengine.dist import get_dist_info
from torch import Tensor

from .shared_randomness import SharedRandomness
from .to_device import to_device


def exchange_rows(x: Tensor, order: Tensor) -> Tensor:
    """Reorder the rows of a batch that is spread over the ranks.

    Args:
        x (Tensor): This rank's N rows; every rank holds as many.
        order (Tensor): A permutation of the N * world_size global rows, on
            the CPU, the same on all ranks.

    Returns:
        Tensor: Rows ``order[rank * N:(rank + 1) * N]`` of the global batch.
    """
    channels_last = x.dim() == 4 and x.is_contiguous(
        memory_format=torch.channels_last)
    if channels_last and not x.is_contiguous():
        rows = exchange_rows(x.permute(0, 2, 3, 1).contiguous(), order)
        return rows.permute(0, 3, 1, 2)
    rank, world_size = get_dist_info()
    x = x.contiguous()  # rows must be whole in memory
    wanted = order.view(world_size, len(x))  # row r: what rank r gets
    owner = wanted // len(x)
    mine = [wanted[r][owner[r] == rank] % len(x) for r in range(world_size)]
    send = x[to_device(torch.cat(mine), x.device)]
    received = torch.empty_like(x)
    dist.all_to_all_single(
        received, send,
        torch.bincount(owner[rank], minlength=world_size).tolist(),
        [len(rows) for rows in mine])
    # They come sorted by owner, each owner's in the order of our positions.
    positions = torch.argsort(owner[rank], stable=True)
    result = torch.empty_like(x)
    result[to_device(positions, x.device)] = received
    return result


class BatchShuffle(SharedRandomness):
    """Draws the permutation of each step and carries it out.

    All ranks draw the same permutation, and a resumed run continues the
    sequence. In one process there is nobody to swap with and nothing happens.
    """

    def draw(self, size: int) -> Tensor:
        """The next permutation of ``size`` rows.

        On the CPU, which must know how many rows go to whom; the device is
        never waited for.
        """
        return torch.randperm(size, generator=self.next_generator())

    def shuffle(self, x: Tensor) -> Tuple[Tensor, Optional[Tensor]]:
        """Mix the rows of all ranks.

        Args:
            x (Tensor): This rank's rows, (N, ...).

        Returns:
            tuple[Tensor, Tensor | None]: As many rows from anywhere, and the
            order that :meth:`unshuffle` needs; None in one process.
        """
        world_size = get_dist_info()[1]
        if world_size == 1:
            return x, None
        order = self.draw(len(x) * world_size)
        return exchange_rows(x, order), torch.argsort(order)

    @staticmethod
    def unshuffle(tensors: Sequence[Tensor],
                  order: Optional[Tensor]) -> Sequence[Tensor]:
        """Bring what was computed from shuffled rows back to their owners.

        Args:
            tensors (Sequence[Tensor]): Any number of (N, ...) tensors; they
                travel as one message.
            order (Tensor, optional): From :meth:`shuffle`.

        Returns:
            Sequence[Tensor]: The tensors in the owners' order.
        """
        if order is None:
            return tensors
        shapes = [x.shape[1:] for x in tensors]
        packed = torch.cat([x.flatten(start_dim=1) for x in tensors], dim=1)
        sizes = [shape.numel() for shape in shapes]
        pieces = exchange_rows(packed, order).split(sizes, dim=1)
        return [x.unflatten(1, s) for x, s in zip(pieces, shapes)]
