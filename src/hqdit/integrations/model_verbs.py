"""`hqdit.quantize` and `hqdit.load`: the pipeline's verbs, on models and diffusers pipelines, ready for diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import DiffusionPipeline
from torch import nn

from hqdit.calibration.capture import CalibrationData
from hqdit.errors import UsageError
from hqdit.integrations.attachment import attach
from hqdit.pipeline import checkpoint
from hqdit.pipeline import quantize as quantizing
from hqdit.pipeline.config import QuantizationConfig

ModelOrPipeline = TypeVar("ModelOrPipeline")

#: Components of a pipeline that are quantized, where it has them.
DENOISERS = ("transformer", "transformer_2")


def quantize(
    model: ModelOrPipeline, config: QuantizationConfig | None = None, calibration: CalibrationData | None = None
) -> ModelOrPipeline:
    """Quantize a diffusion transformer, or those of a diffusers pipeline, in place.

    The result works with `save_pretrained`, `dequantize` and diffusers' pipelines like one that `from_pretrained` has
    quantized.

    Args:
        model: a float32 model in evaluation mode, or a pipeline around one or two of them.
        config: the request; None is the preset "hqdit".
        calibration: needed if `config.needs_calibration`, otherwise ignored; as of `pipeline.quantize.quantize`.

    Returns:
        `model`; each quantized model has a `QuantizationRecord` as its attribute `quantization_record`.

    Raises:
        UsageError: a pipeline without a transformer, or with two and a request that needs calibration; besides as
            `pipeline.quantize.quantize`.
        CheckpointError, NumericsError: as `pipeline.quantize.quantize`.
    """
    if not isinstance(model, DiffusionPipeline):
        attach(quantizing.quantize(cast(nn.Module, model), config, calibration))
        return model
    parts = cast(dict[str, Any], model.components)
    transformers = [parts[name] for name in DENOISERS if isinstance(parts.get(name), nn.Module)]
    if not transformers:
        raise UsageError(
            f"quantize: found {type(model).__name__} without a transformer, needed one with {' or '.join(DENOISERS)}. "
            "Fix: pass the model"
        )
    if len(transformers) > 1 and (config or QuantizationConfig()).needs_calibration:
        raise UsageError(
            f"quantize: found {type(model).__name__} with two transformers and a request that needs calibration, "
            "needed data for each. Fix: quantize one after the other, each with data of its own"
        )
    for transformer in transformers:
        attach(quantizing.quantize(transformer, config, calibration))
    return cast(ModelOrPipeline, model)


def load(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> nn.Module:
    """The transformer of a quantized or float model folder, in evaluation mode, as `pipeline.checkpoint.load` gives it.

    A quantized one works with diffusers like one that `from_pretrained` has loaded.

    Args:
        path: what `hqdit.save` or `save_pretrained` wrote, a float model folder, a hub id or a bundled name.
        dtype: of the unquantized tensors in memory; scales stay float32.
        device: where to put the model.

    Raises:
        CheckpointError: missing or broken file, unknown key, newer format version, or tensors that do not fit.
        EnvironmentUnavailable: a hub id, and the hub cannot be reached.
    """
    # Attached last: diffusers refuses to change the dtype of a model that it takes for quantized.
    return attach(checkpoint.load(path, dtype, device))
