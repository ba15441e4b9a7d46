# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Draws of an epoch: each has its own number, and so its own augmentation."""

from collections.abc import Iterator
from contextvars import ContextVar
from itertools import count
from typing import Any

import numpy as np
from mmengine.dataset import ClassBalancedDataset, RepeatDataset
from mmengine.dist import get_dist_info
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
)

# What the dataset behind all wrappers takes its seed from.
current_draw: ContextVar[int | None] = ContextVar('draw', default=None)


class Draw(int):
    """An index with the number of the draw that it is.

    Attributes:
        number: From 0 in each epoch, over all ranks.
    """

    number: int


class NumberedSampler(Sampler):
    """Numbers the draws of a sampler, or of a batch sampler.

    Rank r of R has the draws r, r + R, r + 2 R and so on, as the images that
    mmengine's samplers give it; with those, a draw does not depend on the
    number of ranks.

    Args:
        sampler: Gives indices, or lists of them. Other attributes are its.
    """

    def __init__(self, sampler: Any) -> None:
        self.source = sampler

    def __iter__(self) -> Iterator[Any]:
        numbers = count(*get_dist_info())

        def numbered(index: int) -> Draw:
            draw = Draw(index)
            draw.number = next(numbers)
            return draw

        for item in self.source:
            yield (
                [*map(numbered, item)]
                if isinstance(item, list | tuple)
                else numbered(item)
            )

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        return _attribute_of(self, 'source', name)


class NumberedDataset(Dataset):
    """Tells the dataset inside all wrappers which draw an index is.

    RepeatDataset and its like give it the index of the image alone, which is
    the same for all copies.

    Args:
        dataset: With or without wrappers. Other attributes are its.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, idx: int) -> Any:
        # Of a batch sampler that nobody numbered at least the outer index.
        token = current_draw.set(getattr(idx, 'number', int(idx)))
        try:
            return self.dataset[int(idx)]
        finally:
            current_draw.reset(token)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        return _attribute_of(self, 'dataset', name)


def _attribute_of(owner: Any, inner: str, name: str) -> Any:
    if name.startswith('__') or inner not in vars(owner):  # as in unpickling
        raise AttributeError(name)
    return getattr(vars(owner)[inner], name)


def number_draws(loader: DataLoader) -> None:
    """Let every draw of an epoch have an augmentation of its own.

    To be called before the first epoch. Whatever repeats an index, be it a
    wrapper, a subset or a sampler, the copies differ, and none depends on the
    number of workers.

    Args:
        loader: Of this process, changed in place.
    """
    if isinstance(loader.dataset, NumberedDataset | IterableDataset):
        return
    # A loader refuses to have these set, as its iterators might have them.
    attributes = vars(loader)
    attributes['dataset'] = NumberedDataset(loader.dataset)
    batches: Any = loader.batch_sampler
    if type(batches) is BatchSampler:
        batches.sampler = NumberedSampler(batches.sampler)
    elif batches is not None:
        attributes['batch_sampler'] = NumberedSampler(batches)
    else:
        attributes['sampler'] = NumberedSampler(loader.sampler)


def image_ids(dataset: Any) -> np.ndarray:
    """A number for each index of a dataset, equal for copies of an image.

    Args:
        dataset: With or without wrappers; one that is not known counts as
            images that differ.
    """
    if hasattr(dataset, 'full_init'):
        dataset.full_init()
    if isinstance(dataset, NumberedDataset):
        return image_ids(dataset.dataset)
    if isinstance(dataset, RepeatDataset):
        return np.tile(image_ids(dataset.dataset), dataset.times)
    if isinstance(dataset, ClassBalancedDataset):
        return image_ids(dataset.dataset)[dataset.repeat_indices]
    if isinstance(dataset, Subset):
        return image_ids(dataset.dataset)[np.asarray(dataset.indices, int)]
    if hasattr(dataset, 'datasets'):
        return np.concatenate([*map(image_ids, dataset.datasets)])
    if hasattr(dataset, 'image_ids'):
        return dataset.image_ids
    # Apart from those of other datasets.
    return np.arange(len(dataset)) + ((id(dataset) % 2**31) << 32)


def num_distinct_images(dataset: Any) -> int:
    """How many images a dataset has, whatever repeats them."""
    return len(np.unique(image_ids(dataset)))
