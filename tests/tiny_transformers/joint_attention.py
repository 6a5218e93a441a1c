"""Tiny models of `hqdit.models.families.joint_attention`."""

from __future__ import annotations

from typing import Any

import torch

from tiny_transformers.recipe import BATCH, CHANNELS, HEADS, TEXT, TEXT_WIDTH, Noise, TinyTransformer, mask, positions


def _sd3(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "encoder_hidden_states": noise.text(),
        "pooled_projections": noise(BATCH, 16),
        "timestep": noise.timesteps(),
    }


def _aura_flow(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 8, 8),
        "encoder_hidden_states": noise.text(),
        "timestep": noise.timesteps(1),
    }


def _packed(noise: Noise, axes: int = 3) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 8, 4),
        "encoder_hidden_states": noise.text(),
        "timestep": noise.timesteps(1),
        "img_ids": positions(8, axes),
        "txt_ids": positions(TEXT, axes) if axes == 4 else torch.zeros(TEXT, axes),
    }


def _guided(arguments: dict[str, Any]) -> dict[str, Any]:
    return {**arguments, "guidance": torch.full((BATCH,), 3.5)}


def _flux(noise: Noise) -> dict[str, Any]:
    return _guided({**_packed(noise), "pooled_projections": noise(BATCH, 16)})


def _flux2(noise: Noise) -> dict[str, Any]:
    return _guided(_packed(noise, axes=4))


def _chroma(noise: Noise) -> dict[str, Any]:
    return {**_packed(noise), "attention_mask": torch.ones(BATCH, TEXT + 8)}


def _bria_fibo(noise: Noise) -> dict[str, Any]:
    return {**_packed(noise), "text_encoder_layers": [noise.text(16) for _ in range(4)]}


def _qwen_image(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 16),
        "encoder_hidden_states": noise.text(),
        "encoder_hidden_states_mask": torch.ones(BATCH, TEXT, dtype=torch.bool),
        "timestep": noise.timesteps(1),
        "img_shapes": [[(1, 2, 2)]] * BATCH,
    }


def _hunyuan_image(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 4, 4),
        "timestep": noise.timesteps(),
        "encoder_hidden_states": noise.text(),
        "encoder_attention_mask": mask(),
    }


def _hunyuan_video(noise: Noise) -> dict[str, Any]:
    video = {"hidden_states": noise(BATCH, 4, 2, 4, 4), "pooled_projections": noise(BATCH, 16)}
    return _guided({**_hunyuan_image(noise), **video})


def _framepack(noise: Noise) -> dict[str, Any]:
    return {
        **_hunyuan_video(noise),
        "image_embeds": noise(BATCH, 3, 16),
        "indices_latents": torch.arange(2),
        "latents_clean": noise(BATCH, 4, 2, 4, 4),
        "indices_latents_clean": torch.arange(2),
        "latents_history_2x": noise(BATCH, 4, 2, 4, 4),
        "indices_latents_history_2x": torch.arange(2),
        "latents_history_4x": noise(BATCH, 4, 4, 8, 8),
        "indices_latents_history_4x": torch.arange(4),
    }


def _mochi(noise: Noise) -> dict[str, Any]:
    return {
        "hidden_states": noise(BATCH, 4, 2, 4, 4),
        "timestep": noise.timesteps(),
        "encoder_hidden_states": noise.text(24),
        "encoder_attention_mask": mask().bool(),
    }


_SD3 = {
    **CHANNELS,
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 12,
    "num_attention_heads": 3,
    "joint_attention_dim": TEXT_WIDTH,
    "caption_projection_dim": 36,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
}
_AURA_FLOW = {
    **HEADS,
    **CHANNELS,
    "sample_size": 8,
    "num_mmdit_layers": 2,
    "num_single_dit_layers": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "caption_projection_dim": 24,
    "pos_embed_max_size": 16,
}
_FLUX = {
    **HEADS,
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (4, 4, 4),
}
_CHROMA = {**_FLUX, "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
_QWEN_IMAGE = {
    **HEADS,
    "in_channels": 16,
    "out_channels": 4,
    "num_layers": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "axes_dims_rope": (4, 4, 4),
}
_HUNYUAN = {
    **HEADS,
    **CHANNELS,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_refiner_layers": 2,
    "text_embed_dim": TEXT_WIDTH,
}
_HUNYUAN_VIDEO = {**_HUNYUAN, "pooled_projection_dim": 16, "rope_axes_dim": (4, 4, 4)}
_MOCHI = {
    **HEADS,
    "num_layers": 2,
    "pooled_projection_dim": 12,
    "in_channels": 4,
    "text_embed_dim": 24,
    "time_embed_dim": 8,
    "max_sequence_length": 16,
}

JOINT_ATTENTION = {
    "sd3": TinyTransformer("SD3Transformer2DModel", _SD3, _sd3),
    "sd3.5": TinyTransformer(
        "SD3Transformer2DModel", {**_SD3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}, _sd3
    ),
    "flux": TinyTransformer(
        "FluxTransformer2DModel", {**_FLUX, "pooled_projection_dim": 16, "guidance_embeds": True}, _flux
    ),
    "bria": TinyTransformer("BriaTransformer2DModel", _FLUX, _packed),
    "bria-fibo": TinyTransformer("BriaFiboTransformer2DModel", {**_FLUX, "text_encoder_dim": 16}, _bria_fibo),
    "chroma": TinyTransformer("ChromaTransformer2DModel", _CHROMA, _chroma),
    "longcat-image": TinyTransformer("LongCatImageTransformer2DModel", {**_FLUX, "pooled_projection_dim": 16}, _packed),
    "ovis-image": TinyTransformer("OvisImageTransformer2DModel", {**_FLUX, "out_channels": 4}, _packed),
    "flux2": TinyTransformer("Flux2Transformer2DModel", {**_FLUX, "axes_dims_rope": (2, 2, 4, 4)}, _flux2),
    "qwen-image": TinyTransformer("QwenImageTransformer2DModel", _QWEN_IMAGE, _qwen_image),
    "hunyuan-image": TinyTransformer(
        "HunyuanImageTransformer2DModel", {**_HUNYUAN, "rope_axes_dim": (6, 6)}, _hunyuan_image
    ),
    "hunyuan-video": TinyTransformer("HunyuanVideoTransformer3DModel", _HUNYUAN_VIDEO, _hunyuan_video),
    # Here one modulation layer runs twice in a block.
    "hunyuan-video-image": TinyTransformer(
        "HunyuanVideoTransformer3DModel", {**_HUNYUAN_VIDEO, "image_condition_type": "token_replace"}, _hunyuan_video
    ),
    "framepack": TinyTransformer(
        "HunyuanVideoFramepackTransformer3DModel",
        {**_HUNYUAN_VIDEO, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        _framepack,
    ),
    "mochi": TinyTransformer("MochiTransformer3DModel", _MOCHI, _mochi),
    "aura-flow": TinyTransformer("AuraFlowTransformer2DModel", _AURA_FLOW, _aura_flow),
}
