# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Cut the photographs inside some wheels into tiles, at two scales.

About three thousand small images without a download, always the same ones.
They show only what no scene for scoring shows (make_scenes.py).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from photographs import PHOTOGRAPHS, TRAIN, fill, load_region
from PIL import Image

SCALES = (1, 2)  # the photograph is shrunk by


def cut(
    image: Image.Image, size: int, stride: int
) -> Iterator[tuple[str, Image.Image]]:
    """Yield (name, tile) on a grid that covers the image evenly."""
    columns, rows = (
        max(1, (side - size) // stride + 1) for side in image.size
    )
    for row in range(rows):
        for column in range(columns):
            # Spread what does not divide over the gaps.
            left = (image.width - size) * column // max(1, columns - 1)
            top = (image.height - size) * row // max(1, rows - 1)
            box = (
                left,
                top,
                min(left + size, image.width),
                min(top + size, image.height),
            )
            yield f'{row:02d}_{column:02d}.jpg', image.crop(box)


def write_tiles(out_dir: Path, size: int, stride: int) -> list[str]:
    """Write a folder of tiles for each photograph; say what was written."""
    lines = []
    for name, photograph in PHOTOGRAPHS.items():
        folder = out_dir / name
        folder.mkdir()
        region = load_region(name, TRAIN)
        for scale in SCALES:
            for tile_name, tile in cut(region.reduce(scale), size, stride):
                tile.save(folder / f'{scale}_{tile_name}', quality=95)
        count = len(list(folder.iterdir()))
        lines.append(f'{name}: {count} tiles, {photograph.licence}')
    print('\n'.join(lines))
    return lines


def main() -> None:
    """Write the tiles, unless they are there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out_dir', type=Path, help='folder for the tiles')
    parser.add_argument(
        '--size', type=int, default=96, help='side of a tile in pixels'
    )
    parser.add_argument(
        '--stride', type=int, default=32, help='step between tiles in pixels'
    )
    args = parser.parse_args()

    stamp = (
        f'Tiles of {args.size} px every {args.stride} px, of the regions '
        'for training (version 3).'
    )
    if fill(
        args.out_dir,
        stamp,
        lambda folder: write_tiles(folder, args.size, args.stride),
    ):
        count = len(list(args.out_dir.glob('*/*.jpg')))
        print(
            f'{args.out_dir}: {count} tiles of {len(PHOTOGRAPHS)} photographs'
        )
    else:
        print(f'{args.out_dir}: the tiles are there already')


if __name__ == '__main__':
    main()
