# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmdensecl.registry import MODELS
from .fastest_form import fastest_form, fused
from .queue_statistics import Form, stream_queue


class InfoNCEResult(NamedTuple):
    """What InfoNCE says of each of M query rows.

    Attributes:
        loss (Tensor): Loss of each row, shape (M, ), or of each of its k
            positives, shape (M, k), with gradient.
        positive (Tensor): Similarity to the row's own key or keys, of the
            same shape.
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


def _beside(x: Tensor, key: Tensor) -> Tensor:
    """Give rows an axis for their positives, where the keys have one."""
    return x[:, None] if key.dim() == 3 else x


def info_nce_reference(query: Tensor,
                       key: Tensor,
                       queue: Tensor,
                       temperature: float = 0.2) -> InfoNCEResult:
    r"""InfoNCE against a queue, written as in the papers.

    .. math::
        L_i = -\log \frac{\exp(q_i \cdot k_i / \tau)}
            {\exp(q_i \cdot k_i / \tau) + \sum_n \exp(q_i \cdot n / \tau)}

    (MoCo, eq. 1; DenseCL, eq. 1 for vectors and eq. 2 for grid cells.) A row
    with several positives has such a loss for each, and none of them is a
    negative of another. It holds all logits at once, three times over with
    autograd; :func:`info_nce` gives the same numbers without. It stays as what
    the tests compare with.

    Args:
        query (Tensor): Queries, shape (M, D).
        key (Tensor): The positive key of each query, shape (M, D), or its k
            keys, shape (M, k, D). No gradient flows into them.
        queue (Tensor): Negative keys, shape (K, D). No gradient either.
        temperature (float): :math:`\tau`. Defaults to 0.2.

    Returns:
        InfoNCEResult: Loss and similarities of each row.
    """
    with torch.autocast(query.device.type, enabled=False):
        # A step enqueues before its backward pass, which needs the old queue.
        query, key, queue = _full_precision(query, key, queue.clone())
        positive = (_beside(query, key) * key).sum(dim=-1)
        negative = query @ queue.t()
        others = _beside(negative, key).expand(*positive.shape, -1)
        logits = torch.cat([positive[..., None], others], dim=-1) / temperature
        labels = torch.zeros_like(positive, dtype=torch.long)
        loss = F.cross_entropy(
            logits.flatten(end_dim=-2), labels.flatten(), reduction='none')
    return InfoNCEResult(
        loss.view_as(positive), positive.detach(),
        negative.detach().amax(dim=1))


class _InfoNCE(torch.autograd.Function):
    """InfoNCE from the sums over the queue.

    The gradient of a row is (softmax-weighted mean of the queue - positive
    key) / temperature, times the softmax weight of the whole queue, so the
    forward pass has all that the backward pass needs, and nothing of the size
    of the logits is kept.
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, queue: Tensor,
                temperature: float, form: Optional[Form]):
        with_grad = ctx.needs_input_grad[0]
        args = query / temperature, queue, with_grad
        negatives = (form or fastest_form(*args))(*args)
        positive = (_beside(args[0], key) * key).sum(dim=-1)
        # How far the queue's log-sum-exp lies above the positive: the loss is
        # the logistic one of that gap. Small terms come last.
        gap = (_beside(negatives.peak, key) - positive) + _beside(
            torch.log(negatives.total), key)
        loss = -F.logsigmoid(-gap)
        if with_grad:
            mean = negatives.weighted / negatives.total[:, None]
            weight = torch.sigmoid(gap) / temperature
            ctx.save_for_backward(
                (_beside(mean, key) - key).mul_(weight[..., None]))
        positive = positive * temperature
        hardest = negatives.peak * temperature
        ctx.mark_non_differentiable(positive, hardest)
        return loss, positive, hardest

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss: Tensor, *_):
        gradient, = ctx.saved_tensors
        gradient = grad_loss[..., None] * gradient
        if gradient.dim() == 3:
            gradient = gradient.sum(dim=1)
        return gradient, None, None, None, None


def info_nce(query: Tensor,
             key: Tensor,
             queue: Tensor,
             temperature: float = 0.2,
             form: Optional[Form] = None) -> InfoNCEResult:
    """InfoNCE against a queue whose logits never exist all at once.

    The value and the gradient of :func:`info_nce_reference`, exact up to
    rounding, without logits that grow with the queue. All sums are in float32,
    also of half-precision input and under autocast; float64 stays float64.
    Under autocast on a GPU the form that is chosen may multiply in half
    precision. Second derivatives are not there: the gradient counts as a
    constant.

    Args:
        query (Tensor): Queries, shape (M, D).
        key (Tensor): The positive key of each query, shape (M, D), or its k
            keys, shape (M, k, D). No gradient flows into them.
        queue (Tensor): Negative keys, shape (K, D). No gradient either.
        temperature (float): Divides the similarities. Defaults to 0.2.
        form (Callable, optional): What walks through the queue, such as
            :func:`stream_queue`. Defaults to None, :func:`fastest_form`'s
            choice.

    Returns:
        InfoNCEResult: Loss and similarities of each row.
    """
    query, key, queue = _full_precision(query, key, queue)
    return InfoNCEResult(*_InfoNCE.apply(query, key, queue, temperature, form))


# Names of a config's forms.
FORMS = {'auto': None, 'stream': stream_queue, 'triton': fused}


@MODELS.register_module()
class InfoNCE(nn.Module):
    """InfoNCE as a module, see :func:`info_nce`.

    Args:
        temperature (float): Divides the similarities, above 0. Defaults to
            0.2, MoCo-v2's and DenseCL's.
        form (str): What walks through the queue: 'stream' is plain PyTorch,
            'triton' a kernel for GPUs, which multiplies in autocast's type,
            'auto' the faster of both, measured at the first step, so that two
            runs on a GPU may round differently unless they are deterministic;
            'reference' holds every logit. Defaults to 'auto'.

    Raises:
        ValueError: ``temperature`` is not above 0, or ``form`` is unknown.
    """

    def __init__(self, temperature: float = 0.2, form: str = 'auto') -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError('temperature of InfoNCE must be above 0, got '
                             f'{temperature}')
        if form not in (*FORMS, 'reference'):
            raise ValueError(f'form of InfoNCE must be one of {[*FORMS]} or '
                             f"'reference', got {form!r}")
        self.temperature = temperature
        self.form = form

    def forward(self, query: Tensor, key: Tensor,
                queue: Tensor) -> InfoNCEResult:
        """Shapes: query (M, D), key (M, D) or (M, k, D), queue (K, D)."""
        if self.form == 'reference':
            return info_nce_reference(query, key, queue, self.temperature)
        return info_nce(query, key, queue, self.temperature, FORMS[self.form])

    def extra_repr(self) -> str:
        return f'temperature={self.temperature}, form={self.form!r}'
