# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What a benchmark keeps on disk, beside mmengine's own files.

``<run>/plan/config.py`` and ``plan/run.json`` are written before a run,
``result.json`` after it; ``failed.json`` instead where it failed.
"""
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple

from .log import log_rows
from .plan import Run
from .suite import Suite

SCHEMA = 1


def write_json(path: Path, value: Any) -> None:
    """Write a file so that nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f'.{path.name}.new')
    with open(new, 'w', encoding='utf-8') as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def read_json(path: Path) -> Optional[dict]:
    """Read a file of :func:`write_json`; None if there is none."""
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding='utf-8'))


class StaleRunError(RuntimeError):
    """A run's folder holds a run with other settings."""


def differences(old: Any, new: Any, name: str = '') -> Iterator[str]:
    """Say where two nested dicts differ.

    Args:
        old (Any): One value.
        new (Any): The other one.
        name (str): Of the value. Defaults to ''.

    Yields:
        str: ``name: old -> new``.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(
                old.get(key), new.get(key), f'{name}.{key}' if name else key)
    elif old != new:
        yield f'{name}: {old} -> {new}'


def status(run: Run) -> str:
    """How far a run is: ``new``, ``started``, ``failed`` or ``finished``.

    Or ``waiting``, for weights that have not been made yet.

    Raises:
        StaleRunError: Its folder is another run's: other code, config, data
            or weights; or nothing tells whose it is.
    """
    plan = read_json(run.folder / 'plan' / 'run.json')
    if plan is None:
        if any(path.name != 'plan' for path in run.folder.glob('*')):
            raise StaleRunError(
                f'"{run.folder}" holds files but no plan/run.json, so nobody '
                'knows with which settings they were made. Take another '
                '--work-dir, or discard them with --redo')
        return 'waiting' if run.waits else 'new'
    changed = list(differences(plan['identity'], run.identity))
    if changed:
        raise StaleRunError(
            f'"{run.folder}" was run with other settings than it would be '
            'now:\n  ' + '\n  '.join(changed) + '\nA table cannot mix them. '
            'Take another --work-dir, or repeat what differs with --redo')
    # A pre-training is made again where somebody removed what it made.
    if (run.folder / 'result.json').is_file() and (run.scored
                                                   or trained_checkpoint(run)):
        return 'finished'
    if (run.folder / 'failed.json').is_file():
        return 'failed'
    return 'started'


def prepare(run: Run) -> Path:
    """Write a run's config and identity.

    Returns:
        Path: The config file.

    Raises:
        StaleRunError: Its folder is not its own, see :func:`status`.
    """
    status(run)
    config = run.folder / 'plan' / 'config.py'
    write_json(config.with_name('run.json'), dict(identity=run.identity))
    run.config.dump(config)
    (run.folder / 'failed.json').unlink(missing_ok=True)
    return config


def discard(run: Run) -> None:
    """Remove all that a run has left, at once or not at all."""
    aside = run.folder.with_name(f'.discarded-{run.folder.name}')
    if aside.exists():  # of a call that was stopped
        shutil.rmtree(aside)
    if run.folder.exists():
        run.folder.rename(aside)
        shutil.rmtree(aside)


def write_suite(folder: Path,
                suite: Suite,
                runs: List[Run],
                sweep: Optional[dict] = None) -> None:
    """Write ``suite.json``, from which the report knows what to expect.

    What an earlier call planned here stays planned, so that rows can be
    added later.

    Args:
        folder (Path): Of the suite.
        suite (Suite): With the tasks that are run.
        runs (List[Run]): All of them.
        sweep (dict, optional): What the rows of an ablation differ in:
            ``key``, ``label``, ``axis`` and the ``values`` by row. Defaults
            to None, what an earlier call wrote.
    """
    path = folder / 'suite.json'
    old = read_json(path) or dict(tasks=[], runs=[])
    tasks = {task['name']: task for task in old['tasks']}
    for task in suite.tasks:
        tasks[task.name] = dict(
            name=task.name,
            title=task.title,
            model=task.model,
            metrics=task.metrics,
            published=list(task.published))
    planned: Dict[str, dict] = {run['folder']: run for run in old['runs']}
    for run in runs:
        planned[run.name] = dict(
            task=run.task.name,
            protocol=run.protocol,
            row=run.row,
            seed=run.seed,
            folder=run.name)

    before = old.get('sweep')
    if sweep and before:
        sweep = {**sweep, 'values': {**before['values'], **sweep['values']}}

    def unique(key: str) -> list:
        return list(dict.fromkeys(run[key] for run in planned.values()))

    write_json(
        path,
        dict(
            schema=SCHEMA,
            name=suite.name,
            title=suite.title,
            description=suite.description,
            tasks=list(tasks.values()),
            rows=unique('row'),
            protocols=unique('protocol'),
            seeds=sorted(unique('seed')),
            runs=list(planned.values()),
            sweep=sweep or before))


def final_metrics(run: Run) -> Tuple[Dict[str, float], Optional[str]]:
    """What a run measured at its end.

    Args:
        run (Run): The run. Of a pre-training it is the last line of its log.

    Returns:
        Tuple[Dict[str, float], str | None]: The metrics, and a remark for the
        reader.

    Raises:
        ValueError: It has not come to its end, or lacks a metric.
    """
    if not run.scored:
        if trained_checkpoint(run) is None:
            raise ValueError('it ended without its last checkpoint')
        steps = [row for row in log_rows(run.folder) if 'lr' in row]
        return _numbers(steps[-1]) if steps else {}, None
    keys = [metric['key'] for metric in run.task.metrics]
    length, _ = run.length
    # Of tools/test.py, the last one first; then what was logged in training.
    tests = sorted(run.folder.glob('*/[0-9]*_[0-9]*.json'), reverse=True)
    found = [json.loads(path.read_text(encoding='utf-8')) for path in tests]
    for row in reversed([*log_rows(run.folder)]):
        if 'lr' not in row and row.get('step') == length:
            found.append(row)
    for row in found:
        missing = [key for key in keys if key not in row]
        if not missing:
            return _numbers(row), None
        if len(missing) < len(keys):
            raise ValueError(f'its result lacks {", ".join(missing)}')
    if found and run.task.layout == 'coco' and _found_nothing(run):
        return dict.fromkeys(keys, 0.), (
            'not one object was detected, for which mmdet gives no numbers: '
            'counted as 0')
    raise ValueError('it ended without a result')


def _found_nothing(run: Run) -> bool:
    """Whether mmdet's CocoMetric gave up for want of any detection.

    It says so, and returns no metrics instead of zeros.
    """
    path = run.folder / 'output.txt'
    if not path.is_file():
        return False
    log = path.read_text(encoding='utf-8', errors='replace')
    evaluation = log.rpartition('Evaluating bbox...')[2]
    return 'results of the whole dataset is empty' in evaluation


def _numbers(row: dict) -> Dict[str, float]:
    return {
        key: value
        for key, value in row.items()
        if isinstance(value, (int, float)) and key not in ('step', 'time',
                                                           'data_time')
    }


def progress(run: Run) -> float:
    """Share of a training that is done, from its log."""
    length, unit = run.length
    key = 'epoch' if unit == 'epochs' else 'step'
    done = [row[key] for row in log_rows(run.folder) if row.get(key)]
    return min(1., max(done, default=0) / length) if length else 0.


def trained_checkpoint(run: Run) -> Optional[Path]:
    """The checkpoint of a training's end; None where it has not come to it.

    Args:
        run (Run): The run.
    """
    path = run.last_checkpoint
    pointer = run.folder / 'last_checkpoint'
    # mmengine writes the pointer after the checkpoint.
    if not pointer.is_file():
        return None
    if Path(pointer.read_text(encoding='utf-8')).name != path.name:
        return None
    return path if zipfile.is_zipfile(path) else None


def mend_pointer(run: Run) -> Optional[str]:
    """Let a run resume from a checkpoint that is there.

    mmengine removes the last checkpoint before it writes the next one. A run
    that was killed in between points to a file that is gone or cut off, and
    every ``--resume`` would fail on it.

    Args:
        run (Run): The run.

    Returns:
        str | None: What was done, for the user; None if nothing.
    """
    pointer = run.folder / 'last_checkpoint'
    if not pointer.is_file():
        return None
    last = Path(pointer.read_text(encoding='utf-8').strip() or 'none')
    # torch.save writes zip archives, whose directory comes last.
    if zipfile.is_zipfile(last):
        return None
    whole = {
        int(match[1]): path
        for path in run.folder.glob('*.pth')
        if (match := re.fullmatch(r'(?:iter|epoch)_(\d+)\.pth', path.name))
        and zipfile.is_zipfile(path)
    }
    if not whole:
        pointer.unlink()
        return f'{last.name} is gone or cut off, starting afresh'
    best = whole[max(whole)]
    pointer.write_text(str(best), encoding='utf-8')
    return f'{last.name} is gone or cut off, going on from {best.name}'
