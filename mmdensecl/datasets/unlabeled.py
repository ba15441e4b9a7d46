# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import os
import re
from abc import abstractmethod
from pathlib import Path
from typing import Callable, List, Optional, Sequence, Union

import numpy as np
import torch
from mmengine.dataset import BaseDataset

from mmdensecl.registry import DATASETS

IMG_EXTENSIONS = ('.jpg', '.jpeg', '.png', '.bmp', '.webp', '.ppm', '.pgm',
                  '.tif', '.tiff')


class UnreadableImageError(Exception):
    """A file that holds no whole picture."""


class UnlabeledDataset(BaseDataset):
    """Pictures without labels; a subclass says where they come from.

    A picture's augmentation is drawn from a seed made of the run's seed, the
    epoch and the picture's index, so it does not depend on the number of
    workers, and no two epochs or ranks repeat each other's. The epoch comes
    from :class:`mmdensecl.engine.UnlabeledDataHook`; without that hook the
    seed comes from torch's global generator.

    A picture that cannot be read is replaced by another one, remembered in
    ``unreadable``, and reported by the same hook.

    Args:
        data_root (str): Where the pictures are.
        pipeline (Sequence[dict | Callable]): Transforms. Defaults to ().
        max_unreadable (float): Share of unreadable pictures above which the
            run stops. Defaults to 0.1.
        **kwargs: Other arguments of :class:`mmengine.dataset.BaseDataset`.

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
        super().__init__(
            data_root=data_root, pipeline=list(pipeline), **kwargs)

    @abstractmethod
    def list_images(self) -> List[str]:
        """Names of the pictures, in a fixed order."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The encoded picture of that name."""

    def load_data_list(self) -> List[dict]:
        """One entry with ``img_path`` for each picture."""
        names = self.list_images()
        if not names:
            raise FileNotFoundError(
                f'No pictures in "{self.data_root}". Expected files that end '
                f'in one of {", ".join(IMG_EXTENSIONS)}, in any case, at any '
                'depth. Point data_root at them, for example with '
                '--cfg-options data_root=/path/to/pictures')
        return [dict(img_path=name) for name in names]

    def full_init(self) -> None:
        """List the pictures, once."""
        if not self._fully_initialized:
            super().full_init()
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
        for _ in range(self.max_refetch + 1):
            try:
                return self.prepare_data(idx, seed)
            except (UnreadableImageError, OSError) as error:
                self._mark_unreadable(idx, error)
            idx = int(substitutes.integers(len(self)))
        raise RuntimeError(f'{self.max_refetch + 1} pictures drawn in a row '
                           f'from "{self.data_root}" cannot be read')

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
        info['img_bytes'] = self.read(info['img_path'])
        info['seed'] = self.draw_seed(idx) if seed is None else seed
        return self.pipeline(info)

    def _mark_unreadable(self, idx: int, error: Exception) -> None:
        self.unreadable[idx] = True
        name = self.get_data_info(idx)['img_path']
        self.check_unreadable(f' The last was "{name}": {error}.')

    def check_unreadable(self, detail: str = '') -> None:
        """Stop where too many pictures are known to be unreadable.

        Args:
            detail (str): A sentence for the error. Defaults to ''.

        Raises:
            RuntimeError: Their share is above ``max_unreadable``.
        """
        count = int(self.unreadable.sum())
        if count > self.max_unreadable * len(self):
            raise RuntimeError(
                f'{count} of {len(self)} pictures in "{self.data_root}" '
                'cannot be read, more than max_unreadable='
                f'{self.max_unreadable:g} allows.{detail} Mend or remove '
                'them, or raise the limit with --cfg-options '
                'train_dataloader.dataset.max_unreadable=...')


def _raise(error: OSError) -> None:
    raise error  # os.walk would pass over folders that it may not read


def _is_hidden(name: str) -> bool:
    return name.startswith('.') or name == '__MACOSX'


