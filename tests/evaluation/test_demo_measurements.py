"""The demo's measurements in their smallest size, on the bundled model."""

from __future__ import annotations

import pytest
import torch

from hqdit.analysis.inspection import inspect_checkpoint
from hqdit.evaluation.demo import compare_presets
from hqdit.models.outliers import inject_outliers
from hqdit.models.source import find_model, load_float_transformer, load_scheduler
from hqdit.pipeline.config import PRESETS
from hqdit.sampling.sampler import SamplingConfig


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = find_model("digits")
    model = inject_outliers(load_float_transformer(folder), 10.0)
    return compare_presets(
        model,
        folder,
        load_scheduler(folder),
        {name: PRESETS[name] for name in ("hqdit", "minmax")},
        tmp_path_factory.mktemp("demo"),
        label="digits",
        images=20,
        sampling=SamplingConfig(steps=8, guidance=1.5),
        calibration_samples=64,
        seed=0,
    )


def test_the_float_row_comes_first_and_has_no_error(results):
    assert [result.method for result in results] == ["float32", "hqdit", "minmax"]
    assert results[0].eps_sqnr_db is None and results[0].mean_layer_sqnr_db is None
    assert results[0].class_accuracy >= 0.9  # 8 steps instead of 50


def test_the_paper_beats_minmax_on_outliers(results):
    _, hqdit, minmax = results
    for branch in ("conditional", "unconditional", "guided"):
        assert hqdit.eps_sqnr_db[branch] > minmax.eps_sqnr_db[branch] + 3.0
    assert hqdit.mean_layer_sqnr_db > minmax.mean_layer_sqnr_db
    assert hqdit.sample_psnr_db > minmax.sample_psnr_db


def test_every_method_saw_the_same_noise_and_differs_from_float(results):
    for result in results[1:]:
        assert result.images.shape == results[0].images.shape
        assert not torch.equal(result.images, results[0].images)


def test_w4a4_needs_at_most_4_3_bits_per_weight(results):
    for result in results[1:]:
        facts = inspect_checkpoint(result.path)
        assert 4.0 < facts["bits_per_weight"] <= 4.3
        assert facts["file_ratio"] > 3.0
