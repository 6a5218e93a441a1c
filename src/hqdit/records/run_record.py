"""The record of one run: tables, figures as data, pictures by file name, and what a repetition needs to know.

Records are written by experiments and analyses and drawn by the report; figures are kept as numbers, so that a page can
be drawn again without measuring again. `records.run_record_reader` reads them; docs/records.md describes the JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hqdit.errors import NumericsError, UsageError

RECORD_NAME = "record.json"
RECORD_VERSION = 1
MOST_DIGITS = 12
SCALES = ("linear", "log")
_ROUNDING = 1e-12  # relative; units are converted and numbers stored on the way
#: Of indented JSON; a text in it holds no line end, so that nothing inside a text is taken for a list.
_LIST_OF_NUMBERS = re.compile(r"\[\n((?:\s*(?:-?[0-9][-+.0-9eE]*|null),?\n)+)\s*\]")


@dataclass(frozen=True)
class Interval:
    """A number with its interval, `low` <= `value` <= `high` up to rounding, none of them NaN.

    Raises:
        UsageError: another order.
    """

    value: float
    low: float
    high: float

    def __post_init__(self) -> None:
        finite = [abs(number) for number in (self.value, self.low, self.high) if math.isfinite(number)]
        slack = _ROUNDING * max(finite, default=0.0)
        if not self.low - slack <= self.value <= self.high + slack:
            raise UsageError(
                f"interval: found {self.value} with bounds {self.low} and {self.high}, needed low <= value <= high. "
                "Fix: take both from the same numbers"
            )


#: What a cell of a table can hold; None is shown as "not measured".
Cell = str | int | float | Interval | None


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        title: its header, without the unit.
        unit: for example "dB"; empty for words and plain numbers.
        digits: decimals shown of floating point cells, 0 to 12.
        meaning: what the numbers are and which direction is better; shown beside the table. May be empty.
        interval: what the bounds of its intervals are.

    Raises:
        UsageError: another number of digits.
    """

    title: str
    unit: str = ""
    digits: int = 2
    meaning: str = ""
    interval: str = "95 % confidence interval"

    def __post_init__(self) -> None:
        if isinstance(self.digits, bool) or not isinstance(self.digits, int) or not 0 <= self.digits <= MOST_DIGITS:
            raise UsageError(
                f"column {self.title!r}: found {self.digits!r} digits, needed 0 to {MOST_DIGITS}. Fix: show fewer"
            )


@dataclass(frozen=True)
class Table:
    """Rows of cells; every row has one cell per column."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise UsageError(
                    f"table {self.title!r}: found a row of {len(row)} cells, needed {len(self.columns)}, one per "
                    "column. Fix: pass None for what was not measured"
                )


@dataclass(frozen=True)
class Series:
    """Points of one line, or bars of one colour; None where there is nothing, bounds empty where there are none."""

    name: str
    y: tuple[float | None, ...]
    x: tuple[float, ...] = ()
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        for bound in (self.low, self.high):
            _require_length(f"series {self.name!r}", "bounds", len(bound), len(self.y) if bound else 0)


@dataclass(frozen=True)
class Lines:
    """Lines over a number axis, which runs from right to left if all `x` descend, as time steps do.

    The labels name the unit; scales are "linear" or "log".
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    caption: str = ""
    x_scale: str = "linear"
    y_scale: str = "linear"

    def __post_init__(self) -> None:
        for series in self.series:
            _require_length(f"figure {self.title!r}, series {series.name!r}", "y", len(series.y), len(series.x))


@dataclass(frozen=True)
class Bars:
    """Groups of bars over categories; `series` have no x."""

    title: str
    categories: tuple[str, ...]
    y_label: str
    series: tuple[Series, ...]
    caption: str = ""

    def __post_init__(self) -> None:
        for series in self.series:
            where = f"figure {self.title!r}, series {series.name!r}"
            _require_length(where, "y", len(series.y), len(self.categories))


