# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A sampler for shards."""

from collections.abc import Iterator, Sized

import numpy as np
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from mmdensecl.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class ShardSampler(Sampler):
    """Shuffles such that a slow disk is read nearly in order.

    An epoch lines up the shards in a random order and cuts the line into one
    equal part for each rank. A rank takes the shards of its part, `window` at
    a time, and shuffles the images of these. So it reads from few shards at
    once, which the system can keep in memory, and no two ranks share more than
    one. Each image comes once an epoch, and as many of its start again as it
    takes for all ranks to get as many.

    Batches are mixed less than by `DefaultSampler`: where neighbours in a
    shard are alike, shuffle when writing the shards (`folder_to_shards.py
    --shuffle`).

    Args:
        dataset: With `shard_sizes`, as
            :class:`mmdensecl.datasets.UnlabeledShards`.
        window: Shards that are mixed.
        seed: The same on all ranks, by default one that rank 0 draws.
        shuffle: As configs give it to `DefaultSampler`, whose type alone is
            then changed. Shards are always shuffled.

    Raises:
        TypeError: The dataset has no shards.
        ValueError: `window` is less than 1, or `shuffle` is false.
    """

    def __init__(
        self,
        dataset: Sized,
        window: int = 8,
        seed: int | None = None,
        shuffle: bool = True,
    ) -> None:
        if window < 1:
            raise ValueError(f'window must be at least 1, got {window}')
        if not shuffle:
            raise ValueError(
                'ShardSampler always shuffles, got shuffle=False. Take '
                "sampler=dict(type='DefaultSampler', shuffle=False)"
            )
        sizes = getattr(dataset, 'shard_sizes', None)
        if sizes is None:
            raise TypeError(
                'ShardSampler needs a dataset with shard_sizes, such as '
                f'mmdensecl.UnlabeledShards, got {type(dataset).__name__}. '
                "Take sampler=dict(type='DefaultSampler', shuffle=True)"
            )
        self.sizes = np.asarray(sizes)
        self.window = window
        self.seed = sync_random_seed() if seed is None else seed
        self.epoch = 0
        self.rank, self.world_size = get_dist_info()
        total = int(self.sizes.sum())
        total += -total % self.world_size  # images of the start come again
        # This rank's part of the line of all images.
        self.start, self.end = (
            total * rank // self.world_size
            for rank in (self.rank, self.rank + 1)
        )

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        pieces = self._pieces()
        # A trailing 0 would give the generator that orders the shards.
        rng = np.random.default_rng((self.seed, self.epoch, self.rank + 1))
        for first in range(0, len(pieces), self.window):
            mixed = np.concatenate(
                [np.arange(*x) for x in pieces[first : first + self.window]]
            )
            rng.shuffle(mixed)
            yield from mixed.tolist()

    def set_epoch(self, epoch: int) -> None:
        """Shuffle in another way.

        Args:
            epoch: Index of the epoch, from 0.
        """
        self.epoch = epoch

    def _pieces(self) -> list[tuple[int, int]]:
        """First image, and end, of what each shard has for this rank.

        Not the indices, which are 8 GB of a billion images.
        """
        order = np.arange(len(self.sizes))
        np.random.default_rng((self.seed, self.epoch)).shuffle(order)
        firsts = np.cumsum(self.sizes) - self.sizes
        pieces, position = [], 0
        while position < self.end:  # round and round again, to round up
            for shard in order:
                # What of [start, end) lies in this shard.
                low = max(self.start - position, 0)
                high = min(self.end - position, self.sizes[shard])
                if low < high:
                    pieces.append((firsts[shard] + low, firsts[shard] + high))
                position += self.sizes[shard]
        return pieces
