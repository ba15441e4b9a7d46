# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Fit a config to a folder of labelled images, and say which it was."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import Registry

from mmdensecl.engine import dicts, override_data_root

# Read by content for the fingerprint; of all other files the size counts.
LABELS = ('.json', '.txt', '.xml', '.csv')
# Where the datasets are in a config; probes have one in their loop.
PARTS = ('train_dataloader', 'val_dataloader', 'test_dataloader', 'test_cfg')


def build(registry: Registry, part: dict, cfg: Config) -> Any:
    """Build a part of a config with the types that it means."""
    scope = cfg.get('default_scope')
    with registry.switch_scope_and_registry(scope) as own:
        return own.build(part)


def datasets(cfg: Config, parts: Iterable[str] = PARTS) -> Iterator[dict]:
    """The datasets of a config, without those that only wrap others."""
    for part in parts:
        for node, _ in dicts(cfg.get(part)):
            wraps = {'dataset', 'datasets'} & {*node} or 'type' not in node
            if not wraps and {'data_root', 'ann_file', 'data_prefix'} & {
                *node
            }:
                yield node


def read_classes(root: Path, layout: str) -> list[str] | None:
    """Names of the classes of a labelled folder, if they are its own.

    COCO's annotations hold them. A folder of another set than VOC's or
    Cityscapes' own has ``class_names.txt``, one a line, without VOC's
    background. None where that file is missing: the standard classes.

    Raises:
        ValueError: The file holds no names, or one twice.
    """
    path = root / 'annotations' / 'instances_val2017.json'
    if layout != 'coco':
        folder = root / 'VOC2012' if layout == 'voc' else root
        path = folder / 'class_names.txt'
    if not path.is_file():
        return None
    text = path.read_text(encoding='utf-8')
    if layout == 'coco':
        names = [x['name'] for x in json.loads(text)['categories']]
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
        names = ['background'] * (layout == 'voc_seg') + names
    if not names or len({*names}) < len(names):
        raise ValueError(f'"{path}" must name each class once, got {names}')
    return names


def fit_to_data(cfg: Config, root: Path, layout: str) -> None:
    """Point a downstream config at a folder, with the folder's classes.

    Args:
        cfg: Changed in place.
        root: Takes the place of the config's ``data_root``.
        layout: One of :data:`mmdensecl.benchmark.suite.LAYOUTS`.
    """
    classes = read_classes(root, layout)
    suffix = dict(voc_seg=('.jpg', '.png')).get(layout)
    if layout == 'cityscapes':
        pngs = any(root.glob('leftImg8bit/*/*/*_leftImg8bit.png'))
        image = f'_leftImg8bit.{"png" if pngs else "jpg"}'
        suffix = image, '_gtFine_labelTrainIds.png'
    for part in ('model', *PARTS):
        for node, _ in dicts(cfg.get(part)):
            if classes and 'num_classes' in node:
                node['num_classes'] = len(classes)
    for node in datasets(cfg):
        if suffix:
            node['img_suffix'] = suffix[0]
        if classes:
            # The hosts' named sets insist on, or print, their own classes.
            if suffix:
                node.update(type='BaseSegDataset', seg_map_suffix=suffix[1])
            elif layout != 'coco':
                node['type'] = 'XMLDataset'
            rng = np.random.default_rng(len(classes))
            colors = rng.integers(30, 255, (len(classes), 3)).tolist()
            palette = [*map(tuple, colors)]  # mmdet draws no lists
            node['metainfo'] = dict(classes=tuple(classes), palette=palette)
    override_data_root(cfg, str(root))


def files_of(node: dict) -> dict[str, bool]:
    """Files and folders that a host's dataset opens; True for masks."""
    prefix, split = node.get('data_prefix') or {}, node.get('split')
    if isinstance(prefix, str):
        prefix = dict(img_path=prefix)
    names = {name: 'seg' in key for key, name in prefix.items() if name}
    names[node.get('ann_file') or ''] = False
    voc = ['JPEGImages', 'Annotations']
    if 'sub_data_root' in prefix:  # mmdet's VOCDataset
        voc = [os.path.join(prefix['sub_data_root'], name) for name in voc]
    elif split and node['type'] == 'VOC':  # mmpretrain's
        voc.append(f'ImageSets/Main/{split}.txt')
    else:
        voc = [split] if split else []  # its ImageNet
    names.update(dict.fromkeys(voc, False))
    if len(names) > 1:
        names.pop('', None)  # the root as a whole
    root = node.get('data_root') or ''
    return {os.path.normpath(os.path.join(root, k)): names[k] for k in names}


def fingerprint(paths: Mapping[str, bool]) -> dict:
    """What identifies labelled images.

    Args:
        paths: From :func:`files_of`.

    Returns:
        ``fingerprint``, a SHA-256 over the names of all files with the
        content of labels (json, txt, xml, csv, masks) and the size of
        everything else; ``files``; ``bytes``.
    """
    digest, count, size = hashlib.sha256(), 0, 0
    for top, masks in sorted(paths.items()):
        files = [Path(top)] if os.path.exists(top) else []
        digest.update(os.path.basename(top).encode())  # perhaps a pattern
        if os.path.isdir(top):
            walk = os.walk(top, followlinks=True)
            files = sorted(
                Path(x, name) for x, _, names in walk for name in names
            )
        for path in files:
            name = path.relative_to(top)
            if any(part.startswith('.') for part in name.parts):
                continue
            length = path.stat().st_size
            digest.update(f'{path.name} {name}\0{length}\0'.encode())
            if masks or path.suffix.lower() in LABELS:
                digest.update(path.read_bytes())
            count, size = count + 1, size + length
    return dict(fingerprint=digest.hexdigest(), files=count, bytes=size)
