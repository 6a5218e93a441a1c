"""Models and pipelines that `hqdit.quantize` and `hqdit.load` give, in the hands of diffusers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, WanPipeline
from small_models import DIT, DTYPE, SMALL_MODELS, WAN, SmallModel
from tiny import calibration, latent_dit, random_calibration, require_complete, tiny_dit, tiny_vae
from torch import nn

import hqdit
from hqdit.errors import UsageError
from hqdit.integrations.attachment import attach
from hqdit.integrations.diffusers_config import HQDiTConfig
from hqdit.pipeline import quantize as quantizing
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig

DATA_FREE = QuantizationConfig(gptq=False)
each_model = pytest.mark.parametrize("small", SMALL_MODELS, ids=lambda small: small.name)


def latent_pipeline() -> DiTPipeline:
    return DiTPipeline(latent_dit(num_embeds_ada_norm=1000), tiny_vae(), DDIMScheduler(clip_sample=False))


# Quantizing


def test_a_pipeline_is_quantized_in_place() -> None:
    pipeline, expected = latent_pipeline(), hqdit.quantize(latent_dit(num_embeds_ada_norm=1000), DATA_FREE)
    assert hqdit.quantize(pipeline, DATA_FREE) is pipeline
    assert pipeline.transformer.hf_quantizer.pre_quantized
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, pipeline.transformer.state_dict()[name])


def test_a_pipeline_is_calibrated() -> None:
    pipeline = DiTPipeline(tiny_dit(), tiny_vae(), DDIMScheduler(clip_sample=False))
    hqdit.quantize(pipeline, calibration=calibration())
    assert pipeline.transformer.quantization_record.config == QuantizationConfig()


def test_both_transformers_of_a_pipeline_are_quantized() -> None:
    pipeline = WanPipeline(None, None, None, None, WAN.build(), WAN.build(1))
    hqdit.quantize(pipeline, DATA_FREE)
    assert len(quantized_layers(pipeline.transformer)) == len(quantized_layers(pipeline.transformer_2)) == WAN.layers
    with pytest.raises(UsageError) as caught:
        hqdit.quantize(WanPipeline(None, None, None, None, WAN.build(), WAN.build(1)))
    require_complete(caught.value, "two transformers", "calibration")


def test_a_pipeline_without_a_transformer_is_refused() -> None:
    with pytest.raises(UsageError) as caught:
        hqdit.quantize(WanPipeline(None, None, None, None), DATA_FREE)
    require_complete(caught.value, "WanPipeline", "transformer")


def test_float_models_stay_as_they_are(tmp_path: Path) -> None:
    DIT.save(tmp_path)
    model: Any = hqdit.load(tmp_path)
    assert not hasattr(model, "hf_quantizer") and attach(model) is model
    assert model.to(torch.float16).dtype == torch.float16


def test_attaching_twice_changes_nothing() -> None:
    model: Any = hqdit.quantize(tiny_dit(), DATA_FREE)
    quantizer = model.hf_quantizer
    assert attach(model).hf_quantizer is quantizer


def test_the_pipelines_own_result_is_not_attached() -> None:
    model: Any = quantizing.quantize(tiny_dit(), DATA_FREE)
    assert not hasattr(model, "hf_quantizer") and model.half() is model


def test_a_copy_is_as_good_as_the_original(tmp_path: Path) -> None:
    model: Any = hqdit.quantize(tiny_dit(), DATA_FREE)
    expected = DIT.output(model)
    twin = copy.deepcopy(model)
    twin.save_pretrained(tmp_path)
    assert torch.equal(DIT.output(DiTTransformer2DModel.from_pretrained(tmp_path)), expected)
    twin.dequantize()
    assert len(quantized_layers(model)) == DIT.layers and torch.equal(DIT.output(model), expected)


# Dequantizing


@each_model
@pytest.mark.parametrize("how", ["on load", "from_pretrained", "quantize"])
def test_dequantize_gives_a_float_model(small: SmallModel, how: str, tmp_path: Path) -> None:
    model: Any = hqdit.quantize(small.build(), DATA_FREE)
    model.save_pretrained(tmp_path / "quantized")
    weights = {name: layer.delivered_weight() for name, layer in quantized_layers(model).items()}
    if how == "on load":
        folder = small.save(tmp_path / "float")
        model = small.model_class.from_pretrained(folder, quantization_config=HQDiTConfig())
    elif how == "from_pretrained":
        model = small.model_class.from_pretrained(tmp_path / "quantized")
    assert model.dequantize() is model
    assert not quantized_layers(model) and len(weights) == small.layers
    for name, weight in weights.items():
        assert type(model.get_submodule(name)) is nn.Linear
        assert torch.equal(model.get_submodule(name).weight, weight)
    # Nothing says any more that it is quantized.
    assert "quantization_config" not in model.config and not hasattr(model.config, "quantization_config")
    assert not model.is_quantized and not hasattr(model, "hf_quantizer")
    assert not hasattr(model, "quantization_method") and not hasattr(model, "quantization_record")
    model.save_pretrained(tmp_path / "back")
    again = small.model_class.from_pretrained(tmp_path / "back")
    assert torch.equal(small.output(again), small.output(model))
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)


def test_dequantized_weights_have_the_load_dtype(tmp_path: Path) -> None:
    hqdit.save(hqdit.quantize(tiny_dit(), DATA_FREE), tmp_path / "q")
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "q", **{DTYPE: torch.bfloat16})
    model.dequantize()
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}


def test_dequantize_keeps_the_hooks_of_a_device_map(tmp_path: Path) -> None:
    hqdit.save(hqdit.quantize(tiny_dit(), DATA_FREE), tmp_path / "q")
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "q")
    name = "transformer_blocks.0.ff.net.2"
    hook = AlignDevicesHook(execution_device="cpu", io_same_device=True)
    add_hook_to_module(model.get_submodule(name), hook)
    model.dequantize()
    assert type(model.get_submodule(name)) is nn.Linear and model.get_submodule(name)._hf_hook is hook
    assert bool(DIT.output(model).isfinite().all())


# Folded smoothing and rotations survive


def test_a_calibrated_and_folded_model_dequantizes() -> None:
    config = DATA_FREE.replace(activations="int8", smoothing=0.5, weights="int8")
    model: Any = hqdit.quantize(tiny_dit(), config, random_calibration(tiny_dit(), 16))
    model.dequantize()
    exact = DIT.output(tiny_dit())
    assert float((DIT.output(model) - exact).norm() / exact.norm()) < 0.03
