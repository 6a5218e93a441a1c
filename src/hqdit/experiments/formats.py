"""`formats`: adaptive selection of the number format against every fixed one, per layer and per channel.

Weights are rounded to nearest, so that nothing but the format differs.

Source: HQ-DiT (arXiv 2405.19751), section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from hqdit.evaluation.fidelity import PAIRS
from hqdit.experiments.laboratory import Laboratory, eps_gain, format_share
from hqdit.experiments.noise_floor import noise_floor, reference_rows
from hqdit.experiments.subjects import Subject
from hqdit.experiments.wording import compared, interval_notes, signed_db
from hqdit.formats.catalog import FP4_FORMATS
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.plan import plan_quantization
from hqdit.pipeline.rotation_check import signs_of, weight_to_rotate
from hqdit.quantizers.format_selection import range_statistic, select_format
from hqdit.quantizers.quantized_tensor import round_to_nearest, weight_scales
from hqdit.quantizers.spec import WeightSpec
from hqdit.records.run_record import Bars, Cell, Column, Figure, FormatMap, Interval, RunRecord, Series, Table
from hqdit.transforms.rotation import rotate

SUBJECTS = (Subject("digits"), Subject("shapes"), Subject("digits", 10.0))
ROTATIONS = {"full": "rotated", "none": "not rotated"}
PER_LAYER, PER_CHANNEL = "fp4 per layer", "fp4 per channel"
FLOATS = tuple(fmt.name for fmt in FP4_FORMATS)
FIXED = (*FLOATS, "int4")
JUDGED = "guided 1.5"

#: (subject, rotation) -> formats -> score.
Scores = Mapping[tuple[str, str], Mapping[str, dict[str, Any]]]


def configurations(rotation: str) -> dict[str, QuantizationConfig]:
    """Both adaptive choices, then every fixed format, all rounded to nearest."""
    nearest = QuantizationConfig(rotation=rotation, gptq=False)
    return {
        PER_LAYER: nearest,
        PER_CHANNEL: nearest.replace(format_granularity="channel"),
        **{name: nearest.replace(weights=name) for name in FIXED},
    }


def run(lab: Laboratory) -> RunRecord:
    """Score adaptive and fixed formats, rotated and not, and ask how often the rule picks the best format."""
    subjects = lab.subjects(SUBJECTS)
    cells = [
        (subject, rotation, name, config)
        for subject in subjects
        for rotation in ROTATIONS
        for name, config in configurations(rotation).items()
    ]
    lab.prepare([methodcaller("score", cell[0], cell[3]) for cell in cells], "formats")
    picks = [partial(_channels, subject=subject, rotation=rotation) for subject in subjects for rotation in ROTATIONS]
    lab.prepare(picks, "formats of channels")
    scores: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for subject, rotation, name, config in cells:
        scores.setdefault((subject.name, rotation), {})[name] = lab.score(subject, config)
    channels = {
        (subject.name, rotation): _channels(lab, subject, rotation) for subject in subjects for rotation in ROTATIONS
    }
    pick_rows = []
    for (name, rotation), by_format in scores.items():
        regrets = list(rule_against_best(by_format).values())
        share, loss = channels[name, rotation]["hit_share"], channels[name, rotation]["regret_db"]
        mean_regret = sum(regrets) / len(regrets)
        right = regrets.count(0.0)
        pick_rows.append((name, ROTATIONS[rotation], len(regrets), right, mean_regret, max(regrets), share, loss))
    floors = {subject.name: noise_floor(lab, subject) for subject in subjects}
    figures: list[Figure] = []
    for subject in subjects:
        figures.append(_bars(subject.name, scores))
        figures += [
            _format_map(subject.name, rotation, granularity, scores)
            for granularity in (PER_LAYER, PER_CHANNEL)
            for rotation in ROTATIONS
        ]
    counted = f"{PAIRS} held-out trajectories of {lab.sampling.steps} steps; 95 % bootstrap intervals over trajectories"
    return RunRecord(
        name="formats",
        title="Number formats",
        question="Is choosing among E3M0, E2M1 and E1M2 by max|W| / Quantile(|W|, alpha) better than one fixed format?",
        answers=tuple(_answers(scores, channels)),
        tables=(
            *(_table(subject.name, scores, floors[subject.name], counted) for subject in subjects),
            Table("How often the rule picks the best format", _PICK_COLUMNS, tuple(pick_rows)),
        ),
        figures=tuple(figures),
        config={"alpha": QuantizationConfig().alpha, "gptq": False, "formats": list(FIXED), "judged": JUDGED},
        notes=(
            "Inputs take the format that all layers reading them choose together; with a fixed format, both operands "
            "have it. The best format of a layer is the one of the highest output SQNR on held-out float inputs.",
            *interval_notes("the rotation's signs"),
            "E1M2 and INT4 hold the same numbers but for INT4's -8, which absmax scaling never reaches.",
        ),
        measurements={"channels": {f"{name}, {ROTATIONS[r]}": found for (name, r), found in channels.items()}},
    )


def rule_against_best(by_format: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Layer -> SQNR that the rule's format loses against the best of the three, in dB: 0 where it picks the best.

    Each layer's SQNR is measured alone on float inputs, so that runs with one format everywhere say what every layer
    would have with it.
    """
    regrets = {}
    for layer, shares in by_format[PER_LAYER]["formats"].items():
        (chosen,) = shares
        found = {name: float(by_format[name]["layer_sqnr_db"][layer]) for name in FLOATS}
        regrets[layer] = max(found.values()) - found[chosen]
    return regrets


