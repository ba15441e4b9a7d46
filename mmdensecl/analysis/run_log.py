# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What mmengine logged of a pre-training run, over all its starts."""
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

from mmdensecl.benchmark.log import log_files, rows_of

Curve = Dict[int, float]  # by step
RESUMED = re.compile(r' - INFO - resumed epoch: \d+, iter: (\d+)$')
TRAINS = re.compile(r' - INFO - (Epoch|Iter)\(train\) ')
NOT_CURVES = frozenset(('step', 'epoch', 'iter'))


@dataclass(frozen=True)
class RunLog:
    """A run, as it stands.

    Attributes:
        name (str): What it is called.
        curves (Dict[str, Curve]): What was logged, by step. A curve that is
            not finite somewhere has that value there.
        starts (int): How often it was started.
        repeated (int): Rows of earlier starts that do not count, as a later
            start went back behind them.
        broken (int): Lines of the logs that are no rows.
        epoch (int, optional): The last one logged.
        epochs (int, optional): How many it is to have; None where that is
            counted in steps, or not known.
        total (int, optional): Steps that it is to have; None where the logs
            do not tell.
        saved_end (bool, optional): Whether the last checkpoint is that of
            the end; None where there is none.
    """
    name: str
    curves: Dict[str, Curve] = field(default_factory=dict)
    starts: int = 1
    repeated: int = 0
    broken: int = 0
    epoch: Optional[int] = None
    epochs: Optional[int] = None
    total: Optional[int] = None
    saved_end: Optional[bool] = None

    def curve(self, name: str) -> Curve:
        """What was logged under that name, empty where nothing was."""
        return self.curves.get(name, {})

    @property
    def steps(self) -> List[int]:
        """Those of the training that were logged, in order."""
        return sorted(self.curve('loss'))

    @property
    def last_step(self) -> int:
        """The last of them."""
        return self.steps[-1]

    @property
    def interval(self) -> int:
        """Steps from one row to the next, as a rule."""
        gaps = Counter(b - a for a, b in zip(self.steps, self.steps[1:]))
        return gaps.most_common(1)[0][0] if gaps else self.last_step

    @property
    def finished(self) -> Optional[bool]:
        """Whether it came to its end; None where the logs do not tell.

        mmengine does not log the last steps where they do not fill an
        interval.
        """
        if self.total is None:
            if None not in (self.epoch, self.epochs):
                return False if self.epoch < self.epochs else self.saved_end
            return self.saved_end
        reached = self.last_step + self.interval > self.total
        return reached and self.saved_end is not False

    @property
    def full_at(self) -> Optional[int]:
        """The first step at which the queue was full of real keys.

        None where it never was, or where no queue is logged.
        """
        fill = self.curve('queue_fill')
        return next((s for s in sorted(fill) if fill[s] >= 100), None)

    @property
    def hump(self) -> Optional[Tuple[int, int]]:
        """First and last step of the queue-fill hump.

        The queue starts with random vectors, which are easy to tell from a
        positive, so that the loss rises while real keys take their places.
        None where the log begins with a full queue or has none.
        """
        fill = self.curve('queue_fill')
        if not fill or self.full_at == min(fill):
            return None
        return min(fill), max(fill) if self.full_at is None else self.full_at


def read_run(work_dir: Path, name: Optional[str] = None) -> RunLog:
    """Read the logs of a run.

    Each start has a log of its own. What a start logged behind the checkpoint
    that a later one resumed from was thrown away then, and counts for
    nothing. mmengine's text log names the checkpoint's step; without it the
    first row of the later start has to do.

    Args:
        work_dir (Path): The run's work_dir.
        name (str, optional): What to call it. Defaults to None: the name of
            the folder.

    Returns:
        RunLog: Of at least one row.

    Raises:
        FileNotFoundError: There is no log.
        ValueError: The logs hold no row with a loss.
    """
    work_dir = Path(work_dir)
    files = log_files(work_dir)
    if not files:
        what = ('has no log <time>/vis_data/scalars.json; expected the '
                'work_dir of a run that tools/train.py has started'
                if work_dir.is_dir() else 'does not exist')
        raise FileNotFoundError(f'"{work_dir}" {what}')
    rows: List[dict] = []
    broken: List[str] = []
    repeated = starts = 0
    for path in files:
        new = [row for row in rows_of(path, broken) if _is_step(row)]
        if not new:
            continue
        starts += 1
        begin = _first_step(path)
        if begin is None:  # not earlier than this, by what it logged
            begin = min(row['step'] for row in new)
        kept = [row for row in rows if row['step'] < begin]
        repeated += len(rows) - len(kept)
        rows = kept + new
    curves: Dict[str, Curve] = {}
    for row in rows:
        for key, value in row.items():
            if key not in NOT_CURVES and _is_number(value):
                curves.setdefault(key, {})[row['step']] = float(value)
    if 'loss' not in curves:
        raise ValueError(
            f'The logs of "{work_dir}" hold no step with a loss (files: '
            f'{len(files)}, lines that are no rows: {len(broken)}); the run '
            'has not got as far as its first log line, or is no training')
    epochs = [row for row in rows if isinstance(row.get('epoch'), int)]
    kind, planned = _planned(files)
    length = _epoch_length(epochs)
    total = planned if kind == 'iter' else None
    if kind == 'epoch' and planned and length:
        total = planned * length
    return RunLog(
        name=work_dir.resolve().name if name is None else name,
        curves={
            key: dict(sorted(curve.items()))
            for key, curve in curves.items()
        },
        starts=starts,
        repeated=repeated,
        broken=len(broken),
        epoch=int(epochs[-1]['epoch']) if epochs else None,
        epochs=planned if kind == 'epoch' else None,
        total=total,
        saved_end=_saved_end(work_dir, kind, planned))


