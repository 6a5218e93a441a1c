"""The GPU benchmark on a CPU: what its record promises, on models small enough for a test, compiled for nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hqdit.benchmark import gpu_models, gpu_suite, workload
from hqdit.benchmark.clock import Clock
from hqdit.benchmark.gpu_models import EAGER, Workload, contenders
from hqdit.benchmark.gpu_products import float32_precision, measure_gpu_product
from hqdit.errors import EnvironmentUnavailable
from hqdit.report.benchmark import benchmark_tables

REPEATS = 2
CPU = torch.device("cpu")
SMALL_DIT = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 1}
SMALL_FLUX = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2}
SMALL_FLUX |= {"joint_attention_dim": 64, "pooled_projection_dim": 32, "in_channels": 8}
RUNNING = [name for name, contender in contenders("reference").items() if not contender.is_compiled]
RUNNING = [name for name in RUNNING if not contenders("reference")[name].is_captured]


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workload, "DIT_XL_2", workload.DIT_XL_2 | SMALL_DIT)
        flux = gpu_models.FLUX_STACK | SMALL_FLUX | {"axes_dims_rope": (4, 14, 14)}
        patch.setattr(gpu_models, "FLUX_STACK", flux)
        patch.setattr(gpu_models, "FLUX_TEXT_TOKENS", 3)
        patch.setattr(gpu_models, "FLUX_SIDE", 2)
        workloads = (Workload("dit", "dit", 2, 8), Workload("dit again", "dit", 1, 8), Workload("flux", "flux", 1))
        work = tmp_path_factory.mktemp("bench")
        told: list[str] = []
        found = gpu_suite.run_gpu_benchmark(
            work, CPU, REPEATS, 1, told.append, "reference", workloads, ((20, 32, 48), (2, 32, 48))
        )
    assert told[0] == "products"
    return found


def test_record_is_json_and_has_the_keys_of_the_cpu_benchmark(record: dict[str, Any]) -> None:
    json.dumps(record, allow_nan=False)
    cpu = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "cpu.json").read_text())
    assert set(cpu) - {"duration_seconds"} <= set(record)
    assert set(cpu["product"][0]) <= set(record["product"][0])
    assert set(cpu["forward"]) <= set(record["forward"])
    assert record["forward"] == record["workloads"]["dit again"]


def test_every_repeat_is_kept_and_ratios_are_others_over_ours(record: dict[str, Any]) -> None:
    for entry in record["product"]:
        assert {len(values) for values in entry["seconds"].values()} == {REPEATS}
    for entry in record["workloads"].values():
        assert set(entry["rounds"]["all"]) == set(entry["median_seconds"]) == set(RUNNING)
        medians = entry["median_seconds"]
        assert entry["fastest_ours"] == "hqdit"
        assert entry["vs_float32_eager"] == medians[EAGER] / medians["hqdit"]
        assert entry["vs_fastest_peer"] == min(entry["vs_each_peer"].values())
        assert EAGER not in entry["vs_each_peer"]
        assert "torch bfloat16" in entry["vs_each_peer"]


def test_who_cannot_run_is_named_with_the_reason(record: dict[str, Any]) -> None:
    for entry in record["workloads"].values():
        assert set(entry["absent"]) == set(contenders("reference")) - set(RUNNING)
        assert all("needed a CUDA device" in reason for reason in entry["absent"].values())
        assert entry["vs_bfloat16_compiled"] is None


def test_outputs_are_those_of_the_model(record: dict[str, Any]) -> None:
    for entry in record["workloads"].values():
        quality = entry["output_sqnr_db"]
        assert quality["torch float32, TF32"] is None  # a CPU has no TF32: equal outputs
        assert quality["torch bfloat16"] > 25
        assert 3 < quality["hqdit"] < quality["torch bfloat16"]


def test_parts_and_memory(record: dict[str, Any]) -> None:
    for name, parts in record["profile"].items():
        assert {"quantize_input", "linear", "forward", gpu_suite.ALONE} <= set(parts)
        assert record["rotate_quantize_fraction"][name] > 0
    for entry in record["workloads"].values():
        assert entry["contenders"]["hqdit"]["model_bytes"] < entry["contenders"]["torch bfloat16"]["model_bytes"]
        assert entry["memory"]["model_ratio_bfloat16"] > 1


def test_tables_show_every_contender(record: dict[str, Any]) -> None:
    text = benchmark_tables(record | {"device": "cuda"})
    for name in (*contenders("reference"), *record["workloads"], "20x32x48"):
        assert name in text


def test_precision_of_float32_products_is_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    with float32_precision("high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before


def test_contenders_take_turns() -> None:
    order: list[str] = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = Clock(CPU).turns(runs, 3, "turns")
    assert "".join(order) == "aabb" + "ab" * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_torchao_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_models, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentUnavailable, match="found no torchao"):
        gpu_models.torchao_float8(torch.nn.Linear(2, 2))


@pytest.mark.gpu
def test_product_on_a_gpu() -> None:
    entry = measure_gpu_product(64, 256, 128, REPEATS, Clock(torch.device("cuda")), "triton", compiles=True)
    assert {"vs_float32", "vs_float32_tf32", "vs_bfloat16", "vs_int_mm", "vs_library"} <= set(entry)
    assert all(value > 0 for values in entry["seconds"].values() for value in values)
