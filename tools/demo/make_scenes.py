# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Compose labelled gardens seen from above, for segmentation.

A gravel path and a brick terrace cross a lawn; bushes, flowers, pages and
coins lie on them, all cut from photographs. The scenes for scoring are made of
other regions of the photographs than the scenes for training and the tiles of
make_tiles.py. They are grey, as half of the photographs are. The layout is
that of PASCAL VOC's segmentation; the lawn is its background.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np
from photographs import PHOTOGRAPHS, SPLITS, fill, load_region
from PIL import Image
from scipy import ndimage

COLORS = dict(
    lawn=(110, 165, 85),
    gravel=(215, 190, 150),
    brick=(180, 70, 55),
    bush=(20, 95, 50),
    flower=(240, 120, 200),
    page=(70, 130, 240),
    coin=(250, 210, 30),
)
CLASSES = tuple(COLORS)[1:]
# What each is cut from: a photograph, and the boxes (left, top, right, bottom)
# in its two regions that show nothing else; None is all of it.
SOURCES = dict(
    lawn=('grass', None, None),
    gravel=('gravel', None, None),
    brick=('brick', None, None),
    bush=('china', (0, 345, 240, 427), (0, 310, 224, 427)),
    flower=('flower', (200, 110, 307, 330), (0, 110, 110, 330)),
    page=('page', None, None),
    coin=('coins', None, None),
)
# What lies on the ground: the smallest and the largest side of a kind as a
# share of the scene's.
SIDES = dict(
    bush=(0.3, 0.5), flower=(0.25, 0.4), page=(0.3, 0.45), coin=(0.2, 0.35)
)
OBJECTS = (2, 5)
SCALE = (0.7, 1.2)  # of a photograph's size
# Grey levels, so that neither brightness nor contrast tells a class.
MEAN, STD = (90, 160), (25, 50)
SHADOW = 0.6
MIN_SIZE = 64

Stamp = tuple[np.ndarray, np.ndarray]  # pixels and mask, (H, W)


class Scene(NamedTuple):
    """An image, uint8 (H, W), and the class of each pixel, 0 is lawn."""

    name: str
    image: np.ndarray
    labels: np.ndarray


def cut_coins(image: np.ndarray) -> list[Stamp]:
    """Find the whole coins on the dark cloth, uint8 (H, W)."""
    smooth = ndimage.gaussian_filter(image.astype(float), 2)
    # The cloth is lighter at the top.
    bright = smooth > ndimage.gaussian_filter(smooth, 40) * 0.9 + 15
    parts, _ = ndimage.label(ndimage.binary_fill_holes(bright))
    coins = []
    for number, box in enumerate(ndimage.find_objects(parts), 1):
        mask = parts[box] == number
        whole = all(
            x.start > 0 and x.stop < side
            for x, side in zip(box, image.shape, strict=True)
        )
        if whole and mask.sum() > 400:
            coins.append((image[box], mask))
    return coins


