# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""Read what the runs of a benchmark left, and refuse what does not fit.

Every file may come from another machine, so nothing in it is trusted: a
wrong type or a missing value ends in an error that names the file.
"""
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import (Any, Dict, Iterable, List, Mapping, Optional, Sequence,
                    Tuple, Union)

from mmdensecl.benchmark.plan import Run as PlannedRun

SCHEMA = 1
NUMBER = (int, float)
AXES = ('linear', 'log', 'category')
# What rows of one table share, and what the whole suite shares.
TABLE_SETTINGS = ('config_sha256', 'data', 'processes', 'device', 'length',
                  'unit', 'batch_size')
SUITE_SETTINGS = ('code', 'stack')
ABSENT = 'not stated'


class ResultsError(ValueError):
    """A file of a benchmark that cannot be read as one."""


class DifferentSettingsError(ValueError):
    """Runs that must not stand in one table."""


@dataclass(frozen=True)
class Metric:
    """A column: ``key`` in the results, times ``scale`` in ``unit``."""
    key: str
    name: str
    scale: float
    unit: str


@dataclass(frozen=True)
class Published:
    """Somebody else's number, in the printed unit of its metric."""
    row: str
    protocol: str
    metric: str
    value: float
    source: str


@dataclass(frozen=True)
class Task:
    """What is trained and measured; the first metric is the main one."""
    name: str
    title: str
    model: str
    metrics: Tuple[Metric, ...]
    published: Tuple[Published, ...]


@dataclass(frozen=True)
class Run:
    """One planned run; ``result`` or ``failure`` is what it has left."""
    task: str
    protocol: str
    row: str
    seed: int
    name: str
    folder: Path
    result: Optional[dict] = None
    failure: Optional[dict] = None

    @property
    def status(self) -> str:
        """``finished``, ``failed`` or ``not run``."""
        if self.result is not None:
            return 'finished'
        return 'not run' if self.failure is None else 'failed'

    def value(self, metric: Metric) -> float:
        """The measured number in the metric's unit; may not be finite."""
        return self.result['metrics'][metric.key] * metric.scale


@dataclass(frozen=True)
class Sweep:
    """What the rows of an ablation differ in, with the value of each row.

    The values are numbers, or names where ``axis`` is ``category``.
    """
    key: str
    label: str
    axis: str
    values: Dict[str, Union[float, str]]


@dataclass(frozen=True)
class Suite:
    """All that a benchmark planned, with what there is of it."""
    folder: Path
    name: str
    title: str
    description: str
    rows: Tuple[str, ...]
    protocols: Tuple[str, ...]
    seeds: Tuple[int, ...]
    tasks: Tuple[Task, ...]
    runs: Tuple[Run, ...]
    sweep: Optional[Sweep] = None

    def select(self, task: Task, protocol: str) -> List[Run]:
        """The runs of one table."""
        return [
            run for run in self.runs
            if (run.task, run.protocol) == (task.name, protocol)
        ]


class _Fields:
    """Checked access to the values of a JSON object."""

    def __init__(self, path: Path, value: Any, where: str = '') -> None:
        self.path, self.where = path, where
        if not isinstance(value, dict):
            raise self.error('', value, 'an object')
        self.value = value

    def error(self, key: str, got: Any, expected: str) -> ResultsError:
        where = '.'.join(filter(None, (self.where, key))) or 'its content'
        return ResultsError(
            f'"{self.path}": {where} is {_short(got)}, expected {expected}')

    def get(self, key: str, kind: Union[type, tuple], expected: str) -> Any:
        value = self.value.get(key)
        # JSON's true is no number, though Python's is.
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(key, value if key in self.value else 'missing',
                             expected)
        return value

    def text(self, key: str) -> str:
        return self.get(key, str, 'a text')

    def number(self, key: str) -> float:
        # An integer may be too large for a float.
        try:
            return float(self.get(key, NUMBER, 'a number'))
        except OverflowError:
            return math.inf

    def finite(self, key: str, default: Optional[float] = None) -> float:
        if default is not None and key not in self.value:
            return default
        number = self.number(key)
        if not math.isfinite(number):
            raise self.error(key, number, 'a finite number')
        return number

    def one_of(self, key: str, kind: type, allowed: Iterable) -> Any:
        value = self.get(key, kind, f'a {kind.__name__}')
        if value not in allowed:
            raise self.error(key, value, f'one of {list(allowed)}')
        return value

    def distinct(self, key: str, kind: type) -> tuple:
        values = self.get(key, list, 'a list')
        for value in values:
            if not isinstance(value, kind) or isinstance(value, bool):
                raise self.error(key, values, f'a list of {kind.__name__}')
        if not values or len(set(values)) < len(values):
            raise self.error(key, values, 'distinct values, at least one')
        return tuple(values)

    def objects(self, key: str) -> List['_Fields']:
        return [
            _Fields(self.path, value, f'{self.where}{key}[{i}]')
            for i, value in enumerate(self.get(key, list, 'a list'))
        ]

    def child(self, key: str) -> '_Fields':
        return _Fields(self.path, self.value.get(key),
                       '.'.join(filter(None, (self.where, key))))


