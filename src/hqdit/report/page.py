"""Records as one HTML page that needs nothing else: no network, no script, no other file."""

from __future__ import annotations

import base64
import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from hqdit.errors import CheckpointError
from hqdit.pipeline.manifest import require_regular
from hqdit.records.run_record import Column, ImageGrid, Interval, RunRecord, Table
from hqdit.report.cells import EXACT, MISSING, cell_text, header_text, visible_text
from hqdit.report.charts import draw, is_wide

_PNG_START = b"\x89PNG\r\n\x1a\n"
_BYTES_OF_PNG_SIZE = slice(16, 24)


@dataclass(frozen=True)
class _Header:
    text: str
    is_text: bool


@dataclass(frozen=True)
class _ShownTable:
    title: str
    caption: str
    headers: tuple[_Header, ...]
    rows: tuple[tuple[str, ...], ...]
    starts_group: tuple[bool, ...]
    meanings: tuple[tuple[str, str], ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class _Picture:
    title: str
    caption: str
    uri: str
    is_wide: bool = False
    width: int = 0
    height: int = 0


@dataclass(frozen=True)
class _Section:
    anchor: str
    record: RunRecord
    tables: tuple[_ShownTable, ...]
    figures: tuple[_Picture, ...]
    images: tuple[_Picture, ...]
    settings: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]


def render_report(records: Sequence[tuple[Path, RunRecord]], title: str = "hqdit report") -> str:
    """One self-contained HTML page with a section for each record, in the order given.

    All text is escaped; characters that cannot be printed are shown as escapes. Charts are drawn from the records'
    numbers, images are read from the records' folders. Equal input gives equal text.

    Args:
        records: (folder, record), as `read_run_records` returns them.
        title: heading of the page.

    Raises:
        CheckpointError: an image that is missing, outside its record's folder, or no PNG.
        UsageError: a figure with nothing to draw.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_finalized, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("hqdit.report").joinpath("template.html").read_text(encoding="utf-8"))
    anchors = _anchors([record.name for _, record in records])
    sections = [_section(anchor, folder, record) for anchor, (folder, record) in zip(anchors, records, strict=True)]
    return template.render(title=title, sections=sections)


def _finalized(expression: object) -> object:
    """What every `{{ expression }}` of the template passes through before it is escaped."""
    return visible_text(expression) if isinstance(expression, str) else expression


def _anchors(names: Sequence[str]) -> list[str]:
    """Distinct words of letters, digits and hyphens that can stand in an address."""
    anchors: list[str] = []
    for name in names:
        word = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
        number = 1
        while (anchor := word if number == 1 else f"{word}-{number}") in anchors:
            number += 1
        anchors.append(anchor)
    return anchors


def _section(anchor: str, folder: Path, record: RunRecord) -> _Section:
    return _Section(
        anchor,
        record,
        tuple(map(_table, record.tables)),
        tuple(
            _Picture(figure.title, figure.caption, _data_uri(draw(figure), "image/svg+xml"), is_wide(figure))
            for figure in record.figures
        ),
        tuple(_image(folder, grid) for grid in record.images),
        _facts(record.config),
        _facts(record.environment),
    )


def _table(table: Table) -> _ShownTable:
    is_text = [
        any(isinstance(row[index], str) for row in table.rows) or index == 0 for index in range(len(table.columns))
    ]
    firsts = [row[0] for row in table.rows]
    has_groups = len(set(firsts)) < len(firsts)  # rows of one model, say, stand together
    rows = tuple(tuple(map(cell_text, row, table.columns)) for row in table.rows)
    signs = {text for row in rows for text in row}
    remarks = []
    if MISSING in signs:
        remarks.append(f"{MISSING}: not measured, or does not apply.")
    if EXACT in signs:
        remarks.append(f"{EXACT}: no difference from the original, an infinite ratio.")
    brackets = _brackets(table)
    if brackets:
        remarks.append(f"In brackets: {brackets}.")
    return _ShownTable(
        table.title,
        table.caption,
        tuple(_Header(header_text(column), kind) for column, kind in zip(table.columns, is_text, strict=True)),
        rows,
        tuple(has_groups and index > 0 and first != firsts[index - 1] for index, first in enumerate(firsts)),
        _meanings(table.columns),
        tuple(remarks),
    )


def _brackets(table: Table) -> str:
    """What the bounds of intervals are; with the headers where columns differ in it."""
    grouped: dict[str, list[str]] = {}
    for index, column in enumerate(table.columns):
        if any(isinstance(row[index], Interval) for row in table.rows):
            grouped.setdefault(column.interval, []).append(header_text(column))
    if len(grouped) < 2:
        return "".join(grouped)
    return "; ".join(f"{text} ({', '.join(headers)})" for text, headers in grouped.items())


def _meanings(columns: Sequence[Column]) -> tuple[tuple[str, str], ...]:
    """(headers, meaning) of the columns that have one; neighbours with one meaning are named together."""
    grouped: dict[str, list[str]] = {}
    for column in columns:
        if column.meaning:
            grouped.setdefault(column.meaning, []).append(header_text(column))
    return tuple((", ".join(headers), meaning) for meaning, headers in grouped.items())


def _image(folder: Path, grid: ImageGrid) -> _Picture:
    path = folder / grid.file
    where = visible_text(str(path))
    if not path.resolve().is_relative_to(folder.resolve()):
        raise CheckpointError(
            f"{where}: found an image outside its record's folder, needed one beside the record. Fix: run it again"
        )
    try:
        require_regular(path)
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{where}: found no image that can be read ({error.strerror}), needed the PNG that the record names. "
            "Fix: copy the whole folder, or run it again"
        ) from error
    if not content.startswith(_PNG_START) or len(content) < _BYTES_OF_PNG_SIZE.stop:
        raise CheckpointError(f"{where}: found bytes that are no PNG, needed a PNG. Fix: run it again")
    # The first chunk of a PNG holds its size, so that the page does not move while images load.
    width, height = struct.unpack(">II", content[_BYTES_OF_PNG_SIZE])
    return _Picture(grid.title, grid.caption, _data_uri(content, "image/png"), width=width, height=height)


def _data_uri(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"


def _facts(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Settings as words: snake case as spaces, nested values as JSON, what is unknown left out."""
    return tuple(
        (name.replace("_", " "), value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in values.items()
        if value is not None
    )
