# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Which pictures there are: kept in a few arrays, remembered on the disk."""
import hashlib
import json
import logging
import os
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import (Any, Callable, Dict, Iterable, List, NamedTuple, Optional,
                    Sequence, Tuple, Union)

import numpy as np
import torch
from mmengine.logging import print_log

FORMAT = 1  # of the files that remember() writes
MIN_SECONDS = 1.0  # what is found sooner is not worth a file
# A file that comes in the same tick of the disk's clock as the listing leaves
# no trace in its folder's time; FAT's tick is the longest.
TICK = 2.0


class Pictures(Sequence):
    """The data infos of many pictures, in a few arrays.

    A list of a million dicts takes seconds to build and to pickle, and each
    worker comes to hold a copy, as counting references writes to its pages.
    Of arrays, forked workers share the pages, and torch hands to spawned ones
    shared memory instead of the content.

    Args:
        names (Iterable[str]): ``img_path`` of each picture.
        **columns (Iterable[int]): What else its data info holds, by key.
    """

    def __init__(self, names: Iterable[str], **columns: Iterable[int]) -> None:
        # A file's name may be no UTF-8; this leads back to its bytes.
        names = [name.encode('utf-8', 'surrogateescape') for name in names]
        edges = np.zeros(len(names) + 1, np.int64)
        np.cumsum([len(name) for name in names], out=edges[1:])
        self.columns = dict(
            text=torch.from_numpy(
                np.frombuffer(b''.join(names), np.uint8).copy()),
            edges=torch.from_numpy(edges))
        for key, values in columns.items():
            self.columns[key] = torch.tensor(values, dtype=torch.int64)

    @classmethod
    def of(cls, infos: Iterable[Dict[str, Any]]) -> 'Pictures':
        """From data infos, all with the same keys."""
        infos = list(infos)
        keys = [key for key in (infos or [{}])[0] if key != 'img_path']
        return cls((info['img_path'] for info in infos),
                   **{key: [info[key] for info in infos]
                      for key in keys})

    @classmethod
    def from_columns(cls, columns: Dict[str, np.ndarray]) -> 'Pictures':
        """From what ``columns`` holds, as arrays.

        Raises:
            ValueError: They do not fit together.
        """
        edges, count = columns['edges'], len(columns['edges']) - 1
        if count < 0 or edges[0] != 0 or edges[-1] != len(
                columns['text']) or (np.diff(edges) < 0).any() or any(
                    len(x) != count for key, x in columns.items()
                    if key not in ('text', 'edges')):
            raise ValueError('its arrays do not fit together')
        pictures = cls(())
        pictures.columns = {k: torch.from_numpy(x) for k, x in columns.items()}
        return pictures

    def __len__(self) -> int:
        return len(self.columns['edges']) - 1

    def __getitem__(self, idx: Union[int, slice]) -> Any:
        places = range(len(self))[idx]  # minds the sign and the ends
        if isinstance(idx, slice):
            return Pictures.of(map(self.__getitem__, places))
        values = {key: x.numpy() for key, x in self.columns.items()}
        start, end = values.pop('edges')[places:places + 2]
        name = values.pop('text')[start:end].tobytes()
        return dict(
            img_path=name.decode('utf-8', 'surrogateescape'),
            **{
                key: int(x[places])
                for key, x in values.items()
            })


Stamp = Tuple[int, int]  # of a file or folder: time of change, size


def stamp(path: str) -> Stamp:
    """What changes when a file, or what is in a folder, does."""
    stat = os.stat(path)
    return stat.st_mtime_ns, stat.st_size


class Found(NamedTuple):
    """What a search found.

    Args:
        pictures (Pictures): In their order.
        watched (Dict[str, Stamp]): The files and folders that it depends on,
            as they were before they were read.
        certain (bool): Whether it is the same while those are. Defaults to
            True.
    """
    pictures: Pictures
    watched: Dict[str, Stamp]
    certain: bool = True


def is_hidden(name: str) -> bool:
    """Whether a file or folder is the system's, as macOS's ``._x.jpg``."""
    return name.startswith('.') or name == '__MACOSX'


