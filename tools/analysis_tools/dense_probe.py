# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Score the frozen dense features of checkpoints against random weights.

With labels (--data-root): mIoU of a linear and of a kNN probe of the cells.
Without (--unlabeled): how often the features find the same position in two
views. Means and standard deviations over seeds.
"""

import argparse
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import mmengine
import numpy as np
import torch
from mmengine.registry import init_default_scope
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from scipy import stats
from torchvision.transforms.v2 import functional as F

import mmdensecl
from mmdensecl.engine.command_line import run_quietly
from mmdensecl.engine.safe_write import write_safely
from mmdensecl.evaluation import dense_probes
from mmdensecl.evaluation.matching import (
    Accuracy,
    Pairs,
    compare,
    mean_accuracy,
    measure,
)
from mmdensecl.registry import DATASETS
from mmdensecl.transfer.feature_extractor import (
    FrozenBackbone,
    as_rgb,
    load_backbone,
)
from mmdensecl.visualization.views import pairs_of

RANDOM = 'random weights'
MATCHES = 'matches right'


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        'checkpoints',
        nargs='+',
        metavar='CHECKPOINT',
        help='of any format that mmdensecl.load_backbone reads',
    )
    add(
        '--config',
        help='config of the runs, where the checkpoints do not hold it',
    )
    add(
        '--data-root',
        type=Path,
        nargs='+',
        default=[],
        metavar='DIR',
        help='labelled images, laid out like VOCdevkit/VOC2012 or cityscapes',
    )
    add(
        '--unlabeled',
        metavar='FOLDER',
        help='images for matching without labels',
    )
    add(
        '--label',
        nargs='+',
        metavar='NAME',
        help='names of the checkpoints, by default those of the files',
    )
    add(
        '--max-images',
        type=int,
        default=100,
        help='images of each split or folder at most, 100 by default',
    )
    add(
        '--size',
        type=int,
        default=224,
        help="pixels of an image's shorter side, or of a view; 224 by default",
    )
    add('--seeds', type=int, default=3, help='how many, 3 by default')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    add(
        '--json',
        type=Path,
        metavar='FILE',
        help='write every value, and where it is from',
    )
    args = parser.parse_args()
    args.names = args.label or short_names(args.checkpoints)
    if not args.data_root and args.unlabeled is None:
        parser.error('give --data-root, --unlabeled or both')
    if min(args.max_images, args.size, args.seeds) < 1:
        parser.error('--max-images, --size and --seeds must be at least 1')
    count = len(args.checkpoints)
    if count != len(args.names) or count != len(set(args.names)):
        parser.error(
            f'{count} checkpoints need as many distinct names, got '
            f'{args.names}: use --label'
        )
    return args


def short_names(paths: Sequence[str | Path]) -> list[str]:
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
    """

    name: str
    network: FrozenBackbone
    baseline: str | None

    def backbone(self, images: torch.Tensor, seed: int) -> FrozenBackbone:
        """The network itself, or random weights for such images."""
        if self.baseline is not None:
            return self.network
        return self.network.untrained(images, seed)


def make_rows(args: argparse.Namespace) -> list[Row]:
    """The checkpoints, and random weights of each network among them."""
    baselines: list[Row] = []
    trained: list[Row] = []
    for name, path in zip(args.names, args.checkpoints, strict=True):
        network = load_backbone(path, args.device, config=args.config)
        same = [x for x in baselines if alike(x.network, network)]
        if not same:
            number = f' {len(baselines) + 1}' if baselines else ''
            same = [Row(f'{RANDOM}{number}', network, None)]
            baselines += same
        trained.append(Row(name, network, same[0].name))
    return baselines + trained


def alike(one: FrozenBackbone, other: FrozenBackbone) -> bool:
    """Whether two are one network, and see images normalised alike."""
    return (
        one.cfg == other.cfg
        and one.scope == other.scope
        and torch.equal(one.mean, other.mean)
        and torch.equal(one.std, other.std)
    )


Values = dict[str, dict[str, list[float]]]  # by column, row and seed


