# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Compare pre-trained weights: many downstream runs, one table.

python tools/benchmark.py run mini --checkpoint DenseCL=epoch_200.pth
python tools/benchmark.py run my_config.py --checkpoint A=a.pth B=b.pth
python tools/benchmark.py report work_dirs/benchmark/mini
python tools/benchmark.py sweep lambda --pretrain-data my_images
"""

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from unittest import mock

import mmengine.config.config
import mmengine.config.utils
import torch
from mmengine.config import DictAction
from mmengine.logging import MMLogger
from mmengine.utils import import_modules_from_strings
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape

from mmdensecl.benchmark import plan, runner, sweep
from mmdensecl.benchmark.labels import check_labels
from mmdensecl.benchmark.report import write_report
from mmdensecl.benchmark.results import check_others, write_suite
from mmdensecl.benchmark.suite import MODES, Suite, load_suite
from mmdensecl.engine.command_line import prepare_tool

ROOT = Path(__file__).resolve().parents[1]
SUITES = ROOT / 'configs' / 'benchmarks' / 'suites'
SWEEPS = SUITES.with_name('sweeps.yml')
MINI = ROOT / 'configs' / 'mini' / 'densecl_r18w16_1xb64-coslr-11e.py'
NO_DATA = """docs/evaluation.md says what goes where; name the folder above the
data with --data-root or MMDENSECL_DATA_ROOT, or leave tasks out with --tasks
"""


# fmt: off
def parse_args() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest='command', required=True)
    settings = dict(nargs='+', action=DictAction, default={})

    run = commands.add_parser('run', help='run what has not finished yet')
    add = run.add_argument
    add('suite', help='"paper" (the full protocols), "mini", "demo", a suite '
        'file, or any config of mmdet, mmseg or mmpretrain')
    add('--checkpoint', nargs='+', action='extend', default=[],
        metavar='NAME=FILE', help='a row and its weights, any file that '
        'PretrainedBackbone takes; NAME=A,B: several pre-training seeds')
    add('--metric', metavar='KEY[:lower]', help='of a config of your own, as '
        'it stands in the log')

    sweeps = commands.add_parser(
        'sweep', help='pre-train for each value, then run a suite')
    add = sweeps.add_argument
    add('name', nargs='?', help='see configs/benchmarks/sweeps.yml')
    add('--key', help='a setting of the config in the place of a name')
    add('--values', nargs='+', default=[], help='at least two')
    add('--config', type=Path, default=MINI, help='of the pre-training')
    add('--pretrain-data', metavar='FOLDER', help='for its data_root')
    add('--pretrain-seeds', type=int, default=1, help='runs of each value')
    add('--pretrain-options', **settings, help='other settings, "a.b=c"')
    add('--suite', default='mini', help='as for run')

    for command, folder in ((run, 'benchmark'), (sweeps, 'ablation')):
        add = command.add_argument
        add('--work-dir', type=Path, default=Path('work_dirs', folder))
        add('--tasks', nargs='+', default=[], help='only these of the suite')
        add('--mode', '--protocol', nargs='+', choices=MODES, default=MODES,
            help='train the head alone, or all')
        add('--seeds', type=int, default=1, help='runs of each kind')
        add('--data-root', help='folder above coco, VOCdevkit, cityscapes, '
            'imagenet; by default MMDENSECL_DATA_ROOT or "data"')
        add('--gpus', type=int, default=0, help='of each run; they share the '
            'batch of the protocol')
        add('--slurm', metavar='PARTITION', help='submit runs with srun')
        add('--jobs', type=int, default=1, help='runs at the same time')
        add('--dry-run', action='store_true', help='list every run with its '
            'command, and what data is missing')
        add('--redo', action='store_true', help='discard and repeat runs '
            'whose settings have changed')
        add('--drop-checkpoints', action='store_true', help='remove the '
            'downstream checkpoints of finished runs')
        add('--baseline', help='row that others are compared to')
        add('--cfg-options', **settings, help='of all downstream configs')

    report = commands.add_parser('report', help='write the tables')
    report.add_argument('folder', type=Path, help='WORK_DIR/SUITE of a run')
    report.add_argument('--out', type=Path, help='by default FOLDER/report')
    report.add_argument('--baseline', help='row that others are compared to')
    return parser.parse_args()
# fmt: on


@contextmanager
def quick_configs() -> Iterator[None]:
    """Let mmengine read the metafiles of a host once.

    For each ``mmdet::`` base of each config it reads all of them anew, which
    makes the configs of a suite take most of a minute.
    """
    utils, config = mmengine.config.utils, mmengine.config.config
    load, known = map(lru_cache(None), (utils.load, config.is_installed))
    one = mock.patch.object(utils, 'load', load)
    with one, mock.patch.object(config, 'is_installed', known):
        yield


def read_methods(pairs: Sequence[str]) -> dict[str, list]:
    """The rows of the table, each checkpoint looked into."""
    methods: dict[str, list] = {plan.RANDOM: [None]}
    known: dict[str, str] = {}
    for pair in pairs:
        name, _, paths = pair.partition('=')
        if not (name and paths) or name == plan.RANDOM:
            raise ValueError(
                f'--checkpoint takes NAME=FILE[,FILE], NAME other than '
                f'"{plan.RANDOM}", the row of random weights; got "{pair}"'
            )
        for path in paths.split(','):
            found = plan.Checkpoint.read(path)
            twin = known.setdefault(found.sha256, path)
            if found.sha256 in known and twin is not path:
                raise ValueError(f'{twin} and {path} hold the same weights')
            methods.setdefault(name, []).append(found)
    return methods


def find_suite(args: argparse.Namespace) -> Suite:
    """The suite or config that is named, with the tasks asked for."""
    path = Path(args.suite)
    if path.suffix != '.py':
        path = SUITES / f'{args.suite}.py'
        if not path.is_file():
            known = ', '.join(sorted(p.stem for p in SUITES.glob('*.py')))
            raise FileNotFoundError(
                f'There is no suite "{args.suite}", only '
                f'{known}; or name a .py file'
            )
    suite = load_suite(path, getattr(args, 'metric', None))
    return suite.select(args.tasks)


def show_plan(benchmark: runner.Benchmark, console: Console) -> None:
    """Every run with its command, and what data is missing."""
    left = []
    for run in benchmark.runs:
        status = runner.status(run)
        words = [status, run.name, ' '.join(map(str, run.length))]
        words += ['data is missing'] if run.missing else []
        command = shlex.join(benchmark.launcher.command(run))
        console.print(escape(', '.join(words)), highlight=False)
        console.print(f'  {escape(command)}', style='dim', soft_wrap=True)
        left += [run] if status != 'finished' else []
    for path in dict.fromkeys(x for run in left for x in run.missing):
        console.print(f'missing: {path}', soft_wrap=True)
    console.print(f'{len(left)} runs to go')


def check_runs(runs: Sequence[plan.Run]) -> dict[str, list[str]]:
    """Refuse data, labels and weights with which runs could only fail.

    Returns:
        Remarks on the labels of each task.
    """
    missing = dict.fromkeys(path for run in runs for path in run.missing)
    if missing:
        raise FileNotFoundError(f'missing: {", ".join(missing)}. {NO_DATA}')
    for run in runs:  # which only the runs have needed so far
        if run.config.get('custom_imports'):
            import_modules_from_strings(**run.config.custom_imports)
    plan.check_fit(runs)
    notes: dict[str, list[str]] = {}
    for run in runs:
        if run.task and run.length[0] and run.task.name not in notes:
            notes[run.task.name] = check_labels(run.config)
    return notes


def discard_stale(runs: Sequence[plan.Run], console: Console) -> None:
    """Remove runs of other settings."""
    for run in runs:
        try:
            runner.status(run)
        except runner.StaleRunError:
            console.print(f'discarding {run.name}')
            runner.discard(run)


def run_suite(args: argparse.Namespace, console: Console) -> int:
    """Run a suite, after the pre-trainings if it is a sweep."""
    suite, chosen, trainings = find_suite(args), None, []
    root = args.data_root
    if suite.tasks[0].layout and not root:  # not a config with its own paths
        root = os.environ.get('MMDENSECL_DATA_ROOT', 'data')
    cuda = args.gpus or args.slurm or torch.cuda.is_available()
    top = args.work_dir.resolve()
    setup = plan.Setup(top / suite.name, root and os.path.abspath(root),
                       max(1, args.gpus), 'cuda' if cuda else 'cpu',
                       args.cfg_options)  # fmt: skip
    if args.command == 'sweep':
        chosen = sweep.find_sweep(SWEEPS, args.name, args.key, args.values)
        before = replace(setup, work_dir=top / chosen.name,
                         data_root=args.pretrain_data,
                         options=args.pretrain_options)  # fmt: skip
        trainings = sweep.plan_pretraining(
            chosen, args.config, args.pretrain_seeds, before
        )
        setup = replace(setup, work_dir=top / chosen.name / suite.name)
        suite.title += f': {chosen.label}'
    methods = {} if chosen else read_methods(args.checkpoint)

    def planned() -> list[plan.Run]:
        found = {plan.RANDOM: [None], **methods}
        for run in trainings:
            done = runner.status(run) == 'finished'
            weights = sweep.weights_of(run, done)
            found.setdefault(run.method, []).append(weights)
        seeds = range(args.seeds)
        return plan.plan_runs(suite, found, args.mode, seeds, setup)

    launcher = runner.Launcher(
        ROOT / 'tools', args.gpus, args.slurm, args.jobs
    )
    keep, redo = not args.drop_checkpoints, args.redo and not args.dry_run
    runner.only_one(top / (chosen or suite).name)
    if chosen:
        check_others(top / chosen.name / 'pretrain', trainings)
    discard_stale(trainings if redo else (), console)
    runs = planned()
    check_others(setup.work_dir, runs)
    discard_stale(runs if redo else (), console)
    first = runner.Benchmark(trainings, launcher, console=console)
    second = runner.Benchmark(runs, launcher, keep, console)
    if args.dry_run:
        if chosen:
            show_plan(first, console)
        show_plan(second, console)
        return 0
    notes = check_runs(runs)
    for run in runs:
        runner.status(run)  # refuses what is stale before anything runs
    failed = first.execute() if trainings else []
    runs = planned()
    about = chosen.about if chosen else None
    write_suite(setup.work_dir, suite, runs, notes, about)
    second.runs = [run for run in runs if not run.waits]
    failed += second.execute()
    show_report(setup.work_dir, None, args.baseline, console)
    for run in failed:
        console.print(f'[red]failed[/red] {run.name}, see {run.folder}')
    return 1 if failed else 0


def show_report(
    folder: Path, out: Path | None, baseline: str | None, console: Console
) -> None:
    """Write a report, and print its tables."""
    files = write_report(folder, out, baseline)
    text = files['report.md'].read_text(encoding='utf-8')
    console.print(Markdown(text.partition('## Where these')[0]))
    for path in files.values():
        console.print(f'written {path}', soft_wrap=True)


def main() -> int:
    """Run a command; bad input is one line and status 2."""
    args, console = parse_args(), Console()
    prepare_tool()
    # mmengine causes it at every import of a host.
    warnings.filterwarnings('ignore', 'pkg_resources is deprecated')
    # mmengine's messages about loading are for the runs' own logs.
    MMLogger.get_instance('benchmark', log_level='ERROR')
    try:
        if args.command == 'report':
            show_report(args.folder, args.out, args.baseline, console)
            return 0
        with quick_configs():
            return run_suite(args, console)
    except KeyboardInterrupt:
        return 130
    except (ValueError, KeyError, OSError, RuntimeError) as error:
        # A KeyError's own text is in quotes.
        text = error.args[0] if isinstance(error, KeyError) else error
        kind = type(error).__name__
        console.print(
            f'[red]{kind}[/red]: {escape(str(text))}', soft_wrap=True
        )
        return 2


if __name__ == '__main__':
    sys.exit(main())
