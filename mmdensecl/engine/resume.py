# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Which checkpoint a run goes on from."""
import logging
import os
import os.path as osp
import re
import sys
import zipfile
import zlib
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple, Union

from mmengine.config import Config
from mmengine.dist import (broadcast_object_list, init_dist, is_distributed,
                           is_main_process)
from mmengine.logging import print_log
from mmengine.utils.dl_utils import set_multi_processing

from mmdensecl.checkpoint import UnsafeCheckpointError, load_from_local

POINTER = 'last_checkpoint'
# Without them mmengine fails to resume, or goes on with a fresh optimizer.
PARTS = ('meta', 'state_dict', 'message_hub', 'optimizer')


class ResumeError(ValueError):
    """There are checkpoints, and none of them can be resumed from."""


@dataclass(frozen=True)
class _Found:
    """What a checkpoint says of itself."""
    path: Path
    progress: Tuple[int, int]  # epochs, and iterations, that were done
    time: str  # when it was saved, as mmengine writes it


def find_resumable(work_dir: Union[str, os.PathLike],
                   parts: Sequence[str] = PARTS) -> Optional[str]:
    """Find the checkpoint of a work_dir from which a run goes on.

    Of ``epoch_*.pth`` and ``iter_*.pth``, and of files named as that in
    mmengine's ``last_checkpoint``, it is the most advanced one that can be
    read whole. Each one passed over is named in a warning; nothing is
    changed. What is further on than that in ``last_checkpoint`` but was
    saved before it belongs to a run that somebody gave up, by resuming from
    an earlier file. Where ``last_checkpoint`` names nothing whole, the file
    saved last takes its place in that.

    Args:
        work_dir (str | os.PathLike): Of the run.
        parts (Sequence[str]): What a checkpoint has to hold. Defaults to
            PARTS.

    Returns:
        str | None: The file; None if nothing was saved yet.

    Raises:
        ResumeError: There are checkpoints, and none can be resumed from.
    """
    work_dir = Path(osp.abspath(work_dir))
    named = last_checkpoint(work_dir)
    if named is not None and '://' in named:
        return named  # mmengine's backends know whether it is there
    pointed = Path(named) if named else None
    # A work_dir may have been moved, or copied.
    if pointed and osp.isfile(work_dir / pointed.name):
        pointed = work_dir / pointed.name
    passed: Dict[Path, str] = {}

    def look(path: Path, since: Optional[_Found]) -> Optional[_Found]:
        try:
            found = _read(path, parts)
            if (since and found.time < since.time
                    and found.progress > since.progress):
                raise ValueError(
                    f'"{path}" is further on, but older than "{since.path}", '
                    'with which a later run went on')
            _check_whole(path)
            return found
        except ValueError as error:
            passed[path] = str(error)
            return None

    candidates = _candidates(work_dir, pointed)
    noted = None
    if pointed and osp.isfile(pointed):
        noted = look(pointed, None)
    since = noted or _saved_last(candidates)
    heads: List[_Found] = []
    for files in candidates.values():
        for path in files:
            if path in passed:
                continue
            found = noted  # need not be read again
            if found is None or found.path != path:
                found = look(path, since)
            if found:
                heads.append(found)
                break
    if heads:
        best = str(max(heads, key=lambda found: found.progress).path)
        for reason in passed.values():
            _warn(f'{reason}. It is passed over for "{best}".')
        return best
    if passed:
        raise ResumeError(
            f'"{work_dir}" has no checkpoint to resume from:\n  ' +
            '\n  '.join(passed.values()) +
            '\nGive another file, --resume FILE, or start anew in another '
            '--work-dir')
    if named is not None:
        raise ResumeError(
            f'"{work_dir}" has no checkpoint to resume from, but its '
            f'{POINTER} names {named!r}: there was one. Give its place, '
            f'--resume FILE, or remove {POINTER} to start anew')
    return None


def last_checkpoint(work_dir: Union[str, os.PathLike]) -> Optional[str]:
    """What mmengine notes, in place, after it has saved a checkpoint.

    Args:
        work_dir (str | os.PathLike): Of the run.

    Returns:
        str | None: The file, which need not be there any more; '' if the note
        makes no sense, None if there is none.
    """
    try:
        text = Path(work_dir, POINTER).read_text(encoding='utf-8').strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return ''
    return text if text.isprintable() else ''


def last_good(work_dir: Union[str, os.PathLike]) -> str:
    """A sentence on what :func:`find_resumable` finds, for errors.

    Args:
        work_dir (str | os.PathLike): Of the run.

    Returns:
        str: The sentence.
    """
    try:
        found = find_resumable(work_dir)
    except ResumeError as error:
        return f'{error}.'
    return (f'The last good checkpoint is {found}.'
            if found else 'There is no checkpoint yet.')


def check_resumable(path: Union[str, os.PathLike],
                    parts: Sequence[str] = PARTS) -> str:
    """Read all of a checkpoint that a user names.

    Args:
        path (str | os.PathLike): A local file, or an address, of which only
            mmengine's backends know what it holds.
        parts (Sequence[str]): What it has to hold. Defaults to PARTS.

    Returns:
        str: The same.

    Raises:
        ResumeError: A run cannot go on from it.
    """
    if '://' not in str(path):
        try:
            _read(Path(path), parts)
            _check_whole(Path(path))
        except ValueError as error:
            raise ResumeError(str(error)) from error
    return str(path)


