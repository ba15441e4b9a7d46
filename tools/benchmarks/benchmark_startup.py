# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Seconds from the start of a process to what a user waits for."""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import baselines
import measure
from PIL import Image

TRAIN = baselines.CONFIGS.parent / 'tools' / 'train.py'
# What a training needs of the hosts, and what is ours.
HOSTS = (
    'import torch, mmengine.runner, mmpretrain.models, mmpretrain.datasets, '
    'mmpretrain.evaluation'
)
OURS = 'import mmdensecl, mmdensecl.models, mmdensecl.datasets'
OURS += ', mmdensecl.engine, mmdensecl.evaluation'


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = measure.make_parser(
        'Time to import the hosts, and this package besides; and of '
        'tools/train.py to its first line, its first line of mmengine and the '
        'end of its first iteration'
    )
    parser.add_argument(
        '--config',
        type=Path,
        default=baselines.CONFIGS
        / 'demo'
        / 'densecl_r18w16_1xb64-coslr-40e_tiles.py',
    )
    return measure.parse(parser)


def run_code(code: str) -> None:
    """Run Python in a process of its own."""
    subprocess.run([sys.executable, '-c', code], check=True)


def time_training(config: Path, folder: Path) -> dict[str, float]:
    """Seconds to the first lines of a training, which is then stopped."""
    command = [sys.executable, '-u', TRAIN, config, '--data-root', folder]
    command += ['--work-dir', folder / 'run', '--cfg-options']
    command += ['default_hooks.logger.interval=1']
    seconds: dict[str, float] = {}
    begin = time.perf_counter()
    with subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout or ():
            for name, word in (
                ('train.py: first line', ''),
                ('train.py: first line of mmengine', '- mmengine - '),
                ('train.py: first iteration', 'Epoch(train)'),
            ):
                if word in line:
                    seconds.setdefault(name, time.perf_counter() - begin)
            if len(seconds) == 3:
                process.kill()
                break
    if len(seconds) < 3:
        raise RuntimeError(f'{config} ended before its first iteration')
    return seconds


def main() -> None:
    """Measure, in turns."""
    args = parse_args()
    seconds = measure.take_turns(
        {
            'import of the hosts': lambda: run_code(HOSTS),
            'with mmdensecl': lambda: run_code(f'{HOSTS}; {OURS}'),
            'mmdensecl/__init__.py alone': lambda: run_code(
                'import mmdensecl'
            ),
            'an empty Python': lambda: run_code(''),
        },
        args.rounds,
        'cpu',
    )
    with tempfile.TemporaryDirectory() as name:
        for i in range(128):
            Image.new('RGB', (96, 96), (i, 0, 0)).save(f'{name}/{i}.png')
        for _ in range(args.rounds):
            found = time_training(args.config.absolute(), Path(name))
            for what, value in found.items():
                seconds.setdefault(what, []).append(value)
    report = measure.Report('Start-up', args)
    for what, values in seconds.items():
        report.add(what, seconds=median(values))
    report.show()


if __name__ == '__main__':
    main()
