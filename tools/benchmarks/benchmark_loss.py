# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Time and memory of the dense InfoNCE, ours beside mmpretrain's."""

import argparse
from collections.abc import Callable
from statistics import median
from typing import Any

import measure
import torch
import torch.nn.functional as F
from mmpretrain.models import ContrastiveHead
from torch import Tensor

from mmdensecl.models import info_nce, info_nce_reference

TEMPERATURE = 0.2
PEER = 'mmpretrain'
# What --growth varies, from small to large.
GROWTH = dict(
    queue_len=[2**12, 2**14, 2**16, 2**18, 2**20],
    batch=[8, 16, 32, 64, 128],
    grid=[3, 5, 7, 10, 14],
)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = measure.make_parser(
        'Time and memory of the dense InfoNCE, forward and backward: the '
        "forms of mmdensecl and mmpretrain's"
    )
    parser.add_argument('--batch', type=int, default=32)
    parser.add_argument('--grid', type=int, default=7, help='cells a side')
    parser.add_argument('--queue-len', type=int, default=65536)
    parser.add_argument('--dim', type=int, default=128)
    parser.add_argument(
        '--precision',
        choices=measure.DTYPES,
        default='float32',
        help='type of autocast; the features are float32 ones',
    )
    parser.add_argument(
        '--growth',
        choices=GROWTH,
        nargs='*',
        default=[],
        help='instead, ours alone over a range of these',
    )
    parser.add_argument(
        '--plot', help='file to draw the growth into, such as growth.png'
    )
    args = measure.parse(parser)
    if args.plot and not args.growth:
        parser.error('--plot draws what --growth measures')
    return args


def mmpretrain_loss() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The dense lines of ``mmpretrain.models.DenseCL.loss``, its own head."""
    head = ContrastiveHead(
        dict(type='mmpretrain.CrossEntropyLoss'), temperature=TEMPERATURE
    )

    def loss(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        positive = torch.einsum('nc,nc->n', [query, key]).unsqueeze(-1)
        # It holds its queue as channels x keys and copies it in each step.
        negative = torch.einsum(
            'nc,ck->nk', [query, queue.t().clone().detach()]
        )
        return head.loss(positive, negative)

    return loss


def our_loss(form: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The mean of one of our forms."""
    function = info_nce_reference if form == 'reference' else info_nce

    def loss(query: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        return function(query, key, queue, TEMPERATURE).loss.mean()

    return loss


def make(
    name: str,
    batch: int,
    grid: int,
    queue_len: int,
    dim: int,
    precision: str,
    device: str,
) -> Callable[[], float]:
    """A forward and backward pass of one implementation, ready to run."""
    torch.manual_seed(0)

    def rows(count: int) -> Tensor:
        return F.normalize(torch.randn(count, dim), dim=1).to(device)

    cells = batch * grid**2
    query, key, queue = rows(cells), rows(cells), rows(queue_len)
    if name == PEER:
        queue = queue.t().contiguous().t()  # its layout
    loss = mmpretrain_loss() if name == PEER else our_loss(name)
    # What libraries load at their first use is not the loss's memory.
    loss(rows(8).requires_grad_(), rows(8), rows(8)).backward()
    query.requires_grad_()

    def run() -> float:
        query.grad = None
        with measure.precision(precision, device):
            value = loss(query, key, queue)
        value.backward()
        return value.item()

    return run


def compare(args: argparse.Namespace, shape: dict[str, Any]) -> None:
    """Print ours beside the peer."""
    forms = ['auto', 'reference', PEER]
    runs = {form: make(form, **shape) for form in forms}
    seconds = measure.take_turns(runs, args.rounds, args.device)
    losses = {form: run() for form, run in runs.items()}
    del runs
    memory = {
        form: measure.extra_memory(make, args.device, form, *shape.values())
        for form in forms
    }
    report = measure.Report(
        f'Dense InfoNCE of {args.batch * args.grid**2} cells x '
        f'{args.queue_len} keys x {args.dim} channels, {args.precision}, '
        'forward and backward',
        args,
    )
    for form in forms:
        report.add(
            form if form == PEER else f'mmdensecl, {form}',
            loss=f'{losses[form]:.6f}',
            seconds=median(seconds[form]),
            time_ratio=measure.ratio(seconds[form], seconds[PEER]),
            extra_MiB=memory[form] / measure.MIB,
            memory_ratio=memory[form] / memory[PEER],
        )
    report.show()


def grow(args: argparse.Namespace, shape: dict[str, Any]) -> None:
    """Print and draw how ours grows."""
    report = measure.Report(
        f'Growth of the dense InfoNCE, {args.precision}, from '
        f'{args.batch} images, {args.grid} x {args.grid} cells, '
        f'{args.queue_len} keys',
        args,
    )
    for name in args.growth:
        for value in GROWTH[name]:
            case = {**shape, name: value}
            run = make('auto', **case)
            seconds = measure.take_turns({name: run}, args.rounds, args.device)
            del run
            report.add(
                name,
                value=value,
                logits=case['batch'] * case['grid'] ** 2 * case['queue_len'],
                seconds=median(seconds[name]),
                extra_MiB=measure.extra_memory(
                    make, args.device, 'auto', *case.values()
                )
                / measure.MIB,
            )
    report.show()
    if args.plot:
        draw(report.rows, args.growth, args.plot)


def draw(rows: list[dict[str, Any]], names: list[str], path: str) -> None:
    """Time and memory against each quantity, both axes logarithmic."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(names), figsize=(3.4 * len(names), 5.4), squeeze=False
    )
    quantities = 'seconds', 'extra_MiB'
    for column, name in zip(axes.T, names, strict=True):
        points = [row for row in rows if row['what'] == name]
        values = [row['value'] for row in points]
        work = [row['logits'] / points[0]['logits'] for row in points]
        for axis, quantity in zip(column, quantities, strict=True):
            measured = [row[quantity] for row in points]
            axis.loglog(values, measured, 'o-', label='measured')
            axis.loglog(
                values,
                [measured[0] * x for x in work],
                '--',
                color='0.6',
                label='linear in the logits',
            )
            axis.set_xlabel(name.replace('_', ' '))
            axis.set_ylabel(quantity.replace('_', ' '))
            axis.set_xticks(values, [f'{x:,}' for x in values], fontsize=7)
            axis.minorticks_off()
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Time the loss; with --growth, over sizes."""
    args = parse_args()
    shape = dict(
        batch=args.batch,
        grid=args.grid,
        queue_len=args.queue_len,
        dim=args.dim,
        precision=args.precision,
        device=args.device,
    )
    if args.growth:
        grow(args, shape)
    else:
        compare(args, shape)


if __name__ == '__main__':
    main()
