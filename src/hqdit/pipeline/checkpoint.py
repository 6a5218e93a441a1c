"""Saving and loading quantized models: the on-disk contract of docs/checkpoint.md, format version 1."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from hqdit.errors import CheckpointError
from hqdit.layers.linear import HQLinear
from hqdit.models.adapter import adapter_for
from hqdit.models.precision import to_dtype
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
from hqdit.pipeline.description import describe, place_empty_layers, read_description
from hqdit.pipeline.publish import publish_folder, require_free
from hqdit.pipeline.record import QuantizationRecord


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
        everything = stored_tensors(model, dtypes)
        shared = equal_tensors(everything)
        tensors = {name: tensor for name, tensor in everything.items() if name not in shared}
        config["quantization_config"] = describe(model, record, shared)
    else:
        tensors = stored_tensors(model, dtypes)
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


def stored_tensors(model: nn.Module, dtypes: dict[str, torch.dtype]) -> dict[str, Tensor]:
    """The model's tensors in their storage dtypes, on the CPU, sorted by name and without common memory."""
    state = model.state_dict()
    return {name: _as_stored(state[name], dtypes.get(name)).clone() for name in sorted(state)}


def _as_stored(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.detach().cpu().to(dtype or tensor.dtype)


def equal_tensors(tensors: dict[str, Tensor], dtypes: dict[str, torch.dtype] | None = None) -> dict[str, str]:
    """Name -> name that sorts first among the tensors with equal dtype, shape and bytes, for all but these first ones.

    Memory: one tensor at a time is converted to its storage dtype, that of `dtypes`, if it has another one.
    """
    shared: dict[str, str] = {}
    first_with: dict[tuple[Any, ...], str] = {}
    for name in sorted(tensors):
        tensor = _as_stored(tensors[name], (dtypes or {}).get(name)).contiguous()
        digest = hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).digest()
        original = first_with.setdefault((tensor.dtype, tuple(tensor.shape), digest), name)
        if original != name:
            shared[name] = original
    return shared


def load(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
    """The transformer of a quantized or float model folder, in evaluation mode.

    Loading needs no quantization code: specifications and buffers are all there is.

    Args:
        path: what `save` wrote, a float model folder, a hub id or a bundled name.
        dtype: of the unquantized tensors in memory; scales stay float32, and so do modules of which the class says so.
        device: where to put the model.

    Raises:
        CheckpointError: missing or broken file, unknown key, newer format version, or tensors that do not fit.
        EnvironmentUnavailable: a hub id, and the hub cannot be reached.
    """
    return to_dtype(load_folder(find_model(path)), dtype, device)


def load_folder(folder: ModelFolder) -> nn.Module:
    """As `load`, from a folder that `find_model` returned, in float32 on the CPU."""
    return _load_quantized(folder) if folder.is_quantized else load_float_transformer(folder)


def _load_quantized(folder: ModelFolder) -> nn.Module:
    where = folder.transformer
    description = read_description(folder.config["quantization_config"], where / CONFIG_NAME)
    record, shared = description.record, description.shared
    model = build_skeleton(folder, is_empty=True)
    place_empty_layers(model, description, where / CONFIG_NAME)
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
    kept = {n: t for n, t in tensors.items() if n.rpartition(".")[0] not in description.specs or n.endswith(".bias")}
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
        require_sound(name, layer, where)
    adapter_for(model).fuse(model)
    model.quantization_record = record  # type: ignore[assignment]
    return model


def require_sound(name: str, layer: HQLinear, where: Path | str) -> None:
    """Refuse scales that are not positive, format indices out of range, and codes that stand for no number."""
    for buffer_name in ("weight_scale", "weight_scale_unit", "channel_scale", "static_scale", "input_scale"):
        stored = getattr(layer, buffer_name)
        scale = None if stored is None else stored.to(torch.float32)  # torch compares no numbers of 8 bits
        if scale is not None and not bool((scale > 0).all()):
            raise CheckpointError(
                f"{where}: tensor {name}.{buffer_name} holds {int((~(scale > 0)).sum())} scales that are not positive, "
                "needed positive ones. Fix: quantize the model again"
            )
    scale = layer.effective_scale
    if not bool(((scale > 0) & torch.isfinite(scale)).all()):
        raise CheckpointError(
            f"{where}: tensor {name}.weight_scale_unit holds units whose products with weight_scale are no positive "
            "numbers in float32, needed units that are neither that small nor that large. Fix: quantize the model again"
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
