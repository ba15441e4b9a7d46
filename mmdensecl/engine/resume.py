# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Which checkpoint a run resumes from."""

import logging
import os
import os.path as osp
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.dist import init_dist, is_distributed
from mmengine.logging import print_log
from mmengine.utils.dl_utils import set_multi_processing

from mmdensecl.checkpoint import UnsafeCheckpointError, load_from_local
from mmdensecl.datasets.unlabeled import from_rank_0

POINTER = 'last_checkpoint'
# Without them mmengine fails to resume, or continues with a fresh optimizer.
PARTS = ('meta', 'state_dict', 'message_hub', 'optimizer')
# More iterations than any run, and the end of numpy's seeds.
LARGEST = 2**32


class ResumeError(ValueError):
    """There are checkpoints, and none of them can be resumed from."""


def find_resumable(
    work_dir: str | os.PathLike, parts: Sequence[str] = PARTS
) -> str | None:
    """Find the newest checkpoint of a work_dir that can be read.

    A checkpoint appears under its name when it is whole, so it is the last
    written of `epoch_*.pth` and `iter_*.pth`, here or where `last_checkpoint`
    of mmengine points to. Each one passed over is named in a warning; nothing
    is changed.

    Args:
        work_dir: Of the run.
        parts: What a checkpoint has to hold.

    Returns:
        The file; None if nothing was saved yet.

    Raises:
        ResumeError: There are checkpoints, and none can be resumed from.
    """
    work_dir = Path(work_dir).absolute()
    named = last_checkpoint(work_dir)
    if named is not None and '://' in named:
        return named  # mmengine's backends know whether it is there
    passed = []
    for path in _candidates(work_dir, named):
        try:
            check_resumable(path, parts)
        except ResumeError as error:
            passed.append(str(error))
            continue
        for reason in passed:
            print_log(
                f'{reason}. It is passed over for "{path}".',
                logger='current',
                level=logging.WARNING,
            )
        return str(path)
    if passed:
        raise ResumeError(
            f'"{work_dir}" has no checkpoint to resume from:\n  '
            + '\n  '.join(passed)
            + '\nGive another file, --resume FILE, or start anew in another '
            '--work-dir'
        )
    if named is not None:
        raise ResumeError(
            f'"{work_dir}" has no checkpoint to resume from, but its '
            f'{POINTER} names {named!r}: there was one. Give its path, '
            f'--resume FILE, or remove {POINTER} to start anew'
        )
    return None


def _candidates(work_dir: Path, named: str | None) -> list[Path]:
    """The checkpoints of a run, the last written first."""
    folders, files = [work_dir], set()
    if named and osp.isfile(work_dir / osp.basename(named)):
        # Also where the work_dir was moved or copied to since.
        files.add(work_dir / osp.basename(named))
    elif named and osp.isfile(named):
        # A checkpoint hook with an out_dir saves elsewhere.
        files.add(Path(named))
        folders.append(Path(named).parent)
    for folder in folders:
        files |= {*folder.glob('epoch_*.pth'), *folder.glob('iter_*.pth')}
    return sorted(files, key=lambda x: x.stat().st_mtime_ns, reverse=True)


def last_checkpoint(work_dir: str | os.PathLike) -> str | None:
    """Read what mmengine notes after it has saved a checkpoint.

    Args:
        work_dir: Of the run.

    Returns:
        The file, which need not be there any more; '' if the note makes no
        sense, None if there is none.
    """
    try:
        text = Path(work_dir, POINTER).read_text(encoding='utf-8').strip()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError):
        return ''
    return text if text.isprintable() else ''


def last_good(work_dir: str | os.PathLike) -> str:
    """Say in a sentence, for errors, what :func:`find_resumable` finds."""
    try:
        found = find_resumable(work_dir)
    except ResumeError as error:
        return f'{error}.'
    return (
        f'The last good checkpoint is {found}.'
        if found
        else 'There is no checkpoint yet.'
    )


