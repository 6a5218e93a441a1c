"""`timesteps`: when and where errors arise, how they add up along a trajectory, and what guidance does to them.

Source: Ho & Salimans (arXiv 2207.12598), equation 6, for what guidance does to the errors of both branches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from hqdit.analysis.errors import block_errors
from hqdit.evaluation.bootstrap import bootstrap_interval
from hqdit.evaluation.fidelity import PAIRS
from hqdit.experiments.laboratory import GUIDANCES, Laboratory
from hqdit.experiments.subjects import Subject
from hqdit.experiments.trajectory_errors import branch_powers, trajectory_powers
from hqdit.experiments.wording import compared, interval_notes, signed_db
from hqdit.numerics.error import decibel
from hqdit.pipeline.config import QuantizationConfig
from hqdit.records.run_record import Cell, Column, Figure, Heatmap, Interval, Lines, RunRecord, Series, Table

SUBJECTS = (Subject("digits"), Subject("shapes"))
CONFIG = QuantizationConfig()
#: Followed through the sampler; all of the evaluation's pairs are looked at where both models see the same latents.
TRAJECTORIES = 16

Float64Array = npt.NDArray[np.float64]


def amplification(guidance: float, correlation: float) -> float:
    """Power of the guided error over that of one branch: s^2 + (s - 1)^2 - 2 s (s - 1) rho.

    It is the variance of s e_class - (s - 1) e_null where both errors have equal power and correlation rho.
    """
    return guidance**2 + (guidance - 1) ** 2 - 2 * guidance * (guidance - 1) * correlation


def run(lab: Laboratory) -> RunRecord:
    """Errors by time step and block, along trajectories of the same noise, and before and after guidance."""
    subjects = lab.subjects(SUBJECTS)
    lab.prepare([partial(_found, subject=subject) for subject in subjects], "errors over time steps")
    measured = {subject.name: _found(lab, subject) for subject in subjects}
    guidance_rows, guidance_answers = _guidance(measured)
    accumulation_rows, accumulation_answers = _accumulation(measured)
    figures: list[Figure] = []
    for name, found in measured.items():
        figures += [_block_map(name, found), _correlation_lines(name, found)]
        figures += [_accumulation_lines(name, found, guidance) for guidance in GUIDANCES]
        figures.append(_contribution_lines(name, found))
    counted = f"trajectories of {lab.sampling.steps} steps; intervals: 95 % bootstrap over trajectories"
    return RunRecord(
        name="timesteps",
        title="Errors over time steps",
        question="When and where do errors arise, how do they add up along a trajectory, and what does guidance do?",
        answers=(*(_where(name, found) for name, found in measured.items()), *accumulation_answers, *guidance_answers),
        tables=(
            Table("Error of the final image", _ACCUMULATION_COLUMNS, accumulation_rows, f"{TRAJECTORIES} {counted}"),
            Table(
                "What guidance does to the error of the noise prediction",
                _GUIDANCE_COLUMNS,
                guidance_rows,
                f"{PAIRS} {counted}",
            ),
        ),
        figures=tuple(figures),
        config={"method": "hqdit W4A4", "pairs": PAIRS, "trajectories": TRAJECTORIES, "guidances": list(GUIDANCES)},
        notes=(
            "Independent errors: the quantized model predicts at one step only and the float model carries the error "
            "on; the powers of all steps' errors are added. Sampler alone: the same sum for the errors of the noise "
            "prediction, carried on by the sampler's linear updates without the model.",
            "The formula for guidance assumes that both branches' errors are equally strong.",
            *interval_notes("the rotation's signs and the calibration data"),
        ),
    )


def _found(lab: Laboratory, subject: Subject) -> dict[str, Any]:
    """`_measure`, from the cache if it was measured before."""
    key = {"what": "timesteps", "subject": subject.name, "config": CONFIG.to_json(), **lab.settings}
    return lab.cache.numbers(key, partial(_measure, lab, subject))


def _measure(lab: Laboratory, subject: Subject) -> dict[str, Any]:
    """Powers and SQNR as plain lists."""
    quantized, inputs = lab.quantized(subject, CONFIG), lab.inputs(subject)
    noise, classes = inputs.latents[0][:TRAJECTORIES], inputs.classes[:TRAJECTORIES]
    trajectories = {}
    for guidance in GUIDANCES:
        powers = trajectory_powers(
            subject.model, quantized, subject.scheduler, noise, classes, lab.sampling.steps, guidance
        )
        trajectories[f"{guidance:g}"] = {name: values.tolist() for name, values in powers.items()}
    branches = branch_powers(subject.model, quantized, inputs, GUIDANCES)
    return {
        "timesteps": list(inputs.timesteps),
        "block_sqnr_db": block_errors(subject.model, quantized, inputs).tolist(),
        "branches": {name: values.tolist() for name, values in branches.items()},
        "trajectories": trajectories,
    }


def _ratio_db(above: Any, below: Any) -> Interval:
    """10 log10 of a ratio of sums over trajectories, each argument (pairs,)."""
    rows = np.stack([np.asarray(above), np.asarray(below)], axis=1)
    return bootstrap_interval(rows, lambda found: decibel(float(found[:, 0].sum()), float(found[:, 1].sum())))


_ACCUMULATION_COLUMNS = (
    Column("Model"),
    Column("Guidance", "", 1),
    Column("Measured", "dB", 2, "SQNR of the final latents against the float trajectory from the same noise"),
    Column(
        "Independent", "dB", 2, "SQNR if the errors of single steps, each carried on by the float model, were added"
    ),
    Column("Together", "dB", 2, "measured error over the independent sum: above 0, errors of the steps reinforce"),
    Column("Sampler alone", "dB", 2, "SQNR if the model did not react to errors in its input"),
    Column("Correction", "dB", 2, "error of the sampler alone over the independent sum: what the model repairs"),
)


def _accumulation(measured: Mapping[str, Any]) -> tuple[tuple[tuple[Cell, ...], ...], list[str]]:
    rows: list[tuple[Cell, ...]] = []
    answers = []
    for name, found in measured.items():
        for guidance in GUIDANCES:
            powers = found["trajectories"][f"{guidance:g}"]
            signal, error, independent, sampler = (
                powers[key][-1] for key in ("signal", "error", "independent", "sampler")
            )
            together, correction = _ratio_db(error, independent), _ratio_db(sampler, independent)
            ratios = [_ratio_db(signal, noise) for noise in (error, independent, sampler)]
            rows.append((name, guidance, ratios[0], ratios[1], together, ratios[2], correction))
            by_step = np.asarray(powers["final_by_step"]).sum(axis=1)
            worst = int(np.argmax(by_step))
            answers.append(
                f"Accumulation, {name} at guidance {guidance:g}: the final error is "
                f"{compared(together, 'larger than', 'smaller than')} the sum of the steps' own errors "
                f"({signed_db(together, 1)}); the model's reaction to wrong latents changes it by "
                f"{-correction.value:+.1f} dB against the sampler alone; step {worst + 1} of {len(by_step)} "
                f"contributes most ({by_step[worst] / by_step.sum():.0%} of the sum)."
            )
    return tuple(rows), answers


_GUIDANCE_COLUMNS = (
    Column("Model"),
    Column("Guidance", "", 1),
    Column("Correlation", "", 3, "of the errors of the conditional and the unconditional prediction"),
    Column("Measured", "dB", 2, "power of the guided error over that of the conditional one"),
    Column("Formula", "dB", 2, "s^2 + (s - 1)^2 - 2 s (s - 1) rho with the measured correlation"),
    Column("If uncorrelated", "dB", 2, "the formula with rho = 0"),
    Column("SQNR before", "dB", 2, "of the conditional prediction"),
    Column("SQNR after", "dB", 2, "of the guided prediction"),
)


def correlation(conditional: Float64Array, unconditional: Float64Array, product: Float64Array) -> float:
    """The errors' correlation: sum e_c e_u / sqrt(sum e_c^2 sum e_u^2).

    Args:
        conditional: sums of squares e_c^2, any shape.
        unconditional: sums of squares e_u^2.
        product: sums of the products e_c e_u.
    """
    return float(product.sum() / math.sqrt(conditional.sum() * unconditional.sum()))


def _guidance(measured: Mapping[str, Any]) -> tuple[tuple[tuple[Cell, ...], ...], list[str]]:
    rows: list[tuple[Cell, ...]] = []
    answers = []
    for name, found in measured.items():
        sums = {key: np.asarray(values).sum(axis=0) for key, values in found["branches"].items()}  # (pairs,)
        triple = np.stack([sums["conditional"], sums["unconditional"], sums["product"]], axis=1)
        rho = bootstrap_interval(triple, lambda kept: correlation(kept[:, 0], kept[:, 1], kept[:, 2]))
        parts = []
        for guidance in GUIDANCES:
            branch = f"guided {guidance:g}"
            seen = _ratio_db(sums[branch], sums["conditional"])
            formula = decibel(amplification(guidance, rho.value), 1.0)
            before, after = (
                _ratio_db(sums[s], sums[n]) for s, n in (("signal", "conditional"), (f"{branch} signal", branch))
            )
            plain = decibel(amplification(guidance, 0.0), 1.0)
            rows.append((name, guidance, rho, seen, formula, plain, before, after))
            parts.append(
                f"guidance {guidance:g} changes the error's power by {signed_db(seen, 1)}, where the formula says "
                f"{formula:+.1f} dB and uncorrelated errors would give {plain:+.1f} dB"
            )
        answers.append(
            f"Guidance, {name}: the errors of both branches correlate with {rho.value:.2f} "
            f"[{rho.low:.2f}, {rho.high:.2f}]; {'; '.join(parts)}."
        )
    return tuple(rows), answers


def _where(name: str, found: Mapping[str, Any]) -> str:
    """The noisiest time step, and the block behind which the hidden state loses most."""
    timesteps = found["timesteps"]
    errors, signals = (np.asarray(found["branches"][key]).sum(axis=1) for key in ("conditional", "signal"))
    ratios = [decibel(float(s), float(e)) for s, e in zip(signals, errors, strict=True)]
    worst, best = int(np.argmin(ratios)), int(np.argmax(ratios))
    mean = np.asarray(found["block_sqnr_db"], dtype=np.float64).mean(axis=0)
    fall = -np.diff(mean)
    answer = (
        f"Where, {name}: the noise prediction is worst at time step {timesteps[worst]} ({ratios[worst]:.1f} dB) and "
        f"best at {timesteps[best]} ({ratios[best]:.1f} dB); the hidden state has {mean[0]:.1f} dB behind the first "
        f"block and {mean[-1]:.1f} dB behind the last"
    )
    if len(fall) and fall.max() > 0:
        block = int(np.argmax(fall)) + 1
        answer += f", and falls most ({fall.max():.1f} dB) in block {block + 1}"
    return answer + "."


def _block_map(name: str, found: Mapping[str, Any]) -> Heatmap:
    values = np.asarray(found["block_sqnr_db"], dtype=np.float64).T
    return Heatmap(
        f"Hidden state by block and time step, {name}",
        tuple(str(index + 1) for index in range(len(values))),
        tuple(str(timestep) for timestep in found["timesteps"]),
        tuple(tuple(row) for row in values.tolist()),
        "SQNR (dB)",
        "errors of earlier blocks are included",
        x_label="time step, in the order of sampling",
        y_label="block",
    )


def _correlation_lines(name: str, found: Mapping[str, Any]) -> Lines:
    c, u, product = (np.asarray(found["branches"][key]) for key in ("conditional", "unconditional", "product"))
    rho = tuple(correlation(*rows) for rows in zip(c, u, product, strict=True))
    return Lines(
        f"Correlation of both branches' errors, {name}",
        "time step",
        "correlation",
        (Series("conditional and unconditional", rho, tuple(map(float, found["timesteps"]))),),
    )


def _accumulation_lines(name: str, found: Mapping[str, Any], guidance: float) -> Lines:
    powers = {key: np.asarray(values) for key, values in found["trajectories"][f"{guidance:g}"].items()}
    steps = range(1, len(powers["signal"]))  # no error yet at the start
    series = []
    for key, title in (("error", "measured"), ("independent", "independent errors"), ("sampler", "sampler alone")):
        points = [_ratio_db(powers["signal"][step], powers[key][step]) for step in steps]
        y, low, high = (tuple(getattr(point, end) for point in points) for end in ("value", "low", "high"))
        series.append(Series(title, y, tuple(map(float, steps)), low, high))
    return Lines(
        f"Error along the trajectory, {name}, guidance {guidance:g}",
        "step",
        "SQNR of the latents (dB)",
        tuple(series),
        "bounds: 95 % bootstrap intervals over trajectories",
    )


def _contribution_lines(name: str, found: Mapping[str, Any]) -> Lines:
    series = []
    for guidance in GUIDANCES:
        powers = found["trajectories"][f"{guidance:g}"]
        terms = np.asarray(powers["final_by_step"]).sum(axis=1)
        share = tuple(float(term) for term in terms / terms.sum())
        series.append(Series(f"guidance {guidance:g}", share, tuple(float(k + 1) for k in range(len(share)))))
    return Lines(
        f"Which step's error reaches the final latents, {name}",
        "step",
        "share of the independent sum",
        tuple(series),
        "the quantized model predicts at one step only, the float model at all others",
    )
