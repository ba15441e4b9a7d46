# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Write composed scenes as COCO, PASCAL VOC 2012 and Cityscapes lay them out.

All of it follows from one map of instances a scene.
"""
import io
import json
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Tuple
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont
from pycocotools import mask as coco_mask

GROUND = 'ground'  # Cityscapes has a class for every pixel


class Scene(NamedTuple):
    """A picture and what is in it.

    Args:
        name (str): Starts with its split.
        image (np.ndarray): RGB, (H, W, 3).
        owner (np.ndarray): (H, W). 0 is ground, k shows object k.
        labels (List[int]): Class of each object, from 0.
    """
    name: str
    image: np.ndarray
    owner: np.ndarray
    labels: List[int]

    def objects(self):
        """Yield (label, mask of the visible part) of each object."""
        for number, label in enumerate(self.labels, 1):
            yield label, self.owner == number

    def semantic(self) -> np.ndarray:
        """Class of each pixel: 0 is ground, others are label + 1."""
        return np.array([0, *(x + 1 for x in self.labels)],
                        dtype=np.uint8)[self.owner]

    def jpeg(self) -> bytes:
        """The picture as all layouts have it (VOC demands JPEG)."""
        buffer = io.BytesIO()
        Image.fromarray(self.image).save(
            buffer, 'JPEG', quality=95, subsampling=0)
        return buffer.getvalue()


Splits = Dict[str, List[Scene]]


def extent(mask: np.ndarray) -> Tuple[int, int, int, int]:
    """Left, top, right, bottom of a mask; the last two are outside of it."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1,
            int(rows[-1]) + 1)


def voc_palette() -> List[int]:
    """VOC's colours: bits of the index, in turn to red, green and blue."""
    return [
        sum(((index >> (3 * bit + channel)) & 1) << (7 - bit)
            for bit in range(8)) for index in range(256)
        for channel in range(3)
    ]


def write_coco(root: Path, splits: Splits, classes: Sequence[str]) -> None:
    """Pictures, and boxes and exact masks of the visible parts."""
    (root / 'annotations').mkdir(parents=True)
    for split, scenes in splits.items():
        folder = root / f'{split}2017'
        folder.mkdir()
        images, annotations = [], []
        for image_id, scene in enumerate(scenes, 1):
            file_name = f'{scene.name}.jpg'
            (folder / file_name).write_bytes(scene.jpeg())
            height, width = scene.owner.shape
            images.append(
                dict(
                    id=image_id,
                    file_name=file_name,
                    width=width,
                    height=height))
            for label, mask in scene.objects():
                left, top, right, bottom = extent(mask)
                rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=image_id,
                        category_id=label + 1,
                        bbox=[left, top, right - left, bottom - top],
                        area=int(mask.sum()),
                        segmentation=dict(
                            size=rle['size'], counts=rle['counts'].decode()),
                        iscrowd=0))
        categories = [
            dict(id=i, name=name) for i, name in enumerate(classes, 1)
        ]
        (root / f'annotations/instances_{split}2017.json').write_text(
            json.dumps(
                dict(
                    images=images,
                    annotations=annotations,
                    categories=categories)),
            encoding='utf-8')


def _voc_annotation(scene: Scene, classes: Sequence[str]) -> str:
    """The XML of a scene."""
    height, width = scene.owner.shape

    def add(parent, **values):
        for key, value in values.items():
            ElementTree.SubElement(parent, key).text = str(value)

    root = ElementTree.Element('annotation')
    add(root, folder='VOC2012', filename=f'{scene.name}.jpg')
    size = ElementTree.SubElement(root, 'size')
    add(size, width=width, height=height, depth=3)
    add(root, segmented=1)
    for label, mask in scene.objects():
        element = ElementTree.SubElement(root, 'object')
        add(element, name=classes[label], truncated=0, difficult=0)
        left, top, right, bottom = extent(mask)
        # Counted from 1, the last row and column belong to the box.
        add(ElementTree.SubElement(element, 'bndbox'),
            xmin=left + 1,
            ymin=top + 1,
            xmax=right,
            ymax=bottom)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding='unicode') + '\n'


