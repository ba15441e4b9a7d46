# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Contrastive losses, and the head that averages them."""

from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmdensecl.registry import MODELS

from .distributed import mean_over_positives, mean_over_ranks
from .metrics import contrast_metrics
from .modules import check_positive

# Logits of a block: they should stay in a CPU's cache, and keep a GPU busy
# for longer than launching the next kernels takes.
MAX_LOGITS = dict(cpu=2**20, cuda=2**24)
# Queries of a block: of more, the blocks of the queue would be too narrow to
# multiply fast.
MAX_ROWS = 2048


class InfoNCEResult(NamedTuple):
    """InfoNCE of M query rows.

    Attributes:
        loss: Of each row, (M, ), or of each of its k positives, (M, k).
        positive: Similarity to the row's own key or keys, of the same shape.
        hardest_negative: Largest similarity to a key of the queue, (M, ).
    """

    loss: Tensor
    positive: Tensor
    hardest_negative: Tensor


class QueueStatistics(NamedTuple):
    """Sums over the queue for each of M queries."""

    peak: Tensor  # largest logit, (M, )
    total: Tensor  # sum of exp(logit - peak), (M, )
    weighted: Tensor  # sum of exp(logit - peak) * key, (M, D)


def _full_precision(
    query: Tensor, key: Tensor, queue: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """All in the query's type, float32 at least; no gradient into keys."""
    if query.dtype in (torch.float16, torch.bfloat16):
        query = query.float()
    return query, key.detach().to(query), queue.detach().to(query)


def _beside(x: Tensor, key: Tensor) -> Tensor:
    """Give rows an axis for their positives, where the keys have one."""
    return x[:, None] if key.dim() == 3 else x


def info_nce_reference(
    query: Tensor, key: Tensor, queue: Tensor, temperature: float = 0.2
) -> InfoNCEResult:
    r""":func:`info_nce` written as in the papers.

    .. math::
        L_i = -\log \frac{\exp(q_i \cdot k_i / \tau)}
            {\exp(q_i \cdot k_i / \tau) + \sum_n \exp(q_i \cdot n / \tau)}

    (MoCo, eq. 1; DenseCL, eq. 1 for vectors and eq. 2 for grid cells.) A row
    with several positives has such a loss for each, and none of them is a
    negative of another. It holds all logits at once; the tests compare
    :func:`info_nce` with it.
    """
    with torch.autocast(query.device.type, enabled=False):
        query, key, queue = _full_precision(query, key, queue)
        positive = (_beside(query, key) * key).sum(dim=-1)  # (M, ) or (M, k)
        negative = query @ queue.t()  # (M, K)
        others = _beside(negative, key).expand(*positive.shape, -1)
        logits = torch.cat([positive[..., None], others], dim=-1) / temperature
        labels = torch.zeros_like(positive, dtype=torch.long)
        loss = F.cross_entropy(
            logits.flatten(end_dim=-2), labels.flatten(), reduction='none'
        )
    return InfoNCEResult(
        loss.view_as(positive),
        positive.detach(),
        negative.detach().amax(dim=1),
    )


@torch.no_grad()
def stream_queue(
    query: Tensor,
    queue: Tensor,
    block_size: int | None = None,
    product_type: torch.dtype | None = None,
) -> QueueStatistics:
    """Reduce the logits block by block, so that they never exist all at once.

    The weighted sum obeys the same running-maximum recurrence as the
    log-sum-exp (Milakov and Gimelshein, arXiv 1805.02867), so one pass gives
    both.

    Args:
        query: Queries over the temperature, (M, D).
        queue: Keys, (K, D), of the same type.
        block_size: Keys in a block; None: as many as make `MAX_LOGITS`
            logits.
        product_type: Type of the matrix products; the sums over blocks stay
            in the type of `query`. None means that type.
    """
    product_type = product_type or query.dtype
    if block_size is None:
        most = MAX_LOGITS.get(query.device.type, MAX_LOGITS['cuda'])
        block_size = max(1, most // max(1, min(len(query), MAX_ROWS)))
    with torch.autocast(query.device.type, enabled=False):
        parts = [
            _stream(rows, queue.to(product_type), block_size)
            for rows in query.split(MAX_ROWS)
        ]
    if len(parts) == 1:
        return parts[0]
    return QueueStatistics(*map(torch.cat, zip(*parts, strict=True)))


def _stream(query: Tensor, queue: Tensor, block_size: int) -> QueueStatistics:
    peak = query.new_full((len(query),), -torch.inf)  # (M, )
    total = torch.zeros_like(peak)  # (M, )
    weighted = torch.zeros_like(query)  # (M, D)
    rows = query.to(queue)
    # One buffer: fresh memory for each block costs a CPU more than the maths.
    buffer = rows.new_empty(len(query), min(block_size, len(queue)))
    for block in queue.split(block_size):  # (B, D)
        logits = torch.mm(rows, block.t(), out=buffer[:, : len(block)])
        logits = logits.to(query)
        new_peak = torch.maximum(peak, logits.amax(dim=1))
        decay = torch.exp(peak - new_peak)
        weights = logits.sub_(new_peak[:, None]).exp_()  # (M, B)
        total = total * decay + weights.sum(dim=1)
        weighted.mul_(decay[:, None])
        if weights.dtype == block.dtype:
            weighted.addmm_(weights, block)
        else:
            weighted.add_(torch.mm(weights.to(block), block))
        peak = new_peak
    return QueueStatistics(peak, total, weighted)


class _InfoNCE(torch.autograd.Function):
    """InfoNCE from the sums over the queue.

    The gradient of a row is (softmax-weighted mean of the queue - positive
    key) / temperature, times the softmax weight of the whole queue, so the
    forward pass has all that the backward pass needs.
    """

    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        queue: Tensor,
        temperature: float,
        block_size: int | None,
        product_type: torch.dtype | None,
    ):
        query = query / temperature
        negatives = stream_queue(query, queue, block_size, product_type)
        positive = (_beside(query, key) * key).sum(dim=-1)
        # How far the queue's log-sum-exp lies above the positive: the loss is
        # the logistic one of that gap. Small terms come last.
        gap = (_beside(negatives.peak, key) - positive) + _beside(
            torch.log(negatives.total), key
        )
        loss = -F.logsigmoid(-gap)
        mean = negatives.weighted / negatives.total[:, None]  # (M, D)
        weight = torch.sigmoid(gap) / temperature
        ctx.save_for_backward(
            (_beside(mean, key) - key).mul_(weight[..., None])
        )
        positive = positive * temperature
        hardest = negatives.peak * temperature
        ctx.mark_non_differentiable(positive, hardest)
        return loss, positive, hardest

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_):
        (gradient,) = ctx.saved_tensors
        gradient = grad_loss[..., None] * gradient
        if gradient.dim() == 3:
            gradient = gradient.sum(dim=1)
        return gradient, None, None, None, None, None


