"""`outliers`: the distribution of activations by layer, channel and time step, before and after the rotation.

Source: HQ-DiT (arXiv 2405.19751), section 3.1: outliers about 100 times larger than the rest, in few channels, with
high variance across channels and low variance within them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from operator import methodcaller
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from hqdit.analysis.activations import (
    ActivationHistogram,
    ActivationStatistics,
    Distribution,
    activation_histograms,
    activation_statistics,
)
from hqdit.evaluation.fidelity import PAIRS, EvaluationInputs
from hqdit.experiments.laboratory import Laboratory
from hqdit.experiments.outlier_figures import outlier_figures
from hqdit.experiments.subjects import SUBJECTS, Subject
from hqdit.experiments.wording import interval_notes
from hqdit.models.adapter import adapter_for
from hqdit.numerics.error import decibel
from hqdit.pipeline.config import QuantizationConfig
from hqdit.records.run_record import Cell, Column, Figure, Interval, RunRecord, Table

CONFIG = QuantizationConfig(gptq=False)
ROLES = {"modulation": "modulation", "q": "q, k, v", "attention-out": "attention-out", "fc1": "fc1", "fc2": "fc2"}
#: An input counts as free of outliers below these: about what Gaussian numbers of as many samples show.
CALM_RATIO, CALM_KURTOSIS = 2.0, 4.0

Inputs = Sequence[Mapping[str, Any]]


def left_after_rotation_db(activation_rms: npt.ArrayLike, weight_rms: npt.ArrayLike) -> float:
    """What scaling the channels before the rotation could still gain, in dB: (sum a^2)(sum w^2) / (sum a w)^2.

    Rotated, the rounding noise of an input is proportional to the sum of a_j^2 sum of w_j^2, whatever the rotation;
    dividing channel j by s_j and multiplying its weights by s_j changes both sums, and s_j^2 = a_j / w_j makes their
    product (sum a_j w_j)^2, the least. At least 0 by the inequality of Cauchy and Schwarz; large where outliers of the
    activation are compensated by small weights.

    Args:
        activation_rms: a_j, root mean square of every input channel, (channels,).
        weight_rms: w_j, root mean square of every column of the weights that read it, (channels,).
    """
    a, w = np.asarray(activation_rms, dtype=np.float64), np.asarray(weight_rms, dtype=np.float64)
    return decibel(float((a @ a) * (w @ w)), float((a @ w) ** 2))


def run(lab: Laboratory) -> RunRecord:
    """Moments, maxima and histograms on held-out trajectories, and the layer SQNR that they go with."""
    tables: list[Table] = []
    figures: list[Figure] = []
    answers: list[str] = []
    measured: dict[Subject, dict[str, Any]] = {}
    subjects = lab.subjects(SUBJECTS)
    lab.prepare([partial(_found, subject=subject) for subject in subjects], "activations")
    configs = [CONFIG.replace(rotation=rotation) for rotation in ("full", "none")]
    lab.prepare([methodcaller("score", s, c) for s in subjects for c in configs], "layers")
    for subject in subjects:
        found = _found(lab, subject)
        for rotation in ("full", "none"):
            scored = lab.score(subject, CONFIG.replace(rotation=rotation))["layer_sqnr_db"]
            for entry in found["inputs"]:
                entry[f"sqnr_{rotation}"] = sum(scored[name] for name in entry["layers"]) / len(entry["layers"])
        measured[subject] = found
        tables.append(_table(subject.name, found["inputs"], lab.sampling.steps))
        figures += outlier_figures(subject.name, found, lab.sampling.steps)
        answers += _answers(subject.name, found["inputs"])
    answers += _comparisons(measured)
    return RunRecord(
        name="outliers",
        title="Activation outliers",
        question="Are activations spread across channels rather than within, and does the rotation remove outliers?",
        answers=tuple(answers),
        tables=tuple(tables),
        figures=tuple(figures),
        config={"pairs": PAIRS, "rotation": CONFIG.rotation, "calm_ratio": CALM_RATIO, "calm_kurtosis": CALM_KURTOSIS},
        notes=(
            "Kurtosis is 3 for a normal distribution. Between channels is the share of the variance that the channels' "
            "means explain; the rest is variance within channels.",
            "Left after rotation is what scaling the channels before the rotation could gain: the same for every "
            "rotation, and large where activation outliers are compensated by small weights.",
            "Models with c = 10 compute the same function as those without; a seeded twentieth of their modulated "
            "channels is ten times larger, and the weights that read them ten times smaller.",
            "A histogram counts an input's numbers in units of their root mean square, which a rotation does not "
            "change; measurements holds those of all inputs, between -histogram_end and histogram_end: over all time "
            "steps, and at the first, the middle and the last one.",
            interval_notes("the rotation's signs")[0],
        ),
        measurements={
            subject.name: {"timesteps": found["timesteps"], "inputs": [_numbers(entry) for entry in found["inputs"]]}
            for subject, found in measured.items()
        },
    )


def _found(lab: Laboratory, subject: Subject) -> dict[str, Any]:
    """`_measure`, from the cache if it was measured before."""
    key = {"what": "outliers", "subject": subject.name, "config": CONFIG.to_json(), **lab.settings}
    return lab.cache.numbers(key, partial(_measure, lab, subject))


def _measure(lab: Laboratory, subject: Subject) -> dict[str, Any]:
    """Facts and a histogram of every input of quantized layers; more of the one with the largest outliers."""
    inputs = lab.inputs(subject)
    config = CONFIG.replace(seed=lab.seed)
    statistics = activation_statistics(subject.model, inputs, config)
    groups: dict[str, list[str]] = {}
    roles: dict[str, tuple[str, int]] = {}
    for site in adapter_for(subject.model).sites(subject.model):
        groups.setdefault(site.input_group, []).append(site.name)
        roles.setdefault(site.input_group, (ROLES.get(site.role, site.role), site.block))
    found = [_facts(subject.model, names, *roles[group], statistics[names[0]]) for group, names in groups.items()]
    firsts = {entry["layers"][0]: statistics[entry["layers"][0]] for entry in found}
    histograms = activation_histograms(subject.model, inputs, config, firsts)
    for entry in found:
        entry["histogram"] = _sides(histograms[entry["layers"][0]])
        entry["histogram_by_timestep"] = {}
    for step in shown_steps(len(inputs.timesteps)):
        only = EvaluationInputs((inputs.latents[step],), (inputs.timesteps[step],), inputs.classes)
        drawn = activation_histograms(subject.model, only, config, firsts)
        for entry in found:
            entry["histogram_by_timestep"][str(inputs.timesteps[step])] = _sides(drawn[entry["layers"][0]])
    worst = max(found, key=lambda entry: entry["before"]["max_over_median"])
    name = worst["layers"][0]
    return {
        "timesteps": list(inputs.timesteps),
        "inputs": found,
        "worst": {
            "input": worst["input"],
            "histograms": worst["histogram_by_timestep"],
            "channel_absmax_by_timestep": {
                side: part.channel_absmax.T.tolist()
                for side, part in (("before", statistics[name].before), ("after", statistics[name].after))
            },
        },
    }


def shown_steps(count: int) -> list[int]:
    """The first, the middle and the last of `count` steps."""
    return sorted({0, count // 2, count - 1})


def _sides(histogram: ActivationHistogram) -> dict[str, Any]:
    """A histogram as plain lists; its edges are equally far apart between the ends."""
    densities = {side: getattr(histogram, side).tolist() for side in ("before", "after")}
    return {"end": float(histogram.edges[-1]), **densities}


def _facts(
    model: nn.Module, names: Sequence[str], role: str, block: int, statistics: ActivationStatistics
) -> dict[str, Any]:
    weights = [model.get_submodule(name).get_parameter("weight").detach().double() for name in names]
    weight_rms = sum(weight.square().sum(dim=0) for weight in weights).sqrt().cpu().numpy()  # type: ignore[union-attr]
    return {
        "input": f"block {block + 1}, {role}",
        "role": role,
        "layers": list(names),
        "before": _distribution(statistics.before),
        "after": _distribution(statistics.after),
        "left_db": left_after_rotation_db(np.sqrt(statistics.before.by_channel.mean_square), weight_rms),
    }


def _distribution(found: Distribution) -> dict[str, Any]:
    between, within = found.variance_between_channels, found.variance_within_channels
    return {
        "max_over_median": found.max_over_median,
        "kurtosis": float(found.overall.kurtosis),
        "skewness": float(found.overall.skewness),
        "between_share": between / (between + within),
        "channel_absmax": sorted(found.channel_absmax.max(axis=0).tolist(), reverse=True),
        "channel_absmax_by_timestep": found.channel_absmax.max(axis=1).tolist(),
        "max_over_median_by_timestep": list(found.max_over_median_by_timestep),
        "kurtosis_by_timestep": found.by_timestep.kurtosis.tolist(),
        "skewness_by_timestep": found.by_timestep.skewness.tolist(),
    }


def _numbers(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What is measured of one input, for a record: 5 digits, None for the moments of equal numbers."""
    sides: dict[str, dict[str, Any]] = {}
    for side in ("before", "after"):
        sides[side] = {
            fact: [_rounded(number) for number in value] if isinstance(value, list) else _rounded(value)
            for fact, value in entry[side].items()
        }
        sides[side]["density"] = [_rounded(number) for number in entry["histogram"][side]]
        sides[side]["density_by_timestep"] = {
            timestep: [_rounded(number) for number in of_step[side]]
            for timestep, of_step in entry["histogram_by_timestep"].items()
        }
    return {
        "input": entry["input"],
        "layers": entry["layers"],
        "left_db": _rounded(entry["left_db"]),
        "histogram_end": entry["histogram"]["end"],
        **sides,
    }


