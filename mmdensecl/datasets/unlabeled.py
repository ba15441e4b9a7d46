# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Images without labels: seeds, replacements for broken ones, limits."""

import errno
import logging
import os
import stat
import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from mmengine.dataset import BaseDataset
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.logging import print_log
from PIL import features

from .draws import current_draw

IMG_EXTENSIONS = (
    *('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.bmp', '.webp', '.gif'),
    *('.ppm', '.pgm', '.tif', '.tiff'),
    *(('.avif',) if features.check('avif') else ()),
)

# Of an image's file: 179 million pixels, PIL's limit, of 4 x 16 bits are
# 1.4 GB. All of a file is read into the memory.
MAX_BYTES = 2**31
# What says something of the file and not of the disk: asked again, it would
# say the same. Errors without a number are a decoder's.
LASTING = (
    None,
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
)
PAUSES = (1, 2, 4)  # seconds before a disk is asked again


class UnreadableImageError(Exception):
    """A file that holds no whole image."""


def read_file(path: str | os.PathLike, size: int = -1) -> bytes:
    """Read an image's file.

    Args:
        path: The file; links are followed.
        size: How much of it; -1 for all.

    Raises:
        UnreadableImageError: It is none that could hold an image. A pipe would
            be waited for forever, and a device may have no end.
        OSError: The system cannot read it.
    """
    try:
        status = os.stat(path)
    except ValueError as error:  # as of a zero byte, from a list
        raise UnreadableImageError(
            f'no file can have that name ({error})'
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImageError('it is a folder, pipe, socket or device')
    if status.st_size > MAX_BYTES:
        raise UnreadableImageError(
            f'{status.st_size:,} bytes are more than an image can have'
        )
    with open(path, 'rb') as file:
        return file.read(size)


def from_rank_0(function: Callable[[], Any]) -> Any:
    """Call a function on rank 0 alone; all ranks return or raise the same.

    Args:
        function: What it returns or raises has to be picklable.

    Returns:
        What it returned on rank 0.
    """
    result: list[Any] = [None, None]  # what it returned, or raised
    if is_main_process():
        try:
            result[0] = function()
        except Exception as error:  # the others wait for any
            result[1] = error
    broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]


