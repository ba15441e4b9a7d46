# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Draw which cells of two views match by a checkpoint's features.

And test whether the features match object parts.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from mmengine.registry import init_default_scope
from torch import Tensor

from mmdensecl import FrozenBackbone, load_backbone
from mmdensecl.engine.command_line import (
    add_config_options,
    load_config,
    run_quietly,
)
from mmdensecl.evaluation.matching import (
    STANDARD_ERRORS,
    Accuracy,
    Comparison,
    Pairs,
    compare,
    mean_accuracy,
    measure,
)
from mmdensecl.models.modules import Features, backbone_features
from mmdensecl.transfer.feature_extractor import as_rgb
from mmdensecl.visualization import Panel, match_sheet, strongest_matches
from mmdensecl.visualization.similarity_maps import (
    draw_similarity_maps,
    shared_scale,
    similarity_maps,
    spread_cells,
)
from mmdensecl.visualization.views import ViewDrawer

NONE = 'none'
RANDOM = 'random weights'
DRAWS = 3  # of random weights, which differ


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', help='train config file path')
    add('checkpoint', help='any file with a backbone')
    add('image', type=Path, help='an image')
    add(
        'image2',
        type=Path,
        nargs='?',
        help='another image; two drawn views of the first by default',
    )
    add(
        '--out',
        type=Path,
        default='correspondence.png',
        help='the matches; the maps go beside it as <name>_cells.png',
    )
    add(
        '--before',
        help="draw it beside the checkpoint: another one, or 'none' for "
        'random weights',
    )
    add('--seed', type=int, default=0, help='of views and random weights')
    add(
        '--size',
        type=int,
        help="side of a view, or an image's shorter side, in pixels; by "
        "default twice the config's view, for more cells",
    )
    add('--top', type=int, default=20, help='matches to draw at most')
    add(
        '--margin',
        type=int,
        default=2,
        help='rings of outer cells without lines: zero padding makes them '
        'alike whatever they show. The test is of all cells',
    )
    add(
        '--cells',
        type=int,
        default=3,
        metavar='N',
        help='draw similarity maps of N x N query cells, evenly spaced',
    )
    add('--pairs', type=int, default=16, help='pairs of views for the test')
    add('--device', default='cpu')
    add_config_options(parser)
    args = parser.parse_args()
    least = dict(top=1, margin=0, pairs=8, size=1, cells=0)
    for name, number in least.items():
        value = getattr(args, name)
        if value is not None and value < number:
            parser.error(f'--{name} must be at least {number}, got {value}')
    return args


class FeaturePair(NamedTuple):
    """Features of two images by one backbone.

    Attributes:
        name: Of the backbone.
        query: Of the first image.
        key: Of the second.
    """

    name: str
    query: Features
    key: Features


@torch.no_grad()
def extract(
    name: str, backbone: FrozenBackbone, images: Sequence[Tensor]
) -> FeaturePair:
    """Features of two images."""
    maps = [backbone(x[None]).cpu() for x in images]
    return FeaturePair(name, *map(backbone_features, maps))


def draw_all_matches(
    pairs: Sequence[FeaturePair],
    images: tuple[Tensor, Tensor],
    views: Tensor | None,
    args: argparse.Namespace,
) -> Figure:
    """A panel of matches for each backbone, side by side."""
    batch = None if views is None else views[None]
    panels = [
        Panel(
            x.name,
            *images,
            strongest_matches(x.query, x.key, 0, batch, args.top, args.margin),
        )
        for x in pairs
    ]
    what = 'images'
    if views is not None:
        what = 'views, {} x {} cells each'.format(*pairs[0].query.shape)
    return match_sheet([panels], f'Strongest mutual matches of two {what}')


