# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Copy the pictures of a folder into one LMDB, for slow disks.

The encoded files are copied as they are; use the result with
``dataset=dict(type='mmdensecl.UnlabeledLMDB', data_root='OUT')``.
"""
import os
from itertools import islice
from pathlib import Path

import lmdb
from copying import make_parser, parse, read_all, unfinished

from mmdensecl.datasets import UnlabeledFolder

MAX_KEY = 511  # bytes, of liblmdb as it is built everywhere


def main() -> None:
    parser = make_parser(__doc__, 'the LMDB to make')
    parser.add_argument(
        '--batch', type=int, default=1000, help='pictures in a transaction')
    args = parse(parser)

    dataset = UnlabeledFolder(args.folder)
    count = len(dataset)
    for info in dataset.data_list:
        length = len(os.fsencode(info['img_path']))
        if length > MAX_KEY:
            parser.error(
                f'the name "{info["img_path"]}" has {length} bytes, and an '
                f'LMDB takes {MAX_KEY}. Use folder_to_shards.py')
    size = sum(
        Path(args.folder,
             dataset.get_data_info(i)['img_path']).stat().st_size
        for i in range(count))
    # A map is a limit, not an allocation; pages and keys need some room.
    with unfinished(args.out) as path, lmdb.open(
            str(path), map_size=2 * size + 8192 * count + (1 << 24)) as env:
        pictures = read_all(dataset, range(count))
        for _ in range(0, count, args.batch):
            with env.begin(write=True) as transaction:
                for name, data in islice(pictures, args.batch):
                    transaction.put(
                        name.encode('utf-8', 'surrogateescape'), data)
    print(f'Wrote {count} pictures, {size / 2**20:.0f} MiB, to {args.out}')


if __name__ == '__main__':
    main()
