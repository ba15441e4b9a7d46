# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Draw the dense features of images.

As colours, as segments, and by their nearest patches, in PNGs and one HTML
page that works offline.
"""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.utils import track_iter_progress
from PIL import Image
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
    ImageMap,
    Neighbours,
    draw_maps,
    extract_map,
    nearest_patches,
    pca_colors,
    segments,
)
from mmdensecl.visualization.features_page import clean, features_page

SHEET = 5  # images in features.png
MARK = 'deepskyblue'


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
        help='folder for features.png, neighbours.png and index.html',
    )
    add(
        '--patch',
        type=int,
        nargs=2,
        metavar=('X', 'Y'),
        help='pixel of the first image whose nearest patches are drawn; its '
        'middle by default',
    )
    add(
        '--first',
        help="which image of the folder is the first, such as 'a/b.jpg'; by "
        'default by name',
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


class Entry(NamedTuple):
    """An image and its features.

    Attributes:
        name: As it is shown.
        found: The image and its map, without the margin.
        box: Left, top, right and bottom of that, in pixels of the file.
    """

    name: str
    found: ImageMap
    box: np.ndarray


def list_files(args: argparse.Namespace) -> list[Path]:
    """The files to draw, the first one first.

    Raises:
        FileNotFoundError: There are none.
    """
    if not args.images.is_dir():
        if args.first:
            raise ValueError(
                f'--first chooses from a folder, "{args.images}" is none'
            )
        return [args.images]
    names = search_folder(args.images)
    if not names:
        raise FileNotFoundError(
            f'No images in "{args.images}". Expected files that end in one of '
            f'{", ".join(IMG_EXTENSIONS)}'
        )
    if args.first is not None:
        if args.first not in names:
            raise FileNotFoundError(
                f'--first {args.first}: no such image in "{args.images}"'
            )
        names.remove(args.first)
        names.insert(0, args.first)
    count = min(args.max_images, len(names))
    kept = np.linspace(0, len(names) - 1, count).round().astype(int)
    return [args.images / names[i] for i in kept]


def extract(backbone, path: Path, args: argparse.Namespace) -> Entry:
    """An image and its features."""
    whole = as_rgb(path)
    try:
        found = extract_map(backbone, as_rgb(whole, args.size), args.margin)
    except ValueError as error:
        raise ValueError(f'"{path}": {error}') from error
    # A name that can be written, whatever its bytes are.
    name = clean(os.fsencode(path.name).decode('utf-8', 'replace'))
    return Entry(name, found, found.box * ([*whole.shape[:0:-1]] * 2))


def squares(files: list[Path], size: int) -> torch.Tensor:
    """The middles of those images that can be read, as one batch."""
    found = []
    for file in files:
        try:
            found.append(F.center_crop(as_rgb(file, size), [size, size]))
        except (ValueError, OSError):  # which extract() reports
            if file == files[0]:
                raise
    return torch.stack(found)


def cell_of(entry: Entry, patch: list[int] | None) -> tuple[int, int]:
    """Row and column of the cell that holds a pixel of the file's image.

    Raises:
        ValueError: No cell does.
    """
    left, top, right, bottom = entry.box
    x, y = patch or ((left + right) / 2, (top + bottom) / 2)
    if not (left <= x < right and top <= y < bottom):
        raise ValueError(
            f'--patch {x} {y} is not in "{entry.name}" without its margin: x '
            f'from {left:.0f} to {right:.0f} and y from {top:.0f} to '
            f'{bottom:.0f} are'
        )
    rows, columns = entry.found.map.shape[:2]
    row = int((y - top) / (bottom - top) * rows)
    return row, int((x - left) / (right - left) * columns)


def draw_neighbours(
    entries: list[Entry], cell: tuple[int, int], found: Neighbours
) -> Figure:
    """The query patch, and the nearest in other images."""
    index = cell[0] * entries[0].found.map.shape[1] + cell[1]
    panels = [(0, index, 'query')]
    panels += [
        (number, place, f'{similarity:.2f}')
        for number, place, similarity in zip(
            *(x[index] for x in found), strict=True
        )
    ]
    across = min(5, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(
        figsize=(2.4 * across, 0.6 + 2.4 * down), layout='constrained'
    )
    axes = figure.subplots(down, across, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (number, place, words) in zip(axes.flat, panels, strict=False):
        entry = entries[number]
        ax.imshow(entry.found.image)
        shape = entry.found.map.shape[:2]
        height, width = np.divide(entry.found.image.shape[:2], shape)
        row, column = divmod(int(place), shape[1])
        corner = column * width, row * height
        style: dict = dict(fill=False, edgecolor=MARK, linewidth=2.5)
        ax.add_patch(Rectangle(corner, width, height, **style))
        ax.set_title(f'{words}, {entry.name}', fontsize=9, parse_math=False)
    figure.suptitle('Nearest patches in other images, by cosine similarity')
    return figure


def extract_all(
    backbone, files: list[Path], args: argparse.Namespace
) -> list[Entry]:
    """The entries of all files that can be read; the first must be."""
    entries, broken = [], []
    for file in track_iter_progress(files):
        try:
            entries.append(extract(backbone, file, args))
        except (ValueError, OSError) as error:
            if file == files[0]:
                raise
            broken.append(str(error))
    print()
    for message in broken[:5]:
        print(f'left out: {message}')
    if len(broken) > 5:
        print(f'left out: {len(broken) - 5} more')
    return entries


def run(args: argparse.Namespace) -> None:
    """Extract, draw, write."""
    cfg = load_config(args)
    files = list_files(args)
    if args.patch and len(files) < 2:
        raise ValueError(
            '--patch searches its nearest in other images; give a folder '
            'with at least two'
        )
    path = None if args.checkpoint == 'none' else args.checkpoint
    backbone = load_backbone(path, device=args.device, config=cfg)
    if path is None:
        backbone = backbone.untrained(squares(files, args.size), args.seed)
    entries = extract_all(backbone, files, args)
    names, found, _ = zip(*entries, strict=True)
    images, maps = [x.image for x in found], [x.map for x in found]
    colors = pca_colors(maps, args.seed)
    labels = segments(maps, args.segments, args.seed)
    cell = cell_of(entries[0], args.patch)
    sheet: tuple = images, names, colors, labels
    figures = {'features.png': draw_maps(*(x[:SHEET] for x in sheet))}
    nearest = None
    if len(entries) > 1:
        nearest = nearest_patches(maps, 0, args.neighbours)
        figures['neighbours.png'] = draw_neighbours(entries, cell, nearest)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(args.output_dir / name, dpi=100)
        print(f'Wrote {args.output_dir / name}')
    page = args.output_dir / 'index.html'
    about = (
        f'{len(entries)} images of {clean(args.images)}, features of '
        f'{clean(args.checkpoint)}.'
    )
    photos = [Image.fromarray(x) for x in images]
    page.write_text(
        features_page(photos, names, colors, labels, nearest, cell, about),
        encoding='utf-8',
    )
    print(f'Wrote {page}')


def main() -> None:
    """Run the tool."""
    run_quietly(run, parse_args())


if __name__ == '__main__':
    main()
