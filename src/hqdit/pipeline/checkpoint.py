"""Saving and loading quantized models: the on-disk contract of docs/checkpoint.md, format version 1."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import hqdit
from hqdit.errors import CheckpointError, UsageError
from hqdit.layers.linear import HQLinear
from hqdit.layers.matrix_layers import is_matrix_layer, matrix_shape
from hqdit.layers.pointwise_conv import quantized_class
from hqdit.models.adapter import adapter_for
from hqdit.models.source import CONFIG_NAME, ModelFolder, build_skeleton, find_model, load_float_transformer
from hqdit.models.weights import (
    WEIGHTS_NAME,
    locate_weights,
    read_tensor,
    read_weights,
    require_finite,
    require_float,
    require_state,
    write_safetensors,
)
from hqdit.numerics.codes import unpack_codes
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.publish import publish_folder, require_free
from hqdit.pipeline.record import QuantizationRecord
from hqdit.quantizers.spec import LinearSpec

QUANT_METHOD = "hqdit"
FORMAT_VERSION = 1

_KEYS = {
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


def quantized_layers(model: nn.Module) -> dict[str, HQLinear]:
    """Name -> layer for every quantized layer, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HQLinear)}


def save(
    model: nn.Module, out: str | Path, source: str | Path | ModelFolder | None = None, overwrite: bool = False
) -> None:
    """Write a quantized or float model in diffusers layout.

    Args:
        model: as `hqdit.quantize` or `hqdit.load` returned it.
        out: a transformer folder; or, if `source` is a pipeline, a pipeline folder with everything but the
            transformer copied from there.
        source: where the float model came from, or None for a bare transformer folder.
        overwrite: replace what lies at `out`.

    Raises:
        UsageError: `out` exists or touches the source.
    """
    record: QuantizationRecord | None = getattr(model, "quantization_record", None)
    dtypes: dict[str, torch.dtype] = record.dtypes if record else getattr(model, "source_dtypes", {})
    folder = source if isinstance(source, ModelFolder) or source is None else find_model(source)
    target = Path(out)
    require_free(target, overwrite, *([folder.root] if folder else []))
    config = _model_config(model)
    if record is not None:
        tensors, shared = _stored_once(_stored_tensors(model, dtypes))
        config["quantization_config"] = _quantization_config(model, record, shared)
    else:
        tensors = _stored_tensors(model, dtypes)
    with publish_folder(target, overwrite) as staged:
        inner = staged
        if folder is not None and folder.is_pipeline:
            inner = staged / "transformer"
            for path in sorted(folder.root.iterdir()):
                if path.name != "transformer":
                    copy = shutil.copytree if path.is_dir() else shutil.copyfile
                    copy(path, staged / path.name)
        inner.mkdir(exist_ok=True)
        write_safetensors(tensors, inner / WEIGHTS_NAME)
        (inner / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _model_config(model: nn.Module) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(cast(Any, model).to_json_string())
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "quantization_config")}


def _quantization_config(model: nn.Module, record: QuantizationRecord, shared: dict[str, str]) -> dict[str, Any]:
    layers = {}
    for name, layer in quantized_layers(model).items():
        layers[name] = {**layer.spec.to_json(), "bias": layer.bias is not None, "record": record.layers[name]}
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


