"""What enters each layer, before and after the planned rotation: maxima, moments and histograms.

Source: HQ-DiT (arXiv 2405.19751), section 3: activations with outlier channels, and what a Hadamard rotation does to
them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from hqdit.analysis.moments import Float64Array, Moments
from hqdit.analysis.trajectories import NoisyInputs, before_forward, run_each_timestep
from hqdit.errors import NumericsError, UsageError
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.plan import plan_quantization
from hqdit.pipeline.rotation_check import signs_of
from hqdit.transforms.rotation import RotationSpec, rotate

#: Bins of `activation_histograms`.
BINS = 120


@dataclass(frozen=True, eq=False)
class Distribution:
    """The numbers that enter a layer, over all samples, tokens and time steps.

    Attributes:
        channel_absmax: largest magnitude, float32 (timesteps, channels).
        by_timestep: moments over samples, tokens and channels, arrays (timesteps,).
        by_channel: moments over samples, tokens and time steps, arrays (channels,).
    """

    channel_absmax: npt.NDArray[np.float32]
    by_timestep: Moments
    by_channel: Moments

    @property
    def overall(self) -> Moments:
        """Moments of all numbers together, arrays without axes."""
        return self.by_timestep.pooled(0)

    @property
    def max_over_median(self) -> float:
        """The largest channel maximum over the median one: 1 for equal channels, infinite if half are silent."""
        return _max_over_median(self.channel_absmax.max(axis=0))

    @property
    def max_over_median_by_timestep(self) -> tuple[float, ...]:
        """`max_over_median` within each time step."""
        return tuple(_max_over_median(maxima) for maxima in self.channel_absmax)

    @property
    def variance_between_channels(self) -> float:
        """Variance of the channels' means; with `variance_within_channels` it adds up to the overall variance."""
        return float(self.by_channel.mean.var())

    @property
    def variance_within_channels(self) -> float:
        """Mean of the channels' variances over samples, tokens and time steps."""
        return float(self.by_channel.variance.mean())


@dataclass(frozen=True, eq=False)
class ActivationStatistics:
    """One layer's input.

    Attributes:
        timesteps: the time steps, in the order of sampling.
        rotation: what it is rotated by, as `RotationSpec.describe` says it.
        before: as the float model computes it.
        after: after the whole planned rotation, the folded part included; `before` itself where nothing is rotated.
    """

    timesteps: tuple[int, ...]
    rotation: str
    before: Distribution
    after: Distribution


@dataclass(frozen=True, eq=False)
class ActivationHistogram:
    """Densities of one layer's input, in units of its root mean square, which a rotation does not change.

    Attributes:
        edges: float64 (bins + 1,), equally far apart, symmetric about 0.
        before: float64 (bins,), its integral over the edges is 1.
        after: the same after the planned rotation.
    """

    edges: Float64Array
    before: Float64Array
    after: Float64Array


@torch.no_grad()
def activation_statistics(
    model: nn.Module, inputs: NoisyInputs, config: QuantizationConfig, sites: Sequence[str] | None = None
) -> dict[str, ActivationStatistics]:
    """Statistics of the inputs of the layers that `config` would quantize, on the model's conditional branch.

    Batches are summed in float64 as they come; what is kept grows with time steps times channels, not with samples.
    Layers that read one input (q, k and v) share one object.

    Args:
        model: a float model with an adapter; not changed.
        inputs: noisy latents; `evaluation.fidelity.evaluation_inputs` draws them from held-out noise.
        config: its rotation and seed decide what "after" is, and its patterns which layers are planned.
        sites: names of layers; None for all that are planned.

    Returns:
        Layer name -> statistics, in the order of the forward pass.

    Raises:
        UsageError: a name in `sites` that is not planned, or a quantized model.
        NumericsError: an activation that is NaN or infinite.
    """
    watched = _watch(model, config, sites)
    gathered = {entry.first: (_Gathering(), _Gathering()) for entry in watched}

    def look(entry: _Watched) -> Callable[[Tensor], None]:
        def hook(x: Tensor) -> None:
            rows = _finite_rows(x, entry.first)
            before, after = gathered[entry.first]
            before.add(rows)
            if not entry.rotation.is_identity:
                after.add(entry.rotated(rows))

        return hook

    with before_forward(model, {entry.first: look(entry) for entry in watched}):
        for _ in run_each_timestep(model, inputs, "activation statistics"):
            pass
    timesteps = tuple(inputs.timesteps)
    found = {}
    for entry in watched:
        before, after = gathered[entry.first]
        original = before.distribution()
        transformed = original if entry.rotation.is_identity else after.distribution()
        statistics = ActivationStatistics(timesteps, entry.rotation.describe(), original, transformed)
        found.update(dict.fromkeys(entry.names, statistics))
    return found


