# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What the ranks send each other in a step, ours beside mmpretrain's."""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import baselines
import measure
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from mmdensecl.models import distributed
from mmdensecl.models.distributed import BatchShuffle

PEER = 'mmpretrain DenseCL'
NAMES = [*baselines.OURS, *baselines.MMPRETRAIN]
# None of them uses these; if one does some day, it must not go unnoticed.
UNCOUNTED = (
    'all_gather_into_tensor',
    'all_gather_object',
    'all_to_all',
    'gather',
    'reduce',
    'reduce_scatter',
    'scatter',
    'send',
    'recv',
)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = measure.make_parser(
        'Bytes that a rank receives, and collective calls, in one step with '
        'ResNet-50: counted in gloo processes on this CPU, without the '
        "gradients' all-reduce, which is the same for all",
        timing=False,
    )
    parser.add_argument('--ranks', type=int, nargs='+', default=[2, 4])
    parser.add_argument(
        '--extrapolate',
        type=int,
        nargs='*',
        default=[8, 64],
        help='numbers of ranks to compute from the sizes of the messages',
    )
    parser.add_argument(
        '--simulate',
        type=int,
        nargs='*',
        default=[8, 64, 512],
        help='numbers of ranks at which the planning of the batch shuffle is '
        'timed on one core, without the exchange itself',
    )
    parser.add_argument(
        '--batch', type=int, default=8, help='images of a rank'
    )
    parser.add_argument('--size', type=int, default=224, help='of a view')
    parser.add_argument(
        '--baselines',
        nargs='+',
        choices=NAMES,
        default=NAMES,
        help=f'who is counted; {PEER} always is',
    )
    args = measure.parse(parser)
    if min(args.ranks) < 2:
        parser.error('--ranks must be at least 2')
    return args


class Call(NamedTuple):
    """One call of a collective by one rank.

    Attributes:
        name (str): Of ``torch.distributed``.
        size (int): Bytes of this rank's tensor.
        received (int): Bytes that came from other ranks: of an all-to-all
            those that were asked for, of the others what their definition
            says.
    """

    name: str
    size: int
    received: int


def expected(call: Call, ranks: int) -> float:
    """Bytes that a rank receives in such a call, on average.

    Args:
        call (Call): Only name and size matter.
        ranks (int): How many there are.

    Returns:
        float: As by ring algorithms, which receive least.
    """
    others = ranks - 1
    return (
        call.size
        * dict(
            all_gather=others,
            all_reduce=2 * others / ranks,
            all_to_all_single=others / ranks,
            broadcast=others / ranks,
        )[call.name]
    )


@contextmanager
def watched() -> Iterator[list[Call]]:
    """Note the collective calls of this process.

    Yields:
        List[Call]: Grows with each.
    """
    calls: list[Call] = []
    rank, ranks = dist.get_rank(), dist.get_world_size()
    originals = {}

    def watch(name: str, place: int) -> None:
        original = originals[name] = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            x = args[place]
            size = x.numel() * x.element_size()
            received = expected(Call(name, size, 0), ranks)
            if name == 'all_to_all_single' and len(args) > 2:
                row = size // len(x)
                received = size - row * args[2][rank]
            elif name == 'broadcast':
                received = size * (rank != kwargs.get('src', 0))
            calls.append(Call(name, size, int(received)))
            return original(*args, **kwargs)

        setattr(dist, name, call)

    # Where in the arguments this rank's tensor is.
    for name, place in dict(
        all_gather=1, all_reduce=0, all_to_all_single=0, broadcast=0
    ).items():
        watch(name, place)

    def unknown(*_: Any, **__: Any) -> None:
        raise NotImplementedError('a collective that is not counted here')

    for name in UNCOUNTED:
        originals[name] = getattr(dist, name)
        setattr(dist, name, unknown)
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def work(
    rank: int, ranks: int, name: str, batch: int, size: int, folder: str
) -> None:
    """One rank: the second of two steps is watched and written down."""
    torch.set_num_threads(1)
    dist.init_process_group(
        'gloo', f'file://{folder}/store', rank=rank, world_size=ranks
    )
    model = baselines.build(baselines.config(name), 'cpu')
    data = baselines.views(batch, size, 'cpu')
    for _ in range(2):
        with torch.no_grad(), watched() as calls:
            model(**data, mode='loss')
    torch.save([tuple(call) for call in calls], f'{folder}/{rank}.pt')
    dist.barrier()
    dist.destroy_process_group()


def count(name: str, ranks: int, batch: int, size: int) -> list[list[Call]]:
    """The calls of each rank in a step."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (ranks, name, batch, size, folder), nprocs=ranks)
        return [
            [Call(*x) for x in torch.load(f'{folder}/{rank}.pt')]
            for rank in range(ranks)
        ]


def plan_seconds(ranks: int, batch: int, steps: int = 50) -> float:
    """CPU seconds that the first of many ranks plans in a step.

    Both directions of the batch shuffle, with rows of one number; nothing is
    sent.
    """
    shuffle = BatchShuffle()
    shuffle.seed = 0
    rows = torch.zeros(batch, 1)
    times = []
    with (
        mock.patch.object(distributed, 'get_dist_info', lambda: (0, ranks)),
        mock.patch.object(dist, 'all_to_all_single'),
    ):
        for _ in range(steps):
            start = time.process_time()
            shuffled, order = shuffle.shuffle(rows)
            shuffle.unshuffle([shuffled], order)
            times.append(time.process_time() - start)
    return median(times)


def summary(calls: list[Call]) -> str:
    """How often each collective was called."""
    counts = Counter(call.name for call in calls)
    return ', '.join(f'{n} {name}' for name, n in sorted(counts.items()))


def main() -> None:
    """Count the bytes, at each number of ranks."""
    args = parse_args()
    names = [x for x in NAMES if x in (*args.baselines, PEER)]
    received: dict[tuple[str, int], float] = {}
    calls: dict[str, list[Call]] = {}
    for name in names:
        for ranks in args.ranks:
            each = count(name, ranks, args.batch, args.size)
            received[name, ranks] = (
                sum(call.received for rank in each for call in rank) / ranks
            )
            calls[name] = each[0]
        for ranks in args.extrapolate:
            received[name, ranks] = sum(
                expected(call, ranks) for call in calls[name]
            )
    report = measure.Report(
        f'Received by a rank in a step of ResNet-50, {args.batch} images at '
        f'{args.size} on each',
        args,
    )
    for ranks in [*args.ranks, *args.extrapolate]:
        for name in names:
            report.add(
                f'mmdensecl {name}' if name in baselines.OURS else name,
                ranks=ranks,
                how='counted' if ranks in args.ranks else 'computed',
                MiB=received[name, ranks] / measure.MIB,
                ratio=received[name, ranks] / received[PEER, ranks],
                exchanges=len(calls[name]),
                calls=summary(calls[name]),
            )
    report.show()
    torch.set_num_threads(1)
    planning = [
        dict(ranks=ranks, CPU_ms_a_step=1e3 * plan_seconds(ranks, args.batch))
        for ranks in args.simulate
    ]
    if planning:
        print('Planning of the batch shuffle, one core\n')
        print(measure.markdown(planning))


if __name__ == '__main__':
    main()
