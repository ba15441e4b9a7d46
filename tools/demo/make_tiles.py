# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Cut the photographs inside the scikit-image and scikit-learn wheels.

A few hundred small real pictures without a download, always the same ones.
"""
import argparse
from pathlib import Path
from typing import Callable, Dict, Tuple

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_image

PUBLIC_DOMAIN = 'public domain'
CC0 = 'CC0 1.0'
# name -> (loader, licence and author as their docstrings or READMEs name it,
#          share of the photograph's size that is kept)
PHOTOGRAPHS: Dict[str, Tuple[Callable, str, float]] = {
    'astronaut': (skimage.data.astronaut, f'{PUBLIC_DOMAIN}, NASA', 1),
    'brick': (skimage.data.brick, f'{CC0}, CC0Textures', 0.75),
    'camera': (skimage.data.camera, f'{CC0}, Lav Varshney', 1),
    'cat': (skimage.data.cat, f'{CC0}, Stefan van der Walt', 1),
    'china': (lambda: load_sample_image('china.jpg'),
              'CC BY 2.0, danielbuechele on Flickr', 1),
    'clock': (skimage.data.clock, f'{PUBLIC_DOMAIN}, Stefan van der Walt', 1),
    'coffee': (skimage.data.coffee, f'{CC0}, Rachel Michetti', 1),
    'coins': (skimage.data.coins, 'no known restrictions', 1),
    'flower': (lambda: load_sample_image('flower.jpg'),
               'CC BY 2.0, vultilion on Flickr', 1),
    'grass': (skimage.data.grass, f'{CC0}, DeTexturePro', 0.75),
    'gravel': (skimage.data.gravel, f'{CC0}, CC0Textures', 0.75),
    'hubble': (skimage.data.hubble_deep_field, f'{PUBLIC_DOMAIN}, NASA', 0.7),
    'ihc': (skimage.data.immunohistochemistry, 'no known restrictions', 0.75),
    'retina': (skimage.data.retina, f'{CC0}, Hagstrom et al.', 0.5),
    'rocket': (skimage.data.rocket, f'{PUBLIC_DOMAIN}, SpaceX', 1),
}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out_dir', type=Path, help='folder for the tiles')
    parser.add_argument(
        '--size', type=int, default=160, help='side of a tile in pixels')
    parser.add_argument(
        '--stride', type=int, default=100, help='step between tiles in pixels')
    args = parser.parse_args()

    done = args.out_dir / 'LICENSES.txt'
    stamp = f'Tiles of {args.size} px every {args.stride} px.'
    if done.is_file() and done.read_text().startswith(stamp):
        print(f'{args.out_dir}: the tiles are there already')
        return
    count, lines = 0, [stamp]
    for name, (load, licence, scale) in PHOTOGRAPHS.items():
        image = Image.fromarray(np.asarray(load())).convert('RGB')
        image = image.resize([round(side * scale) for side in image.size],
                             Image.Resampling.LANCZOS)
        folder = args.out_dir / name
        folder.mkdir(parents=True, exist_ok=True)
        for number, (tile_name,
                     tile) in enumerate(cut(image, args.size, args.stride), 1):
            tile.save(folder / tile_name)
        count += number
        lines.append(f'{name}: {number} tiles, {licence}')
    # Written last: its presence says that the tiles are complete.
    done.write_text('\n'.join(lines) + '\n')
    print('\n'.join(lines))
    print(f'{args.out_dir}: {count} tiles of {len(PHOTOGRAPHS)} photographs')


if __name__ == '__main__':
    main()
