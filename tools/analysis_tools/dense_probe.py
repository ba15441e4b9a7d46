# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Say within minutes whether the dense features of a checkpoint are any good.

Against random weights of the same network: with labels, mIoU of a linear and
of a kNN probe of the frozen cells (--data-root, laid out like VOC); without,
how often the features find the same spot in two views (--unlabeled). Means and
standard deviations over seeds.
"""
import argparse
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import matplotlib
import numpy as np
import torch
from mmengine.dataset import default_collate
from mmengine.registry import init_default_scope
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torchvision.transforms.v2 import functional as F

from mmdensecl.api import FrozenBackbone, as_rgb, load_backbone
from mmdensecl.benchmark.report.tables import describe
from mmdensecl.benchmark.report.text import clean
from mmdensecl.engine.command_line import run_quietly
from mmdensecl.models.correspondence import stack_views
from mmdensecl.registry import DATASETS
from mmdensecl.transfer import dense_probes
from mmdensecl.transfer.matching import (Accuracy, Pairs, judge, mean_accuracy,
                                         measure)

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

RANDOM = 'random weights'
MIOU = {'linear': 'mIoU, linear', 'kNN': 'mIoU, kNN'}
MATCHES = 'matches right'
SAME_PLACE, CHANCE = 'the same place in both views', 'chance'
SHOWN = 3  # pictures in --out


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        'checkpoints',
        nargs='+',
        metavar='CHECKPOINT',
        help='of any format that mmdensecl.load_backbone reads')
    parser.add_argument(
        '--config',
        help='config of the runs, where the checkpoints do not hold it')
    parser.add_argument(
        '--data-root',
        type=Path,
        metavar='VOC',
        help='labelled pictures, a folder like VOCdevkit/VOC2012')
    parser.add_argument(
        '--unlabeled',
        metavar='FOLDER',
        help='pictures for matching without labels')
    parser.add_argument(
        '--label',
        nargs='+',
        metavar='NAME',
        help='what to call the checkpoints, by default the names of the files')
    parser.add_argument(
        '--max-images',
        type=int,
        default=100,
        help='pictures of each list or folder at most, 100 by default')
    parser.add_argument(
        '--size',
        type=int,
        default=224,
        help="pixels of a picture's shorter side, or of a view; 224 by "
        'default')
    parser.add_argument(
        '--seeds', type=int, default=3, help='how many, 3 by default')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--out',
        type=Path,
        metavar='PNG',
        help='draw what the linear probes make of some pictures')
    args = parser.parse_args()
    args.names = args.label or [Path(x).stem for x in args.checkpoints]
    if args.data_root is None and args.unlabeled is None:
        parser.error('give --data-root, --unlabeled or both')
    if args.out is not None and args.data_root is None:
        parser.error('--out needs --data-root')
    if min(args.max_images, args.size, args.seeds) < 1:
        parser.error('--max-images, --size and --seeds must be at least 1')
    if len(args.names) != len(args.checkpoints) or len(set(args.names)) < len(
            args.names):
        parser.error(f'{len(args.checkpoints)} checkpoints need as many '
                     f'names, each another, got {args.names}: use --label')
    return args


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        name (str): Of the weights.
        network (FrozenBackbone): A trained backbone.
        baseline (str, optional): Row of random weights of the same network;
            None if it is one.
    """
    name: str
    network: FrozenBackbone
    baseline: Optional[str] = None

    def backbone(self, images: torch.Tensor, seed: int) -> FrozenBackbone:
        """The network itself, or random weights for such pictures."""
        if self.baseline is not None:
            return self.network
        return self.network.untrained(images, seed)


def make_rows(args: argparse.Namespace) -> List[Row]:
    """The checkpoints, and random weights of each network among them."""
    trained = [
        load_backbone(path, args.device, config=args.config)
        for path in args.checkpoints
    ]
    networks: List[FrozenBackbone] = []
    for backbone in trained:
        if not any(alike(backbone, x) for x in networks):
            networks.append(backbone)
    names = [RANDOM] if len(networks) == 1 else [
        f'{RANDOM} {i}' for i in range(1,
                                       len(networks) + 1)
    ]
    return [
        *(Row(name, network) for name, network in zip(names, networks)),
        *(Row(
            name, backbone,
            next(x for x, network in zip(names, networks)
                 if alike(backbone, network)))
          for name, backbone in zip(args.names, trained))
    ]


