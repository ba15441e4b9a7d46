# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import logging
import math
import random
from contextlib import contextmanager
from itertools import chain, count, islice
from typing import Any, Dict, Iterator, List, Tuple, Union

import numpy as np
import torch
from mmengine.dataset import DefaultSampler
from mmengine.dist import get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import EpochBasedTrainLoop
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from mmdensecl.registry import LOOPS
from .rank_order import fix_order_of_sums

Layout = Dict[str, Union[int, str, List[float], None]]

LAYOUT_NAMES = dict(
    world_size='Processes',
    batch_size='Pictures in a batch of each',
    batches='Iterations in an epoch',
    pictures='Pictures',
    sampler='Sampler')

# What the random numbers are for; each has a stream of its own.
ITERATION, EPOCH_START, EPOCH_END = range(3)


def seed_generators(*entropy: int) -> None:
    """Seed Python's, numpy's and torch's global generators.

    Args:
        *entropy (int): Not negative; any change of any of them gives other
            random numbers.
    """
    seeds = np.random.SeedSequence(entropy).generate_state(3, np.uint64)
    random.seed(int(seeds[0]))
    np.random.seed(int(seeds[1]) >> 32)
    # Not torch.manual_seed: without a GPU it formats the stack each time.
    torch.default_generator.manual_seed(int(seeds[2]) >> 1)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(int(seeds[2]) >> 1)


def sampler_of(loader: DataLoader) -> Sampler:
    """The sampler that a loader's batches come from."""
    return getattr(loader.batch_sampler, 'sampler', loader.sampler)


def describe_loader(loader: DataLoader) -> Layout:
    """What the pictures of the n-th batch of an epoch depend on.

    Args:
        loader (DataLoader): Of this process.

    Returns:
        dict: Plain numbers and strings, for a checkpoint.
    """
    sampler = sampler_of(loader)
    return dict(
        pictures=len(loader.dataset),
        batches=len(loader),
        batch_size=getattr(loader.batch_sampler, 'batch_size', None),
        world_size=get_world_size(),
        sampler=type(sampler).__name__,
        sampler_seed=getattr(sampler, 'seed', None))


def find_place(done: int, saved: Layout, now: Layout) -> int:
    """Where an epoch goes on that another layout of batches began.

    No picture is left out, and less than a batch comes twice.

    Args:
        done (int): Batches that were trained on.
        saved (dict): Their layout, of :func:`describe_loader`.
        now (dict): The layout to go on with.

    Returns:
        int: Batches to skip; 0 where the places of the two do not
        correspond.
    """
    if done == saved['batches']:
        return now['batches']
    if any(saved[key] != now[key] for key in ('pictures', 'sampler')):
        return 0
    sizes = [(layout['batch_size'], layout['world_size'])
             for layout in (saved, now)]
    if sizes[0] == sizes[1]:
        return done
    # DefaultSampler deals an epoch's pictures out in turn, so the first
    # batches of all ranks are its first pictures. Others give each rank a part
    # of its own.
    same_ranks = saved['world_size'] == now['world_size']
    dealt = now['sampler'] == DefaultSampler.__name__
    if not (same_ranks or dealt) or None in sizes[0] + sizes[1]:
        return 0
    (old_batch, old_ranks), (new_batch, new_ranks) = sizes
    place = done * old_batch * old_ranks // (new_batch * new_ranks)
    return min(place, now['batches'])


def flat(parts: Union[list, Dict[str, list], None]) -> list:
    """One list, where a run of several optimisers has a dict of lists."""
    if isinstance(parts, dict):
        return list(chain.from_iterable(parts.values()))
    return parts or []


def find_factor(saved: List[float], now: List[float]) -> float:
    """By what the learning rates of a run are to be multiplied.

    Args:
        saved (List[float]): Those that its config asked for, of each group of
            parameters.
        now (List[float]): Those that it asks for now.

    Returns:
        float: 1 where it is not the same for all groups.
    """
    if len(saved) != len(now) or not all(saved):
        return 1.
    factors = [new / old for old, new in zip(saved, now)]
    same = all(math.isclose(x, factors[0]) for x in factors)
    return factors[0] if factors and same else 1.


class _AskedRates(Hook):
    """Notes the learning rates of a config, before a checkpoint's come."""

    def __init__(self) -> None:
        self.rates: List[float] = []

    def before_run(self, runner) -> None:
        # A warmup has begun already; the schedulers note from where.
        self.rates = [
            float(group.get('initial_lr', group['lr']))
            for group in flat(runner.optim_wrapper.param_groups)
        ]


