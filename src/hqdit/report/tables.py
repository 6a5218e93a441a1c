"""Rows of the demo's table, and the table as plain text and as markdown.

The columns are defined once, in `columns`; the demo's HTML page uses the same definition.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from hqdit.errors import NumericsError, UsageError
from hqdit.records.run_record import Cell, Column
from hqdit.report.cells import DECIBEL, EXACT, MISSING, cell_text, header_text, visible_text

#: A plain-text table is never wider than this many characters.
TEXT_COLUMNS = 120

_GAP = "  "
# A longer word in the header (an extractor's name) is broken; a text column is never narrower than the minimum.
_LONGEST_HEADER_WORD = 20
_NARROWEST_TEXT_COLUMN = 4

_MARKDOWN_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_MARKDOWN_SPECIAL = "\\`*_[]|~$"


@dataclass(frozen=True)
class DemoRow:
    """What was measured on one model with one method.

    Attributes:
        model: which model, for example "digits" or "digits, outliers c = 10".
        method: what was done to it, for example "float32", "minmax W4A4" or "hqdit W4A4".
        bits_per_weight: of the quantized weights, their scales included; None where it does not apply.
        file_bytes: size of the file that holds the model's tensors.
        layer_sqnr_db: mean over the quantized layers of each layer's SQNR; infinite if nothing differs from float32.
        eps_sqnr_db: SQNR of the guided noise prediction; infinite if nothing differs from float32.
        class_accuracy: share of the samples, 0 to 1, in which a classifier sees the class that was asked for.
        frechet: Fréchet distance between the features of the samples and of the held-out images.
        seconds: wall-clock time of the quantization, calibration included; None for a model that was not quantized.

    Raises:
        UsageError: for a negative size or time, or a share outside 0 to 1.
        NumericsError: for a NaN, or an infinity in anything but an SQNR.
    """

    model: str
    method: str
    bits_per_weight: float | None
    file_bytes: int
    layer_sqnr_db: float | None
    eps_sqnr_db: float | None
    class_accuracy: float
    frechet: float
    seconds: float | None

    def __post_init__(self) -> None:
        row = f"row {visible_text(self.model)!r}, {visible_text(self.method)!r}"
        for name in ("bits_per_weight", "file_bytes", "layer_sqnr_db", "eps_sqnr_db", "class_accuracy", "frechet"):
            self._require_number(row, name)
        self._require_number(row, "seconds")
        if self.class_accuracy > 1:
            raise UsageError(
                f"{row}: found class_accuracy {self.class_accuracy:g}, needed a share from 0 to 1."
                " Fix: divide a percentage by 100"
            )

    def _require_number(self, row: str, name: str) -> None:
        number: float | None = getattr(self, name)
        if number is None:
            return
        is_sqnr = name.endswith("_db")
        if math.isnan(number) or (math.isinf(number) and not is_sqnr):
            raise NumericsError(f"{row}: found {name} {number}, needed a number. Fix: leave out what was not measured")
        if number < 0 and not is_sqnr:
            raise UsageError(f"{row}: found {name} {number:g}, needed 0 or more. Fix: measure it again")

    def to_json(self) -> dict[str, str | float | None]:
        """The attributes by name, as JSON can hold them: an infinite SQNR becomes "exact" (or "-inf")."""
        record = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, entry in record.items():
            if isinstance(entry, float) and math.isinf(entry):
                record[name] = EXACT if entry > 0 else f"{entry}"
        return record


@dataclass(frozen=True)
class DemoColumn:
    """One column of the demo's table.

    Attributes:
        column: title, unit, decimals, and what the numbers are, in plain words.
        value: the cell of a row.
        is_text: whether the cells are words (aligned left, wrapped) and not numbers (aligned right, kept whole).
    """

    column: Column
    value: Callable[[DemoRow], Cell]
    is_text: bool = False

    @property
    def title(self) -> str:
        """The header, with the unit."""
        return header_text(self.column)

    def cell(self, row: DemoRow) -> str:
        """The text of a row's cell."""
        return cell_text(self.value(row), self.column)


