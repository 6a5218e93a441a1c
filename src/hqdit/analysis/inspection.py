"""What a quantized checkpoint holds: per layer and in total, as plain records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch import nn

from hqdit.errors import CheckpointError
from hqdit.kernels.activation import MEAN_SPEC
from hqdit.layers.linear import HQLinear
from hqdit.models.source import ModelFolder, find_model
from hqdit.models.weights import weight_files
from hqdit.pipeline.checkpoint import load_folder, quantized_layers

FLOAT32_BYTES = 4


def weight_bytes(folder: ModelFolder) -> int:
    """Size of the weight files of a model folder."""
    return sum(path.stat().st_size for path in weight_files(folder.transformer))


def bits_per_weight(model: nn.Module) -> float:
    """Bits of codes, scales, format indices, signs and low-rank branches per quantized weight."""
    layers = quantized_layers(model).values()
    weights = sum(layer.in_features * layer.out_features for layer in layers)
    return 8 * sum(layer.storage_bytes for layer in layers) / weights


def bits_per_input(layer: HQLinear, tokens: int | None = None) -> float:
    """Bits of the codes and of the dynamic scales per number that a layer reads.

    Static scales are part of the layer, and `bits_per_weight` counts them.

    Args:
        layer: any.
        tokens: of a sample, among which the bits of their mean are divided where it is split off; None leaves these
            bits out.
    """
    spec, width = layer.spec.activation, layer.in_features
    of_means = 0.0
    if spec.centring == "sample" and tokens is not None:
        of_means = MEAN_SPEC.bits_per_number(width) / tokens
    return spec.bits_per_number(width) + of_means


def bits_per_activation(model: nn.Module, tokens: int | None = None) -> float:
    """Mean of `bits_per_input` over the quantized layers."""
    bits = [bits_per_input(layer, tokens) for layer in quantized_layers(model).values()]
    return math.fsum(bits) / len(bits)


def size_facts(model: nn.Module, folder: ModelFolder) -> dict[str, Any]:
    """Bits and bytes of a quantized model.

    Returns:
        bits_per_weight: bits of codes, scales, format indices, signs and low-rank branches per quantized weight.
        bits_per_parameter: bits of the weight files per parameter of the float model.
        file_bytes: size of the weight files.
        file_ratio: size of all parameters in float32 over `file_bytes`.
    """
    record: Any = model.quantization_record
    parameters = record.parameters
    file_bytes = weight_bytes(folder)
    return {
        "bits_per_weight": bits_per_weight(model),
        "bits_per_parameter": 8 * file_bytes / parameters,
        "file_bytes": file_bytes,
        "file_ratio": FLOAT32_BYTES * parameters / file_bytes,
    }


def inspect_checkpoint(path: str | Path) -> dict[str, Any]:
    """Everything that `hqdit inspect` shows.

    Raises:
        CheckpointError: missing, broken, or not quantized by hqdit.
    """
    folder = find_model(path)
    if not folder.is_quantized:
        raise CheckpointError(
            f"{folder.transformer}: found a float model, needed one that hqdit quantized. Fix: run hqdit quantize first"
        )
    model = load_folder(folder)
    record: Any = model.quantization_record
    layers = {}
    for name, layer in quantized_layers(model).items():
        spec = layer.spec
        layers[name] = {
            "formats": [fmt.name for fmt in spec.weight.formats],
            "activation": spec.activation.format.name,
            "activation_bits": spec.activation.format.bits,
            "centring": spec.activation.centring,
            "weight_granularity": spec.weight.granularity,
            "activation_granularity": spec.activation.granularity,
            "weight_scale_format": spec.weight.scale_format,
            "activation_scale_format": spec.activation.scale_format,
            "activation_scale_rule": spec.activation.scale_rule,
            "activation_scale_factor": spec.activation.scale_factor,
            "rotation": spec.rotation.describe(),
            "smoothing": spec.activation.smoothing,
            "low_rank": spec.weight.low_rank,
            "bits_per_weight": 8 * layer.storage_bytes / (layer.in_features * layer.out_features),
            **record.layers[name],
        }
    return {
        **size_facts(model, folder),
        "config": record.config.to_json(),
        "calibration": record.calibration,
        "rotation_error": record.rotation_error,
        "layers": layers,
    }
