# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Plot the curves of runs, or sum up the time they took.

    analyze_logs.py plot_curve work_dirs/a work_dirs/b --keys loss --out a.png
    analyze_logs.py cal_train_time work_dirs/a

As in mmdet, a log is mmengine's `<time>/vis_data/scalars.json`; a work_dir
stands for those of all its starts.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

Curve = dict[int, float]  # a value by the training's iteration


def read_rows(log: Path) -> list[dict]:
    """Read the rows of a run, in order.

    Args:
        log: A scalars.json, or a work_dir. What an earlier start had logged at
            or after the first iteration of a later one is left out.

    Returns:
        The rows; those of a validation have no `loss`.

    Raises:
        FileNotFoundError: There is no log.
    """
    files = (
        [log] if log.is_file() else sorted(log.glob('*/vis_data/scalars.json'))
    )
    if not files:
        raise FileNotFoundError(
            f'"{log}" is neither a scalars.json nor a work_dir with a log '
            '<time>/vis_data/scalars.json'
        )
    rows: list[dict] = []
    for file in files:
        new: list[dict] = []
        for line in file.read_text(encoding='utf-8').splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut off where a run was killed
                continue
            if 'step' not in row:
                continue
            if new:  # mmengine counts a validation in epochs
                row['step'] = max(row['step'], new[-1]['step'])
            new.append(row)
        if new:
            rows = [x for x in rows if x['step'] < new[0]['step']] + new
    return rows


def curve_of(rows: list[dict], key: str) -> Curve:
    """The values of a key by the training's iteration."""
    return {row['step']: row[key] for row in rows if key in row}


def plot_curve(args: argparse.Namespace) -> None:
    """Draw every key of every log into one figure."""
    import matplotlib

    if args.out:
        matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    plt.style.use(args.style)
    names = [(log, key) for log in args.json_logs for key in args.keys]
    legend = args.legend or [
        f'{log.name} {key}' if len(args.json_logs) > 1 else key
        for log, key in names
    ]
    if len(legend) != len(names):
        raise ValueError(
            f'--legend has {len(legend)} names for {len(names)} '
            'curves, one for each key of each log in turn'
        )
    figure, axes = plt.subplots()
    logs = {log: read_rows(log) for log in args.json_logs}
    for (log, key), label in zip(names, legend, strict=True):
        curve = curve_of(logs[log], key)
        if not curve:
            known = sorted({x for row in logs[log] for x in row})
            raise KeyError(f'"{log}" has no "{key}", only {", ".join(known)}')
        axes.plot([*curve], [*curve.values()], label=label, linewidth=1)
    axes.set_xlabel('iteration')
    axes.legend()
    if args.title:
        axes.set_title(args.title)
    if args.out:
        figure.savefig(args.out, dpi=110, bbox_inches='tight')
        print(f'Wrote {args.out}')
    else:
        plt.show()
    plt.close(figure)


def cal_train_time(args: argparse.Namespace) -> None:
    """Print the time of an iteration, over all and by epoch."""
    for log in args.json_logs:
        epochs: dict[int, list] = defaultdict(list)
        for row in read_rows(log):
            if 'time' in row and 'loss' in row:
                epochs[row.get('epoch', 1)].append(
                    (row['time'], row.get('data_time', 0.0))
                )
        if not epochs:
            raise KeyError(f'"{log}" has no row with a "time" and a "loss"')
        if not args.include_outliers:  # the first row of an epoch
            epochs = {k: v[1:] or v for k, v in epochs.items()}
        means = {
            k: float(np.mean([x for x, _ in v])) for k, v in epochs.items()
        }
        times, waits = np.array(sum(epochs.values(), [])).T
        slowest, fastest = (
            f(means, key=means.__getitem__) for f in (max, min)
        )
        print(
            f'-----Analyze train time of {log}-----\n'
            f'slowest epoch {slowest}, average time is '
            f'{means[slowest]:.4f} s/iter\n'
            f'fastest epoch {fastest}, average time is '
            f'{means[fastest]:.4f} s/iter\n'
            f'time std over epochs is {np.std([*means.values()]):.4f}\n'
            f'average iter time: {times.mean():.4f} s/iter, '
            f'{waits.sum() / times.sum():.0%} of it waiting for data\n'
        )


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tasks = parser.add_subparsers(required=True)
    plot = tasks.add_parser('plot_curve', help='plot the curves of runs')
    plot.set_defaults(run=plot_curve)
    plot.add_argument(
        '--keys', nargs='+', default=['loss'], help='what to plot'
    )
    plot.add_argument(
        '--legend', nargs='+', help='a name for each key of each log'
    )
    plot.add_argument('--title', help='of the figure')
    plot.add_argument('--style', default='default', help="matplotlib's")
    plot.add_argument(
        '--out', type=Path, help='file to write, by default a window'
    )
    time = tasks.add_parser('cal_train_time', help='the time of an iteration')
    time.set_defaults(run=cal_train_time)
    time.add_argument(
        '--include-outliers',
        action='store_true',
        help='count the first row of each epoch, too',
    )
    for task in (plot, time):
        task.add_argument(
            'json_logs',
            nargs='+',
            type=Path,
            help='scalars.json, or the work_dir of a run',
        )
    return parser.parse_args()


def main() -> None:
    """Run the task that was asked for."""
    args = parse_args()
    try:
        args.run(args)
    except (OSError, KeyError, ValueError) as error:
        raise SystemExit(f'error: {error.args[-1]}') from error


if __name__ == '__main__':
    main()
