"""Sampling with classifier-free guidance: on any diffusers scheduler that adds no noise of its own, or as DiT does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hqdit.errors import CheckpointError, NumericsError, UsageError
from hqdit.models.adapter import class_conditional_adapter
from hqdit.progress import track
from hqdit.sampling.ddpm_original import AncestralSchedule, training_betas
from hqdit.sampling.noise import SAMPLE, starting_noise, step_noise

#: Called at every step with (step, timestep, the model's input: latents after the scheduler's scaling).
StepObserver = Callable[[int, int, Tensor], None]

#: Gives the standard normal numbers that an ancestral sampler adds at a step.
StepNoise = Callable[[int], Tensor]

#: The model's own scheduler, which has to be deterministic; or DiT's ancestral sampler.
SCHEDULER, DDPM_ORIGINAL = SAMPLERS = ("scheduler", "ddpm-original")

#: Latent channels that the code published with DiT guides (arXiv 2212.09748).
ORIGINAL_GUIDED_CHANNELS = 3

BATCH_SIZE = 64

#: diffusers' schedulers that add no noise of their own; others are refused, because images would not be repeatable.
DETERMINISTIC_SCHEDULERS = (
    "DDIMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)


class ImageStore(Protocol):
    """Keeps finished batches of images, and has those of an earlier run with the same arguments."""

    def finished(self, batch: int) -> Tensor | None:
        """The images of a batch, or None."""

    def keep(self, batch: int, images: Tensor) -> None:
        """Keep the images of a batch."""


@dataclass(frozen=True)
class SamplingConfig:
    """How to sample.

    Attributes:
        steps: denoising steps, at least 1.
        guidance: classifier-free guidance scale; 1.0 runs the conditional branch only.
        sampler: one of `SAMPLERS`.

    Raises:
        UsageError: out of range.
    """

    steps: int = 50
    guidance: float = 1.5
    sampler: str = SCHEDULER

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"--steps: found {self.steps}, needed at least 1. Fix: 50 is a good start")
        if not 0.0 <= self.guidance < float("inf"):
            raise UsageError(
                f"--guidance: found {self.guidance}, needed a finite number of at least 0. Fix: 1.0 switches it off"
            )
        if self.sampler not in SAMPLERS:
            raise UsageError(
                f"--sampler: found {self.sampler!r}, needed one of {', '.join(SAMPLERS)}. Fix: pick one of them"
            )


def require_deterministic(scheduler: Any) -> None:
    """Raise `CheckpointError` for a scheduler that draws new noise at every step, or that is not known not to."""
    algorithm = str(scheduler.config.get("algorithm_type", ""))
    if type(scheduler).__name__ not in DETERMINISTIC_SCHEDULERS or algorithm.startswith("sde"):
        raise CheckpointError(
            f"scheduler: found {f'{type(scheduler).__name__} {algorithm}'.strip()}, which draws new noise at every "
            f"step or is not known not to, needed one of {', '.join(DETERMINISTIC_SCHEDULERS)}. "
            "Fix: replace the pipeline's scheduler by DDIMScheduler"
        )


def require_classes(classes: list[int], model: nn.Module) -> None:
    """Raise `UsageError` for a class that the model does not have."""
    count = class_conditional_adapter(model).num_classes(model)
    for label in classes:
        if not 0 <= label < count:
            raise UsageError(f"--classes: found {label}, needed a number from 0 to {count - 1}. Fix: pick such a class")


def require_guidance(model: nn.Module, guidance: float) -> None:
    """Raise `UsageError` for guidance on a model without a null class."""
    if guidance != 1.0 and class_conditional_adapter(model).null_class(model) is None:
        raise UsageError(
            f"--guidance: found {guidance} for a model without a null class, needed 1.0. Fix: pass --guidance 1.0"
        )


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
    predict = class_conditional_adapter(model).predict_noise
    if guidance == 1.0:
        return predict(model, latents, timesteps, classes), None
    conditional, unconditional = predict(model, *_both_branches(model, latents, timesteps, classes, guidance)).chunk(2)
    return conditional, unconditional


def _both_branches(
    model: nn.Module, latents: Tensor, timesteps: Tensor, classes: Tensor, guidance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """A model's inputs twice, the second time with the null class; raises as `predict_branches`."""
    require_guidance(model, guidance)
    null_class = class_conditional_adapter(model).null_class(model)
    assert null_class is not None  # require_guidance made sure of it
    labels = torch.cat([classes, torch.full_like(classes, null_class)])
    return torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), labels


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
        observe: called before every step with what the model will see.
        what: title of the progress bar.

    Returns:
        Latents, shape of `noise`.

    Raises:
        UsageError: another sampler than the scheduler is asked for.
        CheckpointError: a scheduler that draws noise at every step, or one with fractional time steps.
        NumericsError: a latent became NaN or infinite.
    """
    if config.sampler != SCHEDULER:
        raise UsageError(
            f"--sampler: found {config.sampler} where a trajectory has to be that of the model's scheduler, needed "
            f"{SCHEDULER}. Fix: use the other sampler for images only"
        )
    require_deterministic(scheduler)
    require_steps(scheduler, config.steps)
    scheduler.set_timesteps(config.steps)
    if any(float(timestep) != int(timestep) for timestep in scheduler.timesteps):
        raise CheckpointError(
            f"scheduler: found {type(scheduler).__name__} with fractional time steps at {config.steps} steps, needed "
            "whole ones. Fix: choose --steps that divides its training steps, or replace it by DDIMScheduler"
        )
    latents: Tensor = noise * scheduler.init_noise_sigma
    for step, timestep in enumerate(track(scheduler.timesteps, what)):
        scaled = scheduler.scale_model_input(latents, timestep)
        if observe is not None:
            observe(step, int(timestep), scaled)
        times = torch.full((latents.shape[0],), int(timestep), dtype=torch.long, device=latents.device)
        branches = predict_branches(model, scaled, times, classes, config.guidance)
        latents = scheduler.step(guide(*branches, config.guidance), timestep, latents).prev_sample
        _require_finite(latents, step, int(timestep))
    return latents


def _require_finite(latents: Tensor, step: int, timestep: int) -> None:
    if not bool(torch.isfinite(latents).all()):
        raise NumericsError(
            f"sampling: latents became NaN or infinite at step {step} (time step {timestep}), needed finite numbers. "
            "Fix: sample in float32, or check the model with hqdit evaluate"
        )


@torch.no_grad()
def sample_ancestral(
    model: nn.Module,
    scheduler: Any,
    noise: Tensor,
    classes: Tensor,
    config: SamplingConfig,
    fresh_noise: StepNoise,
    what: str = "sampling",
) -> Tensor:
    """Denoise `noise` as the code published with DiT does: see `sampling.ddpm_original`.

    Arguments and result as of `sample_latents`; of the scheduler only the training variances are taken.

    Args:
        fresh_noise: step -> standard normal numbers, shape of `noise`; asked at every step but the last.

    Raises:
        UsageError: a model without a learned variance, or a number of steps out of range.
        CheckpointError: a scheduler whose variances are not linear.
        NumericsError: a latent became NaN or infinite.
    """
    schedule = AncestralSchedule.respaced(training_betas(scheduler), config.steps)
    latents = noise
    for step, index in enumerate(track(range(config.steps - 1, -1, -1), what)):
        timestep = schedule.timesteps[index]
        times = torch.full((latents.shape[0],), timestep, dtype=torch.long, device=latents.device)
        predicted, variance = _predict_as_original(model, latents, times, classes, config.guidance)
        fresh = fresh_noise(step).to(latents.device) if index else None
        latents = schedule.step(index, latents, predicted, variance, fresh)
        _require_finite(latents, step, timestep)
    return latents


def _predict_as_original(
    model: nn.Module, latents: Tensor, timesteps: Tensor, classes: Tensor, guidance: float
) -> tuple[Tensor, Tensor]:
    """Noise, guided on the first channels only, and variance; everything unguided is the conditional branch's."""
    predict = class_conditional_adapter(model).predict_noise_and_variance
    if guidance == 1.0:
        return predict(model, latents, timesteps, classes)
    noise, variance = predict(model, *_both_branches(model, latents, timesteps, classes, guidance))
    conditional, unconditional = noise.chunk(2)
    first = slice(ORIGINAL_GUIDED_CHANNELS)
    guided = guide(conditional[:, first], unconditional[:, first], guidance)
    return torch.cat([guided, conditional[:, ORIGINAL_GUIDED_CHANNELS:]], dim=1), variance.chunk(2)[0]


