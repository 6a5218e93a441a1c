"""A ready diffusers pipeline around a float or quantized transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiTPipeline
from torch import nn

from hqdit.errors import CheckpointError, reason_of
from hqdit.integrations.pixel_pipeline import PixelDiTPipeline
from hqdit.models.adapter import ClassConditionalAdapter, adapter_for
from hqdit.models.source import PIPELINE_INDEX_NAME, ModelFolder, find_model, load_scheduler, load_vae
from hqdit.models.weights import read_json
from hqdit.pipeline.checkpoint import load_folder

#: What `DiffusionPipeline.from_pretrained` calls the dtype: newer releases warn of the longer name.
_DTYPE = "dtype" if hasattr(diffusers.utils, "_resolve_dtype") else "torch_dtype"


def load_pipeline(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """The pipeline of a model folder: the one of diffusers that its model_index.json names.

    A model on latents, time step and class gets `DiTPipeline`, or `PixelDiTPipeline` where there is no autoencoder.

    Args:
        path: a pipeline or transformer folder, float or quantized by hqdit; a hub id; or a bundled name.
        dtype: of the unquantized tensors in memory.
        device: where to put the models.

    Raises:
        CheckpointError: missing or broken files.
        EnvironmentUnavailable: a hub id, and the hub cannot be reached.
    """
    folder = find_model(path)
    return pipeline_around(nn.Module.to(load_folder(folder), device=device, dtype=dtype), folder, dtype, device)


def pipeline_around(
    transformer: nn.Module, folder: ModelFolder, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Any:
    """As `load_pipeline`, with `transformer` in the place of the one in `folder`."""
    if not isinstance(adapter_for(transformer), ClassConditionalAdapter):
        return _pipeline_of_index(transformer, folder, dtype).to(device)
    scheduler, vae = load_scheduler(folder), load_vae(folder)
    if vae is None:
        return PixelDiTPipeline(transformer, scheduler)
    labels = read_json(folder.root / PIPELINE_INDEX_NAME, "a pipeline's model_index.json").get("id2label")
    return DiTPipeline(transformer, nn.Module.to(vae, device=device, dtype=dtype), scheduler, id2label=labels)


def _pipeline_of_index(transformer: nn.Module, folder: ModelFolder, dtype: torch.dtype) -> Any:
    where = folder.root / PIPELINE_INDEX_NAME
    read_json(where, f"the model_index.json of a pipeline around a {type(transformer).__name__}")
    try:
        return diffusers.DiffusionPipeline.from_pretrained(folder.root, transformer=transformer, **{_DTYPE: dtype})
    except Exception as error:  # whatever comes out of a loader that does not expect these files
        raise CheckpointError(
            f"{where}: found a pipeline that cannot be loaded ({reason_of(error)}), needed one whose components are "
            "all there. Fix: get the folder again, and install what its text encoders need (pip install transformers)"
        ) from error
