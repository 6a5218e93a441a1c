"""`hadamard-cost`: operations by the plan, times with their interval, and answers that follow the figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hqdit.errors import UsageError
from hqdit.experiments import hadamard_cost
from hqdit.experiments.cache import ResultCache
from hqdit.experiments.hadamard_cost import geometry_of, study
from hqdit.experiments.image_scores import FLOAT32
from hqdit.experiments.laboratory import Laboratory
from hqdit.experiments.noise_floor import FLOOR
from hqdit.experiments.rotation_cost import (
    GEOMETRIES,
    XL,
    BlockGeometry,
    Timing,
    block_operations,
    measure,
    random_layer,
    rotation_operations,
    rotations_for,
)
from hqdit.experiments.subjects import Subject
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.plan import plan_quantization
from hqdit.records.run_record import Interval
from hqdit.records.run_record_reader import run_record_from_json
from hqdit.transforms.hadamard import hadamard_factors, hadamard_matrix, paley_matrix
from hqdit.transforms.rotation import RotationSpec, plan_rotation

TINY = BlockGeometry("tiny", 16, 64)


@pytest.mark.parametrize(
    ("rotation", "width", "operations"),
    [
        ("none", 1152, 0),
        ("full", 2, 2 * (1 + 2)),  # one sum, one difference, two signs, two scalings
        ("full", 4, 4 * (2 + 2)),
        ("block:4", 8, 8 * (2 + 2)),
        ("full", 12, 12 * (11 + 2)),  # Paley's matrix of order 12 alone: every output sums 12 numbers
        ("full", 24, 24 * (1 + 11 + 2)),  # 24 = 2 * 12
        ("full", 1152, 1152 * (5 + 35 + 2)),  # 1152 = 32 * 36
        ("block:128", 1152, 1152 * (7 + 2)),
    ],
)
def test_operations_counted_by_hand(rotation: str, width: int, operations: int) -> None:
    assert rotation_operations(plan_rotation(rotation, width, "here")) == operations


def test_a_folded_rotation_mixes_across_heads_only() -> None:
    # 4 heads of 6: two stages and the normalisation on 24 channels; signs and the part within heads are in W_v.
    assert rotation_operations(RotationSpec("heads", 24, 12)) == 24 * (1 + 1)


def additions(matrix_sylvester: int, matrix_paley: int, nonzero_per_row: int) -> int:
    """Of one product with S (x) P by divide and conquer: halves, then one addition per element of both."""
    if matrix_sylvester == 1:
        return matrix_paley * (nonzero_per_row - 1)
    return 2 * additions(matrix_sylvester // 2, matrix_paley, nonzero_per_row) + matrix_sylvester * matrix_paley


def test_operations_agree_with_a_recursive_count_for_every_order_up_to_600() -> None:
    orders = [order for order in range(2, 601) if hadamard_factors(order)]
    assert len(orders) > 100
    for order in orders:
        factors = hadamard_factors(order)
        assert factors is not None
        paley = paley_matrix(factors.paley, factors.construction)
        nonzero = {int(count) for count in (paley != 0).sum(axis=0)}
        assert len(nonzero) == 1
        expected = additions(factors.sylvester, factors.paley, nonzero.pop()) + 2 * order
        assert rotation_operations(plan_rotation("full", order, "here")) == expected


def test_the_fast_transform_takes_fewer_operations_than_the_dense_matrix() -> None:
    for width in (144, 576, 1152, 4608):
        dense = int((hadamard_matrix(width) != 0).sum()) * 2 if width <= 1152 else 2 * width**2
        assert rotation_operations(plan_rotation("full", width, "here")) < dense / 4


def test_block_operations_by_hand() -> None:
    rotations, products = block_operations(BlockGeometry("hand", 4, 16), "full")
    assert rotations == 3 * 4 * (2 + 2) + 16 * (4 + 2)  # qkv, attention out and fc1 read 4 channels, fc2 reads 16
    assert products == 2 * (4 * 12 + 4 * 4 + 4 * 16 + 16 * 4)
    assert block_operations(BlockGeometry("hand", 4, 16), "none")[0] == 0


def test_rotations_that_fit() -> None:
    assert {geometry.name: rotations_for(geometry)[1:-1] for geometry in GEOMETRIES} == {
        "DiT-XL/2": ["block:16", "block:32", "block:36", "block:64", "block:72", "block:128"],
        "digits": ["block:16", "block:36", "block:72"],
        "shapes": ["block:16", "block:32", "block:64", "block:128"],
    }
    assert (XL.width, XL.hidden) == (1152, 4608)
    for geometry in GEOMETRIES:
        for rotation in rotations_for(geometry):
            for width in (geometry.width, geometry.hidden):
                plan_rotation(rotation, width, geometry.name)


def timing(quantize: Mapping[str, float], product: float, repeats: int = 7) -> Timing:
    """Constant times, spread evenly over the layers."""
    layers = list(TINY.layers)
    return Timing(
        TINY,
        8,
        {
            rotation: {name: [seconds / len(layers)] * repeats for name in layers}
            for rotation, seconds in quantize.items()
        },
        {name: [product / len(layers)] * repeats for name in layers},
    )


def test_overhead_is_extra_time_over_rounding_and_product() -> None:
    found = timing({"none": 0.5, "full": 0.7}, 3.5)
    assert found.extra_seconds("full") == pytest.approx(0.2)
    overhead = found.overhead("full")
    assert (overhead.value, overhead.low, overhead.high) == pytest.approx((0.05, 0.05, 0.05))


def test_the_interval_of_the_overhead_widens_with_the_scatter_of_the_repeats() -> None:
    steady = timing({"none": 1.0, "full": 2.0}, 8.0)
    scattered = dict(steady.quantize)
    scattered["full"] = {name: [0.1, 0.5, 0.9, 0.2, 0.6, 0.8, 0.4] for name in TINY.layers}
    found = Timing(TINY, 8, scattered, steady.product).overhead("full")
    assert found.low < found.value < found.high
    assert found.value == pytest.approx((4 * 0.5 - 1.0) / 9.0)


def test_measure_times_every_rotation_and_layer() -> None:
    found = measure(TINY, rotations_for(TINY), tokens=3, repeats=2)
    assert set(found.quantize) == {"none", "block:16", "full"}
    for layers in (*found.quantize.values(), found.product):
        assert set(layers) == set(TINY.layers)
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in layers.values())


def test_measure_needs_something_to_compare_with() -> None:
    with pytest.raises(UsageError, match="needed none among them"):
        measure(TINY, ["full"], tokens=2, repeats=1)


def test_the_timed_layer_does_what_its_rotation_says() -> None:
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    plain, rotated = (random_layer("here", 16, 8, rotation) for rotation in ("none", "full"))
    assert not torch.equal(plain.quantize_input(x).levels, rotated.quantize_input(x).levels)
    assert len(plain.qweight.unique()) > 10
    assert torch.isfinite(rotated(x)).all()


@dataclass
class ScriptedLaboratory(Laboratory):
    """Scores by rule; checks that what is asked for could be quantized."""

    gain_db: float = 1.0
    scatter_db: float = 0.0  # up and down from trajectory to trajectory, with a rotation only

    def score(
        self, subject: Subject, config: QuantizationConfig, calibration_samples: int | None = None
    ) -> dict[str, Any]:
        plan_quantization(subject.model, config)
        assert not config.gptq
        db = {"none": 10.0, "full": 10.0 + self.gain_db}.get(config.rotation, 10.0 + self.gain_db / 2)
        swing = 0.0 if config.rotation == "none" else self.scatter_db
        noise = [10 ** (-(db + swing * (-1) ** pair) / 10) for pair in range(30)]
        return {
            "mean_layer_sqnr_db": [db + 2, db + 1, db + 3],
            "eps_sqnr_db": {"guided 1.5": [db, db - 1, db + 1]},
            "eps_noise_powers": {"guided 1.5": noise},
        }


def laboratory(tmp_path: Path, **options: Any) -> ScriptedLaboratory:
    return ScriptedLaboratory(ResultCache(tmp_path / "cache"), tmp_path, tell=lambda _text: None, **options)


@pytest.fixture(autouse=True)
def scripted_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    floor = {"mean_layer_sqnr_db": [-2.0, -2.5, -1.5], "eps_sqnr_db": {"guided 1.5": [-3.0, -3.5, -2.5]}}
    monkeypatch.setattr(hadamard_cost, "noise_floor", lambda _lab, _subject: floor)


SUBJECTS = (Subject("digits"), Subject("digits", 10.0))
SCRIPTED = {"none": 0.010, "block:16": 0.011, "full": 0.015}


@pytest.mark.parametrize("is_quick", [True, False])
def test_the_record_is_complete_and_survives_json(tmp_path: Path, is_quick: bool) -> None:
    record = study(laboratory(tmp_path, is_quick=is_quick), timing(SCRIPTED, 0.040), SUBJECTS)
    again = run_record_from_json(json.loads(json.dumps(record.to_json())), "here")
    assert again.to_json() == record.to_json()
    assert [table.title for table in record.tables] == [
        "Operations of one token in one block",
        "Measured time",
        "Gain, digits",
        "Gain, digits, c = 10",
    ]
    gains = record.tables[2]
    expected = ["none", "block:16", "full"] if is_quick else ["none", "block:16", "block:36", "block:72", "full"]
    assert [row[0] for row in gains.rows] == [FLOAT32, FLOOR, *expected]
    gain = gains.rows[-1][-1]
    assert isinstance(gain, Interval) and (gain.low, gain.value, gain.high) == pytest.approx((1.0, 1.0, 1.0))
    assert gains.rows[2][-1] is None
    assert len({column.title for column in gains.columns}) == len(gains.columns)
    assert gains.rows[-1][1] == pytest.approx(100 * 40464 / 497664)
    assert len(record.figures) == 2 and len(record.answers) == 2 + len(SUBJECTS)
    repeats = record.measurements["quantize_seconds"]["full"]["fc2"]
    assert len(repeats) == record.config["repeats"] == 7


def test_the_time_table_has_median_fastest_and_slowest(tmp_path: Path) -> None:
    table = study(laboratory(tmp_path), timing(SCRIPTED, 0.040), SUBJECTS[:1]).tables[1]
    by_rotation = {row[0]: row for row in table.rows}
    assert by_rotation["full"][1] == Interval(3.75, 3.75, 3.75)
    assert {column.interval for column in table.columns[1:-2]} == {"fastest and slowest repeat"}
    assert by_rotation["none"][-1] is None
    assert by_rotation["full"][-1].value == pytest.approx(10.0)  # type: ignore[union-attr]  # 5 ms over 50 ms


def test_answers_for_a_rotation_that_helps(tmp_path: Path) -> None:
    record = study(laboratory(tmp_path), timing(SCRIPTED, 0.040), SUBJECTS[:1])
    assert "full 8.13" not in record.answers[0] and "full" in record.answers[0]
    assert "+10.0 %" in record.answers[0]
    assert "full is highest, better than none (+1.00 dB [+1.00, +1.00]); the cheapest" in record.answers[1]
    assert record.answers[1].endswith("at most 0.1 dB below it is full.")
    # 28 blocks, 5 ms more in each.
    assert "adds 140.0 ms" in record.answers[2] and "for each dB" not in record.answers[2]
    assert "digits +1.00 dB [+1.00, +1.00], better than none." in record.answers[2]
    assert "+7.00 s in 50 steps" in record.answers[2]
    assert "The fastest rotation is block:16 with 28.0 ms" in record.answers[2]


def test_answers_for_a_rotation_that_hurts(tmp_path: Path) -> None:
    record = study(laboratory(tmp_path, gain_db=-1.0), timing(SCRIPTED, 0.040), SUBJECTS[:1])
    assert "no rotation is better than none in the noise prediction" in record.answers[1]
    assert "is worse than none (-0.50 dB [-0.50, -0.50])" in record.answers[1]
    assert "digits -1.00 dB [-1.00, -1.00], worse than none." in record.answers[2]


def test_a_gain_within_the_scatter_is_no_gain(tmp_path: Path) -> None:
    record = study(laboratory(tmp_path, gain_db=0.1, scatter_db=3.0), timing(SCRIPTED, 0.040), SUBJECTS[:1])
    assert "no rotation is better than none" in record.answers[1]
    assert "not distinguishable from none" in record.answers[1] and "not distinguishable" in record.answers[2]


def test_the_cheapest_rotation_that_is_nearly_as_good_is_named(tmp_path: Path) -> None:
    for gain, cheapest in ((0.5 * hadamard_cost.CLOSE_DB, "none"), (1.5 * hadamard_cost.CLOSE_DB, "block:16")):
        record = study(laboratory(tmp_path, gain_db=gain), timing(SCRIPTED, 0.040), SUBJECTS[:1])
        assert record.answers[1].endswith(f"at most {hadamard_cost.CLOSE_DB:g} dB below it is {cheapest}.")


def test_geometry_of_the_bundled_model() -> None:
    assert geometry_of(Subject("digits").model, "digits") == BlockGeometry("digits", 144, 576)