def alike(one: FrozenBackbone, other: FrozenBackbone) -> bool:
    """Whether two are one network, and see pictures normalised alike."""
    return (one.cfg == other.cfg and one.scope == other.scope
            and torch.equal(one.mean, other.mean)
            and torch.equal(one.std, other.std))


Values = Dict[str, Dict[str, List[float]]]  # by column, row and seed


class LabelledPart:
    """mIoU of the probes.

    Args:
        args (argparse.Namespace): Of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.size = args.size
        self.pairs = {
            split: dense_probes.list_pairs(args.data_root, split,
                                           args.max_images)
            for split in ('train', 'val')
        }
        self.squares = torch.stack([
            F.center_crop(as_rgb(x.image, self.size), [self.size, self.size])
            for x in self.pairs['train']
        ])
        self.features: Dict[FrozenBackbone, tuple] = {}

    def extract(self, row: Row, seed: int) -> tuple:
        """Cells of both splits; those of a checkpoint serve all seeds."""
        backbone = row.backbone(self.squares, seed)
        if backbone not in self.features:
            self.features = {
                backbone:
                tuple(
                    dense_probes.extract(backbone.extract_dense, x, self.size)
                    for x in self.pairs.values())
            }
        return self.features[backbone]

    def measure(self, row: Row, seed: int) -> Dict[str, float]:
        """One number for each column."""
        train, val = self.extract(row, seed)
        classes = dense_probes.count_classes(train, val)
        values = dense_probes.dense_probes(train, val, classes, seed)
        return {MIOU[name]: value for name, value in values.items()}

    def sentences(self, row: Row, values: Values) -> Iterator[Tuple[str, str]]:
        """What is said of a checkpoint, column by column."""
        for column in MIOU.values():
            found = values[column]
            yield column, verdict(found[row.name], found[row.baseline])


class UnlabeledPart:
    """How often the same spot is found.

    Args:
        args (argparse.Namespace): Of the command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        init_default_scope('mmpretrain')
        self.dataset = DATASETS.build(
            dict(
                type='mmdensecl.UnlabeledFolder',
                data_root=args.unlabeled,
                pipeline=[
                    dict(type='mmdensecl.DecodeRGB'),
                    dict(type='mmdensecl.TwoViews', size=args.size),
                    dict(type='mmdensecl.PackViews')
                ]))
        count = min(len(self.dataset), args.max_images)
        self.chosen = np.random.default_rng(0).permutation(len(
            self.dataset))[:count].tolist()
        self.drawn: Dict[int, Pairs] = {}
        self.found: Dict[str, List[Accuracy]] = {}  # by row, for each seed

    def pairs(self, seed: int) -> Pairs:
        """Two views of each picture, the same for all rows."""
        if seed not in self.drawn:
            self.dataset.set_epoch(0, seed)
            batch = default_collate([self.dataset[i] for i in self.chosen])
            self.drawn[seed] = Pairs(
                *batch['inputs'],
                stack_views(batch['data_samples'], torch.device('cpu')))
        return self.drawn[seed]

    def measure(self, row: Row, seed: int) -> Dict[str, float]:
        """One number for each column."""
        pairs = self.pairs(seed)
        found = measure(row.backbone(pairs.query, seed), pairs)
        self.found.setdefault(row.name, []).append(found)
        return {MATCHES: percent(found.right)}

    def sentences(self, row: Row, values: Values) -> Iterator[Tuple[str, str]]:
        """What is said of a checkpoint, picture by picture."""
        found = judge(*(mean_accuracy(self.found[name])
                        for name in (row.name, row.baseline)))
        yield MATCHES, (
            f'{found.sentence()} (Standard errors above random weights: '
            f'{found.over_random:+.1f}, the same place: '
            f'{found.over_place:+.1f}, chance: {found.over_chance:+.1f})')

    def rulers(self) -> Iterator[Tuple[str, List[float]]]:
        """Rows that need no features, with a number for each seed."""
        accuracies = next(iter(self.found.values()))
        yield SAME_PLACE, [percent(x.same_place) for x in accuracies]
        yield CHANCE, [percent(x.chance) for x in accuracies]


def percent(shares: torch.Tensor) -> float:
    """The mean of those that are known."""
    return 100 * shares.nanmean().item()


