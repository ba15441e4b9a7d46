# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Images in tar files, in the format of webdataset."""

import glob
import itertools
import os
import tarfile
from collections import Counter
from collections.abc import Iterator

from mmdensecl.registry import DATASETS

from .folder import IMAGE_NAME, ending, is_hidden
from .unlabeled import UnlabeledDataset, UnreadableImageError


def find_shards(pattern: str) -> list[str]:
    """Find the paths of shards.

    Args:
        pattern: A folder of .tar files, one such file, or paths with `*`, `?`
            and braces as webdataset takes them: `train-{000000..000127}.tar`.

    Returns:
        Absolute paths: a folder's and a glob's in the order of names, those of
        braces as they are written.

    Raises:
        FileNotFoundError: There is no such shard.
    """
    if os.path.isdir(pattern):
        paths = sorted(glob.glob(os.path.join(glob.escape(pattern), '*.tar')))
    else:
        parts = [pattern]
        if '{' in pattern and not os.path.isfile(pattern):
            import braceexpand  # comes with webdataset, which is optional

            parts = list(braceexpand.braceexpand(pattern))
        paths = [path for part in parts for path in _matches(part)]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing or not paths:
        what = f' "{missing[0]}"' if missing else f's in "{pattern}"'
        raise FileNotFoundError(
            f'No shard{what}. Expected a folder with .tar files, or a pattern '
            'such as train-{000000..000127}.tar'
        )
    return [os.path.abspath(path) for path in paths]


def _matches(pattern: str) -> list[str]:
    if os.path.isfile(pattern) or not {'*', '?'} & set(pattern):
        return [pattern]
    return sorted(glob.glob(pattern.replace('[', '[[]')))


def split_name(name: str) -> tuple[str, str]:
    """Cut a member's name at the first dot, as webdataset does.

    Args:
        name: Such as `a.b/c.seg.png`.

    Returns:
        Key and extensions, such as `a.b/c` and `seg.png`.
    """
    folder, slash, file = name.rpartition('/')
    stem, _, extensions = file.partition('.')
    return folder + slash + stem, extensions


def search_shard(path: str, passed_over: Counter[str]) -> Iterator[dict]:
    """Find the images of a shard.

    Members that follow each other with one key are one sample. Its image is
    the member that ends as images do, the one with the fewest extensions if
    there are several: `c.jpg` rather than `c.seg.png`. Links, devices and
    hidden files are passed over.

    Args:
        path: A tar file that is not compressed.
        passed_over: Gets the numbers of other members, by their endings.

    Yields:
        Data infos with `img_path`, `shard` (the path), `offset` and `size`.

    Raises:
        ValueError: It is not whole.
    """
    found = []
    try:
        with tarfile.open(path, 'r:') as tar:
            before, length = -1, os.path.getsize(path)
            for member in tar:
                end = member.offset_data + member.size
                if end > length and not member.issparse():
                    # Of an absurd size, the seek fails without a file's name.
                    raise tarfile.ReadError(
                        f'the member "{member.name}" is to end at byte '
                        f'{end} of {length}'
                    )
                if member.offset <= before or member.size < 0:
                    # Some versions of tarfile would go back and forth forever.
                    raise tarfile.ReadError(
                        f'the member "{member.name}" leads back'
                    )
                before = member.offset
                name = member.name.removeprefix('./')
                if (
                    not member.isreg()
                    or member.issparse()
                    or any(map(is_hidden, name.split('/')))
                ):
                    continue
                if IMAGE_NAME.search(name):
                    found.append((name, member.offset_data, member.size))
                else:
                    passed_over[ending(name)] += 1
            end = tar.offset
        # tarfile takes a damaged header for the end.
        with open(path, 'rb') as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(
                    f'there is neither a member nor an end mark at byte {end}'
                )
    # The others are what numbers that make no sense lead to.
    except (
        tarfile.TarError,
        ValueError,
        OverflowError,
        MemoryError,
        RecursionError,
    ) as error:
        raise ValueError(
            f'The shard "{path}" is not a whole, uncompressed tar file: '
            f'{error or type(error).__name__}. Make or copy it again'
        ) from error
    for _, sample in itertools.groupby(found, lambda x: split_name(x[0])[0]):
        name, offset, size = min(
            sample, key=lambda x: split_name(x[0])[1].count('.')
        )
        yield dict(img_path=name, shard=path, offset=offset, size=size)


@DATASETS.register_module()
class UnlabeledShards(UnlabeledDataset):
    """Encoded images in tar files, in the format of webdataset.

    Unlike webdataset's own, it knows each image by number: epochs are exact,
    and seeds, resuming, ranks and workers are as with a folder. Rank 0 reads
    the shards' headers at the start, and each image is read from its position.
    :class:`mmdensecl.datasets.ShardSampler` reads shard after shard.

    `tools/dataset_converters/folder_to_shards.py` makes them; other members of
    a sample, such as its label, are passed over. A sample ends where the name
    up to its first dot changes, so `x.1.jpg` and `x.2.jpg` side by side are
    one; the tool renames such files.

    Args:
        data_root: Folder of .tar files, or paths with `*` and braces, such as
            `shards/train-{000000..000127}.tar`.
        **kwargs: Arguments of :class:`UnlabeledDataset`.

    Raises:
        ValueError: A shard is truncated, damaged or compressed.
    """

    def list_images(self) -> list[dict]:
        shards = find_shards(self.data_root)
        return [
            info
            for path in shards
            for info in search_shard(path, self.passed_over)
        ]

    @property
    def shard_sizes(self) -> list[int]:
        """Numbers of images that follow each other in one shard."""
        shards = (self.get_data_info(i)['shard'] for i in range(len(self)))
        return [len([*group]) for _, group in itertools.groupby(shards)]

    def read(self, info: dict) -> bytes:
        with open(info['shard'], 'rb') as file:
            file.seek(info['offset'])
            data = file.read(info['size'])
        if len(data) != info['size']:
            raise UnreadableImageError(
                f'"{info["shard"]}" has become shorter than it was'
            )
        return data
