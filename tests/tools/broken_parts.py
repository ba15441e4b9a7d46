# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Faults that a run carries inside, by ``custom_imports``."""

import os
import signal
from pathlib import Path

import torch
from mmcv.transforms import BaseTransform
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, TRANSFORMS


@TRANSFORMS.register_module()
class KillWorker(BaseTransform):
    """SIGKILL to the process that loads its picture number ``after``.

    Only while the file ``flag`` is there, which it takes away. The processes
    leave their numbers beside it.
    """

    def __init__(self, flag, after):
        self.flag = Path(flag)
        self.after = after
        self.count = 0

    def transform(self, results):
        self.count += 1
        Path(f'{self.flag}.{os.getpid()}').touch()
        if self.count == self.after and self.flag.exists():
            self.flag.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return results


class AtIteration(Hook):
    """Does something before iteration ``at``, from 0, on rank ``rank``."""

    def __init__(self, at, rank=0):
        self.at = at
        self.rank = rank

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at and get_rank() == self.rank:
            self.act(runner)


@HOOKS.register_module()
class MoveFile(AtIteration):
    """Renames a file or folder."""

    def __init__(self, source, target, **kwargs):
        super().__init__(**kwargs)
        self.names = source, target

    def act(self, runner):
        os.rename(*self.names)


@HOOKS.register_module()
class Poison(AtIteration):
    """Makes the loss NaN."""

    def act(self, runner):
        next(runner.model.parameters()).data.fill_(torch.nan)


@HOOKS.register_module()
class SignalRank(AtIteration):
    """Sends this process a signal, and leaves its number in a file."""

    def __init__(self, name, file, **kwargs):
        super().__init__(**kwargs)
        self.signal = getattr(signal, name)
        self.file = Path(file)

    def act(self, runner):
        self.file.write_text(str(os.getpid()))
        os.kill(os.getpid(), self.signal)
