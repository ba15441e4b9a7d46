# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Print a whole config, with everything it inherits."""

import argparse

from mmdensecl.engine.command_line import add_config_options, load_config


def main() -> None:
    """Print the config."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file path')
    parser.add_argument(
        '--save-path', help='also write it there, in .py, .json or .yml'
    )
    add_config_options(parser)
    args = parser.parse_args()
    cfg = load_config(args)
    print(cfg.pretty_text)
    if args.save_path is not None:
        cfg.dump(args.save_path)


if __name__ == '__main__':
    main()
