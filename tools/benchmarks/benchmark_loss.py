# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Time and memory of the dense InfoNCE, ours beside mmpretrain's."""

import argparse
from collections.abc import Callable
from statistics import median

import measure
import torch
import torch.nn.functional as F
from mmpretrain.models import ContrastiveHead
from torch import Tensor

from mmdensecl.models import info_nce, info_nce_reference

TEMPERATURE = 0.2
PEER = 'mmpretrain'


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
    return measure.parse(parser)


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


def main() -> None:
    """Print ours beside the peer."""
    args = parse_args()
    names = 'batch', 'grid', 'queue_len', 'dim', 'precision', 'device'
    shape = [getattr(args, name) for name in names]
    forms = ['auto', 'reference', PEER]
    runs = {form: make(form, *shape) for form in forms}
    seconds = measure.take_turns(runs, args.rounds, args.device)
    losses = {form: run() for form, run in runs.items()}
    del runs
    memory = {
        form: measure.extra_memory(make, args.device, form, *shape)
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


if __name__ == '__main__':
    main()
