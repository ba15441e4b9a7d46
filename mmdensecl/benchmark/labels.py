# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Count labels before anything is trained; refuse those without a score.

mmdet drops objects of unknown names and mmseg pixels of value 255, both
without a word: masks of 0 and 255 give a mIoU of 100, and boxes called
"Person" where the class is "person" an AP of 0.
"""

import json
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from mmengine.config import Config
from mmengine.registry import DATASETS
from PIL import Image

from .data import datasets

IGNORED = 'not scored'  # pixels of mmseg's ignore_index
# Label, how many, in which file.
Counts = Iterable[tuple[str, int, str]]


class LabelError(ValueError):
    """Labels from which no score could come."""


def check_labels(cfg: Config) -> list[str]:
    """Count the labels of a config's training and validation set.

    Args:
        cfg: Of mmdet, mmseg or mmpretrain, with its data in place.

    Returns:
        Remarks for below the table: what is not scored or not learnt.

    Raises:
        LabelError: Labels that are none of the classes and look like one, or
            leave one without any; a set without labels; a single class to
            tell apart. With the counts.
    """
    rows, known, unit = [], {}, ''
    for split in ('train', 'val'):
        for node in datasets(cfg, [f'{split}_dataloader']):
            scope = cfg.get('default_scope')
            with DATASETS.switch_scope_and_registry(scope) as registry:
                known[split], unit, counts = _read(registry, node)
                rows += [(split, *count) for count in counts]
            if not unit:  # a kind of dataset that is not known here
                return []
    counted = pd.DataFrame(rows, columns=['split', 'label', 'count', 'file'])
    table = counted.pivot_table('count', 'label', 'split', 'sum')
    names = [*dict.fromkeys([*known['val'], *table.index])]
    table = table.reindex(index=names, columns=['train', 'val'])
    table = table.fillna(0).astype(int)
    files = counted.groupby('label')['file'].first()
    problems, remarks = _judge(table, known, unit, files)
    if problems:
        table.index = [x if x in known['val'] else f'? {x}' for x in names]
        lines = [
            f'The labels of "{cfg.filename}" cannot be scored:',
            *problems,
        ]
        lines.append(f'{unit} of each class ("?": no class):')
        raise LabelError('\n'.join([*lines, table.to_string()]))
    return remarks


def _judge(
    table: pd.DataFrame, known: dict, unit: str, files: pd.Series
) -> tuple[list[str], list[str]]:
    """What stops a benchmark, and what is told below its table."""
    problems: list[str] = []
    remarks: list[str] = []
    classes = known['val']
    own = table.loc[classes]
    strange = table.drop(index=[*classes, IGNORED], errors='ignore')
    bare = unit == 'pixels' or not own.any(axis=1).all()
    cases = {name.casefold(): name for name in classes}
    for label, count in strange.sum(axis=1).items():
        told = (
            f'"{label}" ({count:,} {unit}, as in {files[label]}) is no class'
        )
        twin = cases.get(label.strip().casefold())
        if twin:
            problems.append(f'{told}, "{twin}" is: write both alike')
        else:
            (problems if bare else remarks).append(told)
    if known['train'] != classes:
        shown = (', '.join(known[split]) for split in ('train', 'val'))
        problems.append('train has the classes {}; val has {}'.format(*shown))
    empty = own.columns[~own.any()]
    problems += [f'{split} has not one label of a class' for split in empty]
    there, learnt = own['val'] > 0, own['train'] > 0
    if there.sum() == 1 and unit != 'objects':
        hint = '; 255 is ignored, was 1 meant?' * (IGNORED in table.index)
        problems.append(
            f'"{own.index[there][0]}" is the only class in val, so saying '
            f'it everywhere is right{hint}'
        )
    for found, what in (
        (~there, f'of {len(own)} classes are not in val and not scored'),
        (there & ~learnt, 'scored, but not in train'),
    ):
        if found.any():
            names = ', '.join(own.index[found])
            remarks.append(f'{found.sum()} {what}: {names}')
    return problems, remarks


def _read(registry: Any, node: dict) -> tuple[list[str], str, Counts]:
    """Classes of a dataset, the unit of its labels, and these."""
    kind = registry.get(node['type'])
    bases = {x.__name__ for x in getattr(kind, '__mro__', ())}
    named = node.get('metainfo') or getattr(kind, 'METAINFO', {})
    classes = named.get('classes', ())
    classes = [classes] if isinstance(classes, str) else [*classes]
    if 'XMLDataset' in bases:
        return classes, 'objects', _xml(node)
    if 'CocoDataset' in bases:
        return classes, 'objects', _coco(node)
    if 'BaseSegDataset' in bases:
        dataset = registry.build({**node, 'pipeline': []})
        classes = [*dataset.metainfo['classes']]
        return classes, 'pixels', _masks(dataset, classes)
    if hasattr(kind, 'get_gt_labels'):  # mmpretrain's
        dataset = registry.build({**node, 'pipeline': []})
        classes = [*(dataset.metainfo.get('classes') or classes)]
        labels = Counter(np.ravel(dataset.get_gt_labels()).tolist())
        names, where = dict(enumerate(classes)), str(node.get('data_root'))
        found = ((names.get(i, str(i)), x, where) for i, x in labels.items())
        return classes, 'images', found
    return [], '', []


def _xml(node: dict) -> Counts:
    root = Path(node.get('data_root') or '')
    folder = root / node.get('data_prefix', {}).get('sub_data_root', '')
    listed = (root / node['ann_file']).read_text(encoding='utf-8')
    for name in filter(None, map(str.strip, listed.splitlines())):
        path = folder / node.get('ann_subdir', 'Annotations') / f'{name}.xml'
        for item in ET.parse(path).getroot().iterfind('object/name'):
            yield item.text or '', 1, str(path)


def _coco(node: dict) -> Counts:
    path = Path(node.get('data_root') or '', node['ann_file'])
    content = json.loads(path.read_text(encoding='utf-8'))
    names = {x['id']: x['name'] for x in content['categories']}
    labels = Counter(x['category_id'] for x in content['annotations'])
    for i, count in labels.items():
        yield names.get(i, f'category {i}'), count, str(path)


def _masks(dataset: Any, classes: list[str]) -> Iterator[tuple[str, int, str]]:
    names = {**dict(enumerate(classes)), dataset.ignore_index: IGNORED}
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        path = info['seg_map_path']
        with Image.open(path) as image:
            mask = np.asarray(image)
        if mask.ndim != 2:
            raise LabelError(
                f'"{path}" is a colour image; a mask has one channel, with '
                f'the number of a class in each pixel, 0 to {len(classes) - 1}'
            )
        counts = np.bincount(mask.ravel())
        for value in np.flatnonzero(counts).tolist():
            label = (info.get('label_map') or {}).get(value, value)
            if dataset.reduce_zero_label:
                label = 255 if label in (0, 255) else label - 1
            yield names.get(label, str(value)), int(counts[value]), path