def draw_piece(
    region: Image.Image, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Cut a square from a region: random scale, quarter turn and place."""
    scale = rng.uniform(*SCALE)
    pixels = np.asarray(
        region.resize(
            [round(x * scale) for x in region.size], Image.Resampling.LANCZOS
        )
    )
    pixels = np.rot90(pixels, int(rng.integers(4)))
    # Mirrored where the region ends.
    pixels = np.pad(
        pixels, [(0, max(0, size - x)) for x in pixels.shape], 'symmetric'
    )
    top, left = (rng.integers(x - size, endpoint=True) for x in pixels.shape)
    return pixels[top : top + size, left : left + size]


def relight(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Give pixels another mean and standard deviation."""
    found = pixels.astype(float)
    found = (found - found.mean()) / max(found.std(), 1)
    return (rng.uniform(*MEAN) + rng.uniform(*STD) * found).clip(0, 255)


def draw_path(size: int, rng: np.random.Generator) -> np.ndarray:
    """Mask of a winding path from side to side."""
    across, along = np.mgrid[:size, :size] / size
    waves, phase = rng.uniform(0.5, 1.2), rng.uniform(0, 2 * np.pi)
    middle = rng.uniform(0.2, 0.8) + rng.uniform(0.03, 0.12) * np.sin(
        2 * np.pi * waves * along + phase
    )
    mask = abs(across - middle) < rng.uniform(0.1, 0.18)
    return mask.T if rng.integers(2) else mask


def draw_terrace(size: int, rng: np.random.Generator) -> np.ndarray:
    """Mask of a terrace in a corner."""
    y, x = np.mgrid[:size, :size] / size - 0.5
    angle = rng.uniform(0, 2 * np.pi)
    u = x * np.cos(angle) + y * np.sin(angle)
    v = y * np.cos(angle) - x * np.sin(angle)
    return (u > rng.uniform(-0.1, 0.2)) & (v > rng.uniform(-0.3, 0.1))


def draw_outline(name: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Mask of a bush, a flower or a page in a square."""
    y, x = np.mgrid[:size, :size] * 2 / (size - 1) - 1
    angle, phase = np.arctan2(y, x), rng.uniform(0, 2 * np.pi, 3)
    if name == 'page':
        return (abs(x) < 0.58) & (abs(y) < 0.8)
    if name == 'flower':
        radius = 0.85 + 0.12 * abs(np.cos(5 * angle + phase[0]))
    else:
        radius = 0.75 + sum(
            np.cos(waves * angle + p) / 12
            for waves, p in zip((2, 3, 8), phase, strict=True)
        )
    return np.hypot(x, y) < radius


class Garden:
    """Composes the scenes of a split.

    Args:
        split: ``'train'`` or ``'val'``.
        size: Side of a scene in pixels.
    """

    def __init__(self, split: str, size: int) -> None:
        self.split, self.size = split, size
        self.regions = {}
        for name, (photograph, *boxes) in SOURCES.items():
            region = load_region(photograph, split).convert('L')
            self.regions[name] = region.crop(boxes[SPLITS.index(split)])
        self.coins = cut_coins(np.asarray(self.regions['coin']))

    def draw_object(
        self, name: str, side: int, rng: np.random.Generator
    ) -> Stamp:
        """Draw an object of a class in a square."""
        if name == 'coin':
            pixels, mask = self.coins[rng.integers(len(self.coins))]
        else:
            pixels = draw_piece(self.regions[name], side, rng)
            mask = draw_outline(name, side, rng)
        turn = rng.uniform(0, 360)
        pixels, mask = (
            np.asarray(Image.fromarray(x).resize((side, side)).rotate(turn))
            for x in (pixels, mask)
        )
        return pixels, mask

    def compose(self, number: int, seed: int) -> Scene:
        """Compose a scene, by random numbers of its own."""
        rng = np.random.default_rng([seed, SPLITS.index(self.split), number])
        image = np.zeros((self.size, self.size), np.uint8)
        labels = np.zeros_like(image)

        def paint(
            name: str,
            pixels: np.ndarray,
            mask: np.ndarray,
            top: int = 0,
            left: int = 0,
        ) -> None:
            place = np.s_[top : top + len(mask), left : left + len(mask)]
            image[place][mask] = relight(pixels[mask], rng)
            labels[place][mask] = tuple(COLORS).index(name)

        def ground(name: str) -> np.ndarray:
            return draw_piece(self.regions[name], self.size, rng)

        paint('lawn', ground('lawn'), np.ones_like(image, bool))
        paint('gravel', ground('gravel'), draw_path(self.size, rng))
        paint('brick', ground('brick'), draw_terrace(self.size, rng))
        for _ in range(rng.integers(*OBJECTS, endpoint=True)):
            name = rng.choice(list(SIDES))
            side = round(self.size * rng.uniform(*SIDES[name]))
            pixels, mask = self.draw_object(name, side, rng)
            top, left = rng.integers(self.size - side, size=2, endpoint=True)
            # The sun is in the upper left.
            far = max(1, self.size // 64)
            shade = image[
                top + far : top + far + side, left + far : left + far + side
            ]
            under = mask[: len(shade), : shade.shape[1]]
            shade[under] = shade[under] * SHADOW
            paint(name, pixels, mask, top, left)
        return Scene(f'{self.split}_{number:04d}', image, labels)


def write_voc(root: Path, split: str, scenes: list[Scene]) -> None:
    """Write images, masks and list of a split."""
    lists = root / 'ImageSets/Segmentation'
    for folder in (root / 'JPEGImages', root / 'SegmentationClass', lists):
        folder.mkdir(parents=True, exist_ok=True)
    for scene in scenes:
        Image.fromarray(scene.image).convert('RGB').save(
            root / f'JPEGImages/{scene.name}.jpg', quality=95, subsampling=0
        )
        mask = Image.fromarray(scene.labels)
        mask.putpalette([x for color in COLORS.values() for x in color])
        mask.save(root / f'SegmentationClass/{scene.name}.png')
    names = '\n'.join(scene.name for scene in scenes)
    (lists / f'{split}.txt').write_text(f'{names}\n', encoding='utf-8')
    (root / 'class_names.txt').write_text(
        '\n'.join(CLASSES) + '\n', encoding='utf-8'
    )


def write_scenes(out_dir: Path, args: argparse.Namespace) -> list[str]:
    """Compose all scenes and write them."""
    for split in SPLITS:
        garden = Garden(split, args.size)
        scenes = [
            garden.compose(i, args.seed) for i in range(getattr(args, split))
        ]
        write_voc(out_dir / 'VOCdevkit/VOC2012', split, scenes)
    return [
        f'{name}: {photograph}, {PHOTOGRAPHS[photograph].licence}'
        for name, (photograph, *_) in SOURCES.items()
    ]


def main() -> None:
    """Write the scenes, unless they are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out_dir', type=Path, help='folder for the scenes')
    parser.add_argument(
        '--train', type=int, default=96, help='scenes for training'
    )
    parser.add_argument('--val', type=int, default=48, help='and for scoring')
    parser.add_argument(
        '--size', type=int, default=320, help='side of a scene in pixels'
    )
    parser.add_argument('--seed', type=int, default=0, help='fixes the scenes')
    args = parser.parse_args()
    if min(args.train, args.val) < 1 or args.size < MIN_SIZE or args.seed < 0:
        parser.error(
            f'got --train {args.train} --val {args.val} --size '
            f'{args.size} --seed {args.seed}; expected at least one '
            f'scene each, of {MIN_SIZE} px or more, and no negative '
            'seed'
        )

    stamp = (
        f'Scenes of {args.size} px, {args.train} for training and '
        f'{args.val} for scoring, seed {args.seed} (version 3).'
    )
    if fill(args.out_dir, stamp, lambda folder: write_scenes(folder, args)):
        print(f'{args.out_dir}: {args.train + args.val} scenes')
    else:
        print(f'{args.out_dir}: the scenes are there already')


if __name__ == '__main__':
    main()
