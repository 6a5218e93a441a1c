"""`calibration`: layer errors by straight-line recomputation, block sizes, and the record."""

from __future__ import annotations

import copy
import math
from statistics import fmean

import pytest
import torch
from tiny import CLASSES, calibration, tiny_dit

from hqdit.experiments import calibration_size
from hqdit.experiments.calibration_size import layer_sqnr
from hqdit.experiments.gptq_blocks import OVER_LAYERS
from hqdit.experiments.image_scores import FLOAT32
from hqdit.experiments.noise_floor import FLOOR
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize


def test_layer_sqnr_is_that_of_each_layer_on_float_inputs():
    exact, data = tiny_dit(), calibration(12)
    quantized = quantize(copy.deepcopy(exact), QuantizationConfig(gptq=False))
    found = layer_sqnr(exact, quantized, data, 0)
    assert len(found) == 12 and not any("norm1" in name for name in found)
    name = "transformer_blocks.1.ff.net.2"
    seen = []
    handle = exact.get_submodule(name).register_forward_hook(lambda _m, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        exact(data.latents, timestep=data.timesteps, class_labels=data.classes)
        handle.remove()
        ((x, output),) = seen
        noise = (quantized.get_submodule(name)(x).double() - output.double()).square().sum()
    assert int(data.classes.max()) <= CLASSES
    assert found[name] == pytest.approx(10 * math.log10(output.double().square().sum() / noise), abs=1e-3)


@pytest.fixture(scope="module")
def record(lab, tiny_subject):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_size, "SIZES", {tiny_subject: (4, 0, 0, 48)})  # a quick run takes every third
        patch.setattr(calibration_size, "MEASURED_SAMPLES", 24)
        patch.setattr(calibration_size, "BLOCK_SAMPLES", 24)
        patch.setattr(calibration_size, "BLOCK_SIZES", (1, 128, 4096))
        return calibration_size.run(lab)


def test_the_record(record, require_whole):
    require_whole(record, "calibration")
    sizes, blocks = record.tables
    assert [row[:2] for row in sizes.rows] == [
        (FLOAT32, None),
        (FLOOR, None),
        ("nearest", None),
        ("gptq", 4),
        ("gptq", 48),
    ]
    assert [row[0] for row in blocks.rows] == ["1", "128", "4096"]
    assert {column.interval for column in sizes.columns[6:]} == {OVER_LAYERS}
    assert {column.interval for column in blocks.columns if column.title.startswith("Gain")} == {OVER_LAYERS}
    assert "fastest" not in record.answers[-1]


def test_few_samples_are_overfitted_and_rounding_to_nearest_is_not(record):
    few, many = record.tables[0].rows[3:]
    gap, of_nearest, net = (tuple(row[k].value for row in (few, many)) for k in (6, 7, 8))
    assert net[0] > net[1] > 0 and gap[0] > abs(of_nearest[0])
    assert net == pytest.approx([mine - other for mine, other in zip(gap, of_nearest, strict=True)])


def test_the_control_rounds_to_nearest_on_the_samples_that_gptq_sees(lab, tiny_subject, record):
    model = quantize(copy.deepcopy(tiny_subject.model), calibration_size.CONFIG.replace(gptq=False))
    sides = [
        fmean(layer_sqnr(tiny_subject.model, model, lab.calibration(tiny_subject, count, seed), seed).values())
        for count, seed in ((4, lab.seed), (24, lab.seed + 1))
    ]
    assert record.tables[0].rows[3][7].value == pytest.approx(sides[0] - sides[1])


def of_size(*dbs):
    """A score of 30 trajectories whose errors have these levels in turn."""
    return {"eps_noise_powers": {calibration_size.JUDGED: [10 ** (-dbs[k % len(dbs)] / 10) for k in range(30)]}}


def test_enough_is_what_all_larger_sizes_are_no_different_from():
    level = of_size(20.0, 21.0)
    unclear = of_size(21.0, 20.0)
    found = calibration_size._enough({16: of_size(15.0, 16.0), 32: level, 64: unclear, 128: level})
    assert found.startswith("from 32 samples on, no larger number")
    # 16 and 32 cannot be told apart, but 64 is better than both.
    found = calibration_size._enough({16: level, 32: unclear, 64: of_size(25.0, 26.0), 128: of_size(25.0, 26.0)})
    assert found.startswith("from 64 samples on")


def test_the_largest_size_alone_is_never_enough():
    sizes = {16: of_size(15.0), 32: of_size(16.0), 64: of_size(17.0)}
    expected = "the error still falls at the largest size measured: +1.00 dB [+1.00, +1.00] from 32 to 64 samples"
    assert calibration_size._enough(sizes) == expected
    assert calibration_size._enough({16: of_size(15.0), 32: of_size(14.0)}).startswith("the error rises at")


def test_block_sizes_agree_and_gptq_gains_on_both_sides(record):
    rows = {row[0]: row for row in record.tables[1].rows}
    assert rows["128"][4] == 0.0  # itself
    for row in rows.values():
        assert row[2].value > 0 and row[2].value >= row[3].value - 0.5
        # The same sums in another order: near-ties of float64 are the only codes that can flip.
        assert row[4] < 1.0 and row[2].value == pytest.approx(rows["128"][2].value, abs=0.05)