@dataclass(frozen=True)
class Histogram:
    """Densities between equal edges for all series: each has len(edges) - 1 numbers in `y`, and no x."""

    title: str
    x_label: str
    edges: tuple[float, ...]
    series: tuple[Series, ...]
    caption: str = ""
    y_scale: str = "log"

    def __post_init__(self) -> None:
        for series in self.series:
            where = f"figure {self.title!r}, series {series.name!r}"
            _require_length(where, "y", len(series.y), len(self.edges) - 1)


@dataclass(frozen=True)
class Heatmap:
    """A matrix of numbers (rows, columns) as colours; None is left blank. The labels of the axes may be empty."""

    title: str
    row_labels: tuple[str, ...]
    column_labels: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    value_label: str
    caption: str = ""
    x_label: str = ""
    y_label: str = ""

    def __post_init__(self) -> None:
        _require_length(f"figure {self.title!r}", "rows of values", len(self.values), len(self.row_labels))
        for label, row in zip(self.row_labels, self.values, strict=True):
            _require_length(f"figure {self.title!r}, row {label!r}", "values", len(row), len(self.column_labels))


@dataclass(frozen=True)
class FormatMap:
    """The format of every part of a network: rows of shares by format name, each row summing to 1.

    A layer with one format has one share of 1; with a format per output channel it has several. `y_label` says what
    the shares are parts of.
    """

    title: str
    row_labels: tuple[str, ...]
    shares: tuple[Mapping[str, float], ...]
    caption: str = ""
    y_label: str = "output channels (%)"

    def __post_init__(self) -> None:
        _require_length(f"figure {self.title!r}", "rows of shares", len(self.shares), len(self.row_labels))


@dataclass(frozen=True)
class ImageGrid:
    """A picture that lies beside the record: PNG, drawn at its own pixel size."""

    title: str
    file: str
    caption: str = ""


Figure = Lines | Bars | Histogram | Heatmap | FormatMap

#: Names of the kinds of figures in the JSON.
FIGURE_KINDS: dict[str, type[Any]] = {
    "lines": Lines,
    "bars": Bars,
    "histogram": Histogram,
    "heatmap": Heatmap,
    "format-map": FormatMap,
}


@dataclass(frozen=True)
class RunRecord:
    """Everything about one run.

    Attributes:
        name: of the experiment or analysis; also the folder's name and the section's anchor.
        title: in words.
        question: what the run was to find out.
        answers: what it found, in sentences that were made from its numbers.
        tables: in the order shown.
        figures: in the order shown.
        images: in the order shown, side by side.
        config: every setting that the numbers depend on, plain values.
        environment: machine, versions and commit.
        seconds: wall-clock time, what was taken from the cache not counted anew.
        notes: remarks on limits, one paragraph each.
        measurements: further numbers that a reader of the JSON may want; not shown.
    """

    name: str
    title: str
    question: str
    answers: tuple[str, ...]
    tables: tuple[Table, ...] = ()
    figures: tuple[Figure, ...] = ()
    images: tuple[ImageGrid, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    measurements: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinite numbers become the strings "inf" and "-inf".

        Raises:
            NumericsError: a NaN, which nothing that was measured can be.
        """
        values = {"record_version": RECORD_VERSION, **_plain(self, self.name)}
        kinds = {cls: kind for kind, cls in FIGURE_KINDS.items()}
        for figure, entry in zip(self.figures, values["figures"], strict=True):
            entry["kind"] = kinds[type(figure)]
        return values

    def to_text(self) -> str:
        """`to_json` as text: indented, lists of numbers in one line each."""
        return _LIST_OF_NUMBERS.sub(_in_one_line, json.dumps(self.to_json(), indent=1)) + "\n"


def _require_length(where: str, what: str, found: int, needed: int) -> None:
    if found != needed:
        raise UsageError(f"{where}: found {found} {what}, needed {needed}. Fix: pass None for what was not measured")


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON can hold it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name), where) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            raise NumericsError(
                f"record {where}: found a NaN, needed numbers. Fix: leave out (None) what could not be measured"
            )
        return "inf" if value > 0 else "-inf"
    return value


def _in_one_line(found: re.Match[str]) -> str:
    return "[" + " ".join(found.group(1).split()) + "]"
