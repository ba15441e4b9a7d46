# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Logs that are read from the device once an interval."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook, LoggerHook, RuntimeInfoHook
from mmengine.logging import HistoryBuffer
from torch import Tensor

from mmdensecl.registry import HOOKS

from ..resume import last_good

# Values that a history keeps at least, for hooks that look back.
KEPT = 100


@dataclass
class _Step:
    """One iteration that has not been logged yet."""

    epoch: int
    iter: int
    images: list[str]
    values: dict[str, Tensor]  # copies, on the device


@HOOKS.register_module()
class BufferedRuntimeInfoHook(RuntimeInfoHook):
    """mmengine's `RuntimeInfoHook`, without a wait in each iteration.

    What the model returns stays on the device until something looks at it: the
    logger, the end of an epoch, a checkpoint, or :func:`flush_logs`. Then all
    of it is read in one transfer. The logged numbers are those of mmengine's
    hook. Each history keeps as many values as the log processor averages, so
    that an iteration and a checkpoint cost the same throughout a run.

    A run whose loss was not finite stops when that is read, with the first bad
    iteration and its images; no checkpoint is written after it.
    """

    def __init__(self) -> None:
        self.steps: list[_Step] = []
        self.started = False
        self.intervals = [50]
        self.length = KEPT

    def before_train(self, runner) -> None:
        """See when logs are written, and how far back they look."""
        super().before_train(runner)
        self.started = False
        self.intervals = [
            x.interval for x in runner.hooks if isinstance(x, LoggerHook)
        ] or [50]
        self.length = _history_length(runner)
        self._limit(runner)

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ) -> None:
        """Keep the outputs; the first ones, and those of an interval, go."""
        if outputs is not None:
            self.steps.append(
                _Step(
                    runner.epoch,
                    runner.iter,
                    _images_of(data_batch),
                    {k: _copy(x) for k, x in outputs.items()},
                )
            )
        if (
            not self.started
            or any(
                self.every_n_inner_iters(batch_idx, n) for n in self.intervals
            )
            or self.end_of_epoch(runner.train_dataloader, batch_idx)
        ):
            self.started = True
            self.flush(runner)

    def before_save_checkpoint(self, runner, checkpoint: dict) -> None:
        """Let the checkpoint hold all histories, or stop before it is one."""
        self.flush(runner)
        checkpoint['message_hub'] = runner.message_hub.state_dict()

    def after_train(self, runner) -> None:
        """Read the rest."""
        self.flush(runner)
        super().after_train(runner)

    def flush(self, runner) -> None:
        """Move what the device holds to the histories.

        Args:
            runner: The runner.

        Raises:
            FloatingPointError: A loss is not finite.
        """
        steps, self.steps = self.steps, []
        rows = _read(steps)
        history: dict[str, list[float]] = defaultdict(list)
        for step, row in zip(steps, rows, strict=True):
            if not math.isfinite(row.get('loss', 0)):
                _stop(runner, step, row)
            for name, value in row.items():
                history[f'train/{name}'].append(value)
        scalars = runner.message_hub.log_scalars
        for name, values in history.items():
            # Of a new name this makes the buffer, and has it saved.
            runner.message_hub.update_scalar(name, values[0])
            kept, counts = scalars[name].data
            kept = np.append(kept, values[1:])[-self.length :]
            counts = np.append(counts, [1] * len(values[1:]))[-self.length :]
            scalars[name] = HistoryBuffer(kept, counts, self.length)
        self._limit(runner)

    def _limit(self, runner) -> None:
        for name, buffer in runner.message_hub.log_scalars.items():
            if name.startswith('train/'):
                buffer.max_length = self.length


def replace_hooks(runner, theirs: type[Hook], ours: type[Hook]) -> list[Any]:
    """Put hooks of ours in the place of mmengine's, with their settings.

    Args:
        runner: Whose hooks change.
        theirs: Type of those that go; a type derived from it stays.
        ours: Type of those that come, built without arguments.

    Returns:
        The new hooks.
    """
    found = []
    for i, hook in enumerate(runner.hooks):
        if type(hook) is theirs:
            new = ours()
            vars(new).update(vars(hook))
            runner.hooks[i] = new
            found.append(new)
    return found


def buffer_logs(runner) -> None:
    """Let a run have a :class:`BufferedRuntimeInfoHook`.

    Args:
        runner: Whose hooks change.
    """
    replace_hooks(runner, RuntimeInfoHook, BufferedRuntimeInfoHook)
    if not any(isinstance(x, BufferedRuntimeInfoHook) for x in runner.hooks):
        runner.register_hook(BufferedRuntimeInfoHook())


def flush_logs(runner) -> None:
    """Bring the histories of a run up to date, to look at them.

    Args:
        runner: The runner.
    """
    for hook in runner.hooks:
        if isinstance(hook, BufferedRuntimeInfoHook):
            hook.flush(runner)


def go_on(runner) -> str:
    """What to do about a run that is not finite any more, for errors."""
    return (
        f'{last_good(runner.work_dir)} Resume from it with --resume and '
        '--cfg-options optim_wrapper.clip_grad.max_norm=10, or train on with '
        'a lower optim_wrapper.optimizer.lr and load_from=CHECKPOINT.'
    )


def _history_length(runner) -> int:
    """As many values as a log line, or a hook, looks back."""
    processor = runner.log_processor
    windows = {
        processor.window_size,
        *(x.get('window_size', 0) for x in processor.custom_cfg),
    }
    if 'global' in windows:
        return runner.max_iters
    if 'epoch' in windows:
        windows = windows - {'epoch'} | {len(runner.train_dataloader)}
    return max(KEPT, *windows)


def _copy(value: Any) -> Tensor:
    """A scalar as it is now, without waiting for it."""
    return torch.as_tensor(value).detach().reshape(()).clone()


def _read(steps: list[_Step]) -> list[dict[str, float]]:
    """Read the values of steps, in one transfer for a device and type."""
    groups: dict[tuple, list[Tensor]] = defaultdict(list)
    for step in steps:
        for x in step.values.values():
            groups[x.device, x.dtype].append(x)
    numbers = {k: iter(torch.stack(x).tolist()) for k, x in groups.items()}
    return [
        {k: next(numbers[x.device, x.dtype]) for k, x in step.values.items()}
        for step in steps
    ]


def _images_of(data_batch: Any, most: int = 4) -> list[str]:
    """The first images of a batch, by their paths."""
    batch = data_batch if isinstance(data_batch, dict) else {}
    return [
        str(sample.img_path)
        for sample in (batch.get('data_samples') or ())[:most]
        if 'img_path' in sample
    ]


def _stop(runner, step: _Step, row: dict[str, float]) -> None:
    values = ', '.join(f'{k}={v:g}' for k, v in row.items() if 'loss' in k)
    raise FloatingPointError(
        f'The loss is not finite at epoch {step.epoch + 1}, iteration '
        f'{step.iter + 1} ({values}). The batch begins with: '
        f'{", ".join(step.images) or "unknown"}. {go_on(runner)}'
    )
