# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import os
from functools import partial
from typing import Any, Dict, List
from weakref import WeakValueDictionary

from mmdensecl.registry import DATASETS
from .unlabeled import (IMG_EXTENSIONS, PerProcess, UnlabeledDataset,
                        UnreadableImageError)


def open_lmdb(path: str):
    """Open an LMDB for reading, by its folder or file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is no LMDB, or damaged, or somebody else in this process
            has it open.
    """
    import lmdb  # an optional requirement
    file = os.path.join(path, 'data.mdb') if os.path.isdir(path) else path
    if not os.path.exists(file):
        raise FileNotFoundError(
            f'The LMDB "{path}" does not exist' if file ==
            path else f'"{path}" is no LMDB: there is no data.mdb in it')
    try:
        env = lmdb.open(
            path,
            subdir=file != path,
            readonly=True,
            lock=False,
            readahead=False,
            max_readers=512)
    except lmdb.Error as error:
        if 'already open' in str(error):
            raise ValueError(
                f'The LMDB "{path}" is open in this process already, by other '
                'means than mmdensecl: close it first') from error
        raise ValueError(
            f'"{path}" is not a readable LMDB: {error}') from error
    size = os.path.getsize(file)
    needed = (env.info()['last_pgno'] + 1) * env.stat()['psize']
    if size < needed:  # the process would die where it reads on
        env.close()
        raise ValueError(f'The LMDB "{path}" is truncated: its file has '
                         f'{size} of {needed} bytes. Make or copy it again')
    return env


class SharedLMDB(PerProcess):
    """An LMDB that all data sets of a process share.

    It cannot be open twice in one.

    Args:
        path (str): The LMDB's folder or file.
    """

    _all: 'WeakValueDictionary[str, SharedLMDB]' = WeakValueDictionary()

    def __init__(self, path: str) -> None:
        super().__init__(partial(open_lmdb, path))
        self.path = path

    @classmethod
    def of(cls, path: str) -> 'SharedLMDB':
        """The one of a path."""
        key = os.path.realpath(path)
        found = cls._all.get(key)
        if found is None:
            found = cls._all[key] = cls(path)
        return found

    def __reduce__(self) -> tuple:
        return SharedLMDB.of, (self.path, )


@DATASETS.register_module()
class UnlabeledLMDB(UnlabeledDataset):
    """Encoded pictures in an LMDB: key is the name, value the file's bytes.

    ``tools/dataset_converters/folder_to_lmdb.py`` makes one. Use only those
    that you or people you trust have made: liblmdb follows the page numbers in
    the file without a check, and a wrong one ends the process.

    Args:
        data_root (str): The LMDB's folder or file.
        **kwargs: Arguments of :class:`UnlabeledDataset`.
    """

    def __init__(self, data_root: str, **kwargs) -> None:
        self._env = SharedLMDB.of(data_root)
        super().__init__(data_root=data_root, **kwargs)

    def list_images(self) -> List[str]:
        import lmdb
        try:
            with self._env.get().begin() as transaction:
                keys = transaction.cursor().iternext(keys=True, values=False)
                names = [
                    bytes(key).decode('utf-8', 'surrogateescape')
                    for key in keys
                ]
        except lmdb.Error as error:
            raise ValueError(f'The LMDB "{self.data_root}" is damaged: '
                             f'{error}. Make or copy it again') from error
        return [n for n in names if n.lower().endswith(IMG_EXTENSIONS)]

    def read(self, info: Dict[str, Any]) -> bytes:
        key = info['img_path'].encode('utf-8', 'surrogateescape')
        import lmdb
        try:
            with self._env.get().begin() as transaction:
                value = transaction.get(key)
        except lmdb.Error as error:
            raise UnreadableImageError(f'the LMDB has {error}') from error
        if value is None:
            raise UnreadableImageError('the key is gone from the LMDB')
        return value
