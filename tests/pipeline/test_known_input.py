"""What is decided about an input before anything is quantized."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import calibration, tiny_dit

from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.known_input import LEAST_SHARE_OF_MEANS, KnownInput, known_inputs
from hqdit.pipeline.plan import plan_quantization

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