def prepare_resume(cfg: Config) -> None:
    """Let a run go on from the checkpoint it names, or from its newest.

    Rank 0 looks for all: on a disk that machines share, they may not see
    the same files for some time after one was written.

    Args:
        cfg (Config): With ``launcher``, ``work_dir`` and maybe ``load_from``,
            a checkpoint; without it, :func:`find_resumable` chooses. With a
            ``param_scheduler``, a checkpoint has to hold its state, too. Its
            ``load_from`` and ``resume`` are set.

    Raises:
        ResumeError: It cannot be resumed from. On other ranks than 0 this,
            and every other error of rank 0, is SystemExit.
    """
    if cfg.get('launcher', 'none') != 'none' and not is_distributed():
        # As the Runner does later on, if nobody has.
        env = cfg.get('env_cfg', {})
        set_multi_processing(**env.get('mp_cfg', {}), distributed=True)
        init_dist(cfg.launcher, **env.get('dist_cfg', {}))
    choice, error = [None, False], None
    if is_main_process():
        parts = list(PARTS)
        if cfg.get('param_scheduler'):
            # Without it the learning rate would begin anew.
            parts.append('param_schedulers')
        try:
            named = cfg.get('load_from')
            if named:
                choice[0] = check_resumable(named, parts)
            else:
                choice[0] = find_resumable(cfg.work_dir, parts)
        except Exception as caught:  # the others wait to hear of any
            error, choice[1] = caught, True
    broadcast_object_list(choice)
    if error:
        raise error
    if choice[1]:
        sys.exit(2)  # rank 0 says why
    cfg.load_from = choice[0]
    cfg.resume = choice[0] is not None
    if is_main_process():
        print_log(
            f'Resume from {choice[0]}' if cfg.resume else
            f'"{cfg.work_dir}" has no checkpoint to resume: start anew',
            logger='current')


def _candidates(work_dir: Path,
                pointed: Optional[Path]) -> Dict[str, List[Path]]:
    """Files by their kind of name, those of the highest number first."""
    kinds = {
        'epoch_#.pth', 'iter_#.pth',
        _kind(pointed.name if pointed else '')
    }

    def look_in(folder: Path) -> List[Path]:
        if not osp.isdir(folder):
            return []
        return [x for x in folder.iterdir() if _kind(x.name) in kinds]

    found = look_in(work_dir)
    if pointed and pointed.parent != work_dir:
        # The hook's out_dir, all of it, or where the work_dir was before.
        found += look_in(pointed.parent) if not found else [
            path for path in [pointed] if osp.isfile(path)
        ]
    files: Dict[str, List[Path]] = defaultdict(list)
    for path in sorted(found, key=lambda x: _numbers(x.name), reverse=True):
        files[_kind(path.name)].append(path)
    return files


def _kind(name: str) -> str:
    return re.sub(r'\d+', '#', name)


def _numbers(name: str) -> Sequence[int]:
    return [*map(int, re.findall(r'\d+', name))]


def _saved_last(candidates: Dict[str, List[Path]]) -> Optional[_Found]:
    """The one saved last, be it one to resume from or not."""
    saved = []
    for path in chain(*candidates.values()):
        try:
            saved.append(_read(path, ['meta']))
        except ValueError:
            pass  # said where it is looked at
    return max(saved, key=lambda x: (x.time, x.progress), default=None)


def _read(path: Path, parts: Sequence[str]) -> _Found:
    """Read what a checkpoint says of itself, not its tensors.

    Raises:
        ValueError: A run cannot go on from it.
    """
    try:
        checkpoint = load_from_local(path, map_location='cpu', mmap=True)
    except (OSError, UnsafeCheckpointError) as error:
        raise ValueError(str(error)) from error
    held = checkpoint if isinstance(checkpoint, dict) else {}
    lacking = [part for part in parts if part not in held]
    if lacking:
        raise ValueError(
            f'"{path}" cannot be resumed from, as it lacks '
            f'{", ".join(lacking)} (save_optimizer and save_param_scheduler '
            'of the checkpoint hook have to be True)')
    meta = held['meta']
    try:
        progress = int(meta['epoch']), int(meta['iter'])
        return _Found(path, progress, str(meta.get('time', '')))
    except Exception as error:  # a stranger's file can lead to any
        raise ValueError(f'"{path}" cannot be resumed from, as its meta does '
                         'not say which epoch and iter it is of') from error


def _check_whole(path: Path) -> None:
    """Read all of a checkpoint: torch does not look at the checksums.

    Raises:
        ValueError: It is not what was written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile,
            zlib.error) as error:
        raise ValueError(f'"{path}" cannot be read: {error}') from error
    if record:
        raise ValueError(f'"{path}" is damaged: the checksum of "{record}" in '
                         'it is wrong')


def _warn(message: str) -> None:
    print_log(message, logger='current', level=logging.WARNING)
