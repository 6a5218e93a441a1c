"""The object quantization_config of a checkpoint: written from a model, read strictly (docs/checkpoint.md)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import nn

import hqdit
from hqdit.errors import CheckpointError, UsageError
from hqdit.layers.linear import HQLinear
from hqdit.layers.matrix_layers import is_matrix_layer, matrix_shape
from hqdit.layers.pointwise_conv import quantized_class
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.record import QuantizationRecord
from hqdit.quantizers.spec import LinearSpec

QUANT_METHOD = "hqdit"
FORMAT_VERSION = 1

KEYS = {
    "quant_method",
    "format_version",
    "hqdit_version",
    "config",
    "calibration",
    "rotation_error",
    "parameters",
    "layers",
    "shared_tensors",
}


@dataclass(frozen=True)
class Description:
    """What a quantization_config says.

    Attributes:
        record: request, calibration and facts.
        specs: layer name -> specification.
        has_bias: layer name -> whether the layer has a bias.
        shared: tensor name -> name of the equal tensor that is stored for it.
    """

    record: QuantizationRecord
    specs: dict[str, LinearSpec]
    has_bias: dict[str, bool]
    shared: dict[str, str]


def describe(model: nn.Module, record: QuantizationRecord, shared: dict[str, str]) -> dict[str, Any]:
    """The quantization_config of `model`; `read_description` is the inverse.

    Args:
        model: quantized.
        record: what was asked for and what happened.
        shared: tensor name -> name of the equal tensor that is stored for it.
    """
    layers = {
        name: {**layer.spec.to_json(), "bias": layer.bias is not None, "record": record.layers[name]}
        for name, layer in model.named_modules()
        if isinstance(layer, HQLinear)
    }
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "hqdit_version": hqdit.__version__,
        "config": record.config.to_json(),
        "calibration": record.calibration,
        "rotation_error": record.rotation_error,
        "parameters": record.parameters,
        "layers": layers,
        "shared_tensors": shared,
    }


def read_description(found: object, where: Path | str) -> Description:
    """What a quantization_config says.

    Args:
        found: the value as JSON has it.
        where: the file or model that it belongs to, for messages.

    Raises:
        CheckpointError: another method or version, unknown or missing keys, or values that cannot be.
    """
    values = _of_this_version(found, where)
    try:
        config = QuantizationConfig.from_json(values["config"])
        entries = dict(values["layers"])
        shared = {alias: str(stored) for alias, stored in dict(values["shared_tensors"]).items()}
        facts = {name: dict(entry["record"]) for name, entry in entries.items()}
        has_bias = {name: entry["bias"] for name, entry in entries.items()}
        specs = {name: LinearSpec.from_json(name, _without(entry, "bias", "record")) for name, entry in entries.items()}
        if not all(isinstance(value, bool) for value in has_bias.values()):
            raise TypeError("bias is neither true nor false")
        rotation_error = values["rotation_error"]
        record = QuantizationRecord(
            config,
            dict(values["calibration"]),
            None if rotation_error is None else float(rotation_error),
            facts,
            int(values["parameters"]),
            shared=shared,
        )
        if record.parameters < 1:
            raise ValueError(f"parameters is {record.parameters}")
        for name in facts:
            _require_facts(name, facts[name])
    except (UsageError, TypeError, KeyError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{where}: found a quantization_config that cannot be read ({error}), needed one of format version "
            f"{FORMAT_VERSION}. Fix: quantize the model again"
        ) from error
    return Description(record, specs, has_bias, shared)


def _of_this_version(found: object, where: Path | str) -> dict[str, Any]:
    method = found.get("quant_method") if isinstance(found, dict) else None
    if not isinstance(found, dict) or method != QUANT_METHOD:
        raise CheckpointError(
            f"{where}: found a model quantized by {method!r}, needed {QUANT_METHOD!r}. "
            "Fix: load it with the library that made it"
        )
    version = found.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: found format version {version!r}, needed {FORMAT_VERSION}, the one that hqdit "
            f"{hqdit.__version__} reads. Fix: upgrade hqdit, or quantize the model again"
        )
    unknown, missing = sorted(found.keys() - KEYS), sorted(KEYS - found.keys())
    if unknown or missing:
        raise CheckpointError(
            f"{where}: quantization_config has the unknown keys {unknown} and lacks {missing}, needed exactly those of "
            f"format version {FORMAT_VERSION}. Fix: quantize the model again"
        )
    return cast(dict[str, Any], found)


def place_empty_layers(model: nn.Module, description: Description, where: Path | str) -> None:
    """Put quantized layers without contents, on the meta device, where the description has them.

    Raises:
        CheckpointError: a layer that is no linear layer of the model, or has other sizes.
    """
    for name, spec in description.specs.items():
        _require_same_shape(model, name, spec, where)
        layer_class = quantized_class(model.get_submodule(name))
        layer = layer_class(spec, bias=description.has_bias[name], device="meta")
        model.set_submodule(name, layer.eval())


def _require_same_shape(model: nn.Module, name: str, spec: LinearSpec, where: Path | str) -> None:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if layer is None or not is_matrix_layer(layer):
        raise CheckpointError(
            f"{where}: found the layer {name!r} in quantization_config, which is no linear layer of this model, needed "
            "one that is. Fix: quantize the model again"
        )
    in_features, out_features = matrix_shape(layer)
    if (in_features, out_features) != (spec.in_features, spec.out_features):
        raise CheckpointError(
            f"{where}: found {spec.in_features} -> {spec.out_features} for layer {name} in quantization_config, needed "
            f"{in_features} -> {out_features} as in the model. Fix: quantize the model again"
        )


def _without(entry: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key not in keys}


def _require_facts(name: str, facts: dict[str, Any]) -> None:
    """Raise `TypeError` or `KeyError` unless a layer's record holds what `hqdit inspect` shows."""
    for key in ("method", "arithmetic"):
        if not isinstance(facts[key], str):
            raise TypeError(f"{key} of {name} is {facts[key]!r}")
    for key in ("statistic", "damp_fraction", "zero_output_channels", "dead_channels", "rows_kept_nearest"):
        is_number = isinstance(facts.get(key, 0), (int, float))
        may_be_null = key in ("statistic", "damp_fraction")
        if not is_number and not (may_be_null and facts[key] is None):
            raise TypeError(f"{key} of {name} is {facts[key]!r}")