def columns(extractor: str) -> tuple[DemoColumn, ...]:
    """The columns of the demo's table, left to right.

    Args:
        extractor: name of the network whose features the Fréchet distance compares; the header carries it.

    Raises:
        UsageError: `extractor` has no name: the number would pass for FID.
    """
    if not extractor.strip():
        raise UsageError(
            "table: found a feature extractor without a name, needed one, because distances on different features"
            " cannot be compared. Fix: pass the classifier's name, for example digits-cnn-v1"
        )
    extractor = visible_text(extractor)
    return (
        DemoColumn(
            Column(
                "Model",
                meaning="The trained model. An outlier variant computes the same function in float32, but some of its"
                " activation channels are c times larger, which makes it harder to quantize.",
            ),
            lambda row: row.model,
            is_text=True,
        ),
        DemoColumn(
            Column(
                "Method",
                meaning="How the model was quantized. W4A4 means 4-bit weights and 4-bit activations; float32 is the"
                " model as it was trained, the baseline of its rows.",
            ),
            lambda row: row.method,
            is_text=True,
        ),
        DemoColumn(
            Column(
                "Bits per weight",
                meaning="Storage per quantized weight, scales included. Layers that stay in floating point are not"
                " counted here; the file size counts them. Lower is smaller.",
            ),
            lambda row: row.bits_per_weight,
        ),
        DemoColumn(
            Column(
                "File size",
                "bytes",
                meaning="Size of the file that holds the model's tensors, with everything that was not quantized.",
            ),
            lambda row: row.file_bytes,
        ),
        DemoColumn(
            Column(
                "Layer SQNR",
                DECIBEL,
                meaning="Signal-to-quantization-noise ratio of the layer outputs, averaged over the quantized layers in"
                " dB. Higher is better: 10 dB more is a tenth of the error's power. A mean hides a single bad layer;"
                " a figure by layer shows it.",
            ),
            lambda row: row.layer_sqnr_db,
        ),
        DemoColumn(
            Column(
                "Noise prediction SQNR, guided",
                DECIBEL,
                meaning="The same ratio for what the sampler uses: the guided noise prediction, against the float32"
                " model's on the same inputs. Higher is better. It is measured step by step, so it does not show how"
                " errors add up over a whole trajectory.",
            ),
            lambda row: row.eps_sqnr_db,
        ),
        DemoColumn(
            Column(
                "Class accuracy",
                "%",
                1,
                "Share of the samples in which a separately trained classifier sees the class that was asked for."
                " Higher is better. The classifier itself errs now and then, and it can recognise an image that looks"
                " wrong to the eye.",
            ),
            lambda row: 100 * row.class_accuracy,
        ),
        DemoColumn(
            Column(
                f"Fréchet distance ({extractor})",
                "",
                3,
                f"Distance between Gaussians fitted to the {extractor} features of the samples and of held-out real"
                " images. Lower is better. It is not FID: the features come from a small surrogate network, not from"
                " Inception.",
            ),
            lambda row: row.frechet,
        ),
        DemoColumn(
            Column(
                "Quantization time",
                "s",
                1,
                "Wall-clock time to quantize the model on the machine named below, calibration included.",
            ),
            lambda row: row.seconds,
        ),
    )


def render_text_table(rows: Sequence[DemoRow], extractor: str) -> str:
    """An aligned plain-text table with a few explaining lines under it, at most `TEXT_COLUMNS` characters wide.

    Long words in the text columns are wrapped, never cut. There is no line break at the end.

    Raises:
        UsageError: `extractor` has no name.
    """
    table = columns(extractor)
    cells = [[column.cell(row) for column in table] for row in rows]
    widths = _widths(table, cells)
    lines = _text_row([column.title for column in table], table, widths, at_bottom=True)
    lines.append(_GAP.join("-" * width for width in widths))
    for line in cells:
        lines += _text_row(line, table, widths, at_bottom=False)
    lines.append("")
    for remark in table_remarks(rows, extractor):
        lines += _wrap(remark, TEXT_COLUMNS)
    return "\n".join(lines)


def render_markdown_table(rows: Sequence[DemoRow], extractor: str) -> str:
    """The table in GitHub's markdown, one line a row, without a line break at the end.

    Raises:
        UsageError: `extractor` has no name.
    """
    table = columns(extractor)
    lines = [
        [_markdown(column.title) for column in table],
        [":---" if column.is_text else "---:" for column in table],
        *([_markdown(column.cell(row)) for column in table] for row in rows),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_remarks(rows: Sequence[DemoRow], extractor: str) -> list[str]:
    """What a reader of the bare table must know: the limits of the distance, and the signs that occur in `rows`."""
    remarks = [
        f"Fréchet distance ({visible_text(extractor)}): on surrogate features, not Inception's; compare it only within"
        " this table and at equal sample counts."
    ]
    cells = {column.cell(row) for row in rows for column in columns(extractor) if not column.is_text}
    if MISSING in cells:
        remarks.append(f"{MISSING}: not measured, or does not apply.")
    if EXACT in cells:
        remarks.append(f"{EXACT}: no difference from float32, an infinite ratio.")
    return remarks


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_on_hyphens=False) or [""]


def _widths(table: Sequence[DemoColumn], cells: Sequence[Sequence[str]]) -> list[int]:
    """Numbers get what they need; the text columns share the rest, none more than it needs."""
    widths = []
    for index, column in enumerate(table):
        longest_word = min(max(map(len, column.title.split())), _LONGEST_HEADER_WORD)
        widths.append(max([longest_word, *(len(line[index]) for line in cells)]))
    texts = [index for index, column in enumerate(table) if column.is_text]
    numbers = sum(width for index, width in enumerate(widths) if index not in texts)
    left = TEXT_COLUMNS - numbers - len(_GAP) * (len(widths) - 1)
    for done, index in enumerate(sorted(texts, key=widths.__getitem__)):
        share = max(left // (len(texts) - done), _NARROWEST_TEXT_COLUMN)
        widths[index] = min(widths[index], share)
        left -= widths[index]
    return widths


def _text_row(cells: Sequence[str], table: Sequence[DemoColumn], widths: Sequence[int], at_bottom: bool) -> list[str]:
    """One row of the table, as many lines high as its highest cell."""
    wrapped = [_wrap(cell, width) for cell, width in zip(cells, widths, strict=True)]
    height = max(map(len, wrapped))
    lines = []
    for line in range(height):
        parts = []
        for column, cell, width in zip(table, wrapped, widths, strict=True):
            number = line - (height - len(cell)) if at_bottom else line
            part = cell[number] if 0 <= number < len(cell) else ""
            parts.append(part.ljust(width) if column.is_text else part.rjust(width))
        lines.append(_GAP.join(parts).rstrip())
    return lines


def _markdown(text: str) -> str:
    escaped = (f"\\{c}" if c in _MARKDOWN_SPECIAL else _MARKDOWN_ENTITIES.get(c, c) for c in text)
    return "".join(escaped)
