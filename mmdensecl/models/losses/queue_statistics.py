# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What InfoNCE needs to know of the queue, without its M x K logits."""
from typing import Callable, NamedTuple, Optional

import torch
from torch import Tensor

# Logits looked at in one go: they should stay in a CPU's cache, and keep a
# GPU busy for longer than launching the next kernels takes.
MAX_LOGITS = dict(cpu=2**20, cuda=2**24)
# Queries looked at in one go: of more, the blocks of the queue would be too
# narrow to multiply fast.
MAX_ROWS = 2048


class QueueStatistics(NamedTuple):
    """Sums over the queue for each of M queries.

    Attributes:
        peak (Tensor): Largest logit, (M, ).
        total (Tensor): Sum of exp(logit - peak), (M, ).
        weighted (Tensor, optional): Sum of exp(logit - peak) * key, (M, D).
    """
    peak: Tensor
    total: Tensor
    weighted: Optional[Tensor]


# Of queries over the temperature, keys, and whether `weighted` is wanted.
Form = Callable[[Tensor, Tensor, bool], QueueStatistics]


@torch.no_grad()
def stream_queue(query: Tensor,
                 queue: Tensor,
                 with_weighted: bool,
                 block_size: Optional[int] = None) -> QueueStatistics:
    """Block after block of the queue, in plain PyTorch.

    In the type of its input, also under autocast. The weighted sum obeys the
    same running-maximum recurrence as the log-sum-exp (Milakov and Gimelshein,
    arXiv 1805.02867), so one pass gives both.

    Args:
        query (Tensor): Queries over the temperature, (M, D).
        queue (Tensor): Keys, (K, D), of the same type.
        with_weighted (bool): Whether the weighted sum is wanted.
        block_size (int, optional): Keys in a block. Defaults to None: as many
            as make ``MAX_LOGITS`` logits.

    Returns:
        QueueStatistics: In the type of ``query``.
    """
    if block_size is None:
        most = MAX_LOGITS.get(query.device.type, MAX_LOGITS['cuda'])
        block_size = max(1, most // max(1, min(len(query), MAX_ROWS)))
    with torch.autocast(query.device.type, enabled=False):
        parts = [
            _stream(rows, queue, with_weighted, block_size)
            for rows in query.split(MAX_ROWS)
        ]
    if len(parts) == 1:
        return parts[0]
    peaks, totals, weighted = zip(*parts)
    return QueueStatistics(
        torch.cat(peaks), torch.cat(totals),
        torch.cat(weighted) if with_weighted else None)


def _stream(query: Tensor, queue: Tensor, with_weighted: bool,
            block_size: int) -> QueueStatistics:
    peak = query.new_full((len(query), ), -torch.inf)
    total = torch.zeros_like(peak)
    weighted = torch.zeros_like(query) if with_weighted else None
    # One buffer: fresh memory for each block costs a CPU more than the maths.
    buffer = query.new_empty(len(query), min(block_size, len(queue)))
    for block in queue.split(block_size):
        logits = torch.mm(query, block.t(), out=buffer[:, :len(block)])
        new_peak = torch.maximum(peak, logits.amax(dim=1))
        decay = torch.exp(peak - new_peak)
        weights = logits.sub_(new_peak[:, None]).exp_()
        total = total * decay + weights.sum(dim=1)
        if weighted is not None:
            weighted.mul_(decay[:, None]).addmm_(weights, block)
        peak = new_peak
    return QueueStatistics(peak, total, weighted)
