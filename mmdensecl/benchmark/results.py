# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What a benchmark keeps on disk, and what it measured as one table."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mmdensecl.engine.safe_write import write_safely

from .plan import Run
from .suite import Suite

SCHEMA = 3
KEY = ['method', 'task', 'mode', 'pretrain_seed', 'seed']


class ResultsError(ValueError):
    """Files that are no benchmark's, or runs that no table may mix."""


def write_json(path: Path, value: Any) -> None:
    """Write a file as a whole or not at all."""
    text = json.dumps(value, indent=1, default=str)
    write_safely(path, text.encode())


def read_json(path: Path) -> dict | None:
    """Read a file of :func:`write_json`; None if there is none."""
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text(encoding='utf-8')))
    except (TypeError, ValueError) as error:
        raise ResultsError(f'"{path}" is broken: {error}') from error


def log_rows(folder: str | Path) -> Iterator[dict]:
    """The rows of mmengine's logs of a run, one log for each start."""
    for path in sorted(Path(folder).glob('*/vis_data/scalars.json')):
        text = path.read_text(encoding='utf-8', errors='replace')
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut off where the run was stopped
                continue
            if isinstance(row, dict):
                yield row


def write_suite(
    folder: Path,
    suite: Suite,
    runs: Sequence[Run],
    notes: Mapping[str, list[str]] | None = None,
    sweep: dict | None = None,
) -> None:
    """Write ``suite.json``, from which the report knows what to expect.

    What an earlier call planned here stays planned, so that methods, tasks
    and seeds can be added.

    Args:
        folder: Of the suite.
        suite: With the tasks that are run.
        runs: All of them.
        notes: Remarks on the labels, by task.
        sweep: What the methods of a sweep differ in.
    """
    path = folder / 'suite.json'
    known = read_json(path) or dict(tasks={}, runs={}, sweep=sweep)
    if sweep:
        before = known['sweep'] or sweep
        sweep['values'] = {**before['values'], **sweep['values']}
    known.update(schema=SCHEMA, sweep=sweep or known['sweep'])
    for task in suite.tasks:
        remarks = (notes or {}).get(task.name, [])
        known['tasks'][task.name] = dict(asdict(task), notes=remarks)
    for run in runs:
        known['runs'][run.name] = run.key
    for name in ('name', 'title', 'description'):
        known[name] = getattr(suite, name)
    write_json(path, known)


@dataclass(frozen=True)
class Results:
    """All that a benchmark planned, with what there is of it."""

    suite: dict  # suite.json
    # Each as it was planned, with its name, folder, status ('finished',
    # 'failed', 'not run') and result or failure.
    runs: list[dict]
    # A line for each number: KEY, metric, value in the metric's unit.
    values: pd.DataFrame


def load_results(folder: str | Path) -> Results:
    """Read the folder of a suite.

    Raises:
        FileNotFoundError: There is no ``suite.json``.
        ResultsError: A file is broken.
    """
    folder = Path(folder)
    suite = read_json(folder / 'suite.json')
    if suite is None:
        raise FileNotFoundError(
            f'There is no "{folder / "suite.json"}": name the folder of a '
            'suite that `tools/benchmark.py run` has written'
        )
    if suite.get('schema') != SCHEMA:
        raise ResultsError(
            f'"{folder}" is of another version: its runs have '
            'to be repeated, in another --work-dir'
        )
    runs, rows = [], []
    for name, key in suite['runs'].items():
        run = dict(key, name=name, folder=folder / name, status='not run')
        run['result'] = read_json(run['folder'] / 'result.json')
        run['failure'] = read_json(run['folder'] / 'failed.json')
        if run['result'] or run['failure']:
            run['status'] = 'finished' if run['result'] else 'failed'
        runs.append(run)
        metrics = suite['tasks'][run['task']]['metrics']
        for metric in metrics if run['result'] else ():
            try:
                value = float(run['result']['metrics'][metric['key']])
            except (KeyError, TypeError, ValueError) as error:
                raise ResultsError(
                    f'"{run["folder"]}/result.json" has no '
                    f'number {metric["key"]}'
                ) from error
            value *= metric['scale']
            rows.append([*(run[x] for x in KEY), metric['name'], value])
    values = pd.DataFrame(rows, columns=[*KEY, 'metric', 'value'])
    values = values.astype(dict(pretrain_seed='Int64'))
    return Results(suite, runs, values)


def differences(old: Any, new: Any, name: str = '') -> Iterator[str]:
    """Say where two nested dicts differ, ``name: old -> new``."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from differences(old.get(key), new.get(key), f'{name}.{key}')
    elif old != new:
        yield f'{name[1:]}: {old} -> {new}'


def check_others(folder: Path, planned: Sequence[Run]) -> None:
    """Refuse runs that could not stand beside those that have finished.

    All runs of a suite share code and software; those of a table, and the
    trainings of a sweep, all settings; those of a method and pre-training
    seed the checkpoint.

    Args:
        folder: Of all of them.
        planned: Of this call, whose own folders are not looked at.
    """
    again = {run.folder for run in planned}
    for path in sorted(folder.rglob('result.json')):
        old = read_json(path) or {}
        for run in () if path.parent in again else planned:
            new, was = run.identity, old['key']
            names = {'code', 'stack'}
            if (was['task'], was['mode']) == (new['key']['task'], run.mode):
                names = {*run.settings}
            if run.task is None:  # trainings of a sweep differ in it
                names.discard('config')
            one, other = (
                {k: x['settings'].get(k) for k in names} for x in (old, new)
            )
            same = all(
                was[x] == new['key'][x] for x in ('method', 'pretrain_seed')
            )
            if run.checkpoint and same:
                one['checkpoint'] = old['sha256']
                other['checkpoint'] = new['sha256']
            changed = [*differences(one, other)]
            if changed:
                raise ResultsError(
                    f'{run.name} would not share the settings of '
                    f'"{path.parent}", so no table can hold both:\n  '
                    + '\n  '.join(changed)
                    + '\nRepeat the odd runs with --redo, in a call that names'
                    ' their methods or values, tasks and seeds too, remove '
                    'them, or take another --work-dir'
                )
