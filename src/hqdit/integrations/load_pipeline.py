"""A ready diffusers pipeline around a float or quantized transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline
from torch import nn

from hqdit.integrations.pixel_pipeline import PixelDiTPipeline
from hqdit.models.source import PIPELINE_INDEX_NAME, find_model, load_scheduler, load_vae
from hqdit.models.weights import read_json
from hqdit.pipeline.checkpoint import load_folder


def load_pipeline(path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """The pipeline of a model folder: diffusers' `DiTPipeline`, or `PixelDiTPipeline` where there is no autoencoder.

    Args:
        path: a pipeline or transformer folder, float or quantized by hqdit; a hub id; or a bundled name.
        dtype: of the unquantized tensors in memory.
        device: where to put the models.

    Raises:
        CheckpointError: missing or broken files.
        EnvironmentUnavailable: a hub id, and the hub cannot be reached.
    """
    folder = find_model(path)
    transformer = nn.Module.to(load_folder(folder), device=device, dtype=dtype)
    scheduler, vae = load_scheduler(folder), load_vae(folder)
    if vae is None:
        return PixelDiTPipeline(transformer, scheduler)
    labels = read_json(folder.root / PIPELINE_INDEX_NAME, "a pipeline's model_index.json").get("id2label")
    return DiTPipeline(transformer, nn.Module.to(vae, device=device, dtype=dtype), scheduler, id2label=labels)