def _channels(lab: Laboratory, subject: Subject, rotation: str) -> dict[str, Any]:
    key = {"what": "formats of channels", "subject": subject.name, "rotation": rotation, "seed": lab.seed}
    return lab.cache.numbers(key, lambda: channel_picks(subject, rotation, lab.seed))


def channel_picks(subject: Subject, rotation: str, seed: int) -> dict[str, Any]:
    """How often the rule picks, for an output channel, the format of least squared error of its weights.

    Returns:
        hit_share: share of all output channels.
        regret_db: 10 log10 of the summed error of the rule's picks over that of the best picks.
    """
    config = QuantizationConfig(rotation=rotation)
    plan = plan_quantization(subject.model, config)
    hits = channels = 0
    picked = least = 0.0
    for layer in plan.layers:
        linear = subject.model.get_submodule(layer.site.name)
        assert isinstance(linear, nn.Linear)  # the plan holds nothing else
        weight, _ = weight_to_rotate(layer, plan, linear, seed)
        rotated = rotate(weight, layer.rotation, signs_of(layer, seed))
        errors = rounding_errors(rotated)
        statistics = range_statistic(rotated, config.alpha)
        picks = torch.tensor([FP4_FORMATS.index(select_format(found, FP4_FORMATS)) for found in statistics])
        chosen = errors[torch.arange(len(errors)), picks]
        best = errors.min(dim=1).values
        hits += int((chosen == best).sum())
        channels += len(errors)
        picked += float(chosen.sum())
        least += float(best.sum())
    return {"hit_share": hits / channels, "regret_db": float(10 * torch.log10(torch.tensor(picked / least)))}


def rounding_errors(weight: Tensor) -> Tensor:
    """Squared error of every output channel in each of `FP4_FORMATS` with absmax scales.

    Args:
        weight: floating point (out_features, in_features).

    Returns:
        float64 (out_features, formats).
    """
    columns = []
    for fmt in FP4_FORMATS:
        spec = WeightSpec((fmt,))
        rounded = round_to_nearest(weight, weight_scales(weight, spec, None, "absmax"), spec, None).dequantize()
        columns.append((rounded.to(torch.float64) - weight.to(torch.float64)).square().sum(dim=1))
    return torch.stack(columns, dim=1)


