# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Read checkpoints as data: `weights_only=True` and a small allow-list.

mmengine 0.10.7 saves its log history as pickled objects, which torch >= 2.6
refuses to load by default, so upstream cannot resume its own checkpoints. The
allow-list names exactly what a training checkpoint holds.
"""

import hashlib
import os
import pickle
import textwrap
import uuid
from pathlib import Path
from typing import Any
from urllib.error import ContentTooShortError
from urllib.parse import urlparse
from urllib.request import urlretrieve

import numpy as np
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.fileio import get_local_path
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import (
    CheckpointLoader,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)

# How the files begin that torch.save writes, now and before 1.6.
ZIP, PICKLE = b'PK\x03\x04', b'\x80'


class UnsafeCheckpointError(RuntimeError):
    """A checkpoint that asks for more than tensors and plain values."""


def _history_statistic(owner: Any, name: str) -> Any:
    """Stand in for the `getattr` by which a HistoryBuffer is pickled.

    The real one would let a file walk from an allowed class to anything.
    """
    if owner is not HistoryBuffer or name not in (
        'min',
        'max',
        'mean',
        'current',
    ):
        raise UnsafeCheckpointError(
            f'it asks for an attribute of {type(owner).__name__}'
        )
    return getattr(HistoryBuffer, name)


def _plain_dtype(kind: Any, *_: Any) -> np.dtype:
    """Stand in for `numpy.dtype`: numbers only.

    The dtypes returned are immutable singletons. A copy could be given an
    object sub-dtype by its `__setstate__`, which turns bytes of the file into
    pointers.
    """
    dtype = np.dtype(kind) if isinstance(kind, str) else None
    if dtype is None or dtype.kind not in 'fiub':
        raise UnsafeCheckpointError(f'it asks for the dtype {kind!r}')
    return dtype


def _allowed_globals() -> list:
    reconstruct = np.ndarray((0,)).__reduce__()[0]
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


def check_file(path: str | os.PathLike) -> str:
    """Check that a local file exists and is not empty.

    Args:
        path: The file; `~` is the home folder.

    Returns:
        Its path, with the home folder spelt out.

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


def load_from_local(
    filename: str | os.PathLike, map_location: Any = None, mmap: bool = False
) -> Any:
    """Read a checkpoint without running anything it holds.

    What a program has allowed by `torch.serialization.add_safe_globals` is
    allowed here as well.

    Args:
        filename: A local file.
        map_location: As for :func:`torch.load`.
        mmap: Whether tensors are read from a zip archive only when they are
            used.

    Returns:
        What was saved, except `meta['config']` of old files, which mmengine's
        Runner would run as Python.

    Raises:
        FileNotFoundError: It is missing, or a folder.
        UnsafeCheckpointError: It holds something other than tensors, plain
            values and mmengine's log history.
        ValueError: It is empty, truncated or no checkpoint.
    """
    filename = check_file(filename)
    try:
        with open(filename, 'rb') as file:
            head = file.read(4)
            if not head.startswith((ZIP, PICKLE)):
                raise ValueError('it is neither a zip archive nor a pickle')
        with torch.serialization.safe_globals(_allowed_globals()):
            content = torch.load(
                filename,
                map_location=map_location,
                weights_only=True,
                mmap=mmap and head == ZIP,
            )
    except torch.OutOfMemoryError:  # of a GPU: no fault of the file
        raise
    except (pickle.UnpicklingError, UnsafeCheckpointError) as error:
        reason = str(error).rpartition('WeightsUnpickler error: ')[2]
        raise UnsafeCheckpointError(
            f'"{filename}" was not loaded, as unpickling it could run code: '
            f'{_first_sentence(reason)}. Checkpoints hold tensors, '
            'numbers, strings and containers of them; if you trust its '
            'author, save those again with torch.save and load that file.'
        ) from error
    except Exception as error:  # an untrusted file can lead to any
        reason = _first_sentence(str(error)) or type(error).__name__
        raise ValueError(
            f'"{filename}" ({os.path.getsize(filename)} bytes) is truncated '
            f'or not a PyTorch checkpoint: {reason}'
        ) from error
    if isinstance(content, dict) and isinstance(content.get('meta'), dict):
        content['meta'].pop('config', None)
    return content


