"""The record of one run: tables, figures as data, pictures by file name, and what a repetition needs to know.

Records are written by experiments and analyses and drawn by the report; figures are kept as numbers, so that a page can
be drawn again without measuring again. docs/records.md describes the JSON.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hqdit.errors import CheckpointError, NumericsError, UsageError

RECORD_NAME = "record.json"
RECORD_VERSION = 1


@dataclass(frozen=True)
class Interval:
    """A number with its confidence interval, `low` <= `high`."""

    value: float
    low: float
    high: float


#: What a cell of a table can hold; None is shown as "not measured".
Cell = str | int | float | Interval | None


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        title: its header, without the unit.
        unit: for example "dB"; empty for words and plain numbers.
        digits: decimals shown of floating point cells.
        meaning: what the numbers are and which direction is better; shown beside the table. May be empty.
    """

    title: str
    unit: str = ""
    digits: int = 2
    meaning: str = ""


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

    A layer with one format has one share of 1; with a format per output channel it has several.
    """

    title: str
    row_labels: tuple[str, ...]
    shares: tuple[Mapping[str, float], ...]
    caption: str = ""

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
            CheckpointError: another version, missing or unknown keys, or values of another kind.
        """
        try:
            fields = dict(values)
            version = fields.pop("record_version", None)
            if version != RECORD_VERSION:
                raise ValueError(f"record version {version!r}")
            fields["tables"] = tuple(_table(entry) for entry in fields["tables"])
            fields["figures"] = tuple(_figure(entry) for entry in fields["figures"])
            fields["images"] = tuple(ImageGrid(**_strings(entry)) for entry in fields["images"])
            for key in ("answers", "notes"):
                fields[key] = tuple(map(_string, fields[key]))
            for key in ("name", "title", "question"):
                _string(fields[key])
            for key in ("config", "environment", "measurements"):
                fields[key] = dict(fields[key])
            fields["seconds"] = float(fields["seconds"])
            return cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError, UsageError) as error:
            raise CheckpointError(
                f"{where}: found a record that cannot be read ({error}), needed one that hqdit reproduce or analyze of "
                f"record version {RECORD_VERSION} wrote. Fix: run it again"
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


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _strings(entry: Mapping[str, Any]) -> dict[str, str]:
    return {key: _string(value) for key, value in entry.items()}


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if value in ("inf", "-inf"):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{value!r} is no number")
    return float(value)


def _numbers(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(map(_number, values))


def _cell(value: Any) -> Cell:
    if isinstance(value, dict):
        bounds = {key: _number(item) for key, item in value.items()}
        if None in bounds.values():
            raise TypeError(f"{value!r} is no interval")
        return Interval(**bounds)  # type: ignore[arg-type]
    if isinstance(value, str) and value not in ("inf", "-inf"):
        return value
    return value if isinstance(value, int) and not isinstance(value, bool) else _number(value)


def _table(entry: Mapping[str, Any]) -> Table:
    columns = tuple(Column(**column) for column in entry["columns"])
    rows = tuple(tuple(map(_cell, row)) for row in entry["rows"])
    return Table(**{**entry, "columns": columns, "rows": rows})


def _figure(entry: Mapping[str, Any]) -> Figure:
    fields = dict(entry)
    cls = _FIGURE_KINDS[fields.pop("kind")]
    if "series" in fields:
        fields["series"] = tuple(
            Series(
                _string(series["name"]),
                *(_numbers(series[key]) for key in ("y", "x", "low", "high")),
            )
            for series in fields["series"]
        )
    for key in ("categories", "row_labels", "column_labels"):
        if key in fields:
            fields[key] = tuple(map(_string, fields[key]))
    if "edges" in fields:
        fields["edges"] = _numbers(fields["edges"])
    if "values" in fields:
        fields["values"] = tuple(map(_numbers, fields["values"]))
    if "shares" in fields:
        fields["shares"] = tuple({key: float(share) for key, share in shares.items()} for shares in fields["shares"])
    figure: Figure = cls(**fields)
    return figure
