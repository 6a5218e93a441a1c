"""Paired fidelity: how far a quantized model is from its float original on the same inputs.

All noise comes from the evaluation stream, which is disjoint from calibration's and sampling's by construction.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hqdit.errors import NumericsError, UsageError
from hqdit.evaluation.bootstrap import bootstrap_interval
from hqdit.layers.linear import HQLinear
from hqdit.models.adapter import class_conditional_adapter
from hqdit.numerics.error import decibel
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.smoothing import smoothed_twin
from hqdit.progress import track
from hqdit.records.run_record import Interval
from hqdit.sampling.noise import EVALUATION, starting_noise
from hqdit.sampling.sampler import SamplingConfig, guide, predict_branches, sample_latents
from hqdit.transforms.rotation import rotate_folded

#: (latent, class) pairs per time step.
PAIRS = 32
#: Fewest time steps of an evaluation, also of a model that samples in fewer.
MIN_TIMESTEPS = 8


@dataclass(frozen=True)
class EvaluationInputs:
    """Noisy latents from the float model's own trajectories.

    Attributes:
        latents: one float32 (pairs, channels, height, width) per time step.
        timesteps: the time steps, in the order of sampling.
        classes: int64 (pairs,).
    """

    latents: tuple[Tensor, ...]
    timesteps: tuple[int, ...]
    classes: Tensor


def evaluation_inputs(exact: nn.Module, scheduler: Any, sampling: SamplingConfig, seed: int) -> EvaluationInputs:
    """`PAIRS` trajectories of the float model, kept at every step that the sampler takes, and at least at 8.

    Not at a few of them: the SQNR falls by tens of dB towards t = 0, so that a handful of steps which includes the
    last one measures that step and little else.
    """
    adapter = class_conditional_adapter(exact)
    device = next(exact.parameters()).device
    noise = starting_noise(seed, EVALUATION, range(PAIRS), adapter.latent_shape(exact)).to(device)
    classes = torch.arange(PAIRS, device=device) % adapter.num_classes(exact)
    latents: list[Tensor] = []
    timesteps: list[int] = []

    def keep(_step: int, timestep: int, current: Tensor) -> None:
        latents.append(current.clone())
        timesteps.append(timestep)

    enough = dataclasses.replace(sampling, steps=max(sampling.steps, MIN_TIMESTEPS))
    sample_latents(exact, scheduler, noise, classes, enough, keep, what="evaluation trajectories")
    return EvaluationInputs(tuple(latents), tuple(timesteps), classes)


@dataclass(frozen=True, eq=False)
class NoisePowers:
    """Powers of one prediction, per time step and trajectory.

    Attributes:
        signal: sum of squares of the exact prediction, float64 (timesteps, pairs).
        noise: sum of squares of the difference, the same shape.
    """

    signal: npt.NDArray[np.float64]
    noise: npt.NDArray[np.float64]

    @property
    def db(self) -> float:
        """SQNR over everything."""
        return decibel(float(self.signal.sum()), float(self.noise.sum()))

    @property
    def db_interval(self) -> Interval:
        """SQNR over everything, with its 95 % bootstrap interval over trajectories."""
        pairs = np.stack([self.signal.sum(axis=0), self.noise.sum(axis=0)], axis=1)
        return bootstrap_interval(pairs, lambda rows: decibel(float(rows[:, 0].sum()), float(rows[:, 1].sum())))

    @property
    def db_by_timestep(self) -> tuple[float, ...]:
        """SQNR over the trajectories, per time step."""
        return tuple(
            decibel(float(s), float(n)) for s, n in zip(self.signal.sum(axis=1), self.noise.sum(axis=1), strict=True)
        )


class PowerRecorder:
    """Collects `NoisePowers`, one time step after another."""

    def __init__(self) -> None:
        self._signal: list[Tensor] = []
        self._noise: list[Tensor] = []

    def add(self, exact: Tensor, approximate: Tensor) -> None:
        """Both (pairs, ...): what belongs to the next time step."""
        exact64 = exact.detach().to(torch.float64)
        self._signal.append(exact64.square().flatten(1).sum(dim=1))
        self._noise.append((approximate.detach().to(torch.float64) - exact64).square().flatten(1).sum(dim=1))

    @property
    def powers(self) -> NoisePowers:
        """Everything added so far."""
        return NoisePowers(torch.stack(self._signal).cpu().numpy(), torch.stack(self._noise).cpu().numpy())


def mean_db_interval(layers: Mapping[str, NoisePowers]) -> Interval:
    """Mean over the layers of each one's SQNR, with its 95 % bootstrap interval over trajectories."""
    sums = [powers.signal.sum(axis=0) for powers in layers.values()]
    sums += [powers.noise.sum(axis=0) for powers in layers.values()]

    def mean_db(rows: npt.NDArray[np.float64]) -> float:
        signal, noise = np.split(rows.sum(axis=0), 2)
        return math.fsum(decibel(float(s), float(n)) for s, n in zip(signal, noise, strict=True)) / len(signal)

    return bootstrap_interval(np.stack(sums, axis=1), mean_db)


