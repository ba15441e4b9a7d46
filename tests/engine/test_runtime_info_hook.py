# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Logs are read once an interval, and say what they said before."""

import pytest
import torch
from mmengine.hooks import Hook, RuntimeInfoHook
from mmengine.logging import HistoryBuffer
from torch.utils._python_dispatch import TorchDispatchMode

from mmdensecl.checkpoint import load_from_local
from mmdensecl.engine import BufferedRuntimeInfoHook
from mmdensecl.engine.hooks.runtime_info_hook import KEPT

LONG = (
    'train_cfg = dict(max_epochs=4)\n'
    'log_processor = dict(window_size=5)\n'
    'default_hooks = dict(logger=dict(interval=2, ignore_last=False))\n'
)


def without_times(lines):
    skip = ('time', 'data_time', 'memory')
    return {
        step: {k: x for k, x in line.items() if k not in skip}
        for step, line in lines.items()
    }


class Reads(TorchDispatchMode):
    """Counts the values that are read from tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 'local_scalar_dense' in str(func)
        return func(*args, **(kwargs or {}))


def history(runner, name='train/loss'):
    return runner.message_hub.log_scalars[name].data[0]


def test_the_same_lines(build, logged, monkeypatch):
    """Names, order and numbers: means over a window, the last of the rest."""
    ours = build(LONG)
    ours.train()
    kinds = [type(x) for x in ours.hooks]
    assert BufferedRuntimeInfoHook in kinds and RuntimeInfoHook not in kinds
    monkeypatch.setattr('mmdensecl.engine.train_loop.protect_run', id)
    for name in ('flush_logs', 'buffer_logs'):
        monkeypatch.setattr(
            f'mmdensecl.engine.hooks.contrast_monitor_hook.{name}', id
        )
    theirs = build(
        f'{LONG}default_hooks["runtime_info"] = dict(type="RuntimeInfoHook")'
    )
    theirs.train()
    old, new = (without_times(logged(x)) for x in (theirs, ours))
    assert len(new) == 8 and new == old
    assert [[*x] for x in new.values()] == [[*x] for x in old.values()]


def test_one_read_an_interval(build):
    """Between two log lines nothing waits for the device.

    What changes in place meanwhile was copied.
    """
    runner, hook = build(), BufferedRuntimeInfoHook()
    hook.length = KEPT
    reads, counter = [], torch.tensor(0)
    for step in range(6):
        outputs = {f'x{i}': torch.tensor(float(step + i)) for i in range(14)}
        outputs['count'] = counter.add_(1)
        with Reads() as mode:
            hook.after_train_iter(Place(runner, step), step, None, outputs)
        reads.append(mode.count)
    # The first step is looked at; the others wait for the 50th.
    assert reads[1:] == [0] * 5
    assert [*history(runner, 'train/x3')] == [3.0]
    hook.flush(runner)
    assert [*history(runner, 'train/x3')] == [3.0, 4, 5, 6, 7, 8]
    assert [*history(runner, 'train/count')] == [1, 2, 3, 4, 5, 6]


class Place:
    """A runner at a step, as far as the hook looks at it."""

    epoch, train_dataloader = 0, range(99)

    def __init__(self, runner, step):
        self.iter, self.message_hub = step, runner.message_hub


def test_checkpoints_do_not_grow(build, logged):
    """Nor does an iteration take longer: histories are as long as needed."""
    build().train()
    runner = build(resume='epoch_1.pth')

    class Old(Hook):
        """What a run of mmengine's hook brings along."""

        priority = 'HIGHEST'

        def after_load_checkpoint(self, runner, checkpoint):
            scalars = checkpoint['message_hub']['log_scalars']
            for name in scalars:
                scalars[name] = HistoryBuffer([1.0] * 5000, [1] * 5000)

    runner.register_hook(Old())
    runner.train()
    saved = load_from_local(build.work_dir / 'epoch_2.pth')['message_hub']
    lengths = {len(x.data[0]) for x in saved['log_scalars'].values()}
    assert lengths == {KEPT}


def test_checkpoints_between_two_lines(build, monkeypatch):
    """They hold what was not logged yet; none comes after a bad loss.

    Though the log line is far: the save looks first.
    """
    runner = build(
        'default_hooks = dict(logger=dict(interval=100), '
        'checkpoint=dict(interval=2, by_epoch=False, max_keep_ckpts=9))\n'
        'train_cfg = dict(max_epochs=1)\n'
        'train_dataloader = dict(batch_size=1)'
    )
    loss = type(runner.model).loss

    def spoilt(self, *args, **kwargs):
        outputs = loss(self, *args, **kwargs)
        if runner.iter >= 4:
            outputs['loss_global'] = outputs['loss_global'] * float('nan')
        return outputs

    monkeypatch.setattr(type(runner.model), 'loss', spoilt)
    with pytest.raises(FloatingPointError, match='epoch 1, iteration 5') as e:
        runner.train()
    assert 'iter_4.pth' in str(e.value) and '.png' in str(e.value)
    assert runner.iter == 5  # the 6th, whose checkpoint was due
    names = sorted(x.name for x in build.work_dir.glob('*.pth'))
    assert names == ['iter_2.pth', 'iter_4.pth']
    hub = load_from_local(build.work_dir / 'iter_2.pth')['message_hub']
    assert len(hub['log_scalars']['train/loss'].data[0]) == 2
