"""Factors for normal numbers: on numbers that they have not seen no other factor is much better."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hqdit.formats.catalog import E2M1, E3M0, INT4, INT8
from hqdit.formats.codebooks import lloyd_max
from hqdit.formats.number_format import NumberFormat, TableFormat
from hqdit.numerics.error import sqnr_db
from hqdit.numerics.rounding import round_to_format
from hqdit.quantizers.expected_scale import absmax_factor, rms_factor
from hqdit.quantizers.scaling import absmax_scale, rms_scale

FORMATS = [E3M0, E2M1, INT4, lloyd_max(), INT8]


def numbers(size: int) -> torch.Tensor:
    rows = max(40_000 // size, 20)
    return torch.from_numpy(np.random.default_rng(99).standard_normal((rows, size), dtype="float32"))


def loss(x: torch.Tensor, scale: torch.Tensor, fmt: NumberFormat) -> float:
    unit = scale.unsqueeze(1)
    return sqnr_db(x, round_to_format(x / unit, fmt) * unit)


@pytest.mark.parametrize("size", [16, 72, 1152])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_no_factor_is_much_better(fmt: NumberFormat, size: int) -> None:
    x = numbers(size)
    clipped, of_rms = absmax_factor(fmt, size), rms_factor(fmt, size)
    absmax = {f: loss(x, absmax_scale(x, fmt, f), fmt) for f in np.linspace(0.3, 1.3, 101).tolist()}
    rms = {f: loss(x, rms_scale(x, f), fmt) for f in (of_rms * np.linspace(0.5, 2.0, 101)).tolist()}
    if fmt not in (E3M0, INT8):  # whose best factors lie outside what is tried: they want the whole range
        assert loss(x, absmax_scale(x, fmt, clipped), fmt) > max(absmax.values()) - 0.1
        assert loss(x, rms_scale(x, of_rms), fmt) > max(rms.values()) - 0.1
    assert loss(x, absmax_scale(x, fmt, clipped), fmt) >= loss(x, absmax_scale(x, fmt), fmt) - 0.1


def test_the_longer_the_row_the_more_is_cut_off() -> None:
    factors = [absmax_factor(lloyd_max(), size) for size in (16, 64, 256, 1152)]
    assert factors == sorted(factors, reverse=True) and factors[-1] < factors[0] < 1.01


def test_the_rms_scale_of_a_long_row_is_that_of_the_centroids() -> None:
    # The outermost centroid of a standard normal number is 2.733.
    assert rms_factor(lloyd_max(), 4608) * 21 == pytest.approx(2.733, rel=0.05)


def test_a_one_sided_format_keeps_its_range() -> None:
    one_sided = TableFormat(tuple(range(16)))
    assert absmax_factor(one_sided, 64) == 1.0


def test_the_same_factor_every_time() -> None:
    first = absmax_factor(E2M1, 100)
    absmax_factor.cache_clear()
    assert absmax_factor(E2M1, 100) == first and math.isclose(first * 100, round(first * 100), abs_tol=1e-9)
