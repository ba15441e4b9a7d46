# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What a run is promised, whatever lists of hooks its config has."""

import logging

from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper

from .config import check_pre_training
from .hooks.accumulation_hook import AccumulationHook
from .hooks.checkpoint_hook import SafeCheckpointHook
from .hooks.checkpoint_keys_hook import CheckpointKeysHook
from .hooks.contrast_monitor_hook import ContrastMonitorHook
from .hooks.follow_config_hook import FollowConfigHook
from .hooks.queue_length_hook import QueueLengthHook
from .hooks.runtime_info_hook import buffer_logs, replace_hooks
from .hooks.termination_hook import TerminationHook
from .hooks.unlabeled_data_hook import UnlabeledDataHook

# In the lists of configs/_base_/default_runtime.py, and in no config.
LISTED: tuple[type[Hook], ...] = (
    UnlabeledDataHook,
    QueueLengthHook,
    ContrastMonitorHook,
    TerminationHook,
)
IMPLIED: tuple[type[Hook], ...] = (CheckpointKeysHook, FollowConfigHook)


def protect_run(runner, whole: bool = True) -> None:
    """Add the hooks that the promises rest on, and check the config.

    A config that sets `custom_hooks` replaces those of its base. Resuming, the
    limits for unreadable images, atomic checkpoints and the stop at a loss
    that is not finite must not end with that. :class:`ResumableEpochLoop`
    calls this, so it holds for any script that trains with it, and
    tools/train.py does for other loops. A second call changes nothing.

    Args:
        runner: Before its hooks are called.
        whole: Whether it is a pre-training; else only its resuming is checked.

    Raises:
        ValueError: The config asks for what a pre-training cannot do.
    """
    if is_pre_training(runner):
        check_pre_training(runner.cfg)
    count_accumulated(runner)
    wanted = [*IMPLIED]
    if whole:
        buffer_logs(runner)
        for hook in replace_hooks(runner, CheckpointHook, SafeCheckpointHook):
            hook.take_over()
        wanted += LISTED
        if accumulative_counts(runner) > 1:
            wanted.append(AccumulationHook)
        # Of this run: not by update_info, which would have it saved.
        runner.message_hub.runtime_info['protected'] = True
    missing = [
        kind
        for kind in wanted
        if not any(isinstance(x, kind) for x in runner.hooks)
    ]
    for kind in missing:
        runner.register_hook(kind())
    names = [kind.__name__ for kind in missing if kind in LISTED]
    if names:
        print_log(
            f'Added to the hooks of the config: {", ".join(names)}. Resuming, '
            'limits for unreadable images and the stop at a loss that is not '
            'finite rest on them.',
            logger='current',
        )


def is_pre_training(runner) -> bool:
    """Whether a run trains a method that has no predictions to validate."""
    # Imported here: it takes seconds, and most tools do without.
    from mmpretrain.models import BaseSelfSupervisor

    model = runner.model
    model = model.module if is_model_wrapper(model) else model
    return (
        isinstance(model, BaseSelfSupervisor)
        and type(model).forward is BaseSelfSupervisor.forward
    )


def accumulative_counts(runner) -> int:
    """Iterations to a step of the optimiser, by the config."""
    wrapper = runner.optim_wrapper
    return (
        isinstance(wrapper, dict) and wrapper.get('accumulative_counts') or 1
    )


def count_accumulated(runner) -> None:
    """Let `--auto-scale-lr` see the images of a step, not of an iteration.

    mmengine compares the images of an iteration with `base_batch_size`.

    Args:
        runner: Before it builds its optimiser.
    """
    auto = runner.auto_scale_lr or {}
    counts = accumulative_counts(runner)
    if counts == 1 or not auto.get('enable') or 'counted' in auto:
        return
    base = auto['base_batch_size']
    runner.auto_scale_lr = {
        **auto,
        'base_batch_size': base / counts,
        'counted': counts,
    }
    print_log(
        f'--auto-scale-lr: the optimiser steps once in {counts} iterations '
        f'(accumulative_counts), so the batch of one iteration is compared '
        f'with {base} / {counts} = {base / counts:g}',
        logger='current',
        level=logging.INFO,
    )
