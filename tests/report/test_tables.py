"""Rows and tables: what a cell says, where it stands, and what may never be printed."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hqdit.errors import NumericsError, UsageError
from hqdit.report.cells import visible_text
from hqdit.report.tables import (
    TEXT_COLUMNS,
    DemoRow,
    columns,
    render_markdown_table,
    render_text_table,
    table_remarks,
)

EXTRACTOR = "digits-cnn-v1"
FLOAT = DemoRow("digits", "float32", None, 8012344, math.inf, math.inf, 0.992, 0.084, None)
MINMAX = DemoRow("digits, outliers c = 10", "minmax W4A4", 4.111, 1212344, -0.5, 5.234, 0.4125, 12.7714, 3.21)
HQDIT = DemoRow("digits, outliers c = 10", "hqdit W4A4", 4.22, 1233120, 16.0, None, 1.0, 0.655, 41.0)
ROWS = [FLOAT, MINMAX, HQDIT]


def cells(row: DemoRow) -> list[str]:
    return [column.cell(row) for column in columns(EXTRACTOR)]


def test_cells_round_and_mark_what_is_missing_or_exact() -> None:
    assert cells(FLOAT) == ["digits", "float32", "-", "8,012,344", "exact", "exact", "99.2", "0.084", "-"]
    assert cells(MINMAX)[2:] == ["4.11", "1,212,344", "-0.50", "5.23", "41.2", "12.771", "3.2"]
    assert cells(HQDIT)[2:] == ["4.22", "1,233,120", "16.00", "-", "100.0", "0.655", "41.0"]


def test_minus_infinity_is_not_exact() -> None:
    assert cells(dataclasses.replace(HQDIT, eps_sqnr_db=-math.inf))[5] == "-inf"


def test_every_measured_number_has_a_column_with_an_explanation() -> None:
    assert len(columns(EXTRACTOR)) == len(dataclasses.fields(DemoRow))
    assert all(len(column.column.meaning) > 40 for column in columns(EXTRACTOR))


@pytest.mark.parametrize("render", [render_text_table, render_markdown_table])
def test_the_distance_carries_its_extractor_and_is_never_plain_fid(render: object) -> None:
    assert callable(render)
    table = render(ROWS, EXTRACTOR)
    assert "FID" not in table
    assert EXTRACTOR in table.split("---")[0]  # in the header, above the rule
    assert "FID" not in "".join(column.title for column in columns(EXTRACTOR))
    assert [column.title for column in columns("other-v2")][7] == "Fréchet distance (other-v2)"


@pytest.mark.parametrize("render", [render_text_table, render_markdown_table])
@pytest.mark.parametrize("extractor", ["", " \t"])
def test_an_extractor_without_a_name_is_refused(render: object, extractor: str) -> None:
    assert callable(render)
    with pytest.raises(UsageError, match="extractor without a name"):
        render(ROWS, extractor)


def test_text_table_aligns_words_left_and_numbers_right() -> None:
    lines = render_text_table(ROWS, EXTRACTOR).splitlines()
    rule = next(index for index, line in enumerate(lines) if line.startswith("---"))
    spans, start = [], 0
    for dashes in lines[rule].split("  "):
        spans.append((start, start + len(dashes)))
        start += len(dashes) + 2
    for row, line in zip(ROWS, lines[rule + 1 :], strict=False):
        padded = line.ljust(spans[-1][1])
        parts = [padded[begin:end] for begin, end in spans]
        assert [part.strip() for part in parts] == cells(row)
        for part, column in zip(parts, columns(EXTRACTOR), strict=True):
            assert part == (part.strip().ljust(len(part)) if column.is_text else part.strip().rjust(len(part)))
    headers = [" ".join(line.ljust(spans[-1][1])[b:e].strip() for line in lines[:rule]).split() for b, e in spans]
    assert headers == [column.title.split() for column in columns(EXTRACTOR)]
    assert max(map(len, lines)) <= TEXT_COLUMNS


def test_text_table_explains_only_the_signs_that_occur() -> None:
    assert render_text_table(ROWS, EXTRACTOR).count("\n-: not measured") == 1
    assert [remark.split(":")[0] for remark in table_remarks(ROWS, EXTRACTOR)][1:] == ["-", "exact"]
    assert len(table_remarks([MINMAX], EXTRACTOR)) == 1
    assert "equal sample counts" in table_remarks([], EXTRACTOR)[0]


def test_long_names_wrap_and_lose_nothing() -> None:
    path = "/very/long/folder/" + "x" * 150
    lines = render_text_table([dataclasses.replace(HQDIT, model=path, method="m " * 40)], EXTRACTOR).splitlines()
    assert max(map(len, lines)) <= TEXT_COLUMNS
    rule = next(index for index, line in enumerate(lines) if line.startswith("---"))
    width = len(lines[rule].split("  ")[0])
    body = lines[rule + 1 : lines.index("", rule)]
    assert "".join(line[:width].strip() for line in body) == path
    assert sum(line[width:].split().count("m") for line in body) == 40


finite = st.floats(allow_nan=False, allow_infinity=False)
decibels = st.none() | st.floats(allow_nan=False)
positive = st.floats(min_value=0, allow_nan=False, allow_infinity=False)


@given(
    st.lists(
        st.builds(
            DemoRow,
            model=st.text(),
            method=st.text(),
            bits_per_weight=st.none() | positive,
            file_bytes=st.integers(0, 2**63 - 1),
            layer_sqnr_db=decibels,
            eps_sqnr_db=decibels,
            class_accuracy=st.floats(0, 1),
            frechet=positive,
            seconds=st.none() | positive,
        ),
        max_size=4,
    ),
    st.text(min_size=1).filter(str.strip),
)
def test_any_rows_fit_and_hold_only_printable_text(rows: list[DemoRow], extractor: str) -> None:
    lines = render_text_table(rows, extractor).split("\n")
    assert max(map(len, lines)) <= TEXT_COLUMNS
    assert all(line.isprintable() for line in lines)
    markdown = render_markdown_table(rows, extractor).split("\n")
    assert len(markdown) == len(rows) + 2
    assert all(line.isprintable() for line in markdown)
    assert all(json.loads(json.dumps(row.to_json(), allow_nan=False)) for row in rows)


def test_markdown_keeps_its_columns_whatever_a_name_holds() -> None:
    row = dataclasses.replace(HQDIT, model="a|b <script>*x*</script> \\ `c`", method="\x1b[31mred\nnext")
    lines = render_markdown_table([row, FLOAT], EXTRACTOR).splitlines()
    assert len(lines) == 4
    assert lines[1] == "| :--- | :--- |" + " ---: |" * 7
    assert "| a\\|b &lt;script&gt;\\*x\\*&lt;/script&gt; \\\\ \\`c\\` | \\\\x1b\\[31mred\\\\nnext |" in lines[2]
    assert lines[3] == "| digits | float32 | - | 8,012,344 | exact | exact | 99.2 | 0.084 | - |"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Fréchet 数", "Fréchet 数"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\u202eabc", "\\u202eabc"),
        ("\udc80", "\\udc80"),
    ],
)
def test_visible_text(text: str, shown: str) -> None:
    assert visible_text(text) == shown
    assert visible_text(shown) == shown


def test_json_names_every_attribute_and_keeps_numbers_exact() -> None:
    record = MINMAX.to_json()
    assert DemoRow(**record) == MINMAX  # type: ignore[arg-type]
    assert list(record) == [field.name for field in dataclasses.fields(DemoRow)]
    assert FLOAT.to_json()["eps_sqnr_db"] == "exact"
    assert FLOAT.to_json()["seconds"] is None
    assert dataclasses.replace(FLOAT, layer_sqnr_db=-math.inf).to_json()["layer_sqnr_db"] == "-inf"


@pytest.mark.parametrize("name", ["bits_per_weight", "layer_sqnr_db", "eps_sqnr_db", "class_accuracy", "frechet"])
def test_nan_is_no_result(name: str) -> None:
    with pytest.raises(NumericsError, match=f"row 'digits', 'float32': found {name} nan"):
        dataclasses.replace(FLOAT, **{name: math.nan})


@pytest.mark.parametrize("name", ["bits_per_weight", "class_accuracy", "frechet", "seconds"])
def test_only_an_sqnr_can_be_infinite(name: str) -> None:
    with pytest.raises(NumericsError, match=f"found {name} inf"):
        dataclasses.replace(FLOAT, **{name: math.inf})


@pytest.mark.parametrize("name", ["bits_per_weight", "file_bytes", "class_accuracy", "frechet", "seconds"])
def test_only_an_sqnr_can_be_negative(name: str) -> None:
    with pytest.raises(UsageError, match=f"found {name} -1, needed 0 or more"):
        dataclasses.replace(FLOAT, **{name: -1})


def test_a_percentage_is_no_share() -> None:
    with pytest.raises(UsageError, match="found class_accuracy 99.2, needed a share from 0 to 1"):
        dataclasses.replace(FLOAT, class_accuracy=99.2)
