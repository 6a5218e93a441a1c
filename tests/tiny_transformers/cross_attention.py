"""Tiny models of `hqdit.models.families.cross_attention`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

from tiny_transformers.recipe import BATCH, CHANNELS, HEADS, TEXT, TEXT_WIDTH, Noise, TinyTransformer, mask


def _image(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "encoder_hidden_states": noise.text(),
        "timestep": noise.timesteps(),
        "encoder_attention_mask": mask(),
    }


def _pixart(noise: Noise) -> dict[str, Any]:
    return {**_image(noise), "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def _video(noise: Noise, size: int = 8) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 2, size, size),
        "encoder_hidden_states": noise.text(),
        "timestep": noise.timesteps(),
    }


def _ltx(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 8, 4),
        "encoder_hidden_states": noise.text(),
        "timestep": noise.timesteps(),
        "encoder_attention_mask": mask(),
        "num_frames": 2,
        "height": 2,
        "width": 2,
    }


def _sana_video(noise: Noise) -> dict[str, Any]:
    return {**_video(noise, 4), "encoder_attention_mask": mask()}


def _hunyuan_dit(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "timestep": noise.timesteps(),
        "encoder_hidden_states": noise(BATCH, 4, 24),
        "text_embedding_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "encoder_hidden_states_t5": noise.text(24),
        "text_embedding_mask_t5": torch.ones(BATCH, TEXT, dtype=torch.long),
        "image_meta_size": torch.tensor([[64.0, 64, 64, 64, 0, 0]] * BATCH),
        "style": torch.zeros(BATCH, dtype=torch.long),
    }


def _wan(noise: Noise) -> dict[str, Any]:
    return _video(noise, 4)


def _wan_image(noise: Noise) -> dict[str, Any]:
    # The class takes the last 512 tokens of the context to be text and what is before them to be an image.
    text = noise(BATCH, 512, TEXT_WIDTH)
    return {**_wan(noise), "encoder_hidden_states": text, "encoder_hidden_states_image": noise(BATCH, 3, 16)}


def _wan_vace(noise: Noise) -> dict[str, Any]:
    # Two latents of 4 channels and a mask of 8x8 pixels for each of their positions.
    return {**_wan(noise), "control_hidden_states": noise(BATCH, 72, 2, 4, 4)}


def _lumina_next(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "timestep": noise.timesteps(1),
        "encoder_hidden_states": noise.text(),
        "encoder_mask": mask(),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(12, 8, 8),
        "cross_attention_kwargs": {},
    }


_TEXT: dict[str, Any] = {"num_layers": 2, "cross_attention_dim": 24, "caption_channels": TEXT_WIDTH}
_SANA = {**HEADS, **CHANNELS, **_TEXT, "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "sample_size": 4}
_WAN = {
    **HEADS,
    **CHANNELS,
    "text_dim": TEXT_WIDTH,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}
_LATTE = {
    **HEADS,
    **CHANNELS,
    **_TEXT,
    "attention_bias": True,
    "sample_size": 8,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "video_length": 2,
}
_HUNYUAN_DIT = {
    **HEADS,
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
}
_LUMINA_NEXT = {
    "sample_size": 8,
    "in_channels": 4,
    "hidden_size": 24,
    "num_layers": 2,
    "num_attention_heads": 2,
    "num_kv_heads": 1,
    "multiple_of": 8,
    "cross_attention_dim": TEXT_WIDTH,
}

CROSS_ATTENTION = {
    "pixart": TinyTransformer(
        "PixArtTransformer2DModel", {**HEADS, **_TEXT, "in_channels": 4, "sample_size": 8}, _pixart
    ),
    "allegro": TinyTransformer(
        "AllegroTransformer3DModel",
        {**HEADS, **CHANNELS, **_TEXT, "sample_height": 8, "sample_width": 8, "sample_frames": 2},
        _video,
    ),
    "ltx": TinyTransformer("LTXVideoTransformer3DModel", {**HEADS, **CHANNELS, **_TEXT}, _ltx),
    "latte": TinyTransformer("LatteTransformer3DModel", _LATTE, _video),
    "sana": TinyTransformer("SanaTransformer2DModel", _SANA, _image),
    "sana-video": TinyTransformer("SanaVideoTransformer3DModel", {**_SANA, "rope_max_seq_len": 16}, _sana_video),
    "hunyuan-dit": TinyTransformer("HunyuanDiT2DModel", _HUNYUAN_DIT, _hunyuan_dit),
    "wan": TinyTransformer("WanTransformer3DModel", _WAN, _wan),
    "wan-image": TinyTransformer(
        "WanTransformer3DModel", {**_WAN, "image_dim": 16, "added_kv_proj_dim": 24}, _wan_image
    ),
    "skyreels": TinyTransformer("SkyReelsV2Transformer3DModel", _WAN, _wan),
    "chrono-edit": TinyTransformer("ChronoEditTransformer3DModel", _WAN, _wan),
    "wan-vace": TinyTransformer(
        "WanVACETransformer3DModel", {**_WAN, "num_layers": 3, "vace_layers": [0, 2], "vace_in_channels": 72}, _wan_vace
    ),
    "lumina-next": TinyTransformer("LuminaNextDiT2DModel", _LUMINA_NEXT, _lumina_next),
}
