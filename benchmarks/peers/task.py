"""What every peer is given, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file

#: One forward of the prepared model over the task's inputs; the output as float32.
Forward = Callable[[], numpy.ndarray]

#: A peer that is ready, and the settings that its record states.
Prepared = tuple[Forward, dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """The model and its inputs, the same for every peer.

    Attributes:
        model: folder of a DiTTransformer2DModel in float32.
        threads: the most that the peer may use at a time.
        float_rest: compute in float32 whatever is not quantized; otherwise what is fastest here.
        without_amx: behave as on a machine whose widest integer instructions are AVX-512 VNNI.
        cache: folder for converted models; None keeps nothing.
    """

    model: Path
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    threads: int
    float_rest: bool
    without_amx: bool
    cache: Path | None

    def load_model(self, dtype: torch.dtype = torch.float32) -> DiTTransformer2DModel:
        model = DiTTransformer2DModel.from_pretrained(self.model, torch_dtype=dtype, local_files_only=True)
        return model.eval().requires_grad_(False)


def load_inputs(path: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, time steps and class labels of a safetensors file."""
    tensors = load_file(path)
    return tensors["latents"], tensors["timesteps"], tensors["class_labels"]
