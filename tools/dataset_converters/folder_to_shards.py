# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Copy the pictures of a folder into tar files, as webdataset reads them.

For slow disks, file servers and millions of pictures. The encoded files are
copied as they are. The key in a shard is the file's path without extension,
with a dot in the file's name as %2E and a per cent sign as %25, for webdataset
cuts a key at the first dot. A name that has more dots than one, or is a
neighbour's but for the extension, is kept with its extension: x.1.jpg becomes
x%2E1%2Ejpg.jpg.
"""
from collections import Counter
from os.path import splitext

import numpy as np
from copying import make_parser, parse, read_all, unfinished
from webdataset import ShardWriter

from mmdensecl.datasets import UnlabeledFolder

MIB = 2**20


def key_of(name: str, alone: bool) -> str:
    """A file's key, which ``urllib.parse.unquote`` leads back to the file.

    Args:
        name (str): Its path below the folder, with forward slashes.
        alone (bool): Whether no other file has its path but for the
            extension.

    Returns:
        str: The path, without the extension where that is enough.
    """
    folder, slash, file = name.replace('%', '%25').rpartition('/')
    stem = splitext(file)[0]
    kept = stem if alone and '.' not in stem else file
    return folder + slash + kept.replace('.', '%2E')


def main() -> None:
    parser = make_parser(__doc__, 'the folder of shards to make')
    parser.add_argument(
        '--max-size', type=float, default=512, help='MiB in a shard')
    parser.add_argument(
        '--max-count', type=int, default=100_000, help='pictures in a shard')
    parser.add_argument(
        '--shuffle',
        action='store_true',
        help='write in a random order, always the same, for '
        'mmdensecl.ShardSampler where neighbours in the folder are alike')
    args = parse(parser)

    dataset = UnlabeledFolder(args.folder)
    names = [info['img_path'] for info in dataset.data_list]
    stems = Counter(splitext(name)[0] for name in names)
    order = np.arange(len(names))
    if args.shuffle:  # by a stream that never changes
        order = np.random.RandomState(0).permutation(order)
    with unfinished(args.out) as path:
        pattern = str(path.absolute()).replace('%', '%%')
        with ShardWriter(
                f'{pattern}/shard-%06d.tar',
                maxcount=args.max_count,
                maxsize=args.max_size * MIB,
                encoder=False,
                mtime=0,  # the same pictures make the same bytes
                verbose=0) as writer:
            for name, data in read_all(dataset, order):
                stem, extension = splitext(name)
                writer.write({
                    '__key__': key_of(name, stems[stem] == 1),
                    extension[1:]: data
                })
            shards, count = writer.shard, writer.total
    print(f'Wrote {count} pictures in {shards} shards to {args.out}. To train '
          'on them:\n'
          f'--cfg-options data_root={args.out} '
          'train_dataloader.dataset.type=mmdensecl.UnlabeledShards '
          'train_dataloader.sampler.type=mmdensecl.ShardSampler')


if __name__ == '__main__':
    main()