def search_folder(root: str, extensions: Tuple[str, ...]) -> Found:
    """Find the files below a folder that have one of some extensions.

    Hidden files and folders are left out. A folder that links lead to is
    listed once, by its own name if it has one below ``root``.

    Args:
        root (str): The folder.
        extensions (Tuple[str, ...]): In lower case; any case fits.

    Returns:
        Found: Relative to ``root``, with forward slashes, in the order of
        names.

    Raises:
        OSError: A folder cannot be read.
    """
    names: List[str] = []
    watched: Dict[str, Stamp] = {}
    certain = True
    todo = deque([('', os.path.realpath(root))])
    while todo:
        prefix, folder = todo.pop()
        if folder in watched:  # a link back, or a second way to the same
            continue
        watched[folder] = stamp(folder)
        subfolders = []
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if is_hidden(name):
                    continue
                if _is_folder(entry):
                    subfolders.append((name, entry.is_symlink()))
                elif name.lower().endswith(extensions):
                    names.append(prefix + name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    certain = False  # it may lead to a folder some day
        for name, is_link in sorted(subfolders):
            path = os.path.join(folder, name)
            if is_link:  # comes when all that is no link is done
                todo.appendleft((f'{prefix}{name}/', os.path.realpath(path)))
            else:
                todo.append((f'{prefix}{name}/', path))
    names.sort()
    return Found(Pictures(names), watched, certain)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def cache_file(root: str) -> Optional[Path]:
    """Where the pictures of ``root`` are remembered.

    The folder is ``$MMDENSECL_LISTINGS``, or ``mmdensecl/listings`` in the
    user's cache folder. It holds copies only and may be removed. Set the
    variable to nothing where a disk does not change a folder's time as files
    come and go, as some mounts of object stores.

    Args:
        root (str): Folder or pattern that the pictures are found by.

    Returns:
        Path, optional: None where that is no absolute path, as '' is.
    """
    folder = os.environ.get('MMDENSECL_LISTINGS')
    if folder is None:
        cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser(
            '~/.cache')
        folder = os.path.join(cache, 'mmdensecl', 'listings')
    if not os.path.isabs(folder):
        return None
    digest = hashlib.sha256(os.fsencode(root)).hexdigest()
    return Path(folder, f'{digest[:32]}.npz')


def remember(root: str, options: Sequence[str],
             search: Callable[[], Found]) -> Pictures:
    """Search for pictures, or take what an earlier search found.

    That is taken only while nothing that the search depends on has changed.

    Args:
        root (str): What is searched; names the file.
        options (Sequence[str]): What else the search depends on.
        search (Callable): Does it.

    Returns:
        Pictures: What was found.
    """
    begin = time.perf_counter()
    file, key = cache_file(root), [FORMAT, root, *options]
    pictures, source = _load(file, key), f', as remembered in {file}'
    if pictures is None:
        start = time.time_ns()
        pictures, watched, certain = search()
        source = ''
        # 0 is the time of those that do not know theirs.
        certain = certain and all(0 < mtime < start - TICK * 1e9
                                  for mtime, _ in watched.values())
        if (file and certain and len(pictures)
                and time.perf_counter() - begin >= MIN_SECONDS
                and os.environ.get('LOCAL_RANK', '0') == '0'):
            _save(file, key, watched, pictures)
    print_log(
        f'Found {len(pictures):,} pictures in "{root}" in '
        f'{time.perf_counter() - begin:.1f} s{source}',
        logger='current')
    return pictures


def _load(file: Optional[Path], key: list) -> Optional[Pictures]:
    if not file:
        return None
    try:
        with np.load(file, allow_pickle=False) as content:
            columns = dict(content)
        head = json.loads(columns.pop('head').tobytes())
        if head['key'] != key:
            return None
        for path, before in head['watched'].items():
            if list(stamp(path)) != before:
                return None
        return Pictures.from_columns(columns)
    except FileNotFoundError:  # or one of those watched is gone
        return None
    except Exception as error:  # whatever is wrong with it, the run goes on
        print_log(
            f'"{file}" does not hold what was remembered ({error}); '
            'searching again',
            logger='current',
            level=logging.WARNING)
        return None


def _save(file: Path, key: list, watched: Dict[str, Stamp],
          pictures: Pictures) -> None:
    head = json.dumps(dict(key=key, watched=watched)).encode()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Whole, or not under this name; other processes may do the same.
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            unfinished = Path(folder, file.name)
            np.savez(
                unfinished,
                head=np.frombuffer(head, np.uint8),
                **{
                    k: x.numpy()
                    for k, x in pictures.columns.items()
                })
            unfinished.replace(file)
    except OSError as error:
        print_log(
            f'The pictures found are not remembered: {error}',
            logger='current')
