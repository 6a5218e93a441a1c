"""The real pipeline of every family: its own denoising loop calibrates, and samples with the quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import PIPELINES, STEPS, TinyPipeline
from torch import Tensor

import hqdit
from hqdit.calibration.recording import RecordedCalls
from hqdit.integrations.load_pipeline import load_pipeline
from hqdit.layers.linear import HQLinear


def sampled(pipeline: Any, tiny: TinyPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(**tiny.inputs(seed=7), generator=torch.Generator().manual_seed(0))[0]
    assert isinstance(output, Tensor)
    return output


@pytest.mark.parametrize("name", PIPELINES)
def test_calibrates_saves_reloads_and_samples(name: str, tmp_path: Path) -> None:
    tiny = PIPELINES[name]
    pipeline = tiny.pipeline()
    pipeline.save_pretrained(tmp_path / "float")
    exact = sampled(pipeline, tiny)

    calls = RecordedCalls.from_pipeline(pipeline, [tiny.inputs(seed) for seed in (1, 2)], samples=2 * STEPS)
    assert len(calls) == 2 * STEPS
    calls.save(tmp_path / "calls.safetensors")
    read = RecordedCalls.from_file(tmp_path / "calls.safetensors")
    assert read.fingerprint == calls.fingerprint

    quantized = hqdit.quantize(pipeline.transformer, calibration=read)
    assert {facts["method"] for facts in quantized.quantization_record.layers.values()} == {"gptq"}  # type: ignore[union-attr]
    expected = sampled(pipeline, tiny)
    assert bool(expected.isfinite().all())
    assert not torch.equal(expected, exact)

    hqdit.save(quantized, tmp_path / "quantized", source=tmp_path / "float")
    again = load_pipeline(tmp_path / "quantized")
    assert type(again).__name__ == tiny.class_name
    layers = [module for module in again.transformer.modules() if isinstance(module, HQLinear)]
    assert len(layers) == len(quantized.quantization_record.layers)  # type: ignore[arg-type]
    assert torch.equal(sampled(again, tiny), expected)
