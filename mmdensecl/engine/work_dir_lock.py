# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""One run in a work_dir at a time."""

import errno
import logging
import os
import socket
import time
from pathlib import Path

from filelock import FileLock, Timeout
from mmengine.logging import print_log

# Rank of a process, as its launcher names it.
RANKS = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')
# Seconds that a run started again by its launcher waits for the lock: a file
# server takes its time to notice that the machine of the first one is gone.
PATIENCE = 120
RESTARTS = 'TORCHELASTIC_RESTART_COUNT', 'SLURM_RESTART_COUNT'

# Held as long as the process lives, by its number and the real path.
_locks: dict[tuple[int, str], FileLock] = {}


class WorkDirError(RuntimeError):
    """A work_dir into which this run must not, or cannot, write."""


def lock_work_dir(path: str | os.PathLike, launcher: str = 'none') -> bool:
    """Keep a second run out of a work_dir, as long as this process lives.

    A lock ends with its process, however that ends. Where there are none, as
    on some network disks, the run continues with a warning.

    Args:
        path: The work_dir. It is made if need be.
        launcher: Of the run: only rank 0 takes the lock.

    Returns:
        Whether this process has the lock.

    Raises:
        WorkDirError: Another run has it, or nothing can be written there.
    """
    if int(os.environ.get(RANKS.get(launcher, ''), 0)):
        return False
    file = Path(path, '.lock')
    restarted = any(int(os.environ.get(name, 0)) for name in RESTARTS)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        key = os.getpid(), os.path.realpath(file)
        lock = _locks.setdefault(key, FileLock(file))
        if not lock.is_locked:
            lock.acquire(timeout=PATIENCE if restarted else 0)
            file.write_text(
                f'process {os.getpid()} on {socket.gethostname()}, since '
                f'{time.strftime("%Y-%m-%d %H:%M:%S")}\n',
                encoding='utf-8',
            )
    except Timeout as error:
        holder = file.read_text(encoding='utf-8').strip()
        raise WorkDirError(
            f'Another run works in "{path}": '
            f'{holder or "one that has just begun"}. Two would overwrite each '
            "other's checkpoints: wait for it, end it, or give another "
            '--work-dir'
        ) from error
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
            raise WorkDirError(
                f'Cannot write into the work_dir "{path}": {error.strerror}. '
                'Mend that, or give another one with --work-dir'
            ) from error
        print_log(
            f'"{file}" cannot be locked ({error.strerror}): take care that no '
            'second run is started there',
            logger='current',
            level=logging.WARNING,
        )
        return False
    return True
