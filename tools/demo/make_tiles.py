# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Cut the photographs inside the scikit-image and scikit-learn wheels.

About two hundred small real pictures without a download, always the same ones.
They show only what no scene for scoring shows (make_scenes.py).
"""
import argparse
from pathlib import Path
from typing import List

from photographs import PHOTOGRAPHS, TRAIN, fill, load_region
from PIL import Image


def cut(image: Image.Image, size: int, stride: int):
    """Yield (name, tile) on a grid that covers the picture evenly."""
    columns, rows = ((side - size) // stride + 1
                     for side in (image.width, image.height))
    for row in range(rows):
        for column in range(columns):
            # Spread what does not divide over the gaps.
            left = (image.width - size) * column // max(1, columns - 1)
            top = (image.height - size) * row // max(1, rows - 1)
            tile = image.crop((left, top, left + size, top + size))
            yield f'{row:02d}_{column:02d}.png', tile


def write_tiles(out_dir: Path, size: int, stride: int) -> List[str]:
    """Write a folder of tiles for each photograph; say what was written."""
    lines = []
    for name, photograph in PHOTOGRAPHS.items():
        folder = out_dir / name
        folder.mkdir()
        tiles = list(cut(load_region(name, TRAIN), size, stride))
        for tile_name, tile in tiles:
            tile.save(folder / tile_name)
        lines.append(f'{name}: {len(tiles)} tiles, {photograph.licence}')
    print('\n'.join(lines))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out_dir', type=Path, help='folder for the tiles')
    parser.add_argument(
        '--size', type=int, default=160, help='side of a tile in pixels')
    parser.add_argument(
        '--stride', type=int, default=70, help='step between tiles in pixels')
    args = parser.parse_args()

    stamp = (f'Tiles of {args.size} px every {args.stride} px, of the regions '
             'for training (version 2).')
    if fill(args.out_dir, stamp,
            lambda folder: write_tiles(folder, args.size, args.stride)):
        count = len(list(args.out_dir.glob('*/*.png')))
        print(f'{args.out_dir}: {count} tiles of {len(PHOTOGRAPHS)} '
              'photographs')
    else:
        print(f'{args.out_dir}: the tiles are there already')


if __name__ == '__main__':
    main()
