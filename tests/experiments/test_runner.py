"""The runner: what it writes, what it says, and that a run that was cut off goes on."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from hqdit.errors import NumericsError
from hqdit.experiments import runner
from hqdit.experiments.laboratory import Laboratory
from hqdit.experiments.runner import EXPERIMENTS, Entry, run_experiments
from hqdit.records.run_record import Column, RunRecord, Table
from hqdit.records.run_record_reader import read_run_records


@pytest.fixture
def experiments(monkeypatch):
    """Two experiments, the second of which fails until it is told not to."""
    state = {"computed": 0, "fails": False}

    def first(lab: Laboratory) -> RunRecord:
        def compute():
            state["computed"] += 1
            return {"db": 12.5}

        found = lab.cache.numbers({"what": "first", **lab.settings}, compute)
        table = Table("t", (Column("SQNR", "dB"),), ((found["db"],),))
        return RunRecord("first", "First", "Why?", ("Because.",), (table,), config={"own": 1})

    def second(lab: Laboratory) -> RunRecord:
        if state["fails"]:
            raise NumericsError("second: found a NaN, needed none. Fix: none")
        return RunRecord("second", "Second", "Whether?", ("Yes.",))

    for name, run in (("first", first), ("second", second)):
        module = ModuleType(f"hqdit.experiments.{name}_of_test")
        module.run = run
        monkeypatch.setitem(sys.modules, module.__name__, module)
    entries = {"first": Entry("first_of_test", 3), "second": Entry("second_of_test", 1)}
    monkeypatch.setattr(runner, "EXPERIMENTS", entries)
    return state


def test_records_hold_what_a_repetition_needs(tmp_path, experiments):
    told = []
    found = run_experiments(["first", "second"], tmp_path / "out", seed=4, is_quick=True, tell=told.append)
    assert [record.name for _, record in found] == ["first", "second"]
    read = {record.name: record for _, record in read_run_records(tmp_path / "out")}
    config = read["first"].config
    assert (config["seed"], config["quick"], config["full"], config["own"]) == (4, True, False, 1)
    assert config["results_from_cache"] is False
    assert read["first"].environment["torch"] and read["first"].environment["backend"]
    assert read["first"].seconds > 0
    assert told[0] == "first (1 of 2)" and told[1].startswith("second (2 of 2, about ")


def test_a_run_that_was_cut_off_goes_on(tmp_path, experiments):
    experiments["fails"] = True
    with pytest.raises(NumericsError):
        run_experiments(["first", "second"], tmp_path, tell=str)
    experiments["fails"] = False
    found = run_experiments(["first", "second"], tmp_path, tell=str)
    assert experiments["computed"] == 1
    assert found[0][1].config["results_from_cache"] is True


def test_the_record_on_disk_is_the_record_returned(tmp_path, experiments):
    ((folder, record),) = run_experiments(["first"], tmp_path, tell=str)
    assert json.loads((folder / "record.json").read_text()) == json.loads(json.dumps(record.to_json()))


def test_every_experiment_exists():
    assert list(EXPERIMENTS) == [
        "table-w4a4",
        "outliers",
        "formats",
        "calibration",
        "alpha",
        "beyond-dit",
        "hadamard-cost",
        "domains",
        "timesteps",
        "plus",
    ]
    assert all(callable(entry.load()) for entry in EXPERIMENTS.values())
