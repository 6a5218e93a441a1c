"""Tiny random transformers of diffusers' classes, and a call of each: what the adapters of model families are tried on.

Widths are such that rotations need factors of Paley's as well as Sylvester's. Every parameter is random, also those
that the classes set to zero or one, so that no layer's contribution vanishes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from hqdit.models.calls import ModelCall

BATCH, TEXT, TEXT_WIDTH = 2, 5, 20


@dataclass(frozen=True)
class TinyTransformer:
    """How to make one model and one call of it.

    Attributes:
        class_name: a class of `diffusers`.
        config: its arguments.
        arguments: keyword arguments of its forward pass, from a source of random numbers.
    """

    class_name: str
    config: dict[str, Any]
    arguments: Callable[[Noise], dict[str, Any]]

    def model(self, seed: int = 0) -> nn.Module:
        """The model, float32 and in evaluation mode."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: nn.Module = getattr(diffusers, self.class_name)(**self.config)
        noise = Noise(seed)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                fan_in = parameter[0].numel() if parameter.ndim > 1 else 16
                parameter.copy_(noise(*parameter.shape) / fan_in**0.5)
            for module in model.modules():
                if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), Tensor):
                    module.weight += 1
        return model.eval()

    def call(self, seed: int = 1) -> ModelCall:
        """A call of the model."""
        return ModelCall((), self.arguments(Noise(seed)))


