"""The demo's record: its table, figures and remarks, made from plain rows and results."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hqdit.errors import UsageError
from hqdit.records.run_record import Bars, ImageGrid, Lines, RunRecord
from hqdit.records.run_record_reader import run_record_from_json
from hqdit.report.cells import cell_text, header_text
from hqdit.report.demo import demo_record
from hqdit.report.tables import DemoRow, columns

EXTRACTOR = "digits-cnn-v1"
ROWS = [
    DemoRow("digits", "float32", 32.0, 8012344, None, None, 0.992, 0.084, None),
    DemoRow("digits", "minmax W4A4", 4.11, 1212344, 18.41, 16.23, 0.969, 0.412, 3.2),
    DemoRow("digits, c = 10", "hqdit W4A4", 4.22, 1233120, 16.07, math.inf, 0.961, 0.655, 42.3),
]
FLOAT: dict[str, Any] = {"method": "float32", "layer_sqnr_db": None, "eps_sqnr_db_by_timestep": []}
RESULTS = {
    "digits": [
        FLOAT,
        {"method": "minmax", "layer_sqnr_db": {"a": 1.0, "b": 2.0}, "eps_sqnr_db_by_timestep": [[980, 3.0], [20, 4.0]]},
        {"method": "hqdit", "layer_sqnr_db": {"b": 5.0, "c": 6.0}, "eps_sqnr_db_by_timestep": [[980, 7.0], [20, 8.0]]},
    ],
    "only float": [FLOAT],
}
IMAGES = [ImageGrid("digits: float32", "a.png")]


def record(extractor: str = EXTRACTOR) -> RunRecord:
    return demo_record(ROWS, RESULTS, IMAGES, extractor, {"seed": 0}, {"torch": "2"}, 1.5)


def test_the_page_has_the_table_of_the_terminal() -> None:
    (table,) = record().tables
    shown = [[cell_text(cell, column) for cell, column in zip(row, table.columns, strict=True)] for row in table.rows]
    assert shown == [[column.cell(row) for column in columns(EXTRACTOR)] for row in ROWS]
    assert [header_text(column) for column in table.columns] == [column.title for column in columns(EXTRACTOR)]
    assert all(column.meaning for column in table.columns)


def test_figures_hold_every_method_and_leave_gaps() -> None:
    bars, lines = record().figures
    assert isinstance(bars, Bars) and isinstance(lines, Lines)
    assert bars.categories == ("a", "b", "c")
    assert {series.name: series.y for series in bars.series} == {"minmax": (1.0, 2.0, None), "hqdit": (None, 5.0, 6.0)}
    assert {series.name: (series.x, series.y) for series in lines.series} == {
        "minmax": ((980.0, 20.0), (3.0, 4.0)),
        "hqdit": ((980.0, 20.0), (7.0, 8.0)),
    }


def test_answers_are_made_from_the_rows() -> None:
    first, second = record().answers
    assert first.startswith("digits, ") and "minmax W4A4 16.2 dB and 96.9 %" in first and "float32 99.2 %" in first
    assert second.startswith("digits, c = 10, ") and "hqdit W4A4 exact and 96.1 %" in second


def test_the_limits_are_named_with_the_extractor() -> None:
    notes = " ".join(record().notes)
    assert f"come from {EXTRACTOR}" in notes and "equal sample counts" in notes and "not with published FID" in notes
    with pytest.raises(UsageError, match="extractor without a name"):
        record(" ")


def test_the_record_survives_its_json() -> None:
    assert run_record_from_json(record().to_json(), "demo") == record()
