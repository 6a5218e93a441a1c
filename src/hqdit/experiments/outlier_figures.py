"""Figures of the experiment `outliers`: histograms, channels and moments, before and after the rotation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hqdit.evaluation.fidelity import PAIRS
from hqdit.records.run_record import Figure, Heatmap, Histogram, Lines, Series

SIDES = ("before", "after")
#: Channels whose maxima are shown by time step.
SHOWN_CHANNELS = 16


def outlier_figures(name: str, found: Mapping[str, Any], steps: int) -> list[Figure]:
    """What `outliers` measured of one model: a histogram for each role, the loudest input by time step, moments.

    Args:
        name: of the model.
        found: facts about its inputs.
        steps: of the trajectories.
    """
    counted = f"{PAIRS} held-out trajectories of {steps} steps"
    worst = found["worst"]
    by_name = {entry["input"]: entry for entry in found["inputs"]}
    loudest: dict[str, Mapping[str, Any]] = {}
    for entry in found["inputs"]:
        other = loudest.get(entry["role"])
        if other is None or entry["before"]["max_over_median"] > other["before"]["max_over_median"]:
            loudest[entry["role"]] = entry
    figures: list[Figure] = [_histogram(name, entry, counted) for entry in loudest.values()]
    figures += [_by_timestep(name, worst, side) for side in SIDES]
    figures.append(_channel_lines(name, by_name[worst["input"]]))
    figures += [_channel_map(name, worst, found["timesteps"], side) for side in SIDES]
    moments: tuple[tuple[str, Callable[[float], float], str], ...] = (
        ("kurtosis", math.log10, "log10 of the kurtosis (normal: 0.48)"),
        ("skewness", float, "skewness (symmetric: 0)"),
    )
    for fact, shown, label in moments:
        figures += [_moment_map(name, found, side, fact, shown, label) for side in SIDES]
    return figures


def _edges(end: float, density: Sequence[float]) -> tuple[float, ...]:
    return tuple(np.linspace(-end, end, len(density) + 1).tolist())


def _histogram(name: str, entry: Mapping[str, Any], counted: str) -> Histogram:
    of_input = entry["histogram"]
    return Histogram(
        f"Activations before and after the rotation, {name}, input of {entry['input']}",
        "activation / root mean square",
        _edges(of_input["end"], of_input["before"]),
        tuple(Series(side, tuple(of_input[side])) for side in SIDES),
        f"the block whose input of this kind has the largest channel maximum over the median one; {counted}",
    )


def _by_timestep(name: str, worst: Mapping[str, Any], side: str) -> Histogram:
    histograms = worst["histograms"]
    any_of_them = next(iter(histograms.values()))
    return Histogram(
        f"Activations {side} the rotation by time step, {name}, input of {worst['input']}",
        "activation / root mean square over all time steps",
        _edges(any_of_them["end"], any_of_them[side]),
        tuple(Series(f"t = {timestep}", tuple(of_step[side])) for timestep, of_step in histograms.items()),
        "the input with the largest channel maximum over the median one",
    )


def _channel_lines(name: str, entry: Mapping[str, Any]) -> Lines:
    channels = tuple(float(rank + 1) for rank in range(len(entry["before"]["channel_absmax"])))
    return Lines(
        f"Largest magnitude of every channel, {name}, input of {entry['input']}",
        "channel, by magnitude",
        "largest magnitude",
        tuple(Series(side, tuple(entry[side]["channel_absmax"]), channels) for side in SIDES),
        y_scale="log",
    )


def _channel_map(name: str, worst: Mapping[str, Any], timesteps: Sequence[int], side: str) -> Heatmap:
    """The loudest channels by time step."""
    maxima = np.asarray(worst["channel_absmax_by_timestep"][side])  # (channels, timesteps)
    shown = np.argsort(-maxima.max(axis=1), kind="stable")[:SHOWN_CHANNELS]
    return Heatmap(
        f"Largest channels {side} the rotation, {name}, input of {worst['input']}",
        tuple(f"channel {channel}" for channel in shown),
        tuple(map(str, timesteps)),
        tuple(tuple(maxima[channel].tolist()) for channel in shown),
        "largest magnitude",
        f"the {len(shown)} of {len(maxima)} channels with the largest magnitudes",
        x_label="time step, in the order of sampling",
        y_label="channel",
    )


def _moment_map(
    name: str, found: Mapping[str, Any], side: str, fact: str, shown: Callable[[float], float], label: str
) -> Heatmap:
    """A moment by input and time step; blank where all numbers of a time step are equal."""
    return Heatmap(
        f"{fact.capitalize()} {side} the rotation, {name}",
        tuple(entry["input"] for entry in found["inputs"]),
        tuple(map(str, found["timesteps"])),
        tuple(
            tuple(shown(moment) if math.isfinite(moment) else None for moment in entry[side][f"{fact}_by_timestep"])
            for entry in found["inputs"]
        ),
        label,
        x_label="time step, in the order of sampling",
        y_label="input",
    )
