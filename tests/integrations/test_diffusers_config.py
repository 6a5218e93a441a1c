"""`HQDiTConfig`: the same fields as `QuantizationConfig`, data-free, and everything that diffusers asks of a config."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from typing import Any

import pytest
from diffusers.quantizers.auto import DiffusersAutoQuantizer
from tiny import require_complete, tiny_dit

import hqdit
from hqdit.errors import CheckpointError, UsageError
from hqdit.integrations.diffusers_config import HQDiTConfig
from hqdit.integrations.diffusers_quantizer import HQDiTQuantizer
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.description import describe
from hqdit.pipeline.quantize import quantize

DATA_FREE = QuantizationConfig(gptq=False)


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    model: Any = quantize(tiny_dit(num_layers=1), DATA_FREE)
    return describe(model, model.quantization_record, {})


def test_without_arguments_it_is_data_free_w4a4() -> None:
    assert HQDiTConfig().request == DATA_FREE
    assert HQDiTConfig().description is None and not HQDiTConfig().request.needs_calibration


def test_every_field_of_the_request_is_an_argument() -> None:
    values = {"weights": "int4", "rotation": "block:4", "include": ["*.to_q"], "low_rank": 2, "keep_dtype": "bfloat16"}
    assert HQDiTConfig(**values).request == QuantizationConfig.from_json({"gptq": False, **values})
    for field in dataclasses.fields(QuantizationConfig):
        if field.name not in ("gptq", "group_size"):
            HQDiTConfig(**{field.name: getattr(DATA_FREE, field.name)})


@pytest.mark.parametrize(
    "settings",
    [
        {"gptq": True},
        {"smoothing": 0.5},
        {"activation_granularity": "tensor"},
        {"activation_granularity": "channel", "format_search": True, "activations": "fp4"},
    ],
)
def test_a_request_that_needs_calibration_says_how(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        HQDiTConfig(**settings)
    require_complete(caught.value, "hqdit.quantize(", "hqdit quantize", "calibration")


@pytest.mark.parametrize("settings", [{"weight": "int4"}, {"bits": 4}, {"weights": "fp5"}, {"quant_method": "sdnq"}])
def test_unknown_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        HQDiTConfig(**settings)
    require_complete(caught.value, next(iter(settings)))


def test_a_request_round_trips() -> None:
    config = HQDiTConfig(weights="int4", exclude=("*.norm1.linear",))
    values = json.loads(json.dumps(config.to_dict()))
    assert values["quant_method"] == "hqdit" and HQDiTConfig.from_dict(values).request == config.request
    assert HQDiTConfig(**values).request == config.request
    assert DiffusersAutoQuantizer.from_dict(values).request == config.request


def test_a_description_round_trips(description: dict[str, Any]) -> None:
    config = HQDiTConfig.from_dict(json.loads(json.dumps(description)))
    assert config.to_dict() == description == config.description
    assert config.request == DATA_FREE
    config.to_dict()["layers"].clear()
    assert config.to_dict() == description


def test_a_calibrated_description_is_fine(description: dict[str, Any]) -> None:
    asked = {**description, "config": QuantizationConfig().to_json()}
    assert HQDiTConfig.from_dict(asked).request.needs_calibration


@pytest.mark.parametrize("key", ["config", "layers", "format_version", "parameters"])
def test_a_broken_description_is_refused(description: dict[str, Any], key: str) -> None:
    without = {name: value for name, value in description.items() if name != key}
    with pytest.raises(CheckpointError) as caught:
        HQDiTConfig.from_dict(without)
    require_complete(caught.value, "config.json")
    with pytest.raises(CheckpointError):
        HQDiTConfig.from_dict({**description, key: "x"})
    with pytest.raises(CheckpointError):
        HQDiTConfig.from_dict({**description, "other": 1})


# What diffusers' base class leaves out or calls for (design traps: repr, value, JSON)


def test_repr_and_json_work(description: dict[str, Any]) -> None:
    assert repr(HQDiTConfig()) == "HQDiTConfig()"
    assert repr(HQDiTConfig(weights="int4")) == "HQDiTConfig(weights='int4')"
    for config in (HQDiTConfig(weights="int4"), HQDiTConfig.from_dict(description)):
        assert json.loads(config.to_json_string())["quant_method"] == "hqdit"
        assert json.loads(config.to_json_string(use_diff=False)) == config.to_dict() == dict(config)
        assert config.quant_method.value == "hqdit" and isinstance(config.quant_method, str)


def test_a_config_stays_as_it_was_made() -> None:
    config = HQDiTConfig()
    assert config.update(weights="int4") == {"weights": "int4"}
    assert HQDiTConfig.from_dict({}, return_unused_kwargs=True, revision="main")[1] == {"revision": "main"}
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other.to_dict() == config.to_dict() and other is not config


# A request is for float weights, a description for quantized ones


def test_a_request_in_a_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError) as caught:
        HQDiTQuantizer(HQDiTConfig(), pre_quantized=True)
    require_complete(caught.value, "config.json", "without the layers")


def test_a_description_for_float_weights_is_refused(description: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        HQDiTQuantizer(HQDiTConfig.from_dict(description), pre_quantized=False)
    require_complete(caught.value, "HQDiTConfig()")


def test_it_is_public() -> None:
    assert hqdit.HQDiTConfig is HQDiTConfig
