"""`inspect_checkpoint` against sizes counted by hand."""

from __future__ import annotations

import pytest
from tiny import tiny_dit

from hqdit.analysis.inspection import bits_per_input, inspect_checkpoint
from hqdit.errors import CheckpointError
from hqdit.pipeline.checkpoint import quantized_layers, save
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize


def test_bits_and_bytes_are_those_of_the_file(tmp_path):
    model = tiny_dit()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    save(quantize(model, QuantizationConfig(gptq=False)), tmp_path / "q")
    facts = inspect_checkpoint(tmp_path / "q")
    size = (tmp_path / "q" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert facts["file_bytes"] == size
    assert facts["bits_per_parameter"] == pytest.approx(8 * size / parameters)
    assert facts["file_ratio"] == pytest.approx(4 * parameters / size)
    # A 72 -> 72 layer: 36 bytes of codes and 4 of scale an output channel, 9 bytes of signs in all.
    query = facts["layers"]["transformer_blocks.0.attn1.to_q"]
    assert query["bits_per_weight"] == pytest.approx(8 * (72 * 40 + 9) / 72**2)
    assert query["rotation"] == "full 2*36(paley2)"
    assert query["method"] == "nearest" and query["arithmetic"] == "int8"
    # Widths 72 -> 72 (q, k, v, out), 72 -> 288 (fc1), 288 -> 72 (fc2), 72 -> 432 (modulation).
    shapes = [(72, 72)] * 4 + [(72, 288), (288, 72), (72, 432)]
    stored = sum(n * (k // 2 + 4) + -(-k // 8) for k, n in shapes)
    assert facts["bits_per_weight"] == pytest.approx(8 * stored / sum(k * n for k, n in shapes))


def test_a_float_model_is_refused(tmp_path):
    save(tiny_dit(), tmp_path / "float")
    with pytest.raises(CheckpointError, match="float model"):
        inspect_checkpoint(tmp_path / "float")


@pytest.mark.parametrize(
    ("changes", "bits"),
    [
        ({}, 4 + 32 / 72),
        ({"activations": "int8"}, 8 + 32 / 72),
        ({"weight_granularity": "group", "activation_granularity": "group", "group_size": 36}, 4 + 32 / 36),
        # Two scales of 8 bits and the exponent of their unit.
        (
            {
                "weight_granularity": "group",
                "activation_granularity": "group",
                "group_size": 36,
                "scale_format": "e4m3",
            },
            4 + 24 / 72,
        ),
    ],
)
def test_bits_per_input_count_codes_and_dynamic_scales(changes, bits):
    model = quantize(tiny_dit(num_layers=1), QuantizationConfig(weights="e2m1", gptq=False).replace(**changes))
    assert bits_per_input(quantized_layers(model)["transformer_blocks.0.attn1.to_q"]) == pytest.approx(bits)