class LabelledPart:
    """Mean IoU of the probes on one dataset.

    Args:
        root: The dataset.
        heading: What its columns begin with.
        args: The command line.
    """

    def __init__(
        self, root: Path, heading: str, args: argparse.Namespace
    ) -> None:
        self.root = root
        self.columns = {x: f'{heading}mIoU, {x}' for x in dense_probes.PROBES}
        self.data = dense_probes.SegmentationImages(
            root, lambda path: as_rgb(path, args.size), args.max_images
        )
        self.squares = torch.stack(
            [
                F.center_crop(x, [args.size] * 2)
                for x in self.data.images['train']
            ]
        )
        self.latest: tuple[FrozenBackbone | None, dict] = None, {}

    def extract(self, row: Row, seed: int) -> dict:
        """Cells of both splits; those of a checkpoint serve all seeds."""
        if self.latest[0] is not row.network or row.baseline is None:
            backbone = row.backbone(self.squares, seed)
            self.latest = backbone, self.data.extract(backbone.extract_dense)
        return self.latest[1]

    def measure(self, row: Row, seed: int) -> dict[str, float]:
        """One number for each column."""
        cells, classes = self.extract(row, seed), self.data.num_classes
        values = dense_probes.dense_probes(
            **cells, num_classes=classes, seed=seed
        )
        return {self.columns[name]: value for name, value in values.items()}

    def sentences(self, row: Row, values: Values) -> Iterator[tuple[str, str]]:
        """What is said of a checkpoint, column by column."""
        for column in self.columns.values():
            found = values[column]
            base = found[str(row.baseline)]
            yield column, difference(found[row.name], base)

    def references(self) -> dict[str, list[float]]:
        """Rows that need no features."""
        return {}

    def describe(self) -> dict[str, Any]:
        """What was measured on, for --json."""
        counts = {f'num_{k}': len(x) for k, x in self.data.images.items()}
        return dict(
            data_root=str(self.root.resolve()),
            columns=[*self.columns.values()],
            classes=self.data.classes,
            **counts,
        )