def probe(rows: Sequence[Row], parts: Sequence, seeds: int) -> Values:
    """Every part of every row and seed."""
    values: Values = {}
    todo = [(row, seed) for row in rows for seed in range(seeds)]
    for row, seed in track(todo, 'probing', transient=True):
        for part in parts:
            for column, x in part.measure(row, seed).items():
                values.setdefault(column, {}).setdefault(row.name,
                                                         []).append(x)
    return values


def spread(values: Sequence[float], sign: str = '') -> str:
    """Mean and standard deviation over seeds, in percent or points."""
    found = describe(values)
    text = f'{found.mean:{sign}.1f}'
    return text if found.std is None else f'{text} ± {found.std:.1f}'


def verdict(values: Sequence[float], base: Sequence[float]) -> str:
    """What the difference to random weights is worth.

    Args:
        values (Sequence[float]): For each seed.
        base (Sequence[float]): Of random weights, for the same seeds.
    """
    apart = [a - b for a, b in zip(values, base)]
    found = describe(apart)
    word = 'better' if found.mean >= 0 else 'worse'
    amount = spread([abs(found.mean)] if found.std is
                    None else [x if found.mean >= 0 else -x for x in apart])
    text = f'{word} than random weights by {amount}'
    if found.std is None:
        return f'{text} (one seed, so the spread is not known)'
    if abs(found.mean) <= 2 * found.std:
        return f'not told apart from random weights: {word} by {amount}'
    return text


def show(rows: Sequence[Row], values: Values, parts: Sequence) -> None:
    """Print the table and a sentence for each checkpoint and column."""
    console = Console()
    table = Table(caption='percent, mean ± std over seeds')
    for head in ('weights', *values):
        table.add_column(
            head, justify='left' if head == 'weights' else 'right')
    for row in rows:
        table.add_row(
            escape(clean(row.name)),
            *(spread(column[row.name]) for column in values.values()))
    for part in parts:
        if isinstance(part, UnlabeledPart):
            blank = [''] * (len(values) - 1)
            for name, found in part.rulers():
                table.add_row(name, *blank, spread(found))
    console.print(table)
    for row in rows:
        if row.baseline is None:
            continue
        for part in parts:
            for column, sentence in part.sentences(row, values):
                console.print(
                    f'{clean(row.name)}, {column}: {sentence}',
                    markup=False,
                    highlight=False,
                    soft_wrap=True)


def draw(rows: Sequence[Row], part: LabelledPart, path: Path) -> None:
    """Pictures, masks, and what the linear probes make of them."""
    columns = ['picture', 'mask', *(row.name for row in rows)]
    shown = part.pairs['val'][:SHOWN]
    figure, axes = plt.subplots(
        len(shown),
        len(columns),
        figsize=(2.5 * len(columns), 2.4 * len(shown) + 0.4),
        squeeze=False,
        layout='constrained')
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, name in zip(axes[0], columns):
        ax.set_title(clean(name), fontsize=10, parse_math=False)
    for ax, pair in zip(axes[:, 0], shown):
        ax.imshow(as_rgb(pair.image).permute(1, 2, 0).numpy())
    colours = plt.get_cmap('tab20')
    for column, row in enumerate(rows, 2):
        train, val = part.extract(row, 0)
        classes = dense_probes.count_classes(train, val)
        scorer = dense_probes.fit_linear(
            *dense_probes.draw_cells(train, classes, 0), classes)
        for line, item in zip(axes, val):
            named = dense_probes.name_pixels(scorer, item, classes)
            for ax, mask in ((line[1], item.mask), (line[column], named)):
                picture = colours(mask.numpy() % colours.N)
                picture[mask == dense_probes.IGNORED] = 1  # white
                ax.imshow(picture, interpolation='nearest')
    figure.legend(
        handles=[
            Patch(color=colours(i % colours.N), label=f'class {i}')
            for i in range(classes)
        ],
        loc='outside lower center',
        ncols=8,
        frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f'Wrote {path}')


def main() -> None:
    run_quietly(run, parse_args())


def run(args: argparse.Namespace) -> None:
    """Probe, print, draw."""
    parts: list = []
    if args.data_root is not None:
        parts.append(LabelledPart(args))
    if args.unlabeled is not None:
        parts.append(UnlabeledPart(args))
    rows = make_rows(args)
    values = probe(rows, parts, args.seeds)
    show(rows, values, parts)
    if args.out is not None:
        draw(rows, parts[0], args.out)


if __name__ == '__main__':
    main()
