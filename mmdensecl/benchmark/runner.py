# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Start the runs of a benchmark, and keep their results."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from threading import Timer, current_thread
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from mmdensecl.engine import lock_work_dir
from mmdensecl.engine.launch import count_cores
from mmdensecl.engine.resume import last_checkpoint

from .plan import Run
from .results import differences, log_rows, read_json, write_json

PATIENCE = 60  # seconds for a run to end after SIGTERM
TAIL = 4000  # characters of the log that failed.json keeps
ERROR = r'(?m)^(?:\[rank\d+\]: |\d+: )?([\w.]*(?:Error|Exception)\b.*)'


class StaleRunError(RuntimeError):
    """A run's folder holds a run with other settings."""


def free_port() -> int:
    """A port of this host that nothing listens on."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return free.getsockname()[1]


def only_one(folder: Path) -> None:
    """Keep a second benchmark out of a folder, as long as this one lives."""
    if os.name == 'nt':
        raise RuntimeError(
            'Benchmarks need process groups, which Windows lacks. Run them in '
            'WSL; single runs by tools/train.py and tools/test.py need none'
        )
    lock_work_dir(folder)


def status(run: Run) -> str:
    """Of a run: new, waiting (for weights), started, failed or finished.

    Raises:
        StaleRunError: Its folder is another run's.
    """
    plan = read_json(run.folder / 'plan' / 'run.json')
    left = [path for path in run.folder.glob('*') if path.name != 'plan']
    if plan is None and not left:
        return 'waiting' if run.waits else 'new'
    changed = [*differences(plan or {}, run.identity)]
    if changed:
        raise StaleRunError(
            f'"{run.folder}" was run with other settings than it would be '
            'now:\n  '
            + '\n  '.join(changed)
            + '\nTake another --work-dir, or '
            'repeat what differs with --redo'
        )
    # A pre-training is made again where somebody removed what it made.
    if (run.folder / 'result.json').is_file() and (run.task or trained(run)):
        return 'finished'
    failed = (run.folder / 'failed.json').is_file()
    return 'failed' if failed else 'started'


def trained(run: Run) -> bool:
    """Whether a training has come to its last checkpoint."""
    # The note is written after the checkpoint.
    noted, path = last_checkpoint(run.folder) or '', run.last_checkpoint
    return Path(noted).name == path.name and path.is_file()


def discard(run: Run) -> None:
    """Remove all that a run has left, at once or not at all."""
    aside = run.folder.with_name(f'.discarded-{run.folder.name}')
    shutil.rmtree(aside, ignore_errors=True)  # of a call that was stopped
    if run.folder.exists():
        run.folder.rename(aside)
        shutil.rmtree(aside)


def final_metrics(run: Run) -> tuple[dict[str, float], list[str]]:
    """What a run measured at its end, with remarks for the reader.

    Raises:
        ValueError: It has not come to its end, or lacks a metric.
    """
    rows = [*log_rows(run.folder)][::-1]
    if run.task is None:
        if not trained(run):
            raise ValueError('it ended without its last checkpoint')
        return {}, []
    # Of tools/test.py, the last one first; then what training logged.
    tests = sorted(run.folder.glob('*/[0-9]*_[0-9]*.json'), reverse=True)
    found = [json.loads(path.read_text(encoding='utf-8')) for path in tests]
    end = run.length[0]
    found += [x for x in rows if 'lr' not in x and x.get('step') == end]
    if not found:
        raise ValueError('it ended without a result')
    keys = [metric['key'] for metric in run.task.metrics]
    missing = [key for key in keys if key not in found[0]]
    said = read_json(run.folder / 'predicted.json') or {'predicted': None}
    if missing == keys and said['predicted'] == []:
        # mmdet's CocoMetric gives up instead.
        return dict.fromkeys(keys, 0.0), ['detects nothing, counted as 0']
    if missing:
        raise ValueError(f'its result lacks {", ".join(missing)}')
    remarks = []
    if len(said['predicted'] or ()) == 1 < said['of']:
        remarks.append(f'predicts one class only, {said["predicted"][0]}')
    return {key: found[0][key] for key in keys}, remarks


@dataclass(frozen=True)
class Launcher:
    """How a run is started."""

    tools: Path  # folder of train.py and dist_train.sh
    gpus: int = 0  # of each run; 0 for one process on what there is
    slurm: str | None = None  # partition
    jobs: int = 1  # runs at the same time

    def command(self, run: Run) -> list[str]:
        """The command line that a user would type for a run."""
        kind, weights, flags = 'test', [], ['--work-dir', str(run.folder)]
        if not run.length[0]:  # a probe takes its weights as the checkpoint
            weights = [str(run.checkpoint.path if run.checkpoint else 'none')]
        elif run.task and trained(run):  # stopped before its score
            weights = [str(run.last_checkpoint)]
        else:
            kind, flags = 'train', [*flags, '--resume']
        config = [str(run.folder / 'plan' / 'config.py'), *weights]
        if self.slurm:
            start = ['bash', f'{self.tools}/slurm_{kind}.sh', self.slurm]
            return [*start, run.name.replace('/', '-'), *config, *flags]
        if self.gpus > 1:
            start = ['bash', f'{self.tools}/dist_{kind}.sh']
            return [*start, *config, str(self.gpus), *flags]
        return [sys.executable, f'{self.tools}/{kind}.py', *config, *flags]

    def environment(self, slot: int = 0) -> dict[str, str]:
        """Of a run: its share of GPUs or cores, and a port of its own."""
        path = [str(self.tools.parent), os.environ.get('PYTHONPATH')]
        env = dict(os.environ, PYTHON=sys.executable, PORT=str(free_port()))
        env['PYTHONPATH'] = os.pathsep.join(filter(None, path))
        each = max(1, self.gpus)
        if self.slurm:
            env['GPUS'] = str(each)
        elif self.jobs > 1:
            env['OMP_NUM_THREADS'] = str(max(1, count_cores() // self.jobs))
            if torch.cuda.device_count() >= each * self.jobs:
                own = range(slot * each, (slot + 1) * each)
                env.setdefault('CUDA_VISIBLE_DEVICES', ','.join(map(str, own)))
        return env


class Benchmark:
    """Executes runs, so that a failed one does not stop the rest.

    A finished run is never repeated, a broken one resumes. Ctrl-C, SIGTERM or
    SIGHUP stops the runs that are going on; the same call resumes them.

    Args:
        runs: In the order of execution.
        launcher: How each is started.
        keep_checkpoints: Whether a finished run keeps its checkpoints.
        console: Where progress goes.
    """

    def __init__(
        self,
        runs: list[Run],
        launcher: Launcher,
        keep_checkpoints: bool = True,
        console: Console | None = None,
    ) -> None:
        self.runs, self.launcher = runs, launcher
        self.keep_checkpoints = keep_checkpoints
        self.console = console or Console()
        self.processes: dict[str, subprocess.Popen] = {}
        self.stopped = False

    def say(self, text: str) -> None:
        """Print a line with the time."""
        self.console.print(f'{time.strftime("%X")} {text}', soft_wrap=True)

    def execute(self) -> list[Run]:
        """Run what is not finished.

        Returns:
            The runs that failed.

        Raises:
            KeyboardInterrupt: By a signal, after the runs stopped.
        """
        todo = [run for run in self.runs if status(run) != 'finished']
        self.say(
            f'{len(self.runs) - len(todo)} of {len(self.runs)} runs are '
            'finished already'
        )
        # What nohup or a shell in the background ignores stays ignored.
        previous = {
            sig: signal.signal(sig, self._stop)
            for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if signal.getsignal(sig) != signal.SIG_IGN
        }
        try:
            with ThreadPoolExecutor(self.launcher.jobs, 'slot') as pool:
                good = [*pool.map(self._execute, todo)]
        finally:
            for sig, handler in previous.items():
                signal.signal(sig, handler)
        if self.stopped:
            self.say(
                'stopped; the same command resumes from the last checkpoints'
            )
            raise KeyboardInterrupt
        return [run for run, fine in zip(todo, good, strict=True) if not fine]

    def _stop(self, *_: Any) -> None:
        """End the processes of all runs."""
        if not self.stopped:
            killer = Timer(PATIENCE, self._signal, [signal.SIGKILL])
            killer.daemon = True
            killer.start()
        self.stopped = True
        self._signal(signal.SIGTERM)

    def _signal(self, sig: int) -> None:
        for process in [*self.processes.values()]:
            with suppress(ProcessLookupError):  # ended meanwhile
                if process.poll() is None:
                    os.killpg(process.pid, sig)

    def _execute(self, run: Run) -> bool:
        """One run from its start to its result, in a thread of the pool."""
        if self.stopped:
            return False
        slot = int(current_thread().name.rpartition('_')[2])
        again = status(run) in ('started', 'failed')
        write_json(run.folder / 'plan' / 'run.json', run.identity)
        run.config.dump(run.folder / 'plan' / 'config.py')
        (run.folder / 'failed.json').unlink(missing_ok=True)
        command, began = self.launcher.command(run), time.time()
        self.say(f'start{" again" * again} {run.name}')
        with open(run.folder / 'output.txt', 'ab') as output:
            start = output.tell()  # after what earlier attempts left
            # A session of its own: Ctrl-C reaches it through us alone.
            process = self.processes[run.name] = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self.launcher.environment(slot),
                start_new_session=True,
            )
        if self.stopped:  # meanwhile
            self._signal(signal.SIGTERM)
        code = process.wait()
        if self.stopped:
            return False
        seconds = round(time.time() - began, 1)  # of the last start
        try:
            if code:
                raise ValueError(f'exit status {code}')
            metrics, remarks = final_metrics(run)
        except ValueError as error:
            return self._fail(run, str(error), start)
        result = dict(run.identity, metrics=metrics, remarks=remarks)
        result |= dict(seconds=seconds, resumed=again, command=command)
        result['length'] = ' '.join(map(str, run.length))
        result['weights'] = run.checkpoint and asdict(run.checkpoint)
        write_json(run.folder / 'result.json', result)
        if run.task and not self.keep_checkpoints:
            for path in [*run.folder.glob('*.pth')]:
                path.unlink()
        told = f'finished {run.name} in {timedelta(seconds=round(seconds))}'
        for metric in run.task.metrics[:1] if run.task else ():
            value = metrics[metric['key']] * metric['scale']
            told += f', {metric["name"]} {value:.2f}'
        left = sum(not (x.folder / 'result.json').exists() for x in self.runs)
        self.say(f'{told}; {left} runs to go')
        return True

    def _fail(self, run: Run, reason: str, start: int) -> bool:
        log = run.folder / 'output.txt'
        text = log.read_bytes()[start:].decode(errors='replace')
        # What Python said, not torchrun's word on it.
        said = [x for x in re.findall(ERROR, text) if 'ChildFailed' not in x]
        reason = ', '.join([reason, *said[-1:]])
        failure = dict(reason=reason, tail=text[-TAIL:], log=str(log))
        write_json(run.folder / 'failed.json', failure)
        self.say(f'[red]failed[/red] {run.name}: {escape(reason)}, see {log}')
        return False