_PICK_COLUMNS = (
    Column("Model"),
    Column("Rotation"),
    Column("Layers"),
    Column("Best picked", "", 0, "layers where the rule's format has the best output SQNR of the three"),
    Column("Mean loss", "dB", 2, "layer SQNR lost against the best format, mean over layers"),
    Column("Worst loss", "dB", 2, "the same, worst layer"),
    Column("Channels right", "", 2, "share of output channels whose own pick has the least squared weight error"),
    Column("Weight loss", "dB", 2, "squared weight error of the channels' picks over that of the best picks"),
)


def _table(subject: str, scores: Scores, floor: Mapping[str, Any], counted: str) -> Table:
    columns = (
        Column("Rotation"),
        Column("Formats"),
        Column("Layer SQNR", "dB", 2, "mean over layers, each alone on float inputs"),
        Column("Noise prediction", "dB", 2, "SQNR after guidance 1.5"),
        Column("Against fp4 per layer", "dB", 2, "paired gain over the rule's choice per layer"),
        *(Column(name.upper(), "", 2, "share of the output channels, mean over layers") for name in FIXED),
    )
    rows: list[tuple[Cell, ...]] = [(None, *row, None, *(None for _ in FIXED)) for row in reference_rows(floor, JUDGED)]
    for rotation, word in ROTATIONS.items():
        by_format = scores[subject, rotation]
        for name, score in by_format.items():
            gain = None if name == PER_LAYER else eps_gain(score, by_format[PER_LAYER], JUDGED)
            shares = (format_share(score, fmt) for fmt in FIXED)
            judged = Interval(*score["eps_sqnr_db"][JUDGED])
            rows.append((word, name, Interval(*score["mean_layer_sqnr_db"]), judged, gain, *shares))
    return Table(f"Formats on {subject}", columns, tuple(rows), counted)


def _bars(subject: str, scores: Scores) -> Bars:
    series = []
    for rotation, word in ROTATIONS.items():
        found = [score["eps_sqnr_db"][JUDGED] for score in scores[subject, rotation].values()]
        y, low, high = (tuple(entry[k] for entry in found) for k in range(3))
        series.append(Series(word, y, low=low, high=high))
    names = tuple(scores[subject, next(iter(ROTATIONS))])
    return Bars(f"Formats on {subject}", names, "SQNR of the noise prediction, guided 1.5 (dB)", tuple(series))


def _format_map(subject: str, rotation: str, granularity: str, scores: Scores) -> FormatMap:
    formats = scores[subject, rotation][granularity]["formats"]
    return FormatMap(
        f"{granularity}, {subject}, {ROTATIONS[rotation]}",
        tuple(formats),
        tuple(formats.values()),
        "share of each layer's output channels by the format that the rule chose",
    )


def _answers(scores: Scores, channels: Mapping[tuple[str, str], Mapping[str, float]]) -> Sequence[str]:
    sentences = []
    for (subject, rotation), by_format in scores.items():
        best = max(FIXED, key=lambda name: by_format[name]["eps_sqnr_db"][JUDGED][0])
        gain = eps_gain(by_format[PER_LAYER], by_format[best], JUDGED)
        per_channel = eps_gain(by_format[PER_CHANNEL], by_format[best], JUDGED)
        by_layer = rule_against_best(by_format)
        regrets = list(by_layer.values())
        worst = max(by_layer, key=lambda layer: by_layer[layer])
        share = channels[subject, rotation]["hit_share"]
        sentences.append(
            f"{subject}, {ROTATIONS[rotation]}: the choice per layer is {compared(gain)} the best fixed format, {best} "
            f"({signed_db(gain)}), the choice per channel {compared(per_channel)} it ({signed_db(per_channel)}). The "
            f"rule picks the best of the three formats in {regrets.count(0.0)} of {len(regrets)} layers, losing "
            f"{sum(regrets) / len(regrets):.2f} dB of layer SQNR on average and at most {by_layer[worst]:.1f} dB "
            f"({worst}), and for {share:.0%} of the channels."
        )
    return sentences
