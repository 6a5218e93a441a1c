"""Records survive their JSON, and what is no record is refused in one line."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hqdit.errors import CheckpointError, NumericsError, UsageError
from hqdit.records.run_record import (
    RECORD_NAME,
    Bars,
    Column,
    FormatMap,
    Heatmap,
    Histogram,
    ImageGrid,
    Interval,
    Lines,
    RunRecord,
    Series,
    Table,
)
from hqdit.records.run_record_reader import read_run_records, run_record_from_json

POINTS = Series("s", (1.0, None, math.inf), (1.0, 2.0, 3.0), (0.0, None, 1.0), (2.0, None, 9.0))
RECORD = RunRecord(
    name="outliers",
    title="Outliers",
    question="Where?",
    answers=("There.",),
    tables=(
        Table(
            "t",
            (Column("a"), Column("b", "dB", 1, "higher")),
            (("x", 1.5), (3, None), ("inf?", Interval(1.0, -math.inf, math.inf)), ("y", math.inf)),
        ),
    ),
    figures=(
        Lines(
            "l", "x", "y", (Series("s", (1.0, None, math.inf), (1.0, 2.0, 3.0), (0.0, None, 1.0), (2.0, None, 9.0)),)
        ),
        Bars("b", ("p", "q"), "y", (Series("s", (1.0, 2.0)),)),
        Histogram("h", "x", (0.0, 1.0, 2.0), (Series("s", (0.5, 0.5)),)),
        Heatmap("m", ("r",), ("c", "d"), ((1.0, None),), "dB", x_label="x"),
        FormatMap("f", ("r",), ({"e2m1": 0.5, "e1m2": 0.5},)),
    ),
    images=(ImageGrid("i", "i.png", "c"),),
    config={"seed": 0},
    environment={"torch": "2"},
    seconds=1.5,
    notes=("n",),
    measurements={"raw": [1, 2.5, "x"]},
)


def stored(record: RunRecord = RECORD) -> dict[str, Any]:
    values = json.loads(json.dumps(record.to_json(), allow_nan=False))
    assert isinstance(values, dict)
    return values


def test_a_record_survives_its_json() -> None:
    assert run_record_from_json(stored(), "r") == RECORD


def test_a_nan_cannot_be_recorded() -> None:
    with pytest.raises(NumericsError, match="record outliers: found a NaN"):
        dataclasses.replace(RECORD, measurements={"deep": [{"x": math.nan}]}).to_json()


def deep(levels: int) -> list[Any]:
    return [deep(levels - 1)] if levels else []


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    values = stored()
    change(values)
    return values


@pytest.mark.parametrize(
    "values",
    [
        changed(lambda v: v.update(record_version=2)),
        changed(lambda v: v.pop("record_version")),
        changed(lambda v: v.pop("title")),
        changed(lambda v: v.update(colour="red")),
        changed(lambda v: v.update(seconds="long")),
        changed(lambda v: v.update(answers=[1])),
        changed(lambda v: v["figures"][0].update(kind="pie")),
        changed(lambda v: v["figures"][0]["series"][0].update(y=["one", 2, 3])),
        changed(lambda v: v["figures"][0]["series"][0].update(y=[1.0])),
        changed(lambda v: v["figures"][0]["series"][0].update(low=[1.0])),
        changed(lambda v: v["figures"][1].update(categories=["p"])),
        changed(lambda v: v["figures"][2].update(edges=[0.0, 1.0])),
        changed(lambda v: v["figures"][3].update(values=[])),
        changed(lambda v: v["figures"][3].update(column_labels=["c"])),
        changed(lambda v: v["figures"][4].update(row_labels=[])),
        changed(lambda v: v["tables"][0]["rows"].append(["x"])),
        changed(lambda v: v["tables"][0]["rows"][0].__setitem__(1, {"value": 1})),
        changed(lambda v: v["images"][0].update(file=None)),
        changed(lambda v: v["images"][0].update(file="a\0b")),
        changed(lambda v: v.update(seconds=math.nan)),
        changed(lambda v: v.update(seconds="12")),
        changed(lambda v: v.update(seconds="inf")),
        changed(lambda v: v.update(seconds=None)),
        changed(lambda v: v.update(answers="There.")),
        changed(lambda v: v.update(config=[["seed", 0]])),
        changed(lambda v: v.update({"new\nline": 0})),
        changed(lambda v: v.update(tables={"t": 0})),
        *(
            changed(lambda v, key=key, value=value: v["tables"][0]["columns"][1].update({key: value}))
            for key, value in {"title": 1, "unit": None, "meaning": ["x"], "interval": 95, "colour": "red"}.items()
        ),
        *(
            changed(lambda v, digits=digits: v["tables"][0]["columns"][1].update(digits=digits))
            for digits in (-1, 13, 10**9, 2.0, "2", True, None)
        ),
        changed(lambda v: v["tables"][0].update(title=None)),
        changed(lambda v: v["tables"][0].update(caption=3)),
        changed(lambda v: v["tables"][0].update(rows=["ab"])),
        changed(lambda v: v["tables"][0]["rows"][0].__setitem__(1, math.nan)),
        changed(lambda v: v["tables"][0]["rows"][0].__setitem__(1, True)),
        changed(lambda v: v["tables"][0]["rows"][0].__setitem__(1, [1])),
        changed(lambda v: v["tables"][0]["rows"][0].__setitem__(1, {"value": 3, "low": 1, "high": 2})),
        changed(lambda v: v["tables"][0]["rows"][0].__setitem__(1, {"value": 10**400, "low": 1, "high": 2})),
        *(
            changed(lambda v, place=place, key=key: v["figures"][place].update({key: 1}))
            for place in range(5)
            for key in ("title", "caption", *(["x_label"] if place in (0, 2) else []), *(["y_label"] * (place != 2)))
        ),
        changed(lambda v: v["figures"][0].update(x_scale="cubic")),
        changed(lambda v: v["figures"][2].update(y_scale=["log"])),
        changed(lambda v: v["figures"][3].update(value_label=1)),
        changed(lambda v: v["figures"][0].update(series=[])),
        changed(lambda v: v["figures"][0]["series"][0].update(x=[1.0, None, 2.0])),
        changed(lambda v: v["figures"][0]["series"][0].update(y=[1.0, math.nan, 2.0])),
        changed(lambda v: v["figures"][2].update(edges=[0.0, 0.0, 1.0])),
        changed(lambda v: v["figures"][4].update(shares=[{"e2m1": "half"}])),
        changed(lambda v: v["figures"][4].update(shares=[{"e2m1": -0.5}])),
        changed(lambda v: v.update(measurements={"deep": [{"x": math.nan}]})),
        changed(lambda v: v.update(environment={"deep": deep(60)})),
    ],
)
def test_what_is_no_record_is_refused_in_one_line(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"^here/record\.json: found .*needed .*Fix: ") as error:
        run_record_from_json(values, "here/record.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("column", [{}, {"unit": "dB"}])
def test_a_column_without_optional_keys_has_its_defaults(column: dict[str, Any]) -> None:
    values = changed(lambda v: v["tables"][0].update(columns=[{"title": "a"}, {"title": "b", **column}]))
    found = run_record_from_json(values, "r").tables[0].columns[1]
    assert found == Column("b", **column) and found.interval == "95 % confidence interval"


@pytest.mark.parametrize(
    ("value", "low", "high"), [(2.0, 0.0, 1.0), (-1.0, 0.0, 1.0), (0.5, 1.0, 0.0), (math.nan, 0.0, 1.0)]
)
def test_an_interval_holds_its_value(value: float, low: float, high: float) -> None:
    with pytest.raises(UsageError, match="interval: found .* needed low <= value <= high"):
        Interval(value, low, high)
    with pytest.raises(UsageError, match="interval"):
        Interval(1e300, 0.0, 1e299)


def test_an_interval_forgives_rounding_and_takes_infinite_ends() -> None:
    Interval(0.1 + 0.2, 0.0, 0.3)
    for ends in ((1.0, -math.inf, math.inf), (math.inf, math.inf, math.inf), (math.inf, 0.0, math.inf)):
        Interval(*ends)


@pytest.mark.parametrize("digits", [-1, 13, True])
def test_a_column_has_at_most_twelve_digits(digits: int) -> None:
    assert Column("a", digits=12).digits == 12
    with pytest.raises(UsageError, match="column 'a': found .* digits, needed 0 to 12"):
        Column("a", digits=digits)


def test_rows_and_series_must_fit_their_tables_and_figures() -> None:
    with pytest.raises(UsageError, match="table 't': found a row of 1 cells, needed 2"):
        Table("t", (Column("a"), Column("b")), (("x",),))
    with pytest.raises(UsageError, match="figure 'b', series 's': found 1 y, needed 2"):
        Bars("b", ("p", "q"), "y", (Series("s", (1.0,)),))


def write(folder: Path, record: RunRecord) -> Path:
    folder.mkdir(parents=True)
    (folder / RECORD_NAME).write_text(json.dumps(record.to_json()))
    return folder


def test_records_are_found_in_a_folder_and_in_its_subfolders(tmp_path: Path) -> None:
    second, first = (write(tmp_path / "runs" / name, dataclasses.replace(RECORD, name=name)) for name in ("b", "a"))
    assert [(folder, record.name) for folder, record in read_run_records(tmp_path / "runs")] == [
        (first, "a"),
        (second, "b"),
    ]
    assert [folder for folder, _ in read_run_records(second)] == [second]


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000], ids=["none", "list", "cut", "bytes", "deep"]
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / RECORD_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"record\.json: found no "):
        read_run_records(tmp_path)


def test_a_folder_without_records_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=r"found no record\.json"):
            read_run_records(path)


def test_the_text_has_a_line_for_each_list_of_numbers():
    """Also where a text looks like one: line ends in it are escaped."""
    answer = "found [\n 1,\n 2\n] dB"
    record = dataclasses.replace(RECORD, answers=(answer,), measurements={"x": [1, -2.5, None, 1e-30], "none": []})
    text = record.to_text()
    assert json.loads(text) == json.loads(json.dumps(record.to_json()))
    assert '"x": [1, -2.5, null, 1e-30]' in text
    assert text.endswith("}\n")