class _Tail(Sampler):
    """A sampler without its first indices; as long as the whole of it."""

    def __init__(self, sampler: Sampler, start: int) -> None:
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
        loader (DataLoader): Whose iterator is made and used inside.
        batches (int): To leave out.

    Yields:
        int: Batches that remain to be drawn and thrown away, as nothing is
        known of the loader's own way to make batches.
    """
    batch_sampler = loader.batch_sampler
    # Torch forbids to change a loader's samplers, but not a sampler's own.
    if (type(batch_sampler) is not BatchSampler
            or isinstance(loader.dataset, IterableDataset)):
        yield batches
        return
    whole = batch_sampler.sampler
    batch_sampler.sampler = _Tail(whole, batches * batch_sampler.batch_size)
    try:
        yield 0
    finally:
        batch_sampler.sampler = whole


@LOOPS.register_module()
class ExactEpochLoop(EpochBasedTrainLoop):
    """Trains by epochs such that a resumed run repeats the uninterrupted one.

    It does what mmengine's loop does, and two things more.

    The global generators of Python, numpy and torch are seeded before each
    iteration, and at both ends of an epoch, from the run's seed, the rank and
    the iteration or epoch. So there is no state of theirs to save. What draws
    in worker processes must take its seed from the picture, as the data sets
    and transforms of this package do.

    A run that is resumed from a checkpoint in the middle of an epoch goes on
    behind the last batch, without reading those before. On another number of
    processes, or with another batch size, it goes on behind the last picture,
    or, where the sampler does not allow that, at the epoch's start, and says
    what changes. The learning rate follows the config: where that asks for
    another one than the run began with, itself or by ``auto_scale_lr`` for
    another batch, the rest of the schedule is multiplied by the quotient.

    Args:
        runner (Runner): The runner.
        dataloader (DataLoader | dict): Of the training pictures.
        **kwargs: Other arguments of
            :class:`mmengine.runner.EpochBasedTrainLoop`, ``max_epochs`` among
            them.
    """

    # Of the message hub, which is saved, and loaded by a resume only.
    LAYOUT = 'loader_layout'

    def __init__(self, runner, dataloader: Union[DataLoader, dict],
                 **kwargs) -> None:
        super().__init__(runner, dataloader, **kwargs)
        self._skip = 0
        self._asked = _AskedRates()
        runner.register_hook(self._asked)

    def run(self) -> torch.nn.Module:
        """Train to the end, from where the runner has resumed."""
        hub = self.runner.message_hub
        now = dict(
            describe_loader(self.dataloader), learning_rates=self._asked.rates)
        if self._iter:
            self._go_on({**now, **hub.runtime_info.get(self.LAYOUT, {})}, now)
        hub.update_info(self.LAYOUT, now)
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

    def _go_on(self, saved: Layout, now: Layout) -> None:
        """Find the place in the epoch; make ``now`` what it goes on with."""
        if saved['sampler_seed'] is not None:
            # It was drawn, or set, before the checkpoint was read.
            sampler_of(self.dataloader).seed = saved['sampler_seed']
            now['sampler_seed'] = saved['sampler_seed']
        done = self._iter - self._epoch * saved['batches']
        if not 0 <= done <= saved['batches']:
            # Of a run that mmengine's loop took up in the middle of an epoch.
            print_log(
                f'Iteration {self._iter} of the checkpoint does not lie in '
                f'its epoch {self._epoch + 1} of {saved["batches"]} '
                'iterations: the epoch starts again',
                logger='current',
                level=logging.WARNING)
            done = 0
        self._skip = done if saved == now else find_place(done, saved, now)
        if self._skip:
            print_log(
                f'Epoch {self._epoch + 1} goes on behind iteration '
                f'{self._skip} of {now["batches"]}',
                logger='current')
        before = self._iter
        self._iter = self._epoch * now['batches'] + self._skip
        if saved != now:
            self._change_layout(saved, now, done, before)

    def _change_layout(self, saved: Layout, now: Layout, done: int,
                       iterations: int) -> None:
        """Fit what depends on the size of a batch, and say what changes."""
        runner = self.runner
        runner.optim_wrapper.initialize_count_status(runner.model, self._iter,
                                                     self._max_iters)
        seen, kept = (
            layout['world_size'] * (layout['batch_size'] or 0)
            for layout in (saved, now))
        news = [
            f'{name}: {now[key]}, was {saved[key]}.'
            for key, name in LAYOUT_NAMES.items() if saved[key] != now[key]
        ]
        if self._iter != iterations:
            news.append(f'Iterations done: {self._iter}, was {iterations}.')
        if 0 < done < saved['batches']:
            news.append(
                f'Of the epoch {done * seen} pictures were seen, the last '
                f'{done * seen - self._skip * kept} of them come again.'
                if self._skip else
                'The epoch starts again, as no place of the new one matches.')
        news.append(
            self._follow_lr(saved, now, kept / seen if seen and kept else 1.))
        schedules = [
            type(scheduler).__name__
            for scheduler in flat(runner.param_schedulers)
            if not scheduler.by_epoch
        ]
        if schedules and saved['batches'] != now['batches']:
            news.append(f'{" and ".join(schedules)} counts iterations and '
                        'keeps the old number of them.')
        news.append('Weights, queues and optimiser go on as they were saved.')
        if (seen, saved['world_size']) != (kept, now['world_size']):
            news.append('Random numbers of the ranks differ.')
        print_log(
            'The run goes on, but not as it would have without the break. ' +
            ' '.join(news),
            logger='current',
            level=logging.WARNING)

    def _follow_lr(self, saved: Layout, now: Layout, batch: float) -> str:
        """Let the learning rate follow the config; ``batch``: times as large.

        The optimiser and the schedulers have been loaded since mmengine set
        and scaled what the config says.
        """
        runner = self.runner
        scales = (runner.auto_scale_lr or {}).get('enable')
        factor = find_factor(saved['learning_rates'], now['learning_rates'])
        if factor == 1:
            if batch == 1:
                return 'The learning rate stays, as the global batch does.'
            hint = '' if scales else '; --auto-scale-lr would scale it'
            return ('The learning rate stays although the global batch is '
                    f'{batch:g} times as large{hint}.')
        for group in flat(runner.optim_wrapper.param_groups):
            for key in {'lr', 'initial_lr'} & group.keys():
                group[key] *= factor
        for scheduler in flat(runner.param_schedulers):
            if scheduler.param_name == 'lr':
                scheduler.base_values = [
                    factor * value for value in scheduler.base_values
                ]
        return (f'The learning rate is {factor:g} times the old one, as the '
                'config asks.')

    def _seed(self, purpose: int, number: int) -> None:
        seed_generators(self.runner.seed, get_rank(), purpose, number)

    def _batches(self, skip: int) -> Iterator[Tuple[int, Any]]:
        """The epoch's batches from number ``skip`` on, with their numbers."""
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
