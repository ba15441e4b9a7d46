# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Time and memory of a training step: ours, mmpretrain's, and the limit."""

import argparse
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import baselines
import measure
import torch

ALONE = 'both encoders alone'
PEER = 'mmpretrain DenseCL'
REFERENCES = ['MoCo-v2', 'DenseCL']
NAMES = [ALONE, *baselines.OURS, *baselines.MMPRETRAIN]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = measure.make_parser(
        'Time and memory of a training step with ResNet-50 on two given '
        "views: DSC, DenseCL and MoCo-v2, ours and mmpretrain's, and both "
        'encoders alone (forward and backward of the query, forward of the '
        'key, optimiser)'
    )
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--size', type=int, default=224, help='of a view')
    parser.add_argument(
        '--precision',
        choices=measure.DTYPES,
        default='float32',
        help='type of autocast, of all but the configs below',
    )
    parser.add_argument(
        '--baselines',
        nargs='+',
        choices=NAMES,
        default=NAMES,
        help='who takes part; the four that others are compared to always do',
    )
    parser.add_argument(
        '--configs',
        type=Path,
        nargs='*',
        default=[],
        help='more pre-training configs, each in its own precision, such as '
        'configs/densecl_r50_8xb32-coslr-200e_fast.py',
    )
    return measure.parse(parser)


def encode_both(model: Any, inputs: list) -> torch.Tensor:
    """The arithmetic that no contrastive method of this kind can avoid."""
    views = [x.contiguous(memory_format=model.memory_format) for x in inputs]
    query = model.neck(model.backbone(views[0]))
    with torch.no_grad():
        model.encoder_k.neck(model.encoder_k.backbone(views[1]))
    return sum(x.float().mean() for x in query)


def make(
    name: str, batch: int, size: int, precision: str, device: str
) -> Callable[[], Any]:
    """One training step, ready to run.

    Args:
        name (str): One of ``NAMES``, or a config file.
        batch (int): Images.
        size (int): Side of a view in pixels.
        precision (str): See ``measure.DTYPES``; a config file has its own.
        device (str): 'cpu' or 'cuda'.

    Returns:
        Callable: Runs the step.
    """
    cfg = baselines.config('DenseCL' if name == ALONE else name)
    if Path(name).suffix == '.py':
        precision = baselines.precision_of(cfg)
    model = baselines.build(cfg, device)
    optimizer = torch.optim.SGD(
        (p for p in model.parameters() if p.requires_grad),
        lr=0.03,
        momentum=0.9,
        weight_decay=1e-4,
    )
    scaler = torch.amp.GradScaler(device, enabled=precision == 'float16')
    data = baselines.views(batch, size, device)

    def run() -> None:
        optimizer.zero_grad()
        with measure.precision(precision, device):
            if name == ALONE:
                loss = encode_both(model, data['inputs'])
            else:
                loss, _ = model.parse_losses(model(**data, mode='loss'))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    return run


def main() -> None:
    """Compare."""
    args = parse_args()
    shape = args.batch, args.size, args.precision, args.device
    wanted = {*args.baselines, ALONE, PEER, *REFERENCES}
    names = [x for x in NAMES if x in wanted]
    names += map(str, args.configs)
    if args.device == 'cuda':
        torch.backends.cudnn.benchmark = True  # as all of the configs do
    seconds = measure.take_turns(
        {x: make(x, *shape) for x in names}, args.rounds, args.device
    )
    memory = {
        x: measure.extra_memory(make, args.device, x, *shape, whole=True)
        for x in names
    }
    report = measure.Report(
        f'Training step of ResNet-50, {args.batch} images at {args.size}, '
        f'{args.precision}',
        args,
    )
    for name in names:
        ours = name in baselines.OURS or Path(name).suffix == '.py'
        report.add(
            f'mmdensecl {Path(name).stem}' if ours else name,
            precision=baselines.precision_of(baselines.config(name))
            if Path(name).suffix == '.py'
            else args.precision,
            seconds=median(seconds[name]),
            to_mmpretrain_DenseCL=measure.ratio(seconds[name], seconds[PEER]),
            to_encoders_alone=measure.ratio(seconds[name], seconds[ALONE]),
            **{
                f'to_{x}': measure.ratio(seconds[name], seconds[x])
                for x in REFERENCES
            },
            peak_MiB=memory[name] / measure.MIB,
            memory_ratio=memory[name] / memory[PEER],
        )
    report.show()


if __name__ == '__main__':
    main()
