# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The pass over the queue of InfoNCE, as one Triton kernel.

To be imported only where it is used: Triton is on Linux only.
"""
import functools
import math
from typing import Dict, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# More would need smaller blocks than the ones below.
MAX_CHANNELS = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of all partial means together.
MAX_PARTIAL_BYTES = 32 * 2**20


@triton.jit
def partial_statistics(
    query_ptr,
    queue_ptr,
    peak_ptr,
    total_ptr,
    mean_ptr,
    num_rows,
    queue_len,
    split_len,
    D: tl.constexpr,
    WITH_MEAN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One block of queries against one stretch of the queue.

    Program (i, s) looks at rows ``i * BLOCK_M`` and on of the queries and at
    keys ``s * split_len`` and on of the queue, and writes its peak and total
    to (s, row) and its mean to (s, row, channel).
    """
    split = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < num_rows
    channels = tl.arange(0, BLOCK_D)
    channel_ok = (channels < D)[None, :]
    # As 64-bit numbers, since a queue may hold over 2 ** 31 values.
    row_starts = rows[:, None].to(tl.int64) * D

    peak = tl.full((BLOCK_M, ), float('-inf'), tl.float32)
    total = tl.zeros((BLOCK_M, ), tl.float32)
    mean = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if BLOCK_C == BLOCK_D:
        query = tl.load(
            query_ptr + row_starts + channels[None, :],
            mask=row_ok[:, None] & channel_ok,
            other=0.)
    start = tl.program_id(1) * split_len
    stop = tl.minimum(start + split_len, queue_len)
    for first in range(start, stop, BLOCK_K):
        keys = first + tl.arange(0, BLOCK_K)
        key_ok = keys < stop
        key_starts = keys[:, None].to(tl.int64) * D
        block = tl.load(
            queue_ptr + key_starts + channels[None, :],
            mask=key_ok[:, None] & channel_ok,
            other=0.)
        if BLOCK_C == BLOCK_D:
            logits = tl.dot(query, tl.trans(block), input_precision=PRECISION)
        else:
            logits = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for channel in range(0, D, BLOCK_C):
                some = channel + tl.arange(0, BLOCK_C)
                some_ok = (some < D)[None, :]
                some_query = tl.load(
                    query_ptr + row_starts + some[None, :],
                    mask=row_ok[:, None] & some_ok,
                    other=0.)
                some_keys = tl.load(
                    queue_ptr + key_starts + some[None, :],
                    mask=key_ok[:, None] & some_ok,
                    other=0.)
                logits = tl.dot(
                    some_query,
                    tl.trans(some_keys),
                    logits,
                    input_precision=PRECISION)
        logits = tl.where(key_ok[None, :], logits, float('-inf'))
        new_peak = tl.maximum(peak, tl.max(logits, 1))
        decay = tl.exp(peak - new_peak)
        weights = tl.exp(logits - new_peak[:, None])
        total = total * decay + tl.sum(weights, 1)
        if WITH_MEAN:
            mean = tl.dot(
                weights.to(block.dtype),
                block,
                mean * decay[:, None],
                input_precision=PRECISION)
        peak = new_peak

    tl.store(peak_ptr + split * num_rows + rows, peak, mask=row_ok)
    tl.store(total_ptr + split * num_rows + rows, total, mask=row_ok)
    if WITH_MEAN:
        tl.store(
            mean_ptr + split * num_rows * D + row_starts + channels[None, :],
            mean,
            mask=row_ok[:, None] & channel_ok)


def block_sizes(dtype: torch.dtype, num_rows: int,
                channels: int) -> Dict[str, int]:
    """What :func:`partial_statistics` is compiled with.

    Fixed rather than tuned at the start of each run. Chosen so that nothing
    spills out of the registers and a block fits the 99 KiB of shared memory
    of the smaller GPUs of compute capability 8.

    Args:
        dtype (torch.dtype): Type of the queries and of the queue.
        num_rows (int): Number of queries.
        channels (int): Length of a query.

    Returns:
        dict: The four block sizes, ``num_warps`` and ``num_stages``.
    """
    block_d = max(16, triton.next_power_of_2(channels))
    block_m = 128 if block_d <= 128 else 64
    block_m = min(block_m, max(16, triton.next_power_of_2(num_rows)))
    if dtype == torch.float32:
        # Exact products run on the plain cores, all unrolled: the compiler
        # keeps up with these sizes, with twice as much it spills.
        return dict(
            BLOCK_M=block_m,
            BLOCK_K=32,
            BLOCK_C=min(block_d, 32),
            BLOCK_D=block_d,
            num_warps=8 if block_m >= 64 else 4,
            num_stages=2)
    return dict(
        BLOCK_M=block_m,
        BLOCK_K=64,
        BLOCK_C=block_d,
        BLOCK_D=block_d,
        num_warps=8 if block_m == 128 else 4,
        num_stages=3 if block_d <= 128 else 2)