def _rounded(number: float) -> float | None:
    return None if math.isnan(number) else float(f"{number:.5g}")


def _by_role(inputs: Inputs) -> dict[str, list[Mapping[str, Any]]]:
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for entry in inputs:
        grouped.setdefault(entry["role"], []).append(entry)
    return grouped


#: Blocks of one model are no sample of anything, so their median comes with their range.
_OVER_BLOCKS = "range over blocks"


def _median(entries: Iterable[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> Interval:
    found = [value(entry) for entry in entries]
    return Interval(float(np.median(found)), min(found), max(found))


_SIDED = (
    ("max_over_median", "Max/median", "", 1, "largest channel maximum over the median one"),
    ("kurtosis", "Kurtosis", "", 1, "of all numbers; 3 for a normal distribution"),
    ("skewness", "Skewness", "", 2, "of all numbers; 0 for a symmetric distribution"),
    ("between_share", "Between channels", "", 2, "share of the variance that the channels' means explain"),
)


def _table(name: str, inputs: Inputs, steps: int) -> Table:
    columns = [Column("Input of"), Column("Inputs")]
    for _, title, unit, digits, meaning in _SIDED:
        for side in ("before", "after"):
            columns.append(Column(f"{title}, {side}", unit, digits, meaning, interval=_OVER_BLOCKS))
    for title, meaning in (
        ("Left after rotation", "what scaling the channels before the rotation could gain"),
        ("Layer SQNR, not rotated", "of the layers that read the input, W4A4, rounded to nearest"),
        ("Layer SQNR, rotated", "the same after the rotation"),
    ):
        columns.append(Column(title, "dB", 1, meaning, interval=_OVER_BLOCKS))
    rows: list[tuple[Cell, ...]] = []
    for role, entries in _by_role(inputs).items():
        cells: list[Cell] = [role, len(entries)]
        for fact, *_ in _SIDED:
            for side in ("before", "after"):
                cells.append(_median(entries, lambda entry, side=side, fact=fact: entry[side][fact]))  # type: ignore[misc]
        for fact in ("left_db", "sqnr_none", "sqnr_full"):
            cells.append(_median(entries, lambda entry, fact=fact: entry[fact]))  # type: ignore[misc]
        rows.append(tuple(cells))
    caption = f"{PAIRS} held-out trajectories of {steps} steps; medians over blocks"
    return Table(f"Activations, {name}", tuple(columns), tuple(rows), caption)


def _middle(entries: Inputs, side: str, fact: str) -> float:
    return float(np.median([entry[side][fact] for entry in entries]))


def _answers(name: str, inputs: Inputs) -> list[str]:
    """Two sentences: the paper's observation about channels, and what the rotation leaves."""
    across = [entry for entry in inputs if entry["before"]["between_share"] > 0.5]
    loud = max(inputs, key=lambda entry: float(entry["before"]["max_over_median"]))
    stay = [
        entry
        for entry in inputs
        if entry["after"]["max_over_median"] > CALM_RATIO or entry["after"]["kurtosis"] > CALM_KURTOSIS
    ]
    places = ", ".join(f"{role} ({len(entries)})" for role, entries in _by_role(stay).items())
    left = f"outliers stay in {len(stay)} ({places})" if stay else "none of them keeps outliers"
    return [
        f"{name}: variance is higher across channels than within in {len(across)} of {len(inputs)} inputs; the largest "
        f"channel maximum is up to {loud['before']['max_over_median']:.0f} times the median one ({loud['input']}).",
        f"{name}: over all inputs, the rotation brings the median of max/median from "
        f"{_middle(inputs, 'before', 'max_over_median'):.1f} to {_middle(inputs, 'after', 'max_over_median'):.1f} and "
        f"that of the kurtosis from {_middle(inputs, 'before', 'kurtosis'):.1f} to "
        f"{_middle(inputs, 'after', 'kurtosis'):.1f}; above {CALM_RATIO:g} or {CALM_KURTOSIS:g}, {left}.",
    ]


def _comparisons(measured: Mapping[Subject, Mapping[str, Any]]) -> list[str]:
    """For every model with injected outliers, what the rotation does not undo, beside the model without."""
    sentences = []
    for subject in measured:
        plain = next(
            (other for other in measured if other.source == subject.source and other.outlier_factor == 1), None
        )
        if plain is None or subject.outlier_factor == 1:
            continue
        roles = ("q, k, v", "fc1")
        before, after = (
            [entry for entry in measured[which]["inputs"] if entry["role"] in roles] for which in (plain, subject)
        )
        kurtosis = [_middle(entries, "after", "kurtosis") for entries in (before, after)]
        lost = [
            float(np.median([y[key] - x[key] for x, y in zip(before, after, strict=True)]))
            for key in ("sqnr_full", "left_db")
        ]
        sentences.append(
            f"Compensated outliers, {subject.name}: after the rotation the modulated inputs have a kurtosis of "
            f"{kurtosis[1]:.1f}, without injected outliers {kurtosis[0]:.1f}; their layers' SQNR changes by "
            f"{lost[0]:+.1f} dB all the same, and what scaling before the rotation could gain by {lost[1]:+.1f} dB."
        )
    return sentences