def generate_images(
    model: nn.Module,
    scheduler: Any,
    vae: Any | None,
    classes: Sequence[int],
    config: SamplingConfig,
    seed: int = 0,
    purpose: str = SAMPLE,
    batch_size: int = BATCH_SIZE,
    what: str = "sampling",
    store: ImageStore | None = None,
) -> Tensor:
    """One image per entry of `classes`; image i depends on `seed`, `purpose` and i only.

    Args:
        model: a transformer with an adapter.
        scheduler: a diffusers scheduler; a deterministic one, unless `config` asks for another sampler.
        vae: decodes latents; None for a model on pixels.
        classes: class of each image.
        config: steps and guidance.
        seed: of the noise.
        purpose: noise stream, see `sampling.noise`.
        batch_size: images at once; speed only.
        what: title of the progress bar.
        store: batches that it has finished are taken from there, and the others are kept there.

    Returns:
        float32 (len(classes), channels, height, width) in [-1, 1], on the CPU.

    Raises:
        UsageError: no class, a class out of range, or batch_size below 1.
        NumericsError: non-finite latents.
    """
    if not classes or batch_size < 1:
        raise UsageError(
            f"--classes, batch size: found {len(classes)} images in batches of {batch_size}, needed at least 1 of "
            "each. Fix: ask for an image"
        )
    require_classes(list(classes), model)
    device = next(model.parameters()).device
    shape = class_conditional_adapter(model).latent_shape(model)
    images = []
    starts = range(0, len(classes), batch_size)
    for number, start in enumerate(starts):
        finished = None if store is None else store.finished(number)
        if finished is None:
            indices = range(start, min(start + batch_size, len(classes)))
            noise = starting_noise(seed, purpose, indices, shape).to(device)
            labels = torch.tensor([classes[index] for index in indices], device=device)
            title = what if len(starts) == 1 else f"{what} ({number + 1} of {len(starts)})"
            if config.sampler == DDPM_ORIGINAL:
                fresh = partial(step_noise, seed, purpose, indices, shape=shape)
                latents = sample_ancestral(model, scheduler, noise, labels, config, fresh, title)
            else:
                latents = sample_latents(model, scheduler, noise, labels, config, what=title)
            finished = decode_images(latents, vae).cpu()
            if store is not None:
                store.keep(number, finished)
        images.append(finished)
    return torch.cat(images)


@torch.no_grad()
def decode_images(latents: Tensor, vae: Any | None) -> Tensor:
    """Images in [-1, 1]: through the autoencoder, or the latents themselves for a model on pixels.

    Clipping happens here, at the end, and nowhere else.

    Returns:
        float32 (samples, channels, height, width).
    """
    if vae is None:
        images = latents
    else:
        images = vae.decode(latents.to(device=vae.device, dtype=vae.dtype) / vae.config.scaling_factor).sample
    clipped: Tensor = images.to(torch.float32).clamp(-1.0, 1.0)
    return clipped


def to_uint8(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8 (samples, height, width, channels): round(127.5 x + 127.5)."""
    return ((images + 1.0) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