def _short(value: Any) -> str:
    text = value if value == 'missing' else repr(value)
    return text if len(text) <= 80 else text[:77] + '...'


def _read(path: Path) -> _Fields:
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise FileNotFoundError(
            f'There is no "{path}". The report reads the folder of a suite '
            'that `tools/benchmark.py run` has written') from None
    except (ValueError, RecursionError) as error:
        raise ResultsError(f'"{path}" is not valid JSON: {error}') from error
    return _Fields(path, value)


def read_suite(suite_dir: Union[str, Path]) -> Suite:
    """Read a suite and the results of its runs, each checked for itself.

    A run with a ``result.json`` has finished, whatever else its folder holds;
    one with only a ``failed.json`` has failed; others have not been run.

    Args:
        suite_dir (str | Path): Folder with ``suite.json``.

    Returns:
        Suite: All of it.

    Raises:
        FileNotFoundError: There is no ``suite.json``.
        ResultsError: A file is broken or states something impossible.
    """
    folder = Path(suite_dir)
    data = _read(folder / 'suite.json')
    data.one_of('schema', int, (SCHEMA, ))
    rows = data.distinct('rows', str)
    protocols = data.distinct('protocols', str)
    seeds = data.distinct('seeds', int)
    tasks = tuple(_task(x, protocols) for x in data.objects('tasks'))
    names = [task.name for task in tasks]
    if len(set(names)) < len(names) or not names:
        raise data.error('tasks', names, 'distinct names, at least one')
    runs: Dict[tuple, Run] = {}
    for entry in data.objects('runs'):
        key = (entry.one_of('task', str,
                            names), entry.one_of('protocol', str, protocols),
               entry.one_of('row', str,
                            rows), entry.one_of('seed', int, seeds))
        if key in runs:
            raise entry.error('', key, 'a run that is not listed twice')
        task = tasks[names.index(key[0])]
        runs[key] = _run(folder, entry, key, task)
    return Suite(folder, data.text('name'), data.text('title'),
                 data.text('description'), rows, protocols, seeds, tasks,
                 tuple(runs.values()), _sweep(data, rows))


def load_suite(suite_dir: Union[str, Path]) -> Suite:
    """Read a suite whose runs can be compared.

    Args:
        suite_dir (str | Path): Folder with ``suite.json``.

    Returns:
        Suite: As :func:`read_suite` reads it, with its errors.

    Raises:
        DifferentSettingsError: Runs that would share a table have other
            settings, code or software, or a row changes its checkpoint.
    """
    suite = read_suite(suite_dir)
    check_settings(suite.folder, suite.runs)
    return suite


def _sweep(data: _Fields, rows: tuple) -> Optional[Sweep]:
    if data.value.get('sweep') is None:
        return None
    data = data.child('sweep')
    axis = data.one_of('axis', str, AXES)
    values = data.child('values')
    for row in values.value:
        if row not in rows:
            raise values.error('', row, f'one of {list(rows)}')
        if axis == 'category':
            values.text(row)
        elif values.finite(row) <= 0 and axis == 'log':
            raise values.error(row, values.value[row], 'a number above 0')
    return Sweep(data.text('key'), data.text('label'), axis, values.value)


def _task(data: _Fields, protocols: tuple) -> Task:
    metrics = tuple(
        Metric(
            x.text('key'), x.text('name'), x.finite('scale', 1.),
            x.text('unit') if 'unit' in x.value else '')
        for x in data.objects('metrics'))
    keys = [metric.key for metric in metrics]
    if len(set(keys)) < len(keys) or not keys:
        raise data.error('metrics', keys, 'distinct keys, at least one')
    # A metric may be called by its key or by its name.
    names = {name: m.key for m in metrics for name in (m.name, m.key)}
    published = tuple(
        Published(
            x.text('row'), x.text('protocol'), names[x.one_of(
                'metric', str, names)], x.finite('value'), x.text('source'))
        for x in data.objects('published')
        # The suite lists those of protocols that were not asked for, too.
        if x.text('protocol') in protocols)
    return Task(
        data.text('name'), data.text('title'), data.text('model'), metrics,
        published)


def _run(root: Path, entry: _Fields, key: tuple, task: Task) -> Run:
    name = entry.text('folder')
    folder = root / name
    if not folder.resolve().is_relative_to(root.resolve()):
        raise entry.error('folder', name, 'a folder below the suite')
    run = dict(zip(('task', 'protocol', 'row', 'seed'), key))
    result = failure = None
    if (folder / 'result.json').is_file():
        result = _result(folder / 'result.json', run, task)
    elif (folder / 'failed.json').is_file():
        failure = _read(folder / 'failed.json').value
    return Run(**run, name=name, folder=folder, result=result, failure=failure)


