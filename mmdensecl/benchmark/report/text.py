# Copyright (c) mmdensecl contributors. Licensed under Apache-2.0.
"""How numbers and names are written, the same in every kind of report."""
import math
import re
from typing import List, Optional

from .results import Metric
from .tables import PUBLISHED_ONLY, Cell, Row, Statistics, Table

MINUS = '\N{MINUS SIGN}'
NOTHING = '\N{EN DASH}'
PUBLISHED = 'published, not ours'
# With these a spreadsheet takes a text for a formula, and executes it.
FORMULA = ('=', '+', '-', '@', '\t', '\r')
COLOUR_CODES = re.compile(r'\x1b\[[0-9;]*[A-Za-z]')


def clean(text: object) -> str:
    """One line of printable characters, safe to look at.

    Line breaks would end a table's row, and control characters can make a
    text read as what it is not.

    Args:
        text (object): A name, a path or a setting.
    """
    return ''.join(x if x.isprintable() else ' ' for x in str(text)).strip()


def no_formula(name: str) -> str:
    """A text for a cell of a spreadsheet, which takes it for a text.

    Args:
        name (str): The text.
    """
    return f"'{name}" if name.startswith(FORMULA) else name


def last_lines(text: object, count: int = 12) -> List[str]:
    """The end of a log.

    Args:
        text (object): The log; no lines if it is not a text.
        count (int): Lines to keep. Defaults to 12.
    """
    lines = text.splitlines() if isinstance(text, str) else []
    # The dot keeps the indentation of a traceback.
    lines = [clean('.' + COLOUR_CODES.sub('', line))[1:] for line in lines]
    return [line for line in lines if line][-count:]


def heading(metric: Metric) -> str:
    """Name and unit of a metric."""
    name = clean(metric.name)
    return f'{name} ({clean(metric.unit)})' if metric.unit else name


def number(value: float, decimals: int, sign: bool = False) -> str:
    """A number with a real minus, or the word for one that is not finite.

    Args:
        value (float): The number.
        decimals (int): Digits after the point.
        sign (bool): Whether to write a plus. Defaults to False.
    """
    if not math.isfinite(value):
        return str(value)
    value = round(value, decimals) + 0.  # no negative zero
    return f'{value:{"+" if sign else ""}.{decimals}f}'.replace('-', MINUS)


def decimals(table: Table, metric: Metric) -> int:
    """Digits that a column deserves: two of its largest spread.

    Args:
        table (Table): The table.
        metric (Metric): The column.

    Returns:
        int: 1 to 3.
    """
    own = [row.cells[metric.key].own for row in table.rows]
    known = [x for x in own if x and math.isfinite(x.mean)]
    spread = max((x.std for x in known if x.std), default=0.)
    if not spread:
        spread = 1. if any(abs(x.mean) >= 1 for x in known) else 0.01
    return min(3, max(1, 1 - math.floor(math.log10(spread))))


def mean_std(own: Optional[Statistics], digits: int, row: Row) -> str:
    """A row's own number, or why there is none.

    Args:
        own (Statistics, optional): Of the cell.
        digits (int): Digits after the point.
        row (Row): Whose it is.
    """
    if own is None and row.status == PUBLISHED_ONLY:
        return NOTHING
    if own is None:
        return row.status if row.status != 'finished' else 'no common seed'
    text = number(own.mean, digits)
    return text if own.std is None else (
        f'{text} \N{PLUS-MINUS SIGN} {number(own.std, digits)}')


def difference(cell: Cell, digits: int) -> str:
    """Difference to the baseline with its spread.

    Args:
        cell (Cell): The cell.
        digits (int): Digits after the point.
    """
    if cell.difference is None:
        return NOTHING
    text = number(cell.difference.mean, digits, sign=True)
    if cell.difference.std is None:
        return text
    return f'{text} \N{PLUS-MINUS SIGN} {number(cell.difference.std, digits)}'


def interval(cell: Cell, digits: int, sign: bool = True) -> str:
    """The difference's confidence interval, '' where there is none.

    Args:
        cell (Cell): The cell.
        digits (int): Digits after the point.
        sign (bool): Whether to write a plus. Defaults to True.
    """
    if cell.difference is None or cell.difference.interval is None:
        return ''
    low, high = cell.difference.interval
    return f'{number(low, digits, sign)} to {number(high, digits, sign)}'


def sentence(table: Table) -> str:
    """What a table says about its main metric, in words.

    Args:
        table (Table): The table.
    """
    metric = table.task.metrics[0]
    digits = decimals(table, metric)
    unit = {'%': 'points', '': ''}.get(metric.unit, clean(metric.unit))
    # Least first, so that the sentence ends with the strongest.
    rows = sorted(
        (row for row in table.rows if row.cells[metric.key].difference),
        key=lambda row: row.cells[metric.key].difference.mean)
    parts = []
    for row in rows:
        cell = row.cells[metric.key]
        mean = cell.difference.mean
        amount = f'{number(abs(mean), digits)} {unit}'.strip()
        part = (f'{clean(row.name)} is {amount} '
                f'{"above" if mean >= 0 else "below"} '
                f'{clean(table.baseline)}')
        if interval(cell, digits):
            low, high = cell.difference.interval
            part += f' (95% interval {interval(cell, digits, False)}'
            part += ', which includes 0)' if low <= 0 <= high else ')'
        parts.append(part)
    where = f'On {clean(table.title)}, {clean(table.protocol)}'
    if not parts:
        return f'{where}: nothing to compare yet.'
    count = f'{len(table.seeds)} seed{"s" if len(table.seeds) != 1 else ""}'
    if not table.trained:
        count = 'One run each, of fixed weights'
    elif len(table.seeds) == 1:
        count += ', so the spread is not known'
    return f'{where}, by {clean(metric.name)}: {"; ".join(parts)}. {count}.'


def duration(seconds: float) -> str:
    """A time span in the two units that matter.

    Args:
        seconds (float): The time.
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours} h {minutes:02d} min'
    return f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'
