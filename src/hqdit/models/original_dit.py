"""Checkpoints of the original DiT (arXiv 2212.09748): what they hold, and where it goes in diffusers' model.

Names and shapes are facts of the published files; everything else follows from the paper and from diffusers.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqdit.errors import CheckpointError
from hqdit.models.source import TIME_FREQUENCY_SHIFT

#: Width -> (letters, blocks, heads): table 1 of the paper. Heads leave no trace in the shapes.
PUBLISHED_MODELS = {384: ("S", 12, 6), 768: ("B", 12, 12), 1024: ("L", 24, 16), 1152: ("XL", 28, 16)}

#: Times an autoencoder of the paper is smaller than its image, on each side.
AUTOENCODER_REDUCTION = 8

_MLP_RATIO, _FREQUENCIES = 4, 256
#: How far a stored table of positions may be from the one computed, which replaces it: the rounding of float16, and
#: that of an average over a training.
_POSITION_TOLERANCE = 1e-2

_PATCHES, _POSITIONS = "x_embedder.proj.weight", "pos_embed"
_CLASSES, _OUTPUT = "y_embedder.embedding_table.weight", "final_layer.linear.weight"
_NEEDED_RANKS = {_PATCHES: 4, _POSITIONS: 3, _CLASSES: 2, _OUTPUT: 2}

#: Original -> diffusers, for what exists once.
_ONCE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
#: Original -> diffusers below norm1.emb of a block, for what diffusers repeats in every block.
_EMBEDDERS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
#: Original -> diffusers within a block; q, k and v come out of attn.qkv.
_IN_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}


@dataclass(frozen=True)
class OriginalSizes:
    """The sizes of one model, as its tensors show them.

    Attributes:
        width: of a token.
        blocks: how many.
        heads: of each attention.
        patch_size: latents a patch is wide and high.
        in_channels: of the latents.
        out_channels: twice `in_channels` with a learned variance.
        sample_size: width and height of the latents.
        classes: without the null class, which is the last row of the table of classes.
    """

    width: int
    blocks: int
    heads: int
    patch_size: int
    in_channels: int
    out_channels: int
    sample_size: int
    classes: int

    @property
    def name(self) -> str:
        """The paper's name, such as DiT-XL/2, or the sizes where it has none."""
        letters, blocks, heads = PUBLISHED_MODELS.get(self.width, ("", 0, 0))
        if (blocks, heads) == (self.blocks, self.heads):
            return f"DiT-{letters}/{self.patch_size}"
        return f"DiT ({self.blocks} blocks of width {self.width}, {self.heads} heads)/{self.patch_size}"

    def transformer_config(self) -> dict[str, Any]:
        """config.json of the converted model, without the version."""
        return {
            "_class_name": "DiTTransformer2DModel",
            TIME_FREQUENCY_SHIFT: 0,  # of the original; diffusers' is 1, which is another embedding of the time
            "activation_fn": "gelu-approximate",
            "attention_bias": True,
            "attention_head_dim": self.width // self.heads,
            "dropout": 0.0,
            "in_channels": self.in_channels,
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,  # of the original; diffusers' default is 1e-5
            "norm_num_groups": 32,
            "norm_type": "ada_norm_zero",
            "num_attention_heads": self.heads,
            "num_embeds_ada_norm": self.classes,
            "num_layers": self.blocks,
            "out_channels": self.out_channels,
            "patch_size": self.patch_size,
            "sample_size": self.sample_size,
            "upcast_attention": False,
        }


