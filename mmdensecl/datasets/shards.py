# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import glob
import itertools
import os
import tarfile
from functools import partial
from typing import Any, BinaryIO, Dict, Iterator, List, Sequence, Tuple

import numpy as np
import torch

from mmdensecl.registry import DATASETS
from .listing import Found, Pictures, is_hidden, remember, stamp
from .unlabeled import (IMG_EXTENSIONS, PerProcess, UnlabeledDataset,
                        UnreadableImageError)


def find_shards(pattern: str) -> List[str]:
    """Paths of shards.

    Args:
        pattern (str): A folder of .tar files, one such file, or paths with
            ``*``, ``?`` and braces as webdataset takes them:
            ``train-{000000..000127}.tar``.

    Returns:
        List[str]: Absolute paths: a folder's and a glob's in the order of
        names, those of braces as they are written.

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
        raise FileNotFoundError(
            f'No shard "{missing[0]}"' if missing else
            f'No shards in "{pattern}". Expected a folder with .tar files, or '
            'a pattern such as train-{000000..000127}.tar')
    return [os.path.abspath(path) for path in paths]


def _matches(pattern: str) -> List[str]:
    if os.path.isfile(pattern) or not {'*', '?'} & set(pattern):
        return [pattern]
    return sorted(glob.glob(pattern.replace('[', '[[]')))


def split_name(name: str) -> Tuple[str, str]:
    """Key and extensions of a member, cut at the first dot as by webdataset.

    Args:
        name (str): Such as ``a.b/c.seg.png``.

    Returns:
        Tuple[str, str]: Such as ``a.b/c`` and ``seg.png``.
    """
    folder, slash, file = name.rpartition('/')
    stem, _, extensions = file.partition('.')
    return folder + slash + stem, extensions


def search_shard(path: str) -> Iterator[Tuple[str, int, int]]:
    """Find the pictures of a shard.

    Members that follow each other with one key are one sample. Its picture
    is the member that ends as pictures do, the one with the fewest extensions
    if there are several: ``c.jpg`` rather than ``c.seg.png``. Links, devices
    and hidden files are passed over.

    Args:
        path (str): A tar file that is not compressed.

    Yields:
        Tuple[str, int, int]: Name, first byte, size.

    Raises:
        ValueError: It is not whole.
    """
    found = []
    try:
        with tarfile.open(path, 'r:') as tar:
            before = -1
            for member in tar:
                if member.offset <= before or member.size < 0:
                    # Some versions of tarfile would go back and forth forever.
                    raise tarfile.ReadError(
                        f'the member "{member.name}" leads back')
                before = member.offset
                name = member.name.removeprefix('./')
                if (member.isreg() and not member.issparse()
                        and name.lower().endswith(IMG_EXTENSIONS)
                        and not any(map(is_hidden, name.split('/')))):
                    found.append((name, member.offset_data, member.size))
            end = tar.offset
        # tarfile takes a damaged header for the end.
        with open(path, 'rb') as file:
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(
                    f'there is neither a member nor an end mark at byte {end}')
    # The others are what numbers that make no sense lead to.
    except (tarfile.TarError, ValueError, OverflowError, MemoryError,
            RecursionError) as error:
        raise ValueError(
            f'The shard "{path}" is not a whole, uncompressed tar file: '
            f'{error or type(error).__name__}. Make or copy it again'
        ) from error
    for _, sample in itertools.groupby(found, lambda x: split_name(x[0])[0]):
        yield min(sample, key=lambda x: split_name(x[0])[1].count('.'))


def search_shards(paths: Sequence[str]) -> Found:
    """Find the pictures of shards.

    Args:
        paths (Sequence[str]): The shards, in their order.

    Returns:
        Found: Each with ``shard``, an index into ``paths``, ``offset`` and
        ``size``.
    """
    watched = {path: stamp(path) for path in paths}
    # Shard by shard: as Python's objects all of them would need six times the
    # memory of the arrays.
    parts = [_search_into_arrays(path, i) for i, path in enumerate(paths)]
    columns = {
        key: np.concatenate([part.columns[key].numpy() for part in parts])
        for key in ('text', 'shard', 'offset', 'size')
    }
    lengths = np.concatenate(
        [np.diff(part.columns['edges'].numpy()) for part in parts])
    columns['edges'] = np.concatenate([[0], np.cumsum(lengths)])
    return Found(Pictures.from_columns(columns), watched)


def _search_into_arrays(path: str, number: int) -> Pictures:
    rows = [*search_shard(path)]
    names, offsets, sizes = zip(*rows) if rows else ((), ) * 3
    return Pictures(
        names, shard=[number] * len(rows), offset=offsets, size=sizes)


class OpenFiles:
    """Reads pieces of files, and keeps those open that were read last.

    Args:
        limit (int): How many.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.files: Dict[str, BinaryIO] = {}

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset``."""
        file = self.files.pop(path, None) or open(path, 'rb')
        try:
            file.seek(offset)
            data = file.read(size)
        except OSError:  # a file server may want it opened anew (ESTALE)
            file.close()
            raise
        self.files[path] = file  # a dict keeps order: the newest comes last
        if len(self.files) > self.limit:
            self.files.pop(next(iter(self.files))).close()
        return data


@DATASETS.register_module()
class UnlabeledShards(UnlabeledDataset):
    """Encoded pictures in tar files, in the format of webdataset.

    Unlike webdataset's own, it knows each picture by number: epochs are
    exact, and seeds, resuming, ranks and workers are as with a folder. It
    reads the shards' headers once, remembers where the pictures lie (see
    :func:`mmdensecl.datasets.listing.cache_file`), and reads each from there.
    :class:`mmdensecl.datasets.ShardSampler` reads shard after shard.

    ``tools/dataset_converters/folder_to_shards.py`` makes them; other members
    of a sample, such as its label, are passed over. A sample ends where the
    name up to its first dot changes, so ``x.1.jpg`` and ``x.2.jpg`` side by
    side are one; the tool renames such files.

    Args:
        data_root (str): Folder of .tar files, or paths with ``*`` and braces,
            such as ``shards/train-{000000..000127}.tar``.
        **kwargs: Arguments of :class:`UnlabeledDataset`.

    Raises:
        ValueError: A shard is truncated, damaged or compressed.
    """

    MAX_OPEN = 64  # shards, in each process

    def __init__(self, data_root: str, **kwargs) -> None:
        self.shards: List[str] = []
        self._files = PerProcess(partial(OpenFiles, self.MAX_OPEN))
        super().__init__(data_root=data_root, **kwargs)

    def list_images(self) -> Pictures:
        self.shards = find_shards(self.data_root)
        return remember(
            os.path.abspath(self.data_root), [*IMG_EXTENSIONS, *self.shards],
            partial(search_shards, self.shards))

    @property
    def shard_sizes(self) -> List[int]:
        """Numbers of pictures that follow each other in one shard."""
        self.full_init()
        shards = self.data_list.columns['shard']
        return torch.unique_consecutive(shards, return_counts=True)[1].tolist()

    def read(self, info: Dict[str, Any]) -> bytes:
        path, size = self.shards[info['shard']], info['size']
        data = self._files.get().read(path, info['offset'], size)
        if len(data) != size:
            raise UnreadableImageError(
                f'"{path}" has become shorter than it was')
        return data
