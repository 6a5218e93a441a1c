"""How a cell, a header and any foreign text are shown, on a page as on a terminal."""

from __future__ import annotations

import math

from hqdit.records.run_record import Cell, Column, Interval

#: Stands for a number that was not measured or does not apply.
MISSING = "-"
#: Stands for an infinite SQNR.
EXACT = "exact"
DECIBEL = "dB"

# From here on a fixed number of decimals would make the columns wide and say nothing.
_FIXED_POINT_LIMIT = 1e6


def visible_text(text: str) -> str:
    r"""`text` with every character that cannot be printed (controls, ANSI escapes, direction marks) as `\x1b`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def header_text(column: Column) -> str:
    """The title with its unit, as in "Layer SQNR (dB)"."""
    return visible_text(f"{column.title} ({column.unit})" if column.unit else column.title)


def cell_text(cell: Cell, column: Column) -> str:
    """What is shown of a cell: numbers with the column's decimals, intervals as "12.3 [11.9, 12.8]"."""
    match cell:
        case None:
            return MISSING
        case str():
            return visible_text(cell)
        case Interval():
            low, high = (_number(bound, column) for bound in (cell.low, cell.high))
            return f"{_number(cell.value, column)} [{low}, {high}]"
        case int():
            return f"{cell:,}"
        case float():
            return _number(cell, column)


def _number(number: float, column: Column) -> str:
    if math.isinf(number) and column.unit == DECIBEL:
        return EXACT if number > 0 else f"{number}"
    return f"{number:.{column.digits}f}" if abs(number) < _FIXED_POINT_LIMIT else f"{number:.4g}"
