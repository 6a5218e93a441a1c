"""Checkpoints in the layout of the original DiT, and its forward pass written out from the paper (arXiv 2212.09748).

Independent of the converter and of diffusers: names of tensors are typed here once more, positions and frequencies are
computed here, and everything runs in the dtype of the state dict.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear, silu

State = dict[str, Tensor]


def original_state(
    width: int = 48,
    blocks: int = 2,
    patch: int = 2,
    size: int = 8,
    channels: int = 4,
    out_channels: int = 8,
    classes: int = 5,
    seed: int = 0,
) -> State:
    """A random float32 state dict whose modulation is strong, so that every part of every block matters."""
    random = torch.Generator().manual_seed(seed)

    def layer(name: str, *shape: int) -> State:
        scale = 1 / math.sqrt(math.prod(shape[1:]))
        return {
            f"{name}.weight": torch.randn(shape, generator=random) * scale,
            f"{name}.bias": torch.rand(shape[0], generator=random) - 0.5,
        }

    state = {"pos_embed": torch.from_numpy(positions(width, size // patch)).float().unsqueeze(0)}
    state |= layer("x_embedder.proj", width, channels, patch, patch)
    state |= layer("t_embedder.mlp.0", width, 256) | layer("t_embedder.mlp.2", width, width)
    state |= {"y_embedder.embedding_table.weight": torch.randn(classes + 1, width, generator=random)}
    for index in range(blocks):
        block = f"blocks.{index}"
        state |= layer(f"{block}.attn.qkv", 3 * width, width) | layer(f"{block}.attn.proj", width, width)
        state |= layer(f"{block}.mlp.fc1", 4 * width, width) | layer(f"{block}.mlp.fc2", width, 4 * width)
        state |= layer(f"{block}.adaLN_modulation.1", 6 * width, width)
    state |= layer("final_layer.linear", patch * patch * out_channels, width)
    return state | layer("final_layer.adaLN_modulation.1", 2 * width, width)


def positions(width: int, side: int) -> np.ndarray:
    """Sines and cosines of a patch's column, then of its row: (side^2, width)."""

    def along(place: np.ndarray) -> np.ndarray:
        angles = np.outer(place, 10_000.0 ** -(np.arange(width // 4) / (width // 4)))
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.divmod(np.arange(side * side), side)
    return np.concatenate([along(column), along(row)], axis=1)


def original_forward(
    state: State,
    latents: Tensor,
    timesteps: Tensor,
    classes: Tensor,
    heads: int,
    eps: float = 1e-6,
    frequencies: int = 128,
) -> Tensor:
    """(batch, out channels, height, width) from an original state dict.

    Args:
        eps: of every LayerNorm.
        frequencies: the k-th frequency of the time step is 10000^(-k / frequencies).
    """

    def apply(name: str, x: Tensor) -> Tensor:
        return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        return layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    kernel = state["x_embedder.proj.weight"]
    width, _channels, patch, _ = kernel.shape
    batch, channels, height, _ = latents.shape
    side = height // patch
    patches = latents.reshape(batch, channels, side, patch, side, patch).permute(0, 2, 4, 1, 3, 5)
    x = linear(patches.reshape(batch, side * side, -1), kernel.reshape(width, -1), state["x_embedder.proj.bias"])
    x = x + state["pos_embed"]

    rates = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / frequencies)
    angles = timesteps.double().unsqueeze(1) * rates
    waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(x.dtype)
    c = apply("t_embedder.mlp.2", silu(apply("t_embedder.mlp.0", waves)))
    c = silu(c + state["y_embedder.embedding_table.weight"][classes])

    blocks = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for index in range(blocks):
        block = f"blocks.{index}"
        parts = apply(f"{block}.adaLN_modulation.1", c).chunk(6, dim=1)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = parts
        qkv = apply(f"{block}.attn.qkv", modulated(x, shift_attention, scale_attention))
        query, key, value = qkv.reshape(batch, side * side, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) / math.sqrt(width // heads)).softmax(dim=-1)
        mixed = (weights @ value).transpose(1, 2).reshape(batch, side * side, width)
        x = x + gate_attention.unsqueeze(1) * apply(f"{block}.attn.proj", mixed)
        inner = gelu(apply(f"{block}.mlp.fc1", modulated(x, shift_mlp, scale_mlp)), approximate="tanh")
        x = x + gate_mlp.unsqueeze(1) * apply(f"{block}.mlp.fc2", inner)

    shift, scale = apply("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
    out = apply("final_layer.linear", modulated(x, shift, scale))
    out = out.reshape(batch, side, side, patch, patch, -1).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(batch, -1, side * patch, side * patch)


def save_original(path: Path, state: State) -> Path:
    """A .pt file as published: the state dict by itself."""
    torch.save(state, path)
    return path
