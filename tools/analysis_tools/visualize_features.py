# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Draw the dense features of pictures: as colours, as segments, and by their
nearest patches, in PNGs and one HTML page that works offline."""
import argparse
import os
from pathlib import Path
from typing import List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.config import Config, DictAction
from mmengine.utils import track_iter_progress
from PIL import Image
from torchvision.transforms.v2 import functional as F

from mmdensecl import load_backbone
from mmdensecl.api import as_rgb
from mmdensecl.datasets.listing import search_folder
from mmdensecl.datasets.unlabeled import IMG_EXTENSIONS
from mmdensecl.engine import merge_options
from mmdensecl.engine.command_line import run_quietly
from mmdensecl.engine.hooks.sample_predictions_hook import spread_evenly
from mmdensecl.visualization.dense_maps import (Neighbours, Seen, draw_maps,
                                                nearest_patches, pca_colors,
                                                see, segments)
from mmdensecl.visualization.features_page import features_page

SHEET = 5  # pictures in features.png
MARK = 'deepskyblue'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='train config file path')
    parser.add_argument(
        'checkpoint',
        help="any file with a backbone, or 'none' for random "
        'weights')
    parser.add_argument('images', type=Path, help='a picture or a folder')
    parser.add_argument(
        '--output-dir',
        type=Path,
        default='features',
        help='folder for features.png, neighbours.png and index.html')
    parser.add_argument(
        '--patch',
        type=int,
        nargs=2,
        metavar=('X', 'Y'),
        help='pixel of the first picture whose nearest patches are drawn; '
        'its middle by default')
    parser.add_argument(
        '--first',
        help="which picture of the folder is the first, such as 'a/b.jpg'; "
        'by default by name')
    parser.add_argument(
        '--size',
        type=int,
        default=320,
        help="pixels of a picture's shorter side")
    parser.add_argument(
        '--margin',
        type=int,
        default=2,
        help='rings of outer cells to cut off, with the picture below: zero '
        'padding makes them alike whatever they show')
    parser.add_argument(
        '--segments', type=int, default=6, help='of the k-means')
    parser.add_argument(
        '--neighbours', type=int, default=8, help='nearest patches to show')
    parser.add_argument(
        '--max-images',
        type=int,
        default=64,
        help='pictures of a folder, evenly spaced; memory and the page grow '
        'with them')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--device', default='cpu')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        help='override settings of the config, "a.b=c"')
    args = parser.parse_args()
    for name, least in (('size', 16), ('margin', 0), ('segments', 1),
                        ('neighbours', 1), ('max_images', 1)):
        value = getattr(args, name)
        if value < least:
            flag = name.replace('_', '-')
            parser.error(f'--{flag} must be at least {least}, got {value}')
    if args.segments > 20:
        parser.error('--segments must be at most 20, or colours repeat, got '
                     f'{args.segments}')
    return args


class Entry(NamedTuple):
    """A picture and what the backbone makes of it.

    Args:
        name (str): As it is shown.
        seen (Seen): The picture and its features, without the margin.
        box (np.ndarray): Left, top, right and bottom of that, in pixels of
            the file's picture.
    """
    name: str
    seen: Seen
    box: np.ndarray


def list_files(args: argparse.Namespace) -> List[Path]:
    """The files to look at, the first one first.

    Raises:
        FileNotFoundError: There are none.
    """
    if not args.images.is_dir():
        if args.first:
            raise ValueError(f'--first chooses from a folder, "{args.images}" '
                             'is none')
        return [args.images]
    found = search_folder(str(args.images), IMG_EXTENSIONS).pictures
    names = [x['img_path'] for x in found]
    if not names:
        raise FileNotFoundError(
            f'No pictures in "{args.images}". Expected files that end in one '
            f'of {", ".join(IMG_EXTENSIONS)}')
    if args.first is not None:
        if args.first not in names:
            raise FileNotFoundError(
                f'--first {args.first}: no such picture in "{args.images}"')
        names.remove(args.first)
        names.insert(0, args.first)
    kept = spread_evenly(args.max_images, len(names))
    return [args.images / names[i] for i in kept]


def shown_name(path: Path) -> str:
    """A file's name as text that can be written, whatever its bytes are."""
    return clean(os.fsencode(path.name).decode('utf-8', 'replace'))


def look(backbone, path: Path, args: argparse.Namespace) -> Entry:
    whole = as_rgb(path)
    try:
        seen = see(backbone, as_rgb(whole, args.size), args.margin)
    except ValueError as error:
        raise ValueError(f'"{path}": {error}') from error
    width, height = whole.shape[:0:-1]
    return Entry(shown_name(path), seen, seen.box * ([width, height] * 2))


