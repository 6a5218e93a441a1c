"""`hqdit reproduce` from the command line: what it writes and prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

from hqdit.cli.main import run
from hqdit.experiments import runner
from hqdit.records.run_record import RECORD_NAME, Column, RunRecord, Series, Table
from hqdit.records.run_record import Lines as LineFigure
from hqdit.records.run_record_reader import read_run_records


@pytest.fixture
def one_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    def experiment(_lab: object) -> RunRecord:
        figure = LineFigure("Error", "step", "SQNR (dB)", (Series("hqdit", (1.0, 2.0), (0.0, 1.0)),))
        table = Table("Numbers", (Column("SQNR", "dB"),), ((12.5,),))
        return RunRecord("alpha", "Alpha <b>", "Does it matter?", ("It does not.",), (table,), (figure,))

    module = ModuleType("hqdit.experiments.of_test")
    module.run = experiment  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
    monkeypatch.setattr(runner, "EXPERIMENTS", {"alpha": runner.Entry("of_test", 1)})


@pytest.mark.usefixtures("one_experiment")
def test_record_figures_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "reproduced"
    assert run(["reproduce", "all", "--quick", "--out", str(out), "--seed", "3"]) == 0
    ((folder, record),) = read_run_records(out)
    assert folder == out / "alpha" and record.config["seed"] == 3 and record.config["quick"] is True
    assert (folder / "figure-1.svg").read_text().lstrip().startswith("<?xml")
    page = (out / "report.html").read_text()
    assert "It does not." in page and "Alpha &lt;b&gt;" in page and "Alpha <b>" not in page
    printed = capsys.readouterr().out
    assert "alpha (1 of 1)" in printed and "It does not." in printed and "report.html" in printed


@pytest.mark.usefixtures("one_experiment")
def test_a_partial_run_keeps_the_other_records_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # "zeta" comes before "alpha" in the list, and "other" is no experiment.
    entry = runner.EXPERIMENTS["alpha"]
    monkeypatch.setattr(runner, "EXPERIMENTS", {"zeta": entry, "alpha": entry})
    for name in ("zeta", "other", "alpha"):
        (tmp_path / name).mkdir()
        earlier = RunRecord(name, f"Earlier {name}", "?", ())
        (tmp_path / name / RECORD_NAME).write_text(json.dumps(earlier.to_json()))
    assert run(["reproduce", "alpha", "--out", str(tmp_path), "--quiet"]) == 0
    page = (tmp_path / "report.html").read_text()
    places = [page.index(f"<h2>{title}") for title in ("Earlier zeta", "Alpha &lt;b&gt;", "Earlier other")]
    assert places == sorted(places) and "Earlier alpha" not in page


@pytest.mark.usefixtures("one_experiment")
def test_a_broken_earlier_record_is_named_before_anything_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zeta").mkdir()
    (tmp_path / "zeta" / RECORD_NAME).write_text("{")
    assert run(["reproduce", "alpha", "--out", str(tmp_path)]) == 3
    message = capsys.readouterr().err
    assert "zeta" in message and message.count("\n") == 1 and not (tmp_path / "alpha").exists()


@pytest.mark.usefixtures("one_experiment")
def test_quiet_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["reproduce", "alpha", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["beta"], "'beta'"),
        (["all", "--quick", "--full"], "--full"),
        (["all", "--seed", "-1"], "--seed"),
        ([], "NAME"),
    ],
)
def test_misuse_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    out = tmp_path / "out"
    assert run(["reproduce", *arguments, "--out", str(out)]) == 2
    message = capsys.readouterr().err
    assert named in message and message.count("\n") == 1 and not out.exists()


def test_a_file_at_out_is_refused_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    assert run(["reproduce", "alpha", "--out", str(out)]) == 2
    assert "--out: found" in capsys.readouterr().err and out.read_text() == "mine"