class Noise:
    """Normal numbers of any shape, from a seed."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def timesteps(self, largest: float, batch: int = BATCH) -> Tensor:
        """Numbers between 0 and `largest`, (batch,)."""
        return torch.rand(batch, generator=self._generator) * largest


def _pixart(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "encoder_hidden_states": noise(BATCH, TEXT, TEXT_WIDTH),
        "timestep": noise.timesteps(1000),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def _sd3(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "encoder_hidden_states": noise(BATCH, TEXT, TEXT_WIDTH),
        "pooled_projections": noise(BATCH, 16),
        "timestep": noise.timesteps(1000),
    }


def _positions(tokens: int, axes: int) -> Tensor:
    """Positions (tokens, axes) of tokens that lie in a row."""
    positions = torch.zeros(tokens, axes)
    positions[:, -1] = torch.arange(tokens)
    return positions


def _flux(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 8, 4),
        "encoder_hidden_states": noise(BATCH, TEXT, TEXT_WIDTH),
        "pooled_projections": noise(BATCH, 16),
        "timestep": noise.timesteps(1),
        "img_ids": _positions(8, 3),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": torch.full((BATCH,), 3.5),
    }


def _flux2(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 8, 4),
        "encoder_hidden_states": noise(BATCH, TEXT, TEXT_WIDTH),
        "timestep": noise.timesteps(1),
        "img_ids": _positions(8, 4),
        "txt_ids": _positions(TEXT, 4),
        "guidance": torch.full((BATCH,), 3.5),
    }


def _qwen_image(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 16),
        "encoder_hidden_states": noise(BATCH, TEXT, TEXT_WIDTH),
        "encoder_hidden_states_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
        "timestep": noise.timesteps(1),
        "img_shapes": [[(1, 2, 2)]] * BATCH,
    }


def _z_image(noise: Noise) -> dict[str, Any]:
    return {
        "x": [noise(4, 1, 8, 8), noise(4, 1, 4, 4)],
        "t": noise.timesteps(1),
        "cap_feats": [noise(TEXT, TEXT_WIDTH), noise(3, TEXT_WIDTH)],
    }


def _lumina2(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "timestep": noise.timesteps(1),
        "encoder_hidden_states": noise(BATCH, TEXT, TEXT_WIDTH),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }


def _sana(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 4, 4),
        "encoder_hidden_states": noise(BATCH, TEXT, TEXT_WIDTH),
        "timestep": noise.timesteps(1000),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    }


def _hunyuan_dit(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "timestep": noise.timesteps(1000),
        "encoder_hidden_states": noise(BATCH, 4, 24),
        "text_embedding_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "encoder_hidden_states_t5": noise(BATCH, TEXT, 24),
        "text_embedding_mask_t5": torch.ones(BATCH, TEXT, dtype=torch.long),
        "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]] * BATCH),
        "style": torch.zeros(BATCH, dtype=torch.long),
    }


def _wan(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 2, 4, 4),
        "timestep": noise.timesteps(1000),
        "encoder_hidden_states": noise(BATCH, TEXT, TEXT_WIDTH),
    }


def _wan_image(noise: Noise) -> dict[str, Any]:
    # The class takes the last 512 tokens of the context to be text and what is before them to be an image.
    text = noise(BATCH, 512, TEXT_WIDTH)
    return {**_wan(noise), "encoder_hidden_states": text, "encoder_hidden_states_image": noise(BATCH, 3, 16)}


def _wan_vace(noise: Noise) -> dict[str, Any]:
    # Two latents of 4 channels and a mask of 8x8 pixels for each of their positions.
    return {**_wan(noise), "control_hidden_states": noise(BATCH, 72, 2, 4, 4)}


def _ltx(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 8, 4),
        "encoder_hidden_states": noise(BATCH, TEXT, TEXT_WIDTH),
        "timestep": noise.timesteps(1000),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        "num_frames": 2,
        "height": 2,
        "width": 2,
    }


def _cogvideox(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 2, 4, 4, 4),
        "encoder_hidden_states": noise(BATCH, TEXT, TEXT_WIDTH),
        "timestep": noise.timesteps(1000),
    }


_HEADS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12}
_FLUX = {
    **_HEADS,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (4, 4, 4),
}
_WAN = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}
_PIXART = {
    **_HEADS,
    "in_channels": 4,
    "num_layers": 2,
    "cross_attention_dim": 24,
    "caption_channels": TEXT_WIDTH,
    "sample_size": 8,
}
_SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 12,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT_WIDTH,
    "caption_projection_dim": 36,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
}

#: Name -> model, at least one of each family.
TRANSFORMERS: dict[str, TinyTransformer] = {
    "pixart": TinyTransformer("PixArtTransformer2DModel", _PIXART, _pixart),
    "sd3": TinyTransformer("SD3Transformer2DModel", _SD3, _sd3),
    "sd3.5": TinyTransformer(
        "SD3Transformer2DModel", {**_SD3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}, _sd3
    ),
    "flux": TinyTransformer(
        "FluxTransformer2DModel", {**_FLUX, "pooled_projection_dim": 16, "guidance_embeds": True}, _flux
    ),
    "flux2": TinyTransformer("Flux2Transformer2DModel", {**_FLUX, "axes_dims_rope": (2, 2, 4, 4)}, _flux2),
    "qwen-image": TinyTransformer(
        "QwenImageTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "joint_attention_dim": TEXT_WIDTH,
            "axes_dims_rope": (4, 4, 4),
        },
        _qwen_image,
    ),
    "z-image": TinyTransformer(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 24,
            "n_layers": 2,
            "n_refiner_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": TEXT_WIDTH,
            "axes_dims": [4, 4, 4],
            "axes_lens": [64, 64, 64],
        },
        _z_image,
    ),
    "lumina2": TinyTransformer(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (32, 32, 32),
            "cap_feat_dim": TEXT_WIDTH,
        },
        _lumina2,
    ),
    "sana": TinyTransformer(
        "SanaTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": TEXT_WIDTH,
            "sample_size": 4,
        },
        _sana,
    ),
    "hunyuan-dit": TinyTransformer(
        "HunyuanDiT2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 24,
            "num_layers": 6,
            "cross_attention_dim": 24,
            "cross_attention_dim_t5": 24,
            "pooled_projection_dim": 16,
            "text_len": 4,
            "text_len_t5": TEXT,
        },
        _hunyuan_dit,
    ),
    "wan": TinyTransformer("WanTransformer3DModel", _WAN, _wan),
    "wan-image": TinyTransformer(
        "WanTransformer3DModel", {**_WAN, "image_dim": 16, "added_kv_proj_dim": 24}, _wan_image
    ),
    "wan-vace": TinyTransformer(
        "WanVACETransformer3DModel", {**_WAN, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 72}, _wan_vace
    ),
    "ltx": TinyTransformer(
        "LTXVideoTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 24,
            "num_layers": 2,
            "caption_channels": TEXT_WIDTH,
        },
        _ltx,
    ),
    "cogvideox": TinyTransformer(
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": TEXT_WIDTH,
            "num_layers": 2,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": 5,
            "max_text_seq_length": TEXT,
        },
        _cogvideox,
    ),
}
