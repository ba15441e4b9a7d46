# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Compose labelled scenes of photographs, for detection and segmentation.

Pieces of some photographs lie on pieces of others. The class of an object is
the photograph that it is cut from: texture tells it, its outline does not, and
colour would tell too much, so that scenes are grey. The scenes for scoring are
made of other regions of the photographs than the scenes for training and the
tiles of make_tiles.py. The same scenes are written as COCO, as PASCAL VOC 2012
and as Cityscapes.
"""
import argparse
from pathlib import Path
from typing import Dict, List, Tuple

import numpy as np
from photographs import PHOTOGRAPHS, TRAIN, VAL, fill, load_region
from PIL import Image, ImageDraw
from scene_layouts import (Scene, draw_overview, write_cityscapes, write_coco,
                           write_voc)

# Textures that look alike in both of their regions.
CLASSES = ('brick', 'coins', 'grass', 'gravel', 'hubble', 'ihc', 'retina')
GROUNDS = ('astronaut', 'camera', 'cat', 'china', 'coffee', 'flower', 'rocket')
OBJECTS = (3, 6)  # tried; one that would hide others is left out
MIN_VISIBLE_PERCENT = 50  # of an object, where others lie on it
MIN_SIZE = 64
GROUND_SCALE = (70, 140)  # percent of the size that is kept
OBJECT_SCALE = (50, 100)  # a small piece must still show its texture
BRIGHTNESS_PERCENT = (65, 115)
CORNERS = 48  # of a smooth outline


def draw_patch(region: Image.Image, size: int, scale: Tuple[int, int],
               rng: np.random.Generator) -> np.ndarray:
    """A square piece of a region: random place, scale, flip, brightness."""
    limit = min(region.size)
    high, low = (min(limit, size * 100 // percent) for percent in scale)
    side = int(rng.integers(low, high, endpoint=True))
    left = int(rng.integers(region.width - side, endpoint=True))
    top = int(rng.integers(region.height - side, endpoint=True))
    patch = region.crop((left, top, left + side, top + side))
    patch = patch.resize((size, size), Image.Resampling.LANCZOS)
    if rng.integers(2):
        patch = patch.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    percent = rng.integers(*BRIGHTNESS_PERCENT, endpoint=True)
    bright = np.asarray(patch).astype(np.int64) * percent // 100
    return bright.clip(max=255).astype(np.uint8)


def draw_outline(size: int, rng: np.random.Generator) -> np.ndarray:
    """A random ellipse, polygon or smooth blob as a mask in a square."""
    kind = rng.integers(3)
    count = int(rng.integers(4, 9)) if kind == 1 else CORNERS
    turn = rng.integers(360)
    angle = np.deg2rad(turn + 360 / count * np.arange(count))
    if kind == 0:
        narrow = rng.integers(55, 101) / 100  # short axis over long axis
        along, across = np.cos(angle), np.sin(angle)
        radius = narrow / np.hypot(narrow * along, across)
        angle = angle + np.deg2rad(rng.integers(360))
    elif kind == 1:
        radius = rng.integers(70, 101, count) / 100
    else:
        radius = np.full(count, 0.75)
        for waves in (2, 3, 5):
            phase = np.deg2rad(rng.integers(360))
            radius += np.cos(waves * angle + phase) / 12
    middle = (size - 1) / 2
    corners = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    corners = (middle + middle * radius[:, None] * corners).round()
    mask = Image.new('1', (size, size))
    ImageDraw.Draw(mask).polygon(
        [tuple(corner) for corner in corners.astype(int).tolist()], fill=1)
    return np.asarray(mask)


def compose(name: str, regions: Dict[str, Image.Image], first: int, size: int,
            rng: np.random.Generator) -> Scene:
    """Put up to six objects on a ground, later ones on earlier ones.

    Args:
        name (str): Of the scene.
        regions (Dict[str, Image.Image]): Of the photographs, by name.
        first (int): Class of the lowest object.
        size (int): Side of the scene in pixels.
        rng (np.random.Generator): Decides all else.
    """
    ground = regions[GROUNDS[rng.integers(len(GROUNDS))]]
    image = draw_patch(ground, size, GROUND_SCALE, rng)
    owner = np.zeros((size, size), dtype=np.uint8)
    labels: List[int] = []
    whole: List[int] = []  # areas before others lay on them
    for _ in range(rng.integers(*OBJECTS, endpoint=True)):
        label = int(rng.integers(len(CLASSES))) if labels else first
        side = int(rng.integers(size // 3, size * 3 // 4, endpoint=True))
        patch = draw_patch(regions[CLASSES[label]], side, OBJECT_SCALE, rng)
        mask = draw_outline(side, rng)
        top, left = rng.integers(size - side, size=2, endpoint=True)
        place = np.s_[top:top + side, left:left + side]
        trial = owner.copy()
        trial[place][mask] = len(labels) + 1
        areas = [*whole, int(mask.sum())]
        visible = np.bincount(trial.ravel())[1:]
        # Leave it out where it would hide another one.
        if (100 * visible < MIN_VISIBLE_PERCENT * np.array(areas)).any():
            continue
        image[place][mask] = patch[mask]
        owner, whole = trial, areas
        labels.append(label)
    return Scene(name, image, owner, labels)


def compose_split(split: str, count: int, size: int, seed: int) -> List[Scene]:
    """All scenes of a split, each one by its own random numbers."""
    regions = {name: load_region(name, split) for name in CLASSES + GROUNDS}
    return [
        compose(f'{split}_{i:04d}', regions, i % len(CLASSES), size,
                np.random.default_rng([seed, (TRAIN, VAL).index(split), i]))
        for i in range(count)
    ]


def to_grey(scene: Scene) -> Scene:
    """Without colour, which even random weights tell apart."""
    grey = Image.fromarray(scene.image).convert('L').convert('RGB')
    return scene._replace(image=np.asarray(grey))


def write_scenes(out_dir: Path, args: argparse.Namespace) -> List[str]:
    """Compose all scenes and write them in all layouts."""
    counts = {TRAIN: args.train, VAL: args.val}
    scenes = {
        split: [
            to_grey(x)
            for x in compose_split(split, count, args.size, args.seed)
        ]
        for split, count in counts.items()
    }
    write_coco(out_dir / 'coco', scenes, CLASSES)
    write_voc(out_dir / 'VOCdevkit/VOC2012', scenes, CLASSES)
    write_cityscapes(out_dir / 'cityscapes', scenes, CLASSES)
    draw_overview(scenes, CLASSES).save(out_dir / 'overview.png')
    for split in scenes:
        objects = [CLASSES[x] for s in scenes[split] for x in s.labels]
        each = ', '.join(f'{objects.count(x)} {x}' for x in CLASSES)
        print(f'{split}: {counts[split]} scenes with {each}')
    return [
        f'{name}: {kind}, {PHOTOGRAPHS[name].licence}'
        for kind, names in (('class', CLASSES), ('ground', GROUNDS))
        for name in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out_dir', type=Path, help='folder for the scenes')
    parser.add_argument(
        '--train', type=int, default=96, help='scenes for training')
    parser.add_argument('--val', type=int, default=48, help='and for scoring')
    parser.add_argument(
        '--size', type=int, default=128, help='side of a scene in pixels')
    parser.add_argument('--seed', type=int, default=0, help='fixes the scenes')
    args = parser.parse_args()
    if min(args.train, args.val) < 1 or args.size < MIN_SIZE or args.seed < 0:
        parser.error(f'got --train {args.train} --val {args.val} --size '
                     f'{args.size} --seed {args.seed}; expected at least one '
                     f'scene each, of {MIN_SIZE} px or more, and no negative '
                     'seed')

    stamp = (f'Scenes of {args.size} px, {args.train} for training and '
             f'{args.val} for scoring, seed {args.seed} (version 2).')
    if fill(args.out_dir, stamp, lambda folder: write_scenes(folder, args)):
        print(f'{args.out_dir}: see overview.png')
    else:
        print(f'{args.out_dir}: the scenes are there already')


if __name__ == '__main__':
    main()