def squares(files: List[Path], size: int) -> torch.Tensor:
    """The middles of those pictures that can be read, as one batch."""
    found = []
    for file in files:
        try:
            found.append(F.center_crop(as_rgb(file, size), [size, size]))
        except (ValueError, OSError):  # of which look() will speak
            if file == files[0]:
                raise
    return torch.stack(found)


def cell_of(entry: Entry, patch: Optional[List[int]]) -> Tuple[int, int]:
    """Row and column of the cell that holds a pixel of the file's picture.

    Raises:
        ValueError: No cell does.
    """
    left, top, right, bottom = entry.box
    x, y = patch or ((left + right) / 2, (top + bottom) / 2)
    if not (left <= x < right and top <= y < bottom):
        raise ValueError(
            f'--patch {x} {y} is not in "{entry.name}" without its margin: x '
            f'from {left:.0f} to {right:.0f} and y from {top:.0f} to '
            f'{bottom:.0f} are')
    rows, columns = entry.seen.map.shape[:2]
    return (int((y - top) / (bottom - top) * rows),
            int((x - left) / (right - left) * columns))


def draw_neighbours(entries: List[Entry], cell: Tuple[int, int],
                    found: Neighbours) -> Figure:
    """The patch that asks, and the nearest in other pictures."""
    columns = entries[0].seen.map.shape[1]
    index = cell[0] * columns + cell[1]
    panels = [(0, index, 'query')] + [
        (picture, place, f'{similarity:.2f}')
        for picture, place, similarity in zip(
            found.picture[index], found.cell[index], found.similarity[index])
    ]
    across = min(5, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(
        figsize=(2.4 * across, 0.6 + 2.4 * down), layout='constrained')
    axes = figure.subplots(down, across, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, (number, place, words) in zip(axes.flat, panels):
        entry = entries[number]
        ax.imshow(entry.seen.picture)
        rows, columns = entry.seen.map.shape[:2]
        height, width = (a / b
                         for a, b in zip(entry.seen.picture.shape, (rows,
                                                                    columns)))
        row, column = divmod(int(place), columns)
        ax.add_patch(
            Rectangle((column * width, row * height),
                      width,
                      height,
                      fill=False,
                      edgecolor=MARK,
                      linewidth=2.5))
        ax.set_title(f'{words}, {entry.name}', fontsize=9, parse_math=False)
    figure.suptitle('Nearest patches in other pictures, by cosine similarity')
    return figure


def run(args: argparse.Namespace) -> None:
    cfg = Config.fromfile(args.config)
    merge_options(cfg, args.cfg_options)
    files = list_files(args)
    if args.patch and len(files) < 2:
        raise ValueError('--patch looks for its nearest in other pictures; '
                         'give a folder with at least two')
    path = None if args.checkpoint == 'none' else args.checkpoint
    backbone = load_backbone(path, device=args.device, config=cfg)
    if path is None:
        backbone = backbone.untrained(squares(files, args.size), args.seed)
    entries, broken = [], []
    for file in track_iter_progress(files):
        try:
            entries.append(look(backbone, file, args))
        except (ValueError, OSError) as error:
            # The picture that was asked about must be there.
            if len(files) == 1 or file == files[0]:
                raise
            broken.append(str(error))
    print()
    for message in broken[:5]:
        print(f'left out: {message}')
    if len(broken) > 5:
        print(f'left out: {len(broken) - 5} more')
    maps = [x.seen.map for x in entries]
    colors = pca_colors(maps, args.seed)
    labels = segments(maps, args.segments, args.seed)
    cell = cell_of(entries[0], args.patch)
    found = None
    if len(entries) > 1:
        found = nearest_patches(maps, 0, args.neighbours)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    sheet = slice(SHEET)
    figures = {
        'features.png':
        draw_maps([x.seen.picture for x in entries[sheet]],
                  [x.name for x in entries[sheet]], colors[sheet],
                  labels[sheet])
    }
    if found is not None:
        figures['neighbours.png'] = draw_neighbours(entries, cell, found)
    for name, figure in figures.items():
        figure.savefig(args.output_dir / name, dpi=100)
        print(f'Wrote {args.output_dir / name}')
    page = args.output_dir / 'index.html'
    page.write_text(
        features_page([Image.fromarray(x.seen.picture) for x in entries],
                      [x.name for x in entries], colors, labels, found, cell,
                      f'{len(entries)} pictures of {clean(args.images)}, seen '
                      f'by {clean(args.checkpoint)}.'),
        encoding='utf-8')
    print(f'Wrote {page}')


def main() -> None:
    run_quietly(run, parse_args())


if __name__ == '__main__':
    main()
