# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What a data loader's batches consist of."""

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from itertools import islice
from typing import Any, cast

from mmengine.dist import get_world_size
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from mmdensecl.datasets.unlabeled import unlabeled_parts


def sampler_of(loader: DataLoader) -> Any:
    """The sampler that a loader's batches come from."""
    return getattr(loader.batch_sampler, 'sampler', loader.sampler)


def batch_size_of(loader: DataLoader) -> int:
    """Images in a batch of one process; their mean where sizes differ."""
    size = getattr(loader.batch_sampler, 'batch_size', loader.batch_size)
    if size:
        return size
    return max(1, len(sampler_of(loader)) // len(loader))


def describe_loader(loader: DataLoader) -> dict[str, Any]:
    """What the images of the n-th batch of an epoch depend on.

    Args:
        loader: Of this process.

    Returns:
        Plain numbers and strings, for a checkpoint.
    """
    sampler = sampler_of(loader)
    parts = unlabeled_parts(loader.dataset)
    return dict(
        images=len(cast(Sized, loader.dataset)),
        image_names=' '.join(x.fingerprint for x in parts),
        batches=len(loader),
        batch_size=getattr(loader.batch_sampler, 'batch_size', None),
        world_size=get_world_size(),
        sampler=type(sampler).__name__,
        sampler_seed=getattr(sampler, 'seed', None),
    )


def drop_worker_options(loader: Any) -> None:
    """Take out of a loader's config what torch refuses without workers.

    Args:
        loader: Changed in place.
    """
    if isinstance(loader, dict) and loader.get('num_workers') == 0:
        for name in (
            'persistent_workers',
            'prefetch_factor',
            'multiprocessing_context',
        ):
            loader.pop(name, None)


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
