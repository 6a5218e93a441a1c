"""`hqdit analyze` on a float model: activations before and after the planned rotation, and the formats it would get."""

from __future__ import annotations

import math
import statistics as plain_statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from hqdit.analysis.activations import (
    ActivationHistogram,
    ActivationStatistics,
    Distribution,
    activation_histograms,
    activation_statistics,
)
from hqdit.analysis.trajectories import NoisyInputs
from hqdit.analysis.weights import WeightStatistics, weight_statistics
from hqdit.pipeline.config import QuantizationConfig
from hqdit.records.run_record import (
    Bars,
    Column,
    Figure,
    FormatMap,
    Histogram,
    Lines,
    RunRecord,
    Series,
    Table,
)

#: Inputs whose distributions are drawn: those with the largest kurtosis.
WORST = 4

_ACTIVATION_COLUMNS = (
    Column("Input of"),
    *(
        Column(f"{title} {side}", unit, digits, meaning)
        for title, unit, digits, meaning in (
            ("Largest", "", 2, "largest magnitude over samples, tokens, time steps and channels"),
            ("Max / median", "", 1, "largest channel maximum over the median one; 1 means equal channels"),
            ("Kurtosis", "", 1, "of all numbers together; 3 for a normal distribution, more for outliers"),
            ("Skewness", "", 2, "of all numbers together; 0 for a symmetric distribution"),
        )
        for side in ("before", "after")
    ),
    Column("Rotation", meaning="planned for this input, with the Hadamard matrices that it is composed of"),
)


def float_model_record(name: str, model: nn.Module, inputs: NoisyInputs, config: QuantizationConfig) -> RunRecord:
    """The analysis of a float model; environment, settings and duration are the caller's to add.

    Args:
        name: of the model, for people.
        model: a float model with an adapter; not changed.
        inputs: held-out noisy latents of its own trajectories.
        config: the request that is planned.

    Raises:
        UsageError: a quantized model, or options that do not fit it.
        NumericsError: an activation that is NaN or infinite.
    """
    activations = activation_statistics(model, inputs, config)
    weights = weight_statistics(model, config)
    by_input = _by_input(activations)
    worst = sorted(by_input, key=lambda label: -_finite(float(by_input[label].before.overall.kurtosis)))[:WORST]
    first_layers = {label: label.partition(",")[0] for label in worst}
    chosen = {layer: activations[layer] for layer in first_layers.values()}
    histograms = activation_histograms(model, inputs, config, chosen)
    return RunRecord(
        name="analysis",
        title=f"Analysis of {name}",
        question="Which activations and weights are hard to quantize, what does the planned rotation change, and "
        "which formats would the layers get?",
        answers=_answers(by_input, weights, worst),
        tables=(_activation_table(by_input), _weight_table(weights, config)),
        figures=(
            *_outlier_bars(by_input),
            *(_histogram(label, histograms[layer]) for label, layer in first_layers.items()),
            *(_sorted_maxima(label, by_input[label]) for label in worst[:1]),
            _by_timestep({label: by_input[label] for label in worst}),
            FormatMap(
                "Formats that the weights would get",
                tuple(weights),
                tuple(dict(entry.formats) for entry in weights.values()),
                f"Chosen from max|W| / Quantile(|W|, {config.alpha:g}) of the rotated weight, per "
                f"{config.format_granularity}.",
            ),
        ),
        notes=(
            "Activations are those of the conditional branch on the model's own trajectories from held-out noise. "
            "Before: as the float model computes them. After: after the whole planned rotation.",
            "Layers that read one input (q, k and v) share a row.",
        ),
        measurements={"activations": {label: _measured(entry) for label, entry in by_input.items()}},
    )


def _by_input(activations: Mapping[str, ActivationStatistics]) -> dict[str, ActivationStatistics]:
    """One entry for each input, named after the layers that read it: "blocks.0.attn1.to_q, to_k, to_v"."""
    readers: dict[int, list[str]] = {}
    for name, entry in activations.items():
        readers.setdefault(id(entry), []).append(name)
    return {
        ", ".join([names[0], *(name.rpartition(".")[2] for name in names[1:])]): activations[names[0]]
        for names in readers.values()
    }


def _finite(number: float) -> float:
    return number if math.isfinite(number) else 0.0


def _or_none(number: float) -> float | None:
    """NaN, the shape of equal numbers, is nothing that a record can hold."""
    return None if math.isnan(number) else float(number)


def _activation_table(by_input: Mapping[str, ActivationStatistics]) -> Table:
    rows = []
    for label, entry in by_input.items():
        sides = (entry.before, entry.after)
        rows.append(
            (
                label,
                *(float(side.overall.absmax) for side in sides),
                *(side.max_over_median for side in sides),
                *(_or_none(float(side.overall.kurtosis)) for side in sides),
                *(_or_none(float(side.overall.skewness)) for side in sides),
                entry.rotation,
            )
        )
    return Table("Activations", _ACTIVATION_COLUMNS, tuple(rows))