def _stored_tensors(model: nn.Module, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """The model's tensors in their storage dtypes, on the CPU, sorted by name and without common memory."""
    state = model.state_dict()
    return {name: state[name].detach().cpu().to(dtypes.get(name, state[name].dtype)).clone() for name in sorted(state)}


def _stored_once(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The distinct tensors, and alias -> stored name for those that are equal to an earlier one."""
    stored: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first_with: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).digest()
        original = first_with.setdefault((tensor.dtype, tuple(tensor.shape), digest), name)
        if original == name:
            stored[name] = tensor
        else:
            shared[name] = original
    return stored, shared


def load(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
    """The transformer of a quantized or float model folder, in evaluation mode.

    Loading needs no quantization code: specifications and buffers are all there is.

    Args:
        path: what `save` wrote, a float model folder, a hub id or a bundled name.
        dtype: of the unquantized tensors in memory; scales stay float32.
        device: where to put the model.

    Raises:
        CheckpointError: missing or broken file, unknown key, newer format version, or tensors that do not fit.
        EnvironmentUnavailable: a hub id, and the hub cannot be reached.
    """
    # nn.Module's own `to`: diffusers' wrapper logs a warning about float32 modules that DiT does not have.
    return nn.Module.to(load_folder(find_model(path)), device=device, dtype=dtype)


def load_folder(folder: ModelFolder) -> nn.Module:
    """As `load`, from a folder that `find_model` returned, in float32 on the CPU."""
    return _load_quantized(folder) if folder.is_quantized else load_float_transformer(folder)


def _read_quantization_config(folder: ModelFolder) -> dict[str, Any]:
    where = folder.transformer / CONFIG_NAME
    found = folder.config["quantization_config"]
    method = found.get("quant_method") if isinstance(found, dict) else None
    if method != QUANT_METHOD:
        raise CheckpointError(
            f"{where}: found a model quantized by {method!r}, needed {QUANT_METHOD!r}. "
            "Fix: load it with the library that made it"
        )
    version = found.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: found format version {version!r}, needed {FORMAT_VERSION}, the one that hqdit "
            f"{hqdit.__version__} reads. Fix: upgrade hqdit, or quantize the model again"
        )
    unknown, missing = sorted(found.keys() - _KEYS), sorted(_KEYS - found.keys())
    if unknown or missing:
        raise CheckpointError(
            f"{where}: quantization_config has the unknown keys {unknown} and lacks {missing}, needed exactly those of "
            f"format version {FORMAT_VERSION}. Fix: quantize the model again"
        )
    return cast(dict[str, Any], found)


def _load_quantized(folder: ModelFolder) -> nn.Module:
    where = folder.transformer
    description = _read_quantization_config(folder)
    try:
        config = QuantizationConfig.from_json(description["config"])
        entries = dict(description["layers"])
        shared = {alias: str(stored) for alias, stored in dict(description["shared_tensors"]).items()}
        facts = {name: dict(entry["record"]) for name, entry in entries.items()}
        has_bias = {name: entry["bias"] for name, entry in entries.items()}
        specs = {name: LinearSpec.from_json(name, _without(entry, "bias", "record")) for name, entry in entries.items()}
        if not all(isinstance(value, bool) for value in has_bias.values()):
            raise TypeError("bias is neither true nor false")
        rotation_error = description["rotation_error"]
        record = QuantizationRecord(
            config,
            dict(description["calibration"]),
            None if rotation_error is None else float(rotation_error),
            facts,
            int(description["parameters"]),
        )
        if record.parameters < 1:
            raise ValueError(f"parameters is {record.parameters}")
        for name in facts:
            _require_facts(name, facts[name])
    except (UsageError, TypeError, KeyError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{where / CONFIG_NAME}: found a quantization_config that cannot be read ({error}), needed one of format "
            f"version {FORMAT_VERSION}. Fix: quantize the model again"
        ) from error
    model = build_skeleton(folder, is_empty=True)
    for name, spec in specs.items():
        _require_same_shape(model, name, spec, where)
        layer_class = quantized_class(model.get_submodule(name))
        model.set_submodule(name, layer_class(spec, bias=has_bias[name], device="meta").eval())
    tensors = read_weights(where)
    for alias, stored in shared.items():
        if alias in tensors or stored not in tensors:
            raise CheckpointError(
                f"{where / CONFIG_NAME}: found {alias!r} stored as {stored!r} in shared_tensors, which is not so in "
                "the file, needed names that fit it. Fix: quantize the model again"
            )
        tensors[alias] = tensors[stored]
    needed = model.state_dict()
    require_state(tensors, needed, where)
    kept = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in entries or n.endswith(".bias")}
    require_float(kept, where)
    record.dtypes = {name: tensor.dtype for name, tensor in kept.items()}
    for name in sorted(tensors.keys() - kept.keys()):
        if tensors[name].dtype != needed[name].dtype:
            raise CheckpointError(
                f"{where}: tensor {name!r} has dtype {tensors[name].dtype}, needed {needed[name].dtype}. "
                "Fix: quantize the model again"
            )
    files = locate_weights(where)
    converted: dict[str, Tensor] = {}
    for name in sorted(tensors.keys() - shared.keys()):
        is_stored_narrow = tensors[name].dtype != needed[name].dtype
        # What is converted is read in a mapping of its own, so that its pages do not stay beside the result.
        tensor = read_tensor(files[name], name) if is_stored_narrow else tensors[name]
        require_finite({name: tensor}, where)
        converted[name] = tensor.to(needed[name].dtype)
    # Tensors that the file holds once are held once in memory too: every alias gets the same converted tensor.
    converted.update({alias: converted[stored] for alias, stored in shared.items()})
    model.load_state_dict(converted, assign=True)
    for name, layer in quantized_layers(model).items():
        _require_sound(name, layer, where)
    adapter_for(model).fuse(model)
    model.quantization_record = record  # type: ignore[assignment]
    return model


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


def _require_same_shape(model: nn.Module, name: str, spec: LinearSpec, where: Path) -> None:
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if layer is None or not is_matrix_layer(layer):
        raise CheckpointError(
            f"{where / CONFIG_NAME}: found the layer {name!r} in quantization_config, which is no linear layer of this "
            "model, needed one that is. Fix: quantize the model again"
        )
    in_features, out_features = matrix_shape(layer)
    if (in_features, out_features) != (spec.in_features, spec.out_features):
        raise CheckpointError(
            f"{where / CONFIG_NAME}: found {spec.in_features} -> {spec.out_features} for layer {name} in "
            f"quantization_config, needed {in_features} -> {out_features} as in the model. "
            "Fix: quantize the model again"
        )


def _require_sound(name: str, layer: HQLinear, where: Path) -> None:
    """Refuse scales that are not positive, format indices out of range, and codes that stand for no number."""
    for buffer_name in ("weight_scale", "channel_scale", "static_scale", "input_scale"):
        scale = getattr(layer, buffer_name)
        if scale is not None and not bool((scale > 0).all()):
            raise CheckpointError(
                f"{where}: tensor {name}.{buffer_name} holds {int((~(scale > 0)).sum())} scales that are not positive, "
                "needed positive ones. Fix: quantize the model again"
            )
    formats = layer.spec.weight.formats
    if layer.format_index is not None and int(layer.format_index.max()) >= len(formats):
        raise CheckpointError(
            f"{where}: tensor {name}.format_index holds {int(layer.format_index.max())}, needed numbers below "
            f"{len(formats)}. Fix: quantize the model again"
        )
    fmt = formats[0]  # all formats of a layer have one storage size; 4-bit formats use every code
    bad_codes = [code for code, level in enumerate(fmt.level_of_code) if level is None]
    codes = unpack_codes(layer.qweight, fmt)
    top = (1 << fmt.bits) - 1
    if int(codes.max()) > top or any(bool((codes == code).any()) for code in bad_codes):
        raise CheckpointError(
            f"{where}: tensor {name}.qweight holds codes that {fmt} does not have, needed codes of numbers. "
            "Fix: quantize the model again"
        )
