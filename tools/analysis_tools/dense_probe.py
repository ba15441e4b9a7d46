# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Score the frozen dense features of checkpoints against random weights.

With labels (--data-root): mIoU of a linear and of a kNN probe of the cells.
Without (--unlabeled): how often the features find the same position in two
views. Means and standard deviations over seeds.
"""
import argparse
import json
import platform
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import mmengine
import numpy as np
import torch
from mmengine.dataset import default_collate
from mmengine.registry import init_default_scope
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from torchvision.transforms.v2 import functional as F

import mmdensecl
from mmdensecl.api import FrozenBackbone, as_rgb, load_backbone
from mmdensecl.checkpoint import load_from_local
from mmdensecl.engine.command_line import run_quietly
from mmdensecl.evaluation import dense_probes
from mmdensecl.evaluation.matching import (Accuracy, Pairs, judge,
                                           mean_accuracy, measure)
from mmdensecl.models.correspondence import stack_views
from mmdensecl.registry import DATASETS
from mmdensecl.transfer import read_backbone

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

RANDOM = 'random weights'
MATCHES = 'matches right'
SAME_POSITION, CHANCE = 'the same position in both views', 'chance'
NUM_SHOWN = 3  # images in --out


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
        nargs='+',
        default=[],
        metavar='DIR',
        help='labelled images, laid out like VOCdevkit/VOC2012 or cityscapes')
    parser.add_argument(
        '--unlabeled',
        metavar='FOLDER',
        help='images for matching without labels')
    parser.add_argument(
        '--label',
        nargs='+',
        metavar='NAME',
        help='names of the checkpoints, by default those of the files')
    parser.add_argument(
        '--max-images',
        type=int,
        default=100,
        help='images of each split or folder at most, 100 by default')
    parser.add_argument(
        '--size',
        type=int,
        default=224,
        help="pixels of an image's shorter side, or of a view; 224 by "
        'default')
    parser.add_argument(
        '--seeds', type=int, default=3, help='how many, 3 by default')
    parser.add_argument(
        '--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--out',
        type=Path,
        metavar='PNG',
        help='draw the predictions of the linear probes for some images of '
        'the first --data-root')
    parser.add_argument(
        '--json',
        type=Path,
        metavar='FILE',
        help='write every value with where it is from')
    args = parser.parse_args()
    args.names = args.label or short_names(args.checkpoints)
    if not args.data_root and args.unlabeled is None:
        parser.error('give --data-root, --unlabeled or both')
    if args.out is not None and not args.data_root:
        parser.error('--out needs --data-root')
    if min(args.max_images, args.size, args.seeds) < 1:
        parser.error('--max-images, --size and --seeds must be at least 1')
    if len(args.names) != len(args.checkpoints) or len(set(args.names)) < len(
            args.names):
        parser.error(f'{len(args.checkpoints)} checkpoints need as many '
                     f'distinct names, got {args.names}: use --label')
    return args


def short_names(paths: Sequence[str]) -> list[str]:
    """Stems of files, with as many folders before them as tell them apart."""
    parts = [Path(x).with_suffix('').parts for x in paths]
    names: list[str] = []
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ['/'.join(x[-depth:]) for x in parts]
        if len(set(names)) == len(names):
            break
    return names


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        name: Name of the weights.
        network: A trained backbone.
        baseline: Row of random weights of the same network; None if it is
            one.
        origin: Where the weights are from, for --json.
    """
    name: str
    network: FrozenBackbone
    baseline: str | None
    origin: dict[str, Any]

    def backbone(self, images: torch.Tensor, seed: int) -> FrozenBackbone:
        """The network itself, or random weights for such images."""
        if self.baseline is not None:
            return self.network
        return self.network.untrained(images, seed)


def make_rows(args: argparse.Namespace) -> list[Row]:
    """The checkpoints, and random weights of each network among them."""
    trained = [
        load_backbone(path, args.device, config=args.config)
        for path in args.checkpoints
    ]
    networks: list[FrozenBackbone] = []
    for backbone in trained:
        if not any(alike(backbone, x) for x in networks):
            networks.append(backbone)
    names = [RANDOM] if len(networks) == 1 else [
        f'{RANDOM} {i}' for i in range(1,
                                       len(networks) + 1)
    ]
    return [
        *(Row(name, network, None, {})
          for name, network in zip(names, networks)),
        *(Row(
            name, backbone,
            next(x for x, network in zip(names, networks)
                 if alike(backbone, network)), describe_checkpoint(path))
          for name, backbone, path in zip(args.names, trained,
                                          args.checkpoints))
    ]


def alike(one: FrozenBackbone, other: FrozenBackbone) -> bool:
    """Whether two are one network, and see images normalised alike."""
    return (one.cfg == other.cfg and one.scope == other.scope
            and torch.equal(one.mean, other.mean)
            and torch.equal(one.std, other.std))


Values = dict[str, dict[str, list[float]]]  # by column, row and seed


