"""Tiny models of `hqdit.models.families.one_stream`."""

from __future__ import annotations

from typing import Any

import torch

from tiny_transformers.recipe import BATCH, CHANNELS, HEADS, TEXT, TEXT_WIDTH, Noise, TinyTransformer, mask


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
        "encoder_hidden_states": noise.text(),
        "encoder_attention_mask": mask(),
    }


def _cogvideox(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 2, 4, 4, 4),
        "encoder_hidden_states": noise.text(),
        "timestep": noise.timesteps(),
    }


def _cogview(noise: Noise) -> dict[str, Any]:
    size = torch.tensor([[64.0, 64.0]] * BATCH)
    return {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "encoder_hidden_states": noise.text(),
        "timestep": noise.timesteps(),
        "original_size": size,
        "target_size": size,
        "crop_coords": torch.zeros_like(size),
    }


_Z_IMAGE: dict[str, Any] = {
    "in_channels": 4,
    "dim": 24,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": TEXT_WIDTH,
    "axes_dims": [4, 4, 4],
    "axes_lens": [64, 64, 64],
}
_LUMINA2: dict[str, Any] = {
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
}
_COG: dict[str, Any] = {**CHANNELS, "time_embed_dim": 8, "text_embed_dim": TEXT_WIDTH, "num_layers": 2}
_COGVIDEOX: dict[str, Any] = {
    **_COG,
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "sample_width": 4,
    "sample_height": 4,
    "sample_frames": 5,
    "max_text_seq_length": TEXT,
}
_COGVIEW: dict[str, Any] = {**_COG, **HEADS, "condition_dim": 4, "pos_embed_max_size": 8, "sample_size": 8}

ONE_STREAM = {
    "z-image": TinyTransformer("ZImageTransformer2DModel", _Z_IMAGE, _z_image),
    "lumina2": TinyTransformer("Lumina2Transformer2DModel", _LUMINA2, _lumina2),
    "cogvideox": TinyTransformer("CogVideoXTransformer3DModel", _COGVIDEOX, _cogvideox),
    "consisid": TinyTransformer("ConsisIDTransformer3DModel", _COGVIDEOX, _cogvideox),
    "cogview3": TinyTransformer("CogView3PlusTransformer2DModel", _COGVIEW, _cogview),
    # Here one MLP runs twice in a block, on the image and on the text.
    "cogview4": TinyTransformer("CogView4Transformer2DModel", {**_COGVIEW, "rope_axes_dim": (8, 8)}, _cogview),
}
