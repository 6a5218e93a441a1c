"""Half precision, parts that stay in float32, and calls that leave blocks out, on models with real blocks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_pipelines import PIPELINES
from tiny_transformers import TRANSFORMERS

import hqdit
from hqdit.calibration.recording import RecordedCalls
from hqdit.models.calls import ModelCall
from hqdit.models.precision import to_dtype
from hqdit.numerics.error import sqnr_db
from hqdit.pipeline.config import QuantizationConfig

DATA_FREE = QuantizationConfig(gptq=False)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def in_half(call: ModelCall) -> ModelCall:
    return call.map_tensors(lambda tensor: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)


# A family each with joint attention, 1x1 convolutions, lists as inputs, a gate, and modules that stay in float32.
@pytest.mark.parametrize("name", ["flux", "sana", "z-image", "lumina2", "wan"])
def test_a_quantized_model_runs_in_half_precision(name: str, tmp_path: Path) -> None:
    tiny = TRANSFORMERS[name]
    model = hqdit.quantize(tiny.model(), DATA_FREE)
    hqdit.save(model, tmp_path / "model")
    half = hqdit.load(tmp_path / "model", dtype=torch.bfloat16)
    kept = set(getattr(half, "_keep_in_fp32_modules", None) or ())
    found = {bool(kept & set(n.split("."))): p.dtype for n, p in half.named_parameters()}
    assert found == ({False: torch.bfloat16, True: torch.float32} if kept else {False: torch.bfloat16})
    assert sqnr_db(tiny.call().output(model), in_half(tiny.call()).output(half)) > 8


def test_what_stays_in_float32_keeps_its_numbers() -> None:
    model = TRANSFORMERS["wan"].model()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    to_dtype(model, torch.bfloat16, "cpu")
    same = {name for name, tensor in model.named_parameters() if torch.equal(tensor.float(), before[name])}
    exact = {name for name, tensor in model.named_parameters() if tensor.dtype == torch.float32}
    assert exact == same == {n for n in before if "time_embedder" in n or "scale_shift_table" in n or ".norm2." in n}


def test_calls_recorded_in_half_precision_calibrate_a_float_model() -> None:
    tiny = PIPELINES["wan"]
    pipeline = tiny.pipeline()
    pipeline.transformer = to_dtype(pipeline.transformer, torch.bfloat16, "cpu")
    inputs = {
        key: value.to(torch.bfloat16) if isinstance(value, torch.Tensor) else value
        for key, value in tiny.inputs().items()
    }
    calls = RecordedCalls.from_pipeline(pipeline, [inputs])
    model = hqdit.quantize(TRANSFORMERS["wan"].model(), calibration=calls)
    assert {facts["method"] for facts in model.quantization_record.layers.values()} == {"gptq"}  # type: ignore[union-attr]


def test_layers_that_no_call_reaches_are_rounded_to_nearest() -> None:
    tiny = TRANSFORMERS["sd3"]
    calls = tuple(ModelCall((), {**tiny.call(seed).kwargs, "skip_layers": [1]}) for seed in (1, 2))
    model = hqdit.quantize(tiny.model(), calibration=RecordedCalls(calls, tiny.class_name))
    layers = model.quantization_record.layers  # type: ignore[union-attr]
    silent = {name for name, facts in layers.items() if facts["dead_channels"] == 36 or facts["dead_channels"] == 144}
    assert silent == {name for name in layers if name.startswith("transformer_blocks.1.")}
    assert bool(tiny.call().output(model).isfinite().all())


def test_a_call_can_be_made_twice_with_a_model_that_takes_items_out_of_its_arguments() -> None:
    class Popping(torch.nn.Module):
        def forward(self, items: list[torch.Tensor], options: dict[str, torch.Tensor]) -> torch.Tensor:
            return items.pop() + options.pop("scale")

    call = ModelCall(([torch.ones(2)],), {"options": {"scale": torch.ones(2)}})
    assert torch.equal(call(Popping()), call(Popping()))