@dataclass(frozen=True, eq=False)
class NoiseFidelity:
    """How well the noise is predicted, over all kept inputs.

    Attributes:
        timesteps: in the order of sampling.
        branches: "conditional", and with a null class "unconditional" and `guided_branch(g)` for every guidance.
        judged: the branch that the sampler uses: guided, or conditional without a null class.
    """

    timesteps: tuple[int, ...]
    branches: Mapping[str, NoisePowers]
    judged: str

    @property
    def conditional(self) -> float:
        """SQNR with the class, in dB."""
        return self.branches["conditional"].db

    @property
    def unconditional(self) -> float | None:
        """SQNR with the null class, in dB; None without a null class."""
        return self.branches["unconditional"].db if "unconditional" in self.branches else None

    @property
    def guided(self) -> float | None:
        """SQNR after classifier-free guidance (the first scale), in dB; None without a null class."""
        return self.branches[self.judged].db if self.judged != "conditional" else None

    @property
    def by_timestep(self) -> tuple[tuple[int, float], ...]:
        """(time step, SQNR of the judged branch in dB)."""
        return tuple(zip(self.timesteps, self.branches[self.judged].db_by_timestep, strict=True))

    def to_json(self) -> dict[str, Any]:
        """The figures in dB as plain JSON values."""
        return {
            "conditional": self.conditional,
            "unconditional": self.unconditional,
            "guided": self.guided,
            "by_timestep": [list(pair) for pair in self.by_timestep],
        }


def guided_branch(guidance: float) -> str:
    """Name in `NoiseFidelity.branches` of the prediction after guidance."""
    return f"guided {guidance:g}"


#: Both branches at one time step; the unconditional one is None without a null class.
Branches = tuple[Tensor, Tensor | None]


@torch.no_grad()
def noise_predictions(model: nn.Module, inputs: EvaluationInputs) -> list[Branches]:
    """What `model` predicts at every time step of `inputs`, before guidance."""
    has_null = class_conditional_adapter(model).null_class(model) is not None
    # Both branches are looked at even where guidance 1.0 would skip one, so ask for them with another scale.
    branch_scale = 0.0 if has_null else 1.0
    predictions = []
    for timestep, latents in track(list(zip(inputs.timesteps, inputs.latents, strict=True)), "noise predictions"):
        times = torch.full_like(inputs.classes, timestep)
        predictions.append(predict_branches(model, latents, times, inputs.classes, branch_scale))
    return predictions


def noise_fidelity(
    exact: nn.Module, quantized: nn.Module, inputs: EvaluationInputs, *guidances: float
) -> NoiseFidelity:
    """Compare noise predictions at the same x_t.

    Args:
        exact: the float model.
        quantized: the one to judge.
        inputs: from `evaluation_inputs`.
        guidances: as in `prediction_fidelity`.

    Raises:
        NumericsError: the quantized model predicts NaN or infinity.
    """
    true, found = (noise_predictions(model, inputs) for model in (exact, quantized))
    return prediction_fidelity(true, found, inputs.timesteps, *guidances)


