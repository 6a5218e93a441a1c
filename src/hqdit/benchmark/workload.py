"""What is measured: DiT-XL/2 with random weights, its inputs, and its quantized twins on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hqdit.models.source import ModelFolder, build_skeleton, find_model, load_float_transformer
from hqdit.pipeline.checkpoint import save
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize

#: Geometry of DiT-XL/2 (arXiv 2212.09748, table 1) in diffusers' names; sample_size 32 is 256 x 256 pixels.
DIT_XL_2: dict[str, Any] = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}

#: The preset without what needs trained weights: GPTQ has nothing to win on random ones, and speed does not see it.
CONFIGS = {
    "full": QuantizationConfig.preset("hqdit").replace(gptq=False, keep_dtype="bfloat16"),
    "block128": QuantizationConfig.preset("hqdit").replace(gptq=False, keep_dtype="bfloat16", rotation="block:128"),
}


def write_float_model(out: Path, blocks: int, sample_size: int = 32, shares_embedders: bool = True) -> None:
    """Write DiT-XL/2 with `blocks` blocks and random weights in diffusers' layout, float32.

    Args:
        out: a new folder.
        blocks: 28 for the whole model.
        sample_size: side of the latent image; tokens = (sample_size / 2)^2.
        shares_embedders: give every block the same time step and class embedder, as converted checkpoints do.
    """
    torch.manual_seed(0)
    config = DIT_XL_2 | {"num_layers": blocks, "sample_size": sample_size}
    model = cast(Any, build_skeleton(ModelFolder(out, out, config)))
    if shares_embedders:
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(first)
    save(cast(nn.Module, model), out)


def write_quantized_model(source: Path, out: Path, config: QuantizationConfig) -> None:
    """Quantize the model at `source` and write it to `out`, a new folder."""
    save(quantize(load_float_transformer(find_model(source)), config), out)


def model_inputs(batch: int, sample_size: int) -> dict[str, Tensor]:
    """Latents, time steps and classes of one forward pass: the same numbers for everybody."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, DIT_XL_2["in_channels"], sample_size, sample_size, generator=generator)
    timesteps = torch.linspace(900, 100, batch).to(torch.int64)
    return {"latents": latents, "timesteps": timesteps, "class_labels": torch.arange(batch) * 7 % 1000}


def write_inputs(out: Path, batch: int, sample_size: int = 32) -> None:
    """Write `model_inputs` as safetensors."""
    save_file(model_inputs(batch, sample_size), out)
