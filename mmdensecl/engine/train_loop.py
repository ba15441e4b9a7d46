# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A training loop that resumes in the middle of an epoch."""

import logging
import random
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from itertools import count, islice
from typing import Any, cast

import numpy as np
import torch
from mmengine.dist import get_rank, get_world_size
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from mmdensecl.registry import LOOPS

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


def sampler_of(loader: DataLoader) -> Any:
    """The sampler that a loader's batches come from."""
    return getattr(loader.batch_sampler, 'sampler', loader.sampler)


def describe_loader(loader: DataLoader) -> dict[str, Any]:
    """What the images of the n-th batch of an epoch depend on.

    Args:
        loader: Of this process.

    Returns:
        Plain numbers and strings, for a checkpoint.
    """
    sampler = sampler_of(loader)
    return dict(
        images=len(cast(Sized, loader.dataset)),
        batches=len(loader),
        batch_size=getattr(loader.batch_sampler, 'batch_size', None),
        world_size=get_world_size(),
        sampler=type(sampler).__name__,
        sampler_seed=getattr(sampler, 'seed', None),
    )


class _Tail(Sampler):
    """A sampler without its first indices; as long as the whole of it."""

    def __init__(self, sampler: Any, start: int) -> None:
        self.sampler = sampler
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return islice(self.sampler, self.start, None)

    def __len__(self) -> int:
        return len(self.sampler)


@contextmanager
def skip_batches(loader: DataLoader, batches: int) -> Iterator[int]:
    """Let a loader leave out the start of an epoch without reading it.

    Args:
        loader: Whose iterator is made and used inside.
        batches: To leave out.

    Yields:
        Batches that remain to be drawn and thrown away, as nothing is known of
        the loader's own way to make batches.
    """
    batch_sampler = loader.batch_sampler
    # Torch forbids to change a loader's samplers, but not a sampler's own.
    if type(batch_sampler) is not BatchSampler or isinstance(
        loader.dataset, IterableDataset
    ):
        yield batches
        return
    whole = batch_sampler.sampler
    batch_sampler.sampler = _Tail(whole, batches * batch_sampler.batch_size)
    try:
        yield 0
    finally:
        batch_sampler.sampler = whole


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
    with a warning. The learning rate is the checkpoint's.

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
                f'the break ({"; ".join(changes)}). Weights, queues, '
                'optimiser and learning rate are those of the checkpoint.',
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