def info_nce(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float = 0.2,
    block_size: int | None = None,
) -> InfoNCEResult:
    """Blockwise InfoNCE: the logits never exist all at once.

    The value and the gradient of :func:`info_nce_reference`, exact up to
    rounding; differentiable once. All sums are in float32, also of
    half-precision input; float64 stays float64. Under autocast the products
    with the queue are in autocast's type, those with the positives are not.

    Args:
        query: Queries, (M, D).
        key: The positive key of each query, (M, D), or its k keys,
            (M, k, D). No gradient flows into them.
        queue: Negative keys, (K, D). No gradient either.
        temperature: Divides the similarities.
        block_size: Keys in a block, see :func:`stream_queue`.
    """
    query, key, queue = _full_precision(query, key, queue)
    device = query.device.type
    product_type = None
    if torch.is_autocast_enabled(device) and query.dtype == torch.float32:
        product_type = torch.get_autocast_dtype(device)
    return InfoNCEResult(
        *_InfoNCE.apply(
            query, key, queue, temperature, block_size, product_type
        )
    )


@MODELS.register_module()
class InfoNCE(nn.Module):
    """InfoNCE as a module, see :func:`info_nce`.

    Args:
        temperature: Divides the similarities, above 0. The default is
            MoCo-v2's and DenseCL's.
    """

    def __init__(self, temperature: float = 0.2) -> None:
        super().__init__()
        check_positive(temperature=temperature)
        self.temperature = temperature

    def forward(
        self, query: Tensor, key: Tensor, queue: Tensor
    ) -> InfoNCEResult:
        """Shapes: query (M, D), key (M, D) or (M, k, D), queue (K, D)."""
        return info_nce(query, key, queue, self.temperature)


def sup_con(
    query: Tensor,
    points: Tensor,
    query_labels: Tensor,
    point_labels: Tensor,
    temperature: float,
) -> Tensor:
    r"""Supervised contrast: points of the query's label are its positives.

    .. math::
        L_i = -\frac{1}{|P(i)|} \sum_{p \in P(i)}
            \log \frac{\exp(q_i \cdot z_p / \tau)}
            {\sum_a \exp(q_i \cdot z_a / \tau)}

    (Khosla et al. 2020, eq. 2, :math:`L_{out}`.) Here the anchors are not
    among the points, so the sum in the denominator leaves none out.

    Normalised anchors (M, D) and points (G, D), labels (M, ) and (G, ); at
    least one point has the label of each anchor. Gives losses (M, ).
    """
    logits = query @ points.t() / temperature  # (M, G)
    same = query_labels[:, None] == point_labels
    # The mean of the log-softmax over the positives, without its M x G terms.
    positive = (logits * same).sum(dim=1) / same.sum(dim=1)
    return logits.logsumexp(dim=1) - positive


@MODELS.register_module()
class ContrastiveHead(BaseModule):
    """Contrast query rows with their keys and a queue of negatives.

    A row is an image in the global branch and a grid cell in the dense one.

    Args:
        loss: Config of the loss.
    """

    def __init__(self, loss: dict = dict(type='mmdensecl.InfoNCE')) -> None:
        super().__init__()
        self.loss_module = MODELS.build(loss)

    def loss(
        self,
        query: Tensor,
        key: Tensor,
        queue: Tensor,
        weight: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the rows that have a positive, and what to log.

        Of several positives of a row the mean is taken first, so that each
        row weighs the same.

        Args:
            query: Normalised queries, (M, D).
            key: The key of each query, normalised, (M, D), or its
                keys, (M, k, D).
            queue: Normalised negatives, (K, D).
            weight: What each positive counts, bool or float, (M, ) or (M, k).
                None means 1.

        Returns:
            The scalar of ``mean_over_ranks`` and the ``contrast_metrics``.
        """
        result = self.loss_module(query, key, queue)
        loss = mean_over_ranks(*mean_over_positives(result.loss, weight))
        return loss, contrast_metrics(result, weight)
