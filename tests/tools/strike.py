# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A hook that signals the run it belongs to, by ``custom_imports``."""

import multiprocessing
import os
import signal
import subprocess
import time

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Strike(Hook):
    """In iteration ``at``, as if another process had sent it."""

    priority = 'NORMAL'

    def __init__(self, at, name, rank=None, workers=False, wait=0):
        self.at = at
        self.signal = getattr(signal, name)
        self.rank = rank
        self.workers = workers
        self.wait = wait

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ):
        if runner.iter + 1 != self.at or self.rank not in (None, get_rank()):
            return
        pids = [os.getpid()]
        if self.workers:
            pids += [x.pid for x in multiprocessing.active_children()]
            assert len(pids) > 1
            print('struck', *pids, flush=True)
        time.sleep(self.wait)
        subprocess.run(['kill', f'-{self.signal:d}', *map(str, pids)])
