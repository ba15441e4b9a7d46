# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Draw the curves of pre-training runs and say what they mean."""
import argparse
from pathlib import Path
from typing import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmdensecl.analysis import (RunLog, as_html, in_one_line, judge,
                                key_numbers, read_runs, save_picture)
from mmdensecl.benchmark.report.text import clean


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'work_dirs',
        nargs='+',
        type=Path,
        metavar='WORK_DIR',
        help='work_dir of a run, also of one that still runs or has resumed')
    parser.add_argument(
        '--out',
        type=Path,
        metavar='FOLDER',
        help='folder for curves.png and curves.html, by default analysis in '
        'the first WORK_DIR')
    parser.add_argument(
        '--label',
        nargs='+',
        metavar='NAME',
        help='what to call the runs, by default the names of the folders')
    args = parser.parse_args()
    try:
        args.runs = read_runs(args.work_dirs, args.label)
    except (OSError, ValueError) as error:
        parser.exit(2, f'{parser.prog}: error: {error}\n')
    return args


def show(runs: Sequence[RunLog]) -> None:
    """Print a table, and every finding below it."""
    console = Console()
    table = Table()
    for head in ('', *(escape(clean(run.name)) for run in runs)):
        table.add_column(head, justify='right' if head else 'left')
    numbers = [key_numbers(run) for run in runs]
    for head in numbers[0]:
        table.add_row(head, *(x[head] for x in numbers))
    console.print(table)
    for run in runs:
        findings = judge(run)
        console.print(
            f'{clean(run.name)}: {in_one_line(findings)}',
            markup=False,
            highlight=False,
            style='bold')
        for finding in findings:
            console.print(
                f'  {finding.topic}: {finding.text}',
                markup=False,
                highlight=False,
                soft_wrap=True,
                style='red' if finding.warning else None)


def main() -> None:
    args = parse_args()
    show(args.runs)
    folder = args.out or args.work_dirs[0] / 'analysis'
    folder.mkdir(parents=True, exist_ok=True)
    save_picture(args.runs, folder / 'curves.png')
    (folder / 'curves.html').write_text(as_html(args.runs), encoding='utf-8')
    print(f'Wrote {folder / "curves.png"} and {folder / "curves.html"}')


if __name__ == '__main__':
    main()
