"""What is decided about an input before anything is quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import calibration, predicted, tiny_dit

from hqdit.models.dit_block import FusedDiTBlock
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.known_input import LEAST_SHARE_OF_MEANS, KnownInput, known_inputs
from hqdit.pipeline.plan import plan_quantization
from hqdit.pipeline.quantize import quantize

MEANS = QuantizationConfig(centring="sample")


def known(config: QuantizationConfig, model: Any) -> dict[str, KnownInput]:
    return known_inputs(model, plan_quantization(model, config), calibration(), config)


def without_attention(model: Any) -> Any:
    """The same model, whose attention outputs no longer reach anything."""
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn1.to_out[0].weight.zero_()
    return model


def test_static_means_are_those_of_calibration() -> None:
    found = known(QuantizationConfig(centring="static"), tiny_dit())
    assert {entry.centring for entry in found.values()} == {"static"}
    assert all(entry.shift is not None and entry.error_share is None for entry in found.values())


def test_means_of_samples_go_where_they_take_error() -> None:
    found = known(MEANS, tiny_dit())
    chosen = {name.rsplit(".", 1)[1] for name, entry in found.items() if entry.centring == "sample"}
    # One vector per sample is its own mean: nothing would be left of it.
    assert "modulation" not in chosen and {"qkv", "out", "fc2"} <= chosen
    assert all(entry.shift is not None for entry in found.values())
    shares = [entry.error_share for entry in found.values() if entry.error_share is not None]
    assert sum(shares) == pytest.approx(1.0)


def test_an_input_that_nothing_depends_on_is_not_worth_the_time() -> None:
    found = known(MEANS, without_attention(tiny_dit()))
    for name, entry in found.items():
        if name.endswith(("out", "qkv")):
            assert entry.error_share is not None and entry.error_share < LEAST_SHARE_OF_MEANS
            assert entry.centring == "static"


def test_nothing_is_subtracted_unless_asked_for() -> None:
    found = known(QuantizationConfig(emphasis=2), tiny_dit())
    assert {(entry.centring, entry.shift) for entry in found.values()} == {("none", None)}


def test_a_fused_block_sees_the_same_samples() -> None:
    model: Any = quantize(tiny_dit(), MEANS, calibration())
    assert all(isinstance(block, FusedDiTBlock) for block in model.transformer_blocks)
    split = {layer.spec.activation.centring for layer in quantized_layers(model).values()}
    assert "sample" in split
    exact, fused = predicted(tiny_dit()), predicted(model)
    for block in model.transformer_blocks:
        FusedDiTBlock.unfuse(block)
    own = predicted(model)
    # Sums in another order move few codes: at most 1 % of the power of the quantization error.
    assert float((fused - own).square().sum()) <= 0.01 * float((own - exact).square().sum())
