"""`outliers`: what scaling could still gain, the statistics' way into the record, and its answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hqdit.experiments import outliers
from hqdit.experiments.outliers import left_after_rotation_db

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
    assert len(record.tables) == 2 and len(record.figures) == 2 * 4


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
    for figure in (figure for figure in record.figures if isinstance(figure, outliers.Histogram)):
        width = figure.edges[1] - figure.edges[0]
        for series in figure.series:
            assert sum(series.y) * width == pytest.approx(1.0)


def test_the_answer_about_the_rotation_can_come_out_either_way():
    def entry(ratio, kurtosis, share):
        side = {"max_over_median": ratio, "kurtosis": kurtosis, "between_share": share}
        return {"role": "fc1", "input": "block 1, fc1", "before": side, "after": side}

    calm = outliers._answers("m", [entry(1.5, 3.0, 0.9)])
    loud = outliers._answers("m", [entry(9.0, 30.0, 0.1)])
    assert "in 1 of 1 inputs" in calm[0] and "none of them keeps outliers" in calm[1]
    assert "in 0 of 1 inputs" in loud[0] and "outliers stay in 1 (fc1 (1))" in loud[1]
