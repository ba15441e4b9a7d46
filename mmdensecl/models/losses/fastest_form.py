# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Which form of the queue's statistics a GPU runs: measured, not assumed."""
import logging
import time
from typing import Dict

import torch
from mmengine.logging import print_log
from torch import Tensor

from .queue_statistics import Form, QueueStatistics, stream_queue

_CHOSEN: Dict[tuple, Form] = {}


def product_type(query: Tensor) -> torch.dtype:
    """What a matrix product of float32 is computed in: autocast's type."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return query.dtype


def fused(query: Tensor, queue: Tensor,
          with_weighted: bool) -> QueueStatistics:
    """One Triton kernel for all of the queue.

    Under autocast it multiplies copies of queries and queue in autocast's
    type. Its sums are float32.

    Args:
        query (Tensor): Queries over the temperature, (M, D).
        queue (Tensor): Keys, (K, D).
        with_weighted (bool): Whether the weighted sum is wanted.

    Returns:
        QueueStatistics: In float32.
    """
    from .queue_statistics_triton import queue_statistics_triton
    dtype = product_type(query)
    return QueueStatistics(*queue_statistics_triton(
        query.to(dtype), queue.to(dtype), with_weighted))


def fastest_form(query: Tensor, queue: Tensor, with_weighted: bool) -> Form:
    """The form to use for such tensors.

    On a GPU both forms run on the first tensors of a shape, and the Triton
    kernel is taken where it agrees and is faster; the log says so. With
    deterministic algorithms, where two runs must not choose differently, on
    other devices and for float64 it is :func:`stream_queue`.

    Args:
        query (Tensor): Queries over the temperature, (M, D).
        queue (Tensor): Keys, (K, D).
        with_weighted (bool): Whether the weighted sum is wanted.

    Returns:
        Form: A function of the three arguments.
    """
    if (query.device.type != 'cuda' or query.dtype != torch.float32
            or torch.are_deterministic_algorithms_enabled()):
        return stream_queue
    case = (query.device, product_type(query), query.shape, queue.shape,
            with_weighted)
    if case not in _CHOSEN:
        _CHOSEN[case] = choose_form(query, queue, with_weighted)
    return _CHOSEN[case]


def choose_form(*args) -> Form:
    """Run both forms, see :func:`fastest_form`."""
    query, queue, _ = args
    dtype = product_type(query)
    what = f'InfoNCE of {len(query)} x {len(queue)} in {dtype}'
    try:
        right = agree(stream_queue(*args), fused(*args), dtype)
        ours, plain = seconds(fused, *args), seconds(stream_queue, *args)
    except Exception as error:  # no Triton, or a GPU or type it cannot serve
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
        print_log(
            f'{what}: in PyTorch, as the Triton kernel does not run here '
            f'({reason})',
            logger='current')
        return stream_queue
    if not right:
        print_log(
            f'{what}: in PyTorch, as the Triton kernel gives other numbers. '
            'Please report this with the output of '
            'python -m torch.utils.collect_env',
            logger='current',
            level=logging.WARNING)
        return stream_queue
    print_log(
        f'{what}: in {"Triton" if ours < plain else "PyTorch"} (Triton '
        f'{1e3 * ours:.2f} ms, PyTorch {1e3 * plain:.2f} ms)',
        logger='current')
    return fused if ours < plain else stream_queue


def seconds(form: Form, *args) -> float:
    """The shortest of three runs, after one that may compile."""
    times = []
    for _ in range(4):
        wait(args[0])
        begin = time.perf_counter()
        form(*args)
        wait(args[0])
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def wait(x: Tensor) -> None:
    """Until the GPU that holds a tensor has done its work."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def agree(exact: QueueStatistics, other: QueueStatistics,
          dtype: torch.dtype) -> bool:
    """Whether a form is as near to the exact one as its rounding allows.

    Four times the precision of its products: of the largest logit and of the
    log-sum-exp plus one, and of the length of the mean key, which shows wrong
    gradients. At temperature 0.2 bfloat16 needs less than one.

    Args:
        exact (QueueStatistics): Of :func:`stream_queue`.
        other (QueueStatistics): Of the other form.
        dtype (torch.dtype): What the other multiplies in.

    Returns:
        bool: False also where a number is not finite.
    """
    # PyTorch may be allowed to round float32 to TF32, which has 10 bits.
    tolerance = 4 * max(torch.finfo(dtype).eps, 2**-10)

    def near(a: Tensor, b: Tensor, size: Tensor) -> bool:
        return bool(((a - b).abs() <= tolerance * size).all())

    logs = [(x.peak, x.peak + x.total.log()) for x in (exact, other)]
    if not all(near(a, b, 1 + a.abs()) for a, b in zip(*logs)):
        return False
    if exact.weighted is None:
        return True
    a, b = (x.weighted / x.total[:, None] for x in (exact, other))
    apart = (a - b).norm(dim=1)
    return near(apart, torch.zeros_like(apart), a.norm(dim=1))
