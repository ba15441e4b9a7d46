# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Write the backbone of a checkpoint as a file for others."""

import argparse
import hashlib
import sys
from pathlib import Path

from mmdensecl.checkpoint import UnsafeCheckpointError
from mmdensecl.engine.safe_write import write_safely
from mmdensecl.transfer import read_backbone
from mmdensecl.transfer.convert import (
    PLAIN,
    SUFFIXES,
    encode_backbone,
    untold_settings,
)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description='Extract the backbone of a checkpoint of any format and '
        'write it for another project. The first 8 digits of its sha256 '
        'become part of the name'
    )
    parser.add_argument('checkpoint', help='checkpoint file or http(s) URL')
    parser.add_argument(
        'out', help='name of the output without suffix, such as densecl_r50'
    )
    parser.add_argument(
        '--to',
        choices=list(SUFFIXES),
        default='openmmlab',
        help='openmmlab: {"state_dict", "meta"}; torchvision: a bare state '
        'dict, also for timm; detectron2: a .pkl under its names',
    )
    parser.add_argument(
        '--prefix', help='where in the checkpoint the backbone is'
    )
    return parser.parse_args()


def write(data: bytes, out: Path, suffix: str) -> Path:
    """Write ``out-<sha256>.suffix`` at once or not at all."""
    sha = hashlib.sha256(data).hexdigest()[:8]
    path = out.with_name(f'{out.name}-{sha}{suffix}')
    if path.exists():
        if path.read_bytes() != data:
            raise FileExistsError(
                f'"{path}" exists and holds something else; move it away or '
                'choose another name'
            )
        return path
    write_safely(path, data)
    return path


def publish(args: argparse.Namespace) -> None:
    """Write the backbone, and say what it is."""
    backbone = read_backbone(args.checkpoint, args.prefix)
    suffix = SUFFIXES[args.to]
    out = Path(args.out)
    if out.suffix in SUFFIXES.values():
        out = out.with_suffix('')
    path = write(encode_backbone(backbone, args.to), out, suffix)
    left = ', '.join(backbone.left_out) or 'nothing'
    print(
        f'{backbone.source}: {backbone.arch or "a backbone"}, '
        f'{len(backbone.state_dict)} tensors; left out: {left}\n{path}'
    )
    for name, value in untold_settings(backbone, args.to).items():
        print(
            f"warning: it was trained with {name}={value}, and {args.to}'s "
            f'ResNet has {PLAIN[name]}: build it alike there',
            file=sys.stderr,
        )


def main() -> None:
    """Run the tool."""
    args = parse_args()
    try:
        publish(args)
    except (ValueError, OSError, UnsafeCheckpointError) as error:
        sys.exit(f'{type(error).__name__}: {error}')


if __name__ == '__main__':
    main()
