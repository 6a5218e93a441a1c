"""The preset fpq in the pipeline: what a layer stores is what the search found, and is better than min-max."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import random_calibration, tiny_dit
from torch import Tensor

from hqdit.models.outliers import inject_outliers
from hqdit.pipeline import input_group
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize

NAMES = ("transformer_blocks.0.attn1.to_v", "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2")


def output_error(layer: Any, exact: torch.nn.Linear, x: Tensor) -> float:
    """|y_q - y|^2 / |y|^2 without the bias, of the layer as it is stored."""
    bias = layer.bias if layer.bias is not None else 0.0
    true = x.double() @ exact.weight.detach().double().T
    return float(((layer(x) - bias).double() - true).square().sum() / true.square().sum())


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_layer_has_the_error_that_the_search_found(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    exact: Any = inject_outliers(tiny_dit(num_layers=1), 8.0)
    calibration = random_calibration(exact, 16)
    monkeypatch.setattr(input_group, "SEARCH_TOKENS", 48)
    searched: list[Tensor] = []
    sample = input_group.InputGroup._token_sample

    def spy(group: input_group.InputGroup) -> Tensor:
        searched.append(sample(group))
        return searched[-1]

    monkeypatch.setattr(input_group.InputGroup, "_token_sample", spy)
    config = QuantizationConfig.preset("fpq").replace(include=(name,))
    model = quantize(copy.deepcopy(exact), config, calibration)
    layer: Any = quantized_layers(model)[name]
    (tokens,) = searched  # one layer is quantized, so that its input is the float model's and R is the identity
    tokens = tokens.to(torch.float32)
    found = output_error(layer, exact.get_submodule(name), tokens)
    assert found == pytest.approx(model.quantization_record.layers[name]["search_error"], rel=1e-3)
    # Channels differ by powers of two, from 1 to 128, as the published search has them.
    shifts = (layer.channel_scale.double().max() / layer.channel_scale.double()).log2()
    assert torch.allclose(shifts, shifts.round(), atol=1e-5) and 0 <= float(shifts.min()) <= float(shifts.max()) <= 7
    # Static scales per channel from the same data, without a search and in one format.
    plain = config.replace(format_search=False, weights="e2m1", activations="same")
    unsearched: Any = quantized_layers(quantize(copy.deepcopy(exact), plain, calibration))[name]
    assert found < output_error(unsearched, exact.get_submodule(name), tokens)