@torch.no_grad()
def activation_histograms(
    model: nn.Module,
    inputs: NoisyInputs,
    config: QuantizationConfig,
    statistics: Mapping[str, ActivationStatistics],
    bins: int = BINS,
) -> dict[str, ActivationHistogram]:
    """Histograms over the range that `activation_statistics` found, for the layers in `statistics`.

    Args:
        model: as for `activation_statistics`.
        inputs: the same ones.
        config: the same one.
        statistics: what that function returned, or the part of it that is of interest.
        bins: how many.

    Returns:
        Layer name -> histogram.

    Raises:
        NumericsError: the inputs hold numbers outside the range that the statistics know.
    """
    watched = _watch(model, config, list(statistics))
    tops, counts = {}, {}
    for entry in watched:
        of_layer = statistics[entry.first]
        unit = math.sqrt(float(of_layer.before.overall.mean_square)) or 1.0
        absmax = max(float(of_layer.before.overall.absmax), float(of_layer.after.overall.absmax))
        tops[entry.first] = (max(math.ceil(absmax / unit), 1), unit)
        counts[entry.first] = np.zeros((2, bins))

    def look(entry: _Watched) -> Callable[[Tensor], None]:
        top, unit = tops[entry.first]

        def hook(x: Tensor) -> None:
            rows = _finite_rows(x, entry.first)
            for row, values in zip(counts[entry.first], (rows, entry.rotated(rows)), strict=True):
                scaled = values.to(torch.float64).flatten().cpu().numpy() / unit
                batch = np.histogram(scaled, bins, (-top, top))[0]
                if batch.sum() != scaled.size:
                    raise NumericsError(
                        f"{entry.first}: found {int(scaled.size - batch.sum())} activations outside the range of the "
                        "statistics, needed the same inputs for both. Fix: compute the statistics on these inputs"
                    )
                row += batch

        return hook

    with before_forward(model, {entry.first: look(entry) for entry in watched}):
        for _ in run_each_timestep(model, inputs, "activation histograms"):
            pass
    found = {}
    for entry in watched:
        edges = np.linspace(-tops[entry.first][0], tops[entry.first][0], bins + 1)
        total = counts[entry.first].sum(axis=1, keepdims=True)
        before, after = counts[entry.first] / total / (edges[1] - edges[0])
        found.update(dict.fromkeys(entry.names, ActivationHistogram(edges, before, after)))
    return found


@dataclass(frozen=True, eq=False)
class _Watched:
    """Planned layers that read one input; the hook sits on the first."""

    names: tuple[str, ...]
    rotation: RotationSpec
    signs: Tensor | None

    @property
    def first(self) -> str:
        return self.names[0]

    def rotated(self, rows: Tensor) -> Tensor:
        return rotate(rows, self.rotation, None if self.signs is None else self.signs.to(rows.device))


def _watch(model: nn.Module, config: QuantizationConfig, sites: Sequence[str] | None) -> list[_Watched]:
    plan = plan_quantization(model, config)
    planned = {layer.site.name: layer for layer in plan.layers}
    for name in sites or ():
        if name not in planned:
            raise UsageError(
                f"activation statistics: found the layer {name!r}, needed some of the {len(planned)} that would be "
                f"quantized. Fix: for example {next(iter(planned))}"
            )
    groups: dict[str, list[str]] = {}
    for name, layer in planned.items():
        if sites is None or name in sites:
            groups.setdefault(layer.site.input_group, []).append(name)
    return [
        _Watched(tuple(names), planned[names[0]].rotation, signs_of(planned[names[0]], config.seed))
        for names in groups.values()
    ]


class _Gathering:
    """Running sums of one side of one layer, a time step at a time."""

    def __init__(self) -> None:
        self._absmax: list[npt.NDArray[np.float32]] = []
        self._by_timestep: list[Moments] = []
        self._by_channel: Moments | None = None

    def add(self, rows: Tensor) -> None:
        """All rows (tokens, channels) of the next time step."""
        channels = Moments.of_columns(rows)
        self._absmax.append(channels.absmax.astype(np.float32))
        self._by_timestep.append(channels.pooled(0))
        before = self._by_channel
        self._by_channel = channels if before is None else Moments.stack([before, channels]).pooled(0)

    def distribution(self) -> Distribution:
        assert self._by_channel is not None  # inputs hold at least one time step
        return Distribution(np.stack(self._absmax), Moments.stack(self._by_timestep), self._by_channel)


def _finite_rows(x: Tensor, where: str) -> Tensor:
    rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
    if not bool(torch.isfinite(rows).all()):
        raise NumericsError(
            f"{where}: found a NaN or an infinity in its input, needed finite activations. Fix: check the model's "
            "weights and the inputs"
        )
    return rows


def _max_over_median(maxima: npt.NDArray[np.float32]) -> float:
    largest, median = float(maxima.max()), float(np.median(maxima))
    if median > 0:
        return largest / median
    return math.inf if largest > 0 else 1.0
