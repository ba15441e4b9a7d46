# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Train the first steps in several ways and compare the loss curves.

Each run is one of tools/train.py with the same seed. Another seed's run says
how far apart curves lie that differ by nothing but chance.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import measure
import numpy as np

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

TRAIN = Path(__file__).resolve().parents[1] / 'train.py'


class Run(NamedTuple):
    """A way to train.

    Attributes:
        name (str): What the table calls it.
        config (str): A config file.
        options (list[str]): For ``--cfg-options``.
    """

    name: str
    config: str
    options: list[str]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = measure.make_parser(__doc__, timing=False)
    parser.add_argument('config', help='config file of the reference run')
    parser.add_argument(
        '--config',
        dest='others',
        nargs=2,
        action='append',
        default=[],
        metavar=('NAME', 'FILE'),
        help='compare with another config file',
    )
    parser.add_argument(
        '--variant',
        dest='variants',
        nargs='+',
        action='append',
        default=[],
        metavar=('NAME', 'KEY=VALUE'),
        help='compare with the reference config and other settings',
    )
    parser.add_argument('--epochs', type=int, default=1, help='of each run')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument(
        '--work-dir', type=Path, default='work_dirs/compare_curves'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='settings of all runs, such as data_root=/path/to/images',
    )
    args = measure.parse(parser)
    if args.epochs < 1:
        parser.error(f'--epochs must be at least 1, got {args.epochs}')
    names = [run.name for run in list_runs(args)]
    if len({name.replace(' ', '_') for name in names}) < len(names):
        parser.error(f'the runs need names of their own, got {names}')
    return args


def list_runs(args: argparse.Namespace) -> list[Run]:
    """The reference, what it is compared with, and another seed."""
    return [
        Run('reference', args.config, []),
        *(Run(name, config, []) for name, config in args.others),
        *(Run(name, args.config, options) for name, *options in args.variants),
        Run('another seed', args.config, [f'randomness.seed={args.seed + 1}']),
    ]


def train(run: Run, args: argparse.Namespace) -> np.ndarray:
    """Train, and read the loss of each step from the run's own log."""
    folder = args.work_dir / run.name.replace(' ', '_')
    command = [
        sys.executable,
        str(TRAIN),
        run.config,
        '--work-dir',
        str(folder),
        '--cfg-options',
        f'randomness.seed={args.seed}',
        f'train_cfg.max_epochs={args.epochs}',
        'default_hooks.logger.interval=1',
        'log_processor.window_size=1',  # each step's own loss
        'default_hooks.checkpoint.interval=-1',
        'default_hooks.checkpoint.save_last=False',
        *args.cfg_options,
        *run.options,
    ]
    print(f'{run.name}: {folder}', flush=True)
    path = args.work_dir / f'{folder.name}.log'
    with path.open('w', encoding='utf-8') as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f'{run.name} failed, see {log.name}')
    newest = max(folder.glob('*/vis_data/scalars.json'))
    rows = map(json.loads, newest.read_text(encoding='utf-8').splitlines())
    return np.array([row['loss'] for row in rows if 'loss' in row])


def main() -> None:
    """Train all, and compare their losses."""
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    curves = {run.name: train(run, args) for run in list_runs(args)}
    reference = curves['reference']
    report = measure.Report(
        f'Loss over {len(reference)} steps of {Path(args.config).name}; '
        'differences to the reference',
        args,
    )
    tail = max(1, len(reference) // 10)
    for name, losses in curves.items():
        difference = losses - reference
        apart = np.abs(difference)
        report.add(
            name,
            first_step=f'{losses[0]:.6f}',
            mean_of_last_tenth=f'{losses[-tail:].mean():.4f}',
            first_difference=float(apart[0]),
            mean_distance=float(apart.mean()),
            largest_distance=float(apart.max()),
            shift=float(difference.mean()),
            standard_error=float(difference.std() / len(difference) ** 0.5),
        )
    report.show()
    draw(curves, args.work_dir / 'curves.png')


def draw(curves: dict[str, Any], path: Path) -> None:
    """All curves in one figure, and their differences below."""
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(6.4, 5.2), sharex=True, layout='constrained'
    )
    for name, losses in curves.items():
        (line,) = top.plot(losses, label=name, linewidth=1)
        if name != 'reference':
            bottom.semilogy(
                np.abs(losses - curves['reference']).clip(min=1e-8),
                color=line.get_color(),
                linewidth=1,
            )
    top.set_ylabel('loss')
    top.legend(fontsize=8)
    bottom.set_ylabel('distance to the reference')
    bottom.set_xlabel('step')
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f'Wrote {path}')


if __name__ == '__main__':
    main()
