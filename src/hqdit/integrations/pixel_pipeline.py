"""A diffusers pipeline for class-conditional transformers that work on pixels, such as the bundled `digits`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from PIL import Image

from hqdit.errors import UsageError
from hqdit.sampling.sampler import SamplingConfig, generate_images, to_uint8


def as_pil(images: torch.Tensor) -> list[Image.Image]:
    """PIL images of a uint8 batch (samples, height, width, channels); one channel becomes grey."""
    return [Image.fromarray((image[..., 0] if image.shape[-1] == 1 else image).cpu().numpy()) for image in images]


class PixelDiTPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Transformer and scheduler without an autoencoder; latents are the pixels.

    Args:
        transformer: a float or quantized model with an adapter.
        scheduler: a deterministic diffusers scheduler.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 1.5,
        num_inference_steps: int = 50,
        seed: int = 0,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Images of the classes asked for.

        Args:
            class_labels: one class per image.
            guidance_scale: classifier-free guidance scale; 1.0 switches it off.
            num_inference_steps: denoising steps.
            seed: image i depends on `seed` and i only, never on the batch.
            output_type: "pil", or "pt" for a uint8 tensor (samples, height, width, channels).

        Raises:
            UsageError: a class, step count or guidance out of range, or another output type.
            NumericsError: non-finite latents.
        """
        if output_type not in ("pil", "pt"):
            raise UsageError(f"output_type: found {output_type!r}, needed 'pil' or 'pt'. Fix: pass one of them")
        config = SamplingConfig(num_inference_steps, guidance_scale)
        images = to_uint8(generate_images(self.transformer, self.scheduler, None, class_labels, config, seed))
        return ImagePipelineOutput(images=as_pil(images) if output_type == "pil" else images)
