"""Tables, pictures and facts as one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from hqdit.errors import UsageError
from hqdit.report.tables import DemoRow, columns, table_remarks, visible_text

_PNG_START = b"\x89PNG\r\n\x1a\n"
_MIME_TYPES = ("image/png", "image/svg+xml")


@dataclass(frozen=True)
class _Picture:
    title: str
    caption: str
    uri: str
    width: int = 0
    height: int = 0


def render_demo_report(
    rows: Sequence[DemoRow],
    grids: Sequence[tuple[str, str, bytes]],
    figures: Sequence[tuple[str, str, bytes, str]],
    facts: Mapping[str, str],
    extractor: str,
    notes: Sequence[str],
) -> str:
    """The demo's report: one HTML file with its images inside, without scripts and without requests to anywhere.

    All text is escaped; characters that cannot be printed are shown as escapes. Equal input gives equal text.

    Args:
        rows: the table, in the order shown; a rule is drawn where the model changes.
        grids: (title, caption, PNG) of the image grids, shown side by side at their own size where there is room.
        figures: (title, caption, bytes, MIME type "image/png" or "image/svg+xml"), shown one under the other.
        facts: what a repetition needs to know: machine, versions, seed, settings.
        extractor: name of the network behind the Fréchet distance.
        notes: remarks on this run, one paragraph each.

    Raises:
        UsageError: a grid that is not a PNG, a figure of another type, or an extractor without a name.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_finalized, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("hqdit.report").joinpath("template.html").read_text(encoding="utf-8"))
    table = columns(extractor)
    return template.render(
        columns=table,
        table=[[(column, column.cell(row)) for column in table] for row in rows],
        starts_model=[index > 0 and row.model != rows[index - 1].model for index, row in enumerate(rows)],
        remarks=table_remarks(rows, extractor),
        grids=[_grid(*grid) for grid in grids],
        figures=[_figure(*figure) for figure in figures],
        facts=facts,
        extractor=extractor,
        notes=notes,
    )


def _finalized(expression: object) -> object:
    """What every `{{ expression }}` of the template passes through before it is escaped."""
    return visible_text(expression) if isinstance(expression, str) else expression


def _grid(title: str, caption: str, png: bytes) -> _Picture:
    if not png.startswith(_PNG_START) or len(png) < 24:
        raise UsageError(f"image grid {visible_text(title)!r}: found bytes that are no PNG, needed a PNG")
    # The first chunk of a PNG holds its size, so that the page does not move while images load.
    width, height = struct.unpack(">II", png[16:24])
    return _Picture(title, caption, _data_uri(png, "image/png"), width, height)


def _figure(title: str, caption: str, content: bytes, mime: str) -> _Picture:
    if mime not in _MIME_TYPES:
        raise UsageError(
            f"figure {visible_text(title)!r}: found MIME type {visible_text(mime)!r}, needed {' or '.join(_MIME_TYPES)}"
        )
    return _Picture(title, caption, _data_uri(content, mime))


def _data_uri(content: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(content).decode('ascii')}"
