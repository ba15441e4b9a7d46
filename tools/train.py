# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Train any config of this repository with mmengine's Runner."""

import argparse
import os
import signal
import sys

if (
    __name__ == '__main__'
    and (os.environ.get('RANK') or os.environ.get('SLURM_PROCID') or '0')
    == '0'
):
    # The imports below take seconds, more from a slow disk.
    print('Importing torch and the toolboxes ...', file=sys.stderr)

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.runner import Runner

from mmdensecl.checkpoint import UnsafeCheckpointError
from mmdensecl.engine import (
    ConfigError,
    check_data_exists,
    check_weight_sources,
    make_parser,
    prepare_cpu_launch,
    protect_run,
    read_config,
    set_pretrained,
    use_mixed_precision,
)
from mmdensecl.engine.command_line import one_line_errors
from mmdensecl.engine.launch import leave_ranks
from mmdensecl.engine.protection import is_pre_training
from mmdensecl.engine.resume import ResumeError, prepare_resume
from mmdensecl.engine.safe_write import remove_unfinished
from mmdensecl.engine.work_dir_lock import WorkDirError, lock_work_dir


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser('Train a model')
    parser.add_argument(
        '--resume',
        nargs='?',
        type=str,
        const='auto',
        help='resume from this checkpoint, or, without a value, from the '
        'newest one in the work dir that can be read whole; settings of the '
        'config that differ from the checkpoint are followed and listed',
    )
    parser.add_argument(
        '--pretrained',
        metavar='FILE',
        help='initialize the backbone from this checkpoint of any format, in '
        "a pre-training both encoders; 'none' for random weights",
    )
    parser.add_argument(
        '--amp',
        nargs='?',
        const='on',
        choices=['on', 'auto'],
        help='enable automatic mixed precision training: bfloat16, or float16 '
        "with a scaled loss on GPUs without it; 'auto' uses bfloat16 where "
        'the processor multiplies it in hardware and else float32',
    )
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate by the actual over the original batch '
        'size, accumulated batches included',
    )
    return parser.parse_args()


def build_config(args: argparse.Namespace) -> Config:
    """The config file with the command line merged in."""
    cfg = read_config(args)
    if args.resume is not None:
        if args.resume == 'auto' and cfg.get('load_from'):
            print_log(
                f'--resume without a file: load_from={cfg.load_from!r} of the '
                f'config is not used, even if {cfg.work_dir} has nothing to '
                'resume',
                logger='current',
            )
        cfg.resume = True
        cfg.load_from = None if args.resume == 'auto' else args.resume
    check_weight_sources(cfg, args.pretrained)
    if args.pretrained is not None:
        set_pretrained(cfg, args.pretrained)
        check_weight_sources(cfg, args.pretrained)
    if args.amp:
        use_mixed_precision(cfg, auto=args.amp == 'auto')
    if args.auto_scale_lr:
        if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
            raise ValueError(
                f'--auto-scale-lr needs "auto_scale_lr.base_batch_size" in '
                f'{args.config}, the batch size that its learning rate was '
                'meant for'
            )
        cfg.auto_scale_lr.enable = True
    return cfg


def main() -> None:
    """Train."""
    args = parse_args()
    with one_line_errors(
        ConfigError, ResumeError, UnsafeCheckpointError, WorkDirError
    ):
        cfg = build_config(args)
        check_data_exists(cfg, ('train_dataloader', 'val_dataloader'))
        if lock_work_dir(cfg.work_dir, cfg.launcher):
            remove_unfinished(cfg.work_dir)
        prepare_cpu_launch(cfg)
        if cfg.get('resume'):
            prepare_resume(cfg)
        runner = Runner.from_cfg(cfg)
        protect_run(runner, whole=is_pre_training(runner))
        runner.train()
    leave_ranks()


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:  # later on TerminationHook saves
        sys.exit(128 + signal.SIGINT)
