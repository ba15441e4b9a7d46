# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Fit a config to a folder of labelled pictures, and say which it was."""
import hashlib
import json
import os
import re
from pathlib import Path
from typing import List, Optional, Tuple, Union

from mmengine.config import Config

from mmdensecl.engine import dicts, override_data_root

# Listed by content, all other files by size.
LABEL_SUFFIXES = ('.json', '.txt', '.xml', '.csv')
# So are the pictures in these folders, which are labels too.
MASKS = re.compile(r'SegmentationClass.*|gtFine')
# A folder of another set than VOC's or Cityscapes' own names its classes here,
# one a line, without VOC's background.
CLASS_NAMES = 'class_names.txt'
# Where the data sets are in a config; probes have one in their loop.
DATA_PARTS = ('train_dataloader', 'val_dataloader', 'test_dataloader',
              'test_cfg')
ADVICE = ('docs/evaluation.md and configs/benchmarks/README.md show what goes '
          'where; name the folder above the data with --data-root or '
          'MMDENSECL_DATA_ROOT, or leave the task out with --tasks')


def read_classes(root: Union[str, Path], layout: str) -> Optional[List[str]]:
    """Names of the classes of a labelled folder, if they are its own.

    Args:
        root (str | Path): The folder.
        layout (str): One of :data:`mmdensecl.benchmark.suite.LAYOUTS`.

    Returns:
        List[str] | None: From the annotations (COCO) or from
        ``class_names.txt`` (VOC, Cityscapes). None where that file is
        missing: the layout's standard classes.

    Raises:
        FileNotFoundError: COCO's annotations are missing.
        ValueError: The file holds no names.
    """
    root = Path(root)
    if layout == 'coco':
        path = root / 'annotations' / 'instances_val2017.json'
        if not path.is_file():
            raise FileNotFoundError(f'"{path}" does not exist. {ADVICE}')
        content = json.loads(path.read_text(encoding='utf-8'))
        names = [x['name'] for x in content['categories']]
    else:
        folder = root / 'VOC2012' if layout == 'voc' else root
        path = folder / CLASS_NAMES
        if not path.is_file():
            return None
        lines = path.read_text(encoding='utf-8').splitlines()
        names = [line.strip() for line in lines]
        names = [name for name in names if name]
        if layout == 'voc_seg':
            names = ['background', *names]
    if not names or len(set(names)) < len(names):
        raise ValueError(f'"{path}" must name each class once, got {names}')
    return names


def _palette(count: int) -> List[Tuple[int, ...]]:
    """Distinct colours: VOC's, the bits of the number spread over RGB."""
    return [
        tuple(
            sum(((i >> (3 * bit + channel)) & 1) << (7 - bit)
                for bit in range(8)) for channel in range(3))
        for i in range(count)
    ]


def _is_data_set(node: dict) -> bool:
    """Whether it is a data set with a folder of its own, no wrapper."""
    return 'data_root' in node and 'type' in node


def fit_to_data(cfg: Config, root: Union[str, Path], layout: str) -> None:
    """Point a downstream config at a folder, with the folder's classes.

    Args:
        cfg (Config): Changed in place.
        root (str | Path): Takes the place of the config's ``data_root``.
        layout (str): One of :data:`mmdensecl.benchmark.suite.LAYOUTS`.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f'The data folder "{root}" does not exist. {ADVICE}')
    classes = read_classes(root, layout)
    suffix = dict(voc_seg=('.jpg', '.png')).get(layout)
    if layout == 'cityscapes':
        pngs = any(root.glob('leftImg8bit/*/*/*_leftImg8bit.png'))
        suffix = (f'_leftImg8bit.{"png" if pngs else "jpg"}',
                  '_gtFine_labelTrainIds.png')

    def fit(node: dict) -> None:
        if classes and 'num_classes' in node:
            node['num_classes'] = len(classes)
        if not _is_data_set(node):
            return
        if suffix:
            node['img_suffix'] = suffix[0]
        if classes:
            # The hosts' named sets insist on, or print, their own classes.
            if suffix:
                node['type'] = 'BaseSegDataset'
                node['seg_map_suffix'] = suffix[1]
            elif layout != 'coco':
                node['type'] = 'XMLDataset'
            # VOC's first colour, black, is its background's.
            start = 0 if suffix else 1
            node['metainfo'] = dict(
                classes=tuple(classes),
                palette=_palette(start + len(classes))[start:])

    for part in ('model', *DATA_PARTS):
        for node, _ in dicts(cfg.get(part)):
            fit(node)
    override_data_root(cfg, str(root))


def _names(node: dict) -> List[str]:
    """Files and folders below its root that a host's data set opens."""
    prefix, split = node.get('data_prefix') or {}, node.get('split')
    if isinstance(prefix, str):
        prefix = dict(img_path=prefix)
    names = [node.get('ann_file'), *prefix.values()]
    voc = ['JPEGImages', 'Annotations']
    if 'sub_data_root' in prefix:  # mmdet's VOCDataset
        names += [f'{prefix["sub_data_root"]}/{name}' for name in voc]
    elif split and node['type'] == 'VOC':  # mmpretrain's
        names += [*voc, f'ImageSets/Main/{split}.txt']
    elif split:  # its ImageNet
        names.append(split)
    return [name for name in names if name and isinstance(name, str)]


def check_files(cfg: Config) -> None:
    """See that what a config's data sets name is there.

    Args:
        cfg (Config): With its data root.

    Raises:
        FileNotFoundError: A list of annotations or a folder is missing.
    """
    nodes = (node for part in DATA_PARTS for node, _ in dicts(cfg.get(part)))
    paths = (
        os.path.normpath(os.path.join(node['data_root'] or '', name))
        for node in filter(_is_data_set, nodes) for name in _names(node))
    missing = [x for x in dict.fromkeys(paths) if not os.path.exists(x)]
    if missing:
        raise FileNotFoundError(
            f'"{cfg.filename}" needs these files and folders, which do not '
            f'exist: {", ".join(missing)}. {ADVICE}')


def fingerprint(root: Union[str, Path]) -> dict:
    """What identifies a folder of labelled pictures.

    Args:
        root (str | Path): The folder.

    Returns:
        dict: ``fingerprint``, a SHA-256 over the sorted names of all files
        with the content of the labels (json, txt, xml, csv, and the masks of
        VOC and Cityscapes) and the size of everything else; ``files``,
        ``bytes``.
    """
    digest, files, size = hashlib.sha256(), 0, 0
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(x for x in subfolders if x[0] != '.')
        parts = Path(folder).relative_to(root).parts
        masks = any(map(MASKS.fullmatch, parts))
        for name in sorted(x for x in names if x[0] != '.'):
            path = Path(folder, name)
            length = path.stat().st_size
            digest.update(f'{path.relative_to(root)}\0{length}\0'.encode())
            if masks or name.lower().endswith(LABEL_SUFFIXES):
                digest.update(path.read_bytes())
            files += 1
            size += length
    return dict(fingerprint=digest.hexdigest(), files=files, bytes=size)