def check_resumable(
    path: str | os.PathLike, parts: Sequence[str] = PARTS
) -> None:
    """Check that a run can resume from a checkpoint, without its tensors.

    Args:
        path: A local file.
        parts: What it has to hold.

    Raises:
        ResumeError: It cannot.
    """
    try:
        checkpoint = load_from_local(path, map_location='cpu', mmap=True)
    except (OSError, ValueError, UnsafeCheckpointError) as error:
        raise ResumeError(str(error)) from error
    held = checkpoint if isinstance(checkpoint, dict) else {}
    lacking = [part for part in parts if part not in held]
    if lacking:
        raise ResumeError(
            f'"{path}" cannot be resumed from, as it lacks '
            f'{", ".join(lacking)} (save_optimizer and save_param_scheduler '
            'of the checkpoint hook have to be True)'
        )
    wrong = _malformed(held)
    if wrong:
        raise ResumeError(f'"{path}" cannot be resumed from: {wrong}')


def _malformed(held: dict) -> str | None:
    """What is wrong with a checkpoint that has all its parts."""
    meta, hub = held['meta'], held['message_hub']
    meta = meta if isinstance(meta, dict) else {}
    for key in ('epoch', 'iter'):
        value = meta.get(key)
        if not _is_count(value):
            return f'its meta does not say of which {key} it is: {value!r}'
    seed = meta.get('seed', 0)
    if seed is not None and not _is_count(seed):
        return f'the seed of its meta is no number below 2**32: {seed!r}'
    parts = ('log_scalars', 'runtime_info', 'resumed_keys')
    if not isinstance(hub, dict) or not all(
        isinstance(hub.get(x), dict) for x in parts
    ):
        return f'its message_hub does not consist of {", ".join(parts)}'
    if not isinstance(held['state_dict'], dict):
        return 'its state_dict is none'
    optimizer = held['optimizer']
    if not isinstance(optimizer, dict) or not all(
        isinstance(x, dict) and x.get('param_groups') and 'state' in x
        for x in _optimizers(optimizer)
    ):
        return "its optimizer has no param_groups, or is no optimiser's state"
    schedules = held.get('param_schedulers', [])
    several = isinstance(schedules, dict)
    for part in schedules.values() if several else [schedules]:
        if not isinstance(part, list) or not all(
            isinstance(x, dict) for x in part
        ):
            return 'its param_schedulers are no states of schedulers'
    return None


def _is_count(value: Any) -> bool:
    return (
        isinstance(value, Integral)
        and not isinstance(value, bool)
        and 0 <= int(value) < LARGEST
    )


def _optimizers(state: dict) -> list:
    """The state of the only optimiser, or of each of several."""
    single = 'state' in state or not state
    return [state] if single else [*state.values()]


def prepare_resume(cfg: Config) -> None:
    """Let a run resume from the checkpoint it names, or from its newest.

    Rank 0 looks for all: on a disk that machines share, they may not see
    the same files for some time after one was written.

    Args:
        cfg: With `launcher`, `work_dir` and maybe `load_from`, a checkpoint;
            without it, :func:`find_resumable` chooses. With a
            `param_scheduler`, a checkpoint has to hold its state, too. Its
            `load_from` and `resume` are set.

    Raises:
        ResumeError: It cannot be resumed from.
    """
    if cfg.get('launcher', 'none') != 'none' and not is_distributed():
        # As the Runner does later on, if nobody has.
        env = cfg.get('env_cfg', {})
        set_multi_processing(**env.get('mp_cfg', {}), distributed=True)
        init_dist(cfg.launcher, **env.get('dist_cfg', {}))
    # Without its state the learning rate would begin anew.
    schedule = ('param_schedulers',) if cfg.get('param_scheduler') else ()

    def choose() -> str | None:
        named = cfg.get('load_from')
        if not named:
            return find_resumable(cfg.work_dir, (*PARTS, *schedule))
        if '://' not in named:
            check_resumable(named, (*PARTS, *schedule))
        return named

    cfg.load_from = from_rank_0(choose)
    cfg.resume = cfg.load_from is not None
    print_log(
        f'Resume from {cfg.load_from}'
        if cfg.resume
        else f'"{cfg.work_dir}" has no checkpoint to resume: start anew',
        logger='current',
    )
