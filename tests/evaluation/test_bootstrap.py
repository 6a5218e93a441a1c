"""Bootstrap intervals: their ends by an independent route, and how often they hold the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hqdit.errors import UsageError
from hqdit.evaluation.bootstrap import bootstrap_interval, bootstrap_mean


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
