"""Real diffusers pipelines around the tiny transformers: embeddings in the place of prompts, latents as output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from tiny import tiny_vae
from tiny_transformers import TEXT, TEXT_WIDTH, TRANSFORMERS, Noise

ONE_ENCODER = dict.fromkeys(("text_encoder", "tokenizer"))
TWO_ENCODERS = {**ONE_ENCODER, **dict.fromkeys(("text_encoder_2", "tokenizer_2"))}
STEPS = 2


@dataclass(frozen=True)
class TinyPipeline:
    """How to make one pipeline and the arguments of one call of it.

    Attributes:
        class_name: a class of `diffusers`.
        transformer: a name in `TRANSFORMERS`.
        scheduler: makes the scheduler.
        arguments: keyword arguments of the call, from a source of random numbers.
        others: the remaining components, most of them None.
        vae: makes the autoencoder, or None where the pipeline does without one.
    """

    class_name: str
    transformer: str
    scheduler: Callable[[], Any]
    arguments: Callable[[Noise], dict[str, Any]]
    others: dict[str, Any]
    vae: Callable[[], Any] | None = None

    def pipeline(self, seed: int = 0) -> Any:
        """The pipeline."""
        found = getattr(diffusers, self.class_name)(
            transformer=TRANSFORMERS[self.transformer].model(seed),
            scheduler=self.scheduler(),
            vae=None if self.vae is None else self.vae(),
            **self.others,
        )
        found.set_progress_bar_config(disable=True)
        return found

    def inputs(self, seed: int = 1) -> dict[str, Any]:
        """Arguments of a call."""
        return {**self.arguments(Noise(seed)), "num_inference_steps": STEPS, "output_type": "latent"}


def flow() -> Any:
    """The scheduler of flow matching."""
    return diffusers.FlowMatchEulerDiscreteScheduler()


def dynamic_flow() -> Any:
    """As `flow`, shifted by the number of tokens."""
    return diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def tiny_image_vae() -> Any:
    """An autoencoder of 4 channels and a factor of 2, with what the pipelines of newer models ask of it."""
    vae = tiny_vae()
    vae.register_to_config(shift_factor=0.0)
    return vae


def tiny_wan_vae() -> Any:
    """An autoencoder of videos, 4 channels, a factor of 8 in space and 4 in time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        ).eval()


def _masked(noise: Noise) -> dict[str, Any]:
    mask = torch.ones(1, TEXT, dtype=torch.long)
    return {
        "prompt_embeds": noise(1, TEXT, TEXT_WIDTH),
        "negative_prompt_embeds": noise(1, TEXT, TEXT_WIDTH),
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
    }


def _pooled(noise: Noise) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, TEXT, TEXT_WIDTH),
        "negative_prompt_embeds": noise(1, TEXT, TEXT_WIDTH),
        "pooled_prompt_embeds": noise(1, 16),
        "negative_pooled_prompt_embeds": noise(1, 16),
    }


def _plain(noise: Noise) -> dict[str, Any]:
    return {
        "prompt_embeds": noise(1, TEXT, TEXT_WIDTH),
        "negative_prompt_embeds": noise(1, TEXT, TEXT_WIDTH),
    }


def _guided(noise: Noise) -> dict[str, Any]:
    return {"prompt_embeds": noise(1, TEXT, TEXT_WIDTH)}


def _listed(noise: Noise) -> dict[str, Any]:
    return {"prompt_embeds": [noise(TEXT, TEXT_WIDTH)], "negative_prompt_embeds": [noise(3, TEXT_WIDTH)]}


def _hunyuan_dit(noise: Noise) -> dict[str, Any]:
    first, second = torch.ones(1, 4, dtype=torch.long), torch.ones(1, TEXT, dtype=torch.long)
    return {
        "prompt_embeds": noise(1, 4, 24),
        "negative_prompt_embeds": noise(1, 4, 24),
        "prompt_embeds_2": noise(1, TEXT, 24),
        "negative_prompt_embeds_2": noise(1, TEXT, 24),
        "prompt_attention_mask": first,
        "negative_prompt_attention_mask": first,
        "prompt_attention_mask_2": second,
        "negative_prompt_attention_mask_2": second,
    }


def _with(arguments: Callable[[Noise], dict[str, Any]], **more: Any) -> Callable[[Noise], dict[str, Any]]:
    return lambda noise: {**arguments(noise), **more}


#: Sizes for pipelines without an autoencoder, which take its factor to be 8.
_SQUARE = {"height": 32, "width": 32}
_VIDEO = {**_SQUARE, "num_frames": 5}

PIPELINES: dict[str, TinyPipeline] = {
    "pixart": TinyPipeline(
        "PixArtAlphaPipeline",
        "pixart",
        diffusers.DDIMScheduler,
        _with(_masked, height=16, width=16, negative_prompt=None, use_resolution_binning=False),
        ONE_ENCODER,
        tiny_image_vae,
    ),
    "sd3": TinyPipeline(
        "StableDiffusion3Pipeline",
        "sd3.5",
        flow,
        _with(_pooled, height=16, width=16),
        {**TWO_ENCODERS, **dict.fromkeys(("text_encoder_3", "tokenizer_3"))},
        tiny_image_vae,
    ),
    "flux": TinyPipeline(
        "FluxPipeline",
        "flux",
        dynamic_flow,
        _with(_pooled, height=16, width=16),
        TWO_ENCODERS,
        tiny_image_vae,
    ),
    "flux2": TinyPipeline("Flux2Pipeline", "flux2", dynamic_flow, _with(_guided, **_SQUARE), ONE_ENCODER),
    "qwen-image": TinyPipeline("QwenImagePipeline", "qwen-image", dynamic_flow, _with(_plain, **_SQUARE), ONE_ENCODER),
    "z-image": TinyPipeline("ZImagePipeline", "z-image", dynamic_flow, _with(_listed, **_SQUARE), ONE_ENCODER),
    "lumina2": TinyPipeline("Lumina2Pipeline", "lumina2", dynamic_flow, _with(_masked, **_SQUARE), ONE_ENCODER),
    "sana": TinyPipeline(
        "SanaPipeline",
        "sana",
        flow,
        _with(_masked, height=128, width=128, negative_prompt=None, use_resolution_binning=False),
        ONE_ENCODER,
    ),
    "hunyuan-dit": TinyPipeline(
        "HunyuanDiTPipeline",
        "hunyuan-dit",
        diffusers.DDIMScheduler,
        _with(_hunyuan_dit, height=16, width=16, use_resolution_binning=False),
        {**TWO_ENCODERS, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
        tiny_image_vae,
    ),
    "wan": TinyPipeline("WanPipeline", "wan", flow, _with(_plain, **_VIDEO), ONE_ENCODER),
    "wan-vace": TinyPipeline(
        "WanVACEPipeline",
        "wan-vace",
        flow,
        _with(_plain, **_VIDEO),
        ONE_ENCODER,
        tiny_wan_vae,
    ),
    "ltx": TinyPipeline(
        "LTXPipeline", "ltx", dynamic_flow, _with(_masked, height=64, width=64, num_frames=9), ONE_ENCODER
    ),
    "cogvideox": TinyPipeline(
        "CogVideoXPipeline",
        "cogvideox",
        diffusers.CogVideoXDDIMScheduler,
        _with(_plain, **_VIDEO),
        ONE_ENCODER,
    ),
}