def _first_sentence(text: str) -> str:
    """Leave out the advice that torch adds, some of which is dangerous."""
    text = textwrap.shorten(text.partition('. ')[0], 500).rstrip('.')
    return ''.join(x if x.isprintable() else '?' for x in text)


def download(address: str) -> Path:
    """Download a checkpoint into torch's hub folder, once.

    Args:
        address: An http(s) address.

    Returns:
        The file, under its own name; files of one name from several addresses
        are kept apart.
    """
    folder = Path(
        torch.hub.get_dir(),
        'checkpoints',
        hashlib.sha256(address.encode()).hexdigest()[:16],
    )
    name = Path(urlparse(address).path).name
    path = folder / (name if name not in ('', '..') else 'checkpoint')
    # Rank 0 first; then the others, for machines that share no disk with it.
    for turn in (True, False):
        if is_main_process() == turn and not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            _fetch(address, path)
        barrier()
    return path


def _fetch(address: str, path: Path) -> None:
    """Download a file under a temporary name, and rename it when it is whole.

    :func:`torch.hub.download_url_to_file` keeps what a broken connection left.
    """
    partial = path.with_name(f'{path.name}.{uuid.uuid4().hex}.partial')
    print_log(f'Downloading {address}', logger='current')
    try:
        urlretrieve(address, partial)
        partial.replace(path)
    except ContentTooShortError as error:
        raise OSError(
            f'"{address}" broke off ({error.reason}); try again'
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def load_from_http(filename: str, map_location: Any = None) -> Any:
    """Download a checkpoint, once, and read it by :func:`load_from_local`."""
    return load_from_local(download(filename), map_location)


def load_from_zoo(filename: str, map_location: Any = None) -> Any:
    """Read a checkpoint by its name in a list of mmengine.

    Args:
        filename: Such as `torchvision://resnet50`, `open-mmlab://resnet50_v1c`
            or `mmcls://vgg11`.
        map_location: As for :func:`torch.load`.

    Returns:
        What :func:`load_from_local` returns; of `mmcls://` only the backbone.

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
        raise ValueError(
            f'There is no "{name}" in {zoo}://; a file or an '
            'http(s) address will do as well'
        )
    address = addresses[name]
    if address.startswith(('http://', 'https://')):
        content = load_from_http(address, map_location)
    else:  # the user's own list may name files beside it
        home = os.getenv('MMENGINE_HOME') or os.path.join(
            os.getenv('XDG_CACHE_HOME') or '~/.cache', 'mmengine'
        )
        content = load_from_local(os.path.join(home, address), map_location)
    if zoo != 'mmcls':
        return content
    state = content.get('state_dict', content)
    return dict(
        state_dict={
            k[len('backbone.') :]: v
            for k, v in state.items()
            if k.startswith('backbone.')
        }
    )


def load_from_ceph(filename: str, map_location: Any = None) -> Any:
    """Fetch a checkpoint from `s3://` or `petrel://`, as mmengine does."""
    with get_local_path(filename, dict(backend='petrel')) as path:
        return load_from_local(path, map_location)


def load_from_pavi(filename: str, map_location: Any = None) -> Any:
    """Refuse `pavi://`, which mmengine would unpickle."""
    raise ValueError(
        f'"{filename}" cannot be read safely. Download it and give the file'
    )


def register_checkpoint_loader() -> None:
    """Let mmengine read checkpoints through the functions above.

    This makes `--resume` and `load_from` work, and safe, for every Runner of
    the process, wherever the file is: mmengine's own loaders, and more so
    those of the onedl fork, unpickle whatever they find.
    """
    # mmengine logs the functions' names, without the "load_from_".
    for loader, prefixes in (
        (load_from_local, ['']),
        (load_from_http, ['http://', 'https://']),
        (
            load_from_zoo,
            [
                'modelzoo://',
                'torchvision://',
                'open-mmlab://',
                'openmmlab://',
                'mmcls://',
            ],
        ),
        (load_from_ceph, [r'(\S+\:)?s3://', r'(\S+\:)?petrel://']),
        (load_from_pavi, ['pavi://']),
    ):
        CheckpointLoader.register_scheme(prefixes, loader, force=True)
