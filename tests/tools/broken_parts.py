# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Faults that a run carries inside, by ``custom_imports``."""

import multiprocessing
import os
import signal
import subprocess
import time
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


class AfterIteration(Hook):
    """Acts once ``at`` iterations are done, on one rank or on all."""

    priority = 'NORMAL'

    def __init__(self, at, rank=None):
        self.at = at
        self.rank = rank

    def after_train_iter(self, runner, *args, **kwargs):
        if runner.iter + 1 == self.at and self.rank in (None, get_rank()):
            self.act(runner)


@HOOKS.register_module()
class MoveFile(AfterIteration):
    """Renames a file or folder."""

    def __init__(self, source, target, **kwargs):
        super().__init__(**kwargs)
        self.names = source, target

    def act(self, runner):
        os.rename(*self.names)


@HOOKS.register_module()
class Poison(AfterIteration):
    """Makes the next loss NaN."""

    def act(self, runner):
        next(runner.model.parameters()).data.fill_(torch.nan)


@HOOKS.register_module()
class Strike(AfterIteration):
    """A signal to this process, as if another had sent it.

    And to its ``workers`` or, before it, to its ``parent``. The number of the
    process is left in ``file``; what is there already prevents the strike.
    """

    def __init__(
        self, name, workers=False, parent=False, wait=0, file=None, **kwargs
    ):
        super().__init__(**kwargs)
        self.signal = getattr(signal, name)
        self.workers = workers
        self.parent = parent
        self.wait = wait
        self.file = file

    def act(self, runner):
        pids = [os.getpid()]
        if self.workers:
            pids += [x.pid for x in multiprocessing.active_children()]
            assert len(pids) > 1
            print('struck', *pids, flush=True)
        if self.parent:
            pids.insert(0, os.getppid())
        if self.file:
            if Path(self.file).exists():
                return
            Path(self.file).write_text(str(os.getpid()))
        time.sleep(self.wait)
        subprocess.run(['kill', f'-{self.signal:d}', *map(str, pids)])
