# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Print a whole config, with everything it inherits."""
import argparse

from mmengine.config import Config, DictAction

from mmdensecl.engine import merge_options
from mmdensecl.engine.command_line import prepare_tool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file path')
    parser.add_argument(
        '--save-path', help='also write it there, in .py, .json or .yml')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        help='override settings, "a.b=c"')
    args = parser.parse_args()
    prepare_tool()
    cfg = Config.fromfile(args.config)
    merge_options(cfg, args.cfg_options)
    print(cfg.pretty_text)
    if args.save_path is not None:
        cfg.dump(args.save_path)


if __name__ == '__main__':
    main()
