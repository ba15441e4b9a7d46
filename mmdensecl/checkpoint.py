# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Checkpoints are data: reading one must not run code.

mmengine 0.10.7 saves its log history as pickled objects, which torch >= 2.6
refuses to load by default, so upstream cannot resume its own checkpoints. The
cure is a list of exactly what a training checkpoint holds, never
``weights_only=False``.
"""
import hashlib
import os
import pickle
from pathlib import Path
from typing import Any, Union
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

_STATISTICS = {
    name: getattr(HistoryBuffer, name)
    for name in ('min', 'max', 'mean', 'current')
}


class UnsafeCheckpointError(RuntimeError):
    """A checkpoint that asks for more than tensors and plain values."""


def _history_statistic(owner: Any, name: str) -> Any:
    """Stand-in for the ``getattr`` by which a HistoryBuffer is pickled.

    The real one would let a file walk from an allowed class to anything.
    """
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise UnsafeCheckpointError(
            f'it asks for the attribute "{name}" of {owner!r}')
    return _STATISTICS[name]


def _plain_dtype(kind: Any, *_: Any) -> np.dtype:
    """Stand-in for ``numpy.dtype``: numpy's own numbers and nothing else.

    They are immutable singletons. A copy could be given an object sub-dtype
    by its ``__setstate__``, which turns bytes of the file into pointers.
    """
    dtype = np.dtype(kind) if isinstance(kind, str) else None
    if dtype is None or dtype.kind not in 'fiub':
        raise UnsafeCheckpointError(f'it asks for the dtype {kind!r}')
    return dtype


def _allowed_globals() -> list:
    reconstruct = np.ndarray((0, )).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    return [
        HistoryBuffer,
        (_history_statistic, 'builtins.getattr'),
        np.ndarray,
        (_plain_dtype, 'numpy.dtype'),
        *(type(np.dtype(kind)) for kind in ('f8', 'f4', 'i8', 'i4', '?')),
        # Named after the numpy that wrote the file, 1.x or 2.x.
        (reconstruct, 'numpy.core.multiarray._reconstruct'),
        (reconstruct, 'numpy._core.multiarray._reconstruct'),
        (scalar, 'numpy.core.multiarray.scalar'),
        (scalar, 'numpy._core.multiarray.scalar'),
    ]


def check_file(path: Union[str, os.PathLike]) -> str:
    """See that a local file is there and holds something.

    Args:
        path (str | os.PathLike): The file; ``~`` is the home folder.

    Returns:
        str: Its path, with the home folder spelt out.

    Raises:
        FileNotFoundError: It is missing, or a folder.
        ValueError: It is empty.
    """
    path = os.path.expanduser(path)
    if not os.path.isfile(path):
        wrong = 'is a folder' if os.path.isdir(path) else 'does not exist'
        raise FileNotFoundError(f'The checkpoint "{path}" {wrong}')
    if not os.path.getsize(path):
        raise ValueError(f'The checkpoint "{path}" is empty')
    return path


def load_from_local(filename: Union[str, os.PathLike],
                    map_location: Any = None) -> Any:
    """Read a checkpoint without running anything it holds.

    Args:
        filename (str | os.PathLike): A local file.
        map_location (Any): As for :func:`torch.load`. Defaults to None.

    Returns:
        Any: What was saved.

    Raises:
        FileNotFoundError: It is missing, or a folder.
        UnsafeCheckpointError: It holds something other than tensors, plain
            values and mmengine's log history.
        ValueError: It is empty, truncated, or no checkpoint at all.
    """
    filename = check_file(filename)
    try:
        with torch.serialization.safe_globals(_allowed_globals()):
            return torch.load(
                filename, map_location=map_location, weights_only=True)
    except (pickle.UnpicklingError, UnsafeCheckpointError) as error:
        if not _looks_like_checkpoint(filename):
            raise ValueError(
                f'"{filename}" is not a PyTorch checkpoint') from error
        reason = str(error).rpartition('WeightsUnpickler error: ')[2].strip()
        if reason.startswith('Unsupported operand'):
            reason = ('it is a pickle of another protocol than 2, which '
                      'torch.save writes')
        raise UnsafeCheckpointError(
            f'"{filename}" was not loaded, as unpickling it could run code: '
            f'{_first_sentence(reason)}. Checkpoints hold tensors, '
            'numbers, strings and containers of them; if you trust its '
            'author, save those again with torch.save and load that file.'
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f'"{filename}" ({os.path.getsize(filename)} bytes) is truncated '
            'or not a PyTorch checkpoint: '
            f'{_first_sentence(str(error))}') from error


def _first_sentence(text: str) -> str:
    """Without the advice that torch adds, some of which is dangerous."""
    return text.strip().partition('\n')[0].partition('. ')[0].rstrip('.')


def _looks_like_checkpoint(filename: str) -> bool:
    """Whether it starts like a zip archive or a pickle of protocol 2+."""
    with open(filename, 'rb') as file:
        head = file.read(4)
    return head == b'PK\x03\x04' or head[:1] == b'\x80'


def download(address: str) -> Path:
    """Download a checkpoint into torch's hub folder, once.

    Args:
        address (str): An http(s) address.

    Returns:
        Path: The file, under the name that it has there. Files of one name
        from several addresses are kept apart.
    """
    folder = Path(torch.hub.get_dir(), 'checkpoints',
                  hashlib.sha256(address.encode()).hexdigest()[:16])
    path = folder / (Path(urlparse(address).path).name or 'checkpoint')
    # Rank 0 first; then the others, for machines that share no disk with it.
    for turn in (True, False):
        if is_main_process() == turn and not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                address, str(path), progress=is_main_process())
        barrier()
    return path


def load_from_http(filename: str, map_location: Any = None) -> Any:
    """Download a checkpoint, once, and read it.

    mmengine's own loader would unpickle whatever the address holds.

    Args:
        filename (str): The address.
        map_location (Any): As for :func:`torch.load`. Defaults to None.

    Returns:
        Any: What :func:`load_from_local` returns, with its errors.
    """
    return load_from_local(download(filename), map_location)


def register_checkpoint_loader() -> None:
    """Let mmengine read checkpoints through the functions above.

    This is what makes ``--resume`` and ``load_from`` work, and safe, for every
    Runner of the process, from disk and from http(s).
    """
    # mmengine logs the functions' names, without the "load_from_".
    CheckpointLoader.register_scheme(
        prefixes='', loader=load_from_local, force=True)
    CheckpointLoader.register_scheme(
        prefixes=['http://', 'https://'], loader=load_from_http, force=True)
