"""`beyond-dit`: does the Hadamard transform help other networks, and what are its drawbacks there?

Source: HQ-DiT (arXiv 2405.19751), an open question; here on a vision transformer, an MLP-mixer and a language model.
"""

from __future__ import annotations

import dataclasses
from functools import partial

from hqdit.experiments.laboratory import Laboratory
from hqdit.experiments.small_networks.findings import (
    benefit,
    drawback,
    format_answer,
    gain_table,
    network_answer,
    networks_table,
    outcome_table,
    role_table,
    rotation_figure,
)
from hqdit.experiments.small_networks.grid import ROTATIONS, measure_network
from hqdit.experiments.small_networks.quantization import ALPHA
from hqdit.experiments.small_networks.training import RECIPES, Recipe, data_digest, trained
from hqdit.models.outliers import DEFAULT_SHARE
from hqdit.records.run_record import RunRecord


def run(lab: Laboratory) -> RunRecord:
    """Train the networks (or take them from the cache), quantize them in every way, and compare in pairs."""
    factors, seeds = ((1.0, 10.0), 1) if lab.is_quick else ((1.0, 10.0, 30.0), 3)
    return study(lab, RECIPES, factors, seeds)


def _train(lab: Laboratory, recipe: Recipe) -> None:
    trained(lab.cache, recipe)


def study(lab: Laboratory, recipes: tuple[Recipe, ...], factors: tuple[float, ...], seeds: int) -> RunRecord:
    """`run` with other networks, outlier factors (1.0 among them) and numbers of draws of the random signs."""
    lab.prepare([partial(_train, recipe=recipe) for recipe in recipes], "training small networks")
    results = [measure_network(lab, recipe, factors, seeds) for recipe in recipes]
    by_network = [table for result in results for table in (outcome_table(result), gain_table(result))]
    return RunRecord(
        name="beyond-dit",
        title="The Hadamard transform in other networks",
        question="Can the Hadamard transform be applied to networks other than diffusion transformers, and what are "
        "its benefits and drawbacks there?",
        answers=(*map(network_answer, results), benefit(results), drawback(results), format_answer(results)),
        tables=(networks_table(results), *by_network, role_table(results)),
        figures=tuple(map(rotation_figure, results)),
        config={
            "recipes": [dataclasses.asdict(recipe) for recipe in recipes],
            "data_sha256": {recipe.shape.kind: data_digest(recipe) for recipe in recipes},
            "outlier_factors": list(factors),
            "outlier_share": DEFAULT_SHARE,
            "rotation_seeds": seeds,
            "rotations": list(ROTATIONS),
            "alpha": ALPHA,
        },
        notes=(
            "W4A4 in the linear layers of all blocks: weights per output channel, inputs with a dynamic scale per "
            "token, absmax scales; embedding and head stay float32. With a selected format the statistic of the "
            "rotated weight chooses among E3M0, E2M1 and E1M2 for weight and input.",
            "SQNR of the logits is that of logits less their mean over the outputs, which softmax does not see.",
            "Intervals are 95 % bootstrap intervals over held-out samples; gains are paired, from the same samples. "
            "They do not contain the variation between trainings: each network was trained once.",
            f"Injected outliers (c) scale {100 * DEFAULT_SHARE:g} % of the gains and shifts of a LayerNorm and divide "
            "the columns that read them, so that the float function stays the same. For the mixer's MLP over tokens "
            "these channels are rows and not columns, so that it gets none.",
            "The text is the standard library of the Python that ran this, so that the language model's figures "
            "belong to that version; config holds the digest.",
        ),
        measurements={
            result.name: [
                {
                    **dataclasses.asdict(case),
                    "logits_sqnr_db_by_seed": list(outcome.db_by_seed),
                    "layer_sqnr_db": outcome.layers,
                    "formats": outcome.formats,
                }
                for case, outcome in result.outcomes.items()
            ]
            for result in results
        },
    )
