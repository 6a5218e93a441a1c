"""The record of one run: tables, figures as data, pictures by file name, and what a repetition needs to know.

Records are written by experiments and analyses and drawn by the report; figures are kept as numbers, so that a page can
be drawn again without measuring again. docs/records.md describes the JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from hqdit.errors import CheckpointError, NumericsError, UsageError

RECORD_NAME = "record.json"
RECORD_VERSION = 1
MOST_DIGITS = 12
SCALES = ("linear", "log")
_ROUNDING = 1e-12  # relative; units are converted and numbers stored on the way
_DEEPEST = 50  # of nested values
_LONGEST_REASON = 200  # characters of a message's reason


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

_FIGURE_KINDS: dict[str, type[Any]] = {
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
        kinds = {cls: kind for kind, cls in _FIGURE_KINDS.items()}
        for figure, entry in zip(self.figures, values["figures"], strict=True):
            entry["kind"] = kinds[type(figure)]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any], where: str) -> RunRecord:
        """The inverse of `to_json`.

        Args:
            values: the JSON object.
            where: file name for messages.

        Raises:
            CheckpointError: another version, missing or unknown keys, values of another kind, or a NaN anywhere.
        """
        try:
            _refuse_nan(values)
            fields = dict(values)
            version = fields.pop("record_version", None)
            if version != RECORD_VERSION:
                raise ValueError(f"record version {version!r}")
            fields["tables"] = tuple(_table(entry) for entry in _list(fields["tables"]))
            fields["figures"] = tuple(_figure(entry) for entry in _list(fields["figures"]))
            fields["images"] = tuple(_image(entry) for entry in _list(fields["images"]))
            for key in ("answers", "notes"):
                fields[key] = _texts(fields[key])
            for key in ("name", "title", "question"):
                _string(fields[key])
            for key in ("config", "environment", "measurements"):
                fields[key] = dict(_object(fields[key]))
            fields["seconds"] = _finite(fields["seconds"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, UsageError) as error:
            reason = str(error)[:_LONGEST_REASON]
            raise CheckpointError(
                f"{where}: found a record that cannot be read ({reason if reason.isprintable() else ascii(reason)}), "
                f"needed one that hqdit reproduce or analyze of record version {RECORD_VERSION} wrote. Fix: run it "
                "again"
            ) from error


def read_run_records(path: Path) -> list[tuple[Path, RunRecord]]:
    """The records in a run's folder or in its direct subfolders, with the folder of each, sorted by folder name.

    Raises:
        CheckpointError: no such folder, no record in it, or a broken one.
    """
    own = [path] if (path / RECORD_NAME).is_file() else []
    folders = own or sorted(entry.parent for entry in path.glob(f"*/{RECORD_NAME}"))
    if not folders:
        raise CheckpointError(
            f"{path}: found no {RECORD_NAME} in it or in a folder of it, needed the output of hqdit reproduce or "
            "analyze. Fix: check the path"
        )
    records = []
    for folder in folders:
        file = folder / RECORD_NAME
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{file}: found no valid JSON ({error}), needed the record of a run. Fix: run it again"
            ) from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{file}: found no JSON object, needed the record of a run. Fix: run it again")
        records.append((folder, RunRecord.from_json(values, str(file))))
    return records


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


def _refuse_nan(values: Any) -> None:
    """Raise `ValueError` for a NaN in nested values, or for values too deep to be shown."""
    level = [values]
    for _ in range(_DEEPEST):
        if any(isinstance(value, float) and math.isnan(value) for value in level):
            raise ValueError("a NaN")
        members = [value.values() if isinstance(value, Mapping) else value for value in level if _is_nested(value)]
        level = [member for several in members for member in several]
    if level:
        raise ValueError(f"values nested more than {_DEEPEST} times")


def _is_nested(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple))


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is no list")
    return value


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is no object")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(_string, _list(value)))


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str) and value in ("inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _finite(value: Any) -> float:
    number = _number(value)
    if number is None or not math.isfinite(number):
        raise TypeError(f"{value!r} is no finite number")
    return number


def _numbers(values: Any) -> tuple[float | None, ...]:
    return tuple(map(_number, _list(values)))


def _cell(value: Any) -> Cell:
    if isinstance(value, dict):
        bounds = {key: _number(item) for key, item in value.items()}
        if None in bounds.values():
            raise TypeError(f"{value!r} is no interval")
        return Interval(**bounds)  # type: ignore[arg-type]
    if isinstance(value, str) and value not in ("inf", "-inf"):
        return value
    return value if isinstance(value, int) and not isinstance(value, bool) else _number(value)


def _table(entry: Any) -> Table:
    fields = dict(_object(entry))
    columns = tuple(map(_column, _list(fields.pop("columns"))))
    rows = tuple(tuple(map(_cell, _list(row))) for row in _list(fields.pop("rows")))
    return Table(columns=columns, rows=rows, **{key: _string(text) for key, text in fields.items()})


def _column(entry: Any) -> Column:
    fields: dict[str, Any] = {
        key: value if key == "digits" else _string(value) for key, value in _object(entry).items()
    }
    return Column(**fields)


def _image(entry: Any) -> ImageGrid:
    image = ImageGrid(**{key: _string(text) for key, text in _object(entry).items()})
    if not image.file.isprintable():
        raise ValueError(f"image file {image.file!r}")
    return image


def _series(entry: Any) -> Series:
    name, y, x, low, high = (_object(entry)[key] for key in ("name", "y", "x", "low", "high"))
    return Series(_string(name), _numbers(y), tuple(map(_finite, _list(x))), _numbers(low), _numbers(high))


def _edges(value: Any) -> tuple[float, ...]:
    edges = tuple(map(_finite, _list(value)))
    if any(left >= right for left, right in pairwise(edges)):
        raise ValueError("edges that do not ascend")
    return edges


def _share(value: Any) -> float:
    share = _finite(value)
    if share < 0:
        raise ValueError(f"a share of {share}")
    return share


#: How each field of a figure that is no text is read.
_READERS: dict[str, Callable[[Any], Any]] = {
    "series": lambda value: tuple(map(_series, _list(value))),
    "categories": _texts,
    "row_labels": _texts,
    "column_labels": _texts,
    "edges": _edges,
    "values": lambda value: tuple(map(_numbers, _list(value))),
    "shares": lambda value: tuple(
        {key: _share(share) for key, share in _object(shares).items()} for shares in _list(value)
    ),
}


def _figure(entry: Any) -> Figure:
    fields = dict(_object(entry))
    cls: Callable[..., Figure] = _FIGURE_KINDS[fields.pop("kind")]
    for key, value in fields.items():
        read: Callable[[Any], Any] = _READERS.get(key, _string)
        fields[key] = read(value)
        if key in _READERS and not fields[key]:
            raise ValueError(f"a figure without {key.replace('_', ' ')}")
        if key in ("x_scale", "y_scale") and value not in SCALES:
            raise ValueError(f"scale {value!r}")
    return cls(**fields)
