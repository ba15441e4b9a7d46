# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What ranks share: randomness, shuffled batches and means.

To batch norm and the shuffle a rank is a process or, with
``virtual_ranks=V``, one of V groups of a process's batch; both give the same
numbers. All else here is between processes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn as nn
from mmengine.dist import all_reduce, get_dist_info, sync_random_seed
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Copy a small CPU tensor to a device without waiting for the device."""
    if device.type == 'cuda':
        x = x.pin_memory()  # else the CPU may wait until it has arrived
    return x.to(device, non_blocking=True)


class SyncedGenerator(nn.Module):
    """Random numbers that are equal on all ranks and after a resume.

    What is drawn depends on a seed that the ranks agree on at the first step
    and on the number of the draw. Both are saved with the weights.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seed: int | None = None
        self.step = 0

    def get_extra_state(self) -> Tensor:
        seed = -1 if self.seed is None else self.seed
        return torch.tensor([seed, self.step])

    def set_extra_state(self, state: Tensor) -> None:
        seed, self.step = state.tolist()
        self.seed = None if seed < 0 else seed

    def agree(self) -> int:
        """Agree on a seed with the other ranks, unless there is one."""
        if self.seed is None:
            self.seed = sync_random_seed()
        return self.seed

    def next_generator(
        self, device: torch.device | str = 'cpu'
    ) -> torch.Generator:
        """Return a freshly seeded generator for the next draw."""
        generator = torch.Generator(device)
        # Torch mixes nearby seeds well; the prime keeps runs whose seeds
        # differ by little from sharing draws at shifted steps.
        generator.manual_seed(self.agree() * 1_000_003 + self.step)
        self.step += 1
        return generator


def draw_positions(
    num_images: int, num_positions: int, count: int, generator: torch.Generator
) -> Tensor:
    """Draw distinct grid positions for each image of this process, (N, count).

    Drawn for the images of all ranks, so that the number of ranks and
    processes changes nothing; the generator is in the same state on all ranks,
    and its device is the result's.
    """
    if count > num_positions:
        raise ValueError(
            f'{count} cells cannot be drawn from a grid of {num_positions}. '
            'Lower model.num_samples or model.cells_per_image, or enlarge the '
            'views or neck.num_grid.'
        )
    rank, world_size = get_dist_info()
    lots = torch.rand(
        world_size * num_images,
        num_positions,
        generator=generator,
        device=generator.device,
    )
    own = lots[rank * num_images : (rank + 1) * num_images]
    return own.topk(count, dim=1).indices


def exchange_rows(x: Tensor, order: Tensor) -> Tensor:
    """Reorder the rows of a batch that is spread over the processes.

    Processes send each other only the rows that the other needs.

    Args:
        x: This process's N rows; every process holds as many.
        order: A permutation of the N * world_size global rows, on the CPU,
            the same on all processes. This one gets
            ``order[rank * N:(rank + 1) * N]``.
    """
    rank, world_size = get_dist_info()
    channels_last = x.dim() == 4 and x.is_contiguous(
        memory_format=torch.channels_last
    )
    if channels_last and not x.is_contiguous():
        rows = exchange_rows(x.permute(0, 2, 3, 1).contiguous(), order)
        return rows.permute(0, 3, 1, 2)
    if world_size == 1:
        return x[to_device(order, x.device)]
    size = len(x)
    x = x.contiguous()  # rows must be whole in memory
    owner = torch.div(order, size, rounding_mode='floor')
    # Global positions that this process fills, sorted by their receiver.
    mine = (owner == rank).nonzero().flatten()
    send = x[to_device(order[mine] % size, x.device)]
    receivers = torch.div(mine, size, rounding_mode='floor')
    senders = owner[rank * size : (rank + 1) * size]
    received = torch.empty_like(x)
    dist.all_to_all_single(
        received,
        send,
        torch.bincount(senders, minlength=world_size).tolist(),
        torch.bincount(receivers, minlength=world_size).tolist(),
    )
    # They come sorted by sender, each sender's in the order of our positions.
    positions = torch.argsort(senders, stable=True)
    result = torch.empty_like(x)
    result[to_device(positions, x.device)] = received
    return result