def draw_all_maps(
    pairs: Sequence[FeaturePair],
    images: tuple[Tensor, Tensor],
    views: Tensor | None,
    number: int,
) -> Figure:
    """The similarity maps of query cells, a row for each backbone."""
    shape = pairs[0].query.shape
    cells = spread_cells(shape, number)
    side = max(2, int(len(cells) ** 0.5 + 0.999))
    height = max(3.6, 1.25 * side)
    figure = Figure(
        figsize=(2.6 * height, (height + 0.4) * len(pairs) + 0.3),
        layout='constrained',
    )
    parts = figure.subfigures(len(pairs), 1, squeeze=False)[:, 0]
    maps = [similarity_maps(x.query, x.key, cells) for x in pairs]
    scale = shared_scale(maps)
    for part, pair, heat in zip(parts, pairs, maps, strict=True):
        part.suptitle(pair.name, fontsize=11, weight='bold', parse_math=False)
        draw_similarity_maps(part, *images, cells, shape, heat, views, scale)
    marks = 'circle: most similar cell'
    if views is not None:
        marks += '; cross: the true position, where the other view shows it'
    figure.supxlabel(marks, fontsize=9)
    return figure


def median_pair(accuracy: Accuracy) -> int:
    """The pair to draw: neither the best nor the worst."""
    known = accuracy.right.isfinite().nonzero()[:, 0]
    if not len(known):
        return 0
    return int(known[accuracy.right[known].argsort()[len(known) // 2]])


def report(found: Comparison) -> None:
    """Print the comparison with the baselines."""
    print(
        'Matches within one cell of the true position, mean of '
        f'{found.pairs} pairs of views ({RANDOM}: and of {DRAWS} draws):\n'
        f'  {"this checkpoint":17}  {found.right:6.1%}'
    )
    for name, share in found.baselines.items():
        errors = f'({found.errors[name]:+.1f} standard errors)'
        print(f'  {name:17}  {share:6.1%}  {errors}')
    print(
        f'{found.sentence()} (Rule: more than {STANDARD_ERRORS} standard '
        'errors above all three.)'
    )


def run(args: argparse.Namespace) -> None:
    """Measure, draw, print."""
    cfg = load_config(args)
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    drawer = ViewDrawer(cfg, args.size or 2 * ViewDrawer(cfg).size)
    files = [x for x in (args.image, args.image2) if x]
    images = [as_rgb(x, drawer.size) for x in files]  # fails early
    count = -(-args.pairs // len(files))
    drawn = [drawer.draw(x.read_bytes(), count, args.seed) for x in files]
    pairs = Pairs(*map(torch.cat, zip(*drawn, strict=True)))

    trained = load_backbone(args.checkpoint, device=args.device, config=cfg)
    random = [
        trained.untrained(pairs.query, args.seed + i) for i in range(DRAWS)
    ]
    backbones = {RANDOM: random[0]} if args.before == NONE else {}
    if args.before not in (None, NONE):
        backbones[f'before ({Path(args.before).stem})'] = load_backbone(
            args.before, device=args.device, config=cfg
        )
    backbones[f'trained ({Path(args.checkpoint).stem})'] = trained

    accuracy = measure(trained, pairs)
    baseline = mean_accuracy([measure(x, pairs) for x in random])
    views = None
    if args.image2 is None:
        typical = median_pair(accuracy)
        views = pairs.views[typical]
        images = [pairs.query[typical], pairs.key[typical]]
    found = [extract(k, v, images) for k, v in backbones.items()]
    both = images[0], images[1]
    figures = {args.out: draw_all_matches(found, both, views, args)}
    if args.cells:
        path = args.out.with_name(f'{args.out.stem}_cells.png')
        figures[path] = draw_all_maps(found, both, views, args.cells)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for path, figure in figures.items():
        figure.savefig(path, dpi=100)
    report(compare(accuracy, baseline))
    for path in figures:
        print(f'Wrote {path}')


def main() -> None:
    """Run the tool."""
    run_quietly(run, parse_args())


if __name__ == '__main__':
    main()
