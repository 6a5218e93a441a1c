"""How the errors of single steps become the error of an image: measurements behind the experiment `timesteps`.

Source: the update of DDIM (arXiv 2010.02502, equation 12) is affine in the latents and the noise prediction.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hqdit.errors import CheckpointError
from hqdit.evaluation.fidelity import EvaluationInputs
from hqdit.progress import track
from hqdit.sampling.sampler import guide, predict_branches

Float64Array = npt.NDArray[np.float64]


def error_powers(x: Tensor, exact: Tensor | None = None) -> Float64Array:
    """Sum of squares of every sample of `x`, or of its difference from `exact`: float64 (pairs,)."""
    difference = x.to(torch.float64) if exact is None else x.to(torch.float64) - exact
    powers: Float64Array = difference.square().flatten(1).sum(dim=1).cpu().numpy()
    return powers


def step_coefficients(scheduler: Any, steps: int) -> list[tuple[float, float]]:
    """(a, b) of every step's update x' = a x + b eps, found by stepping from units.

    Raises:
        CheckpointError: the update is not of that form, as with clipping.
    """
    scheduler.set_timesteps(steps)
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    coefficients = []
    for timestep in scheduler.timesteps:
        a, b, both, scaled = (
            float(scheduler.step(eps, timestep, x).prev_sample)
            for eps, x in ((zero, one), (one, zero), (one, one), (zero, 100 * one))
        )
        # float32 results of a few operations each.
        if max(abs(both - (a + b)), abs(scaled / 100 - a)) > 1e-5 * (abs(a) + abs(b)):
            raise CheckpointError(
                f"scheduler: found {type(scheduler).__name__} with an update at time step {int(timestep)} that is not "
                "linear in latents and noise, needed a linear one. Fix: use DDIMScheduler without clipping"
            )
        coefficients.append((a, b))
    return coefficients


def sampler_powers(coefficients: list[tuple[float, float]], local: Float64Array) -> Float64Array:
    """Power of the latents' error if the steps' errors were independent and only the sampler carried them on.

    Args:
        coefficients: (a, b) of every step.
        local: power of the noise prediction's error at every step, (steps, pairs).

    Returns:
        (steps + 1, pairs): E_0 = 0, E_{k+1} = a^2 E_k + b^2 local_k.
    """
    powers = [np.zeros(local.shape[1])]
    for (a, b), power in zip(coefficients, local, strict=True):
        powers.append(a * a * powers[-1] + b * b * power)
    return np.stack(powers)


@torch.no_grad()
def trajectory_powers(
    exact: nn.Module, quantized: nn.Module, scheduler: Any, noise: Tensor, classes: Tensor, steps: int, guidance: float
) -> dict[str, Float64Array]:
    """Powers along the trajectories of both models from the same noise.

    Args:
        exact: the float model.
        quantized: the one to judge.
        scheduler: one whose update `step_coefficients` accepts.
        noise: (pairs, channels, height, width).
        classes: int64 (pairs,).
        steps: of the sampler.
        guidance: of the sampler.

    Returns:
        All float64, the first four (steps + 1, pairs): `signal`, of the float latents; `error`, of the quantized
        trajectory; `independent`, the sum over earlier steps of the error that remains if the quantized model predicts
        at that step only and the float model at all others; `sampler`, `sampler_powers` of the local errors. And
        `final_by_step` (steps, pairs): the terms of the last row of `independent`.
    """
    coefficients = step_coefficients(scheduler, steps)
    timesteps = scheduler.timesteps

    def predicted(model: nn.Module, latents: Tensor, step: int) -> Tensor:
        labels = classes.repeat(len(latents) // len(classes))
        times = torch.full_like(labels, int(timesteps[step]))
        return guide(*predict_branches(model, latents, times, labels, guidance), guidance)

    def advanced(latents: Tensor, eps: Tensor, step: int) -> Tensor:
        following: Tensor = scheduler.step(eps, timesteps[step], latents).prev_sample
        return following

    state = found = noise
    carried = noise[:0]  # one set of pairs for every earlier step, in their order: only that step was quantized
    zeros = np.zeros(len(noise))
    local, terms = [], np.zeros((0, len(noise)))
    powers = {"signal": [error_powers(noise)], "error": [zeros], "independent": [zeros]}
    for step in track(range(steps), "errors of single steps"):
        true, wrong = (predicted(model, state, step) for model in (exact, quantized))
        local.append(error_powers(wrong, true))
        if step:
            carried = advanced(carried, predicted(exact, carried, step), step)
        carried = torch.cat([carried, advanced(state, wrong, step)])
        found = advanced(found, predicted(quantized, found, step), step)
        state = advanced(state, true, step)
        terms = error_powers(carried, state.repeat(step + 1, 1, 1, 1)).reshape(step + 1, len(noise))
        powers["signal"].append(error_powers(state))
        powers["error"].append(error_powers(found, state))
        powers["independent"].append(terms.sum(axis=0))
    return {
        **{name: np.stack(values) for name, values in powers.items()},
        "sampler": sampler_powers(coefficients, np.stack(local)),
        "final_by_step": terms,
    }


@torch.no_grad()
def branch_powers(
    exact: nn.Module, quantized: nn.Module, inputs: EvaluationInputs, guidances: tuple[float, ...]
) -> dict[str, Float64Array]:
    """Powers of both branches' errors, the errors' inner product, and powers after guidance.

    Returns:
        name -> float64 (timesteps, pairs): `conditional`, `unconditional` and `product` of the errors, `signal` of the
        conditional prediction, and for every guidance g `guided g` (error) and `guided g signal`.
    """
    found: dict[str, list[Float64Array]] = {}

    def add(name: str, values: Float64Array) -> None:
        found.setdefault(name, []).append(values)

    for timestep, latents in zip(inputs.timesteps, inputs.latents, strict=True):
        times = torch.full_like(inputs.classes, timestep)
        # Any guidance but 1.0 asks for both branches.
        true = predict_branches(exact, latents, times, inputs.classes, 0.0)
        seen = predict_branches(quantized, latents, times, inputs.classes, 0.0)
        assert true[1] is not None and seen[1] is not None
        conditional = seen[0].to(torch.float64) - true[0]
        unconditional = seen[1].to(torch.float64) - true[1]
        add("conditional", error_powers(conditional))
        add("unconditional", error_powers(unconditional))
        add("product", (conditional * unconditional).flatten(1).sum(dim=1).cpu().numpy())
        add("signal", error_powers(true[0]))
        for guidance in guidances:
            signal = guide(*true, guidance)
            add(f"guided {guidance:g}", error_powers(guide(*seen, guidance), signal))
            add(f"guided {guidance:g} signal", error_powers(signal))
    return {name: np.stack(values) for name, values in found.items()}