def read_sizes(tensors: dict[str, Tensor], where: Path, heads: int | None = None) -> OriginalSizes:
    """The sizes of the model that `tensors` belong to, from their shapes.

    Args:
        tensors: an original state dict.
        where: for messages.
        heads: for widths that are not in `PUBLISHED_MODELS`.

    Raises:
        CheckpointError: not a DiT, shapes that contradict each other, or a width whose heads nobody named.
    """
    lost = [name for name, rank in _NEEDED_RANKS.items() if name not in tensors or tensors[name].ndim != rank]
    if lost:
        some = ", ".join(sorted(tensors)[:3])
        raise CheckpointError(
            f"{where}: found no tensor {lost[0]!r} with {_NEEDED_RANKS[lost[0]]} dimensions among {len(tensors)} "
            f"({some}, ...), needed the state dict of an original DiT. Fix: name such a checkpoint"
        )
    width, channels, patch, patch_width = tensors[_PATCHES].shape
    tokens, rows, outputs = tensors[_POSITIONS].shape[1], tensors[_CLASSES].shape[0], tensors[_OUTPUT].shape[0]
    side = math.isqrt(tokens)
    is_square = patch == patch_width and side * side == tokens
    if not (width and channels and patch and tokens and outputs) or not is_square or outputs % patch**2 or rows < 2:
        raise CheckpointError(
            f"{where}: found {tokens} tokens of width {width}, patches of {channels} x {patch} x {patch_width}, "
            f"{outputs} outputs per token and {rows} classes with the null class, needed square patches in a square, "
            "and a class. Fix: name a checkpoint of an original DiT"
        )
    blocks = len({match[1] for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))})
    found_heads = heads if heads is not None else PUBLISHED_MODELS.get(width, ("", 0, 0))[2]
    if found_heads < 1 or width % found_heads:
        known = ", ".join(map(str, PUBLISHED_MODELS))
        raise CheckpointError(
            f"{where}: found width {width} and {found_heads or 'no'} heads, needed one of the widths {known} or a "
            "number of heads that divides the width, which shapes do not tell. Fix: --heads N"
        )
    return OriginalSizes(width, blocks, found_heads, patch, channels, outputs // patch**2, side * patch, rows - 1)


def expected_shapes(sizes: OriginalSizes) -> dict[str, Tensor]:
    """Every tensor of an original model of these sizes, without memory."""
    width, patch = sizes.width, sizes.patch_size
    layers = {
        "t_embedder.mlp.0": (width, _FREQUENCIES),
        "t_embedder.mlp.2": (width, width),
        "x_embedder.proj": (width, sizes.in_channels, patch, patch),
        "final_layer.adaLN_modulation.1": (2 * width, width),
        "final_layer.linear": (patch * patch * sizes.out_channels, width),
    }
    for index in range(sizes.blocks):
        layers |= {
            f"blocks.{index}.adaLN_modulation.1": (6 * width, width),
            f"blocks.{index}.attn.qkv": (3 * width, width),
            f"blocks.{index}.attn.proj": (width, width),
            f"blocks.{index}.mlp.fc1": (_MLP_RATIO * width, width),
            f"blocks.{index}.mlp.fc2": (width, _MLP_RATIO * width),
        }
    shapes: dict[str, tuple[int, ...]] = {
        _POSITIONS: (1, (sizes.sample_size // patch) ** 2, width),
        _CLASSES: (sizes.classes + 1, width),
    }
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def require_positions(stored: Tensor, computed: Tensor, where: Path) -> None:
    """Raise `CheckpointError` unless the table of positions is the one that diffusers computes by itself."""
    error = float((stored.float() - computed.float()).abs().max())
    if not error <= _POSITION_TOLERANCE:
        raise CheckpointError(
            f"{where}: tensor {_POSITIONS!r} is up to {error:.2g} away from sines and cosines of the positions, needed "
            f"at most {_POSITION_TOLERANCE}, because diffusers computes them. Fix: name a checkpoint of an original DiT"
        )


def to_diffusers(tensors: dict[str, Tensor], sizes: OriginalSizes) -> dict[str, Tensor]:
    """The tensors under diffusers' names: views of the originals, but for copies of what diffusers repeats.

    Args:
        tensors: with the names and shapes of `expected_shapes`.
        sizes: of the model.
    """
    converted = {}
    for kind in ("weight", "bias"):
        for original, name in _ONCE.items():
            converted[f"{name}.{kind}"] = tensors[f"{original}.{kind}"]
        for index in range(sizes.blocks):
            block, original_block = f"transformer_blocks.{index}", f"blocks.{index}"
            for original, name in _IN_BLOCK.items():
                converted[f"{block}.{name}.{kind}"] = tensors[f"{original_block}.{original}.{kind}"]
            for name, part in zip("qkv", tensors[f"{original_block}.attn.qkv.{kind}"].chunk(3), strict=True):
                converted[f"{block}.attn1.to_{name}.{kind}"] = part
            for original, name in _EMBEDDERS.items():
                if f"{original}.{kind}" in tensors:  # a table of classes has no bias
                    converted[f"{block}.norm1.emb.{name}.{kind}"] = tensors[f"{original}.{kind}"].clone()
    return converted
