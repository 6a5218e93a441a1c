"""`outliers`: what scaling could still gain, the statistics' way into the record, and its answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hqdit.analysis.activations import activation_statistics
from hqdit.experiments import outliers
from hqdit.experiments.outliers import left_after_rotation_db
from hqdit.records.run_record import Heatmap, Histogram

MAGNITUDE = st.floats(0.01, 100.0)


@given(st.lists(st.tuples(MAGNITUDE, MAGNITUDE), min_size=1, max_size=20))
def test_what_is_left_is_what_the_best_scaling_gains(pairs):
    a, w = np.array(pairs).T
    s = np.sqrt(a / w)
    plain = (a**2).sum() * (w**2).sum()
    scaled = ((a / s) ** 2).sum() * ((w * s) ** 2).sum()
    assert left_after_rotation_db(a, w) == pytest.approx(10 * math.log10(plain / scaled), abs=1e-9)
    assert left_after_rotation_db(a, w) >= -1e-9
    # No other scaling of the channels does better.
    for other in (s**2, np.ones_like(s), a, 1 / w):
        assert ((a / other) ** 2).sum() * ((w * other) ** 2).sum() >= scaled * (1 - 1e-12)


def test_compensated_outliers_by_hand():
    # One of 4 channels is 10 times larger, its weights 10 times smaller: 103 * 3.01 / 16.
    a, w = [1, 1, 1, 10], [1, 1, 1, 0.1]
    assert left_after_rotation_db(a, w) == pytest.approx(10 * math.log10(103 * 3.01 / 16))
    assert left_after_rotation_db([2, 2], [3, 3]) == pytest.approx(0.0, abs=1e-12)


@pytest.fixture(scope="module")
def record(lab, tiny_subject, loud_subject):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outliers, "SUBJECTS", (tiny_subject, loud_subject))
        return outliers.run(lab)


def test_the_record(record, require_whole):
    require_whole(record, "outliers")
    assert [row[0] for row in record.tables[0].rows] == ["modulation", "q, k, v", "attention-out", "fc1", "fc2"]
    assert all(row[1] == 2 for row in record.tables[0].rows)  # blocks
    assert len(record.tables) == 2 and len(record.figures) == 2 * (5 + 2 + 1 + 2 + 4)


def test_medians_come_with_their_range_over_blocks(record):
    table = record.tables[0]
    assert {column.interval for column in table.columns[2:]} == {"range over blocks"}
    (name, *_) = record.measurements
    entries = [entry for entry in record.measurements[name]["inputs"] if entry["input"].endswith("fc1")]
    kurtosis = [entry["before"]["kurtosis"] for entry in entries]
    found = next(row for row in table.rows if row[0] == "fc1")[4]
    assert table.columns[4].title == "Kurtosis, before" and len(kurtosis) == 2
    expected = [sum(kurtosis) / 2, min(kurtosis), max(kurtosis)]
    assert [found.value, found.low, found.high] == pytest.approx(expected, rel=1e-4)


def test_moments_by_layer_and_time_step_are_in_the_record(record, lab, tiny_subject):
    exact = activation_statistics(tiny_subject.model, lab.inputs(tiny_subject), outliers.CONFIG)
    kept = record.measurements["digits"]
    assert kept["timesteps"] == list(lab.inputs(tiny_subject).timesteps)
    for entry in kept["inputs"]:
        of_layer = exact[entry["layers"][-1]]
        for side, found in (("before", of_layer.before), ("after", of_layer.after)):
            numbers = entry[side]
            assert numbers["skewness_by_timestep"] == pytest.approx(found.by_timestep.skewness, rel=1e-4)
            assert numbers["kurtosis_by_timestep"] == pytest.approx(found.by_timestep.kurtosis, rel=1e-4)
            assert numbers["channel_absmax_by_timestep"] == pytest.approx(found.by_timestep.absmax, rel=1e-4)
            assert max(numbers["channel_absmax"]) == max(numbers["channel_absmax_by_timestep"])
    maps = [figure for figure in record.figures if isinstance(figure, Heatmap) and figure.y_label == "input"]
    assert [figure.title.split(",")[0] for figure in maps[:4]] == [
        f"{moment} {side} the rotation" for moment in ("Kurtosis", "Skewness") for side in ("before", "after")
    ]
    assert all(figure.x_label.startswith("time step") and figure.y_label == "input" for figure in maps)
    for row, entry in zip(maps[2].values, kept["inputs"], strict=True):
        assert row == pytest.approx(entry["before"]["skewness_by_timestep"], rel=1e-4)


def test_moments_of_equal_numbers_are_none():
    side = {"kurtosis_by_timestep": [math.nan, 3.0], "max_over_median": math.inf}
    entry = {"input": "i", "layers": ["l"], "left_db": 1.23456789, "before": side, "after": side}
    entry["histogram"] = {"end": 4.0, "before": [0.123456789, 0.0], "after": [0.0, 1.0]}
    entry["histogram_by_timestep"] = {"980": entry["histogram"]}
    found = outliers._numbers(entry)
    assert found["before"] == {
        "kurtosis_by_timestep": [None, 3.0],
        "max_over_median": math.inf,
        "density": [0.12346, 0.0],
        "density_by_timestep": {"980": [0.12346, 0.0]},
    }
    assert found["histogram_end"] == 4.0
    assert found["left_db"] == 1.2346


def test_injected_outliers_are_seen_and_rotated_away_but_stay_in_the_weights(record):
    quiet, loud = ({row[0]: row for row in table.rows} for table in record.tables)
    titles = [column.title for column in record.tables[0].columns]
    before, after, left = (titles.index(t) for t in ("Max/median, before", "Max/median, after", "Left after rotation"))
    for role in ("q, k, v", "fc1"):
        assert loud[role][before].value > 5 * quiet[role][before].value
        assert loud[role][after].value < loud[role][before].value / 2
        assert loud[role][left].value > quiet[role][left].value + 1
    for role in ("modulation", "attention-out", "fc2"):  # the function is the same, so all else is
        assert loud[role][before].value == pytest.approx(quiet[role][before].value, rel=1e-2)
    assert any("Compensated outliers" in answer for answer in record.answers)


def test_histograms_are_densities(record):
    for figure in (figure for figure in record.figures if isinstance(figure, Histogram)):
        width = figure.edges[1] - figure.edges[0]
        for series in figure.series:
            assert sum(series.y) * width == pytest.approx(1.0)


def test_every_input_has_a_histogram_in_the_record(record, lab, tiny_subject):
    statistics = activation_statistics(tiny_subject.model, lab.inputs(tiny_subject), outliers.CONFIG)
    for entry in record.measurements["digits"]["inputs"]:
        overall = statistics[entry["layers"][0]].before.overall
        end, densities = entry["histogram_end"], [entry[side]["density"] for side in ("before", "after")]
        width = 2 * end / len(densities[0])
        centres = (np.arange(len(densities[0])) + 0.5) * width - end
        for density in densities:
            # In units of the root mean square the mean of the squares is 1, before as after; bins are coarse.
            assert (np.array(density) * width).sum() == pytest.approx(1.0, rel=1e-3)
            assert (np.array(density) * width * centres**2).sum() == pytest.approx(1.0, abs=width)
        assert end >= overall.absmax / np.sqrt(overall.mean_square)
        at_steps = statistics[entry["layers"][0]].before.by_timestep.mean_square
        for side in ("before", "after"):
            by_step = entry[side]["density_by_timestep"]
            assert list(by_step) == [str(lab.inputs(tiny_subject).timesteps[k]) for k in (0, 4, 7)]
            for step, density in zip((0, 4, 7), by_step.values(), strict=True):
                share = at_steps[step] / overall.mean_square
                assert (np.array(density) * width).sum() == pytest.approx(1.0, rel=1e-3)
                assert (np.array(density) * width * centres**2).sum() == pytest.approx(share, abs=width)


def test_histograms_and_channels_by_time_step(record, lab, tiny_subject):
    timesteps = lab.inputs(tiny_subject).timesteps
    by_step = [figure for figure in record.figures if "by time step" in figure.title]
    assert len(by_step) == 2 * 2
    for figure in by_step:
        assert [series.name for series in figure.series] == [f"t = {timesteps[k]}" for k in (0, 4, 7)]
    channels = [figure for figure in record.figures if isinstance(figure, Heatmap) and figure.y_label == "channel"]
    assert len(channels) == 2 * 2
    statistics = activation_statistics(tiny_subject.model, lab.inputs(tiny_subject), outliers.CONFIG)
    inputs = {entry["input"]: entry for entry in record.measurements["digits"]["inputs"]}
    (where,) = {name for name in inputs if channels[0].title.endswith(f"input of {name}")}
    maxima = statistics[inputs[where]["layers"][0]].before.channel_absmax
    for label, row in zip(channels[0].row_labels, channels[0].values, strict=True):
        assert row == pytest.approx(maxima[:, int(label.removeprefix("channel "))])
    assert max(channels[0].values[0]) == pytest.approx(maxima.max())


def test_the_steps_that_are_shown():
    assert [outliers.shown_steps(count) for count in (1, 2, 3, 20)] == [[0], [0, 1], [0, 1, 2], [0, 10, 19]]


def test_the_answer_about_the_rotation_can_come_out_either_way():
    def entry(ratio, kurtosis, share):
        side = {"max_over_median": ratio, "kurtosis": kurtosis, "between_share": share}
        return {"role": "fc1", "input": "block 1, fc1", "before": side, "after": side}

    calm = outliers._answers("m", [entry(1.5, 3.0, 0.9)])
    loud = outliers._answers("m", [entry(9.0, 30.0, 0.1)])
    assert "in 1 of 1 inputs" in calm[0] and "none of them keeps outliers" in calm[1]
    assert "in 0 of 1 inputs" in loud[0] and "outliers stay in 1 (fc1 (1))" in loud[1]
