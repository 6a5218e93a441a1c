"""`domains`: rank correlation against scipy, the design of the grid, regrets by hand, and the record."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from hqdit.experiments import domains
from hqdit.experiments.domains import GRID, JUDGED, grid, ranks, spearman
from hqdit.experiments.image_scores import FLOAT32
from hqdit.experiments.noise_floor import FLOOR

SMALL = st.integers(-3, 3).map(float)  # few values, so that ties are common


@given(st.lists(SMALL, min_size=1, max_size=30))
def test_ranks_are_those_of_scipy(values):
    assert ranks(values).tolist() == scipy.stats.rankdata(values).tolist()


@given(st.lists(st.tuples(SMALL, SMALL), min_size=3, max_size=30))
def test_spearman_is_that_of_scipy(pairs):
    a, b = zip(*pairs, strict=True)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert spearman(a, b) == 0.0  # scipy says NaN, which no record can hold
    else:
        assert spearman(a, b) == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-12)


def test_the_grid_is_a_balanced_half():
    settings = grid()
    assert len(settings) == len(set(settings)) == math.prod(len(values) for values in GRID.values()) // 2
    assert tuple(values[0] for values in GRID.values()) in settings  # the default is what others are compared with
    for first, second in combinations(range(len(GRID)), 2):
        seen = Counter((chosen[first], chosen[second]) for chosen in settings)
        assert len(set(seen.values())) == 1, "every pair of values is equally frequent, so that effects do not mix"
        names = list(GRID)
        assert len(seen) == len(GRID[names[first]]) * len(GRID[names[second]])


def test_a_quick_grid_is_part_of_the_whole():
    assert set(grid(is_quick=True)) < set(grid())


def test_regret_and_place_by_hand():
    settings = grid(is_quick=True)[:3]
    default = tuple(values[0] for values in GRID.values())
    assert settings[0] == default

    def score(db):
        noise = [10 ** (-db / 10)] * 4
        return {"eps_sqnr_db": {JUDGED: [db, db, db]}, "eps_noise_powers": {JUDGED: noise}}

    scores = {
        "a": dict(zip(settings, map(score, (10.0, 12.0, 11.0)), strict=True)),
        "b": dict(zip(settings, map(score, (20.0, 17.0, 21.0)), strict=True)),
    }
    found = domains._transfer(scores, "a", "b")
    assert found["carried"] == settings[1] and found["own"] == settings[2]
    assert found["place"] == 3 and found["spread"] == pytest.approx(4.0)
    assert found["regret"].value == pytest.approx(4.0) and found["over_default"].value == pytest.approx(-3.0)
    assert "place 3 of 3" in domains._transfer_answer(found)


def test_effects_are_mean_differences_over_the_grid():
    gains = {"block:16": -1.0, "none": -4.0, 0.1: 0.5, "mse": 2.0, "channel-token": -0.25, True: 1.5}
    stream = np.random.default_rng(1)
    trajectories = stream.uniform(0.5, 2.0, 6)
    scores = {}
    for chosen in grid():
        db = sum(gains.get(value, 0.0) for value in chosen)
        scores[chosen] = {"eps_noise_powers": {JUDGED: (trajectories * 10 ** (-db / 10)).tolist()}}
    found = domains._effects(scores)
    assert len(found) == len(gains)
    for name, interval in found.items():
        value = name.split(" = ")[1]
        expected = next(gain for key, gain in gains.items() if str(key) == value)
        # Trajectories differ, settings act alike on all of them: the interval has no width.
        assert [interval.low, interval.value, interval.high] == pytest.approx([expected] * 3)


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.51, 0.9, "carries over to b"),
        (0.2, 0.9, "is related to that on b"),
        (-0.9, -0.2, "is reversed on b"),
        (-0.3, 0.4, "does not clearly carry over to b"),
    ],
)
def test_the_answer_can_come_out_either_way(low, high, words):
    assert words in domains._rank_answer(domains.Interval((low + high) / 2, low, high), "a", "b")


def test_the_record(lab, tiny_subject, other_subject, monkeypatch, require_whole):
    monkeypatch.setattr(domains, "SUBJECTS", (tiny_subject, other_subject))
    monkeypatch.setattr(domains, "TRAJECTORIES", 4)
    monkeypatch.setattr(domains, "CALIBRATION_SAMPLES", 8)
    small = {**GRID, "rotation": ("full", "block:36"), "activation_granularity": ("token",), "alpha": (0.25,)}
    monkeypatch.setattr(domains, "GRID", small)
    record = domains.run(lab)
    require_whole(record, "domains")
    carried, effects, everything = record.tables
    assert [row[:2] for row in carried.rows] == [(tiny_subject.name, "other"), ("other", tiny_subject.name)]
    assert [row[0] for row in everything.rows[:2]] == [FLOAT32, FLOOR]
    settings = everything.rows[2:]
    assert len(settings) == len(grid(is_quick=True)) == 4
    assert len(effects.rows) == 3
    for row in carried.rows:
        assert row[6].value >= 0  # nothing is better than the own best
    columns = np.array([[row[1].value, row[2].value] for row in settings])
    expected = scipy.stats.spearmanr(columns[:, 0], columns[:, 1]).statistic
    assert record.measurements["spearman"][0] == pytest.approx(expected)