class UnlabeledPart:
    """How often the same position is found.

    Args:
        args: The command line.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        init_default_scope('mmpretrain')
        pipeline = [
            dict(type='mmdensecl.DecodeRGB'),
            dict(type='mmdensecl.TwoViews', size=args.size),
            dict(type='mmdensecl.PackViews'),
        ]
        kind = 'mmdensecl.UnlabeledFolder'
        self.root, self.size = args.unlabeled, args.size
        self.dataset = DATASETS.build(
            dict(type=kind, data_root=self.root, pipeline=pipeline)
        )
        order = np.random.default_rng(0).permutation(len(self.dataset))
        self.chosen = order[: args.max_images].tolist()
        self.drawn: dict[int, Pairs] = {}
        self.found: dict[str, list[Accuracy]] = {}  # by row, for each seed

    def pairs(self, seed: int) -> Pairs:
        """Two views of each image, the same for all rows."""
        if seed not in self.drawn:
            self.dataset.set_epoch(0, seed)
            samples = [self.dataset[i] for i in self.chosen]
            self.drawn[seed] = pairs_of(samples, self.size)
        return self.drawn[seed]

    def measure(self, row: Row, seed: int) -> dict[str, float]:
        """One number for each column."""
        pairs = self.pairs(seed)
        found = measure(row.backbone(pairs.query, seed), pairs)
        self.found.setdefault(row.name, []).append(found)
        return {MATCHES: percent(found.right)}

    def sentences(self, row: Row, values: Values) -> Iterator[tuple[str, str]]:
        """What is said of a checkpoint, image by image."""
        names = row.name, str(row.baseline)
        found = compare(*(mean_accuracy(self.found[x]) for x in names))
        errors = ', '.join(f'{k}: {x:+.1f}' for k, x in found.errors.items())
        yield MATCHES, f'{found.sentence()} (Standard errors above {errors})'

    def references(self) -> dict[str, list[float]]:
        """Rows that need no features, with a number for each seed."""
        found = next(iter(self.found.values()))
        return {
            'the same position': [percent(x.same_position) for x in found],
            'chance': [percent(x.chance) for x in found],
        }

    def describe(self) -> dict[str, Any]:
        """What was measured on, for --json."""
        return dict(
            unlabeled=str(Path(self.root).resolve()),
            columns=[MATCHES],
            num_images=len(self.chosen),
            references=self.references(),
        )


def percent(shares: torch.Tensor) -> float:
    """The mean of those that are known."""
    return 100 * shares.nanmean().item()


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    text = f'{statistics.fmean(values):.1f}'
    if len(values) == 1:
        return text
    return f'{text} ± {statistics.stdev(values):.1f}'


def difference(values: Sequence[float], base: Sequence[float]) -> str:
    """The difference to random weights, and whether it is significant.

    Args:
        values: For each seed.
        base: Of random weights, for the same seeds.
    """
    apart = [a - b for a, b in zip(values, base, strict=True)]
    word, sign = 'better', 1
    if statistics.fmean(apart) < 0:
        word, sign = 'worse', -1
    apart = [sign * x for x in apart]
    text, amount = f'{word} than random weights', statistics.fmean(apart)
    if len(apart) == 1:
        return f'{text} by {amount:.1f} (one seed, so no interval is known)'
    # The paired 95% interval of Student's t.
    reach = stats.t.ppf(0.975, len(apart) - 1) * stats.sem(apart)
    low, high = amount - reach, amount + reach
    if low <= 0:
        text = f'not told apart from random weights: {word}'
    return f'{text} by {amount:.1f} ({low:.1f} to {high:.1f})'


def printable(text: str) -> str:
    """A name without line breaks and control characters."""
    return ''.join(x if x.isprintable() else ' ' for x in text)


def show(rows: Sequence[Row], values: Values, parts: Sequence) -> None:
    """Print the table and a sentence for each checkpoint and column."""
    console = Console()
    table = Table(caption='percent, mean ± std over seeds')
    table.add_column('weights', overflow='fold')
    for head in values:
        table.add_column(head, justify='right')
    for row in rows:
        cells = [spread(column[row.name]) for column in values.values()]
        table.add_row(escape(printable(row.name)), *cells)
    for part in parts:
        for name, found in part.references().items():
            blank = [''] * (len(values) - 1)
            table.add_row(name, *blank, spread(found))
    console.print(table)
    plain: dict = dict(markup=False, highlight=False, soft_wrap=True)
    for row in (x for x in rows if x.baseline is not None):
        for part in parts:
            for column, text in part.sentences(row, values):
                name = printable(row.name)
                console.print(f'{name}, {column}: {text}', **plain)


def write_json(
    rows: Sequence[Row],
    values: Values,
    parts: Sequence,
    args: argparse.Namespace,
) -> None:
    """Write every value, and where it is from."""
    modules = mmdensecl, mmengine, np, torch
    content = dict(
        command=shlex.join(sys.argv),
        versions=dict(python=platform.python_version())
        | {x.__name__: x.__version__ for x in modules},
        size=args.size,
        max_images=args.max_images,
        seeds=[*range(args.seeds)],
        data=[part.describe() for part in parts],
        rows=[
            dict(name=row.name, baseline=row.baseline)
            | (row.network.origin if row.baseline else {})
            for row in rows
        ],
        values=values,
    )
    text = json.dumps(content, indent=1, default=str)
    write_safely(args.json, text.encode())


def run(args: argparse.Namespace) -> None:
    """Probe, print, draw."""
    headings = [''] * len(args.data_root)
    if len(headings) > 1:
        names = short_names([x.resolve() for x in args.data_root])
        headings = [f'{name}: ' for name in names]
    parts: list = [
        LabelledPart(root, heading, args)
        for root, heading in zip(args.data_root, headings, strict=True)
    ]
    if args.unlabeled is not None:
        parts.append(UnlabeledPart(args))
    rows = make_rows(args)
    values: Values = {}
    steps = list(product(rows, parts, range(args.seeds)))
    print(
        f'{len(rows)} networks x {len(parts)} datasets x {args.seeds} seeds '
        f'on {args.device} ...',
        file=sys.stderr,
        flush=True,  # a pipe sees no bar
    )
    for row, part, seed in track(steps, 'probing', transient=True):
        for column, x in part.measure(row, seed).items():
            by_row = values.setdefault(column, {})
            by_row.setdefault(row.name, []).append(x)
        last = part is parts[-1] and seed == args.seeds - 1
        if last and args.json is not None:  # what is known if the rest fails
            write_json(rows, values, parts, args)
    show(rows, values, parts)


def main() -> None:
    """Run the tool."""
    run_quietly(run, parse_args())


if __name__ == '__main__':
    main()
