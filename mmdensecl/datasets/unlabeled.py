# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import errno
import hashlib
import os
import stat
import time
from abc import abstractmethod
from contextlib import suppress
from typing import (Any, Callable, Collection, Dict, Generic, Iterator,
                    Optional, Sequence, TypeVar, Union)

import numpy as np
import torch
from mmengine.dataset import BaseDataset

from .listing import Pictures

IMG_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.ppm', '.pgm',
                  '.tif', '.tiff')

# Of a picture's file: 179 million pixels, PIL's limit, of 4 x 16 bits are
# 1.4 GB. All of a file is read into the memory.
MAX_BYTES = 2**31
# What says something of the file and not of the disk: asked again, it would
# say the same. Errors without a number are a decoder's.
LASTING = (None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR,
           errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
PAUSES = (1, 2, 4)  # seconds before a disk is asked again

Handle = TypeVar('Handle')


class UnreadableImageError(Exception):
    """A file that holds no whole picture."""


def read_file(path: str) -> bytes:
    """The content of a picture's file.

    Args:
        path (str): The file; links are followed.

    Returns:
        bytes: All of it.

    Raises:
        UnreadableImageError: It is none that could hold a picture. A pipe
            would be waited for forever, and a device may have no end.
        OSError: The system cannot read it.
    """
    try:
        status = os.stat(path)
    except ValueError as error:  # as of a zero byte, from a list
        raise UnreadableImageError(
            f'no file can have that name ({error})') from error
    if not stat.S_ISREG(status.st_mode):
        raise UnreadableImageError('it is a folder, pipe, socket or device')
    if status.st_size > MAX_BYTES:
        raise UnreadableImageError(
            f'{status.st_size:,} bytes are more than a picture can have')
    with open(path, 'rb') as file:
        return file.read()


class PerProcess(Generic[Handle]):
    """Something open that may cross neither a fork nor a pickle.

    Args:
        make (Callable): Opens it; called once in each process that asks.
    """

    def __init__(self, make: Callable[[], Handle]) -> None:
        self._make = make
        self._handle: Optional[Handle] = None
        self._pid = -1

    def get(self) -> Handle:
        """This process's own."""
        if self._pid != os.getpid():
            # Lets go of the parent's; an LMDB cannot be opened beside it.
            self._handle = None
            self._handle, self._pid = self._make(), os.getpid()
        return self._handle

    def __getstate__(self) -> dict:
        return dict(self.__dict__, _handle=None, _pid=-1)

    def __deepcopy__(self, memo: dict) -> 'PerProcess':
        return self  # one is enough for a data set and its subsets


class UnlabeledDataset(BaseDataset):
    """Pictures without labels; a subclass says where they come from.

    A picture's augmentation is drawn from a seed made of the run's seed, the
    epoch and the picture's index, so it does not depend on the number of
    workers, and no two epochs or ranks repeat each other's. The epoch comes
    from :class:`mmdensecl.engine.UnlabeledDataHook`; without that hook the
    seed comes from torch's global generator.

    A picture that cannot be read is replaced by another one, which depends on
    the same seed, remembered in ``unreadable``, and reported by the same
    hook. Where the disk fails, such as a network's, it is asked again after
    1, 2 and 4 seconds, so that a hiccup changes nothing in the run.

    Args:
        data_root (str): Where the pictures are.
        pipeline (Sequence[dict | Callable]): Transforms. Defaults to ().
        max_unreadable (float): Share of unreadable pictures above which the
            run stops. Defaults to 0.1.
        **kwargs: Other arguments of :class:`mmengine.dataset.BaseDataset`.
            Workers share the names with ``serialize_data`` or without.

    Raises:
        ValueError: ``max_unreadable`` is not in [0, 1].
        TypeError: ``data_prefix`` or a needless ``ann_file`` is given.
        FileNotFoundError: There are no pictures.
    """

    takes_ann_file = False

    def __init__(self,
                 data_root: str,
                 pipeline: Sequence[Union[dict, Callable]] = (),
                 max_unreadable: float = 0.1,
                 **kwargs) -> None:
        if not 0 <= max_unreadable <= 1:
            raise ValueError('max_unreadable is a share, 0 to 1, got '
                             f'{max_unreadable}')
        if kwargs.get('data_prefix') or (kwargs.get('ann_file')
                                         and not self.takes_ann_file):
            raise TypeError(
                f'{type(self).__name__} takes no data_prefix, and an ann_file '
                'only as UnlabeledList. Put the folder into data_root.')
        self.max_unreadable = max_unreadable
        # Both are in shared memory: workers read the one and write the other.
        self._clock = torch.tensor([0, -1]).share_memory_()  # seed, epoch
        self.unreadable = torch.zeros(0, dtype=torch.bool)
        # Gets the name of each when it is met. Whatever ends the run, be it
        # an error in a worker, what the ranks know by then is there.
        self.unreadable_file: Optional[str] = None
        # BaseDataset would pickle each data info; Pictures needs no help.
        kwargs['serialize_data'] = False
        super().__init__(
            data_root=data_root, pipeline=list(pipeline), **kwargs)

    @abstractmethod
    def list_images(self) -> Union[Sequence[str], Pictures]:
        """The pictures, in a fixed order: names, or a table with more."""

    @abstractmethod
    def read(self, info: Dict[str, Any]) -> bytes:
        """The encoded picture of a data info."""

    def load_data_list(self) -> Pictures:
        """Data infos with ``img_path`` and what else :meth:`read` needs."""
        images = self.list_images()
        if not images:
            raise FileNotFoundError(
                f'No pictures in "{self.data_root}". Expected files that end '
                f'in one of {", ".join(IMG_EXTENSIONS)}, in any case, at any '
                'depth. Point data_root at them, for example with '
                '--cfg-options data_root=/path/to/pictures')
        return images if isinstance(images, Pictures) else Pictures(images)

    def full_init(self) -> None:
        """List the pictures, once."""
        if not self._fully_initialized:
            super().full_init()
            self._settle()

    def get_subset_(self, indices: Union[Sequence[int], int]) -> None:
        """Keep some of the pictures.

        Args:
            indices (Sequence[int] | int): Which; as a number, how many from
                the start, or from the end if negative.
        """
        super().get_subset_(indices)
        self._settle()

    def get_subset(self, indices: Union[Sequence[int],
                                        int]) -> 'UnlabeledDataset':
        """A data set of some of the pictures.

        Args:
            indices (Sequence[int] | int): As of :meth:`get_subset_`.

        Returns:
            UnlabeledDataset: With an epoch and unreadable pictures of its
            own.
        """
        subset = super().get_subset(indices)
        subset._clock = self._clock.clone().share_memory_()
        subset._settle()
        return subset

    def _settle(self) -> None:
        # BaseDataset makes a list of dicts where it picks out single ones.
        if not isinstance(self.data_list, Pictures):
            self.data_list = Pictures.of(self.data_list)
        self.unreadable = torch.zeros(
            len(self), dtype=torch.bool).share_memory_()

    def set_epoch(self, epoch: int, seed: int = 0) -> None:
        """Fix the random numbers of an epoch, also for running workers.

        Args:
            epoch (int): Index of the epoch, from 0.
            seed (int): Seed of the run. Defaults to 0.
        """
        self._clock[:] = torch.tensor([seed, epoch])

    def draw_seed(self, idx: int) -> int:
        """Seed of the augmentation of picture ``idx`` in this epoch."""
        seed, epoch = self._clock.tolist()
        if epoch < 0:
            return int(torch.randint(2**62, ()))
        return int(
            np.random.SeedSequence((seed, epoch, idx)).generate_state(
                1, np.uint64)[0] >> np.uint64(1))

    def __getitem__(self, idx: int) -> dict:
        """The picture after the pipeline, or another where it is broken."""
        if not self._fully_initialized:
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
                if not self.unreadable[idx]:  # else it has been counted
                    self.unreadable[idx] = True
                    self._note(name)
                    self.check_unreadable(f' {last}')
            idx = int(substitutes.integers(len(self)))
        raise RuntimeError(
            f'{self.max_refetch + 1} pictures drawn in a row from '
            f'"{self.data_root}" cannot be read. {last} If its disk is gone, '
            'bring it back and go on with --resume')

    def _note(self, name: str) -> None:
        if self.unreadable_file is None:
            return
        line = f'{name}\n'.encode('utf-8', 'surrogateescape')
        # Where there is no room for it, the list at the epoch's end says so.
        # All ranks' workers append: by one call, which does not mix lines.
        with suppress(OSError), open(
                self.unreadable_file, 'ab', buffering=0) as file:
            file.write(line)

    def try_again(self,
                  names: Collection[bytes],
                  share: int = 0,
                  shares: int = 1) -> None:
        """Find out which of some pictures still cannot be read.

        Args:
            names (Collection[bytes]): The lines of ``unreadable_file``.
            share (int): Which part of the data set is looked through.
                Defaults to 0.
            shares (int): Number of such parts. Defaults to 1.
        """
        columns = self.data_list.columns
        text, edges = columns['text'].numpy(), columns['edges'].numpy()
        start, end = (len(self) * x // shares for x in (share, share + 1))
        pauses = iter(PAUSES)
        for idx in range(start, end):
            name = text[edges[idx]:edges[idx + 1]].tobytes()
            # A line break in a name makes two lines.
            if name.rpartition(b'\n')[2] not in names:
                continue
            try:
                self._prepare_patiently(idx, 0, pauses)
            except (UnreadableImageError, OSError):
                self.unreadable[idx] = True

    def digest(self) -> str:
        """The same for data sets of the same pictures in the same order.

        Returns:
            str: Of the names below ``data_root``, which itself may differ.
        """
        self.full_init()
        digest = hashlib.sha256()
        for key, column in sorted(self.data_list.columns.items()):
            digest.update(key.encode())
            digest.update(column.numpy())  # not a copy of it
        return digest.hexdigest()

    def _prepare_patiently(self, idx: int, seed: int,
                           pauses: Iterator[int]) -> dict:
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

    def prepare_data(self, idx: int, seed: Optional[int] = None) -> dict:
        """Read picture ``idx`` and run the pipeline.

        Args:
            idx (int): Index of the picture.
            seed (int, optional): Seed of the augmentation. Defaults to
                :meth:`draw_seed`.

        Returns:
            dict: What the pipeline makes of ``img_bytes``, ``img_path``,
            ``sample_idx`` and ``seed``.
        """
        info = self.get_data_info(idx)
        info['img_bytes'] = self.read(info)
        info['seed'] = self.draw_seed(idx) if seed is None else seed
        return self.pipeline(info)

    def check_unreadable(self, detail: str = '') -> None:
        """Stop where too many pictures are known to be unreadable.

        Args:
            detail (str): A sentence for the error. Defaults to ''.

        Raises:
            RuntimeError: Their share is above ``max_unreadable``.
        """
        count = int(self.unreadable.sum())
        if count > self.max_unreadable * len(self):
            named = (f', as named in "{self.unreadable_file}",'
                     if self.unreadable_file else ',')
            raise RuntimeError(
                f'{count} of {len(self)} pictures in "{self.data_root}" '
                'cannot be read, more than max_unreadable='
                f'{self.max_unreadable:g} allows.{detail} Mend or remove '
                f'them{named} or raise the limit with --cfg-options '
                'train_dataloader.dataset.max_unreadable=...')
