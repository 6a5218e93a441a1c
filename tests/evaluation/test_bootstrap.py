"""Bootstrap intervals: their ends by an independent route, and how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hqdit.errors import UsageError
from hqdit.evaluation.bootstrap import bootstrap_interval, bootstrap_mean
from hqdit.records.run_record import Interval


def test_the_value_is_the_statistic_of_all_samples():
    found = bootstrap_mean([1.0, 2.0, 6.0])
    assert found.value == 3.0
    assert 1.0 <= found.low <= found.value <= found.high <= 6.0


def test_equal_samples_leave_no_doubt():
    found = bootstrap_mean([0.1] * 7)
    assert found.low == found.high == found.value == pytest.approx(0.1)


def test_interval_of_a_mean_is_close_to_the_normal_one():
    samples = np.random.default_rng(0).normal(5.0, 2.0, 400)
    found = bootstrap_mean(samples, resamples=4000)
    # The bootstrap's standard error of a mean is the deviation (divisor n) over sqrt(n); the quantiles of 4,000
    # resamples scatter by about 2.5 % of the interval's width.
    half = 1.96 * samples.std() / math.sqrt(len(samples))
    assert found.low == pytest.approx(found.value - half, abs=0.1 * half)
    assert found.high == pytest.approx(found.value + half, abs=0.1 * half)


def test_about_95_of_100_intervals_hold_the_true_mean():
    held = 0
    for trial in range(300):
        samples = np.random.default_rng(trial).normal(0.0, 1.0, 60)
        found = bootstrap_mean(samples, resamples=200, seed=trial)
        held += found.low <= 0.0 <= found.high
    # Binomial with p = 0.93 to 0.95 (the percentile interval is a little short at n = 60): 300 trials give 279 +- 13.
    assert 262 <= held <= 296


def test_rows_are_resampled_whole():
    rows = np.stack([np.arange(50.0), -np.arange(50.0)], axis=1)
    found = bootstrap_interval(rows, lambda drawn: float(drawn.sum()))
    assert found.low == found.high == 0.0  # the two numbers of a row cancel only if they stay together


def test_equal_seeds_give_equal_intervals():
    samples = np.random.default_rng(1).random(20)
    assert bootstrap_mean(samples, seed=3) == bootstrap_mean(samples, seed=3) != bootstrap_mean(samples, seed=4)


@pytest.mark.parametrize(("samples", "resamples"), [([], 10), ([1.0], 0), (3.0, 10)])
def test_nothing_to_resample_is_refused(samples, resamples):
    with pytest.raises(UsageError, match="bootstrap: found"):
        bootstrap_interval(samples, lambda rows: 0.0, resamples)


def test_rows_are_drawn_within_their_stratum_and_keep_their_places():
    labels = np.array([0, 1, 1, 0, 2, 1, 0, 2] * 4)
    rows = np.stack([labels, np.arange(len(labels))], axis=1).astype(float)
    seen = []

    def kept(drawn):
        seen.append(drawn)
        return 0.0 if np.array_equal(drawn[:, 0], labels) else 1.0

    found = bootstrap_interval(rows, kept, 50, strata=labels)
    assert found.low == found.high == 0.0
    drawn = {tuple(resample[:, 1]) for resample in seen}
    assert len(drawn) == 51  # 50 different resamples and the rows themselves


def test_variance_between_strata_is_no_doubt():
    labels = np.repeat([0, 1], 50)
    values = 100.0 * labels + np.random.default_rng(0).normal(0.0, 1.0, 100)
    within, whole = (bootstrap_mean(values, 2000, strata=strata) for strata in (labels, None))
    # The mean of two strata of equal size: half the root of the sum of both means' variances.
    half = 1.96 / 2 * math.sqrt(values[:50].var() / 50 + values[50:].var() / 50)
    assert within.high - within.low == pytest.approx(2 * half, rel=0.1)
    assert whole.high - whole.low > 20 * half


@pytest.mark.parametrize("is_centred", [False, True])
def test_an_interval_holds_its_value_where_resamples_lie_to_one_side(is_centred):
    # The number of different rows: every resample has fewer.
    found = bootstrap_interval(np.arange(30.0), lambda rows: float(len(np.unique(rows))), 100, 0, is_centred)
    assert found.value == 30.0 and found.low < 30.0
    assert found.high >= 30.0 if is_centred else found.high == 30.0


def test_a_shifted_interval_ends_at_the_least_value():
    rows = np.random.default_rng(0).normal(size=40)

    def squared_mean(drawn):
        return float(drawn.mean() ** 2)

    free, bounded = (
        bootstrap_interval(rows, squared_mean, 100, is_centred=True, lowest=lowest) for lowest in (-math.inf, 0.0)
    )
    assert free.low < 0.0 == bounded.low and free.high == bounded.high and free.value == bounded.value


def test_infinite_statistics_have_infinite_ends_and_no_nan():
    def ratio(rows):
        return math.inf if rows.sum() == 0 else float(rows.sum())

    assert bootstrap_interval([0.0] * 5, ratio, 20) == Interval(math.inf, math.inf, math.inf)
    some = bootstrap_interval([0.0, 0.0, 2.0], ratio, 100)
    assert (some.value, some.low, some.high) == (2.0, 2.0, math.inf)


@pytest.mark.parametrize("strata", [[0, 0], [0, 1, 2], [[0], [0], [0]]])
def test_strata_that_leave_nothing_to_draw_are_refused(strata):
    with pytest.raises(UsageError, match="bootstrap: found .* labels of .* for 3 rows"):
        bootstrap_mean([1.0, 2.0, 3.0], strata=strata)
