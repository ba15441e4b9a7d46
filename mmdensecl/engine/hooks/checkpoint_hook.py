# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Atomic checkpoints."""

import os
import os.path as osp
import re
from pathlib import Path
from typing import Any

from mmengine.dist import barrier, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.optim import OptimWrapperDict

from mmdensecl.registry import HOOKS

from ..resume import POINTER, last_good
from ..safe_write import write_safely

BACKEND = 'mmdensecl.local'


@register_backend(BACKEND, force=True)
class SafeLocalBackend(LocalBackend):
    """mmengine's backend for local files, with atomic writes."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file.

        Args:
            obj: What it shall hold.
            filepath: The file.

        Raises:
            OSError: With what to resume from.
        """
        try:
            write_safely(filepath, obj)
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            raise OSError(
                error.errno,
                f'"{filepath}" of {len(obj) / 1e6:,.1f} MB could not be '
                f'written: {reason}. {last_good(osp.dirname(filepath))} Mend '
                'that, for a full disk by removing something or a smaller '
                'max_keep_ckpts of the checkpoint hook, and resume with '
                '--resume',
            ) from error


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's `CheckpointHook` with atomic files.

    A checkpoint is written under another name and then renamed, and an old one
    is removed only when the new one is there, so the disk needs room for
    `max_keep_ckpts + 1`. Files go elsewhere than to a local disk as with
    mmengine's hook.

    Args:
        *args: Of mmengine's hook: `interval`, `max_keep_ckpts` (files that
            are kept, of the names `epoch_*.pth`, `iter_*.pth` and
            `filename_tmpl`, also those from before the run was resumed) ...
        **kwargs: The same by name.
    """

    backend_args: dict | None
    max_keep_ckpts: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.take_over()

    def take_over(self) -> None:
        """Write and prune by our own means, where files are local."""
        self.keep = -1
        self.warned = False
        backend = (self.backend_args or {}).get('backend', 'local')
        if (
            self.file_client_args is None
            and backend in ('local', BACKEND)
            and '://' not in str(self.out_dir or '')
        ):
            self.backend_args = dict(backend=BACKEND)
            # mmengine removes the oldest before it writes the newest.
            self.keep, self.max_keep_ckpts = self.max_keep_ckpts, -1

    def before_train(self, runner) -> None:
        """Say what could not be resumed from."""
        super().before_train(runner)
        lacking = [
            name
            for name in ('save_optimizer', 'save_param_scheduler')
            if not getattr(self, name)
        ]
        if lacking:
            runner.logger.warning(
                f'The checkpoints of this run cannot be resumed from: '
                f'{" and ".join(lacking)} of the checkpoint hook is False.'
            )

    def after_train_epoch(self, runner) -> None:
        """Save, then remove what is too many."""
        before = self.last_ckpt
        super().after_train_epoch(runner)
        if self.last_ckpt != before:
            self._after_save(runner)

    def after_train_iter(self, runner, *args, **kwargs) -> None:
        """Save, then remove what is too many."""
        before = self.last_ckpt
        super().after_train_iter(runner, *args, **kwargs)
        if self.last_ckpt != before:
            self._after_save(runner)

    def _after_save(self, runner) -> None:
        self.prune(runner, str(self.last_ckpt))
        if not (self.warned or follows_update(runner)):
            self.warned = True
            runner.logger.warning(
                f'"{self.last_ckpt}" was saved between two steps of the '
                'optimiser: a run that resumes from it lacks the gradients '
                'accumulated so far. Let the checkpoint hook save at multiples'
                ' of optim_wrapper.accumulative_counts iterations'
            )

    def prune(self, runner, saved: str) -> None:
        """Remove the oldest checkpoints, as `max_keep_ckpts` has it.

        Args:
            runner: The runner.
            saved: The checkpoint just written, which always stays.
        """
        if self.keep <= 0 or not is_main_process():
            return
        own = re.sub(r'\\{.*?\\}', r'\\d+', re.escape(self.filename_tmpl))
        others = [
            path
            for path in Path(self.out_dir).iterdir()
            if re.fullmatch(rf'(epoch|iter)_\d+\.pth|{own}', path.name)
            and path != Path(saved)
        ]
        others.sort(key=lambda path: path.stat().st_mtime_ns)
        for path in others[: max(0, len(others) + 1 - self.keep)]:
            try:
                path.unlink()
            except OSError as error:
                runner.logger.warning(
                    f'"{path}" is one too many and could '
                    f'not be removed: {error.strerror}'
                )


def follows_update(runner) -> bool:
    """Whether the optimiser has just used all gradients there are.

    Args:
        runner: The runner, in or after `after_train_iter`.

    Returns:
        False between two steps of an optimiser that accumulates gradients over
        iterations, which no checkpoint holds.
    """
    wrapper = runner.optim_wrapper
    several = isinstance(wrapper, OptimWrapperDict)
    return all(
        x.should_update() for x in (wrapper.values() if several else [wrapper])
    )


def save_now(runner) -> str:
    """Save a checkpoint to resume from, from within `after_train_iter`.

    It goes where the run's checkpoint hook saves, as `iter_<iterations done>
    .pth`. To be called by all ranks, which return when it is written.

    Args:
        runner: The runner.

    Returns:
        The file.
    """
    hook = next(
        (x for x in runner.hooks if isinstance(x, CheckpointHook)), None
    )
    name = f'iter_{runner.iter + 1}.pth'
    if hook is None:
        path = osp.join(runner.work_dir, name)
        where: dict = dict(backend_args=dict(backend=BACKEND))
    else:
        path = hook.file_backend.join_path(hook.out_dir, name)
        where = dict(
            backend_args=hook.backend_args,
            file_client_args=hook.file_client_args,
        )
    folder = path[: -len(name)]
    # The iterations are not an epoch's end, whatever the hook counts.
    runner.save_checkpoint(folder, name, by_epoch=False, **where)
    if is_main_process():
        write_safely(osp.join(runner.work_dir, POINTER), path.encode())
        if isinstance(hook, SafeCheckpointHook):
            hook.prune(runner, path)
    # A rank that left earlier would have the launcher end the writer, too.
    barrier()
    return path
