"""`hqdit report` and `hqdit analyze` as a user calls them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import Hqdit, Models, tree

from hqdit.pipeline.manifest import MANIFEST_NAME
from hqdit.records.run_record import RECORD_NAME, Heatmap, RunRecord
from hqdit.records.run_record_reader import read_run_records

FEW = ("--steps", 8, "--quiet")


@pytest.fixture(scope="module")
def analyses(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the analyses of a float and of a quantized model."""
    from hqdit.cli.main import run

    root = tmp_path_factory.mktemp("analyses")
    float_model = ["analyze", models.pipeline, "--out", root / "float", *FEW]
    quantized = ["analyze", models.quantized_pipeline, "--against", models.pipeline, "--out", root / "quantized"]
    for command in (float_model, [*quantized, "--num", 6, *FEW]):
        assert run([str(argument) for argument in command]) == 0
    return root


def record_of(folder: Path) -> RunRecord:
    ((_, record),) = read_run_records(folder)
    return record


def test_a_float_model_is_explained_before_and_after_the_rotation(analyses: Path, models: Models) -> None:
    folder = analyses / "float"
    assert sorted(tree(folder)) == [MANIFEST_NAME, RECORD_NAME, "report.html"]
    record = record_of(folder)
    activations, weights = record.tables
    assert len(weights.rows) == 14 and len(activations.rows) == 10  # q, k and v share an input in both blocks
    assert activations.rows[1][0] == "transformer_blocks.0.attn1.to_q, to_k, to_v"
    assert {type(figure).__name__ for figure in record.figures} == {"Bars", "Histogram", "Lines", "FormatMap"}
    assert record.config["rotation"] == "full" and record.config["model"] == str(models.pipeline)
    assert record.environment["backend"] and record.seconds > 0
    assert len(record.measurements["activations"]) == 10
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(figure.title in page for figure in record.figures) and "<script" not in page


def test_a_quantized_model_is_compared_with_its_original(analyses: Path) -> None:
    folder = analyses / "quantized"
    assert sorted(tree(folder)) == [
        "difference.png",
        "float.png",
        MANIFEST_NAME,
        "quantized.png",
        RECORD_NAME,
        "report.html",
    ]
    record = record_of(folder)
    assert [type(figure).__name__ for figure in record.figures] == ["Bars", "Lines", "Heatmap", "FormatMap"]
    heat = record.figures[2]
    assert isinstance(heat, Heatmap)
    assert len(heat.row_labels) == 2 and len(heat.column_labels) == 8  # blocks and time steps
    assert [image.title for image in record.images] == ["float", "quantized", "difference"]
    assert len(record.tables[1].rows) == 14
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3


def test_an_analysis_says_what_it_found(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    outcome = hqdit("analyze", models.transformer, "--out", tmp_path / "a", "--steps", 8, "--rotation", "none")
    assert outcome.code == 0
    assert "largest channel maximum" in outcome.out and "report.html" in outcome.out
    record = record_of(tmp_path / "a")
    assert all(row[1] == row[2] for row in record.tables[0].rows)  # nothing is rotated


def test_records_become_one_page_again(hqdit: Hqdit, analyses: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report.html"
    outcome = hqdit("report", analyses, "--out", out)
    assert (outcome.code, outcome.err) == (0, "") and "2 runs" in outcome.out
    page = out.read_text(encoding="utf-8")
    assert page.count('<section class="run"') == 2 and page.count("data:image/png;base64,") == 3
    refused = hqdit("report", analyses, "--out", out)
    assert refused.code == 2 and "--overwrite" in refused.first_line
    assert hqdit("report", analyses / "quantized", analyses / "float", "--out", out, "--overwrite", "--quiet").code == 0
    again = out.read_text(encoding="utf-8")
    assert again != page and again.count('<section class="run"') == 2


@pytest.mark.parametrize(
    ("out", "words"),
    [("record.json", "ends in .html"), ("folder.html", "which is a folder"), ("file/report.html", "below the file")],
)
def test_only_a_page_is_ever_written(hqdit: Hqdit, analyses: Path, tmp_path: Path, out: str, words: str) -> None:
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("precious")
    before = tree(tmp_path)
    outcome = hqdit("report", analyses, "--out", tmp_path / out, "--overwrite")
    assert outcome.code == 2 and words in outcome.first_line and "Fix: " in outcome.first_line
    assert tree(tmp_path) == before


def test_a_broken_run_is_exit_code_3_and_one_line(hqdit: Hqdit, analyses: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(analyses / "quantized", tmp_path / "run"))
    (run / "float.png").unlink()
    older = Path(shutil.copytree(analyses / "float", tmp_path / "older"))
    values = json.loads((older / RECORD_NAME).read_text())
    (older / RECORD_NAME).write_text(json.dumps({**values, "record_version": 0}))
    for source, words in ((run, "float.png"), (older, "record version 0"), (tmp_path / "missing", "no record.json")):
        outcome = hqdit("report", source, "--out", tmp_path / "report.html")
        assert outcome.code == 3 and words in outcome.first_line and "Fix: " in outcome.first_line
        assert len(outcome.err.splitlines()) == 1
        assert not (tmp_path / "report.html").exists()


def test_wrong_pairs_leave_nothing(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    out = tmp_path / "a"
    for command, code, words in (
        ((models.quantized_pipeline,), 2, "--against: found none"),
        ((models.pipeline, "--against", models.pipeline), 2, "which is a float model"),
        ((models.quantized_pipeline, "--against", models.quantized_pipeline), 3, "already quantized"),
        ((models.pipeline, "--preset", "magic"), 2, "--preset"),
        ((models.pipeline, "--rotation", "block:35"), 2, "--rotation"),
        ((models.pipeline, "--num", 0), 2, "--num"),
        ((tmp_path / "missing",), 3, "no such file"),
    ):
        outcome = hqdit("analyze", *command, "--out", out, *FEW)
        assert outcome.code == code and words in outcome.first_line, outcome.err
        assert list(tmp_path.iterdir()) == []


def test_an_existing_analysis_is_replaced_only_on_request(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "precious").write_text("the only copy")
    refused = hqdit("analyze", models.transformer, "--out", tmp_path / "a", *FEW)
    assert refused.code == 2 and "--overwrite" in refused.first_line
    assert (tmp_path / "a" / "precious").exists()
    assert hqdit("analyze", models.transformer, "--out", tmp_path / "a", "--overwrite", *FEW).code == 0
    assert sorted(tree(tmp_path / "a")) == [MANIFEST_NAME, RECORD_NAME, "report.html"]
