"""`calibration`: layer errors by straight-line recomputation, block sizes, and the record."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tiny import CLASSES, calibration, tiny_dit

from hqdit.experiments import calibration_size
from hqdit.experiments.calibration_size import layer_sqnr
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
    assert [row[:2] for row in sizes.rows] == [("nearest", None), ("gptq", 4), ("gptq", 48)]
    assert [row[0] for row in blocks.rows] == ["1", "128", "4096"]


def test_few_samples_are_overfitted_and_rounding_to_nearest_is_not(record):
    gaps = {row[:2]: row[6].value for row in record.tables[0].rows}
    assert gaps["gptq", 4] > gaps["gptq", 48] > 0
    assert abs(gaps["nearest", None]) < gaps["gptq", 4]


def test_block_sizes_agree_and_gptq_gains_on_both_sides(record):
    rows = {row[0]: row for row in record.tables[1].rows}
    assert rows["128"][4] == 0.0  # itself
    for row in rows.values():
        assert row[2].value > 0 and row[2].value >= row[3].value - 0.5
        # The same sums in another order: near-ties of float64 are the only codes that can flip.
        assert row[4] < 1.0 and row[2].value == pytest.approx(rows["128"][2].value, abs=0.05)
