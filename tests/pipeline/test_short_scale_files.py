"""Scales of 8 bits on disk, in memory and through diffusers."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny import predicted, random_calibration, require_complete, state_hash, tiny_dit, with_short_scales
from torch import Tensor

import hqdit
from hqdit.analysis.inspection import bits_per_weight, inspect_checkpoint
from hqdit.cli.main import run
from hqdit.errors import CheckpointError
from hqdit.models.dit_block import FusedDiTBlock
from hqdit.models.weights import WEIGHTS_NAME
from hqdit.pipeline.checkpoint import load, quantized_layers, require_sound, save
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.dequantize import dequantize
from hqdit.pipeline.finished_block import FinishedBlock
from hqdit.pipeline.quantize import quantize

GROUPS = QuantizationConfig(
    weight_granularity="group", activation_granularity="group", group_size=12, gptq=False, scale_rule="mse"
)
ACTIVATION = {"scale_rule": "rms", "scale_factor": 0.2}
LAYER = "transformer_blocks.0.ff.net.2"
SCALE, UNIT = f"{LAYER}.weight_scale", f"{LAYER}.weight_scale_unit"


def grouped(config: QuantizationConfig = GROUPS) -> Any:
    return quantize(tiny_dit(num_layers=1), config, random_calibration(tiny_dit(num_layers=1), 8))


@pytest.fixture(scope="module")
def model() -> Any:
    return with_short_scales(grouped(), **ACTIVATION)


@pytest.fixture(scope="module")
def original(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short") / "model"
    save(model, folder)
    return folder


def from_pretrained(folder: Path, **kwargs: Any) -> Any:
    return DiTTransformer2DModel.from_pretrained(folder, **kwargs)


def require_same_state(found: Any, expected: Any) -> None:
    one, other = found.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and same_bits(tensor, other[name]), name


def same_bits(one: Tensor, other: Tensor) -> bool:
    """torch does not compare a tensor of 8-bit numbers with itself."""
    return torch.equal(*(tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (one, other)))


def test_tensors_and_keys_of_the_file(original: Path) -> None:
    found = load_file(original / WEIGHTS_NAME)
    assert (found[SCALE].dtype, tuple(found[SCALE].shape)) == (torch.float8_e4m3fn, (72, 24))
    assert (found[UNIT].dtype, tuple(found[UNIT].shape)) == (torch.bfloat16, (72, 1))
    entry = json.loads((original / "config.json").read_text())["quantization_config"]["layers"][LAYER]
    assert entry["weight"]["scale_format"] == entry["activation"]["scale_format"] == "e4m3"
    assert (entry["activation"]["scale_rule"], entry["activation"]["scale_factor"]) == ("rms", 0.2)


def test_numbers_are_level_times_unit_times_e4m3(original: Path) -> None:
    found, layer = load_file(original / WEIGHTS_NAME), quantized_layers(load(original))[LAYER]
    scale = found[SCALE].to(torch.float64) * found[UNIT].to(torch.float64)
    assert torch.equal(layer.effective_scale.double(), scale)  # exact: nothing is rounded
    assert layer.weight_scale.dtype == torch.float8_e4m3fn
    long = quantized_layers(grouped())[LAYER].weight_scale.double()
    moved = layer.effective_scale.double() / long
    assert 2.0**-5 < float((moved - 1).abs().max()) <= 2.0**-4


def test_save_and_load_keep_every_bit(original: Path, model: Any, tmp_path: Path) -> None:
    again: Any = load(original)
    require_same_state(again, model)
    assert torch.equal(predicted(again), predicted(model))
    assert {name: layer.spec for name, layer in quantized_layers(again).items()} == {
        name: layer.spec for name, layer in quantized_layers(model).items()
    }
    assert all(isinstance(block, FusedDiTBlock) for block in again.transformer_blocks)
    save(again, tmp_path / "again")
    for name in (WEIGHTS_NAME, "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (original / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_through_diffusers(original: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    model, expected = from_pretrained(original, torch_dtype=dtype), hqdit.load(original, dtype)
    require_same_state(model, expected)
    assert model.state_dict()[SCALE].dtype == torch.float8_e4m3fn
    assert model.state_dict()[UNIT].dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    for name in ("single", "shards"):
        require_same_state(from_pretrained(tmp_path / name, torch_dtype=dtype), model)
        require_same_state(hqdit.load(tmp_path / name, dtype), expected)
    other: Any = expected  # `hqdit.load` gives models that diffusers saves, too
    other.save_pretrained(tmp_path / "loaded")
    require_same_state(from_pretrained(tmp_path / "loaded", torch_dtype=dtype), model)


def test_casts_moves_and_copies_leave_the_scales(model: Any) -> None:
    expected = model.state_dict()
    plain: Any = torch.nn.Module
    for change in (
        lambda m: plain.to(m, torch.bfloat16),
        lambda m: plain.to(m, "cpu", torch.float64),
        lambda m: plain.to(m, "cpu"),
        plain.half,
        plain.float,
        copy.deepcopy,
    ):
        changed = change(copy.deepcopy(model))
        for name, layer in quantized_layers(changed).items():
            for key in ("weight_scale", "weight_scale_unit", "qweight"):
                assert same_bits(getattr(layer, key), expected[f"{name}.{key}"])
                assert getattr(layer, key).dtype == expected[f"{name}.{key}"].dtype
    assert all(tensor.is_meta for tensor in copy.deepcopy(model).to("meta").state_dict().values())


def test_load_state_dict_in_place_and_by_assignment(model: Any) -> None:
    for assign in (False, True):
        other = with_short_scales(grouped(GROUPS.replace(scale_rule="absmax")), **ACTIVATION)
        assert state_hash(other) != state_hash(model)
        other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
        assert state_hash(other) == state_hash(model)
        assert torch.equal(predicted(other), predicted(model))


def test_finished_blocks_carry_them(model: Any) -> None:
    names = list(quantized_layers(model))
    other = tiny_dit(num_layers=1)
    record = copy.deepcopy(model.quantization_record)
    FinishedBlock.of(model, names, record).put_into(other, record)
    require_same_state(other, model)


def test_dequantized_weights_use_them(model: Any) -> None:
    layer = quantized_layers(model)[LAYER]
    found = dequantize(copy.deepcopy(model)).get_submodule(LAYER).weight.detach()
    assert torch.equal(found, layer.dequantized_weight())
    long = quantized_layers(grouped())[LAYER].dequantized_weight()
    assert 0.005 < float((found - long).norm() / long.norm()) < 0.05


def test_bits_are_counted(original: Path, model: Any) -> None:
    layer = quantized_layers(model)[LAYER]
    # Codes, a byte for each of 24 groups, a unit for each output channel, and signs.
    assert layer.storage_bytes == 72 * 288 // 2 + 72 * 24 + 72 * 2 + 288 // 8
    facts = inspect_checkpoint(original)
    assert facts["layers"][LAYER]["bits_per_weight"] == 8 * layer.storage_bytes / (72 * 288)
    assert facts["bits_per_weight"] == bits_per_weight(model)
    scales = {key: value for key, value in facts["layers"][LAYER].items() if "_scale_" in key}
    assert scales == {
        "weight_scale_format": "e4m3",
        "activation_scale_format": "e4m3",
        "activation_scale_rule": "rms",
        "activation_scale_factor": 0.2,
    }
    # 8 / 12 instead of 32 / 12 bits of scale a weight, less the units.
    assert bits_per_weight(model) < bits_per_weight(grouped()) - 1


def test_inspect_shows_them(original: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(original)]) == 0
    assert capsys.readouterr().out.count("group e4m3 x group e4m3") == 7


def test_files_of_before_keep_their_bytes(tmp_path: Path) -> None:
    save(grouped(), tmp_path / "plain")
    for entry in json.loads((tmp_path / "plain" / "config.json").read_text())["quantization_config"]["layers"].values():
        assert not {"scale_format", "scale_rule", "scale_factor"} & (entry["weight"].keys() | entry["activation"])
    assert not [name for name in load_file(tmp_path / "plain" / WEIGHTS_NAME) if name.endswith("scale_unit")]


# Damaged files


def refused(folder: Path, *parts: str) -> None:
    for read in (load, from_pretrained):
        with pytest.raises(CheckpointError) as info:
            read(folder)
        require_complete(info.value, *parts)


def changed(original: Path, folder: Path, name: str, tensor: Tensor) -> Path:
    shutil.copytree(original, folder)
    save_file({**load_file(original / WEIGHTS_NAME), name: tensor.contiguous()}, folder / WEIGHTS_NAME)
    return folder


@pytest.mark.parametrize("code", [0x00, 0x80, 0x81, 0xFE, 0x7F, 0xFF])
def test_scales_that_are_no_positive_number(original: Path, tmp_path: Path, code: int) -> None:
    scale = load_file(original / WEIGHTS_NAME)[SCALE].clone()
    scale.view(torch.uint8)[3, 5] = code
    is_nan = code & 0x7F == 0x7F
    refused(changed(original, tmp_path / "x", SCALE, scale), SCALE, *(["(3, 5)"] if is_nan else ["1 scales"]))


@pytest.mark.parametrize("bad", [0.0, -0.0, -1.0, math.nan, math.inf, 3e38])
def test_units_that_give_no_positive_scales(original: Path, tmp_path: Path, bad: float) -> None:
    unit = load_file(original / WEIGHTS_NAME)[UNIT].clone()
    unit[7] = bad
    refused(changed(original, tmp_path / "x", UNIT, unit), UNIT)


def test_the_smallest_and_the_largest_unit(model: Any) -> None:
    layer = copy.deepcopy(quantized_layers(model)[LAYER])
    assert layer.weight_scale_unit is not None
    layer.weight_scale.view(torch.uint8)[7] = 1  # 2^-9
    for unit in (2.0**-133, torch.finfo(torch.bfloat16).max):
        layer.weight_scale_unit[7] = unit
        require_sound(LAYER, layer, "here")
    layer.weight_scale.view(torch.uint8)[7, 2] = 126  # 448, which takes the largest unit past float32
    with pytest.raises(CheckpointError) as info:
        require_sound(LAYER, layer, "here")
    require_complete(info.value, "here", UNIT)


def test_other_dtypes_and_shapes(original: Path, tmp_path: Path) -> None:
    found = load_file(original / WEIGHTS_NAME)
    for number, (name, tensor) in enumerate(
        [
            (SCALE, found[SCALE].to(torch.float32)),
            (SCALE, found[SCALE].view(torch.uint8)),
            (SCALE, found[SCALE].to(torch.float32).to(torch.float8_e5m2)),
            (UNIT, found[UNIT].to(torch.float32)),
        ]
    ):
        refused(changed(original, tmp_path / str(number), name, tensor), name, str(tensor.dtype))
    refused(changed(original, tmp_path / "wide", UNIT, found[UNIT].expand(72, 2)), "shape")


def test_a_missing_unit(original: Path, tmp_path: Path) -> None:
    shutil.copytree(original, tmp_path / "x")
    tensors = load_file(original / WEIGHTS_NAME)
    del tensors[UNIT]
    save_file(tensors, tmp_path / "x" / WEIGHTS_NAME)
    refused(tmp_path / "x", "missing")
