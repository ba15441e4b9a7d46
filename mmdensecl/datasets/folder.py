# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Images of a folder, or named in a list."""

import os
import re
from collections import Counter
from pathlib import Path

from mmdensecl.registry import DATASETS

from .unlabeled import (
    IMG_EXTENSIONS,
    UnlabeledDataset,
    UnreadableImageError,
    read_file,
)

# Browsers save Twitter's images as .jpg_large.
IMAGE_NAME = re.compile(
    f'({"|".join(map(re.escape, IMG_EXTENSIONS))})'
    r'([_:-](large|medium|small|orig))?$',
    re.IGNORECASE,
)
IMAGE_HEAD = re.compile(
    rb'\xff\xd8\xff|\x89PNG|BM|GIF8|P[56]\s|II\*\0|MM\0\*|RIFF....WEBP'
    rb'|....ftypavif',
    re.DOTALL,
)


def is_hidden(name: str) -> bool:
    """Whether a file or folder is the system's, as macOS's `._x.jpg`."""
    return name.startswith('.') or name == '__MACOSX'


def is_image(path: str | os.PathLike) -> bool:
    """Whether a file is named as an image is, or nameless and begins as one.

    Args:
        path: Of an existing file where its name has no ending.
    """
    name = os.path.basename(path)
    if '.' in name:
        return IMAGE_NAME.search(name) is not None and not is_hidden(name)
    try:
        head = read_file(path, 16)
    except (OSError, UnreadableImageError):
        return False
    return IMAGE_HEAD.match(head) is not None


def ending(name: str) -> str:
    """What a name ends in, to count files by."""
    return os.path.splitext(name)[1].lower() or 'without an ending'


def search_folder(
    root: str | os.PathLike, passed_over: Counter[str] | None = None
) -> list[str]:
    """Find the images below a folder.

    Hidden files and folders are left out. A folder that links lead to is
    listed once, by its own name if it has one below `root`.

    Args:
        root: The folder.
        passed_over: Gets the numbers of other files, by :func:`ending`.

    Returns:
        Names relative to `root`, with forward slashes, sorted.

    Raises:
        OSError: A folder cannot be read: its files would be missing unnoticed.
    """

    def stop(error: OSError) -> None:
        raise error

    names: list[str] = []
    seen: set[str] = set()
    todo = [os.fspath(root)]
    for top in todo:  # grows: links come when all that is no link is done
        for folder, subfolders, files in os.walk(top, onerror=stop):
            subfolders[:] = [x for x in subfolders if not is_hidden(x)]
            real = os.path.realpath(folder)
            if real in seen:  # a link back, or a second way to the same
                subfolders.clear()
                continue
            seen.add(real)
            paths = [os.path.join(folder, x) for x in sorted(subfolders)]
            todo += filter(os.path.islink, paths)
            prefix = os.path.relpath(folder, root).replace(os.sep, '/')
            prefix = '' if prefix == '.' else f'{prefix}/'
            for name in files:
                if is_hidden(name):
                    continue
                if is_image(os.path.join(folder, name)):
                    names.append(prefix + name)
                elif passed_over is not None:
                    passed_over[ending(name)] += 1
    return sorted(names)


@DATASETS.register_module()
class UnlabeledFolder(UnlabeledDataset):
    """All images below a folder, at any depth, in the order of names.

    Args:
        data_root: The folder.
        **kwargs: Arguments of :class:`UnlabeledDataset`.
    """

    def list_images(self) -> list[dict]:
        if not os.path.isdir(self.data_root):
            raise FileNotFoundError(
                f'The data folder "{self.data_root}" does not exist (working '
                f'directory: "{os.getcwd()}"). Point --data-root at your '
                'images, or data_root in the config'
            )
        names = search_folder(self.data_root, self.passed_over)
        return [dict(img_path=name) for name in names]

    def read(self, info: dict) -> bytes:
        return read_file(os.path.join(self.data_root, info['img_path']))


@DATASETS.register_module()
class UnlabeledList(UnlabeledFolder):
    """Images named in a text file, one a line.

    A whole number after the name, behind spaces, a tab or a comma, is a label
    as in ImageNet's `meta/train.txt` and ignored.

    Args:
        ann_file: The list, UTF-8; relative to `data_root` unless absolute.
        data_root: Folder that the names are relative to.
        **kwargs: Arguments of :class:`UnlabeledDataset`.
    """

    takes_ann_file = True

    def __init__(self, ann_file: str, data_root: str = '', **kwargs) -> None:
        super().__init__(data_root=data_root, ann_file=ann_file, **kwargs)

    def list_images(self) -> list[dict]:
        try:
            text = Path(self.ann_file).read_text(encoding='utf-8-sig')
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f'The list file "{self.ann_file}" does not exist'
            ) from error
        except UnicodeDecodeError as error:
            raise ValueError(
                f'The list file "{self.ann_file}" is not UTF-8 '
                'text, one image a line'
            ) from error
        lines = filter(None, map(str.strip, text.splitlines()))
        return [dict(img_path=self._without_label(line)) for line in lines]

    @staticmethod
    def _without_label(line: str) -> str:
        # One separator: of a long row of them each would be tried.
        label = re.search(r'[ \t,]-?\d+$', line)
        return line[: label.start()].rstrip(' \t,') if label else line
