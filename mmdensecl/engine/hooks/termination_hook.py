# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Save and leave at a signal."""

import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from mmengine.dist import all_reduce, get_backend, get_world_size
from mmengine.hooks import Hook

from mmdensecl.registry import HOOKS

from .checkpoint_hook import follows_update, save_now


def obey_parent_only(
    signals: Sequence[int], init: Callable | None, worker_id: int
) -> None:
    """Let a loader's worker live as long as the process that it works for.

    Slurm and torchrun send a signal to all processes of a job, and a run whose
    workers are gone cannot end its iteration. So a worker heeds SIGTERM only
    from its parent, as before, and the other signals not at all; without a
    parent it ends by itself within seconds.

    Args:
        signals: Which the parent handles.
        init: The loader's own `worker_init_fn`.
        worker_id: Number of the worker.
    """
    for signum in signals:
        if signum != signal.SIGTERM:
            signal.signal(signum, signal.SIG_IGN)
    # A handler in Python is not told who sent a signal; this call is.
    if signal.SIGTERM in signals and hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_wait_for_parent, daemon=True).start()
    if init is not None:
        init(worker_id)


def _wait_for_parent() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


@HOOKS.register_module()
class TerminationHook(Hook):
    """Save and leave when the user or the system asks the run to end.

    At one of `signals` to any of the processes, all of them finish the
    current iteration, with NCCL at most `interval` more, and where gradients
    are accumulated those up to the optimiser's step, write a checkpoint
    `iter_{n}.pth` in the middle of the epoch, and exit with the status 128
    plus the signal's number. `--resume` then resumes after that iteration.
    In a validation, or while a hook measures, the signal waits for the next
    iteration. The same signal again, a second Ctrl-C, kills at once.

    Slurm warns ahead of its time limit by `#SBATCH --signal=USR1@120`.

    Args:
        signals: Their names.
        interval: Iterations from one time that the ranks ask each other to the
            next. Defaults to None: 10 with NCCL, where the answer keeps the
            GPU waiting, and 1 else.
        patience: Seconds within which the same signal counts once, as a
            launcher and its ranks may both pass one on. A Ctrl-C in a run of
            one process comes from a hand, and each counts.

    Raises:
        ValueError: There is no such signal, or `interval` is less than 1.
    """

    # After CheckpointHook (VERY_LOW): whatever belongs to the iteration is
    # done.
    priority = 'LOWEST'

    def __init__(
        self,
        signals: Sequence[str] = ('SIGINT', 'SIGTERM', 'SIGUSR1'),
        interval: int | None = None,
        patience: float = 3.0,
    ) -> None:
        if interval is not None and interval < 1:
            raise ValueError(f'interval must be at least 1, got {interval}')
        # Windows lacks some; there, names are not checked.
        unknown = [x for x in signals if not hasattr(signal, x)]
        if unknown and os.name == 'posix':
            raise ValueError(f'There are no signals {unknown}')
        self.signals = [
            getattr(signal, x) for x in signals if x not in unknown
        ]
        self.interval = interval
        self.patience = patience
        self.received = 0
        self.agreed = 0  # a signal that any of the ranks has received
        self.since = 0.0
        self.pid = -1
        self.replaced: dict[int, Any] = {}

    def before_train(self, runner) -> None:
        """Handle the signals from now on, and shield the loaders' workers."""
        if self.interval is None:
            self.interval = 10 if get_backend() == 'nccl' else 1
        if threading.current_thread() is not threading.main_thread():
            runner.logger.warning(
                'TerminationHook: Python handles signals in the main thread '
                'only, and the run is in another; a signal kills it unsaved'
            )
            return
        for loop in (runner.train_loop, runner.val_loop):
            if loop is not None:
                loader = loop.dataloader
                loader.worker_init_fn = partial(
                    obey_parent_only, self.signals, loader.worker_init_fn
                )
        self.pid = os.getpid()
        self.replaced = {
            signum: signal.signal(signum, self._receive)
            for signum in self.signals
            # A shell's background job is not to hear of a Ctrl-C.
            if signum != signal.SIGINT
            or signal.getsignal(signum) is not signal.SIG_IGN
        }

    def after_train(self, runner) -> None:
        """Give the signals back."""
        for signum, handler in self.replaced.items():
            signal.signal(signum, handler)
        self.replaced = {}

    def _receive(self, signum: int, frame) -> None:
        by_hand = signum == signal.SIGINT and get_world_size() == 1
        patience = 0 if by_hand else self.patience
        again = (
            signum == self.received
            and time.monotonic() > self.since + patience
        )
        # Forked processes of others inherit the handler, but not the loop.
        if again or os.getpid() != self.pid:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        if not self.received:
            self.received, self.since = signum, time.monotonic()
            if signum == signal.SIGINT:  # not by print: it may be printing
                os.write(2, b'\nSaving after this iteration; Ctrl-C aborts\n')

    def after_train_iter(
        self, runner, batch_idx, data_batch=None, outputs=None
    ) -> None:
        """Leave, if any rank was asked to.

        Raises:
            SystemExit: After the checkpoint was written.
        """
        if not self.agreed and self.every_n_train_iters(runner, self.interval):
            received = torch.tensor(self.received)
            if get_world_size() > 1:
                all_reduce(received, op='max')
            self.agreed = int(received)
        if self.agreed and follows_update(runner):
            self._leave(runner, self.agreed)

    def _leave(self, runner, signum: int) -> None:
        name = signal.Signals(signum).name
        runner.logger.info(f'{name}: saving after iteration {runner.iter + 1}')
        start = time.monotonic()
        path = save_now(runner)
        end = time.monotonic()
        late = f', {end - self.since:.1f} s after it' if self.received else ''
        runner.logger.warning(
            f'{name}: the run stops after iteration {runner.iter + 1} of '
            f'{runner.max_iters}. {path} was written in {end - start:.1f} s'
            f'{late}. Go on with --resume'
        )
        self.after_train(runner)
        raise SystemExit(128 + signum)
