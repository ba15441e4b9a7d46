# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Copy the pictures of a folder into one LMDB, for slow disks.

The encoded files are copied as they are; use the result with
``dataset=dict(type='mmdensecl.UnlabeledLMDB', data_root='OUT')``.
"""
import argparse
import shutil
from pathlib import Path

import lmdb
from mmengine.utils import ProgressBar

from mmdensecl.datasets import UnlabeledFolder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', help='folder of pictures, nested or not')
    parser.add_argument('out', type=Path, help='the LMDB to make')
    parser.add_argument(
        '--batch', type=int, default=1000, help='pictures in a transaction')
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f'"{args.out}" exists already; remove it first')

    dataset = UnlabeledFolder(args.folder)
    names = [
        info['img_path']
        for info in map(dataset.get_data_info, range(len(dataset)))
    ]
    size = sum(Path(args.folder, name).stat().st_size for name in names)
    # Under another name until it is whole.
    unfinished = args.out.with_name(f'{args.out.name}.unfinished')
    shutil.rmtree(unfinished, ignore_errors=True)
    # A map is a limit, not an allocation; pages and keys need some room.
    with lmdb.open(
            str(unfinished),
            map_size=2 * size + 8192 * len(names) + (1 << 24)) as env:
        bar = ProgressBar(len(names))
        for start in range(0, len(names), args.batch):
            with env.begin(write=True) as transaction:
                for name in names[start:start + args.batch]:
                    transaction.put(name.encode(), dataset.read(name))
                    bar.update()
    unfinished.rename(args.out)
    print(f'\nWrote {len(names)} pictures, {size / 2**20:.0f} MiB, to '
          f'{args.out}')


if __name__ == '__main__':
    main()