def prediction_fidelity(
    exact: Sequence[Branches], quantized: Sequence[Branches], timesteps: tuple[int, ...], *guidances: float
) -> NoiseFidelity:
    """Compare what `noise_predictions` returned for two models.

    Args:
        exact: of the float model.
        quantized: of the one to judge.
        timesteps: of both.
        guidances: scales of classifier-free guidance; the first is the one that is judged. With 1.0 the guided
            prediction is the conditional one. Not looked at for a model without a null class.

    Raises:
        NumericsError: the quantized model predicts NaN or infinity.
    """
    recorders: dict[str, PowerRecorder] = {}

    def add(branch: str, true: Tensor, found: Tensor) -> None:
        recorders.setdefault(branch, PowerRecorder()).add(true, found)

    for timestep, true, found in zip(timesteps, exact, quantized, strict=True):
        if not all(bool(torch.isfinite(branch).all()) for branch in found if branch is not None):
            raise NumericsError(
                f"evaluation: the quantized model predicts NaN or infinity at time step {timestep}, needed finite "
                "numbers. Fix: quantize again, or check the checkpoint with hqdit inspect"
            )
        add("conditional", true[0], found[0])
        if true[1] is not None and found[1] is not None:
            add("unconditional", true[1], found[1])
            for guidance in guidances:
                add(guided_branch(guidance), guide(*true, guidance), guide(*found, guidance))
    powers = {branch: recorder.powers for branch, recorder in recorders.items()}
    judged = guided_branch(guidances[0]) if "unconditional" in powers and guidances else "conditional"
    return NoiseFidelity(timesteps, powers, judged)


@contextmanager
def _observing(model: nn.Module, hooks: dict[str, Callable[..., None]]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def layer_powers(exact: nn.Module, quantized: nn.Module, inputs: EvaluationInputs) -> dict[str, NoisePowers]:
    """Output error of every quantized layer on the inputs that the float model's conditional branch gives it.

    Each layer is judged alone: errors of earlier layers do not enter. Where part of a rotation is folded into the
    value projection, inputs and outputs are compared in the rotated basis, which does not change the ratio; where
    smoothing is folded into earlier layers, they are those of the float model with the same folds.
    """
    exact = smoothed_twin(exact, quantized)
    layers = quantized_layers(quantized)
    folded: dict[str, HQLinear] = {}
    for site in class_conditional_adapter(exact).sites(exact):
        layer = layers.get(site.name)
        if layer is not None and layer.spec.rotation.is_folded and site.value_site is not None:
            folded[site.value_site] = layer
    recorders = {name: PowerRecorder() for name in layers}

    def compare(name: str, layer: HQLinear) -> Callable[..., None]:
        reader = folded.get(name)

        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0]
            if layer.spec.rotation.is_folded and layer.signs is not None:
                x = rotate_folded(x, layer.spec.rotation, layer.signs)
            if reader is not None and reader.signs is not None:
                output = rotate_folded(output, reader.spec.rotation, reader.signs)
            recorders[name].add(output, layer(x))

        return hook

    with _observing(exact, {name: compare(name, layer) for name, layer in layers.items()}):
        for timestep, latents in track(list(zip(inputs.timesteps, inputs.latents, strict=True)), "layer outputs"):
            times = torch.full_like(inputs.classes, timestep)
            predict_branches(exact, latents, times, inputs.classes, 1.0)
    return {name: recorder.powers for name, recorder in recorders.items()}


def layer_fidelity(exact: nn.Module, quantized: nn.Module, inputs: EvaluationInputs) -> dict[str, float]:
    """SQNR in dB of what `layer_powers` compares, per quantized layer."""
    return {name: powers.db for name, powers in layer_powers(exact, quantized, inputs).items()}


def psnr_of_images(exact: Tensor, approximate: Tensor) -> list[float]:
    """Peak signal to noise ratio of every image, in dB; infinite where both are equal.

    Args:
        exact: floating point images (samples, ...) in [-1, 1], so that the peak is 2.
        approximate: the same shape.
    """
    mse = (approximate.to(torch.float64) - exact.to(torch.float64)).square().flatten(1).mean(dim=1)
    return [math.inf if error == 0 else 10 * math.log10(4.0 / error) for error in mse.tolist()]


def psnr_db(exact: Tensor, approximate: Tensor) -> float:
    """Mean of `psnr_of_images`, in dB; infinite if any pair of images is equal."""
    ratios = psnr_of_images(exact, approximate)
    return sum(ratios) / len(ratios)


def require_same_shape(exact: nn.Module, quantized: nn.Module) -> None:
    """Raise `UsageError` unless both models take the same inputs."""
    facts = []
    for model in (exact, quantized):
        adapter = class_conditional_adapter(model)
        facts.append((*adapter.latent_shape(model), adapter.num_classes(model), len(adapter.blocks(model))))
    if facts[0] != facts[1]:
        raise UsageError(
            f"--against: found models with (channels, height, width, classes, blocks) {facts[1]} and {facts[0]}, "
            "needed equal ones. Fix: compare a quantized model with its own original"
        )
