# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from typing import NamedTuple, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmdensecl.registry import MODELS


class InfoNCEResult(NamedTuple):
    """What InfoNCE says of each of M query rows.

    Attributes:
        loss (Tensor): Loss of each row, shape (M, ), with gradient.
        positive (Tensor): Similarity to the row's own key, shape (M, ).
        hardest_negative (Tensor): Largest similarity to a key of the queue,
            shape (M, ).
    """
    loss: Tensor
    positive: Tensor
    hardest_negative: Tensor


def _full_precision(query: Tensor, key: Tensor,
                    queue: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
    """All in the query's type, float32 at least; no gradient into keys."""
    if query.dtype in (torch.float16, torch.bfloat16):
        query = query.float()
    return query, key.detach().to(query), queue.detach().to(query)


def info_nce_reference(query: Tensor,
                       key: Tensor,
                       queue: Tensor,
                       temperature: float = 0.2) -> InfoNCEResult:
    r"""InfoNCE against a queue, written as in the papers.

    .. math::
        L_i = -\log \frac{\exp(q_i \cdot k_i / \tau)}
            {\exp(q_i \cdot k_i / \tau) + \sum_n \exp(q_i \cdot n / \tau)}

    (MoCo, eq. 1; DenseCL, eq. 1 for vectors and eq. 2 for grid cells.) It
    holds all M x K logits at once, three times over with autograd;
    :func:`info_nce` gives the same numbers without. It stays as what the
    tests compare with.

    Args:
        query (Tensor): Queries, shape (M, D).
        key (Tensor): The positive key of each query, shape (M, D). No
            gradient flows into it.
        queue (Tensor): Negative keys, shape (K, D). No gradient either.
        temperature (float): :math:`\tau`. Defaults to 0.2.

    Returns:
        InfoNCEResult: Loss and similarities of each row.
    """
    with torch.autocast(query.device.type, enabled=False):
        # A step enqueues before its backward pass, which needs the old queue.
        query, key, queue = _full_precision(query, key, queue.clone())
        positive = (query * key).sum(dim=1)
        negative = query @ queue.t()
        logits = torch.cat([positive[:, None], negative], dim=1) / temperature
        labels = logits.new_zeros(len(logits), dtype=torch.long)
        loss = F.cross_entropy(logits, labels, reduction='none')
    return InfoNCEResult(loss, positive.detach(), negative.detach().amax(1))


class _StreamingInfoNCE(torch.autograd.Function):
    """InfoNCE over blocks of the queue.

    The gradient of a row is (softmax-weighted mean of all its keys - its
    positive key) / temperature. That mean obeys the same running-maximum
    recurrence as the log-sum-exp (Milakov and Gimelshein, arXiv 1805.02867),
    so one pass over the queue gives both, and nothing larger than a block of
    logits ever exists, forward or backward.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, queue: Tensor,
                temperature: float, block_size: int):
        scaled = query / temperature
        positive = (scaled * key).sum(dim=1)
        hardest = torch.full_like(positive, -torch.inf)
        # Sums over exp(logit - peak); the positive is the first term.
        peak = positive.clone()
        total = torch.ones_like(positive)
        mean = key.clone()
        with_grad = ctx.needs_input_grad[0]
        for block in queue.split(block_size):
            logits = scaled @ block.t()
            block_peak = logits.amax(dim=1)
            hardest = torch.maximum(hardest, block_peak)
            new_peak = torch.maximum(peak, block_peak)
            decay = torch.exp(peak - new_peak)
            weights = logits.sub_(new_peak[:, None]).exp_()
            total = total * decay + weights.sum(dim=1)
            if with_grad:
                mean.mul_(decay[:, None]).addmm_(weights, block)
            peak = new_peak
        if with_grad:
            ctx.save_for_backward(
                (mean / total[:, None]).sub_(key).div_(temperature))
        loss = (peak - positive) + torch.log(total)  # small terms last
        positive, hardest = positive * temperature, hardest * temperature
        ctx.mark_non_differentiable(positive, hardest)
        return loss, positive, hardest

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_):
        gradient, = ctx.saved_tensors
        return grad_loss[:, None] * gradient, None, None, None, None


def info_nce(query: Tensor,
             key: Tensor,
             queue: Tensor,
             temperature: float = 0.2,
             block_size: int = 2048) -> InfoNCEResult:
    """InfoNCE against a queue whose logits never exist all at once.

    The value and the gradient of :func:`info_nce_reference`, exact up to
    rounding, with extra memory for ``M * block_size`` logits whatever the
    length of the queue. Half-precision input is computed in float32, also
    under autocast; float64 stays float64. Second
    derivatives are not there: the gradient counts as a constant.

    Args:
        query (Tensor): Queries, shape (M, D).
        key (Tensor): The positive key of each query, shape (M, D). No
            gradient flows into it.
        queue (Tensor): Negative keys, shape (K, D). No gradient either.
        temperature (float): Divides the similarities. Defaults to 0.2.
        block_size (int): Keys of the queue looked at in one go. Defaults to
            2048.

    Returns:
        InfoNCEResult: Loss and similarities of each row.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key, queue = _full_precision(query, key, queue)
        return InfoNCEResult(*_StreamingInfoNCE.apply(query, key, queue,
                                                      temperature, block_size))


@MODELS.register_module()
class InfoNCE(nn.Module):
    """InfoNCE as a module, see :func:`info_nce`.

    Args:
        temperature (float): Divides the similarities, above 0. Defaults to
            0.2, MoCo-v2's and DenseCL's.
        streaming (bool): Whether to stream over blocks of the queue rather
            than to hold every logit. Defaults to True.
        block_size (int): Keys in a block when streaming. Defaults to 2048.

    Raises:
        ValueError: ``temperature`` or ``block_size`` is not above 0.
    """

    def __init__(self,
                 temperature: float = 0.2,
                 streaming: bool = True,
                 block_size: int = 2048) -> None:
        super().__init__()
        if temperature <= 0 or block_size <= 0:
            raise ValueError(
                'temperature and block_size of InfoNCE must be above 0, got '
                f'temperature={temperature}, block_size={block_size}')
        self.temperature = temperature
        self.streaming = streaming
        self.block_size = block_size

    def forward(self, query: Tensor, key: Tensor,
                queue: Tensor) -> InfoNCEResult:
        """Shapes: query (M, D), key (M, D), queue (K, D)."""
        if self.streaming:
            return info_nce(query, key, queue, self.temperature,
                            self.block_size)
        return info_nce_reference(query, key, queue, self.temperature)

    def extra_repr(self) -> str:
        return (f'temperature={self.temperature}, '
                f'streaming={self.streaming}, block_size={self.block_size}')
