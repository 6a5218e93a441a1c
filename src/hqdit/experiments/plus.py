"""`plus`: what each part of preset hqdit-plus gains over the paper's recipe at the same 4 bits, one after another.

Source: docs/method.md, "Beyond the paper".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from operator import methodcaller
from typing import Any

from hqdit.evaluation.fidelity import PAIRS
from hqdit.experiments.image_scores import FLOAT32, float_jobs, image_rows, image_table, method_jobs
from hqdit.experiments.laboratory import Job, Laboratory, eps_gain
from hqdit.experiments.noise_floor import FLOOR, noise_floor
from hqdit.experiments.subjects import SUBJECTS, Subject
from hqdit.experiments.wording import interval_notes, signed_db
from hqdit.models.adapter import adapter_for
from hqdit.pipeline.config import QuantizationConfig
from hqdit.records.run_record import Bars, Cell, Column, Interval, Lines, RunRecord, Series, Table

JUDGED = "guided 1.5"
PAPER, TOKEN, PLUS, WIDE = "hqdit", "hqdit-plus-token", "hqdit-plus", "w4a8"
#: Models with larger outliers, on which hqdit-plus is compared with itself on the plain model.
OUTLIERS = tuple(Subject(source, factor) for source in ("digits", "shapes") for factor in (30.0, 100.0))
IMAGE_METHODS = (PAPER, TOKEN, PLUS)
#: Averages of bits per input that are spent on 8-bit inputs.
MIXED_BITS = (4.5, 5.0)
#: The rows of the two presets.
TOKEN_ROW, PLUS_ROW = f"+ sensitive directions = {TOKEN}", f"+ fine groups where it matters = {PLUS}"
#: What the noise prediction has to gain over the paper's recipe, in dB: with groups, and with the paper's granularity.
WANTED_DB = {PLUS: 4.0, TOKEN: 2.5}
#: By how much injected outliers may move hqdit-plus, in dB.
OUTLIER_TOLERANCE_DB = 1.0

Scores = Mapping[str, Mapping[str, Any]]


def steps() -> dict[str, QuantizationConfig]:
    """Row of the ablation -> request: each adds something to the one before it, up to preset hqdit-plus.

    Then hqdit-plus without single parts, and preset w4a8 for comparison.
    """
    paper, token, plus = (QuantizationConfig.preset(name) for name in (PAPER, TOKEN, PLUS))
    rows = {PAPER: paper}
    cumulative: dict[str, Any] = {}
    for row, changes in (
        ("+ Lloyd-Max table, RMS scale", _settings(token, "weights", "scale_rule", "activation_scale_rule")),
        ("+ static scale before the rotation", _settings(token, "smoothing", "smoothing_statistic")),
        ("+ static means, bias correction", {"centring": "static", "bias_correction": token.bias_correction}),
        ("+ means of samples", _settings(token, "centring")),
        ("+ order of GPTQ by activation", _settings(token, "act_order")),
    ):
        cumulative |= changes
        rows[row] = paper.replace(**cumulative)
    rows[TOKEN_ROW] = token
    rows["+ groups with 8-bit scales"] = plus.replace(sensitive_group_size=None)
    rows[PLUS_ROW] = plus
    rows[f"{PLUS}, no rotation"] = plus.replace(rotation="none")
    rows[f"{PLUS}, to nearest"] = plus.replace(gptq=False, act_order=False)
    rows[f"{PLUS}, no sensitive directions"] = plus.replace(emphasis=0)
    for bits in MIXED_BITS:
        rows[f"{PLUS}, {bits:g} bits per input"] = plus.replace(average_bits=bits)
    rows[f"{PLUS}, static means only"] = plus.replace(centring="static")
    rows[f"{PLUS}, no static scale"] = plus.replace(smoothing=None, smoothing_statistic="absmax")
    rows[f"{PLUS}, E2M1"] = plus.replace(weights="e2m1")
    rows[WIDE] = QuantizationConfig.preset(WIDE)
    return rows


def _settings(config: QuantizationConfig, *names: str) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def run(lab: Laboratory) -> RunRecord:
    """Score every row on every subject, hqdit-plus on larger outliers too, and draw images of the presets."""
    rows, subjects, outliers = steps(), lab.subjects(SUBJECTS), lab.subjects(OUTLIERS)
    presets = {name: QuantizationConfig.preset(name) for name in IMAGE_METHODS}
    plain = [subject for subject in subjects if subject.outlier_factor == 1]
    _prepare(lab, subjects, plain, outliers, presets)
    scores = {subject.name: {row: lab.score(subject, config) for row, config in rows.items()} for subject in subjects}
    loud = {subject.name: lab.score(subject, presets[PLUS]) for subject in outliers}
    tables, images, measured = [], [], {}
    for subject in subjects:
        floor = noise_floor(lab, subject)
        tables += [_ablation(subject, scores[subject.name], floor), _roles(subject, scores[subject.name], floor)]
    tables.append(_outliers(subjects, outliers, scores, loud))
    for subject in plain:
        found, grids = image_rows(lab, subject, presets, lab.sampling)
        tables.append(image_table(f"Images, {subject.name}: {lab.sampling.steps} steps, guidance 1.5", found, subject))
        images += grids
        measured[subject.name] = found
    return RunRecord(
        name="plus",
        title="Beyond the paper at the same 4 bits",
        question="How much better than the paper's recipe can 4 bits be, and which part brings how much?",
        answers=(*_verdicts(subjects, scores), *_outlier_verdicts(subjects, outliers, scores, loud)),
        tables=tuple(tables),
        figures=tuple(
            figure for subject in plain for figure in (_bars(subject, scores[subject.name]), _lines(subject, scores))
        ),
        images=tuple(images),
        config={"rows": {row: config.to_json() for row, config in rows.items()}, "images": lab.image_count},
        notes=(
            f"SQNR of the noise prediction is measured on {PAIRS} held-out trajectories of the float model at every "
            "step of the sampler. Pooled over steps the last ones dominate, where the prediction is hardest; the mean "
            "over steps of each one's SQNR in dB is given beside it.",
            "Bits per weight count everything that a quantized layer holds but its bias: codes, scales, signs, static "
            "factors and means, directions. Bits per activation, a mean over the layers, count codes, dynamic "
            "scales (8 bits for groups with one exponent a token, 32 bits for tokens) and means of samples (8 bits).",
            "Layer SQNR by role is on float inputs, each layer alone; it does not say what reaches the model's output.",
            *interval_notes("the rotation's signs and the calibration data"),
        ),
        measurements={"images": measured, "scores": {name: _kept(of) for name, of in scores.items()}},
    )


def _prepare(
    lab: Laboratory,
    subjects: Sequence[Subject],
    plain: Sequence[Subject],
    outliers: Sequence[Subject],
    presets: Mapping[str, QuantizationConfig],
) -> None:
    cells: list[Job] = []
    for subject in plain:
        cells += float_jobs(subject, lab.sampling)
    for subject in subjects:
        cells.append(partial(noise_floor, subject=subject))
        cells += [methodcaller("score", subject, config) for config in steps().values()]
    cells += [methodcaller("score", subject, presets[PLUS]) for subject in outliers]
    lab.prepare(cells, "parts of hqdit-plus")
    lab.prepare([job for s in plain for job in method_jobs(s, presets.values(), lab.sampling)], "images")


def _mean_db(score: Mapping[str, Any]) -> float:
    values = score["eps_sqnr_db_by_timestep"][JUDGED]
    return math.fsum(values) / len(values)


def _interval(score: Mapping[str, Any], branch: str) -> Interval:
    return Interval(*score["eps_sqnr_db"][branch])


def _ablation(subject: Subject, scores: Scores, floor: Mapping[str, Any]) -> Table:
    columns = (
        Column("Step"),
        Column("Bits per weight", "", 2, "everything that a quantized layer holds but its bias"),
        Column("Bits per activation", "", 2, "codes, dynamic scales and means of the layers' inputs"),
        Column("Conditional", "dB", 2, "SQNR of the noise prediction with the class"),
        Column("Guided 1.5", "dB", 2, "SQNR after guidance 1.5"),
        Column("Gain", "dB", 2, "over the paper's recipe after guidance 1.5, paired by trajectory"),
        Column("Guided 4", "dB", 2, "SQNR after guidance 4.0"),
        Column("Mean over steps", "dB", 2, "mean of every time step's SQNR after guidance 1.5"),
        Column("Layers", "dB", 2, "mean of the layers' output SQNR, each alone on float inputs"),
        Column("Time", "s", 1, "wall-clock time of quantization with one thread, without drawing calibration data"),
    )
    rows: list[tuple[Cell, ...]] = [
        (FLOAT32, 32.0, 32.0, math.inf, math.inf, None, math.inf, math.inf, math.inf, None),
        (
            FLOOR,
            None,
            None,
            _interval(floor, "conditional"),
            _interval(floor, JUDGED),
            None,
            _interval(floor, "guided 4"),
            None,
            Interval(*floor["mean_layer_sqnr_db"]),
            None,
        ),
    ]
    for row, score in scores.items():
        rows.append(
            (
                row,
                score["bits_per_weight"],
                score["bits_per_activation"],
                _interval(score, "conditional"),
                _interval(score, JUDGED),
                None if row == PAPER else eps_gain(score, scores[PAPER], JUDGED),
                _interval(score, "guided 4"),
                _mean_db(score),
                Interval(*score["mean_layer_sqnr_db"]),
                score["quantize_seconds"],
            )
        )
    caption = f"{PAIRS} held-out trajectories; 95 % bootstrap intervals over trajectories"
    return Table(f"Step by step, {subject.name}", columns, tuple(rows), caption)


def _roles(subject: Subject, scores: Scores, floor: Mapping[str, Any]) -> Table:
    of_role: dict[str, list[str]] = {}
    for site in adapter_for(subject.model).sites(subject.model):
        of_role.setdefault(site.role, []).append(site.name)

    def means(layers: Mapping[str, float]) -> list[float]:
        return [math.fsum(layers[name] for name in names) / len(names) for names in of_role.values()]

    rows: list[tuple[Cell, ...]] = [(FLOAT32, *(math.inf for _ in of_role)), (FLOOR, *means(floor["layer_sqnr_db"]))]
    rows += [(row, *means(score["layer_sqnr_db"])) for row, score in scores.items()]
    columns = (Column("Step"), *(Column(role, "dB", 1, "output SQNR, mean over blocks") for role in of_role))
    return Table(f"Layers by role, {subject.name}", columns, tuple(rows), "each layer alone on float inputs")


def _outliers(
    subjects: Sequence[Subject],
    outliers: Sequence[Subject],
    scores: Mapping[str, Scores],
    loud: Mapping[str, Mapping[str, Any]],
) -> Table:
    found = {subject: scores[subject.name][PLUS_ROW] for subject in subjects}
    found |= {subject: loud[subject.name] for subject in outliers}
    rows = [
        (
            subject.source,
            subject.outlier_factor,
            _interval(score, JUDGED),
            score["eps_sqnr_db"][JUDGED][0] - scores[subject.source][PLUS_ROW]["eps_sqnr_db"][JUDGED][0],
        )
        for subject, score in sorted(found.items(), key=lambda item: (item[0].source, item[0].outlier_factor))
    ]
    columns = (
        Column("Model"),
        Column("c", "", 0, "a twentieth of the modulated channels is this many times larger"),
        Column("Guided 1.5", "dB", 2, f"SQNR of {PLUS} after guidance 1.5"),
        Column("Against the plain model", "dB", 2, "difference to c = 1"),
    )
    return Table(f"{PLUS} and outliers", columns, tuple(rows), f"{PAIRS} held-out trajectories")


def _verdicts(subjects: Sequence[Subject], scores: Mapping[str, Scores]) -> list[str]:
    answers = []
    row_of = {PLUS: PLUS_ROW, TOKEN: TOKEN_ROW}
    for name, wanted in WANTED_DB.items():
        for subject in subjects:
            of_subject = scores[subject.name]
            score = of_subject[row_of[name]]
            gain = eps_gain(score, of_subject[PAPER], JUDGED)
            verdict = "reached" if gain.value >= wanted else "missed"
            answers.append(
                f"{name} against {PAPER} on {subject.name}: {signed_db(gain)} after guidance 1.5 at "
                f"{score['bits_per_weight']:.2f} bits per weight; {wanted:g} dB were wanted: {verdict}."
            )
    return answers


def _outlier_verdicts(
    subjects: Sequence[Subject],
    outliers: Sequence[Subject],
    scores: Mapping[str, Scores],
    loud: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    found = {s: scores[s.name][PLUS_ROW] for s in subjects if s.outlier_factor > 1} | {
        s: loud[s.name] for s in outliers
    }
    worst = min(
        found, key=lambda s: found[s]["eps_sqnr_db"][JUDGED][0] - scores[s.source][PLUS_ROW]["eps_sqnr_db"][JUDGED][0]
    )
    loss = found[worst]["eps_sqnr_db"][JUDGED][0] - scores[worst.source][PLUS_ROW]["eps_sqnr_db"][JUDGED][0]
    verdict = "within" if loss >= -OUTLIER_TOLERANCE_DB else "beyond"
    return [
        f"Outliers move {PLUS} by {loss:+.2f} dB at worst ({worst.name}): {verdict} the {OUTLIER_TOLERANCE_DB:g} dB "
        "that were wanted."
    ]


def _bars(subject: Subject, scores: Scores) -> Bars:
    found = [score["eps_sqnr_db"][JUDGED] for score in scores.values()]
    value, low, high = (tuple(entry[k] for entry in found) for k in range(3))
    return Bars(
        f"Step by step on {subject.name}",
        tuple(scores),
        "SQNR of the noise prediction, guided 1.5 (dB)",
        (Series("pooled over time steps", y=value, low=low, high=high),),
        "whiskers: 95 % bootstrap intervals over trajectories",
    )


def _lines(subject: Subject, scores: Mapping[str, Scores]) -> Lines:
    of_subject = scores[subject.name]
    return Lines(
        f"By time step on {subject.name}",
        "time step",
        "SQNR of the noise prediction, guided 1.5 (dB)",
        tuple(
            Series(
                row, tuple(of_subject[row]["eps_sqnr_db_by_timestep"][JUDGED]), x=tuple(of_subject[row]["timesteps"])
            )
            for row in (PAPER, TOKEN_ROW, PLUS_ROW)
        ),
    )


def _kept(scores: Scores) -> dict[str, Any]:
    """What a reader may want to compute with, without the layers' formats."""
    return {
        row: {key: score[key] for key in ("eps_sqnr_db", "eps_sqnr_db_by_timestep", "layer_sqnr_db", "bits_per_weight")}
        for row, score in scores.items()
    }
