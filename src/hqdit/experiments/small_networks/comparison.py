"""A quantized small network beside its float original, on the same held-out samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hqdit.evaluation.bootstrap import bootstrap_interval, bootstrap_mean
from hqdit.experiments.small_networks.examples import Examples
from hqdit.experiments.small_networks.networks import SmallNetwork, scale_normalized_channels
from hqdit.experiments.small_networks.quantization import Setting, quantize_network
from hqdit.experiments.small_networks.training import scores
from hqdit.layers.linear import HQLinear
from hqdit.numerics.error import SignalToNoise, decibel
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.records.run_record import Interval

Float64Array = npt.NDArray[np.float64]


@torch.no_grad()
def compare(
    network: SmallNetwork, setting: Setting, factor: float, calibration: Tensor, examples: Examples
) -> dict[str, Any]:
    """Quantize and judge; plain values.

    Args:
        network: as it was trained; not changed.
        setting: how it is quantized.
        factor: c of the injected outliers; 1.0 for none.
        calibration: inputs for GPTQ.
        examples: held out.

    Returns:
        score: per sample, see `training.scores`.
        signal: sum of squares of the float network's `centered` logits, per sample.
        noise: sum of squares of the logits' error, per sample.
        layer_sqnr_db: layer -> output SQNR on the float network's inputs, so that errors of earlier layers do not
            enter.
        formats: layer -> format of weight and input.
    """
    exact = scale_normalized_channels(copy.deepcopy(network), factor)
    quantized = quantize_network(exact, setting, calibration)
    layers = quantized_layers(quantized)
    ratios = {name: SignalToNoise() for name in layers}

    def judge(name: str, layer: HQLinear) -> Callable[..., None]:
        return lambda _module, args, output: ratios[name].add(output, layer(args[0]))

    handles = [exact.get_submodule(name).register_forward_hook(judge(name, layer)) for name, layer in layers.items()]
    try:
        true = centered(exact(examples.inputs))
    finally:
        for handle in handles:
            handle.remove()
    found = quantized(examples.inputs)
    return {
        "score": scores(found, examples).tolist(),
        "signal": true.square().flatten(1).sum(dim=1).tolist(),
        "noise": (centered(found) - true).square().flatten(1).sum(dim=1).tolist(),
        "layer_sqnr_db": {name: ratio.db for name, ratio in ratios.items()},
        "formats": {name: layer.spec.weight.formats[0].name for name, layer in layers.items()},
    }


def centered(logits: Tensor) -> Tensor:
    """Logits less their mean over the outputs, in float64: softmax does not see that mean, so its error is none."""
    logits64 = logits.to(torch.float64)
    return logits64 - logits64.mean(dim=-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class Outcome:
    """Results of one setting over the seeds of its rotation.

    Attributes:
        scores: (samples,), means over seeds.
        powers: (samples, 2), sums over seeds of signal and noise power of the logits.
        db_by_seed: SQNR of the logits for each seed.
        layers: layer -> SQNR in dB, mean over seeds.
        formats: layer -> format for the first seed.
    """

    scores: Float64Array
    powers: Float64Array
    db_by_seed: tuple[float, ...]
    layers: dict[str, float]
    formats: dict[str, str]

    @classmethod
    def of(cls, results: Sequence[dict[str, Any]]) -> Outcome:
        """From what `compare` returned for each seed."""
        powers = np.array([[result["signal"], result["noise"]] for result in results])
        return cls(
            np.mean([result["score"] for result in results], axis=0),
            powers.sum(axis=0).T,
            tuple(decibel(float(signal.sum()), float(noise.sum())) for signal, noise in powers),
            {
                name: math.fsum(result["layer_sqnr_db"][name] for result in results) / len(results)
                for name in results[0]["layer_sqnr_db"]
            },
            dict(results[0]["formats"]),
        )

    @cached_property
    def score(self) -> Interval:
        """Mean score with its 95 % interval over samples."""
        return bootstrap_mean(self.scores)

    @cached_property
    def db(self) -> Interval:
        """SQNR of the logits, with its 95 % interval over samples."""
        return bootstrap_interval(self.powers, _db)

    @property
    def mean_layer_db(self) -> float:
        """Mean of `layers`."""
        return math.fsum(self.layers.values()) / len(self.layers)


def _db(powers: Float64Array) -> float:
    return decibel(float(powers[:, 0].sum()), float(powers[:, 1].sum()))


def db_gain(base: Outcome, other: Outcome) -> Interval:
    """How many dB more `other` has; the interval comes from resampling the samples of both together."""
    both = np.hstack([base.powers, other.powers])
    return bootstrap_interval(both, lambda rows: _db(rows[:, 2:]) - _db(rows[:, :2]))


def score_gain(base: Outcome, other: Outcome, lower_is_better: bool) -> Interval:
    """How much better `other` scores, in the score's unit, positive for better; paired over samples."""
    return bootstrap_mean((base.scores - other.scores) if lower_is_better else (other.scores - base.scores))


def verdict(gain: Interval) -> str:
    """Whether zero lies outside the interval: "better", "worse" or "no clear difference"."""
    return "better" if gain.low > 0 else "worse" if gain.high < 0 else "no clear difference"


def role_of(layer: str) -> str:
    """The layer's name within its block: "qkv" of "blocks.2.qkv"."""
    return layer.rpartition(".")[2]
