"""Deterministic sampling with classifier-free guidance on any diffusers scheduler that adds no noise of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hqdit.errors import CheckpointError, NumericsError, UsageError
from hqdit.models.adapter import adapter_for
from hqdit.progress import track

#: Called at every step with (step, timestep, latents before the step).
StepObserver = Callable[[int, int, Tensor], None]


#: Parts of the class names of diffusers' schedulers that draw new noise at every step.
STOCHASTIC_SCHEDULERS = ("DDPM", "Ancestral", "SDE", "LCM", "TCD")


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample.

    Attributes:
        steps: denoising steps, at least 1.
        guidance: classifier-free guidance scale; 1.0 runs the conditional branch only.

    Raises:
        UsageError: out of range.
    """

    steps: int = 50
    guidance: float = 1.5

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"--steps: found {self.steps}, needed at least 1. Fix: 50 is a good start")
        if not 0.0 <= self.guidance < float("inf"):
            raise UsageError(
                f"--guidance: found {self.guidance}, needed a finite number of at least 0. Fix: 1.0 switches it off"
            )


def require_classes(classes: list[int], model: nn.Module) -> None:
    """Raise `UsageError` for a class that the model does not have."""
    count = adapter_for(model).num_classes(model)
    for label in classes:
        if not 0 <= label < count:
            raise UsageError(f"--classes: found {label}, needed a number from 0 to {count - 1}. Fix: pick such a class")


def require_steps(scheduler: Any, steps: int) -> None:
    """Raise `UsageError` for more steps than the scheduler was trained with."""
    available = int(scheduler.config.num_train_timesteps)
    if steps > available:
        raise UsageError(f"--steps: found {steps}, needed at most {available}, the scheduler's own. Fix: lower it")


def predict_branches(
    model: nn.Module, latents: Tensor, timesteps: Tensor, classes: Tensor, guidance: float
) -> tuple[Tensor, Tensor | None]:
    """(conditional, unconditional) noise predictions; the second is None at guidance 1.0.

    Raises:
        UsageError: guidance other than 1.0 on a model without a null class.
    """
    adapter = adapter_for(model)
    if guidance == 1.0:
        return adapter.predict_noise(model, latents, timesteps, classes), None
    null_class = adapter.null_class(model)
    if null_class is None:
        raise UsageError(
            f"--guidance: found {guidance} for a model without a null class, needed 1.0. Fix: pass --guidance 1.0"
        )
    both = adapter.predict_noise(
        model,
        torch.cat([latents, latents]),
        torch.cat([timesteps, timesteps]),
        torch.cat([classes, torch.full_like(classes, null_class)]),
    )
    conditional, unconditional = both.chunk(2)
    return conditional, unconditional


def guide(conditional: Tensor, unconditional: Tensor | None, guidance: float) -> Tensor:
    """eps_null + guidance (eps_class - eps_null), over all channels as in diffusers' DiTPipeline.

    Source: Ho & Salimans, arXiv 2207.12598, equation 6.
    """
    return conditional if unconditional is None else unconditional + guidance * (conditional - unconditional)


@torch.no_grad()
def sample_latents(
    model: nn.Module,
    scheduler: Any,
    noise: Tensor,
    classes: Tensor,
    config: SamplingConfig,
    observe: StepObserver | None = None,
    what: str = "sampling",
) -> Tensor:
    """Denoise `noise` over the scheduler's time steps.

    Args:
        model: a transformer with an adapter.
        scheduler: a diffusers scheduler; it must be deterministic.
        noise: (samples, channels, height, width), on the model's device.
        classes: int64 (samples,).
        config: steps and guidance.
        observe: called before every step.
        what: title of the progress bar.

    Returns:
        Latents, shape of `noise`.

    Raises:
        CheckpointError: the scheduler draws noise at every step.
        NumericsError: a latent became NaN or infinite.
    """
    if any(marker in type(scheduler).__name__ for marker in STOCHASTIC_SCHEDULERS):
        raise CheckpointError(
            f"scheduler: found {type(scheduler).__name__}, which draws new noise at every step, needed a deterministic "
            "one. Fix: replace the pipeline's scheduler by DDIMScheduler"
        )
    require_steps(scheduler, config.steps)
    scheduler.set_timesteps(config.steps)
    latents: Tensor = noise * scheduler.init_noise_sigma
    for step, timestep in enumerate(track(scheduler.timesteps, what)):
        if observe is not None:
            observe(step, int(timestep), latents)
        scaled = scheduler.scale_model_input(latents, timestep)
        times = torch.full((latents.shape[0],), int(timestep), dtype=torch.long, device=latents.device)
        branches = predict_branches(model, scaled, times, classes, config.guidance)
        latents = scheduler.step(guide(*branches, config.guidance), timestep, latents).prev_sample
        if not bool(torch.isfinite(latents).all()):
            raise NumericsError(
                f"sampling: latents became NaN or infinite at step {step} (time step {int(timestep)}), needed finite "
                "numbers. Fix: sample in float32, or check the model with hqdit evaluate"
            )
    return latents


@torch.no_grad()
def decode_images(latents: Tensor, vae: Any | None) -> Tensor:
    """Images in [-1, 1]: through the autoencoder, or the latents themselves for a model on pixels.

    Clipping happens here, at the end, and nowhere else.

    Returns:
        float32 (samples, channels, height, width).
    """
    images = latents if vae is None else vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    clipped: Tensor = images.to(torch.float32).clamp(-1.0, 1.0)
    return clipped


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 (samples, height, width, channels): round(127.5 x + 127.5)."""
    return ((images + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
