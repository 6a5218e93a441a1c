"""From quantized layers back to float ones: the same function but for the rounding of inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.attention import BasicTransformerBlock
from tiny import inputs_of, predicted, random_calibration, require_complete, tiny_dit
from torch import nn

from hqdit.errors import UsageError
from hqdit.layers.linear import HQLinear
from hqdit.models.dit_block import FusedDiTBlock
from hqdit.numerics.error import relative_error
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.dequantize import dequantize
from hqdit.pipeline.quantize import quantize

#: Inputs of 8 bits, so that a wrong basis (an error of 1) cannot hide behind their rounding.
EIGHT_BITS = QuantizationConfig(weights="e2m1", activations="int8", gptq=False)
CONFIGS = {
    "plain": EIGHT_BITS,
    "no rotation": EIGHT_BITS.replace(rotation="none"),
    "folded rotation": EIGHT_BITS.replace(fold_value_rotation=True),
    "folded smoothing": EIGHT_BITS.replace(smoothing=0.5),
    "branch": EIGHT_BITS.replace(smoothing=0.5, low_rank=4),
    "static": EIGHT_BITS.replace(activation_granularity="channel", fold_value_rotation=True),
    "some layers": EIGHT_BITS.replace(include=("*.attn1.to_v", "*.ff.net.2"), fold_value_rotation=False),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_float_model_computes_what_the_quantized_one_does(name: str) -> None:
    model: Any = quantize(tiny_dit(), CONFIGS[name], random_calibration(tiny_dit(), 16))
    before = predicted(model)
    found = dequantize(model)
    assert found is model and not quantized_layers(found)
    assert relative_error(before, predicted(found)) < 0.03
    assert relative_error(before, predicted(tiny_dit())) > 0.05  # the weights are still rounded


def test_nothing_of_the_quantized_model_is_left() -> None:
    model: Any = dequantize(quantize(tiny_dit(), EIGHT_BITS))
    assert not hasattr(model, "quantization_record") and not model._forward_pre_hooks
    assert not any(isinstance(module, (HQLinear, FusedDiTBlock)) for module in model.modules())
    assert all(type(block) is BasicTransformerBlock for block in model.transformer_blocks)
    storages = [tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    assert len(storages) == len(set(storages)) and model.state_dict().keys() == tiny_dit().state_dict().keys()
    twin = DiTTransformer2DModel.from_config(model.config).eval()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(predicted(twin), predicted(model))


def test_the_result_can_be_trained_and_quantized_again() -> None:
    model: Any = dequantize(quantize(tiny_dit(), EIGHT_BITS))
    fields = inputs_of(model)
    model(fields["latents"], timestep=fields["timesteps"], class_labels=fields["classes"]).sample.sum().backward()
    assert all(layer.weight.grad is not None for layer in model.modules() if type(layer) is nn.Linear)
    assert len(quantized_layers(quantize(model, EIGHT_BITS))) == 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_dtype(dtype: torch.dtype | None) -> None:
    model: Any = quantize(tiny_dit(), EIGHT_BITS)
    dequantize(model, dtype)
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == dtype or dtype is None
    assert model.transformer_blocks[0].attn1.to_q.bias.dtype == (dtype or torch.float32)


def test_weights_that_are_not_in_memory() -> None:
    with pytest.raises(UsageError) as caught:
        dequantize(quantize(tiny_dit(), EIGHT_BITS).to("meta"))
    require_complete(caught.value, "transformer_blocks.0", "offloading")


def test_float_models_are_refused() -> None:
    with pytest.raises(UsageError) as caught:
        dequantize(tiny_dit())
    require_complete(caught.value, "no quantized layer")
