"""The float model beside itself from other noise: what the measures say of two outputs that only look alike.

A method below this floor keeps nothing of what the float model says about the very input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hqdit.evaluation.fidelity import PowerRecorder, mean_db_interval, prediction_fidelity
from hqdit.experiments.image_scores import FLOAT32
from hqdit.experiments.laboratory import GUIDANCES, Laboratory
from hqdit.experiments.subjects import Subject
from hqdit.models.adapter import adapter_for
from hqdit.records.run_record import Interval
from hqdit.sampling.sampler import predict_branches

#: The row's name in tables.
FLOOR = "float32, other noise"


def noise_floor(lab: Laboratory, subject: Subject) -> dict[str, Any]:
    """SQNR of the float model's outputs against its own on the next trajectory, which has other noise and class.

    Returns:
        eps_sqnr_db: branch -> [value, low, high], as in `Laboratory.score`.
        layer_sqnr_db: layer -> output SQNR in dB, on the conditional branch.
        mean_layer_sqnr_db: mean of these, [value, low, high].
    """
    key = {"what": "noise floor", "subject": subject.name, **lab.settings}
    return lab.cache.numbers(key, lambda: _measure(lab, subject))


def reference_rows(floor: Mapping[str, Any], branch: str) -> list[tuple[str, float | Interval, float | Interval]]:
    """(name, mean layer SQNR, noise prediction SQNR) of float32, to which paired measures compare, and of the floor."""
    return [
        (FLOAT32, math.inf, math.inf),
        (FLOOR, Interval(*floor["mean_layer_sqnr_db"]), Interval(*floor["eps_sqnr_db"][branch])),
    ]


@torch.no_grad()
def _measure(lab: Laboratory, subject: Subject) -> dict[str, Any]:
    inputs, exact = lab.inputs(subject), lab.exact_predictions(subject)
    other = [tuple(None if branch is None else branch.roll(1, 0) for branch in branches) for branches in exact]
    noise = prediction_fidelity(exact, other, inputs.timesteps, *GUIDANCES)  # type: ignore[arg-type]
    recorders: dict[str, PowerRecorder] = {}

    def compare(name: str) -> Callable[..., None]:
        recorder = recorders.setdefault(name, PowerRecorder())

        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            recorder.add(output, output.roll(1, 0))

        return hook

    model = subject.model
    sites = [site.name for site in adapter_for(model).sites(model)]
    handles = [model.get_submodule(name).register_forward_hook(compare(name)) for name in sites]
    try:
        for timestep, latents in zip(inputs.timesteps, inputs.latents, strict=True):
            predict_branches(model, latents, torch.full_like(inputs.classes, timestep), inputs.classes, 1.0)
    finally:
        for handle in handles:
            handle.remove()
    intervals = {branch: powers.db_interval for branch, powers in noise.branches.items()}
    layers = {name: recorder.powers for name, recorder in recorders.items()}
    mean = mean_db_interval(layers)
    return {
        "eps_sqnr_db": {branch: [found.value, found.low, found.high] for branch, found in intervals.items()},
        "layer_sqnr_db": {name: powers.db for name, powers in layers.items()},
        "mean_layer_sqnr_db": [mean.value, mean.low, mean.high],
    }
