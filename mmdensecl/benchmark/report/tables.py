# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""The numbers of the tables: means over seeds, and paired differences."""
import math
import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from .results import Metric, Published, Run, Suite, Task

CONFIDENCE = 0.95
# The status of a row that nobody ran here.
PUBLISHED_ONLY = 'published only'


@dataclass(frozen=True)
class Statistics:
    """Of one number over seeds.

    Attributes:
        mean (float): Not finite where a value is not: such a run is shown,
            never averaged away.
        std (float, optional): Of the sample (n - 1); None for one value.
        n (int): How many values.
        interval (tuple, optional): Where the true mean lies with 95 %
            confidence, by Student's t; None for one value or without scipy.
    """
    mean: float
    std: Optional[float]
    n: int
    interval: Optional[Tuple[float, float]] = None


@dataclass
class Cell:
    """A row's number in one metric.

    Attributes:
        values (Dict[int, float]): Of each compared seed.
        own (Statistics, optional): Of these; None where there are none.
        difference (Statistics, optional): To the baseline, of the same
            seeds; None for the baseline itself and where either is unknown.
        best (bool): Whether it leads by more than the spread.
        published (List[Published]): Others' numbers for this cell.
    """
    values: Dict[int, float]
    own: Optional[Statistics] = None
    difference: Optional[Statistics] = None
    best: bool = False
    published: List[Published] = field(default_factory=list)


@dataclass(frozen=True)
class Row:
    """A row of a table; ``status`` says why it may have no numbers."""
    name: str
    status: str
    runs: Dict[int, Run]
    cells: Dict[str, Cell]


@dataclass(frozen=True)
class Table:
    """One task by one protocol.

    ``title`` names the task among the suite's; ``trained`` says whether
    there is a training, which a seed could change.
    """
    task: Task
    title: str
    protocol: str
    trained: bool
    baseline: str
    seeds: Tuple[int, ...]
    notes: Tuple[str, ...]
    rows: Tuple[Row, ...]

    @property
    def published(self) -> Tuple[Published, ...]:
        """Others' numbers for this table."""
        return tuple(x for x in self.task.published
                     if x.protocol == self.protocol)

    @property
    def finished(self) -> List[Run]:
        """All its finished runs, compared or not."""
        return [
            run for row in self.rows for run in row.runs.values()
            if run.status == 'finished'
        ]


def describe(values: Sequence[float],
             with_interval: bool = False) -> Optional[Statistics]:
    """Mean and spread of a few values.

    Args:
        values (Sequence[float]): One for each seed.
        with_interval (bool): Whether to add the confidence interval.
            Defaults to False.

    Returns:
        Statistics | None: None of no values.
    """
    if not values:
        return None
    broken = [value for value in values if not math.isfinite(value)]
    if broken:
        return Statistics(broken[0], None, len(values))
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Statistics(mean, None, 1)
    std = statistics.stdev(values)
    interval = None
    if with_interval:
        half = _half_width(std, len(values))
        interval = half if half is None else (mean - half, mean + half)
    return Statistics(mean, std, len(values), interval)


def _half_width(std: float, n: int) -> Optional[float]:
    try:
        from scipy.stats import t
    except ModuleNotFoundError:  # optional
        return None
    return float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / math.sqrt(n)


def compare(suite: Suite, baseline: Optional[str] = None) -> List[Table]:
    """Make the tables of a suite.

    A table compares the seeds that all of its rows have finished. A row
    without any finished run would leave none, so it stands in the table
    without numbers and has no say in that. Rows that others have published
    and nobody planned here come last, without runs.

    Args:
        suite (Suite): From :func:`load_suite`.
        baseline (str, optional): Row to which the others are compared.
            Defaults to None, the first one of the suite.

    Returns:
        List[Table]: One for each task and protocol that has runs.

    Raises:
        ValueError: There is no such row.
    """
    baseline = suite.rows[0] if baseline is None else baseline
    if baseline not in suite.rows:
        raise ValueError(f'There is no row "{baseline}" to compare with, only '
                         f'{", ".join(suite.rows)}')
    titles = _titles(suite.tasks)
    return [
        _table(suite, task, titles[task.name], protocol, baseline)
        for task in suite.tasks for protocol in suite.protocols
        if suite.select(task, protocol)
    ]


def _titles(tasks: Sequence[Task]) -> Dict[str, str]:
    """By a task's name its title, with the model where that is needed."""
    titles = Counter(task.title for task in tasks)
    models = Counter((task.title, task.model) for task in tasks)
    found = {}
    for task in tasks:
        found[task.name] = task.title
        if titles[task.title] > 1:
            twice = models[task.title, task.model] > 1
            found[task.name] += f' ({task.name if twice else task.model})'
    return found


