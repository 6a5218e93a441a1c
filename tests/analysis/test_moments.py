"""Moments against scipy's, in one piece and pooled from parts."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from hqdit.analysis.moments import Moments


def skewed(rows: int, groups: int, seed: int) -> np.ndarray:
    """Numbers with a mean, a skew and heavy tails of their own in every column."""
    random = np.random.default_rng(seed)
    return random.gamma(2.0, 1.0, (rows, groups)) * random.uniform(-3, 3, groups) + 50 * random.normal(size=groups)


def require_scipy(found: Moments, values: np.ndarray) -> None:
    """`values` (n, ...): the moments over the first axis."""
    assert np.array_equal(found.count, np.full(values.shape[1:], len(values)))
    assert np.array_equal(found.absmax, np.abs(values).max(axis=0))
    # Relative to the sums of magnitudes that enter each moment; the inputs' own rounding of the mean is in them.
    np.testing.assert_allclose(found.mean, values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.variance, values.var(axis=0), rtol=1e-10)
    np.testing.assert_allclose(found.mean_square, (values**2).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.skewness, scipy.stats.skew(values, axis=0), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found.kurtosis, scipy.stats.kurtosis(values, axis=0, fisher=False), rtol=1e-8)


@given(st.integers(3, 60), st.integers(1, 5), st.integers(0, 10**6))
def test_moments_of_columns_are_scipys(rows: int, groups: int, seed: int) -> None:
    values = skewed(rows, groups, seed)
    require_scipy(Moments.of_columns(torch.from_numpy(values)), values)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(0, 10**6))
def test_parts_of_any_size_pool_to_the_whole(sizes: list[int], seed: int) -> None:
    values = skewed(sum(sizes) + 3, 4, seed)
    parts = np.split(values, np.cumsum(sizes))
    whole = Moments.stack([Moments.of_columns(torch.from_numpy(part)) for part in parts]).pooled(0)
    require_scipy(whole, values)


def test_pooling_columns_gives_the_moments_of_all_numbers() -> None:
    values = skewed(40, 6, 0)
    require_scipy(Moments.of_columns(torch.from_numpy(values)).pooled(0), values.reshape(-1))


def test_more_rows_than_one_conversion_takes() -> None:
    values = skewed(10_000, 2, 1)
    require_scipy(Moments.of_columns(torch.from_numpy(values)), values)


def test_float32_is_summed_in_float64() -> None:
    values = (np.random.default_rng(0).standard_normal((5000, 1)) + 1000).astype(np.float32)
    require_scipy(Moments.of_columns(torch.from_numpy(values)), values.astype(np.float64))


def test_known_distributions() -> None:
    coin = torch.tensor([[-1.0], [1.0]])
    assert Moments.of_columns(coin).kurtosis == pytest.approx(1.0)
    assert Moments.of_columns(coin).skewness == pytest.approx(0.0)
    # One of a thousand numbers is 1, the rest 0: the moments of a Bernoulli variable.
    p = 1e-3
    rare = torch.zeros(1000, 1)
    rare[17] = 1.0
    assert Moments.of_columns(rare).kurtosis == pytest.approx((1 - 3 * p * (1 - p)) / (p * (1 - p)))
    assert Moments.of_columns(rare).skewness == pytest.approx((1 - 2 * p) / np.sqrt(p * (1 - p)))


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
def test_equal_numbers_have_no_shape(value: float) -> None:
    found = Moments.of_columns(torch.full((7, 1), value, dtype=torch.float64))
    assert np.isnan(found.kurtosis).all() and np.isnan(found.skewness).all()
    assert found.mean == pytest.approx(value) and found.absmax == abs(value)
