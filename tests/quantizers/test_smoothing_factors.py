"""Smoothing factors: the formula, and channels that have no range to divide."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import require_complete

from hqdit.errors import NumericsError
from hqdit.quantizers.smoothing import FACTOR_RANGE, smoothing_factors

magnitudes = st.lists(st.tuples(st.floats(1e-5, 1e5), st.floats(1e-5, 1e5)), min_size=1, max_size=8)


@given(magnitudes, st.floats(0, 1))
def test_both_operands_get_their_share_of_the_range(pairs: list[tuple[float, float]], alpha: float) -> None:
    """max|x / s| = max|x|^(1 - alpha) max|w|^(1 - alpha) and max|w s| = (max|x| max|w|)^alpha, in logarithms."""
    x, w = (torch.tensor(side, dtype=torch.float64) for side in zip(*pairs, strict=True))
    factors = smoothing_factors(x, w, alpha)
    assert factors.dtype == torch.float64
    for (large, column), s in zip(pairs, factors.tolist(), strict=True):
        product = math.log(large) + math.log(column)
        assert math.log(large) - math.log(s) == pytest.approx((1 - alpha) * product, abs=1e-12 + 1e-13 * abs(product))
        assert math.log(column) + math.log(s) == pytest.approx(alpha * product, abs=1e-12 + 1e-13 * abs(product))


@pytest.mark.parametrize(
    ("x", "w", "alpha"), [(1e-40, 1.0, 1.0), (1e-20, 1.0, 0.5), (1e30, 1e-30, 0.5), (1.0, 1e9, 0.0)]
)
def test_factors_stay_within_their_range(x: float, w: float, alpha: float) -> None:
    (factor,) = smoothing_factors(torch.tensor([x], dtype=torch.float64), torch.tensor([w], dtype=torch.float64), alpha)
    assert float(factor) in FACTOR_RANGE and math.isfinite(float(factor.reciprocal().to(torch.float32)))


def test_by_hand() -> None:
    # sqrt(100 / 4) = 5 and sqrt(1 / 4) = 1/2; alpha 1 takes max|x|, alpha 0 takes 1 / max|w|.
    x, w = torch.tensor([100.0, 1.0]), torch.tensor([4.0, 4.0])
    assert smoothing_factors(x, w, 0.5).tolist() == [5.0, 0.5]
    assert smoothing_factors(x, w, 1.0).tolist() == [100.0, 1.0]
    assert smoothing_factors(x, w, 0.0).tolist() == [0.25, 0.25]


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_channels_without_a_range_are_left_alone(alpha: float) -> None:
    x, w = torch.tensor([0.0, 3.0, 0.0, 2.0]), torch.tensor([5.0, 0.0, 0.0, 2.0])
    assert smoothing_factors(x, w, alpha).tolist()[:3] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_bad_magnitudes(bad: float, side: int) -> None:
    sides = [torch.ones(3), torch.ones(3)]
    sides[side][1] = bad
    with pytest.raises(NumericsError) as info:
        smoothing_factors(*sides, 0.5)
    require_complete(info.value, "smoothing")
