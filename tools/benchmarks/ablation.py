# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Pre-train configs at equal cost, probe the frozen features, print a table.

    python tools/benchmarks/ablation.py configs/mini/*.py \
        --data-root data/my_images --seeds 2 \
        --score data/cityscapes data/VOCdevkit/VOC2012 --out work_dirs/ablation

Each config trains once for each seed with tools/train.py and is scored with
tools/analysis_tools/dense_probe.py. What is finished is not repeated, and a
run that was stopped resumes; `--report` prints the table of what is there.
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

import matplotlib
from mmengine.config import Config
from scipy import stats

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

TOOLS = Path(__file__).resolve().parents[1]
RANDOM = 'random weights'
# From the log: what each config learnt, and what a step cost.
LOGGED = ('position_r2', 'match_acc', 'match_coverage', 'time')


class Run(NamedTuple):
    """One pre-training.

    Attributes:
        config: The config file.
        seed: Of the pre-training.
        work_dir: Where it trains.
    """
    config: Path
    seed: int
    work_dir: Path

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the last epoch."""
        epochs = Config.fromfile(self.config).train_cfg.max_epochs
        return self.work_dir / f'epoch_{epochs}.pth'

    @property
    def scores(self) -> Path:
        """What the probes of its features gave."""
        return self.work_dir / 'probe.json'


class Estimate(NamedTuple):
    """A mean over pre-trainings and the half width of its interval."""
    mean: float
    margin: float

    def __str__(self) -> str:
        return f'{self.mean:.1f} ± {self.margin:.1f}'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', type=Path)
    parser.add_argument(
        '--data-root', metavar='FOLDER', help='images of the pre-training')
    parser.add_argument(
        '--score',
        nargs='+',
        required=True,
        metavar='DIR',
        help='labelled images, in the layout of VOC2012 or Cityscapes, none '
        'of them in --data-root')
    parser.add_argument(
        '--seeds', type=int, default=2, help='pre-trainings of each config')
    parser.add_argument('--max-images', type=int, default=150)
    parser.add_argument('--out', type=Path, default='work_dirs/ablation')
    parser.add_argument(
        '--baseline',
        default='mocov2',
        help='differences are to the config whose name starts like this')
    parser.add_argument(
        '--report',
        action='store_true',
        help='train nothing; print the table of what is there')
    args = parser.parse_args()
    if args.data_root is None and not args.report:
        parser.error('--data-root names the images to pre-train on')
    return args


def call(*command: str) -> bool:
    """Run a tool of this repository; say so if it fails."""
    env = dict(os.environ)
    env['PYTHONPATH'] = os.pathsep.join(
        filter(None, [str(TOOLS.parent), env.get('PYTHONPATH')]))
    done = subprocess.run([sys.executable, *command], env=env)
    if done.returncode:
        print(f'FAILED ({done.returncode}): {" ".join(command)}')
    return not done.returncode


def train(run: Run, data_root: str) -> bool:
    """Pre-train, or go on where the run was stopped."""
    return run.checkpoint.is_file() or call(
        str(TOOLS / 'train.py'), str(run.config), '--work-dir',
        str(run.work_dir), '--resume', '--cfg-options',
        f'randomness.seed={run.seed}', f'data_root={data_root}')


def score(run: Run, args: argparse.Namespace) -> bool:
    """Probe the features of the last checkpoint, and random weights."""
    return run.scores.is_file() or call(
        str(TOOLS / 'analysis_tools' / 'dense_probe.py'), str(run.checkpoint),
        '--data-root', *args.score, '--max-images', str(args.max_images),
        '--json', str(run.scores))


def read_log(run: Run) -> dict[str, float]:
    """Medians of the last tenth of the lines that training logged."""
    lines = [
        json.loads(line)
        for path in sorted(run.work_dir.glob('*/vis_data/scalars.json'))
        for line in path.read_text(encoding='utf-8').splitlines()
    ]
    last = lines[-max(1, len(lines) // 10):]
    return {
        key: statistics.median(line[key] for line in last)
        for key in LOGGED if lines and key in lines[-1]
    }


Values = dict[str, dict[str, list[float]]]  # by column, row and pre-training


def collect(runs: Sequence[Run]) -> tuple[Values, dict[str, dict]]:
    """Scores and log entries of the runs that are finished.

    Random weights are a row of each network; their draws count like
    pre-trainings.
    """
    values: Values = {}
    logged: dict[str, dict] = {}
    drawn = set()
    for run in runs:
        if not run.scores.is_file():
            continue
        content = json.loads(run.scores.read_text(encoding='utf-8'))
        name = run.config.stem
        logged.setdefault(name, {})[run.seed] = read_log(run)
        for column, rows in content['values'].items():
            by_row = values.setdefault(column, {})
            own, base = rows.values() if len(rows) == 2 else (None, None)
            if own is None:
                raise ValueError(f'{run.scores} has {len(rows)} rows, expected'
                                 ' random weights and one checkpoint')
            base, own = ((own, base) if RANDOM in list(rows)[0] else
                         (base, own))
            by_row.setdefault(name, []).append(statistics.fmean(own))
            row = f'{RANDOM}, padding {padding_mode(run.config)}'
            if (column, row) not in drawn:
                drawn.add((column, row))
                by_row[row] = list(base)
    return values, logged


def padding_mode(config: Path) -> str:
    """How the convs of a config's backbone pad, which random ones feel too."""
    conv = Config.fromfile(config).model.backbone.get('conv_cfg') or {}
    return conv.get('padding_mode', 'zeros')


def pooled_deviation(rows: dict[str, list[float]]) -> tuple[float, int]:
    """Standard deviation between pre-trainings of one config, all pooled.

    A pair of pre-trainings alone says next to nothing of its spread; the
    analysis of variance takes the spread of all rows as one.

    Args:
        rows: Scores of the pre-trainings of each config.

    Returns:
        The deviation, and its degrees of freedom.
    """
    freedom = sum(len(x) - 1 for x in rows.values())
    if not freedom:
        return float('nan'), 0
    squares = sum((x - statistics.fmean(xs))**2 for xs in rows.values()
                  for x in xs)
    return (squares / freedom)**0.5, freedom


def estimate(rows: dict[str, list[float]],
             name: str,
             baseline: str | None = None) -> Estimate:
    """The mean of a config, or its difference to another, with its interval.

    Args:
        rows: Scores of the pre-trainings of each config.
        name: The config.
        baseline: The other one.

    Returns:
        The mean and half of the 95 % interval.
    """
    deviation, freedom = pooled_deviation(
        {k: x
         for k, x in rows.items() if not k.startswith(RANDOM)})
    used = [rows[name]] + ([] if baseline is None else [rows[baseline]])
    mean = statistics.fmean(used[0])
    if baseline is not None:
        mean -= statistics.fmean(used[1])
    width = deviation * sum(1 / len(x) for x in used)**0.5
    factor = stats.t.ppf(0.975, freedom) if freedom else float('nan')
    return Estimate(mean, float(factor * width))


def make_table(values: Values, logged: dict[str, dict],
               baseline: str | None) -> str:
    """The table in Markdown."""
    columns = list(values)
    names = sorted({n for rows in values.values() for n in rows},
                   key=lambda n: (not n.startswith(RANDOM), n))
    keys = [k for k in LOGGED if any(
        k in x for seeds in logged.values() for x in seeds.values())]
    head = ['config', 'pre-trainings', *columns]
    head += [f'{c}, over {baseline}' for c in columns if baseline]
    head += keys
    lines = [head, ['---'] * len(head)]
    for name in names:
        line = [short(name), str(len(values[columns[0]].get(name, [])))]
        line += [str(estimate(values[c], name)) for c in columns]
        if baseline:
            line += [
                '' if name == baseline else
                f'{(e := estimate(values[c], name, baseline)).mean:+.1f} '
                f'± {e.margin:.1f}' for c in columns
            ]
        for key in keys:
            found = [x[key] for x in logged.get(name, {}).values() if key in x]
            line.append(f'{statistics.fmean(found):.3g}' if found else '')
        lines.append(line)
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def short(name: str) -> str:
    """The name of a config without what all have in common."""
    return re.sub(r'_r\d+\w*_\d+xb\d+-coslr-\d+e', '', name)


def draw(values: Values, path: Path) -> None:
    """Draw means and intervals, one panel for each column."""
    figure, axes = plt.subplots(
        1,
        len(values),
        figsize=(3 * len(values) + 2, 5),
        sharey=True,
        squeeze=False,
        layout='constrained')
    names = sorted({n for rows in values.values() for n in rows},
                   reverse=True)
    for ax, (column, rows) in zip(axes[0], values.items(), strict=True):
        for y, name in enumerate(names):
            if name in rows:
                found = estimate(rows, name)
                ax.errorbar(
                    found.mean, y, xerr=found.margin, fmt='o', color='C0')
                ax.plot(rows[name], [y] * len(rows[name]), '|', color='grey')
        ax.set_title(column, fontsize=9)
        ax.set_yticks(range(len(names)), [short(n) for n in names])
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    args = parse_args()
    runs = [
        Run(config, seed, args.out / config.stem / f'seed{seed}')
        for seed in range(args.seeds) for config in args.configs
    ]
    if not args.report:
        for run in runs:
            _ = train(run, args.data_root) and score(run, args)
    values, logged = collect(runs)
    if not values:
        sys.exit(f'Nothing is finished in {args.out}')
    baseline = next((name for name in logged if name == args.baseline), None)
    baseline = baseline or next(
        (name for name in logged if name.startswith(args.baseline)), None)
    table = make_table(values, logged, baseline)
    print(table)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / 'ablation.md').write_text(table + '\n', encoding='utf-8')
    draw(values, args.out / 'ablation.png')


if __name__ == '__main__':
    main()
