# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Copy the images of a folder into tar files, as webdataset reads them.

For slow disks, file servers and millions of images. The encoded files are
copied as they are. The key in a shard is the file's path without extension,
with a dot in the file's name as %2E and a per cent sign as %25, for webdataset
cuts a key at the first dot. A name that has more dots than one, or is a
neighbour's but for the extension, is kept with its extension: x.1.jpg becomes
x%2E1%2Ejpg.jpg.
"""

import argparse
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from os.path import splitext
from pathlib import Path

import numpy as np
from mmengine.utils import track_iter_progress
from webdataset import ShardWriter

from mmdensecl.datasets import UnlabeledFolder

MIB = 2**20


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('folder', help='folder of images, nested or not')
    parser.add_argument('out', type=Path, help='the folder of shards to make')
    parser.add_argument(
        '--max-size', type=float, default=512, help='MiB in a shard'
    )
    parser.add_argument(
        '--max-count', type=int, default=100_000, help='images in a shard'
    )
    parser.add_argument(
        '--shuffle',
        action='store_true',
        help='write in a random order, always the same, for '
        'mmdensecl.ShardSampler where neighbours in the folder are alike',
    )
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f'"{args.out}" exists already; remove it first')
    return args


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder to write to, which is named `out` when all went well.

    It is removed otherwise. One that is there before is not touched: another
    call may be writing to it.
    """
    path = out.with_name(f'{out.name}.unfinished')
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        sys.exit(
            f'"{path}" exists already: another call is writing to it, or '
            'was cut off. If none is running, remove it'
        )
    try:
        yield path
        path.rename(out)
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise


def key_of(name: str, alone: bool) -> str:
    """A file's key, which `urllib.parse.unquote` leads back to the file.

    Args:
        name: Its path below the folder, with forward slashes.
        alone: Whether no other file has its path but for the extension.

    Returns:
        The path, without the extension where that is enough.
    """
    folder, slash, file = name.replace('%', '%25').rpartition('/')
    stem = splitext(file)[0]
    kept = stem if alone and '.' not in stem else file
    return folder + slash + kept.replace('.', '%2E')


def main() -> None:
    """Write the shards."""
    args = parse_args()
    dataset = UnlabeledFolder(args.folder)
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    stems = Counter(splitext(info['img_path'])[0] for info in infos)
    if args.shuffle:  # by a stream that never changes
        order = np.random.RandomState(0).permutation(len(infos))
        infos = [infos[i] for i in order]
    with unfinished(args.out) as path:
        pattern = str(path.absolute()).replace('%', '%%')
        with ShardWriter(
            f'{pattern}/shard-%06d.tar',
            maxcount=args.max_count,
            maxsize=args.max_size * MIB,
            encoder=False,
            mtime=0,  # the same images make the same bytes
            verbose=0,
        ) as writer:
            for info in track_iter_progress(infos):
                stem, extension = splitext(info['img_path'])
                writer.write(
                    {
                        '__key__': key_of(info['img_path'], stems[stem] == 1),
                        extension[1:]: dataset.read(info),
                    }
                )
            shards, count = writer.shard, writer.total
    print(
        f'Wrote {count} images in {shards} shards to {args.out}. To train '
        'on them:\n'
        f'--cfg-options data_root={args.out} '
        'train_dataloader.dataset.type=mmdensecl.UnlabeledShards '
        'train_dataloader.sampler.type=mmdensecl.ShardSampler'
    )


if __name__ == '__main__':
    main()
