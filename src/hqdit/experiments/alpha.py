"""`alpha`: what the quantile of the format statistic trades, range against precision, and what it does to images.

Weights are rounded to nearest, so that nothing but the formats differs.

Source: HQ-DiT (arXiv 2405.19751), section 3.3: s_w = max|W| / Quantile(|W|, alpha); what alpha does is left open there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import methodcaller
from typing import Any

from torch import nn

from hqdit.evaluation.fidelity import PAIRS
from hqdit.experiments.image_scores import FLOAT32, float_jobs, image_rows, image_table, method_jobs
from hqdit.experiments.laboratory import GUIDANCES, Laboratory, eps_gain, format_share
from hqdit.experiments.noise_floor import noise_floor, reference_rows
from hqdit.experiments.subjects import Subject
from hqdit.experiments.wording import compared, interval_notes, signed_db
from hqdit.formats.catalog import FP4_FORMATS
from hqdit.numerics.codes import decode, unpack_codes
from hqdit.numerics.error import SignalToNoise
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig
from hqdit.progress import track
from hqdit.quantizers.quantized_tensor import spread_scale
from hqdit.records.run_record import Cell, Column, Figure, FormatMap, Interval, Lines, RunRecord, Series, Table
from hqdit.transforms.rotation import rotate

SUBJECTS = (Subject("digits"), Subject("shapes"))
ROTATIONS = {"full": "rotated", "none": "not rotated"}
#: Fewer where a model takes longer.
ALPHAS = {
    "digits": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6),
    "shapes": (0.05, 0.1, 0.25, 0.4, 0.6),
}
QUICK_ALPHAS = (0.05, 0.25, 0.6)
#: Those whose images are judged.
IMAGE_ALPHAS = {"digits": (0.05, 0.25, 0.6), "shapes": (0.05, 0.25)}
DEFAULT = QuantizationConfig().alpha
JUDGED = f"guided {GUIDANCES[0]:g}"

#: alpha -> what was measured with it; alphas that choose the same formats share one entry.
Sweep = Mapping[float, Mapping[str, Any]]


def run(lab: Laboratory) -> RunRecord:
    """Measure every alpha, rotated and not; formats that were measured already are not measured again."""
    tables: list[Table] = []
    figures: list[Figure] = []
    answers: list[str] = []
    for subject in lab.subjects(SUBJECTS):
        wanted = QUICK_ALPHAS if lab.is_quick else ALPHAS[subject.source]
        choices = {rotation: _choices(lab, subject, rotation, wanted) for rotation in ROTATIONS}
        _prepare(lab, subject, choices)
        sweeps = {rotation: _sweep(lab, subject, found) for rotation, found in choices.items()}
        rows, _ = image_rows(lab, subject, _image_methods(subject, sweeps), lab.sampling, has_grids=False)
        tables.append(_weights_table(subject.name, sweeps))
        tables.append(_fidelity_table(subject.name, sweeps, noise_floor(lab, subject), lab.sampling.steps))
        tables.append(image_table(f"Images, {subject.name}: {lab.sampling.steps} steps, guidance 1.5", rows, subject))
        figures += [_trade(subject.name, sweeps), _quality(subject.name, sweeps)]
        figures += [_format_map(subject.name, rotation, sweep) for rotation, sweep in sweeps.items()]
        answers += [_answer(subject.name, rotation, sweep) for rotation, sweep in sweeps.items()]
        answers.append(_image_answer(subject.name, rows))
    return RunRecord(
        name="alpha",
        title="The quantile alpha",
        question="How does alpha trade the representable range against precision, and does it matter?",
        answers=tuple(answers),
        tables=tuple(tables),
        figures=tuple(figures),
        config={
            "alphas": {name: list(QUICK_ALPHAS if lab.is_quick else values) for name, values in ALPHAS.items()},
            "gptq": False,
            "images": lab.image_count,
            "default": DEFAULT,
        },
        notes=(
            "alpha acts through the chosen formats alone: values of alpha that choose the same ones give the same "
            "model, and their rows are equal.",
            "Underflow is the share of non-zero weights that become zero; precision is the SQNR of those that do not.",
            "The best of several values is found on the trajectories that judge it, which flatters its gain.",
            *interval_notes("the rotation's signs"),
        ),
    )


def _choices(
    lab: Laboratory, subject: Subject, rotation: str, alphas: tuple[float, ...]
) -> dict[float, dict[str, Any]]:
    """Alpha -> configuration and facts about the weights; alphas that choose the same formats share one entry."""
    by_formats: dict[str, dict[str, Any]] = {}
    found = {}
    # The default comes first, so that the model that other experiments share stands for all that choose alike.
    for alpha in track(sorted(alphas, key=lambda alpha: alpha != DEFAULT), f"alpha, {subject.name}"):
        config = QuantizationConfig(alpha=alpha, rotation=rotation, gptq=False)
        model = lab.quantized(subject, config)
        formats = chosen_formats(model)
        if formats not in by_formats:
            by_formats[formats] = {"config": config, "weights": weight_facts(subject.model, model)}
        found[alpha] = by_formats[formats]
    return {alpha: found[alpha] for alpha in sorted(found)}


def _prepare(lab: Laboratory, subject: Subject, choices: Mapping[str, Sweep]) -> None:
    """Fill the cache with the scores of every choice and the images of those that are judged by them."""
    configs = [entry["config"] for found in choices.values() for entry in found.values()]
    jobs = float_jobs(subject, lab.sampling)
    jobs += [methodcaller("score", subject, config) for config in dict.fromkeys(configs)]
    lab.prepare(jobs, f"alpha, {subject.name}")
    judged = _image_methods(subject, choices).values()
    lab.prepare(method_jobs(subject, judged, lab.sampling), f"alpha, images of {subject.name}")


def _sweep(lab: Laboratory, subject: Subject, choices: Sweep) -> dict[float, dict[str, Any]]:
    """The choices with their scores."""
    distinct = {id(entry): entry for entry in choices.values()}
    scored = {key: {**entry, "score": lab.score(subject, entry["config"])} for key, entry in distinct.items()}
    return {alpha: scored[id(entry)] for alpha, entry in choices.items()}


def _alike(sweep: Sweep) -> list[list[float]]:
    """The alphas that choose the same formats, together, in ascending order."""
    groups: dict[int, list[float]] = {}
    for alpha, entry in sweep.items():
        groups.setdefault(id(entry), []).append(alpha)
    return list(groups.values())


def _image_methods(subject: Subject, sweeps: Mapping[str, Sweep]) -> dict[str, QuantizationConfig]:
    """A configuration for every choice of formats whose images are judged."""
    methods = {}
    for rotation, sweep in sweeps.items():
        wanted = IMAGE_ALPHAS[subject.source]
        for alphas in _alike(sweep):
            if any(alpha in wanted for alpha in alphas):
                listed = ", ".join(f"{alpha:g}" for alpha in alphas)
                methods[f"{ROTATIONS[rotation]}, alpha {listed}"] = sweep[alphas[0]]["config"]
    return methods


def chosen_formats(model: nn.Module) -> str:
    """Weight and activation format of every layer, in one text."""
    layers = quantized_layers(model).values()
    return " ".join(f"{layer.spec.weight.formats[0].name}/{layer.spec.activation.format.name}" for layer in layers)


def weight_facts(exact: nn.Module, model: nn.Module) -> dict[str, float]:
    """Range and precision of the weights as they were rounded, over all layers.

    Args:
        exact: the float model.
        model: its quantized copy, one format per layer.

    Returns:
        range_octaves: log2 of the format's largest over its smallest positive level, mean over layers.
        underflow: share of the non-zero weights that become zero.
        precision_db: SQNR of the weights that do not.
        sqnr_db: SQNR of all weights.
    """
    everything, kept = SignalToNoise(), SignalToNoise()
    octaves = zeros = nonzero = 0.0
    layers = quantized_layers(model)
    for name, layer in layers.items():
        fmt = layer.spec.weight.formats[0]
        weight = rotate(exact.get_submodule(name).get_parameter("weight").double(), layer.spec.rotation, layer.signs)
        levels = decode(unpack_codes(layer.qweight, fmt), fmt)
        rounded = levels.double() * spread_scale(layer.effective_scale, layer.in_features).double()
        survives = levels != 0
        everything.add(weight, rounded)
        kept.add(weight[survives], rounded[survives])
        zeros += int((~survives & (weight != 0)).sum())
        nonzero += int((weight != 0).sum())
        octaves += math.log2(fmt.dynamic_range)
    return {
        "range_octaves": octaves / len(layers),
        "underflow": zeros / nonzero,
        "precision_db": kept.db,
        "sqnr_db": everything.db,
    }


def _weights_table(name: str, sweeps: Mapping[str, Sweep]) -> Table:
    columns = (
        Column("Rotation"),
        Column("alpha", "", 2),
        Column("Choice", "", 0, "rows of one number chose the same formats for all layers"),
        *(Column(fmt.name.upper(), "", 2, "share of the layers whose weights have this format") for fmt in FP4_FORMATS),
        Column("Range", "octaves", 2, "log2 of the largest over the smallest positive number, mean over layers"),
        Column("Underflow", "%", 1, "non-zero weights that become zero"),
        Column("Precision", "dB", 2, "SQNR of the weights that do not underflow"),
        Column("Weight SQNR", "dB", 2, "of all weights"),
    )
    rows: list[tuple[Cell, ...]] = []
    for rotation, sweep in sweeps.items():
        groups = _alike(sweep)
        for alpha, entry in sweep.items():
            facts = entry["weights"]
            rows.append(
                (
                    ROTATIONS[rotation],
                    alpha,
                    next(number for number, alphas in enumerate(groups, 1) if alpha in alphas),
                    *(format_share(entry["score"], fmt.name) for fmt in FP4_FORMATS),
                    facts["range_octaves"],
                    100 * facts["underflow"],
                    facts["precision_db"],
                    facts["sqnr_db"],
                )
            )
    return Table(f"Range and precision, {name}", columns, tuple(rows), "all weights of the model; no sampling error")


def _fidelity_table(name: str, sweeps: Mapping[str, Sweep], floor: Mapping[str, Any], steps: int) -> Table:
    columns = (
        Column("Rotation"),
        Column("alpha", "", 2),
        Column("Layer SQNR", "dB", 2, "mean over layers, each alone on float inputs"),
        Column("Noise prediction", "dB", 2, "SQNR after guidance 1.5"),
        Column("Against default", "dB", 2, f"paired gain over alpha = {DEFAULT:g}"),
    )
    rows: list[tuple[Cell, ...]] = [
        (label, None, layers, judged, None) for label, layers, judged in reference_rows(floor, JUDGED)
    ]
    for rotation, sweep in sweeps.items():
        for alpha, entry in sweep.items():
            score = entry["score"]
            gain = None if alpha == DEFAULT else eps_gain(score, sweep[DEFAULT]["score"], JUDGED)
            judged = Interval(*score["eps_sqnr_db"][JUDGED])
            rows.append((ROTATIONS[rotation], alpha, Interval(*score["mean_layer_sqnr_db"]), judged, gain))
    caption = f"{PAIRS} held-out trajectories of {steps} steps; 95 % bootstrap intervals over trajectories"
    return Table(f"Fidelity, {name}", columns, tuple(rows), caption)


def _trade(name: str, sweeps: Mapping[str, Sweep]) -> Lines:
    series = []
    for rotation, sweep in sweeps.items():
        for fact, title in (("sqnr_db", "all weights"), ("precision_db", "weights that do not underflow")):
            y = tuple(entry["weights"][fact] for entry in sweep.values())
            series.append(Series(f"{title}, {ROTATIONS[rotation]}", y, tuple(sweep)))
    return Lines(f"Precision of the weights, {name}", "alpha", "SQNR (dB)", tuple(series))


def _quality(name: str, sweeps: Mapping[str, Sweep]) -> Lines:
    series = []
    for rotation, sweep in sweeps.items():
        found = [entry["score"]["eps_sqnr_db"][JUDGED] for entry in sweep.values()]
        value, low, high = (tuple(entry[k] for entry in found) for k in range(3))
        series.append(Series(ROTATIONS[rotation], value, tuple(sweep), low, high))
    return Lines(
        f"Noise prediction by alpha, {name}",
        "alpha",
        "SQNR of the noise prediction, guided 1.5 (dB)",
        tuple(series),
        "bounds: 95 % bootstrap intervals over trajectories",
    )


def _format_map(name: str, rotation: str, sweep: Sweep) -> FormatMap:
    shares = tuple(
        {fmt.name: share for fmt in FP4_FORMATS if (share := format_share(entry["score"], fmt.name))}
        for entry in sweep.values()
    )
    return FormatMap(
        f"Formats by alpha, {name}, {ROTATIONS[rotation]}",
        tuple(f"alpha = {alpha:g}" for alpha in sweep),
        shares,
        "share of the layers",
        y_label="layers (%)",
    )


def _answer(name: str, rotation: str, sweep: Sweep) -> str:
    """How far alpha moves things at all, which value is best, and how the others compare with the default."""
    values = [entry["score"]["eps_sqnr_db"][JUDGED][0] for entry in sweep.values()]
    low, high = sweep[min(sweep)]["weights"], sweep[max(sweep)]["weights"]
    return (
        f"{name}, {ROTATIONS[rotation]}: from alpha = {min(sweep):g} to {max(sweep):g} the mean range goes from "
        f"{low['range_octaves']:.1f} to {high['range_octaves']:.1f} octaves, underflow from {low['underflow']:.1%} to "
        f"{high['underflow']:.1%} and precision from {low['precision_db']:.1f} to {high['precision_db']:.1f} dB; "
        f"{len(sweep)} values make {len(_alike(sweep))} different choices of formats and move the noise prediction by "
        f"{max(values) - min(values):.2f} dB; {_verdict(sweep)}."
    )


def _verdict(sweep: Sweep) -> str:
    """The best choice over the runner-up, then every other choice against the default's."""
    ranked = sorted(_alike(sweep), key=lambda alphas: -sweep[alphas[0]]["score"]["eps_sqnr_db"][JUDGED][0])
    if len(ranked) == 1:
        return "all values choose the same formats"
    best, runner_up = ranked[:2]
    lead = eps_gain(sweep[best[0]]["score"], sweep[runner_up[0]]["score"], JUDGED)
    parts = [f"highest with {_words(best)}, {compared(lead)} the next choice, {_words(runner_up)} ({signed_db(lead)})"]
    by_word: dict[str, list[str]] = {}
    for alphas in ranked:
        if DEFAULT not in alphas:
            gain = eps_gain(sweep[alphas[0]]["score"], sweep[DEFAULT]["score"], JUDGED)
            by_word.setdefault(compared(gain), []).append(f"{_words(alphas)} ({signed_db(gain)})")
    parts += [f"{word} the default {DEFAULT:g}: {', '.join(found)}" for word, found in by_word.items()]
    return "; ".join(parts)


def _words(alphas: Sequence[float]) -> str:
    """One choice by its values of alpha; the default stands for those that choose as it does."""
    if DEFAULT not in alphas:
        return " = ".join(f"{alpha:g}" for alpha in alphas)
    others = " = ".join(f"{alpha:g}" for alpha in alphas if alpha != DEFAULT)
    return f"the default {DEFAULT:g}" + (f" (= {others})" if others else "")


def _image_answer(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What the images say: PSNR and class accuracy of the best and the worst choice."""
    judged = [row for row in rows if not row["method"].startswith(FLOAT32) and row["psnr_db"] is not None]
    best, worst = (pick(judged, key=lambda row: row["psnr_db"][0]) for pick in (max, min))
    exact = rows[0]["accuracy"][0]
    parts = [
        f"{row['method']}: {row['psnr_db'][0]:.1f} dB [{row['psnr_db'][1]:.1f}, {row['psnr_db'][2]:.1f}], class "
        f"accuracy {row['accuracy'][0]:.1%}"
        for row in (best, worst)
    ]
    return f"{name}, images (float32: class accuracy {exact:.1%}): closest to float32 {'; farthest '.join(parts)}."
