# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""One run in a work_dir at a time."""
import errno
import logging
import os
import os.path as osp
import socket
import time
from typing import IO, Dict, Tuple, Union

from mmengine.logging import print_log

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = '.lock'
# Rank of a process, as its launcher names it.
RANKS = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')
# Seconds that a run started again by its launcher waits for the lock: a file
# server takes its time to notice that the machine of the first one is gone.
PATIENCE = 120

# Open as long as this process lives, by its number (a fork inherits the list,
# but not the locks) and real path.
_held: Dict[Tuple[int, str], IO[str]] = {}


class WorkDirError(RuntimeError):
    """A work_dir into which this run must not, or cannot, write."""


def lock_work_dir(path: Union[str, os.PathLike],
                  launcher: str = 'none') -> bool:
    """Keep a second run out of a work_dir, as long as this process lives.

    A lock ends with its process, however that ends. Where there are none, as
    on Windows and some network disks, the run goes on with a warning.

    Args:
        path (str | os.PathLike): The work_dir. It is made if need be.
        launcher (str): Of the run: only rank 0 takes the lock. Defaults to
            'none'.

    Returns:
        bool: Whether this process has the lock.

    Raises:
        WorkDirError: Another run has it, or nothing can be written there.
    """
    if int(os.environ.get(RANKS.get(launcher, ''), 0)):
        return False
    key = os.getpid(), osp.realpath(path)
    if key in _held:
        return True
    try:
        os.makedirs(path, exist_ok=True)
        file = open(osp.join(path, NAME), 'a+', encoding='utf-8')
        locked = _lock(file)
        if locked:
            file.truncate(0)
            file.write(f'process {os.getpid()} on {socket.gethostname()}, '
                       f'since {time.strftime("%Y-%m-%d %H:%M:%S")}\n')
            file.flush()
    except OSError as error:
        raise WorkDirError(
            f'Cannot write into the work_dir "{path}": {error.strerror}. '
            'Mend that, or give another one with --work-dir') from error
    _held[key] = file
    return locked


def _lock(file: IO[str]) -> bool:
    """Lock a file for this process alone.

    A lock of flock would belong to its forks, too: workers of the data loader
    would keep it when their run is killed. This one they do not inherit. It
    ends when this process closes the file, or any other handle of it.

    Args:
        file (IO[str]): Open for reading and writing; what it holds tells of
            the process that has it locked.

    Returns:
        bool: Whether it is locked now. False where there are no such locks.

    Raises:
        WorkDirError: Another process has it.
    """
    again = any(
        int(os.environ.get(name, 0))
        for name in ('TORCHELASTIC_RESTART_COUNT', 'SLURM_RESTART_COUNT'))
    until = time.monotonic() + (PATIENCE if again else 0)
    while True:
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, 'this system has no such locks')
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() < until:
                time.sleep(1)
                continue
            file.seek(0)
            holder = file.read().strip() or 'one that has just begun'
            raise WorkDirError(
                f'Another run works in "{osp.dirname(file.name)}": {holder}. '
                "Two would overwrite each other's checkpoints: wait for it, "
                'end it, or give another --work-dir') from error
        except OSError as error:
            print_log(
                f'"{file.name}" cannot be locked ({error.strerror}): take '
                'care that no second run is started there',
                logger='current',
                level=logging.WARNING)
            return False