def write_voc(root: Path, splits: Splits, classes: Sequence[str]) -> None:
    """Pictures, boxes and semantic maps; ``test`` is the scored split."""
    for name in ('JPEGImages', 'Annotations', 'SegmentationClass'):
        (root / name).mkdir(parents=True)
    palette = voc_palette()
    for scene in (scene for scenes in splits.values() for scene in scenes):
        (root / f'JPEGImages/{scene.name}.jpg').write_bytes(scene.jpeg())
        (root / f'Annotations/{scene.name}.xml').write_text(
            _voc_annotation(scene, classes), encoding='utf-8')
        semantic = Image.fromarray(scene.semantic())
        semantic.putpalette(palette)
        semantic.save(root / f'SegmentationClass/{scene.name}.png')
    names = {
        split: [scene.name for scene in scenes]
        for split, scenes in splits.items()
    }
    names.update(trainval=sum(names.values(), []), test=names['val'])
    for task in ('Main', 'Segmentation'):
        folder = root / 'ImageSets' / task
        folder.mkdir(parents=True)
        for key, value in names.items():
            (folder / f'{key}.txt').write_text(
                '\n'.join(value) + '\n', encoding='utf-8')
    (root / 'class_names.txt').write_text(
        '\n'.join(classes) + '\n', encoding='utf-8')


def write_cityscapes(root: Path, splits: Splits,
                     classes: Sequence[str]) -> None:
    """Pictures and maps of train ids; the ground is a class as well."""
    for split, scenes in splits.items():
        pictures, maps = (
            root / kind / split / 'demo' for kind in ('leftImg8bit', 'gtFine'))
        pictures.mkdir(parents=True)
        maps.mkdir(parents=True)
        for scene in scenes:
            # The pixels of the JPEG, so that all layouts show the same.
            Image.open(io.BytesIO(scene.jpeg())).save(
                pictures / f'{scene.name}_leftImg8bit.png')
            Image.fromarray(scene.semantic()).save(
                maps / f'{scene.name}_gtFine_labelTrainIds.png')
    (root / 'class_names.txt').write_text(
        '\n'.join([GROUND, *classes]) + '\n', encoding='utf-8')


def _draw_labels(scene: Scene, classes: Sequence[str],
                 zoom: int) -> Image.Image:
    """A scene, enlarged, with outlines and names."""
    owner = scene.owner.repeat(zoom, 0).repeat(zoom, 1)
    pixels = scene.image.repeat(zoom, 0).repeat(zoom, 1)
    colours = [
        ImageColor.getrgb(f'hsl({360 * i // len(classes)}, 100%, 65%)')
        for i in range(len(classes))
    ]
    # Each object's own rim, two pixels wide.
    inner = np.ones_like(owner, dtype=bool)
    for axis in (0, 1):
        for step in (-2, 2):
            inner &= owner == np.roll(owner, step, axis)
    for number, label in enumerate(scene.labels, 1):
        pixels[(owner == number) & ~inner] = colours[label]
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default()
    for label, mask in scene.objects():
        # In the row and the middle of the column where it is widest.
        row = int(mask.sum(axis=1).argmax())
        column = int(np.median(np.flatnonzero(mask[row])))
        left, top, right, bottom = font.getbbox(classes[label])
        x = column * zoom - (left + right) // 2
        y = row * zoom - (top + bottom) // 2
        draw.rectangle(
            (x + left - 3, y + top - 2, x + right + 3, y + bottom + 2),
            (0, 0, 0))
        draw.text((x, y), classes[label], colours[label], font)
    return image


def draw_overview(splits: Splits,
                  classes: Sequence[str],
                  columns: int = 6,
                  rows: int = 2,
                  zoom: int = 2) -> Image.Image:
    """The first scenes of each split, for the eye.

    Args:
        splits (Dict[str, List[Scene]]): The scenes.
        classes (Sequence[str]): Names.
        columns (int): Scenes side by side. Defaults to 6.
        rows (int): Of scenes for each split. Defaults to 2.
        zoom (int): Enlarges each pixel. Defaults to 2.
    """
    gap, title = 8, 24
    side = zoom * len(next(iter(splits.values()))[0].owner) + gap
    block = title + rows * side
    sheet = Image.new('RGB', (columns * side + gap, len(splits) * block + gap),
                      (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for number, (split, scenes) in enumerate(splits.items()):
        draw.text((gap, number * block + gap), split, (0, 0, 0))
        for i, scene in enumerate(scenes[:columns * rows]):
            place = (gap + i % columns * side,
                     number * block + title + i // columns * side)
            sheet.paste(_draw_labels(scene, classes, zoom), place)
    return sheet
