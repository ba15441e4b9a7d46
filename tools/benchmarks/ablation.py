# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Pre-train configs at equal cost, probe the frozen features, print a table.

    python tools/benchmarks/ablation.py configs/mini/*.py \
        --data-root data/my_images --seeds 2 \
        --score data/cityscapes data/VOCdevkit/VOC2012 --out work_dirs/ablation

Each config trains once for each seed with tools/train.py and is scored with
tools/analysis_tools/dense_probe.py. What is finished is not repeated, and a
run that was stopped resumes; `--report` prints the table of what is there.
`--peers` trains DenseCL as mmpretrain and lightly-train have it (peers.py),
with network, views and recipe of the first config, which is to be of DenseCL.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import peers
from matplotlib.figure import Figure
from mmengine.config import Config

from mmdensecl.benchmark.report import table_lines
from mmdensecl.benchmark.stats import compare

TOOLS = Path(__file__).resolve().parents[1]
RANDOM = 'random weights'  # of dense_probe.py
# From the log: what each config learnt, and what a step cost.
LOGGED = ('position_r2', 'match_acc', 'match_coverage', 'time')


class Run(NamedTuple):
    """One pre-training.

    Attributes:
        name: Of its row: the config's, or a peer.
        config: The config file, of a peer that of its network.
        seed: Of the pre-training.
        work_dir: Where it trains.
    """

    name: str
    config: Path
    seed: int
    work_dir: Path

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the last epoch."""
        epochs = Config.fromfile(self.config).train_cfg.max_epochs
        file = peers.WEIGHTS.get(self.name, 'epoch_{epochs}.pth')
        return self.work_dir / file.format(epochs=epochs)

    @property
    def scores(self) -> Path:
        """What the probes of its features gave."""
        return self.work_dir / 'probe.json'


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument(
        '--data-root', metavar='FOLDER', help='images of the pre-training'
    )
    parser.add_argument(
        '--score',
        nargs='+',
        required=True,
        metavar='DIR',
        help='labelled images, in the layout of VOC2012 or Cityscapes, none '
        'of them in --data-root',
    )
    parser.add_argument(
        '--seeds', type=int, default=2, help='pre-trainings of each config'
    )
    parser.add_argument(
        '--peers',
        nargs='*',
        choices=[*peers.PACKAGES],
        default=[],
        help='train these, too, each in an environment that uv makes below '
        '--out',
    )
    parser.add_argument('--max-images', type=int, default=150)
    parser.add_argument('--out', type=Path, default='work_dirs/ablation')
    parser.add_argument(
        '--baseline',
        default='mocov2',
        help='differences are to the config whose name starts like this',
    )
    parser.add_argument(
        '--report',
        action='store_true',
        help='train nothing; print the table of what is there',
    )
    args = parser.parse_args()
    if args.data_root is None and not args.report:
        parser.error('--data-root names the images to pre-train on')
    return args


def call(command: Sequence[str], **variables: str) -> bool:
    """Run a command; say so if it fails."""
    done = subprocess.run(command, env={**os.environ, **variables})
    if done.returncode:
        print(f'FAILED ({done.returncode}): {" ".join(command)}')
    return not done.returncode


def call_tool(script: str, *args: str) -> bool:
    """Run a tool of this repository."""
    paths = str(TOOLS.parent), os.environ.get('PYTHONPATH')
    path = os.pathsep.join(filter(None, paths))
    command = [sys.executable, str(TOOLS / script), *args]
    return call(command, PYTHONPATH=path)


def train(run: Run, data_root: str, pythons: dict[str, str]) -> bool:
    """Pre-train, or go on where the run was stopped; a peer starts anew."""
    if run.checkpoint.is_file():
        return True
    if run.name in pythons:
        settings = peers.read_settings(run.config, data_root, run.seed)
        python = pythons[run.name]
        command = peers.command(run.name, python, settings, run.work_dir)
        return call(command, **peers.OFFLINE)
    return call_tool(
        'train.py',
        str(run.config),
        '--work-dir',
        str(run.work_dir),
        '--resume',
        '--cfg-options',
        f'randomness.seed={run.seed}',
        f'data_root={data_root}',
    )


def score(run: Run, args: argparse.Namespace) -> bool:
    """Probe the features of the last checkpoint, and random weights."""
    return run.scores.is_file() or call_tool(
        'analysis_tools/dense_probe.py',
        str(run.checkpoint),
        '--config',
        str(run.config),
        '--data-root',
        *args.score,
        '--max-images',
        str(args.max_images),
        '--json',
        str(run.scores),
    )


def read_log(run: Run) -> dict[str, float]:
    """Medians of the last tenth of the lines that training logged."""
    lines = [
        json.loads(line)
        for path in sorted(run.work_dir.rglob('scalars.json'))
        for line in path.read_text(encoding='utf-8').splitlines()
    ]
    last = lines[-max(1, len(lines) // 10) :]
    return {
        key: statistics.median(line[key] for line in last)
        for key in LOGGED
        if lines and key in lines[-1]
    }


def collect(runs: Sequence[Run]) -> tuple[pd.DataFrame, dict[str, dict]]:
    """Scores and log entries of the runs that are finished.

    Random weights are a row of each kind of padding, which they feel too.

    Returns:
        A line for each ``column``, ``method``, ``pretrain_seed`` (none of
        random weights) and ``seed``, with its ``value``; the log entries of
        each pre-training.
    """
    lines: dict[tuple, float] = {}
    logged: dict[str, dict] = {}
    for run in runs:
        if not run.scores.is_file():
            continue
        content = json.loads(run.scores.read_text(encoding='utf-8'))
        name = run.name
        logged.setdefault(name, {})[run.seed] = read_log(run)
        for column, rows in content['values'].items():
            drawn = [x for x in rows if x.startswith(RANDOM)]
            if len(rows) != 2 or len(drawn) != 1:
                raise ValueError(
                    f'{run.scores} has the rows {[*rows]}, expected random '
                    'weights and one checkpoint'
                )
            for row, values in rows.items():
                key: tuple = column, name, run.seed
                if row in drawn:
                    key = column, f'{RANDOM}, {padding_mode(run.config)}', None
                for seed, value in enumerate(values):
                    lines.setdefault((*key, seed), value)
    names = ['column', 'method', 'pretrain_seed', 'seed', 'value']
    values = pd.DataFrame(
        [(*key, value) for key, value in lines.items()], columns=names
    )
    return values, logged


def padding_mode(config: Path) -> str:
    """How the convs of a config's backbone pad."""
    conv = Config.fromfile(config).model.backbone.get('conv_cfg') or {}
    return f'padding {conv.get("padding_mode", "zeros")}'


def make_table(
    tables: dict[str, pd.DataFrame],
    logged: dict[str, dict],
    baseline: str | None,
) -> str:
    """The table in Markdown."""
    names = [*dict.fromkeys(x for t in tables.values() for x in t.index)]
    frame = pd.DataFrame(index=sorted(names, key=lambda x: (x in logged, x)))
    for column, table in tables.items():
        frame['pre-trainings'] = table['pretrainings']
        frame[column] = [
            ''
            if pd.isna(x.get('mean'))
            else f'{x["mean"]:.1f} ± {x.margin:.1f}'
            for _, x in table.reindex(frame.index).iterrows()
        ]
    for column, table in tables.items() if baseline else ():
        frame[f'{column}, over {baseline}'] = [
            ''
            if pd.isna(x['difference'])
            else f'{x["difference"]:+.1f} ({x["low"]:.1f} to {x["high"]:.1f})'
            for _, x in table.reindex(frame.index).iterrows()
        ]
    for key in LOGGED:
        means = {
            name: pd.DataFrame(seeds.values()).get(key, pd.Series()).mean()
            for name, seeds in logged.items()
        }
        shown = frame.index.map(means.get)
        frame[key] = ['' if pd.isna(x) else f'{x:.3g}' for x in shown]
    frame = frame.rename(short).rename_axis('config').reset_index()
    rows = [[*frame.columns], *frame.astype(str).to_numpy().tolist()]
    return '\n'.join(table_lines(rows)).strip()


def short(name: str) -> str:
    """The name of a config without what all have in common."""
    return re.sub(r'_r\d+\w*_\d+xb\d+-coslr-\d+e', '', name)


def draw(tables: dict[str, pd.DataFrame], path: Path) -> None:
    """Draw means and their intervals, one panel for each column."""
    figure = Figure((3 * len(tables) + 2, 5), layout='constrained')
    axes = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for ax, (column, table) in zip(axes, tables.items(), strict=True):
        own = table.sort_index(ascending=False).rename(short)
        margin = own['margin'].astype(float)
        ax.errorbar(own['mean'], own.index, xerr=margin, fmt='o')
        ax.set_title(column, fontsize=9)
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train and score what is not finished, and print the table."""
    args = parse_args()
    rows = {config.stem: config for config in args.configs}
    rows |= dict.fromkeys(args.peers, args.configs[0])
    runs = [
        Run(name, config, seed, args.out / name / f'seed{seed}')
        for seed in range(args.seeds)
        for name, config in rows.items()
    ]
    if not args.report:
        pythons = {x: peers.install(x, args.out) for x in args.peers}
        for run in runs:
            _ = train(run, args.data_root, pythons) and score(run, args)
    values, logged = collect(runs)
    if not len(values):
        sys.exit(f'Nothing is finished in {args.out}')
    named = [x for x in logged if x.startswith(args.baseline)]
    baseline = args.baseline if args.baseline in logged else [*named, None][0]
    tables = {
        str(column): compare(own, baseline)
        for column, own in values.groupby('column', sort=False)
    }
    table = make_table(tables, logged, baseline)
    print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / 'ablation.md').write_text(table + '\n', encoding='utf-8')
    draw(tables, args.out / 'ablation.png')


if __name__ == '__main__':
    main()
