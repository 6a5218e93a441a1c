"""The paper's format selection."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hqdit.errors import NumericsError, UsageError
from hqdit.formats.catalog import E1M2, E2M1, E3M0, FP4_FORMATS
from hqdit.formats.number_format import FloatFormat
from hqdit.quantizers.format_selection import range_statistic, select_format


def statistic_by_hand(row: list[float], alpha: float) -> tuple[float, float]:
    """max|W| / Quantile(|W|, alpha) by sorting, in fractions, and a bound of the quantile's relative rounding."""
    magnitude = sorted(abs(Fraction(value)) for value in row)
    position = Fraction(alpha) * (len(row) - 1)
    below = math.floor(position)
    low, high = magnitude[below], magnitude[min(below + 1, len(row) - 1)]
    quantile = low + (high - low) * (position - below)
    if magnitude[-1] == 0:
        return 1.0, 0.0
    if quantile == 0:
        return math.inf, 0.0
    # The position is rounded once (at most len(row) 2^-53), and the interpolation a few times.
    bound = 4 * 2.0**-53 + float((high - low) / quantile) * (len(row) + 4) * 2.0**-53
    return float(magnitude[-1] / quantile), bound


# The statistic


@given(
    st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40),
    st.floats(1e-6, 1 - 1e-6),
)
def test_statistic_is_sorting_by_hand(row: list[float], alpha: float) -> None:
    expected, bound = statistic_by_hand(row, alpha)
    (found,) = range_statistic(torch.tensor([row]), alpha)
    assert found == (math.inf if math.isinf(expected) else pytest.approx(expected, rel=bound))


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.25, 8 / 2), (0.5, 8 / 4), (0.125, 8 / 1), (0.3125, 8 / 2.5), (0.9375, 8 / 7.5)]
)
def test_quantile_interpolates_linearly(alpha: float, expected: float) -> None:
    row = torch.tensor([[3.0, -8.0, 1.0, 0.0, -5.0, 6.0, 2.0, -7.0, 4.0]])  # magnitudes 0..8
    assert range_statistic(row, alpha) == [expected]


def test_every_row_has_its_own_statistic() -> None:
    weight = torch.randn(5, 33, generator=torch.Generator().manual_seed(0))
    by_row = range_statistic(weight, 0.25)
    assert by_row == [range_statistic(weight[i : i + 1], 0.25)[0] for i in range(5)]
    (whole,) = range_statistic(weight.reshape(1, -1), 0.25)
    assert whole not in by_row


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_statistic_of_any_precision(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert range_statistic(weight, 0.25) == range_statistic(weight.double(), 0.25)
    parameter = torch.nn.Parameter(weight)
    assert range_statistic(parameter, 0.25) == range_statistic(weight, 0.25)


def test_quantile_of_more_than_16_million_elements_is_exact() -> None:
    # torch.quantile refuses these. Magnitudes 1..5,000,000, four times each, in a scrambled order and with signs;
    # the alpha quantile of n sorted numbers lies at position alpha (n - 1), where the k-th of these is 1 + k // 4.
    n = 20_000_000
    scrambled = (np.arange(n, dtype=np.int64) * 7_368_787) % n  # coprime to 2 and 5: a permutation
    weight = torch.from_numpy((1 + scrambled // 4).astype(np.float32)).reshape(1, n)
    weight[:, ::3] *= -1
    for alpha in (0.25, 1e-7):
        position = Fraction(alpha) * (n - 1)
        low, high = (1 + (math.floor(position) + k) // 4 for k in (0, 1))
        quantile = low + (high - low) * (position - math.floor(position))
        (found,) = range_statistic(weight, alpha)
        assert found == pytest.approx(float(5_000_000 / quantile), rel=n * 2.0**-53)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf, 25])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match="strictly between 0 and 1"):
        range_statistic(torch.ones(1, 4), alpha)


def test_zeros() -> None:
    weight = torch.zeros(3, 8)
    weight[1, 0] = 5.0  # quantile 0
    weight[2] = -2.0
    assert range_statistic(weight, 0.25) == [1.0, math.inf, 1.0]


def test_nan_weight_is_refused() -> None:
    with pytest.raises(NumericsError, match="NaN"):
        range_statistic(torch.tensor([[1.0, math.nan]]), 0.25)


# The choice


@pytest.mark.parametrize(
    ("statistic", "expected"),
    [
        (1.0, E1M2),
        (7.0, E1M2),
        (math.sqrt(84) * (1 - 1e-12), E1M2),
        (math.sqrt(84) * (1 + 1e-12), E2M1),
        (12.0, E2M1),
        (math.sqrt(768) * (1 - 1e-12), E2M1),
        (math.sqrt(768) * (1 + 1e-12), E3M0),
        (64.0, E3M0),
        (1e300, E3M0),
        (math.inf, E3M0),
    ],
)
def test_borders(statistic: float, expected: FloatFormat) -> None:
    for candidates in itertools.permutations(FP4_FORMATS):
        assert select_format(statistic, candidates) == expected


@given(st.floats(1.0, 1e6))
def test_choice_is_the_nearest_in_log2(statistic: float) -> None:
    # |log s - log R| compared without logarithms: by max(s / R, R / s), exactly.
    def ratio(fmt: FloatFormat) -> Fraction:
        quotient = Fraction(statistic) / Fraction(fmt.dynamic_range)
        return max(quotient, 1 / quotient)

    chosen = select_format(statistic, FP4_FORMATS)
    assert float(ratio(chosen)) <= float(min(ratio(fmt) for fmt in FP4_FORMATS)) * (1 + 1e-12)


def test_ties_go_to_the_longer_mantissa() -> None:
    short, long = FloatFormat(2, 0, reserved_codes=1), FloatFormat(1, 1, reserved_codes=1)
    assert short.dynamic_range == long.dynamic_range == 2
    for statistic in (1.0, 2.0, 7.0):
        assert select_format(statistic, (short, long)) == select_format(statistic, (long, short)) == long


def test_all_zero_layer_takes_the_longest_mantissa() -> None:
    (statistic,) = range_statistic(torch.zeros(1, 64), 0.25)
    assert select_format(statistic, FP4_FORMATS) == E1M2


def test_gaussian_layers_take_e2m1_and_uniform_ones_e1m2() -> None:
    # The quantiles of the distributions themselves: a Gaussian's quartile is 0.3186 sigma and its largest of 10^5 about
    # 4.4 sigma, so about 14; a uniform's largest is 4 times its quartile.
    quantiles = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    (gaussian,) = range_statistic(torch.special.ndtri(quantiles).unsqueeze(0), 0.25)
    (uniform,) = range_statistic(quantiles.unsqueeze(0), 0.25)
    assert gaussian == pytest.approx(4.417 / 0.3186, rel=1e-3)
    assert select_format(gaussian, FP4_FORMATS) == E2M1
    assert uniform == pytest.approx(4.0, rel=1e-4)
    assert select_format(uniform, FP4_FORMATS) == E1M2
