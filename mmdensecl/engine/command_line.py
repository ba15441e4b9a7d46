# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What the command lines of the tools share."""

import logging
import os
import os.path as osp
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mmengine.config import Config
from mmengine.dist import is_main_process

from mmdensecl.checkpoint import register_checkpoint_loader
from mmdensecl.onedl import let_configs_name_mmseg

from .config import (
    ConfigError,
    check_variables,
    complete_config,
    merge_options,
    parse_options,
)


def prepare_tool() -> None:
    """Set up the process of a tool, before it reads a config.

    mmengine reads checkpoints as data, and `mmseg::...` in a config finds the
    onedl fork's mmsegmentation.
    """
    register_checkpoint_loader()
    let_configs_name_mmseg()


def make_parser(description: str) -> ArgumentParser:
    """A parser with the flags of tools/train.py and tools/test.py.

    Args:
        description: Of the tool.

    Returns:
        To be given more arguments.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument('config', help='config file path')
    parser.add_argument(
        '--work-dir',
        help='the dir to save logs and models, by default '
        'work_dirs/<config stem>',
    )
    add_config_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='job launcher',
    )
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    return parser


def add_config_options(parser: ArgumentParser) -> None:
    """Add the flags that change a config, for :func:`load_config`."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action='extend',
        default=[],
        metavar='KEY=VALUE',
        help='override settings of the config, "a.b=c"; a list is written '
        'key="[a,b]" or key=a,b; data_root=... moves every path below it',
    )
    parser.add_argument(
        '--data-root',
        metavar='PATH',
        help="folder of the data; moves every path below the config's own",
    )


def load_config(args: Namespace) -> Config:
    """Read the config file and merge what :func:`add_config_options` took.

    Args:
        args: Of the command line.

    Returns:
        The config.

    Raises:
        ConfigError: It contradicts itself or its base.
    """
    prepare_tool()
    try:
        cfg = Config.fromfile(args.config)
    except TypeError as error:
        if 'cannot inherit' not in str(error):
            raise
        raise ConfigError(
            f'{args.config}: {error} For a list of the base, such as an '
            'init_cfg, write a list: init_cfg=[dict(...)]'
        ) from error
    options = parse_options(cfg, args.cfg_options)
    if args.data_root is not None:
        options['data_root'] = args.data_root
    check_variables(cfg)
    merge_options(cfg, options)
    complete_config(cfg)
    return cfg


def read_config(args: Namespace) -> Config:
    """The config file with the shared flags merged in.

    Args:
        args: What a parser of :func:`make_parser` read.

    Returns:
        With `launcher` and `work_dir` set.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = load_config(args)
    cfg.launcher = args.launcher
    # Priority: command line, config, name of the config file.
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = osp.join(
            'work_dirs', osp.splitext(osp.basename(args.config))[0]
        )
    return cfg


def run_quietly(run: Callable[[Namespace], None], args: Namespace) -> None:
    """Run a tool that looks at weights.

    mmengine's list of initialised tensors is not shown. Bad input is one line
    on stderr and exit status 2.

    Args:
        run: The tool.
        args: Its command line.
    """
    prepare_tool()
    logging.disable(logging.INFO)
    with one_line_errors(ValueError, OSError, RuntimeError):
        run(args)


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End with a line on stderr and exit status 2, without a traceback.

    Args:
        *kinds: The errors that say all there is to say.
    """
    try:
        yield
    except kinds as error:
        if is_main_process():  # the other ranks have the same
            print(
                f'{osp.basename(sys.argv[0])}: error: {error}', file=sys.stderr
            )
        sys.exit(2)
