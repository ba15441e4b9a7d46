# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Atomic file writes."""

import errno
import os
from contextlib import suppress
from pathlib import Path

UNFINISHED = '.saving'


def write_safely(path: str | os.PathLike, data: bytes) -> None:
    """Write a file as a whole, or leave what was there as it was.

    It is written under another name beside its own, synced and renamed. What
    a killed process leaves behind under that name, `.<name>.saving`, the next
    writing of the file overwrites and :func:`remove_unfinished` removes.

    Args:
        path: The file. Its folder is made if need be.
        data: What it shall hold.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f'.{path.name}{UNFINISHED}')
    try:
        with open(unfinished, 'wb') as file:
            file.write(data)
            file.flush()
            # Some file systems find out only now that the disk is full.
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise
    _sync_folder(path.parent)


def remove_unfinished(folder: str | os.PathLike) -> None:
    """Remove what killed processes left half written in a folder.

    Args:
        folder: A folder into which nobody writes now.
    """
    for path in Path(folder).glob(f'.*{UNFINISHED}'):
        path.unlink()


def _sync_folder(folder: Path) -> None:
    """Let a renaming outlive a crash of the machine."""
    if not hasattr(os, 'O_DIRECTORY'):  # Windows cannot open folders
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:  # not every file system can sync a folder
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
