"""Names of classes: where they are found, in which forms, and how they choose classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import ddim, edit_json, require_complete, save_pipeline, tiny_dit

from hqdit.errors import CheckpointError, HQDiTError, UsageError
from hqdit.models.class_names import choose_classes, class_names, read_class_names
from hqdit.models.source import find_model

NAMES = {0: "tench, Tinca tinca", 1: "golden retriever", 2: "crane", 3: "Crane", 4: "maillot, maillot", 5: "a, crane"}


def refused(call: Callable[[], object], *parts: str, error: type[HQDiTError] = CheckpointError) -> None:
    with pytest.raises(error) as info:
        call()
    require_complete(info.value, *parts)
    assert len(str(info.value)) < 700


# --- choosing


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("3", [3]),
        ("0,1,2", [0, 1, 2]),
        (" 7 , -1,+2", [7, -1, 2]),
        ("golden retriever,3", [1, 3]),
        ("Golden Retriever, TENCH", [1, 0]),
        ("tinca tinca", [0]),
        ("maillot", [4]),
        ("a,a,1", [5, 5, 1]),
        ("1" + "0" * 30, [10**30]),
    ],
)
def test_numbers_and_names(text: str, classes: list[int]) -> None:
    assert choose_classes(text, NAMES) == classes


def test_a_name_that_is_a_number_does_not_hide_the_class() -> None:
    assert choose_classes("1", {0: "1", 1: "0"}) == [1]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("golden retreiver", ("'golden retreiver'", "is it 'golden retriever'")),
        ("1,gold", ("'gold' in '1,gold'",)),
        ("", ("''",)),
        ("1,,2", ("'' in '1,,2'",)),
        ("1.5", ("'1.5'",)),
        ("--1", ("'--1'",)),
        ("-", ("'-'",)),
        ("²", ("'²'",)),
        ("crane", ("2, 3, 5", "by its number", "--classes 2")),
        ("0,CRANE", ("'CRANE' in '0,CRANE'", "2, 3, 5")),
    ],
)
def test_entries_that_are_neither(text: str, parts: tuple[str, ...]) -> None:
    refused(lambda: choose_classes(text, NAMES), "--classes", *parts, error=UsageError)


def test_a_model_without_names() -> None:
    assert choose_classes("4,2", {}) == [4, 2]
    refused(lambda: choose_classes("4,tench", {}), "'tench' in '4,tench'", "no names of classes", error=UsageError)


# --- where a pipeline keeps them


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return save_pipeline(tmp_path / "pipe", tiny_dit(), ddim())


def test_names_of_a_pipeline(pipeline: Path) -> None:
    assert class_names(find_model(pipeline)) == {}
    edit_json(pipeline / "model_index.json", id2label={"10": "ten", "2": " two, pair "})
    assert class_names(find_model(pipeline)) == {10: "ten", 2: "two, pair"}
    edit_json(pipeline / "model_index.json", id2label=None)
    assert class_names(find_model(pipeline)) == {}
    assert class_names(find_model(pipeline / "transformer")) == {}
    (pipeline / "model_index.json").unlink()
    assert class_names(find_model(pipeline)) == {}


@pytest.mark.parametrize(
    "labels",
    [["a"], "a", 3, {"one": "a"}, {"-1": "a"}, {"0": 1}, {"0": ""}, {"0": " "}, {"0": None}, {"0": ["a"]}],
    ids=str,
)
def test_entries_that_are_no_names(pipeline: Path, labels: Any) -> None:
    edit_json(pipeline / "model_index.json", id2label=labels)
    refused(lambda: class_names(find_model(pipeline)), "model_index.json")


# --- files


@pytest.mark.parametrize(
    "text",
    [
        "tench, Tinca tinca\ncafé\ncrane",
        "tench, Tinca tinca\r\ncafé\r\ncrane\r\n",
        json.dumps(["tench, Tinca tinca", "café", "crane"]),
        json.dumps({"0": "tench, Tinca tinca", "2": "crane", "1": "café"}, ensure_ascii=False),
        "\n" + json.dumps({"model_type": "vit", "id2label": {"0": "tench, Tinca tinca", "1": "café", "2": "crane"}}),
    ],
    ids=["lines", "crlf", "list", "object", "config"],
)
def test_forms_of_a_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "names").write_bytes(text.encode())
    assert read_class_names(tmp_path / "names", 3) == {0: "tench, Tinca tinca", 1: "café", 2: "crane"}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"a\nb", "names of 2 classes"),
        (b"a\nb\nc\nd", "names of 4 classes"),
        (b"a\n\nc", "the class 1 with the name ''"),
        (b"", "names of 0 classes"),
        (b'["a", "b", 3]', "the class 2 with the name 3"),
        (b'{"0": "a", "1": "b", "3": "d"}', "0 to 2"),
        (b'{"id2label": 5}', "a int"),
        (b'{"a": ', "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
    ],
    ids=["few", "many", "empty line", "empty", "number", "gap", "no labels", "no JSON", "deep", "no UTF-8"],
)
def test_other_files(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "names").write_bytes(content)
    refused(lambda: read_class_names(tmp_path / "names", 3), "names", part)


def test_no_file(tmp_path: Path) -> None:
    refused(lambda: read_class_names(tmp_path / "names", 3), "no such file", "--class-names")
    refused(lambda: read_class_names(tmp_path, 3), "no such file")