def _table(suite: Suite, task: Task, title: str, protocol: str,
           baseline: str) -> Table:
    by_row: Dict[str, Dict[int, Run]] = {}
    for run in suite.select(task, protocol):
        by_row.setdefault(run.row, {})[run.seed] = run
    finished = {
        row: {s
              for s, run in runs.items() if run.status == 'finished'}
        for row, runs in by_row.items()
    }
    counted = [seeds for seeds in finished.values() if seeds]
    seeds = tuple(
        s for s in suite.seeds if counted and all(s in x for x in counted))
    trained = not counted or any(
        run.result.get('length') != 0 for runs in by_row.values()
        for run in runs.values() if run.status == 'finished')
    if not trained:  # further seeds have measured the same weights again
        seeds = seeds[:1]
    rows = tuple(
        Row(
            name, _status(by_row[name]), by_row[name], {
                metric.key:
                _cell(task, protocol, name, metric, by_row[name],
                      seeds if finished[name] else ())
                for metric in task.metrics
            }) for name in suite.rows if name in by_row)
    for metric in task.metrics:
        _compare_rows(rows, metric.key, baseline)
    notes = tuple(_notes(suite, rows, seeds, trained))
    others = dict.fromkeys(x.row for x in task.published
                           if x.protocol == protocol and x.row not in by_row)
    rows += tuple(
        Row(name, PUBLISHED_ONLY, {}, {
            metric.key: _cell(task, protocol, name, metric, {}, ())
            for metric in task.metrics
        }) for name in others)
    return Table(task, title, protocol, trained, baseline, seeds, notes, rows)


def _status(runs: Dict[int, Run]) -> str:
    found = {run.status for run in runs.values()}
    for status in ('finished', 'failed'):
        if status in found:
            return status
    return 'not run'


def _cell(task: Task, protocol: str, row: str, metric: Metric,
          runs: Dict[int, Run], seeds: Sequence[int]) -> Cell:
    values = {seed: runs[seed].value(metric) for seed in seeds}
    return Cell(
        values,
        describe([*values.values()]),
        published=[
            x for x in task.published
            if (x.protocol, x.row, x.metric) == (protocol, row, metric.key)
        ])


def _compare_rows(rows: Sequence[Row], key: str, baseline: str) -> None:
    cells = {row.name: row.cells[key] for row in rows}
    base = cells.get(baseline)
    for name, cell in cells.items():
        known = [cell, base] if base else []
        if name != baseline and known and all(map(_is_known, known)):
            cell.difference = describe(
                [cell.values[s] - base.values[s] for s in cell.values],
                with_interval=True)
    ranked = sorted(
        filter(_is_known, cells.values()), key=lambda cell: -cell.own.mean)
    if len(ranked) > 1 and ranked[0].own.std is not None:
        first = ranked[0].own
        # Of all others: the second may be surer of its place than the third.
        ranked[0].best = all(first.mean -
                             other.own.mean > max(first.std, other.own.std)
                             for other in ranked[1:])


def _is_known(cell: Cell) -> bool:
    return cell.own is not None and math.isfinite(cell.own.mean)


def _notes(suite: Suite, rows: Sequence[Row], seeds: Sequence[int],
           trained: bool) -> Iterator[str]:
    """Say which seeds the table leaves out, and why."""
    for seed in suite.seeds if trained else ():
        planned = [row for row in rows if seed in row.runs]
        done = [row for row in planned if row.runs[seed].status == 'finished']
        if seed in seeds or not done:
            continue
        missing = [
            f'{row.name} has {_why(row, seed)}' for row in rows
            if row.status == 'finished' and row not in done
        ]
        yield (f'Seed {seed} is left out, although {len(done)} of '
               f'{len(rows)} rows have finished it: {", ".join(missing)}.')
    for row in rows:
        for seed, run in row.runs.items():
            if run.status == 'finished' and run.result.get('note'):
                yield f'{row.name}, seed {seed}: {run.result["note"]}.'
        broken = [
            str(seed) for seed in seeds if row.status == 'finished' and any(
                not math.isfinite(cell.values[seed])
                for cell in row.cells.values())
        ]
        if broken:
            yield (f'{row.name} measured something that is not a finite '
                   f'number with seed {", ".join(broken)}; it is shown '
                   'instead of a mean.')


def _why(row: Row, seed: int) -> str:
    if seed not in row.runs:
        return 'no such run'
    return ('failed'
            if row.runs[seed].status == 'failed' else 'not finished it')
