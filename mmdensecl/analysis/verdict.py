# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""What the log of a run says, in plain words.

The limits are those of :class:`mmdensecl.engine.ContrastMonitorHook`, which
speaks up during the training itself.
"""
import math
from dataclasses import dataclass
from typing import Dict, Iterator, List, Optional, Sequence

from mmdensecl.benchmark.report.text import NOTHING
from mmdensecl.engine.hooks import ContrastMonitorHook
from .run_log import Curve, RunLog, finite

LIMITS = ContrastMonitorHook()
MAX_WAITING = 20.  # percent of the time; more, and data loading is the brake
TREND = 2.  # points by which a percentage has to move to be called moving
TAIL = 0.05  # of the steps: what "last" is the mean of


@dataclass(frozen=True)
class Finding:
    """One sentence about a run.

    Attributes:
        topic (str): What it is about, in a word or two.
        text (str): The sentence.
        warning (bool): Whether something should be done. Defaults to False.
    """
    topic: str
    text: str
    warning: bool = False


def last(run: RunLog, name: str) -> Optional[float]:
    """Mean of what was logged in the last twentieth of the steps.

    Args:
        run (RunLog): The run.
        name (str): Of the curve.

    Returns:
        float, optional: None where nothing finite was logged.
    """
    curve = finite(run.curve(name))
    if not curve:
        return None
    begin = min(max(curve), run.last_step - TAIL * run.last_step)
    return _mean(x for step, x in curve.items() if step >= begin)


def waiting(run: RunLog) -> Optional[float]:
    """Percentage of the time in which the model waits for pictures.

    Args:
        run (RunLog): The run.

    Returns:
        float, optional: None where times were not logged.
    """
    data, time = finite(run.curve('data_time')), finite(run.curve('time'))
    both = data.keys() & time.keys()
    whole = sum(time[step] for step in both)
    return 100 * sum(data[step] for step in both) / whole if whole else None


def since_full(run: RunLog, name: str) -> Curve:
    """A curve from the step on at which the queue was full.

    All of it where no queue is logged, nothing while it fills.

    Args:
        run (RunLog): The run.
        name (str): Of the curve.
    """
    curve = finite(run.curve(name))
    if not run.curve('queue_fill'):
        return curve
    full_at = math.inf if run.full_at is None else run.full_at
    return {step: x for step, x in curve.items() if step >= full_at}


def judge(run: RunLog) -> List[Finding]:
    """All that the log of a run says.

    Args:
        run (RunLog): The run.

    Returns:
        List[Finding]: In the order of the questions that one asks.
    """
    checks = (_progress, _finite, _hump, _loss, _collapse, _position, _leak,
              _matches, _categories, _neighbours, _time)
    return [finding for check in checks for finding in check(run)]


def _mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def _progress(run: RunLog) -> Iterator[Finding]:
    of = '' if run.total is None else f' of {run.total:,}'
    where = f'{run.last_step:,}{of} steps'
    if run.epoch is not None:
        of = '' if run.epochs is None else f' of {run.epochs}'
        where += f', epoch {run.epoch}{of}'
    state = {
        True: 'finished',
        False: 'not finished',
        None: 'whether it is finished the logs do not tell'
    }[run.finished]
    if run.starts > 1:
        where += (f'; {run.starts} starts, {run.repeated} rows that a later '
                  'one repeated are left out')
    if run.broken:
        lines = 'line' if run.broken == 1 else 'lines'
        where += f'; {run.broken} {lines} of the log cut off or no JSON'
    yield Finding('progress', f'{state}: {where}')


def _finite(run: RunLog) -> Iterator[Finding]:
    bad = [(step, name != 'loss', name) for name, curve in run.curves.items()
           for step, x in curve.items() if not math.isfinite(x)]
    if bad:
        step, _, name = min(bad)
        yield Finding(
            'NaN', f'{name} is not finite at step {step:,}: lower the '
            'learning rate or clip the gradient, and resume from a '
            'checkpoint before it', True)


def _hump(run: RunLog) -> Iterator[Finding]:
    if run.hump is None:
        return
    begin, end = run.hump
    curve = finite(run.curve('loss'))
    inside = {s: x for s, x in curve.items() if begin <= s <= end}
    if not inside:
        return
    peak = max(inside, key=inside.get)
    fill = ('the queue was full at step '
            f'{end:,}' if run.full_at is not None else
            f'the queue is {max(run.curve("queue_fill").values()):.0f}% full')
    yield Finding(
        'queue-fill hump', f'loss {inside[peak]:.2f} at its highest, step '
        f'{peak:,}; {fill}; a rise until then is as it should be')


def _loss(run: RunLog) -> Iterator[Finding]:
    curve = since_full(run, 'loss')
    if len(curve) < 2:
        yield Finding(
            'loss', 'too early to say: no two rows since the queue '
            'was full')
        return
    first, now = curve[min(curve)], last(run, 'loss')
    if now < first:
        # A share of a loss that may be below 0 says nothing.
        share = f' by {100 * (1 - now / first):.0f}%' if now > 0 else ''
        yield Finding(
            'loss', f'fell{share} since the queue was full, '
            f'from {first:.2f} to {now:.2f}')
    else:
        yield Finding(
            'loss', f'did not fall since the queue was full: {first:.2f} '
            f'then, {now:.2f} now', True)


def _collapse(run: RunLog) -> Iterator[Finding]:
    spread = last(run, 'feat_std')
    if spread is None:
        return
    scale = '(1 isotropic, 0 collapsed)'
    if spread < LIMITS.min_std:
        yield Finding(
            'collapse', f'the features have collapsed: feat_std {spread:.3f} '
            f'{scale}, below {LIMITS.min_std:g}', True)
    else:
        yield Finding('collapse', f'none: feat_std {spread:.2f} {scale}')


def _position(run: RunLog) -> Iterator[Finding]:
    share = last(run, 'position_r2')
    if share is None or not since_full(run, 'position_r2'):
        return
    text = (f'the place of a cell alone explains {share:.0f}% of the dense '
            'projections (position_r2)')
    if share > LIMITS.max_position:
        yield Finding(
            'position', f'{text}, above {LIMITS.max_position:g}: the dense '
            'branch tells places, not pictures; see README.md\'s FAQ', True)
    else:
        yield Finding('position', text)


def _leak(run: RunLog) -> Iterator[Finding]:
    position = last(run, 'position_r2') or 0.
    names = ['global_acc']
    if position <= LIMITS.max_position:
        # Else the same fault makes all positives easy to tell.
        names.append('dense_acc')
    curves = {name: since_full(run, name) for name in names}
    curves = {name: curve for name, curve in curves.items() if curve}
    for name, curve in curves.items():
        early = max(LIMITS.early * (run.total or run.last_step),
                    min(curve) + 2 * run.interval)
        high = [
            s for s, x in curve.items()
            if s < early and x > LIMITS.max_early_acc
        ]
        if high:
            yield Finding(
                'leak', f'{name} is {curve[high[0]]:.1f}% as early as step '
                f'{high[0]:,}: trivially easy pictures, or something tells '
                'the key of a picture from the others', True)
            return
    if curves:
        yield Finding(
            'leak', f'none seen: {" and ".join(curves)} not above '
            f'{LIMITS.max_early_acc:g}% early on')


def _trend(curve: Curve, now: float) -> str:
    before = curve[min(curve)]
    word = 'stayed' if abs(now - before) < TREND else (
        'rose' if now > before else 'fell')
    return f'{word}, {before:.1f}% at first and {now:.1f}% now'


def _matches(run: RunLog) -> Iterator[Finding]:
    curve = finite(run.curve('match_acc'))
    if len(curve) > 1:
        yield Finding(
            'matches', 'within one cell of the true spot (match_acc): ' +
            _trend(curve, last(run, 'match_acc')))


def _categories(run: RunLog) -> Iterator[Finding]:
    parts = []
    for name, text in (('category_used', '{:.0f}% of them in use'),
                       ('category_entropy', 'entropy {:.0f}%'),
                       ('category_agreement', 'agreement {:.0f}%')):
        value = last(run, name)
        if value is not None:
            parts.append(text.format(value))
    if not parts:
        return
    text = ', '.join(parts)
    entropy = last(run, 'category_entropy')
    if entropy is not None and entropy < LIMITS.min_category_entropy:
        yield Finding(
            'categories', f'{text}: nearly all cells are of one category '
            f'(entropy below {LIMITS.min_category_entropy:g}%)', True)
    else:
        yield Finding('categories', text)


def _neighbours(run: RunLog) -> Iterator[Finding]:
    curve = finite(run.curve('knn_top1'))
    if curve:
        now, chance = curve[max(curve)], last(run, 'knn_chance') or 0.
        yield Finding(
            'kNN', f'{_trend(curve, now)}; {chance:.1f}% by always naming '
            'the most common class')


def _time(run: RunLog) -> Iterator[Finding]:
    share, seconds = waiting(run), last(run, 'time')
    if share is None or seconds is None:
        return
    text = f'{seconds:.2f} s a step, {share:.0f}% of it waiting for pictures'
    if share > MAX_WAITING:
        yield Finding(
            'time', f'{text}: data loading is the brake; more num_workers, '
            'smaller files, LMDB or shards, or views rendered on the device '
            '(the ..._fast configs)', True)
    else:
        yield Finding('time', text)


def in_one_line(findings: Sequence[Finding]) -> str:
    """The verdict on a run.

    Args:
        findings (Sequence[Finding]): From :func:`judge`.
    """
    topics = [finding.topic for finding in findings if finding.warning]
    if topics:
        return f'look at: {", ".join(topics)}'
    if any(x.topic == 'loss' and x.text.startswith('too') for x in findings):
        return 'too early to say'
    return 'nothing wrong to be seen'


def key_numbers(run: RunLog) -> Dict[str, str]:
    """The numbers of a run that a table has room for.

    Args:
        run (RunLog): The run.

    Returns:
        Dict[str, str]: By the heads of the columns, an en dash where a run
        has not got that far or logs no such thing.
    """
    loss = since_full(run, 'loss')
    numbers = (
        ('steps', run.last_step, '{:,}'),
        ('loss, queue full', loss[min(loss)] if loss else None, '{:.2f}'),
        ('loss, last', last(run, 'loss'), '{:.2f}'),
        ('feat_std', last(run, 'feat_std'), '{:.2f}'),
        ('position', last(run, 'position_r2'), '{:.0f}%'),
        ('match_acc', last(run, 'match_acc'), '{:.1f}%'),
        ('kNN', last(run, 'knn_top1'), '{:.1f}%'),
        ('a step', last(run, 'time'), '{:.2f} s'),
        ('waiting', waiting(run), '{:.0f}%'),
    )
    return {
        head: NOTHING if value is None else form.format(value)
        for head, value, form in numbers
    }