class UnlabeledDataset(BaseDataset):
    """Images without labels; a subclass says where they come from.

    Rank 0 lists them, and the other ranks receive its list.

    An image's augmentation is drawn from a seed made of the run's seed, the
    epoch, the image's index and the number of the draw in the epoch, so it
    does not depend on the number of workers, and no two draws repeat each
    other's. Epoch and number come from
    :class:`mmdensecl.engine.UnlabeledDataHook`; without that hook the seed
    comes from torch's global generator.

    An image that cannot be read is replaced by another one, which depends on
    the same seed, cached in `unreadable`, and reported by the same hook. Where
    the disk fails, such as a network's, it is asked again after 1, 2 and 4
    seconds, so that a hiccup changes nothing in the run.

    Args:
        data_root: Where the images are.
        pipeline: Transforms.
        max_unreadable: Share of unreadable images above which the run stops.
        **kwargs: Other arguments of :class:`mmengine.dataset.BaseDataset`.

    Raises:
        ValueError: `max_unreadable` is not in [0, 1].
        TypeError: `data_prefix` or a needless `ann_file` is given.
        FileNotFoundError: There are no images.
    """

    takes_ann_file = False

    def __init__(
        self,
        data_root: str,
        pipeline: Sequence[dict | Callable] = (),
        max_unreadable: float = 0.1,
        **kwargs,
    ) -> None:
        if not 0 <= max_unreadable <= 1:
            raise ValueError(
                f'max_unreadable is a share, 0 to 1, got {max_unreadable}'
            )
        if kwargs.get('data_prefix') or (
            kwargs.get('ann_file') and not self.takes_ann_file
        ):
            raise TypeError(
                f'{type(self).__name__} takes no data_prefix, and an ann_file '
                'only as UnlabeledList. Put the folder into data_root.'
            )
        self.max_unreadable = max_unreadable
        # Files that list_images did not take, by how they end.
        self.passed_over: Counter[str] = Counter()
        # Both are in shared memory: workers read the one and write the other.
        self._clock = torch.tensor([0, -1]).share_memory_()  # seed, epoch
        self.unreadable = torch.zeros(0, dtype=torch.bool)
        # Gets the name of each when it is met. Whatever ends the run, be it
        # an error in a worker, what the ranks know by then is there.
        self.unreadable_file: str | None = None
        self.fingerprint = ''  # of the names listed
        super().__init__(
            data_root=data_root, pipeline=list(pipeline), **kwargs
        )

    @abstractmethod
    def list_images(self) -> list[dict]:
        """Data infos with `img_path` and what else :meth:`read` needs."""

    @abstractmethod
    def read(self, info: dict) -> bytes:
        """Read the encoded image of a data info."""

    def load_data_list(self) -> list[dict]:
        """List the images on rank 0, in a fixed order, for all ranks."""
        begin = time.perf_counter()
        infos, passed_over = from_rank_0(
            lambda: (self.list_images(), self.passed_over)
        )
        rest = ''
        if passed_over:
            shown = [f'{n:,} {x}' for x, n in passed_over.most_common(8)]
            rest = (
                f'. Passed over {passed_over.total():,} other files: '
                f'{", ".join(shown)}{", ..." * (len(passed_over) > 8)}'
            )
        if not infos:
            raise FileNotFoundError(
                f'No images in "{self.data_root}"{rest}. Expected files that '
                f'end in one of {", ".join(IMG_EXTENSIONS)}, in any case, at '
                'any depth. Point --data-root at the folder that holds them'
            )
        print_log(
            f'Found {len(infos):,} images in "{self.data_root}" in '
            f'{time.perf_counter() - begin:.1f} s{rest}',
            logger='current',
        )
        names = '\0'.join(x['img_path'] for x in infos)
        digest = sha256(names.encode('utf-8', 'surrogateescape'))
        self.fingerprint = digest.hexdigest()[:8]
        return infos

    def full_init(self) -> None:
        """List the images, once."""
        if not self._fully_initialized:
            super().full_init()
            self._finalize()

    def get_subset_(self, indices: Sequence[int] | int) -> None:
        """Keep some of the images.

        Args:
            indices: Which; as a number, how many from the start, or from the
                end if negative.
        """
        super().get_subset_(indices)
        self._finalize()

    def get_subset(self, indices: Sequence[int] | int) -> 'UnlabeledDataset':
        """A dataset of some of the images.

        Args:
            indices: As of :meth:`get_subset_`.

        Returns:
            A dataset with an epoch and unreadable images of its own.
        """
        subset = super().get_subset(indices)
        subset._clock = self._clock.clone().share_memory_()
        subset._finalize()
        return subset

    def _finalize(self) -> None:
        self.unreadable = torch.zeros(
            len(self), dtype=torch.bool
        ).share_memory_()

    @property
    def image_ids(self) -> np.ndarray:
        """A number for each index, equal where a list repeats an image."""
        if not self.serialize_data:
            records = [repr(x).encode() for x in self.data_list]
        else:  # as it is stored: to unpickle ImageNet takes six seconds
            data = memoryview(self.data_bytes)
            ends = self.data_address.tolist()
            records = [
                bytes(data[start:end])
                for start, end in zip([0, *ends], ends, strict=False)
            ]
        return np.array([hash((self.data_root, x)) for x in records])

    def set_epoch(self, epoch: int, seed: int = 0) -> None:
        """Fix the random numbers of an epoch, also for running workers.

        Args:
            epoch: Index of the epoch, from 0.
            seed: Seed of the run.
        """
        self._clock[:] = torch.tensor([seed, epoch])

    def draw_seed(self, idx: int) -> int:
        """Seed of the augmentation of image `idx` in the present draw."""
        seed, epoch = self._clock.tolist()
        if epoch < 0:
            return int(torch.randint(2**62, ()))
        draw = current_draw.get()
        entropy = [seed, epoch, idx, *([] if draw is None else [draw])]
        state = np.random.SeedSequence(entropy).generate_state(1, np.uint64)
        return int(state[0] >> np.uint64(1))

    def __getitem__(self, idx: int) -> dict:
        """The image after the pipeline, or another where it is broken."""
        self.full_init()
        seed = self.draw_seed(idx)
        substitutes = np.random.default_rng(seed)
        # Once for all substitutes: of a dead disk none can be read.
        pauses = iter(PAUSES)
        for _ in range(self.max_refetch + 1):
            try:
                return self._prepare_patiently(idx, seed, pauses)
            except (UnreadableImageError, OSError) as error:
                # A name may hold line breaks, or what cannot be printed.
                name = self.get_data_info(idx)['img_path']
                last = f'The last was {name!r}: {error}.'
                if not self.unreadable.any():
                    print_log(
                        f'{name!r} cannot be read ({error}); another image '
                        'takes its place, and further ones are counted',
                        logger='current',
                        level=logging.WARNING,
                    )
                if not self.unreadable[idx]:  # else it has been counted
                    self.unreadable[idx] = True
                    self._note(name)
                    self.check_unreadable(f' {last}')
            idx = int(substitutes.integers(len(self)))
        raise RuntimeError(
            f'{self.max_refetch + 1} images drawn in a row from '
            f'"{self.data_root}" cannot be read. {last} If its disk is gone, '
            'bring it back and resume with --resume'
        )

    def _note(self, name: str) -> None:
        if self.unreadable_file is None:
            return
        line = f'{name}\n'.encode('utf-8', 'surrogateescape')
        # Where there is no room for it, the list at the epoch's end says so.
        # All ranks' workers append: by one call, which does not mix lines.
        with (
            suppress(OSError),
            open(self.unreadable_file, 'ab', buffering=0) as file,
        ):
            file.write(line)

    def retry(self, names: Collection[str], indices: range) -> None:
        """Find out which of some images still cannot be read.

        Args:
            names: Of the images, as in `img_path`.
            indices: The part of the dataset to look through.
        """
        pauses = iter(PAUSES)
        for idx in indices:
            # A line break in a name makes two lines of unreadable_file.
            name = self.get_data_info(idx)['img_path'].rpartition('\n')[2]
            if name in names:
                try:
                    self._prepare_patiently(idx, 0, pauses)
                except (UnreadableImageError, OSError):
                    self.unreadable[idx] = True

    def _prepare_patiently(
        self, idx: int, seed: int, pauses: Iterator[int]
    ) -> dict:
        while True:
            try:
                return self.prepare_data(idx, seed)
            except OSError as error:
                if error.errno in LASTING or self.unreadable[idx]:
                    raise
                pause = next(pauses, None)
                if pause is None:
                    raise
                time.sleep(pause)

    def prepare_data(self, idx: int, seed: int | None = None) -> dict:
        """Read image `idx` and run the pipeline.

        Args:
            idx: Index of the image.
            seed: Seed of the augmentation, by default :meth:`draw_seed`.

        Returns:
            What the pipeline makes of `img_bytes`, `img_path`, `sample_idx`
            and `seed`.
        """
        info = self.get_data_info(idx)
        info['img_bytes'] = self.read(info)
        info['seed'] = self.draw_seed(idx) if seed is None else seed
        return self.pipeline(info)

    def check_unreadable(self, detail: str = '') -> None:
        """Stop where too many images are known to be unreadable.

        Args:
            detail: A sentence for the error.

        Raises:
            RuntimeError: Their share is above `max_unreadable`.
        """
        count = int(self.unreadable.sum())
        if count > self.max_unreadable * len(self):
            named = (
                f', as named in "{self.unreadable_file}",'
                if self.unreadable_file
                else ','
            )
            raise RuntimeError(
                f'{count} of {len(self)} images in "{self.data_root}" '
                'cannot be read, more than max_unreadable='
                f'{self.max_unreadable:g} allows.{detail} Mend or remove '
                f'them{named} or raise the limit with --cfg-options '
                'train_dataloader.dataset.max_unreadable=...'
            )


def unlabeled_parts(dataset: Any) -> Iterator[UnlabeledDataset]:
    """The datasets of ours inside wrappers such as ConcatDataset."""
    if isinstance(dataset, UnlabeledDataset):
        yield dataset
    for part in getattr(dataset, 'datasets', ()):
        yield from unlabeled_parts(part)
    if hasattr(dataset, 'dataset'):
        yield from unlabeled_parts(dataset.dataset)
