"""The steps of DiT's own sampler: ancestral DDPM on fewer steps than in training, with a learned variance.

Source: Nichol & Dhariwal, arXiv 2102.09672, equations 9 to 11 (posterior), 15 (variance) and section 4 (fewer steps);
used by DiT (arXiv 2212.09748), section 4. What is drawn and what the model predicts come from the caller.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hqdit.errors import CheckpointError, UsageError

FEWEST_STEPS = 2

Float64 = npt.NDArray[np.float64]


def respaced_timesteps(train_steps: int, steps: int) -> list[int]:
    """`steps` evenly spaced time steps from 0 to `train_steps` - 1, both included, ascending.

    The spacing is exact; halves are rounded to the even neighbour.

    Raises:
        UsageError: fewer than two steps, or more than in training.
    """
    if not FEWEST_STEPS <= steps <= train_steps:
        raise UsageError(
            f"--steps: found {steps}, needed {FEWEST_STEPS} to {train_steps} with --sampler ddpm-original. "
            "Fix: 250 is what DiT was evaluated with"
        )
    return [round(Fraction((train_steps - 1) * index, steps - 1)) for index in range(steps)]


def training_betas(scheduler: Any) -> Float64:
    """The linear variances that a diffusers scheduler's configuration describes: float64 (training steps,).

    diffusers keeps its own in float32, which would shift the products of a thousand of them.

    Raises:
        CheckpointError: variances that are not linear, or a model that does not predict noise.
    """
    config = scheduler.config
    kind, target = str(config.get("beta_schedule")), str(config.get("prediction_type", "epsilon"))
    is_rescaled = bool(config.get("rescale_betas_zero_snr"))
    if kind != "linear" or config.get("trained_betas") is not None or is_rescaled or target != "epsilon":
        raise CheckpointError(
            f"scheduler: found {'rescaled' if is_rescaled else kind} variances and prediction type {target}, needed "
            "linear ones and epsilon, which --sampler ddpm-original is made for. Fix: use --sampler scheduler"
        )
    return np.linspace(config.beta_start, config.beta_end, config.num_train_timesteps, dtype=np.float64)


@dataclass(frozen=True)
class AncestralSchedule:
    """Which time steps are visited, and what each of them needs; index 0 is the last one to be taken.

    Attributes:
        timesteps: of training, ascending (steps,).
        alphas_cumprod: share of the signal that is left at each of them, float64 (steps,).
        betas: variance of the forward process from one visited step to the next, float64 (steps,).
        posterior_variances: of the reverse process if the image were known, float64 (steps,); 0 at index 0.
    """

    timesteps: tuple[int, ...]
    alphas_cumprod: Float64
    betas: Float64
    posterior_variances: Float64

    @classmethod
    def respaced(cls, training_variances: Float64, steps: int) -> AncestralSchedule:
        """The schedule of `steps` evenly spaced steps of a training with these variances.

        Its betas are those for which the visited steps keep their share of the signal:
        beta_k = 1 - abar_k / abar_(k-1).

        Raises:
            UsageError: see `respaced_timesteps`.
        """
        visited = respaced_timesteps(len(training_variances), steps)
        kept = np.cumprod(1.0 - training_variances, dtype=np.float64)[visited]
        before = np.append(1.0, kept[:-1])
        betas = 1.0 - kept / before
        return cls(tuple(visited), kept, betas, betas * (1.0 - before) / (1.0 - kept))

    def step(self, index: int, latents: Tensor, noise: Tensor, interpolation: Tensor, fresh: Tensor | None) -> Tensor:
        """Latents one visited step earlier.

        Args:
            index: into `timesteps`.
            latents: float32, any shape.
            noise: predicted, shape of `latents`.
            interpolation: the model's variance output; -1 stands for the posterior's variance, 1 for the forward
                process's, logarithms in between and beyond.
            fresh: standard normal numbers, shape of `latents`; None at index 0, where the mean is the result.

        Returns:
            float32, shape of `latents`. Nothing is clipped.
        """
        kept, beta = float(self.alphas_cumprod[index]), float(self.betas[index])
        before = float(self.alphas_cumprod[index - 1]) if index else 1.0
        image = latents * kept**-0.5 - noise * (1.0 / kept - 1.0) ** 0.5
        of_image = beta * before**0.5 / (1.0 - kept)
        of_latents = (1.0 - before) * (1.0 - beta) ** 0.5 / (1.0 - kept)
        mean: Tensor = of_image * image + of_latents * latents
        if fresh is None:
            return mean
        share = (interpolation + 1.0) / 2.0
        least = float(np.log(self.posterior_variances[index]))
        deviation: Tensor = torch.exp(0.5 * (least + share * (float(np.log(beta)) - least)))
        return mean + deviation * fresh