@DATASETS.register_module()
class UnlabeledFolder(UnlabeledDataset):
    """All pictures below a folder, at any depth, in the order of names.

    Args:
        data_root (str): The folder.
        **kwargs: Arguments of :class:`UnlabeledDataset`.
    """

    def list_images(self) -> List[str]:
        if not os.path.isdir(self.data_root):
            raise FileNotFoundError(
                f'The data folder "{self.data_root}" does not exist (working '
                f'directory: "{os.getcwd()}"). Point data_root at your '
                'pictures, for example with --cfg-options '
                'data_root=/path/to/pictures')
        found, seen = [], set()
        walk = os.walk(self.data_root, followlinks=True, onerror=_raise)
        for folder, subfolders, names in walk:
            real = os.path.realpath(folder)
            if real in seen:  # a link back, or a second way to the same
                subfolders.clear()
                continue
            seen.add(real)
            # Hidden files and folders are the system's, as macOS's ._x.jpg.
            subfolders[:] = [x for x in subfolders if not _is_hidden(x)]
            found += [
                os.path.relpath(os.path.join(folder, name), self.data_root)
                for name in names if name.lower().endswith(IMG_EXTENSIONS)
                and not _is_hidden(name)
            ]
        return sorted(found)

    def read(self, name: str) -> bytes:
        return Path(self.data_root, name).read_bytes()


@DATASETS.register_module()
class UnlabeledList(UnlabeledFolder):
    """Pictures named in a text file, one a line.

    A whole number after the name, behind spaces, a tab or a comma, is a label
    as in ImageNet's ``meta/train.txt`` and ignored.

    Args:
        ann_file (str): The list, UTF-8; relative to ``data_root`` unless
            absolute.
        data_root (str): Folder that the names are relative to. Defaults to
            ''.
        **kwargs: Arguments of :class:`UnlabeledDataset`.
    """

    takes_ann_file = True

    def __init__(self, ann_file: str, data_root: str = '', **kwargs) -> None:
        super().__init__(data_root=data_root, ann_file=ann_file, **kwargs)

    def list_images(self) -> List[str]:
        try:
            text = Path(self.ann_file).read_text(encoding='utf-8-sig')
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f'The list file "{self.ann_file}" does not exist') from error
        except UnicodeDecodeError as error:
            raise ValueError(f'The list file "{self.ann_file}" is not UTF-8 '
                             'text, one picture a line') from error
        lines = filter(None, map(str.strip, text.splitlines()))
        return [re.sub(r'[ \t,]+-?\d+$', '', line) for line in lines]


@DATASETS.register_module()
class UnlabeledLMDB(UnlabeledDataset):
    """Encoded pictures in an LMDB: key is the name, value the file's bytes.

    ``tools/dataset_converters/folder_to_lmdb.py`` makes one.

    Args:
        data_root (str): The LMDB's folder or file.
        **kwargs: Arguments of :class:`UnlabeledDataset`.
    """

    def __init__(self, data_root: str, **kwargs) -> None:
        self._env = None
        self._pid = -1
        super().__init__(data_root=data_root, **kwargs)

    def _open(self):
        import lmdb  # an optional requirement
        if not os.path.exists(self.data_root):
            raise FileNotFoundError(
                f'The LMDB "{self.data_root}" does not exist')
        try:
            return lmdb.open(
                self.data_root,
                subdir=os.path.isdir(self.data_root),
                readonly=True,
                lock=False,
                readahead=False,
                max_readers=512)
        except lmdb.Error as error:
            raise ValueError(
                f'"{self.data_root}" is not a readable LMDB: {error}'
            ) from error

    def list_images(self) -> List[str]:
        with self._open() as env, env.begin() as transaction:
            keys = transaction.cursor().iternext(keys=True, values=False)
            names = [bytes(key).decode('utf-8', 'replace') for key in keys]
        return [n for n in names if n.lower().endswith(IMG_EXTENSIONS)]

    def read(self, name: str) -> bytes:
        if self._pid != os.getpid():  # an LMDB must not cross a fork
            self._env = None  # lets go of the parent's, or opening fails
            self._env, self._pid = self._open(), os.getpid()
        with self._env.begin() as transaction:
            value = transaction.get(name.encode())
        if value is None:
            raise UnreadableImageError('the key is gone from the LMDB')
        return value

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_env': None, '_pid': -1}