def _result(path: Path, run: Mapping[str, Any], task: Task) -> dict:
    data = _read(path)
    data.one_of('schema', int, (SCHEMA, ))
    for key, expected in run.items():
        data.one_of(key, type(expected), (expected, ))
    settings = data.child('settings')
    for key in ('config_sha256', 'code', 'device'):
        settings.text(key)
    settings.child('data').text('fingerprint')
    settings.child('stack')
    settings.get('processes', int, 'an integer')
    if data.finite('seconds') < 0:
        raise data.error('seconds', data.value['seconds'], 'at least 0')
    if data.value.get('checkpoint') is not None:
        checkpoint = data.child('checkpoint')
        checkpoint.text('sha256'), checkpoint.text('path')
    metrics = data.child('metrics')
    numbers = {
        metric.key: metrics.number(metric.key)
        for metric in task.metrics
    }
    return {**data.value, 'metrics': numbers}


def settings_of(run: Run) -> Dict[str, str]:
    """What decides whether a run may stand beside another one.

    Args:
        run (Run): A finished run.

    Returns:
        Dict[str, str]: By name; each package of the stack for itself.
    """
    settings = run.result['settings']
    found = {
        key: settings[key]
        for key in ('config_sha256', 'code', 'processes', 'device')
    }
    found['data'] = settings['data']['fingerprint']
    for key in ('length', 'unit', 'batch_size'):
        found[key] = run.result.get(key, ABSENT)
    for package, version in settings['stack'].items():
        found[f'stack.{package}'] = version
    return {key: str(value) for key, value in found.items()}


def check_settings(folder: Path, runs: Iterable[Run]) -> None:
    """Refuse runs that cannot be compared.

    Args:
        folder (Path): Of the suite, for the message.
        runs (Iterable[Run]): The unfinished ones among them do not count.

    Raises:
        DifferentSettingsError: See :func:`load_suite`.
    """
    finished = [run for run in runs if run.status == 'finished']
    tables: Dict[tuple, List[Run]] = {}
    rows: Dict[str, List[Run]] = {}
    for run in finished:
        tables.setdefault((run.task, run.protocol), []).append(run)
        rows.setdefault(run.row, []).append(run)
    problems = [*_differences(finished, SUITE_SETTINGS)]
    for group in tables.values():
        problems += _differences(group, TABLE_SETTINGS)
    if problems:
        raise DifferentSettingsError(
            f'Runs in "{folder}" do not share their settings, so they '
            'cannot stand in one table:\n' + '\n'.join(problems) +
            '\nRepeat the odd ones with --redo, in a call that names their '
            'rows, tasks and seeds too, or keep the two sorts apart with '
            'another --work-dir')
    for group in rows.values():
        problems += _groups(
            'checkpoint', {
                run.name:
                (run.result.get('checkpoint') or {}).get('sha256', 'none')
                for run in group
            })
    if problems:
        raise DifferentSettingsError(
            f'A row of "{folder}" stands for more than one '
            'checkpoint:\n' + '\n'.join(problems) +
            '\nGive each checkpoint a row of its own, or repeat the odd runs '
            'with --redo')


def check_planned(suite_dir: Union[str, Path],
                  planned: Sequence[PlannedRun]) -> None:
    """Refuse runs that could not stand beside those that have finished.

    Args:
        suite_dir (str | Path): Folder of the suite.
        planned (Sequence[mmdensecl.benchmark.plan.Run]): What is about to be
            run.

    Raises:
        ResultsError: A file of the suite is broken.
        DifferentSettingsError: See :func:`load_suite`.
    """
    folder = Path(suite_dir)
    if not (folder / 'suite.json').is_file():
        return
    runs = {run.name: run for run in read_suite(folder).runs}
    for run in planned:
        length, unit = run.length
        runs[run.name] = Run(
            run.task.name,
            run.protocol,
            run.row,
            run.seed,
            run.name,
            run.folder,
            result=dict(
                settings=run.settings,
                checkpoint=run.checkpoint and asdict(run.checkpoint),
                length=length,
                unit=unit,
                batch_size=run.batch_size))
    check_settings(folder, runs.values())


def _differences(runs: List[Run], kinds: Tuple[str, ...]) -> Iterable[str]:
    settings = {run.name: settings_of(run) for run in runs}
    names = dict.fromkeys(name for found in settings.values()
                          for name in found)
    for name in names:
        if name.split('.')[0] in kinds:
            yield from _groups(name, {
                run: found.get(name, ABSENT)
                for run, found in settings.items()
            })


def _groups(what: str, values: Mapping[str, str]) -> Iterable[str]:
    """One line for each value of a setting that has more than one."""
    groups: Dict[str, List[str]] = {}
    for run, value in values.items():
        groups.setdefault(value, []).append(run)
    if len(groups) < 2:
        return
    yield f'  {what}:'
    for value, runs in groups.items():
        more = f' and {len(runs) - 3} more' if len(runs) > 3 else ''
        yield f'    {value} in {", ".join(runs[:3])}{more}'
