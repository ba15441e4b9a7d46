# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Draw the dense features of images.

As colours and segments, in a PNG, and with the nearest patches of any patch of
the first image, in an HTML page that works offline.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import torch
from mmengine.utils import track_iter_progress
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from mmdensecl import load_backbone
from mmdensecl.datasets.folder import search_folder
from mmdensecl.datasets.unlabeled import IMG_EXTENSIONS
from mmdensecl.engine.command_line import (
    add_config_options,
    load_config,
    run_quietly,
)
from mmdensecl.transfer.feature_extractor import as_rgb
from mmdensecl.visualization.dense_maps import (
    draw_maps,
    extract_map,
    nearest_patches,
    pca_colors,
    segments,
)
from mmdensecl.visualization.features_page import clean, features_page

SHEET = 5  # images in features.png


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', help='train config file path')
    add(
        'checkpoint',
        help="any file with a backbone, or 'none' for random weights",
    )
    add('images', type=Path, help='an image or a folder')
    add(
        '--output-dir',
        type=Path,
        default='features',
        help='folder for features.png and index.html',
    )
    add('--size', type=int, default=320, help='shorter side in pixels')
    add(
        '--margin',
        type=int,
        default=2,
        help='rings of outer cells to cut off, and the image there: zero '
        'padding makes them alike whatever they show',
    )
    add('--segments', type=int, default=6, help='of the k-means')
    add('--neighbours', type=int, default=8, help='nearest patches to show')
    add(
        '--max-images',
        type=int,
        default=64,
        help='images of a folder, evenly spaced; memory and the page grow '
        'with them',
    )
    add('--seed', type=int, default=0)
    add('--device', default='cpu')
    add_config_options(parser)
    args = parser.parse_args()
    least = dict(size=16, margin=0, segments=1, neighbours=1, max_images=1)
    for name, value in least.items():
        if getattr(args, name) < value:
            flag = name.replace('_', '-')
            parser.error(
                f'--{flag} must be at least {value}, got {getattr(args, name)}'
            )
    if args.segments > 20:
        parser.error(
            '--segments must be at most 20, or colours repeat, got '
            f'{args.segments}'
        )
    return args


def list_files(args: argparse.Namespace) -> list[Path]:
    """The files to draw.

    Raises:
        FileNotFoundError: There are none.
    """
    if not args.images.is_dir():
        return [args.images]
    names = search_folder(args.images)
    if not names:
        raise FileNotFoundError(
            f'No images in "{args.images}". Expected files that end in one of '
            f'{", ".join(IMG_EXTENSIONS)}'
        )
    count = min(args.max_images, len(names))
    kept = np.linspace(0, len(names) - 1, count).round().astype(int)
    return [args.images / names[i] for i in kept]


def read_images(files: list[Path], size: int) -> list[tuple[str, Tensor]]:
    """Names and images of the files that can be read; prints the others.

    Raises:
        ValueError: None can.
    """
    found, broken = [], []
    for file in files:
        # A name that can be written, whatever its bytes are.
        name = clean(os.fsencode(file.name).decode('utf-8', 'replace'))
        try:
            found.append((name, as_rgb(file, size)))
        except (ValueError, OSError) as error:
            broken.append(f'"{file}": {error}')
    if not found:
        raise ValueError(f'no image that can be read: {broken[0]}')
    for message in broken[:5]:
        print(f'left out: {message}')
    if len(broken) > 5:
        print(f'left out: {len(broken) - 5} more')
    return found


def run(args: argparse.Namespace) -> None:
    """Extract, draw, write."""
    cfg = load_config(args)
    files = list_files(args)
    path = None if args.checkpoint == 'none' else args.checkpoint
    backbone = load_backbone(path, device=args.device, config=cfg)
    names, whole = zip(*read_images(files, args.size), strict=True)
    if path is None:
        squares = [F.center_crop(x, [args.size] * 2) for x in whole]
        backbone = backbone.untrained(torch.stack(squares), args.seed)
    found = [
        extract_map(backbone, x, args.margin)
        for x in track_iter_progress(list(whole))
    ]
    print()
    images, maps = [x.image for x in found], [x.map for x in found]
    colors = pca_colors(maps, args.seed)
    labels = segments(maps, args.segments, args.seed)
    sheet: tuple = images, names, colors, labels
    figure = draw_maps(*(x[:SHEET] for x in sheet))
    nearest = None
    if len(names) > 1:
        nearest = nearest_patches(maps, 0, args.neighbours)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output_dir / 'features.png', dpi=100)
    print(f'Wrote {args.output_dir / "features.png"}')
    page = args.output_dir / 'index.html'
    about = (
        f'{len(names)} images of {clean(args.images)}, features of '
        f'{clean(args.checkpoint)}.'
    )
    rows, columns = maps[0].shape[:2]
    middle = rows // 2, columns // 2
    photos = [Image.fromarray(x) for x in images]
    page.write_text(
        features_page(photos, names, colors, labels, nearest, middle, about),
        encoding='utf-8',
    )
    print(f'Wrote {page}')


def main() -> None:
    """Run the tool."""
    run_quietly(run, parse_args())


if __name__ == '__main__':
    main()
