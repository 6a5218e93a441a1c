"""The comparison with other libraries: its arithmetic, what it does without them, and its committed record."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from hqdit.experiments.subjects import SUBJECTS
from hqdit.pipeline.config import PRESETS
from hqdit.records.run_record import Interval
from hqdit.records.run_record_reader import read_run_records, run_record_from_json

ROOT = Path(__file__).parents[2]

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")
    import peer_accuracy
    from peer_record import Found, Row, answers, input_bits, psnr_cell, record, result_table, text_table, weighted_mean

CLASSES = [0, 1, 0, 1]


def row(name: str, error: float, weight_bits: float, input_bits: float = 8.25, code_bits: float = 4) -> Row:
    """A method whose error has the power `error` on each of three trajectories, where the signal has 100."""
    db = 10 * math.log10(100 / error)
    branches = ("conditional", "unconditional", "guided 1.5", "guided 4")
    powers = {branch: [error] * 3 for branch in branches}
    sqnr = {branch: (db, db - 1, db + 1) for branch in branches}
    return Row(name, weight_bits, input_bits, code_bits, sqnr, [20.0, 21.0, 22.0, 23.0], powers)


def found() -> Found:
    return Found(
        "toy",
        CLASSES,
        7,
        presets=[row("ours", 1.0, 4.25, 4.1)],
        peers=[
            row("small", 2.0, 5.0),
            row("worse", 4.0, 4.5),
            row("with a branch", 0.1, 20.0),
            row("floats", 0.01, 4.5, input_bits=32.0),
            row("8 bits", 0.01, 8.25, code_bits=8),
        ],
        failures={"broken": "needed a GPU"},
        said={"small": {"float_layers": ["a", "b"], "float_inputs": {"64": 1, "16": 3}}},
    )


def test_bits_are_weighted_by_what_they_are_bits_of():
    assert weighted_mean({"a": 4.0, "b": 32.0}, {"a": 3, "b": 1, "c": 9}) == pytest.approx(11.0)


def test_a_linear_layer_reads_floats_whatever_its_library_says():
    said = {"input_bits": 8, "input_extra_bits": 40}
    assert input_bits(said, 160, 38.0) == 8.25
    assert input_bits(said, 160, 118.0) == input_bits(said, 160, math.inf) == 32
    assert input_bits(None, 160, 38.0) == 32


def test_probes_of_a_linear_layer_agree_and_those_of_a_rounding_one_do_not():
    x, y, z = torch.randn(3, 64, 16, generator=torch.Generator().manual_seed(0))
    probes = {}
    summed = torch.ones(16, 4)
    for name, layer in (("linear", lambda v: v @ summed + 3), ("rounds", lambda v: v.round() @ summed)):
        probes[f"block.{name}/64/first"] = layer(x + y) - layer(x)
        probes[f"block.{name}/64/second"] = layer(y + z) - layer(z)
    db = peer_accuracy.linearity_db(probes)["64"]
    assert db["block.linear"] > 100 and db["block.rounds"] < 30


def test_answers_name_the_best_peers_of_the_kind_and_nothing_finer():
    (sentence,) = answers(found())
    assert "ours (4.2 bits per weight, 4.1 per input) is better than small" in sentence
    assert "by +3.01 dB [+3.01, +3.01]" in sentence  # twice the error
    assert "worse than with a branch (20.0 bits" in sentence and "by -10.00 dB" in sentence
    assert not any(name in sentence for name in ("worse (", "floats", "8 bits ("))
    assert answers(Found("toy", CLASSES, 7)) == ["toy: no peer with 4-bit weights and quantized inputs ran."]


def test_images_that_are_equal_leave_no_mean():
    assert psnr_cell([math.inf] * 4, CLASSES) == math.inf
    assert psnr_cell([math.inf, 20.0, 20.0, 20.0], CLASSES) == "1 of 4 exact"
    cell = psnr_cell([20.0, 21.0, 22.0, 23.0], CLASSES)
    assert isinstance(cell, Interval) and cell.value == 21.5


def test_the_record_holds_every_method_and_every_failure():
    options = {"small": {"library": "sdnq", "group_size": 32}, "broken": {"library": "torchao"}}
    made = record([found()], options, {"seed": 0}, {}, 1.0)
    assert run_record_from_json(made.to_json(), "here") == made
    assert [line[0] for line in made.tables[0].rows] == ["ours", "small", "worse", "with a branch", "floats", "8 bits"]
    assert made.tables[-2].rows == (
        ("small", "sdnq", "group_size 32", 5, 1, 3),
        ("broken", "torchao", "", None, None, None),
    )
    assert made.tables[-1].rows == (("broken", "toy", "needed a GPU"),)
    assert "small left 2 of 7 layers of toy in float: a, b." in made.notes
    shown = text_table(result_table(found())).splitlines()
    assert shown[0] == "Accuracy, toy" and "Bits per weight" in shown[1] and "20.00 [19.00, 21.00]" in shown[2]


def test_presets_are_measured_and_peers_recorded_as_absent(lab, tiny_subject, tmp_path, monkeypatch):
    monkeypatch.setattr(peer_accuracy, "PEERS_PYTHON", tmp_path / "nowhere")
    monkeypatch.setattr(peer_accuracy, "IMAGES", 20)
    comparison = peer_accuracy.Comparison(lab, [tiny_subject], tmp_path)
    comparison.measure_ours(["minmax"])
    for peer in (peer_accuracy.CONTROL, peer_accuracy.PEERS[1]):
        comparison.measure_peer(peer)
    measured = comparison.found[tiny_subject]
    assert set(measured.failures) == {peer_accuracy.CONTROL.name, peer_accuracy.PEERS[1].name}
    assert all("Fix: make bench-peers" in error for error in measured.failures.values())
    exact, floor = measured.references
    (minmax,) = measured.presets
    assert exact.eps_sqnr_db["conditional"][0] == math.inf
    assert floor.eps_sqnr_db["conditional"][0] < minmax.eps_sqnr_db["conditional"][0] < 40
    # Codes of 4 bits and a float32 scale for a vector of 72 or 288 numbers: both of its branches agree with the table.
    assert 4 + 32 / 288 < minmax.input_bits < 4 + 32 / 72
    expected = lab.score(tiny_subject, PRESETS["minmax"])
    assert np.allclose(minmax.eps_sqnr_db["guided 1.5"], expected["eps_sqnr_db"]["guided 1.5"], rtol=0, atol=1e-9)


def test_peers_have_names_of_their_own():
    names = [peer.name for peer in peer_accuracy.PEERS]
    assert len(set(names)) == len(names)


def test_the_committed_record_has_every_peer_on_its_models():
    ((_, committed),) = read_run_records(ROOT / "docs" / "records" / "peer_accuracy")
    peers = next(table for table in committed.tables if table.title == "What the peers did")
    wanted = {*committed.config["presets"], *(line[0] for line in peers.rows)}
    failed = [line for table in committed.tables if table.title == "Peers that did not run" for line in table.rows]
    results = [table for table in committed.tables if table.title.startswith("Accuracy, ")]
    titles = [table.title for table in results]
    assert titles and titles == [t for t in (f"Accuracy, {subject.name}" for subject in SUBJECTS) if t in titles]
    for table in results:
        model = table.title.removeprefix("Accuracy, ")
        assert wanted <= {line[0] for line in (*table.rows, *(line for line in failed if line[1] == model))}
