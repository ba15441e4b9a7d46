# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What the folder_to_*.py scripts beside this file share."""
import argparse
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, Sequence, Tuple

from mmengine.utils import ProgressBar

from mmdensecl.datasets import UnlabeledFolder


def make_parser(description: str, out: str) -> argparse.ArgumentParser:
    """A parser that takes the folder and what to make of it."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', help='folder of pictures, nested or not')
    parser.add_argument('out', type=Path, help=out)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line; nothing is overwritten."""
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f'"{args.out}" exists already; remove it first')
    return args


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder to write to, which is named ``out`` when all went well.

    It is removed otherwise. One that is there before is not touched: another
    call may be writing to it.
    """
    path = out.with_name(f'{out.name}.unfinished')
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        sys.exit(f'"{path}" exists already: another call is writing to it, or '
                 'was cut off. If none is running, remove it')
    try:
        yield path
        path.rename(out)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def read_all(dataset: UnlabeledFolder,
             order: Sequence[int]) -> Iterator[Tuple[str, bytes]]:
    """Names and contents of pictures, with a progress bar."""
    bar = ProgressBar(len(order))
    for i in order:
        info = dataset.get_data_info(int(i))
        yield info['img_path'], dataset.read(info)
        bar.update()
    print()
