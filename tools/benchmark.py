# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Compare pre-trained weights: many downstream runs, one table.

    python tools/benchmark.py run mini --checkpoint DenseCL=epoch_200.pth
    python tools/benchmark.py report work_dirs/benchmark/mini
    python tools/benchmark.py sweep lambda --pretrain-data my_pictures
"""
import argparse
import os
import sys
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Dict, List, Optional, Sequence

import torch
from mmengine.config import DictAction
from mmengine.logging import MMLogger
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmdensecl.benchmark import state
from mmdensecl.benchmark.ablation import (ABLATIONS, find_ablation,
                                          plan_pretraining, weights_of)
from mmdensecl.benchmark.plan import RANDOM, Checkpoint, Run, plan_runs
from mmdensecl.benchmark.report import (check_planned, print_tables,
                                        write_report)
from mmdensecl.benchmark.runner import Benchmark, Launcher, only_one
from mmdensecl.benchmark.suite import PROTOCOLS, Suite, load_suite
from mmdensecl.engine.command_line import prepare_tool

ROOT = Path(__file__).resolve().parents[1]
SUITES = ROOT / 'configs' / 'benchmarks' / 'suites'
MINI = ROOT / 'configs' / 'mini' / 'densecl_r18_1xb32-coslr-40e_folder.py'
SUITE_HELP = ('"paper" (the full protocols), "mini" (the same models, small), '
              '"demo" (smaller still) or the path of a suite file')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)

    run = commands.add_parser(
        'run', help='run a suite, or what of it has not finished yet')
    run.add_argument('suite', help=SUITE_HELP)
    run.add_argument(
        '--checkpoint',
        nargs='+',
        action='extend',
        default=[],
        metavar='NAME=PATH',
        help='a row of the table and its weights, any file that '
        'PretrainedBackbone takes; call supervised weights "supervised"')
    run.add_argument(
        '--work-dir',
        default='work_dirs/benchmark',
        help='the runs go to WORK_DIR/SUITE')
    add_shared_flags(run)

    sweep = commands.add_parser(
        'sweep',
        help='pre-train once for each value of a setting, run a suite with '
        'each, and plot what comes out')
    sweep.add_argument(
        'ablation', nargs='?', help=f'one of {", ".join(ABLATIONS)}')
    sweep.add_argument(
        '--key',
        help='a setting of the config, such as model.momentum, in the place '
        'of an ablation')
    sweep.add_argument(
        '--values',
        nargs='+',
        default=[],
        help='at least two, by default those of the ablation; a later call '
        'may add others')
    sweep.add_argument(
        '--config',
        type=Path,
        default=MINI,
        help='of the pre-training, by default '
        'configs/mini/densecl_r18_1xb32-coslr-40e_folder.py')
    sweep.add_argument(
        '--pretrain-data',
        metavar='FOLDER',
        help='pictures of the pre-training, in the place of its data_root')
    sweep.add_argument(
        '--pretrain-options',
        nargs='+',
        action=DictAction,
        default={},
        help='override settings of the pre-training, "a.b=c"')
    sweep.add_argument('--suite', default='mini', help=SUITE_HELP)
    sweep.add_argument(
        '--work-dir',
        default='work_dirs/ablation',
        help='pre-training goes to WORK_DIR/ABLATION/pretrain, the runs to '
        'WORK_DIR/ABLATION/SUITE')
    add_shared_flags(sweep)

    report = commands.add_parser(
        'report', help='write the tables of what has finished')
    report.add_argument('suite_dir', type=Path, help='WORK_DIR/SUITE of a run')
    report.add_argument('--out', type=Path, help='by default SUITE_DIR/report')
    add_baseline(report)
    return parser.parse_args()


def add_baseline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--baseline',
        help='row that the others are compared to, by default the first')


def add_shared_flags(parser: argparse.ArgumentParser) -> None:
    """What `run` and `sweep` have in common."""
    parser.add_argument(
        '--no-random',
        action='store_true',
        help='leave out the row of random weights')
    parser.add_argument(
        '--protocol',
        nargs='+',
        choices=PROTOCOLS,
        default=list(PROTOCOLS),
        help='train the head alone, or all')
    parser.add_argument(
        '--seeds',
        type=int,
        default=1,
        help='downstream runs of each kind, with the seeds 0, 1, ...; a probe '
        'of fixed weights runs once')
    parser.add_argument(
        '--tasks', nargs='+', default=[], help='only these tasks of the suite')
    parser.add_argument(
        '--data-root',
        default=os.environ.get('MMDENSECL_DATA_ROOT', 'data'),
        help='folder above coco, VOCdevkit, cityscapes, imagenet; by default '
        'MMDENSECL_DATA_ROOT or "data"')
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        '--gpus',
        type=int,
        default=0,
        help='GPUs of each run; they share the batch of the protocol')
    where.add_argument(
        '--slurm', metavar='PARTITION', help='submit each run with srun')
    parser.add_argument(
        '--slurm-gpus', type=int, default=8, help='GPUs of a Slurm run')
    parser.add_argument(
        '--jobs', type=int, default=1, help='runs at the same time')
    parser.add_argument(
        '--dry-run',
        action='store_true',
        help='print every run with its cost, and start none')
    parser.add_argument(
        '--redo',
        action='store_true',
        help='discard and repeat runs whose settings have changed')
    parser.add_argument(
        '--drop-checkpoints',
        action='store_true',
        help='remove the downstream checkpoints of finished runs')
    add_baseline(parser)
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        help='override settings of all downstream configs, "a.b=c"')


def read_rows(pairs: List[str],
              with_random: bool) -> Dict[str, Optional[Checkpoint]]:
    """The rows of the table, each checkpoint looked into."""
    rows: Dict[str, Optional[Checkpoint]] = {}
    if with_random:
        rows[RANDOM] = None
    for pair in pairs:
        name, equals, path = pair.partition('=')
        if not (name and equals and path):
            raise ValueError(f'--checkpoint takes NAME=PATH, got "{pair}"')
        if name == RANDOM:
            raise ValueError(f'The row "{RANDOM}" is that of random weights; '
                             f'give "{path}" another name')
        if name in rows:
            raise ValueError(f'Two rows are called "{name}"')
        rows[name] = Checkpoint.read(path)
        for other, known in rows.items():
            if other != name and known and known.sha256 == rows[name].sha256:
                raise ValueError(
                    f'The rows "{other}" and "{name}" are the same weights: '
                    f'"{known.path}" and "{rows[name].path}" have sha256 '
                    f'{known.sha256[:8]}')
    if not rows:
        raise ValueError('There is nothing to run: name --checkpoint '
                         'NAME=PATH, or leave out --no-random')
    return rows


def show_plan(benchmark: Benchmark, console: Console) -> None:
    """Print every run, what it costs and how far it is."""
    # The names of `mini` fit a terminal of 80 columns.
    runs = benchmark.runs
    table = Table(title=f'{len(runs)} runs', box=SIMPLE_HEAD, padding=0)
    for header in ('run', 'training', 'batch', 'pictures', 'state', 'time'):
        table.add_column(
            header,
            justify='left' if header in ('run', 'state') else 'right',
            no_wrap=header in ('run', 'state'),
            overflow='fold')
    total, unknown, states = 0., 0, Counter()
    for run in runs:
        kind = state.status(run)
        states[kind] += 1
        length, unit = run.length
        iters = unit == 'iterations'
        pictures = f'{length * run.batch_size:,}' if iters and length else ''
        seconds = benchmark.estimate(run)
        if kind != 'finished':
            if seconds is None:
                unknown += 1
            else:
                total += seconds
        training = f'{length:,} {"iters" if iters else unit}'
        table.add_row(run.name, training if length else 'probe',
                      str(run.batch_size or ''), pictures, kind,
                      '?' if seconds is None else f'{seconds:.0f} s')
    console.print(table)
    counts = ', '.join(f'{n} {kind}' for kind, n in states.items())
    cost = f'about {total / 60 / benchmark.launcher.jobs:.0f} min' \
        if total else ''
    if unknown:
        cost += (', and '
                 if cost else '') + f'{unknown} runs of unknown length'
    console.print(f'{counts}; to do: {cost or "nothing"}', soft_wrap=True)


def show_rows(runs: List[Run], console: Console) -> None:
    """Print which weights each row has."""
    for row, checkpoint in {run.row: run.checkpoint for run in runs}.items():
        words = ['random weights']
        if checkpoint is not None:
            words = [checkpoint.path, checkpoint.source, checkpoint.arch]
            if checkpoint.sha256:
                words.append(f'sha256 {checkpoint.sha256[:8]}')
        console.print(f'{row}: {", ".join(map(str, words))}', soft_wrap=True)


def find_suite(args: argparse.Namespace) -> Suite:
    """The suite that is named, with the tasks that are asked for."""
    path = Path(args.suite)
    if path.suffix != '.py':
        path = SUITES / f'{args.suite}.py'
        if not path.is_file():
            known = ', '.join(sorted(p.stem for p in SUITES.glob('*.py')))
            raise FileNotFoundError(
                f'There is no suite "{args.suite}", only {known}; or name a '
                '.py file')
    return load_suite(path).select(args.tasks)


def machine(args: argparse.Namespace) -> Dict[str, object]:
    """What runs are planned for: their processes and their device."""
    on_gpu = bool(args.gpus or args.slurm or torch.cuda.is_available())
    gpus = args.slurm_gpus if args.slurm else args.gpus
    return dict(processes=max(1, gpus), device='cuda' if on_gpu else 'cpu')


def make_launcher(args: argparse.Namespace) -> Launcher:
    gpus = args.slurm_gpus if args.slurm else args.gpus
    return Launcher(ROOT / 'tools', gpus, args.slurm, args.jobs)


def plan_suite(args: argparse.Namespace, suite: Suite,
               rows: Dict[str,
                          Optional[Checkpoint]], folder: Path) -> List[Run]:
    return plan_runs(
        suite,
        rows,
        args.protocol,
        range(args.seeds),
        Path(args.data_root).resolve(),
        folder,
        options=args.cfg_options,
        **machine(args))


def discard_stale(runs: Sequence[Run], console: Console) -> None:
    for run in runs:
        try:
            state.status(run)
        except state.StaleRunError:
            console.print(f'discarding {run.name}')
            state.discard(run)


def tell_failed(failed: List[Run], console: Console) -> int:
    for run in failed:
        console.print(f'[red]failed[/red] {run.name}, see '
                      f'{run.folder / "output.txt"}')
    return 1 if failed else 0


def run_suite(args: argparse.Namespace, console: Console) -> int:
    suite = find_suite(args)
    folder = Path(args.work_dir).resolve() / suite.name
    rows = read_rows(args.checkpoint, not args.no_random)
    runs = plan_suite(args, suite, rows, folder)
    benchmark = Benchmark(runs, make_launcher(args), not args.drop_checkpoints,
                          console)
    with only_one(folder) as lock:
        check_planned(folder, runs)
        if args.redo and not args.dry_run:
            discard_stale(runs, console)
        benchmark.learn_costs()
        show_plan(benchmark, console)
        show_rows(runs, console)
        if args.dry_run:
            return 0
        state.write_suite(folder, suite, runs)
        done = benchmark.execute(lock)
        show_report(folder, None, args.baseline, console)
    return tell_failed(done['failed'], console)


def run_sweep(args: argparse.Namespace, console: Console) -> int:
    """Pre-train for each value, then run the suite with what came out."""
    ablation = find_ablation(args.ablation, args.key, args.values)
    if not args.config.is_file():
        raise FileNotFoundError(f'There is no config "{args.config}"')
    suite = find_suite(args)
    suite = replace(
        suite,
        title=f'{suite.title}: {ablation.title}',
        description=' '.join(
            filter(None,
                   (f'Each row is one pre-training by '
                    f'{args.config.name} with another '
                    f'{ablation.key}.', ablation.note, suite.description))))
    folder = Path(args.work_dir).resolve() / ablation.name
    trainings = plan_pretraining(
        ablation,
        args.config,
        folder,
        args.pretrain_data,
        options=args.pretrain_options,
        **machine(args))

    def downstream() -> List[Run]:
        rows = {} if args.no_random else {RANDOM: None}
        for run in trainings:
            finished = state.status(run) == 'finished'
            rows[run.row] = weights_of(run, finished)
        return plan_suite(args, suite, rows, folder / suite.name)

    with only_one(folder) as lock:
        if args.redo and not args.dry_run:
            discard_stale(trainings, console)
        runs = downstream()
        check_planned(folder / suite.name, runs)
        if args.redo and not args.dry_run:
            discard_stale(runs, console)
        first = Benchmark(trainings, make_launcher(args), console=console)
        second = Benchmark(runs, make_launcher(args),
                           not args.drop_checkpoints, console)
        for benchmark in (first, second):
            benchmark.learn_costs()
            show_plan(benchmark, console)
        show_rows(runs, console)
        if ablation.note:
            console.print(ablation.note, soft_wrap=True)
        if args.dry_run:
            return 0
        failed = first.execute(lock)['failed']
        runs = downstream()
        state.write_suite(folder / suite.name, suite, runs, ablation.sweep)
        second.runs = [run for run in runs if not run.waits]
        failed += second.execute(lock)['failed']
        show_report(folder / suite.name, None, args.baseline, console)
    return tell_failed(failed, console)


def show_report(suite_dir: Path, out: Optional[Path], baseline: Optional[str],
                console: Console) -> None:
    for path in write_report(suite_dir, out, baseline).values():
        console.print(f'written {path}', soft_wrap=True)
    print_tables(suite_dir, baseline, console)


def main() -> int:
    args = parse_args()
    prepare_tool()
    # mmengine causes it at every import of a host.
    warnings.filterwarnings('ignore', 'pkg_resources is deprecated')
    # mmengine's messages about loading are for the runs' own logs.
    MMLogger.get_instance('benchmark', log_level='ERROR')
    console = Console()
    try:
        if args.command == 'report':
            show_report(args.suite_dir, args.out, args.baseline, console)
            return 0
        command = run_sweep if args.command == 'sweep' else run_suite
        return command(args, console)
    except KeyboardInterrupt:
        return 130
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        # A KeyError's own text is in quotes.
        text = error
        if isinstance(error, KeyError) and error.args:
            text = error.args[0]
        console.print(
            f'[red]{type(error).__name__}[/red]: {escape(str(text))}',
            markup=True,
            soft_wrap=True)
        return 2


if __name__ == '__main__':
    sys.exit(main())
