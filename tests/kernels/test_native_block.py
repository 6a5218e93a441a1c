"""A DiT block on the native kernels against the same block on torch's operations."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from native_cases import INSTRUCTION_SETS, bits, needs_native
from tiny import inputs_of, random_calibration, tiny_dit
from torch import Tensor

from hqdit.kernels import native_library
from hqdit.kernels.backend import TorchBackend
from hqdit.kernels.linear import Epilogue
from hqdit.kernels.selection import BACKENDS, use_backend
from hqdit.layers.linear import HQLinear
from hqdit.models.dit_block import FusedDiTBlock
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize

pytestmark = needs_native

#: Many tokens, so that rare differences of codes average out: 6 samples of 256 or of 144.
MANY = {"sample_size": 32, "patch_size": 2}
MODELS: dict[str, tuple[dict[str, Any], QuantizationConfig]] = {
    "rotated": (MANY, QuantizationConfig(gptq=False)),
    "GPTQ": (MANY, QuantizationConfig()),
    "folded": (MANY, QuantizationConfig(gptq=False, fold_value_rotation=True)),
    "no rotation": (MANY, QuantizationConfig.preset("minmax")),
    "grouped": (
        MANY,
        QuantizationConfig(gptq=False, weight_granularity="group", activation_granularity="group", group_size=12),
    ),
    "static": (MANY, QuantizationConfig(gptq=False, activation_granularity="tensor")),
    "static per channel": (MANY, QuantizationConfig(gptq=False, activation_granularity="channel-token")),
    "means of samples": (MANY, QuantizationConfig(centring="sample")),
    "8-bit activations": (MANY, QuantizationConfig(gptq=False, activations="int8")),
    "exact GELU, more heads": (
        {
            "sample_size": 24,
            "patch_size": 2,
            "activation_fn": "gelu",
            "num_attention_heads": 6,
            "attention_head_dim": 24,
        },
        QuantizationConfig(gptq=False),
    ),
}


@functools.cache
def models(name: str) -> tuple[Any, Any]:
    """The float model and the quantized one."""
    changes, config = MODELS[name]
    exact: Any = tiny_dit(**changes)
    data = random_calibration(exact, 8) if config.needs_calibration else None
    return exact, quantize(tiny_dit(**changes), config, data)


def cast_latents(fields: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {**fields, "latents": fields["latents"].to(dtype)}


def attention_in_float32(*parts: Tensor) -> Tensor:
    query, key, value = (part.float().transpose(1, 2) for part in parts)
    mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    return mixed.transpose(1, 2).contiguous().to(parts[0].dtype)


def block_outputs(model: Any, hidden: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    """Each block on the same input."""
    with torch.no_grad():
        return [block(hidden, **arguments) for block in model.transformer_blocks]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_block_differs_by_a_hundredth_of_its_quantization_error(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The two add up rotations and softmax in different orders. That moves a number by about 1e-7 of its size, and where
    # it lies next to a tie, rarely, it goes to the neighbouring level: a whole step, which the roundings that follow
    # amplify. So outputs cannot agree to float32's precision; what is promised is that all of this is small beside what
    # rounding does to the block in the first place.
    exact, quantized = (copy.deepcopy(model).to(dtype) for model in models(name))
    assert {type(block) for block in quantized.transformer_blocks} == {FusedDiTBlock}
    fields = cast_latents(inputs_of(exact), dtype)
    hidden = exact.pos_embed(fields["latents"])
    arguments = {"timestep": fields["timesteps"], "class_labels": fields["classes"]}
    assert hidden.shape[0] * hidden.shape[1] >= 800
    wanted = block_outputs(exact, hidden, arguments)
    # torch rounds weights to bfloat16 inside its attention, which alone moves outputs by a few hundredths of the error.
    monkeypatch.setattr(TorchBackend, "attention", lambda _, *parts: attention_in_float32(*parts))
    with use_backend("torch"):
        defined = block_outputs(quantized, hidden, arguments)
    for isa in INSTRUCTION_SETS:
        with use_backend("native"), native_library.use_instruction_set(isa):
            found = block_outputs(quantized, hidden, arguments)
        for block in range(len(found)):
            assert bool(found[block].isfinite().all())
            difference = (found[block] - defined[block]).double().norm() ** 2
            error = (wanted[block] - defined[block]).double().norm() ** 2
            assert float(difference / error) <= 0.01, (isa, block, float(difference / error))


@pytest.mark.parametrize("name", MODELS)
def test_equal_codes_give_equal_outputs(name: str) -> None:
    _, quantized = models(name)
    layers = [module for module in quantized.modules() if isinstance(module, HQLinear)]
    assert len(layers) == 7 * len(quantized.transformer_blocks)
    native, composed = BACKENDS["native"], BACKENDS["torch"]
    random = torch.Generator().manual_seed(0)
    for layer in layers:
        activation = composed.quantize_input(torch.randn(66, layer.in_features, generator=random), layer.preparation)
        gate = torch.randn(3, layer.out_features, generator=random)
        residual = torch.randn(66, layer.out_features, generator=random)
        for epilogue in (Epilogue(), Epilogue(gate=gate, residual=residual)):
            expected = composed.linear(activation, [layer.packed_weight], epilogue)[0]
            for isa in INSTRUCTION_SETS:
                with native_library.use_instruction_set(isa):
                    found = native.linear(activation, [layer.packed_weight], epilogue)[0]
                assert np.array_equal(bits(found), bits(expected)), (layer.spec.name, isa)
