# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Start the runs of a benchmark, watch them, keep their results."""
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

from mmengine.utils.dl_utils import collect_env
from rich.console import Console
from rich.markup import escape
from rich.progress import (BarColumn, Progress, TaskID, TaskProgressColumn,
                           TextColumn, TimeElapsedColumn)

from . import state
from .plan import Run

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

POLL = 0.5  # seconds between two looks at the runs
PATIENCE = 60  # seconds for a run to end after SIGTERM
TAIL = 4000  # characters of the log that failed.json keeps
# Windows has no SIGHUP.
SIGNALS = [
    getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP')
    if hasattr(signal, name)
]


def free_port() -> int:
    """A port of this host that nothing listens on."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def count_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS and Windows


@dataclass(frozen=True)
class Launcher:
    """How a run is started.

    Args:
        tools (Path): Folder of ``train.py`` and ``dist_train.sh``.
        gpus (int): Of each run; 0 for one process on what there is. Defaults
            to 0.
        slurm (str, optional): Partition. Defaults to None.
        jobs (int): Runs at the same time. Defaults to 1.
    """
    tools: Path
    gpus: int = 0
    slurm: Optional[str] = None
    jobs: int = 1

    def command(self, run: Run, config: Path) -> List[str]:
        """The command line that a user would type for a run."""
        flags = ['--work-dir', str(run.folder)]
        weights = []
        if not run.trains:
            # A probe; tools/test.py takes its weights as the checkpoint.
            weights = [str(run.checkpoint.path) if run.checkpoint else 'none']
        elif run.scored and (trained := state.trained_checkpoint(run)):
            weights = [str(trained)]  # stopped between training and score
        else:
            flags.append('--resume')
        kind = 'test' if weights else 'train'
        if self.slurm:
            return [
                'bash',
                str(self.tools / f'slurm_{kind}.sh'), self.slurm,
                f'{run.task.name}-{run.row}',
                str(config), *weights, *flags
            ]
        if self.gpus > 1:
            return [
                'bash',
                str(self.tools / f'dist_{kind}.sh'),
                str(config), *weights,
                str(self.gpus), *flags
            ]
        return [
            sys.executable,
            str(self.tools / f'{kind}.py'),
            str(config), *weights, *flags
        ]

    def environment(self) -> Dict[str, str]:
        """Of a run: an own port, and its share of the CPU cores."""
        env = dict(os.environ, PYTHON=sys.executable)
        root = str(self.tools.parent)
        env['PYTHONPATH'] = os.pathsep.join(
            filter(None, [root, env.get('PYTHONPATH')]))
        if self.gpus > 1:
            env['PORT'] = str(free_port())
        if self.slurm:
            env['GPUS'] = str(max(1, self.gpus))
        elif self.jobs > 1:
            threads = max(1, count_cores() // self.jobs)
            env['OMP_NUM_THREADS'] = str(threads)
        return env


@contextmanager
def only_one(folder: Path) -> Iterator[int]:
    """Keep a second benchmark out of a folder.

    Args:
        folder (Path): Of the suite.

    Yields:
        int: The lock's file descriptor. Processes that inherit it hold the
        lock too, even where this one is killed.

    Raises:
        RuntimeError: There is one already, or this is Windows.
    """
    if fcntl is None:
        raise RuntimeError(
            'Benchmarks need the file locks and process groups of Linux or '
            'macOS, which Windows lacks. Run them in WSL; single runs by '
            'tools/train.py and tools/test.py need neither')
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / '.lock', 'w', encoding='utf-8') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(
                f'Another benchmark is running in "{folder}", or a run that '
                'one left behind when it was killed. Wait for it, end it '
                f'(`fuser -v {folder / ".lock"}` lists the processes), or '
                'take another --work-dir') from None
        yield lock.fileno()


@dataclass
class _Active:
    """A run that is going on."""
    run: Run
    process: subprocess.Popen
    command: List[str]
    start_share: float
    bar: TaskID
    log_start: int  # bytes that earlier attempts left in output.txt
    started: float = field(default_factory=time.time)


class Benchmark:
    """Executes runs, so that a failed one does not stop the rest.

    A finished run is never repeated, a broken one resumes. Ctrl-C, SIGTERM or
    SIGHUP stops the runs that are going on; the same call later goes on with
    them.

    Args:
        runs (List[Run]): In the order of execution.
        launcher (Launcher): How each is started.
        keep_checkpoints (bool): Whether a finished run keeps its downstream
            checkpoints. Defaults to True.
        console (Console, optional): Where progress goes. Defaults to None, a
            new one.
    """

    def __init__(self,
                 runs: List[Run],
                 launcher: Launcher,
                 keep_checkpoints: bool = True,
                 console: Optional[Console] = None) -> None:
        self.runs = runs
        self.launcher = launcher
        self.keep_checkpoints = keep_checkpoints
        self.console = console or Console()
        self.seconds: Dict[Tuple[str, str], List[float]] = {}
        self._environment: Optional[dict] = None
        self._stopped = False

    def learn_costs(self) -> None:
        """Take the times of runs that have finished before."""
        for run in self.runs:
            if state.status(run) == 'finished':
                self._remember(run)

    def execute(self, lock: Optional[int] = None) -> Dict[str, List[Run]]:
        """Run what is not finished.

        Args:
            lock (int, optional): File descriptor of :func:`only_one`, which
                the runs inherit. Defaults to None.

        Returns:
            Dict[str, List[Run]]: ``finished`` and ``failed`` runs.

        Raises:
            KeyboardInterrupt: By one of the ``SIGNALS``, after the runs
                stopped.
        """
        done: Dict[str, List[Run]] = dict(finished=[], failed=[])
        waiting = []
        for run in self.runs:
            if state.status(run) == 'finished':
                done['finished'].append(run)
            else:
                waiting.append(run)
        if done['finished']:
            self.console.print(f'{len(done["finished"])} runs are finished '
                               'already')
        self._environment = self._describe_host() if waiting else None
        active: List[_Active] = []
        self._stopped = False
        # What nohup or a shell in the background ignores stays ignored.
        previous = {
            sig: signal.signal(sig, self._stop_soon)
            for sig in SIGNALS if signal.getsignal(sig) != signal.SIG_IGN
        }
        try:
            with self._progress() as bars:
                overall = bars.add_task('all runs', total=len(self.runs))
                while waiting or active:
                    while waiting and len(active) < self.launcher.jobs:
                        if self._stopped:
                            raise KeyboardInterrupt
                        active.append(self._start(waiting.pop(0), bars, lock))
                    time.sleep(POLL)
                    if self._stopped:
                        raise KeyboardInterrupt
                    for item in list(active):
                        bars.update(
                            item.bar, completed=state.progress(item.run))
                        if item.process.poll() is None:
                            continue
                        bars.remove_task(item.bar)
                        active.remove(item)
                        done[self._conclude(item)].append(item.run)
                    left = self._time_left(waiting, active)
                    bars.update(
                        overall,
                        completed=sum(map(len, done.values())),
                        description=f'all runs, {left}')
        except KeyboardInterrupt:
            self.console.print('Stopping the runs; the same command goes on '
                               'from their last checkpoints')
            raise
        finally:
            _stop(active)
            for sig, handler in previous.items():
                signal.signal(sig, handler)
        return done

    def _stop_soon(self, *_) -> None:
        # Not raised here: between the start of a process and the note of it
        # an exception would leave it behind.
        self._stopped = True

    def _describe_host(self) -> Dict[str, str]:
        found = {key: str(value) for key, value in collect_env().items()}
        if self.launcher.slurm:
            found['collected on'] = ('the host that submitted the run, not '
                                     'the node that executed it')
        return found

    def _progress(self) -> Progress:
        return Progress(
            TextColumn('{task.description}'),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            refresh_per_second=2)

    def _start(self, run: Run, bars: Progress, lock: Optional[int]) -> _Active:
        began = state.status(run)
        config = state.prepare(run)
        mended = state.mend_pointer(run)
        if mended:
            self.console.print(f'{run.name}: {mended}', soft_wrap=True)
        command = self.launcher.command(run, config)
        again = ' again' if began in ('started', 'failed') else ''
        self.console.print(f'{_now()} start{again} {run.name}')
        bar = bars.add_task(run.name, total=1.)
        share = state.progress(run)
        with open(run.folder / 'output.txt', 'ab') as log:
            log_start = log.tell()
            # A session of its own: Ctrl-C reaches it through us alone.
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.launcher.environment(),
                pass_fds=() if lock is None else (lock, ),
                start_new_session=True)
        return _Active(run, process, command, share, bar, log_start)

    def _conclude(self, item: _Active) -> str:
        run, code = item.run, item.process.returncode
        if code:
            return self._fail(item, f'exit status {code}')
        try:
            metrics, note = state.final_metrics(run)
        except ValueError as error:
            return self._fail(item, str(error))
        length, unit = run.length
        checkpoint = run.checkpoint and {
            **asdict(run.checkpoint), 'path': str(run.checkpoint.path)
        }
        now = time.time()
        state.write_json(
            run.folder / 'result.json',
            dict(
                schema=state.SCHEMA,
                suite=run.folder.parents[run.name.count('/')].name,
                task=run.task.name,
                protocol=run.protocol,
                row=run.row,
                seed=run.seed,
                settings=run.settings,
                checkpoint=checkpoint,
                metrics=metrics,
                note=note,
                length=length,
                unit=unit,
                batch_size=run.batch_size,
                # Of the last start; a run that was resumed took longer.
                seconds=round(now - item.started, 1),
                resumed=item.start_share > 0,
                started=_iso(item.started),
                finished=_iso(now),
                environment=self._environment or {},
                config='config.py',
                command=item.command))
        if not self.keep_checkpoints:
            for path in [*run.folder.glob('*.pth')]:
                path.unlink()
        self._remember(run)
        main = run.task.metrics[0]
        value = ''
        if main['key'] in metrics:  # a short training may log nothing
            number = metrics[main['key']] * main.get('scale', 1)
            value = f': {main["name"]} {number:.2f}'
        self.console.print(f'{_now()} finished {run.name}{value} in '
                           f'{_duration(now - item.started)}')
        return 'finished'

    def _fail(self, item: _Active, reason: str) -> str:
        run, code = item.run, item.process.returncode
        log = run.folder / 'output.txt'
        tail = log.read_bytes()[item.log_start:][-TAIL:].decode(
            errors='replace')
        # What Python said, not torchrun's word on it; a run that was killed
        # said nothing.
        said = [
            line for line in re.findall(
                r'^(?:\[rank\d+\]: |\d+: )?([\w.]*(?:Error|Exception)\b.*)',
                tail, re.MULTILINE) if 'ChildFailedError' not in line
        ]
        if code > 0 and said:
            reason += f', {said[-1]}'
        state.write_json(
            run.folder / 'failed.json',
            dict(returncode=code, reason=reason, tail=tail, log=str(log)))
        self.console.print(
            f'{_now()} [red]failed[/red] {run.name}: {escape(reason)}, '
            f'see {log}',
            soft_wrap=True)
        return 'failed'

    def _remember(self, run: Run) -> None:
        result = state.read_json(run.folder / 'result.json')
        if not result['resumed']:
            self.seconds.setdefault((run.task.name, run.protocol),
                                    []).append(result['seconds'])

    def estimate(self, run: Run) -> Optional[float]:
        """Seconds of a run, from the finished ones of its task.

        Before any has finished, what the suite says of a CPU.

        Args:
            run (Run): The run.

        Returns:
            float | None: None where neither tells.
        """
        known = self.seconds.get((run.task.name, run.protocol), [])
        if not known:
            known = [
                s for (task, _), v in self.seconds.items() for s in v
                if task == run.task.name
            ]
        if not known and run.settings.get('device') == 'cpu':
            return run.task.seconds.get(run.protocol)
        return sum(known) / len(known) if known else None

    def _time_left(self, waiting: List[Run], active: List[_Active]) -> str:
        parts = []
        for item in active:
            share = state.progress(item.run)
            whole = self.estimate(item.run)
            if whole is None and share > item.start_share + 0.05:
                passed = time.time() - item.started
                whole = passed / (share - item.start_share)
            parts.append(whole and whole * (1 - share))
        parts += [self.estimate(run) for run in waiting]
        known = [part for part in parts if part is not None]
        if not known:
            return 'time left not known yet'
        # What is not known yet is taken as the mean of the rest.
        total = sum(known) / len(known) * len(parts)
        return f'{_duration(total / self.launcher.jobs)} left'


def _stop(active: List[_Active]) -> None:
    """End the processes of runs, and wait for them."""
    for sig, patience in ((signal.SIGTERM, PATIENCE), (signal.SIGKILL, 5)):
        for item in active:
            if item.process.poll() is None:
                os.killpg(item.process.pid, sig)
        end = time.time() + patience
        for item in active:
            try:
                item.process.wait(max(0.1, end - time.time()))
            except subprocess.TimeoutExpired:
                pass


def _now() -> str:
    return datetime.now().strftime('%H:%M:%S')


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours} h {minutes:02d} min'
    return f'{minutes} min {rest:02d} s' if minutes else f'{rest} s'
