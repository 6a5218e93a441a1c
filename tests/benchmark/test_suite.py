"""The benchmark: what its record promises, on a model small enough for a test. Nothing here looks at a speed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hqdit.benchmark import suite, workload
from hqdit.benchmark.contenders import Contender
from hqdit.benchmark.products import interleaved, measure_product
from hqdit.errors import EnvironmentUnavailable
from hqdit.report.benchmark import benchmark_tables, forward_markdown

REPEATS = 2
SMALL = {"num_attention_heads": 2, "attention_head_dim": 64, "sample_size": 8, "num_layers": 2}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "DIT_XL_2", workload.DIT_XL_2 | SMALL)
        patch.setattr(suite, "SHAPES", ((5, 32, 48), (2, 32, 48)))
        patch.setattr(suite, "TOKENS", {16: 8})
        patch.setattr(suite, "TOKENS_BLOCKS", 1)
        patch.setattr(suite, "COMPILED", ())
        patch.setattr(suite, "PEERS_PYTHON", Path("nowhere"))
        told: list[str] = []
        result = suite.run_benchmark(tmp_path_factory.mktemp("bench"), REPEATS, 1, 2, told.append)
    torch.set_num_threads(threads)
    assert "forward passes" in told
    return result


def test_record_is_json_and_holds_every_repeat(record: dict[str, Any]) -> None:
    json.dumps(record, allow_nan=False)
    for entry in record["product"]:
        assert {name: len(values) for name, values in entry["seconds"].items()} == dict.fromkeys(
            ("float32", "int_mm", "ours"), REPEATS
        )
    assert [entry["shape"] for entry in record["product"]] == ["5x32x48", "2x32x48"]
    assert {name: len(values) for name, values in record["forward"]["rounds"][suite.EAGER].items()} == dict.fromkeys(
        (suite.EAGER, suite.OURS, suite.OURS_BLOCK), REPEATS
    )
    assert record["threads"] == 1 and record["blocks"] == 2


def test_ratios_are_others_over_ours(record: dict[str, Any]) -> None:
    medians = record["forward"]["median_seconds"]
    assert record["forward"]["vs_float32_eager"] == medians[suite.EAGER] / medians[suite.OURS]
    memory = record["memory"]
    assert memory["file_ratio"] == memory["file_bytes"]["float"] / memory["file_bytes"]["distinct"]
    assert memory["file_ratio"] < memory["file_ratio_shared_embedders"]
    for peak in memory["peaks"].values():
        assert peak["above_imports_bytes"] == peak["peak_bytes"] - peak["after_imports_bytes"] > 0


def test_peers_that_are_not_installed_are_null_and_named(record: dict[str, Any]) -> None:
    assert record["forward"]["vs_fastest_peer"] is None
    assert record["forward"]["fastest_peer"] is None
    assert set(record["forward"]["absent"]) == set(suite.PEERS)


def test_outputs_are_those_of_the_quantized_model(record: dict[str, Any]) -> None:
    # A W4A4 model of two blocks is neither exact nor noise.
    for name in (suite.OURS, suite.OURS_BLOCK):
        assert 5 < record["forward"]["output_sqnr_db"][name] < 60


def test_profile_names_the_parts_and_they_fit_into_the_whole(record: dict[str, Any]) -> None:
    for parts in record["profile"].values():
        inside = {name: value for name, value in parts.items() if name not in ("forward", suite.ALONE)}
        assert {"attention", "quantize input (LayerNormModulate)", "quantize input (Pointwise)"} <= set(inside)
        assert all(value > 0 for value in parts.values())
    for value in record["rotate_quantize_fraction"].values():
        assert value > 0


def test_tables_show_every_contender(record: dict[str, Any]) -> None:
    text, markdown = benchmark_tables(record), forward_markdown(record)
    for name in (suite.EAGER, suite.OURS, suite.OURS_BLOCK, *suite.PEERS):
        assert name in text and name in markdown
    widths = {line.count("|") for line in markdown.splitlines()}
    assert len(widths) == 1


def test_contender_that_cannot_start_says_why(tmp_path: Path) -> None:
    inputs = tmp_path / "inputs.safetensors"
    with pytest.raises(EnvironmentUnavailable, match="found exit status 1 .*no such file or folder"):
        Contender.ours("hqdit", "ours", tmp_path / "missing", inputs, 1, tmp_path / "log")


def test_every_contender_runs_in_each_round() -> None:
    order: list[str] = []
    seconds = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3)
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    rounds = "".join(order[-(len(order) - 4) :])
    assert [part for index, part in enumerate(rounds) if index == 0 or part != rounds[index - 1]] == ["a", "b"] * 3


def test_product_counts_both_halves_of_an_operation() -> None:
    entry = measure_product(4, 8, 6, 1)
    ours = entry["seconds"]["ours"][0]
    assert math.isclose(entry["giga_operations_per_second"], 2 * 4 * 8 * 6 / ours / 1e9)
