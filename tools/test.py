# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Test any config of this repository with mmengine's Runner."""

import argparse

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.fileio import dump
from mmengine.runner import Runner

from mmdensecl.checkpoint import UnsafeCheckpointError
from mmdensecl.engine import (
    ConfigError,
    add_checkpoint_check,
    check_data_exists,
    check_weight_sources,
    make_parser,
    prepare_cpu_launch,
    read_config,
    set_pretrained,
)
from mmdensecl.engine.command_line import one_line_errors
from mmdensecl.engine.launch import leave_ranks
from mmdensecl.evaluation import is_probe


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = make_parser('Test a model, or probe a backbone')
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='trained checkpoint; for a probe (kNN, SVM) the same as '
        '--pretrained',
    )
    parser.add_argument(
        '--pretrained',
        metavar='FILE',
        help='for a probe: checkpoint of any known format whose backbone it '
        'reads, or "none" for random weights',
    )
    parser.add_argument('--out', help='JSON file to write the metrics to')
    args = parser.parse_args()
    if bool(args.checkpoint) == bool(args.pretrained):
        parser.error(
            'give a checkpoint, once: CONFIG CHECKPOINT, or for a '
            'probe CONFIG --pretrained FILE'
        )
    if args.out and not args.out.endswith('.json'):
        parser.error(f'--out {args.out} must end in .json')
    return args


def build_config(args: argparse.Namespace) -> Config:
    """The config file with the command line merged in."""
    cfg = read_config(args)
    if cfg.get('test_dataloader') is None:
        raise ValueError(
            f'{args.config} has no test_dataloader, so there is '
            'nothing to test. Pre-training is judged by the '
            'configs below configs/benchmarks'
        )
    if is_probe(cfg):
        pretrained = args.checkpoint or args.pretrained
        check_weight_sources(cfg, pretrained)
        set_pretrained(cfg, pretrained)
    elif args.pretrained:
        raise ValueError(
            f'{args.config} is no probe: train it with tools/train.py '
            f'--pretrained {args.pretrained}, then test the checkpoint of '
            'that run'
        )
    else:
        cfg.load_from = args.checkpoint
        add_checkpoint_check(cfg)
    return cfg


def main() -> None:
    """Test."""
    args = parse_args()
    with one_line_errors(ConfigError, UnsafeCheckpointError):
        cfg = build_config(args)
        check_data_exists(cfg, ('test_dataloader', 'test_cfg'))
        prepare_cpu_launch(cfg)
        metrics = Runner.from_cfg(cfg).test()
    if args.out and is_main_process():
        dump(metrics, args.out)
    leave_ranks()


if __name__ == '__main__':
    main()
