# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""How the benchmark_*.py scripts beside this file measure and report.

What is compared takes turns, so that a drift of the machine's speed meets all,
and what is reported is the median over the rounds of the ratio to the baseline
in the same round. Memory is the growth of the peak: of the process on a CPU,
a fresh one for each, of torch's allocator on a GPU.
"""

import argparse
import json
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import (
    Any,
)

import torch

import mmdensecl

MIB = 2**20
DTYPES = {
    'float32': torch.float32,
    'bfloat16': torch.bfloat16,
    'float16': torch.float16,
}


def make_parser(
    description: str, timing: bool = True
) -> argparse.ArgumentParser:
    """A parser with the flags that the scripts share.

    Args:
        description (str): What the script is for.
        timing (bool): Whether it times something in this process. Defaults to
            True.

    Returns:
        argparse.ArgumentParser: To be given to :func:`parse`.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        '--out', type=Path, help='JSON file to write the numbers to'
    )
    if not timing:
        return parser
    parser.add_argument(
        '--device',
        choices=['cpu', 'cuda'],
        default='cuda' if torch.cuda.is_available() else 'cpu',
    )
    parser.add_argument(
        '--rounds',
        type=int,
        default=7,
        help='timed rounds, after one that is not',
    )
    parser.add_argument(
        '--threads', type=int, help="torch's threads, by default all cores"
    )
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line and settle the number of threads."""
    args = parser.parse_args()
    if 'rounds' not in args:
        return args
    if args.rounds < 1:
        parser.error(f'--rounds must be at least 1, got {args.rounds}')
    if args.threads:
        torch.set_num_threads(args.threads)
    args.threads = torch.get_num_threads()
    return args


def precision(name: str, device: str) -> AbstractContextManager:
    """Autocast to a type of ``DTYPES``; nothing for float32."""
    if name == 'float32':
        return nullcontext()
    return torch.autocast(device, DTYPES[name])


def take_turns(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each run in each round, every round in another order.

    Args:
        runs (Mapping[str, Callable]): What to time.
        rounds (int): How often, after one round that does not count.
        device (str): 'cuda' waits for the GPU around each.

    Returns:
        Dict[str, List[float]]: By the runs' names.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for turn in range(rounds + 1):
        # Who comes after whom matters: memory and caches are as it left them.
        shuffle(order)
        for name in order:
            _wait(device)
            begin = time.perf_counter()
            runs[name]()
            _wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """Median over the rounds of ours to the peer's in the same round."""
    return statistics.median(a / b for a, b in zip(ours, peer, strict=True))


def extra_memory(
    make: Callable[..., Callable[[], Any]],
    device: str,
    *args: Any,
    whole: bool = False,
) -> int:
    """Bytes by which the peak of the memory grows while something runs.

    Args:
        make (Callable): Called with ``args``, returns what is run; a function
            of a module, as on a CPU a fresh process looks it up by name.
        device (str): Where it runs.
        *args: Of ``make``.
        whole (bool): Whether what it needs to be made counts, too, and what
            a first run leaves behind for a second. Defaults to False.

    Returns:
        int: Bytes.
    """
    if device == 'cuda':
        return _grown(make, device, None, whole, *args)
    # A process's peak never falls again, so each has its own.
    context = get_context('forkserver')  # which has imported what takes long
    context.set_forkserver_preload(['mmpretrain.models'])
    with context.Pool(1) as pool:
        threads = torch.get_num_threads()
        return pool.apply(_grown, (make, device, threads, whole, *args))


def _grown(
    make: Callable[..., Callable[[], Any]],
    device: str,
    threads: int | None,
    whole: bool,
    *args: Any,
) -> int:
    if threads:
        torch.set_num_threads(threads)
    start = _reset_peak(device)
    run = make(*args)
    if not whole:
        start = _reset_peak(device)
    for _ in range(2 if whole else 1):
        run()
    return _peak(device) - start


def _reset_peak(device: str) -> int:
    """The peak from here on, as what was made may have needed more."""
    if device == 'cuda':
        _wait(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    # Where this is not Linux, a peak of the making hides one of the run.
    with suppress(OSError):
        Path('/proc/self/clear_refs').write_bytes(b'5')
    return _peak(device)


def _peak(device: str) -> int:
    if device == 'cuda':
        _wait(device)
        return torch.cuda.max_memory_allocated()
    status = Path('/proc/self/status')
    if status.exists():
        (kib,) = re.findall(
            r'VmHWM:\s+(\d+) kB', status.read_text(encoding='utf-8')
        )
        return int(kib) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


def _wait(device: str) -> None:
    if device == 'cuda':
        torch.cuda.synchronize()


def _processor() -> str:
    info = Path('/proc/cpuinfo')
    if info.exists():
        for line in info.read_text(encoding='utf-8').splitlines():
            if line.startswith('model name'):
                return line.partition(':')[2].strip()
    return platform.processor() or platform.machine()


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same columns as a table, a float with three digits."""

    def line(cells: Iterable[Any]) -> str:
        return (
            '| '
            + ' | '.join(
                f'{x:.3g}' if isinstance(x, float) else str(x) for x in cells
            )
            + ' |'
        )

    names = [name.replace('_', ' ') for name in rows[0]]
    return '\n'.join(
        [
            line(names),
            line(['---'] * len(names)),
            *(line(row.values()) for row in rows),
        ]
    )


class Report:
    """Rows of a comparison, printed as Markdown and kept as JSON.

    Args:
        title (str): What was compared.
        args (argparse.Namespace): The script's arguments.
    """

    def __init__(self, title: str, args: argparse.Namespace) -> None:
        self.title = title
        self.settings = {k: v for k, v in vars(args).items() if k != 'out'}
        self.out: Path | None = args.out
        on_gpu = getattr(args, 'device', 'cpu') == 'cuda'
        self.environment = dict(
            device=torch.cuda.get_device_name() if on_gpu else _processor(),
            threads=getattr(args, 'threads', None),
            python=platform.python_version(),
            torch=torch.__version__,
            mmdensecl=mmdensecl.__version__,
        )
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, **columns: Any) -> None:
        """One row; every row of a table has the same columns.

        Args:
            what (str): The first column.
            **columns: Numbers or text; an underscore in a name is a space.
        """
        self.rows.append({'what': what, **columns})

    def markdown(self) -> str:
        """The rows as a table."""
        return markdown(self.rows)

    def show(self) -> None:
        """Print the table, and write the file if one was named."""
        where = ', '.join(f'{k} {v}' for k, v in self.environment.items())
        print(f'{self.title}\n({where})\n\n{self.markdown()}\n')
        if self.out:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self.out.write_text(
                json.dumps(
                    dict(
                        title=self.title,
                        settings=self.settings,
                        environment=self.environment,
                        rows=self.rows,
                    ),
                    indent=1,
                    default=str,
                )
                + '\n',
                encoding='utf-8',
            )
