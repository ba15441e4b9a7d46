# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Which form of the queue's statistics a GPU runs: measured, not assumed."""
import logging
import time
from functools import partial
from typing import Dict, Optional

import torch
from mmengine.logging import print_log
from torch import Tensor

from .queue_statistics import Form, QueueStatistics, stream_queue

# Largest difference that rounding explains, of logits of a few units.
TOLERANCE = {
    torch.float32: 1e-3,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
_CHOSEN: Dict[tuple, Form] = {}


def fused(query: Tensor,
          queue: Tensor,
          with_weighted: bool,
          dtype: Optional[torch.dtype] = None) -> QueueStatistics:
    """One Triton kernel for all of the queue.

    Args:
        query (Tensor): Queries over the temperature, (M, D).
        queue (Tensor): Keys, (K, D).
        with_weighted (bool): Whether the weighted sum is wanted.
        dtype (torch.dtype, optional): Type that is multiplied; sums are in
            float32. Defaults to None, that of ``query``.

    Returns:
        QueueStatistics: In float32.
    """
    from .queue_statistics_triton import queue_statistics_triton
    return QueueStatistics(*queue_statistics_triton(
        query.to(dtype), queue.to(dtype), with_weighted))


def fastest_form(query: Tensor, queue: Tensor, with_weighted: bool,
                 dtype: torch.dtype) -> Form:
    """The form to use for such tensors.

    On a GPU both forms run on the first tensors of a shape, and the Triton
    kernel is taken where it agrees and is faster; the log says so. With
    deterministic algorithms, where two runs must not choose differently, on
    other devices and for float64 it is :func:`stream_queue`.

    Args:
        query (Tensor): Queries over the temperature, (M, D).
        queue (Tensor): Keys, (K, D).
        with_weighted (bool): Whether the weighted sum is wanted.
        dtype (torch.dtype): Type in which autocast multiplies.

    Returns:
        Form: A function of the first three arguments.
    """
    if (query.device.type != 'cuda' or query.dtype != torch.float32
            or torch.are_deterministic_algorithms_enabled()):
        return stream_queue
    case = query.device, dtype, query.shape, queue.shape, with_weighted
    if case not in _CHOSEN:
        _CHOSEN[case] = choose_form(query, queue, with_weighted, dtype)
    return _CHOSEN[case]


def choose_form(query: Tensor, queue: Tensor, with_weighted: bool,
                dtype: torch.dtype) -> Form:
    """Run both forms, see :func:`fastest_form`."""
    args = query, queue, with_weighted
    kernel = partial(fused, dtype=dtype)
    what = f'InfoNCE of {len(query)} x {len(queue)} in {dtype}'
    try:
        right = agree(kernel(*args), stream_queue(*args), TOLERANCE[dtype])
        ours, plain = seconds(kernel, *args), seconds(stream_queue, *args)
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
    return kernel if ours < plain else stream_queue


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


def agree(a: QueueStatistics, b: QueueStatistics, tolerance: float) -> bool:
    """Whether two forms give the same peak, log-sum-exp and mean key.

    Args:
        a (QueueStatistics): Of one form.
        b (QueueStatistics): Of the other.
        tolerance (float): Largest absolute difference.

    Returns:
        bool: False also where a number is not finite.
    """

    def parts(x: QueueStatistics) -> Tensor:
        columns = [x.peak[:, None], (x.peak + x.total.log())[:, None]]
        if x.weighted is not None:
            columns.append(x.weighted / x.total[:, None])
        return torch.cat(columns, dim=1)

    return bool(((parts(a) - parts(b)).abs() <= tolerance).all())
