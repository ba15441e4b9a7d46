# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
import os
import re
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Sequence, Union

from mmdensecl.registry import DATASETS
from .listing import Pictures, remember, search_folder
from .unlabeled import IMG_EXTENSIONS, UnlabeledDataset, read_file


@DATASETS.register_module()
class UnlabeledFolder(UnlabeledDataset):
    """All pictures below a folder, at any depth, in the order of names.

    Of a large folder the names are remembered and not searched again until a
    folder changes, see :func:`mmdensecl.datasets.listing.cache_file`.

    Args:
        data_root (str): The folder.
        **kwargs: Arguments of :class:`UnlabeledDataset`.
    """

    def list_images(self) -> Union[Sequence[str], Pictures]:
        if not os.path.isdir(self.data_root):
            raise FileNotFoundError(
                f'The data folder "{self.data_root}" does not exist (working '
                f'directory: "{os.getcwd()}"). Point data_root at your '
                'pictures, for example with --cfg-options '
                'data_root=/path/to/pictures')
        return remember(
            os.path.realpath(self.data_root), IMG_EXTENSIONS,
            partial(search_folder, self.data_root, IMG_EXTENSIONS))

    def read(self, info: Dict[str, Any]) -> bytes:
        return read_file(os.path.join(self.data_root, info['img_path']))


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
        return [self._without_label(line) for line in lines]

    @staticmethod
    def _without_label(line: str) -> str:
        # One separator: of a long row of them each would be tried.
        label = re.search(r'[ \t,]-?\d+$', line)
        return line[:label.start()].rstrip(' \t,') if label else line
