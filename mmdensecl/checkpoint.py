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
from mmengine.fileio import get_local_path
from mmengine.logging import HistoryBuffer
from mmengine.runner import (CheckpointLoader, get_deprecated_model_names,
                             get_external_models, get_mmcls_models,
                             get_torchvision_models)

from .checkpoint_scan import (UnsafeCheckpointError, check_contents, scan_file,
                              show)

_STATISTICS = {
    name: getattr(HistoryBuffer, name)
    for name in ('min', 'max', 'mean', 'current')
}


def _history_statistic(owner: Any, name: str) -> Any:
    """Stand-in for the ``getattr`` by which a HistoryBuffer is pickled.

    The real one would let a file walk from an allowed class to anything.
    """
    if owner is not HistoryBuffer or name not in _STATISTICS:
        raise UnsafeCheckpointError(
            f'it asks for an attribute of {type(owner).__name__}')
    return _STATISTICS[name]


def _plain_dtype(kind: Any, *_: Any) -> np.dtype:
    """Stand-in for ``numpy.dtype``: numpy's own numbers and nothing else.

    They are immutable singletons. A copy could be given an object sub-dtype
    by its ``__setstate__``, which turns bytes of the file into pointers.
    """
    dtype = np.dtype(kind) if isinstance(kind, str) else None
    if dtype is None or dtype.kind not in 'fiub':
        shown = show(kind) if isinstance(kind, str) else type(kind).__name__
        raise UnsafeCheckpointError(f"it asks for the dtype '{shown}'")
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
        if '://' in path:
            wrong += '; an address begins with http:// or https://'
        raise FileNotFoundError(f'The checkpoint "{path}" {wrong}')
    if not os.path.getsize(path):
        raise ValueError(f'The checkpoint "{path}" is empty')
    return path


def load_from_local(filename: Union[str, os.PathLike],
                    map_location: Any = None,
                    mmap: bool = False) -> Any:
    """Read a checkpoint without running anything it holds.

    Args:
        filename (str | os.PathLike): A local file.
        map_location (Any): As for :func:`torch.load`. Defaults to None.
        mmap (bool): Whether tensors are read when they are used, from the
            file. Defaults to False.

    Returns:
        Any: What was saved, but for ``meta['config']`` of old files.

    Raises:
        FileNotFoundError: It is missing, or a folder.
        UnsafeCheckpointError: It holds something other than tensors, plain
            values and mmengine's log history.
        ValueError: It is empty, truncated, no checkpoint at all, or claims
            more than it holds.
    """
    filename = check_file(filename)
    size = os.path.getsize(filename)
    try:
        scan_file(filename)
        with torch.serialization.safe_globals(_allowed_globals()):
            content = torch.load(
                filename,
                map_location=map_location,
                weights_only=True,
                mmap=mmap)
        check_contents(content, size)
    except torch.OutOfMemoryError:  # a GPU's, and no fault of the file
        raise
    except (pickle.UnpicklingError, UnsafeCheckpointError) as error:
        reason = str(error).rpartition('WeightsUnpickler error: ')[2]
        raise UnsafeCheckpointError(
            f'"{filename}" was not loaded, as unpickling it could run code: '
            f'{_first_sentence(reason)}. Checkpoints hold tensors, '
            'numbers, strings and containers of them; if you trust its '
            'author, save those again with torch.save and load that file.'
        ) from error
    except Exception as error:  # a stranger's file can lead to any
        reason = _first_sentence(str(error)) or type(error).__name__
        raise ValueError(
            f'"{filename}" ({size} bytes) is truncated or not a PyTorch '
            f'checkpoint: {reason}') from error
    # mmengine's Runner would run this text of old files as Python.
    if isinstance(content, dict) and isinstance(content.get('meta'), dict):
        content['meta'].pop('config', None)
    return content


def _first_sentence(text: str) -> str:
    """Without the advice that torch adds, some of which is dangerous."""
    return show(text.strip().partition('\n')[0].partition('. ')[0].rstrip('.'))


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
    name = Path(urlparse(address).path).name
    path = folder / (name if name not in ('', '..') else 'checkpoint')
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


def load_from_zoo(filename: str, map_location: Any = None) -> Any:
    """Read a checkpoint by its name in a list of mmengine.

    Args:
        filename (str): Such as ``torchvision://resnet50``,
            ``open-mmlab://resnet50_v1c`` or ``mmcls://vgg11``.
        map_location (Any): As for :func:`torch.load`. Defaults to None.

    Returns:
        Any: What :func:`load_from_local` returns, with its errors. Of
        ``mmcls://`` only the backbone.

    Raises:
        ValueError: The list does not have the name.
    """
    zoo, _, name = filename.partition('://')
    if zoo in ('torchvision', 'modelzoo'):
        addresses = get_torchvision_models()
    elif zoo == 'mmcls':
        addresses = get_mmcls_models()
    else:
        addresses = get_external_models()
        name = get_deprecated_model_names().get(name, name)
    if name not in addresses:
        raise ValueError(f'There is no "{name}" in {zoo}://; a file or an '
                         'http(s) address will do as well')
    address = addresses[name]
    if address.startswith(('http://', 'https://')):
        content = load_from_http(address, map_location)
    else:  # the user's own list may name files beside it
        home = os.getenv('MMENGINE_HOME') or os.path.join(
            os.getenv('XDG_CACHE_HOME') or '~/.cache', 'mmengine')
        content = load_from_local(os.path.join(home, address), map_location)
    if zoo != 'mmcls':
        return content
    state = content.get('state_dict', content)
    return dict(
        state_dict={
            k[len('backbone.'):]: v
            for k, v in state.items() if k.startswith('backbone.')
        })


def load_from_ceph(filename: str, map_location: Any = None) -> Any:
    """Fetch a checkpoint from object storage, by petrel as mmengine does.

    Args:
        filename (str): Such as ``s3://bucket/epoch_200.pth``.
        map_location (Any): As for :func:`torch.load`. Defaults to None.

    Returns:
        Any: What :func:`load_from_local` returns, with its errors.
    """
    with get_local_path(filename, dict(backend='petrel')) as path:
        return load_from_local(path, map_location)


def load_from_pavi(filename: str, map_location: Any = None) -> Any:
    """Refuse what only a client of another company can fetch.

    mmengine's own loader would unpickle it.

    Args:
        filename (str): Such as ``pavi://model``.
        map_location (Any): Not used. Defaults to None.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f'"{filename}" cannot be read safely. Download it and '
                     'give the file')


def register_checkpoint_loader() -> None:
    """Let mmengine read checkpoints through the functions above.

    This is what makes ``--resume`` and ``load_from`` work, and safe, for every
    Runner of the process, wherever the file is: mmengine's own loaders, and
    more so those of the onedl fork, unpickle whatever they find.
    """
    # mmengine logs the functions' names, without the "load_from_".
    for loader, prefixes in (
        (load_from_local, ['']),
        (load_from_http, ['http://', 'https://']),
        (load_from_zoo, [
            'modelzoo://', 'torchvision://', 'open-mmlab://', 'openmmlab://',
            'mmcls://'
        ]),
        (load_from_ceph, [r'(\S+\:)?s3://', r'(\S+\:)?petrel://']),
        (load_from_pavi, ['pavi://']),
    ):
        CheckpointLoader.register_scheme(prefixes, loader, force=True)
