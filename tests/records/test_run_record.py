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
    read_run_records,
)

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
    assert RunRecord.from_json(stored(), "r") == RECORD


def test_a_nan_cannot_be_recorded() -> None:
    with pytest.raises(NumericsError, match="record outliers: found a NaN"):
        dataclasses.replace(RECORD, measurements={"deep": [{"x": math.nan}]}).to_json()


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
    ],
)
def test_what_is_no_record_is_refused_in_one_line(values: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"^here/record\.json: found .*needed .*Fix: ") as error:
        RunRecord.from_json(values, "here/record.json")
    assert "\n" not in str(error.value)


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
