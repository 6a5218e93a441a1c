"""Every way to quantize one small network, and what came of it."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from hqdit.evaluation.bootstrap import bootstrap_mean
from hqdit.experiments.laboratory import Laboratory
from hqdit.experiments.rotation_cost import rotation_operations
from hqdit.experiments.small_networks.comparison import Outcome, centered, compare, db_gain, role_of, score_gain
from hqdit.experiments.small_networks.networks import scale_normalized_channels
from hqdit.experiments.small_networks.quantization import Setting
from hqdit.experiments.small_networks.training import (
    Recipe,
    Trained,
    calibration_inputs,
    data_digest,
    scores,
    trained,
)
from hqdit.formats.catalog import E2M1, FP4_FORMATS
from hqdit.numerics.error import sqnr_db
from hqdit.records.run_record import Interval
from hqdit.transforms.rotation import plan_rotation

#: "none" first: what the others are compared with.
ROTATIONS = ("none", "block:16", "full")
FORMATS = {"E2M1": (E2M1,), "selected": FP4_FORMATS}


@dataclass(frozen=True)
class Case:
    """One way to quantize a network.

    Attributes:
        factor: c of the injected outliers; 1.0 for none.
        formats: key of `FORMATS`.
        has_gptq: GPTQ, or round-to-nearest.
        rotation: one of `ROTATIONS`.
    """

    factor: float
    formats: str
    has_gptq: bool
    rotation: str

    @property
    def outliers(self) -> str:
        """The outliers in words."""
        return outliers_label(self.factor)

    @property
    def quantizer(self) -> str:
        """Everything but outliers and rotation, in words."""
        return f"{self.formats}, {'GPTQ' if self.has_gptq else 'nearest'}"

    def with_rotation(self, rotation: str) -> Case:
        """The same otherwise."""
        return dataclasses.replace(self, rotation=rotation)


def outliers_label(factor: float) -> str:
    """In words: "as trained" or "c = 10"."""
    return "as trained" if factor == 1 else f"c = {factor:g}"


@dataclass(frozen=True)
class Gain:
    """What a rotation changes against none, positive for better.

    Attributes:
        case: with the rotation.
        db: SQNR of the logits.
        score: points of accuracy, or bits per byte saved.
    """

    case: Case
    db: Interval
    score: Interval


@dataclass(frozen=True, eq=False)
class NetworkResult:
    """One network with all its outcomes.

    Attributes:
        recipe: how it was trained.
        trained: the network and the samples that it is judged by.
        outcomes: of every case.
        float32_db: factor -> SQNR of the logits of the float network with outliers against that as trained.
    """

    recipe: Recipe
    trained: Trained
    outcomes: Mapping[Case, Outcome]
    float32_db: Mapping[float, float]

    @property
    def name(self) -> str:
        """For tables and sentences."""
        return self.recipe.shape.kind

    @property
    def factors(self) -> tuple[float, ...]:
        """Strengths of the outliers."""
        return tuple(dict.fromkeys(case.factor for case in self.outcomes))

    @cached_property
    def float32_score(self) -> Interval:
        """Held-out score of the float network."""
        examples = self.trained.examples
        return bootstrap_mean(scores(self.trained.network(examples.inputs), examples).numpy())

    @cached_property
    def gains(self) -> tuple[Gain, ...]:
        """Of every case with a rotation, in order."""
        found = []
        for case, outcome in self.outcomes.items():
            if case.rotation != "none":
                base = self.outcomes[case.with_rotation("none")]
                found.append(Gain(case, db_gain(base, outcome), score_gain(base, outcome, self.recipe.is_text)))
        return tuple(found)

    def layer_gains(self, factor: float) -> dict[str, float]:
        """Layer -> its output SQNR with the full rotation less that without one, E2M1 and round-to-nearest, in dB."""
        base = Case(factor, "E2M1", False, "none")
        without, rotated = self.outcomes[base].layers, self.outcomes[base.with_rotation("full")].layers
        return {name: rotated[name] - without[name] for name in without}

    @property
    def operation_share(self) -> float:
        """Operations of full rotations over those of the linear layers in the blocks, for one sample."""
        shape = self.recipe.shape
        rotations = products = 0
        for name, layer in self.trained.network.blocks.named_modules():
            if isinstance(layer, nn.Linear):
                # The mixer's MLP over tokens runs once for every channel.
                rows = shape.width if role_of(name).startswith("token") else shape.tokens
                rotations += rows * rotation_operations(plan_rotation("full", layer.in_features, name))
                products += rows * 2 * layer.in_features * layer.out_features
        return rotations / products


def _results(lab: Laboratory, recipe: Recipe, case: Case, seeds: int) -> list[dict[str, Any]]:
    """What `compare` says of one case for every draw of signs, from the cache if it was asked before."""
    facts: dict[str, Any] = {
        "what": "beyond-dit",
        "recipe": dataclasses.asdict(recipe),
        "data": data_digest(recipe),
        "calibration_seed": lab.seed,
        "case": dataclasses.asdict(case),
    }
    results = []
    for seed in range(lab.seed, lab.seed + (1 if case.rotation == "none" else seeds)):
        setting = Setting(case.rotation, FORMATS[case.formats], case.has_gptq, seed)

        def judge(setting: Setting = setting) -> dict[str, Any]:
            found, calibration = trained(lab.cache, recipe), calibration_inputs(recipe, lab.seed)
            return compare(found.network, setting, case.factor, calibration, found.examples)

        results.append(lab.cache.numbers({**facts, "seed": seed}, judge))
    return results


@torch.no_grad()
def measure_network(lab: Laboratory, recipe: Recipe, factors: tuple[float, ...], seeds: int) -> NetworkResult:
    """Train (or take from the cache) and quantize in every way; results of earlier runs come from the cache.

    Args:
        lab: whose cache and seed are used.
        recipe: of the network.
        factors: strengths of the injected outliers; 1.0 must be among them.
        seeds: draws of random signs of every rotation.
    """
    found = trained(lab.cache, recipe)
    grid = [Case(*values) for values in itertools.product(factors, FORMATS, (False, True), ROTATIONS)]
    jobs = [partial(_results, recipe=recipe, case=case, seeds=seeds) for case in grid]
    lab.prepare(jobs, f"settings of the {recipe.shape.kind}")
    outcomes = {case: Outcome.of(_results(lab, recipe, case, seeds)) for case in grid}
    exact = centered(found.network(found.examples.inputs))
    float32_db = {}
    for factor in factors:
        scaled = scale_normalized_channels(copy.deepcopy(found.network), factor)
        float32_db[factor] = sqnr_db(exact, centered(scaled(found.examples.inputs)))
    return NetworkResult(recipe, found, outcomes, float32_db)