@functools.lru_cache(maxsize=None)
def split_length(row_blocks: int, queue_blocks: int, slots: int,
                 max_splits: int) -> int:
    """How many blocks of the queue one program takes.

    As many splits as leave the fewest of the GPU's slots idle, the fewest
    such.

    Args:
        row_blocks (int): Number of blocks of queries.
        queue_blocks (int): Number of blocks of the queue.
        slots (int): Programs that the GPU runs at a time.
        max_splits (int): Upper bound on the number of splits.

    Returns:
        int: Blocks of the queue in each split but the last.
    """
    limit = max(1, min(queue_blocks, slots, max_splits))
    # Rounds of programs, times the length of a program.
    splits = min(
        range(1, limit + 1),
        key=lambda splits: math.ceil(row_blocks * splits / slots) / splits)
    return math.ceil(queue_blocks / splits)


def float32_precision() -> str:
    """The kind of float32 product that the user allowed PyTorch's matmul."""
    matmul = torch.backends.cuda.matmul
    # From torch 2.9 on; reading allow_tf32 raises once it has been set.
    precision = getattr(matmul, 'fp32_precision', None)
    allowed = matmul.allow_tf32 if precision is None else precision == 'tf32'
    return 'tf32' if allowed else 'ieee'


def queue_statistics_triton(
        query: Tensor, queue: Tensor,
        with_mean: bool) -> Tuple[Tensor, Tensor, Optional[Tensor]]:
    """Softmax statistics of each query over the queue, without the logits.

    Attention whose keys and values are both the queue (FlashAttention, arXiv
    2205.14135), which also returns what its softmax was divided by. The queue
    is split over programs and their results are merged (Flash-Decoding): there
    are too few queries to fill a GPU. Products and sums are float32; of
    half-precision input, the weights of the mean are rounded to its type.
    float32 input is multiplied as float32 unless PyTorch may use TF32
    (``torch.backends.cuda.matmul``). Needs a GPU of compute capability 8.0.

    Args:
        query (Tensor): Queries divided by the temperature, shape (M, D). Of
            one of ``DTYPES``; D is at most ``MAX_CHANNELS``.
        queue (Tensor): Keys, shape (K, D), of the same type.
        with_mean (bool): Whether to return the weighted sum of the keys too.

    Returns:
        tuple: All float32: the largest logit of each row, shape (M, ); the
        sum of ``exp(logit - largest)``, shape (M, ); the sum of the keys
        weighted by the same, shape (M, D), or None.

    Raises:
        ValueError: Types or shapes are not as above.
    """
    num_rows, channels = query.shape
    queue_len = len(queue)
    if query.dtype not in DTYPES or queue.dtype != query.dtype:
        raise ValueError(
            'query and queue must both be of one type of '
            f'{[str(dtype) for dtype in DTYPES]}, got {query.dtype} and '
            f'{queue.dtype}')
    if queue.shape != (queue_len, channels) or channels > MAX_CHANNELS:
        raise ValueError(
            f'query (M, D) and queue (K, D) must share a D of at most '
            f'{MAX_CHANNELS}, got {tuple(query.shape)} and '
            f'{tuple(queue.shape)}')
    query, queue = query.contiguous(), queue.contiguous()

    blocks = block_sizes(query.dtype, num_rows, channels)
    processors = 1  # Triton's interpreter, on the CPU.
    if query.is_cuda:
        processors = torch.cuda.get_device_properties(
            query.device).multi_processor_count
    row_blocks = triton.cdiv(num_rows, blocks['BLOCK_M'])
    split_len = blocks['BLOCK_K'] * split_length(
        row_blocks,
        triton.cdiv(queue_len, blocks['BLOCK_K']),
        slots=2 * processors,
        max_splits=MAX_PARTIAL_BYTES // (num_rows * channels * 4))
    splits = triton.cdiv(queue_len, split_len)

    peaks = query.new_empty((splits, num_rows), dtype=torch.float32)
    totals = torch.empty_like(peaks)
    means = None
    if with_mean:
        means = peaks.new_empty((splits, num_rows, channels))
    with torch.cuda.device_of(query):
        partial_statistics[row_blocks, splits](
            query,
            queue,
            peaks,
            totals,
            means,
            num_rows,
            queue_len,
            split_len,
            D=channels,
            WITH_MEAN=with_mean,
            PRECISION=float32_precision(),
            **blocks)

    peak = peaks.amax(dim=0)
    decay = peaks.sub_(peak).exp_()
    total = totals.mul_(decay).sum(dim=0)
    if with_mean:
        return peak, total, means.mul_(decay[..., None]).sum(dim=0)
    return peak, total, None