def read_runs(work_dirs: Sequence[Path],
              names: Optional[Sequence[str]] = None) -> List[RunLog]:
    """Read several runs, each with a name of its own.

    Args:
        work_dirs (Sequence[Path]): Their work_dirs.
        names (Sequence[str], optional): What to call them. Defaults to None:
            the names of the folders, with those that they are in where these
            are alike.

    Returns:
        List[RunLog]: In this order.

    Raises:
        ValueError: There are not as many names as runs, or two alike.
    """
    if names is None:
        paths = [Path(x).resolve() for x in work_dirs]
        longest = max(len(path.parts) for path in paths)
        for depth in range(1, longest + 1):
            names = ['/'.join(path.parts[-depth:]) for path in paths]
            if len(set(names)) == len(names):
                break
    if len(names) != len(work_dirs) or len(set(names)) < len(names):
        raise ValueError(f'{len(work_dirs)} runs need as many names, each '
                         f'another, got {list(names)}')
    return [read_run(path, name) for path, name in zip(work_dirs, names)]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_step(row: dict) -> bool:
    """Whether it is of the training, and no validation counted in epochs."""
    step = row.get('step')
    return isinstance(step, int) and step >= 0 and not isinstance(
        step, bool) and ('loss' in row or 'knn_top1' in row)


def _first_step(path: Path) -> Optional[int]:
    """The first step that a start made, 0 where it did not resume.

    Out of the text log that mmengine writes beside. None where that does not
    tell, as it is missing or has no rows of a training.

    Args:
        path (Path): The start's scalars.json.
    """
    folder = path.parents[1]
    text = folder / f'{folder.name}.log'
    if not text.is_file():
        return None
    with text.open(encoding='utf-8', errors='replace') as lines:
        for line in lines:
            found = RESUMED.search(line)
            if found:
                return int(found[1]) + 1
            if TRAINS.search(line):
                return 0
    return None


def _planned(files: Sequence[Path]) -> Tuple[str, Optional[int]]:
    """'epoch' or 'iter', and how many the run is to have.

    Out of the config that mmengine saves beside a log, as text: a config is
    a program, and nothing of a run's folder needs to be run to look at it.
    """
    path = files[-1].with_name('config.py')
    if not path.is_file():
        return 'epoch', None
    text = path.read_text(encoding='utf-8', errors='replace')
    found = re.search(r'^train_cfg = dict\([^)]*?\bmax_(epoch|iter)s=(\d+)',
                      text, re.MULTILINE)
    return (found[1], int(found[2])) if found else ('epoch', None)


def _epoch_length(rows: Sequence[dict]) -> Optional[int]:
    """Steps from the first row of an epoch to that of the next, as a rule."""
    first: Dict[int, int] = {}
    for row in rows:
        first.setdefault(row['epoch'], row['step'])
    gaps = Counter(first[epoch + 1] - step for epoch, step in first.items()
                   if epoch + 1 in first)
    return gaps.most_common(1)[0][0] if gaps else None


def _saved_end(work_dir: Path, kind: str,
               most: Optional[int]) -> Optional[bool]:
    pointer = work_dir / 'last_checkpoint'
    if most is None or not pointer.is_file():
        return None
    found = re.search(r'(epoch|iter)_(\d+)\.pth\s*$',
                      pointer.read_text(encoding='utf-8', errors='replace'))
    if not found or found[1] != kind:
        return None
    return int(found[2]) >= most


def finite(curve: Curve) -> Curve:
    """The part of a curve that can be drawn and reckoned with."""
    return {s: x for s, x in curve.items() if math.isfinite(x)}
