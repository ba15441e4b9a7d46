# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""A picture or two in the layout of VOC, COCO and Cityscapes."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

WIDTH, HEIGHT = 96, 64
# x1, y1, x2, y2 of the one object of each picture.
BOX = (16, 12, 71, 51)

VOC_XML = """<annotation>
<size><width>{width}</width><height>{height}</height></size>
<object><name>dog</name><difficult>0</difficult><bndbox>
<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>
</bndbox></object></annotation>"""


def write_picture(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def write_mask(path: Path, label: int) -> None:
    """The object's label in its box, 0 around it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    x1, y1, x2, y2 = BOX
    mask[y1:y2, x1:x2] = label
    Image.fromarray(mask).save(path)


def write_voc(root: Path) -> None:
    """VOC2007 and VOC2012 with boxes, VOC2012 with masks and aug."""
    lists = {
        ('VOC2007', 'Main', 'trainval'): ['000001'],
        ('VOC2007', 'Main', 'test'): ['000002'],
        ('VOC2012', 'Main', 'trainval'): ['2008_000001'],
        ('VOC2012', 'Segmentation', 'train'): ['2008_000001'],
        ('VOC2012', 'Segmentation', 'aug'): ['2008_000002'],
        ('VOC2012', 'Segmentation', 'val'): ['2008_000003'],
    }
    for seed, ((year, task, split), names) in enumerate(lists.items()):
        path = root / year / 'ImageSets' / task / f'{split}.txt'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('\n'.join(names) + '\n')
        for name in names:
            write_picture(root / year / 'JPEGImages' / f'{name}.jpg', seed)
            if task == 'Main':
                xml = root / year / 'Annotations' / f'{name}.xml'
                xml.parent.mkdir(exist_ok=True)
                xml.write_text(
                    VOC_XML.format(*BOX, width=WIDTH, height=HEIGHT)
                )
            else:
                folder = 'SegmentationClass' + 'Aug' * (split == 'aug')
                write_mask(root / year / folder / f'{name}.png', 12)


def write_coco(root: Path, classes: tuple[str, ...]) -> None:
    """train2017, its 10% file, and val2017.

    The 10% file holds the second picture only, so that a test can tell.
    """
    x1, y1, x2, y2 = BOX
    label = dict(
        category_id=18,
        bbox=[x1, y1, x2 - x1, y2 - y1],
        area=(x2 - x1) * (y2 - y1),
        segmentation=[[x1, y1, x2, y1, x2, y2, x1, y2]],
        iscrowd=0,
    )
    names = dict(train2017=[1, 2], val2017=[3], train2017_10pct_seed0=[2])
    (root / 'annotations').mkdir(parents=True)
    for split, ids in names.items():
        images, annotations = [], []
        for i in ids:
            name = f'{i:012d}.jpg'
            write_picture(root / split.partition('_')[0] / name, i)
            size = dict(width=WIDTH, height=HEIGHT)
            images.append(dict(id=i, file_name=name, **size))
            annotations.append(dict(label, id=i, image_id=i))
        content = dict(images=images, annotations=annotations)
        categories = [dict(id=i, name=x) for i, x in enumerate(classes, 1)]
        path = root / 'annotations' / f'instances_{split}.json'
        path.write_text(json.dumps(dict(content, categories=categories)))


def write_cityscapes(root: Path) -> None:
    places = [('train', 'ulm'), ('train', 'bonn'), ('val', 'frankfurt')]
    for seed, (split, city) in enumerate(places):
        image, mask = (
            root / kind / split / city / f'{city}_000000_000019_{kind}'
            for kind in ('leftImg8bit', 'gtFine')
        )
        write_picture(image.with_suffix('.png'), seed)
        write_mask(mask.with_name(f'{mask.name}_labelTrainIds.png'), 13)
