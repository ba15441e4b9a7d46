# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A training loop that resumes in the middle of an epoch."""

import logging
import random
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import DataLoader

from mmdensecl.registry import LOOPS

from .loader import (
    describe_loader,
    drop_worker_options,
    sampler_of,
    skip_batches,
)
from .protection import protect_run
from .rank_order import fix_order_of_sums

# What the random numbers are for; each has a stream of its own.
ITERATION, EPOCH_START, EPOCH_END = range(3)


def seed_generators(*entropy: int) -> None:
    """Seed Python's, numpy's and torch's global generators.

    Args:
        *entropy: Not negative; any change of any of them gives other random
            numbers.
    """
    seeds = np.random.SeedSequence(entropy).generate_state(3, np.uint64)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]) >> 32)
    # Not torch.manual_seed: without a GPU it formats the stack each time.
    torch.default_generator.manual_seed(int(seeds[2]) >> 1)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(int(seeds[2]) >> 1)


@LOOPS.register_module(name=['ResumableEpochLoop', 'ExactEpochLoop'])
class ResumableEpochLoop(EpochBasedTrainLoop):
    """Trains by epochs; resumes mid-epoch.

    On the CPU a resumed run is bitwise identical to an uninterrupted one. The
    global generators of Python, numpy and torch are seeded before each
    iteration, and at both ends of an epoch, from the run's seed, the rank and
    the iteration or epoch, so there is no state of theirs to save. What draws
    in worker processes must take its seed from the image, as the datasets and
    transforms of this package do.

    A run that is resumed from a checkpoint in the middle of an epoch continues
    after the last batch, without reading those before. With another dataloader
    layout (number of processes, images or batches) the epoch starts again,
    with a warning. Learning rate and schedule are the config's, see
    :class:`FollowConfigHook`.

    The hooks that this rests on are added where a config lacks them, see
    :func:`mmdensecl.engine.protection.protect_run`.

    Args:
        runner: The runner.
        dataloader: Of the training images.
        **kwargs: Other arguments of
            :class:`mmengine.runner.EpochBasedTrainLoop`, `max_epochs` among
            them.
    """

    # Of the message hub, which is saved, and loaded by a resume only.
    LAYOUT = 'loader_layout'

    def __init__(
        self, runner, dataloader: DataLoader | dict, **kwargs
    ) -> None:
        protect_run(runner)
        drop_worker_options(dataloader)
        super().__init__(runner, dataloader, **kwargs)
        self._iter: int
        self._skip = 0

    def run(self) -> torch.nn.Module:
        """Train to the end, from where the runner has resumed."""
        hub = self.runner.message_hub
        if self._iter:
            self._resume(hub.runtime_info.get(self.LAYOUT, {}))
        hub.update_info(self.LAYOUT, describe_loader(self.dataloader))
        if self.runner.deterministic:
            fix_order_of_sums(self.runner.model)
        return super().run()

    def run_epoch(self) -> None:
        """Train for one epoch, or for what is left of it."""
        self._seed(EPOCH_START, self._epoch)
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        skip, self._skip = self._skip, 0
        # After a stop at the last batch there is none left, and only the hooks
        # of the epoch's end remain to be called.
        for idx, data_batch in self._batches(skip):
            self.run_iter(idx, data_batch)
        self._seed(EPOCH_END, self._epoch)
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def _resume(self, saved: dict) -> None:
        """Find the position in the epoch.

        Args:
            saved: The layout of the dataloader as the checkpoint has it; what
                it lacks is taken to be unchanged.
        """
        if saved.get('sampler_seed') is not None:
            # It was drawn, or set, before the checkpoint was read.
            sampler_of(self.dataloader).seed = saved['sampler_seed']
        now = describe_loader(self.dataloader)
        saved = {**now, **saved}
        changes = [
            f'{key}: {now[key]}, was {saved[key]}'
            for key in now
            if now[key] != saved[key]
        ]
        done = self._iter - self._epoch * saved['batches']
        # Else it is of a run that mmengine's loop resumed within an epoch.
        fits = 0 <= done <= saved['batches']
        if fits and done == saved['batches']:
            self._skip = now['batches']
        elif fits and not changes:
            self._skip = done
        elif done:
            changes.append(f'epoch {self._epoch + 1} starts again')
        if self._skip:
            print_log(
                f'Epoch {self._epoch + 1} resumes after iteration '
                f'{self._skip} of {now["batches"]}',
                logger='current',
            )
        if changes:
            print_log(
                'The run resumes, but not as it would have gone on without '
                f'the break ({"; ".join(changes)}). Weights, queues and the '
                "optimiser's state are those of the checkpoint.",
                logger='current',
                level=logging.WARNING,
            )
            self._iter = self._epoch * now['batches'] + self._skip
            self.runner.optim_wrapper.initialize_count_status(
                self.runner.model, self._iter, self._max_iters
            )

    def _seed(self, purpose: int, number: int) -> None:
        seed_generators(self.runner.seed, get_rank(), purpose, number)

    def _batches(self, skip: int) -> Iterator[tuple[int, Any]]:
        """The epoch's batches from number `skip` on, with their numbers."""
        with skip_batches(self.dataloader, skip) as to_drop:
            iterator = iter(self.dataloader)
            for idx in count(skip - to_drop):
                # Also what is drawn to read a batch in this process is known.
                self._seed(ITERATION, self._iter)
                try:
                    data_batch = next(iterator)
                except StopIteration:
                    return
                if idx >= skip:
                    yield idx, data_batch
