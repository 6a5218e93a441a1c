"""From JSON to the record of a run, strictly: whatever is not as `RunRecord.to_json` writes it is an error."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from hqdit.errors import CheckpointError, UsageError
from hqdit.records.run_record import (
    FIGURE_KINDS,
    RECORD_NAME,
    RECORD_VERSION,
    SCALES,
    Cell,
    Column,
    Figure,
    ImageGrid,
    Interval,
    RunRecord,
    Series,
    Table,
)

_DEEPEST = 50  # of nested values
_LONGEST_REASON = 200  # characters of a message's reason


def read_run_records(path: Path) -> list[tuple[Path, RunRecord]]:
    """The records in a run's folder or in its direct subfolders, with the folder of each, sorted by folder name.

    Raises:
        CheckpointError: no such folder, no record in it, or a broken one.
    """
    own = [path] if (path / RECORD_NAME).is_file() else []
    folders = own or sorted(entry.parent for entry in path.glob(f"*/{RECORD_NAME}") if entry.is_file())
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
        records.append((folder, run_record_from_json(values, str(file))))
    return records


def run_record_from_json(values: Mapping[str, Any], where: str) -> RunRecord:
    """The inverse of `RunRecord.to_json`.

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
        return RunRecord(**fields)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, UsageError) as error:
        reason = str(error)[:_LONGEST_REASON]
        raise CheckpointError(
            f"{where}: found a record that cannot be read ({reason if reason.isprintable() else ascii(reason)}), "
            f"needed one that hqdit reproduce or analyze of record version {RECORD_VERSION} wrote. Fix: run it "
            "again"
        ) from error


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
    cls: Callable[..., Figure] = FIGURE_KINDS[fields.pop("kind")]
    for key, value in fields.items():
        read: Callable[[Any], Any] = _READERS.get(key, _string)
        fields[key] = read(value)
        if key in _READERS and not fields[key]:
            raise ValueError(f"a figure without {key.replace('_', ' ')}")
        if key in ("x_scale", "y_scale") and value not in SCALES:
            raise ValueError(f"scale {value!r}")
    return cls(**fields)
