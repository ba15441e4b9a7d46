# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Draw which cells of two views a checkpoint takes for the same, and say
whether its features match object parts."""
import argparse
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import matplotlib
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope
from torch import Tensor

from mmdensecl import FrozenBackbone, load_backbone
from mmdensecl.api import as_rgb
from mmdensecl.engine import merge_options
from mmdensecl.engine.command_line import run_quietly
from mmdensecl.models.modules import Features, backbone_features
from mmdensecl.evaluation.matching import (STANDARD_ERRORS, Accuracy, Pairs,
                                         Verdict, judge, mean_accuracy,
                                         measure)
from mmdensecl.visualization import draw_matches, legend, strongest_matches
from mmdensecl.visualization.matches import similarity_bar, similarity_scale
from mmdensecl.visualization.similarity_maps import (draw_similarity_maps,
                                                     similarity_maps,
                                                     spread_cells)
from mmdensecl.visualization.views import ViewDrawer

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

MOST_CELLS = 100  # maps on one sheet that can still be told apart
NONE = 'none'
RANDOM = 'random weights'
DRAWS = 3  # of random weights, which differ


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='train config file path')
    parser.add_argument('checkpoint', help='any file with a backbone')
    parser.add_argument('image', type=Path, help='a picture')
    parser.add_argument(
        'image2',
        type=Path,
        nargs='?',
        help='another picture; two drawn views of the first by default')
    parser.add_argument(
        '--out',
        type=Path,
        default='correspondence.png',
        help='the matches; the maps go beside it as <name>_cells.png')
    parser.add_argument(
        '--before',
        help="draw it beside the checkpoint: another one, or 'none' for "
        'random weights')
    parser.add_argument(
        '--seed', type=int, default=0, help='of views and random weights')
    parser.add_argument(
        '--size',
        type=int,
        help="side of a view, or a picture's shorter side, in pixels; by "
        "default twice the config's view, for more cells")
    parser.add_argument(
        '--top', type=int, default=20, help='matches to draw at most')
    parser.add_argument(
        '--min-similarity',
        type=float,
        default=-1.,
        help='cosine similarity of the weakest match to draw')
    parser.add_argument(
        '--margin',
        type=int,
        default=2,
        help='rings of outer cells without lines: zero padding makes them '
        'alike whatever they show. The verdict is of all cells')
    parser.add_argument(
        '--color',
        choices=['right', 'similarity'],
        help='what the colour of a line says; by default whether it is '
        'right, where that is known')
    parser.add_argument(
        '--cells',
        nargs='+',
        default=['3'],
        metavar='N|all|ROW,COLUMN',
        help='query cells whose similarity maps are drawn: N x N evenly '
        'spaced ones, all, or named ones from 0,0; 0 for none')
    parser.add_argument(
        '--pairs',
        type=int,
        default=16,
        help='pairs of views that the verdict is made of')
    parser.add_argument('--device', default='cpu')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        help='override settings of the config, "a.b=c"')
    args = parser.parse_args()
    for name, least in (('top', 1), ('margin', 0), ('pairs', 8), ('size', 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f'--{name} must be at least {least}, got {value}')
    if args.image2 and args.color == 'right':
        parser.error('--color right: of two pictures nobody knows what is '
                     'right')
    return args


class Sight(NamedTuple):
    """One pair of pictures as one backbone sees it.

    Args:
        name (str): Of the backbone.
        query (Features): Of the first picture.
        key (Features): Of the second.
    """
    name: str
    query: Features
    key: Features


def look(name: str, backbone: FrozenBackbone,
         pictures: Sequence[Tensor]) -> Sight:
    with torch.no_grad():
        query, key = (backbone_features(backbone(x[None]).cpu()) for x in pictures)
    return Sight(name, query, key)


def chosen_cells(words: Sequence[str], shape: Sequence[int]) -> List[tuple]:
    """The cells that ``--cells`` names.

    Raises:
        ValueError: They are none of the grid, or too many for a sheet.
    """
    if words == ['all']:
        cells = spread_cells(shape, max(shape))
    elif len(words) == 1 and words[0].isdigit():
        cells = spread_cells(shape, int(words[0]))
    else:
        try:
            cells = [tuple(map(int, word.split(','))) for word in words]
            good = all(0 <= row < shape[0] and 0 <= column < shape[1]
                       for row, column in cells)
        except ValueError:
            good = False
        if not good:
            raise ValueError(
                f'--cells {" ".join(words)}: expected a number, "all", or '
                f'cells as ROW,COLUMN of the {shape[0]} x {shape[1]} cells')
    if len(cells) > MOST_CELLS:
        raise ValueError(f'--cells asks for {len(cells)} maps, but a sheet '
                         f'holds {MOST_CELLS}; lower it, or --size')
    return cells


def draw_all_matches(sights: Sequence[Sight], pictures: Sequence[Tensor],
                     views: Optional[Tensor],
                     args: argparse.Namespace) -> plt.Figure:
    """A panel of matches for each backbone, side by side."""
    figure, axes = plt.subplots(
        1,
        len(sights),
        figsize=(6.2 * len(sights) + 0.8, 4.2),
        squeeze=False,
        layout='constrained')
    found = [
        strongest_matches(
            x.query,
            x.key,
            0,
            None if views is None else views[None],
            top=args.top,
            margin=args.margin,
            min_similarity=args.min_similarity) for x in sights
    ]
    by_similarity = views is None or args.color == 'similarity'
    scale = similarity_scale(found) if by_similarity else None
    for ax, sight, matches in zip(axes[0], sights, found):
        draw_matches(ax, *pictures, matches, scale)
        count = len(matches.similarity)
        words = f'{sight.name}: {count} matches'
        if matches.right is not None:
            words = (f'{sight.name}: {matches.right.sum()} of {count} '
                     'right')
        if count:
            words += f', similarity {matches.similarity.mean():.2f}'
        ax.set_title(words, fontsize=11, parse_math=False)
    if by_similarity:
        similarity_bar(figure, scale, list(axes[0]))
    else:
        legend(figure, unknown=False)
    what = 'pictures'
    if views is not None:
        what = 'views, {} x {} cells each'.format(*sights[0].query.shape)
    figure.suptitle(f'Strongest mutual matches between two {what}')
    return figure


def draw_all_maps(sights: Sequence[Sight], pictures: Sequence[Tensor],
                  views: Optional[Tensor],
                  words: Sequence[str]) -> Optional[plt.Figure]:
    """The similarity maps of the query cells, a row for each backbone."""
    shape = sights[0].query.shape
    cells = chosen_cells(words, shape)
    if not cells:
        return None
    side = max(2, int(len(cells)**0.5 + 0.999))
    height = max(3.6, 1.25 * side)
    figure = plt.figure(
        figsize=(2.6 * height, (height + 0.4) * len(sights) + 0.3),
        layout='constrained')
    parts = figure.subfigures(len(sights), 1, squeeze=False)[:, 0]
    for part, sight in zip(parts, sights):
        part.suptitle(sight.name, fontsize=11, weight='bold', parse_math=False)
        maps = similarity_maps(sight.query, sight.key, cells)
        draw_similarity_maps(part, *pictures, cells, shape, maps, views)
    marks = 'circle: most similar cell'
    if views is not None:
        marks += '; cross: the true spot, where the other view shows it'
    figure.supxlabel(marks, fontsize=9)
    return figure


def median_pair(accuracy: Accuracy) -> int:
    """The pair to draw: neither the best nor the worst."""
    known = accuracy.right.isfinite().nonzero()[:, 0]
    if not len(known):
        return 0
    return int(known[accuracy.right[known].argsort()[len(known) // 2]])


def report(verdict: Verdict) -> None:
    print(f'Matches within one cell of the true spot, mean of {verdict.pairs} '
          f'pairs of views ({RANDOM}: and of {DRAWS} draws):')
    print(f'  this checkpoint  {verdict.right:6.1%}')
    for name, share, over in ((RANDOM, verdict.random, verdict.over_random),
                              ('the same place', verdict.same_place,
                               verdict.over_place), ('chance', verdict.chance,
                                                     verdict.over_chance)):
        print(f'  {name:15}  {share:6.1%}  ({over:+.1f} standard errors)')
    print(f'{verdict.sentence()} (Rule: more than {STANDARD_ERRORS} standard '
          'errors above all three.)')


def run(args: argparse.Namespace) -> None:
    cfg = Config.fromfile(args.config)
    merge_options(cfg, args.cfg_options)
    init_default_scope(cfg.get('default_scope', 'mmpretrain'))
    drawer = ViewDrawer(cfg)
    drawer = ViewDrawer(cfg, args.size or 2 * drawer.size)
    files = [x for x in (args.image, args.image2) if x]
    whole = [as_rgb(x, drawer.size) for x in files]  # fails early
    drawn: Dict[Path, Pairs] = {
        x: drawer.draw(x.read_bytes(), -(-args.pairs // len(files)), args.seed)
        for x in files
    }
    pairs = Pairs(*map(torch.cat, zip(*drawn.values())))

    trained = load_backbone(args.checkpoint, device=args.device, config=cfg)
    random = [
        trained.untrained(pairs.query, args.seed + i) for i in range(DRAWS)
    ]
    backbones = {RANDOM: random[0]} if args.before == NONE else {}
    if args.before not in (None, NONE):
        backbones[f'before ({Path(args.before).stem})'] = load_backbone(
            args.before, device=args.device, config=cfg)
    backbones[f'trained ({Path(args.checkpoint).stem})'] = trained

    accuracy = measure(trained, pairs)
    verdict = judge(accuracy,
                    mean_accuracy([measure(x, pairs) for x in random]))

    views, pictures = None, whole
    if args.image2 is None:
        typical = median_pair(accuracy)
        views = pairs.views[typical]
        pictures = [pairs.query[typical], pairs.key[typical]]
    sights = [look(k, v, pictures) for k, v in backbones.items()]
    figures = {args.out: draw_all_matches(sights, pictures, views, args)}
    maps = draw_all_maps(sights, pictures, views, args.cells)
    if maps is not None:
        figures[args.out.with_name(f'{args.out.stem}_cells.png')] = maps
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for path, figure in figures.items():
        figure.savefig(path, dpi=100)
        plt.close(figure)
    report(verdict)
    for path in figures:
        print(f'Wrote {path}')


def main() -> None:
    run_quietly(run, parse_args())


if __name__ == '__main__':
    main()