class BatchShuffle(SyncedGenerator):
    """Shuffle BN: mix the key batch over all ranks (MoCo, section 3.3).

    Batch norm sees the images of one rank together. Were the two views of an
    image normalised with the same companions, the statistics would give the
    pair away, so the keys are mixed over the ranks and sorted back afterwards.
    With a single rank nothing happens.
    """

    def shuffle(
        self, x: Tensor, virtual_ranks: int = 1
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the rows (N, ...) of all ranks.

        Gives as many rows from anywhere, and the order that :meth:`unshuffle`
        needs; None where there is one rank.
        """
        world_size = get_dist_info()[1]
        if world_size * virtual_ranks == 1:
            return x, None
        # On the CPU, which plans the exchange.
        generator = self.next_generator()
        order = torch.randperm(len(x) * world_size, generator=generator)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order))  # faster than a sort
        return exchange_rows(x, order), inverse

    @staticmethod
    def unshuffle(
        tensors: Sequence[Tensor], order: Tensor | None
    ) -> Sequence[Tensor]:
        """Return what was computed from shuffled rows to their owners.

        Any number of tensors (N, ...) travel as one message.
        """
        if order is None:
            return tensors
        shapes = [x.shape[1:] for x in tensors]
        packed = torch.cat([x.flatten(start_dim=1) for x in tensors], dim=1)
        sizes = [shape.numel() for shape in shapes]
        pieces = exchange_rows(packed, order).split(sizes, dim=1)
        return [x.unflatten(1, s) for x, s in zip(pieces, shapes, strict=True)]


@contextmanager
def running_stats_kept(module: nn.Module) -> Iterator[None]:
    """Leave running statistics of batch norm alone, in train mode too.

    Each rank of a distributed run updates its own, and those of the first
    rank are saved; so only the first virtual rank may update them.
    """
    norms = [
        m
        for m in module.modules()
        if isinstance(m, _BatchNorm) and m.track_running_stats and m.training
    ]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


def auto_virtual_ranks(batch_size: int) -> int:
    """Return the number of virtual ranks for ``virtual_ranks='auto'``.

    Several processes need none. One process gets a group for each 32 images,
    the published number, and at least two, as one has nobody to shuffle with;
    but no group of a single image, so up to three images are one group.
    """
    if get_dist_info()[1] > 1:
        return 1
    return max(1, min(max(2, batch_size // 32), batch_size // 2))


def mean_over_positives(
    x: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Reduce to one value a row, so that all rows count the same.

    Args:
        x: One value of a row, (M, ), or of each of its positives, (M, k).
        weight: What each counts, bool or float; None means 1.

    Returns:
        The means of the rows, (M, ), 0 where nothing counts; and the weight
        of each row, that of its heaviest positive, (M, ), or None.
    """
    if x.dim() == 1:
        return x, weight
    if weight is None:
        return x.mean(dim=1), None
    total = weight.sum(dim=1)
    mean = (x * weight).sum(dim=1) / total.where(total > 0, 1)
    return mean, weight.amax(dim=1)


def mean_over_ranks(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """This process's part of a mean over the rows of all processes.

    DDP averages gradients over processes; each divides by the mean total
    weight, so that two processes give the loss that one would: the mean over
    the processes is the weighted mean over the rows of all of them.

    Args:
        x: A value of each row of this process, (M, ).
        weight: What each counts, bool or float, (M, ). None means 1, and as
            many rows in all processes.

    Returns:
        A scalar, 0 where nothing counts.
    """
    if weight is None:
        return x.mean()
    total = weight.sum().to(x)
    all_reduce(total, op='mean')
    return (x * weight).sum() / total.where(total > 0, 1)
