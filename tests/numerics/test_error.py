"""Error measures against hand-made numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hqdit.numerics.error import SignalToNoise, decibel, relative_error, sqnr_db


@pytest.mark.parametrize(
    ("signal", "noise", "expected"),
    [(100.0, 1.0, 20.0), (1.0, 1.0, 0.0), (1.0, 10.0, -10.0), (5.0, 0.0, math.inf), (0.0, 3.0, -math.inf)],
)
def test_decibel(signal: float, noise: float, expected: float) -> None:
    assert decibel(signal, noise) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(("signal", "noise"), [(0.0, 0.0), (math.nan, 1.0), (1.0, math.nan), (math.nan, 0.0)])
def test_no_decibel_without_a_ratio(signal: float, noise: float) -> None:
    assert math.isnan(decibel(signal, noise))


def test_sqnr_by_hand() -> None:
    exact, approximate = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert sqnr_db(exact, approximate) == pytest.approx(20.0, rel=1e-15)  # 25 over 0.25
    assert relative_error(exact, approximate) == pytest.approx(0.1, rel=1e-15)


def test_nan_is_never_a_good_number() -> None:
    bad = torch.tensor([1.0, math.nan])
    assert math.isnan(sqnr_db(torch.ones(2), bad))
    assert math.isnan(relative_error(torch.ones(2), bad))


def test_relative_error_of_nothing() -> None:
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0
    assert relative_error(torch.zeros(3), torch.ones(3)) == math.inf


def test_sums_are_float64() -> None:
    # In bfloat16 or float32 the noise of 1 part in 10^9 would vanish.
    exact = torch.full((1000,), 1.0, dtype=torch.float64)
    assert sqnr_db(exact, exact + 1e-9) == pytest.approx(180.0, abs=1e-5)
    assert sqnr_db(exact.to(torch.bfloat16), exact + 2.0**-20) == pytest.approx(20 * math.log10(2**20), rel=1e-12)


@given(st.lists(st.lists(st.floats(-100, 100), min_size=1, max_size=5), min_size=1, max_size=5))
def test_streaming_is_one_shot(parts: list[list[float]]) -> None:
    running = SignalToNoise()
    for part in parts:
        exact = torch.tensor(part, dtype=torch.float64)
        running.add(exact, exact.round())
    whole = torch.tensor([number for part in parts for number in part], dtype=torch.float64)
    expected = sqnr_db(whole, whole.round())
    assert running.db == pytest.approx(expected, rel=1e-12, abs=1e-12, nan_ok=True)