def _weight_table(weights: Mapping[str, WeightStatistics], config: QuantizationConfig) -> Table:
    meaning = f"max|W| / Quantile(|W|, {config.alpha:g}) of the whole layer"
    columns = (
        Column("Layer"),
        Column("Statistic before", "", 1, f"{meaning}, as trained"),
        Column("Statistic after", "", 1, f"{meaning}, after the planned rotation"),
        Column("Format", meaning="of the weight, with shares of the output channels where there are several"),
    )
    rows = [(name, entry.statistic_before, entry.statistic_after, _formats(entry)) for name, entry in weights.items()]
    return Table("Weights", columns, tuple(rows))


def _formats(entry: WeightStatistics) -> str:
    if len(entry.formats) == 1:
        return next(iter(entry.formats))
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in entry.formats.items())


def _outlier_bars(by_input: Mapping[str, ActivationStatistics]) -> list[Figure]:
    categories = tuple(label.partition(",")[0] for label in by_input)
    entries = list(by_input.values())

    def sides(measure: Any) -> tuple[Series, ...]:
        return tuple(
            Series(side, tuple(_or_none(float(measure(getattr(entry, side)))) for entry in entries))
            for side in ("before", "after")
        )

    return [
        Bars(
            "Outlier channels",
            categories,
            "largest / median channel maximum",
            sides(lambda side: side.max_over_median),
            "Inputs of the layers, before and after the planned rotation.",
        ),
        Bars(
            "Heavy tails",
            categories,
            "kurtosis (3: normal)",
            sides(lambda side: side.overall.kurtosis),
            "Inputs of the layers, before and after the planned rotation.",
        ),
    ]


def _histogram(label: str, histogram: ActivationHistogram) -> Histogram:
    return Histogram(
        f"Input of {label}",
        "activation / root mean square",
        tuple(map(float, histogram.edges)),
        tuple(Series(side, tuple(map(float, getattr(histogram, side)))) for side in ("before", "after")),
        "Densities before and after the planned rotation.",
    )


def _sorted_maxima(label: str, entry: ActivationStatistics) -> Lines:
    def sorted_maxima(side: Distribution) -> tuple[float, ...]:
        return tuple(map(float, np.sort(side.channel_absmax.max(axis=0))[::-1]))

    series = tuple(
        Series(side, y=(maxima := sorted_maxima(getattr(entry, side))), x=tuple(map(float, range(1, len(maxima) + 1))))
        for side in ("before", "after")
    )
    return Lines(
        f"Channel maxima of {label}", "channel, by descending maximum", "largest magnitude", series, y_scale="log"
    )


def _by_timestep(entries: Mapping[str, ActivationStatistics]) -> Lines:
    series = []
    for label, entry in entries.items():
        for side in ("before", "after"):
            kurtosis = getattr(entry, side).by_timestep.kurtosis
            name = f"{label.partition(',')[0]}, {side}"
            series.append(Series(name, tuple(map(_or_none, kurtosis)), tuple(map(float, entry.timesteps))))
    return Lines(
        "Heavy tails by time step",
        "time step: sampling runs from left (noise) to right (image)",
        "kurtosis (3: normal)",
        tuple(series),
        y_scale="log",
    )


def _measured(entry: ActivationStatistics) -> dict[str, Any]:
    return {
        "timesteps": list(entry.timesteps),
        **{
            side: {
                "kurtosis_by_timestep": list(map(_or_none, part.by_timestep.kurtosis)),
                "skewness_by_timestep": list(map(_or_none, part.by_timestep.skewness)),
                "absmax_by_timestep": list(map(float, part.by_timestep.absmax)),
                "max_over_median_by_timestep": list(part.max_over_median_by_timestep),
                "channel_absmax": list(map(float, part.channel_absmax.max(axis=0))),
            }
            for side, part in (("before", entry.before), ("after", entry.after))
        },
    }


def _answers(
    by_input: Mapping[str, ActivationStatistics], weights: Mapping[str, WeightStatistics], worst: Sequence[str]
) -> tuple[str, ...]:
    entries = list(by_input.values())
    before, after = ([getattr(entry, side).max_over_median for entry in entries] for side in ("before", "after"))
    loudest = max(by_input, key=lambda label: by_input[label].before.max_over_median)
    tails = by_input[worst[0]]
    counts: dict[str, float] = {}
    for entry in weights.values():
        for fmt, share in entry.formats.items():
            counts[fmt] = counts.get(fmt, 0.0) + share
    formats = ", ".join(f"{fmt} {count:g}" for fmt, count in sorted(counts.items(), key=lambda item: -item[1]))
    return (
        f"The largest channel maximum is {plain_statistics.median(before):.1f} times the median one in the median "
        f"input, and {plain_statistics.median(after):.1f} times after the planned rotation; most in {loudest}: "
        f"{by_input[loudest].before.max_over_median:.1f} before, {by_input[loudest].after.max_over_median:.1f} after.",
        f"The heaviest tails are those of {worst[0]}: kurtosis {float(tails.before.overall.kurtosis):.1f} before, "
        f"{float(tails.after.overall.kurtosis):.1f} after (a normal distribution has 3).",
        f"Formats of the {len(weights)} layers: {formats}.",
    )
