# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import os
from functools import partial
from typing import Any, Dict, List

from mmdensecl.registry import DATASETS
from .unlabeled import (IMG_EXTENSIONS, PerProcess, UnlabeledDataset,
                        UnreadableImageError)


def open_lmdb(path: str):
    """Open an LMDB for reading, by its folder or file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no LMDB, or damaged.
    """
    import lmdb  # an optional requirement
    if not os.path.exists(path):
        raise FileNotFoundError(f'The LMDB "{path}" does not exist')
    try:
        return lmdb.open(
            path,
            subdir=os.path.isdir(path),
            readonly=True,
            lock=False,
            readahead=False,
            max_readers=512)
    except lmdb.Error as error:
        raise ValueError(
            f'"{path}" is not a readable LMDB: {error}') from error


@DATASETS.register_module()
class UnlabeledLMDB(UnlabeledDataset):
    """Encoded pictures in an LMDB: key is the name, value the file's bytes.

    ``tools/dataset_converters/folder_to_lmdb.py`` makes one.

    Args:
        data_root (str): The LMDB's folder or file.
        **kwargs: Arguments of :class:`UnlabeledDataset`.
    """

    def __init__(self, data_root: str, **kwargs) -> None:
        self._env = PerProcess(partial(open_lmdb, data_root))
        super().__init__(data_root=data_root, **kwargs)

    def list_images(self) -> List[str]:
        with open_lmdb(self.data_root) as env, env.begin() as transaction:
            keys = transaction.cursor().iternext(keys=True, values=False)
            names = [
                bytes(key).decode('utf-8', 'surrogateescape') for key in keys
            ]
        return [n for n in names if n.lower().endswith(IMG_EXTENSIONS)]

    def read(self, info: Dict[str, Any]) -> bytes:
        key = info['img_path'].encode('utf-8', 'surrogateescape')
        with self._env.get().begin() as transaction:
            value = transaction.get(key)
        if value is None:
            raise UnreadableImageError('the key is gone from the LMDB')
        return value