class LabelledPart:
    """mIoU of the probes on one dataset.

    Args:
        root: The dataset.
        heading: What its columns begin with.
        args: The command line.
    """

    def __init__(self, root: Path, heading: str,
                 args: argparse.Namespace) -> None:
        self.root = root
        self.columns = {
            'linear': f'{heading}mIoU, linear',
            'kNN': f'{heading}mIoU, kNN'
        }
        self.data = dense_probes.SegmentationImages(
            root, lambda path: as_rgb(path, args.size), args.max_images)
        self.squares = torch.stack([
            F.center_crop(x, [args.size, args.size])
            for x in self.data.images['train']
        ])
        self.latest: tuple[FrozenBackbone, dict] | None = None

    def extract(self, row: Row, seed: int) -> dict:
        """Cells of both splits; those of a checkpoint serve all seeds."""
        if row.baseline is None or self.latest is None or (
                self.latest[0] is not row.network):
            backbone = row.backbone(self.squares, seed)
            self.latest = backbone, self.data.extract(backbone.extract_dense)
        return self.latest[1]

    def measure(self, row: Row, seed: int) -> dict[str, float]:
        """One number for each column."""
        cells = self.extract(row, seed)
        values = dense_probes.dense_probes(cells['train'], cells['val'],
                                           self.data.num_classes, seed)
        return {self.columns[name]: value for name, value in values.items()}

    def sentences(self, row: Row, values: Values) -> Iterator[tuple[str, str]]:
        """What is said of a checkpoint, column by column."""
        for column in self.columns.values():
            found = values[column]
            yield column, verdict(found[row.name], found[row.baseline])

    def describe(self) -> dict[str, Any]:
        """What was measured on, for --json."""
        return dict(
            data_root=str(self.root.resolve()),
            columns=[*self.columns.values()],
            num_train=len(self.data.images['train']),
            num_val=len(self.data.images['val']),
            classes=self.data.classes)


