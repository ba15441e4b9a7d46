# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Time and memory of a training step: ours, mmpretrain's, and the limit.

With `--run`: of an iteration of a run, with the Runner, hooks and logs.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import baselines
import measure
import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseDataPreprocessor
from mmengine.runner import Runner
from torch.utils.data import DataLoader, Dataset

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
    parser.add_argument(
        '--run',
        action='store_true',
        help='time iterations of a run of DenseCL over the bare step, at its '
        'start and with the logs of a million iterations behind it',
    )
    parser.add_argument(
        '--log-interval',
        type=int,
        default=50,
        help='of a run, all of which is timed at once',
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


class _Ready(Exception):
    """Everything is built, and the first iteration is about to begin."""


class _Endless(Dataset):
    """Stands in for the images, which are not read."""

    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> int:
        return index


class _StopFirst(Hook):
    priority = 'LOWEST'

    def before_train_iter(self, runner, *args, **kwargs) -> None:
        """Give the loop to the one who times it."""
        raise _Ready


def make_run(
    batch: int,
    size: int,
    precision: str,
    device: str,
    interval: int,
    done: int,
    ours: bool,
) -> Callable[[], Any]:
    """Iterations of a run from one log line to the next, ready to go.

    Args:
        batch (int): Images.
        size (int): Side of a view in pixels.
        precision (str): 'float32' or 'bfloat16'.
        device (str): 'cpu' or 'cuda'.
        interval (int): Iterations from one line to the next.
        done (int): Iterations that the logs already hold.
        ours (bool): Whether loop and hooks are ours, or mmengine's.

    Returns:
        Callable: Runs the iterations.
    """
    cfg = baselines.config('DenseCL')
    cfg.work_dir = tempfile.mkdtemp()
    cfg.experiment_name = f'{ours}_{done}'
    if precision == 'bfloat16':
        cfg.optim_wrapper.type = 'mmdensecl.BFloat16OptimWrapper'
    cfg.train_cfg.max_epochs = 1
    cfg.default_hooks.logger.interval = interval
    cfg.default_hooks.checkpoint.interval = -1
    if not ours:
        del cfg.train_cfg['type']
        cfg.train_cfg.by_epoch = True
        cfg.custom_hooks = []
        cfg.default_hooks.runtime_info = dict(type='RuntimeInfoHook')
    data = baselines.views(batch, size, device)
    names = (
        'model',
        'work_dir',
        'train_cfg',
        'optim_wrapper',
        'param_scheduler',
        'default_hooks',
        'custom_hooks',
        'log_processor',
        'default_scope',
        'experiment_name',
        'randomness',
    )
    runner = Runner(
        **{x: cfg[x] for x in names},
        log_level='ERROR',
        train_dataloader=DataLoader(_Endless(), batch_size=1),
    )
    runner.register_hook(_StopFirst())
    runner.model.data_preprocessor = BaseDataPreprocessor().to(device)
    try:
        runner.train()
    except _Ready:
        runner.hooks[:] = [
            x for x in runner.hooks if not isinstance(x, _StopFirst)
        ]
    loop, hub = runner.train_loop, runner.message_hub
    step = 0

    def iterate(count: int) -> None:
        nonlocal step
        for _ in range(count):
            loop.run_iter(step, data)
            step += 1

    iterate(interval)  # and the logs have all names
    for name in hub.log_scalars if done else ():
        hub.log_scalars[name] = HistoryBuffer(np.ones(done), np.ones(done))
    return lambda: iterate(interval)


def time_runs(args: argparse.Namespace) -> None:
    """Compare iterations of runs with bare steps."""
    shape = args.batch, args.size, args.precision, args.device
    step = make('DenseCL', *shape)

    def bare() -> None:
        for _ in range(args.log_interval):
            step()

    runs = {
        f'{name}, iteration {done or 10:,}': make_run(
            *shape, args.log_interval, done, name == 'mmdensecl'
        )
        for name in ('mmdensecl', 'mmengine')
        for done in (0, 10**6)
    }
    runs = {'bare step': bare, **runs}
    seconds = measure.take_turns(runs, args.rounds, args.device)
    report = measure.Report(
        f'Iteration of a DenseCL run, ResNet-50, {args.batch} images at '
        f'{args.size}, {args.precision}, a log line every '
        f'{args.log_interval}',
        args,
    )
    for name in runs:
        report.add(
            name,
            seconds=median(seconds[name]) / args.log_interval,
            to_bare_step=measure.ratio(seconds[name], seconds['bare step']),
        )
    report.show()


def main() -> None:
    """Compare."""
    args = parse_args()
    if args.run:
        time_runs(args)
        return
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
