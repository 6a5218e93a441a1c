"""Every preset at every bit width: formats, backends, and what comes back from disk."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from tiny import RUNNABLE, inputs_of, predicted, random_calibration, state_hash, tiny_dit

from hqdit.formats.catalog import FP4_FORMATS
from hqdit.formats.codebooks import lloyd_max
from hqdit.kernels.selection import use_backend
from hqdit.models.dit_block import FusedDiTBlock
from hqdit.numerics.error import sqnr_db
from hqdit.pipeline import input_group
from hqdit.pipeline.checkpoint import load, quantized_layers, save
from hqdit.pipeline.config import BIT_WIDTHS, PRESETS, QuantizationConfig
from hqdit.pipeline.quantize import quantize

FP4 = {fmt.name for fmt in FP4_FORMATS}
INTEGER = ("minmax-int4", "smoothquant", "gptq", "quarot", "svdquant")
#: Least SQNR in dB by bits of the input, 4-bit weights; a wrong scale, sign or basis gives 0 dB or less.
FLOOR = {"W4A4": 6.0, "W4A6": 9.0, "W4A8": 9.0, "W8A8": 15.0}


class Made:
    def __init__(self, name: str, bits: str) -> None:
        self.name, self.bits = name, bits
        self.config = QuantizationConfig.preset(name, bits)
        exact: Any = tiny_dit(num_layers=1)
        self.fields = inputs_of(exact, 16, seed=5)
        self.exact = predicted(exact, **self.fields)
        model = tiny_dit(num_layers=1)
        data = random_calibration(model, 16) if self.config.needs_calibration else None
        with pytest.MonkeyPatch.context() as patch, use_backend("torch"):
            patch.setattr(input_group, "SEARCH_TOKENS", 32)  # a search is slow
            self.model: Any = quantize(model, self.config, data)
            self.output = predicted(self.model, **self.fields)
        self.layers = quantized_layers(self.model)


@pytest.fixture(params=itertools.product(PRESETS, BIT_WIDTHS), ids="-".join, scope="module")
def made(request: pytest.FixtureRequest) -> Made:
    return Made(*request.param)


def test_formats_are_those_of_the_bits(made: Made) -> None:
    weight_bits, activation_bits = BIT_WIDTHS[made.bits]
    kinds = {8: "int8", 6: "int6", 4: "int4"} if made.name in INTEGER else {8: "e4m3", 6: "e2m3"}
    for layer in made.layers.values():
        weight, activation = layer.spec.weight.formats[0], layer.spec.activation.format
        if made.name == "w4a8" and made.bits == "W4A4":  # which has 8 bits of its own
            assert weight.name in FP4 and activation.name == "int8"
            continue
        assert (weight.bits, activation.bits) == (weight_bits, activation_bits)
        for fmt, bits in ((weight, weight_bits), (activation, activation_bits)):
            four_bits = (*FP4, lloyd_max().name) if "plus" in made.name else FP4
            assert fmt.name == kinds[bits] if bits in kinds else fmt.name in four_bits
        if made.name in ("minmax", "hqdit-fixed-format") and weight_bits == 4:
            assert weight.name == "e2m1"


def test_predictions_stay_close(made: Made) -> None:
    assert FLOOR[made.bits] <= sqnr_db(made.exact, made.output) < 80


def test_parts_are_where_the_preset_has_them(made: Made) -> None:
    is_smooth = made.name in ("smoothquant", "svdquant", "hqdit-plus", "hqdit-plus-token")
    has_branch = made.name == "svdquant"
    for name, layer in made.layers.items():
        assert (layer.input_scale is not None) == is_smooth
        assert (layer.low_rank_down is not None) == (layer.low_rank_up is not None) == has_branch
        assert (layer.rotation_signs is not None) == (made.config.rotation != "none")
        assert (layer.channel_scale is not None) == (made.name in ("fpq", "hqdit-channel"))
        assert ("search_error" in made.model.quantization_record.layers[name]) == (made.name == "fpq")
    block = made.model.transformer_blocks[0]
    assert type(block) is (BasicTransformerBlock if has_branch else FusedDiTBlock)
    assert block.attn1.to_q.shared_input is not None


def test_backends_agree(made: Made) -> None:
    with use_backend("reference"):
        assert torch.equal(predicted(made.model, **made.fields), made.output)
    if "native" in RUNNABLE:
        with use_backend("native"):
            native = predicted(made.model, **made.fields)
        # docs/architecture.md: at most 1e-4 of the codes differ, each by one level; a level is worth no more than the
        # quantization error of its number, so that the difference lies far below the error.
        assert sqnr_db(made.output, native) > sqnr_db(made.exact, made.output) + 10.0


def test_reload_is_exact(made: Made, tmp_path: Path) -> None:
    save(made.model, tmp_path / "out")
    reloaded: Any = load(tmp_path / "out")
    assert state_hash(reloaded) == state_hash(made.model)
    assert {name: layer.spec for name, layer in quantized_layers(reloaded).items()} == {
        name: layer.spec for name, layer in made.layers.items()
    }
    assert reloaded.quantization_record.config == made.config
    assert reloaded.quantization_record.layers == made.model.quantization_record.layers
    assert {type(block) for block in reloaded.transformer_blocks} == {
        type(block) for block in made.model.transformer_blocks
    }
    with use_backend("torch"):
        assert torch.equal(predicted(reloaded, **made.fields), made.output)