class UnlabeledPart:
    """How often the same position is found.

    Args:
        args: The command line.
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
        self.drawn: dict[int, Pairs] = {}
        self.found: dict[str, list[Accuracy]] = {}  # by row, for each seed

    def pairs(self, seed: int) -> Pairs:
        """Two views of each image, the same for all rows."""
        if seed not in self.drawn:
            self.dataset.set_epoch(0, seed)
            batch = default_collate([self.dataset[i] for i in self.chosen])
            self.drawn[seed] = Pairs(
                *batch['inputs'],
                stack_views(batch['data_samples'], torch.device('cpu')))
        return self.drawn[seed]

    def measure(self, row: Row, seed: int) -> dict[str, float]:
        """One number for each column."""
        pairs = self.pairs(seed)
        found = measure(row.backbone(pairs.query, seed), pairs)
        self.found.setdefault(row.name, []).append(found)
        return {MATCHES: percent(found.right)}

    def sentences(self, row: Row, values: Values) -> Iterator[tuple[str, str]]:
        """What is said of a checkpoint, image by image."""
        found = judge(*(mean_accuracy(self.found[name])
                        for name in (row.name, row.baseline)))
        yield MATCHES, (
            f'{found.sentence()} (Standard errors above random weights: '
            f'{found.over_random:+.1f}, the same position: '
            f'{found.over_place:+.1f}, chance: {found.over_chance:+.1f})')

    def describe(self) -> dict[str, Any]:
        """What was measured on, for --json."""
        return dict(
            unlabeled=str(self.dataset.data_root),
            columns=[MATCHES],
            num_images=len(self.chosen),
            **dict(self.references()))

    def references(self) -> Iterator[tuple[str, list[float]]]:
        """Rows that need no features, with a number for each seed."""
        accuracies = next(iter(self.found.values()))
        yield SAME_POSITION, [percent(x.same_place) for x in accuracies]
        yield CHANCE, [percent(x.chance) for x in accuracies]


def percent(shares: torch.Tensor) -> float:
    """The mean of those that are known."""
    return 100 * shares.nanmean().item()


def probe(rows: Sequence[Row], parts: Sequence, args: argparse.Namespace,
          save: Callable[[Values], None]) -> Values:
    """Every part of every row and seed; ``save`` is called after each row."""
    values: Values = {}
    for row in track(rows, 'probing', transient=True):
        for part in parts:
            for seed in range(args.seeds):
                for column, x in part.measure(row, seed).items():
                    values.setdefault(column, {}).setdefault(row.name,
                                                             []).append(x)
        save(values)
    return values


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    text = f'{statistics.fmean(values):.1f}'
    if len(values) == 1:
        return text
    return f'{text} ± {statistics.stdev(values):.1f}'


def verdict(values: Sequence[float], base: Sequence[float]) -> str:
    """What the difference to random weights is worth.

    Args:
        values: For each seed.
        base: Of random weights, for the same seeds.
    """
    apart = [a - b for a, b in zip(values, base)]
    mean = statistics.fmean(apart)
    word = 'better' if mean >= 0 else 'worse'
    amount = spread([x if mean >= 0 else -x for x in apart])
    text = f'{word} than random weights by {amount}'
    if len(apart) == 1:
        return f'{text} (one seed, so the spread is not known)'
    if abs(mean) <= 2 * statistics.stdev(apart):
        return f'not told apart from random weights: {word} by {amount}'
    return text


def printable(text: str) -> str:
    """A name without line breaks and control characters."""
    return ''.join(x if x.isprintable() else ' ' for x in text)


def show(rows: Sequence[Row], values: Values, parts: Sequence) -> None:
    """Print the table and a sentence for each checkpoint and column."""
    console = Console()
    table = Table(caption='percent, mean ± std over seeds')
    for head in ('weights', *values):
        table.add_column(
            head, justify='left' if head == 'weights' else 'right')
    for row in rows:
        table.add_row(
            escape(printable(row.name)),
            *(spread(column[row.name]) for column in values.values()))
    for part in parts:
        if isinstance(part, UnlabeledPart):
            blank = [''] * (len(values) - 1)
            for name, found in part.references():
                table.add_row(name, *blank, spread(found))
    console.print(table)
    for row in rows:
        if row.baseline is None:
            continue
        for part in parts:
            for column, sentence in part.sentences(row, values):
                console.print(
                    f'{printable(row.name)}, {column}: {sentence}',
                    markup=False,
                    highlight=False,
                    soft_wrap=True)


def describe_checkpoint(path: str) -> dict[str, Any]:
    """Where weights are from, as far as the file says so.

    ``position_r2`` and ``match_acc`` are what the log said last: means over
    the last ten iterations.
    """
    found = dict(
        checkpoint=str(Path(path).resolve()),
        sha256=read_backbone(path).sha256)
    try:
        tree = load_from_local(path, 'cpu')
    except ValueError:  # safetensors
        return found
    meta = tree.get('meta') or {}
    name = meta.get('experiment_name')
    if name is not None:
        found['config'] = re.sub(r'_\d{8}_\d{6}$', '', name)
    found.update({k: meta[k] for k in ('seed', 'epoch', 'iter') if k in meta})
    scalars = (tree.get('message_hub') or {}).get('log_scalars', {})
    for key in ('position_r2', 'match_acc'):
        if f'train/{key}' in scalars:
            found[key] = float(scalars[f'train/{key}'].mean(10))
    return found


def write_json(rows: Sequence[Row], values: Values, parts: Sequence,
               args: argparse.Namespace) -> None:
    """Write every value with where it is from."""
    content = dict(
        command=shlex.join(sys.argv),
        versions=dict(
            python=platform.python_version(),
            **{
                x.__name__: x.__version__
                for x in (mmdensecl, mmengine, np, torch)
            }),
        size=args.size,
        max_images=args.max_images,
        seeds=[*range(args.seeds)],
        data=[part.describe() for part in parts],
        rows=[
            dict(name=row.name, baseline=row.baseline, **row.origin)
            for row in rows
        ],
        values=values)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    whole = args.json.with_name(f'{args.json.name}.tmp')
    whole.write_text(json.dumps(content, indent=1), encoding='utf-8')
    whole.replace(args.json)


def draw(rows: Sequence[Row], part: LabelledPart, path: Path) -> None:
    """Draw images, masks, and the predictions of the linear probes."""
    columns = ['image', 'mask', *(row.name for row in rows)]
    shown = part.data.images['val'][:NUM_SHOWN]
    figure, axes = plt.subplots(
        len(shown),
        len(columns),
        figsize=(2.5 * len(columns), 2.4 * len(shown) + 0.4),
        squeeze=False,
        layout='constrained')
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, name in zip(axes[0], columns):
        ax.set_title(printable(name), fontsize=10, parse_math=False)
    for ax, image in zip(axes[:, 0], shown):
        ax.imshow(image.permute(1, 2, 0).numpy())
    colours = plt.get_cmap('tab20')
    for column, row in enumerate(rows, 2):
        cells = part.extract(row, 0)
        scorer = dense_probes.fit_linear(
            *dense_probes.draw_cells(cells['train'], 0), part.data.num_classes)
        for line, item in zip(axes, cells['val']):
            predicted = dense_probes.predict_mask(scorer, item)
            for ax, mask in ((line[1], item.mask), (line[column], predicted)):
                picture = colours(mask.numpy() % colours.N)
                picture[mask == dense_probes.IGNORED] = 1  # white
                ax.imshow(picture, interpolation='nearest')
    figure.legend(
        handles=[
            Patch(color=colours(i % colours.N), label=name)
            for i, name in enumerate(part.data.classes)
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
    names = short_names([str(x.resolve()) for x in args.data_root])
    parts: list = [
        LabelledPart(root, '' if len(names) == 1 else f'{name}: ', args)
        for root, name in zip(args.data_root, names)
    ]
    if args.unlabeled is not None:
        parts.append(UnlabeledPart(args))
    rows = make_rows(args)

    def save(values: Values) -> None:
        if args.json is not None:
            write_json(rows, values, parts, args)

    values = probe(rows, parts, args, save)
    show(rows, values, parts)
    if args.out is not None:
        draw(rows, parts[0], args.out)


if __name__ == '__main__':
    main()
