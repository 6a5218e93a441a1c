"""Rounding over every code and tie, against exact fractions and against ml_dtypes."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import GRIDS, nearest_code, nearest_levels, probes
from torch import Tensor

from hqdit.errors import NumericsError
from hqdit.formats.catalog import E2M1, E2M3, E3M0, E4M3, E5M2, INT4, format_from_json
from hqdit.formats.number_format import FloatFormat
from hqdit.numerics import rounding
from hqdit.numerics.codes import decode, encode
from hqdit.numerics.rounding import round_to_format

ML_DTYPES = [
    (E2M1, ml_dtypes.float4_e2m1fn),
    (E2M3, ml_dtypes.float6_e2m3fn),
    (E4M3, ml_dtypes.float8_e4m3fn),
    (E5M2, ml_dtypes.float8_e5m2),
]


def every_bfloat16() -> Tensor:
    """All 65,536 bfloat16 numbers without the NaNs, as float32: every sign, every exponent, 7 bits of fraction."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).to(torch.float32)
    return x[~x.isnan()]


def signed_equal(a: Tensor, b: Tensor) -> bool:
    """Equal numbers with equal signs, of zeros too."""
    return torch.equal(a, b) and torch.equal(torch.signbit(a), torch.signbit(b))


@pytest.mark.parametrize("name", GRIDS)
def test_every_level_every_tie_and_their_neighbours(name: str) -> None:
    grid, fmt = GRIDS[name], format_from_json(name)
    points = probes(grid)
    x = torch.tensor(points, dtype=torch.float32)
    expected = [nearest_code(point, grid) for point in points]
    assert encode(x, fmt).tolist() == expected
    rounded = round_to_format(x, fmt)
    assert rounded.dtype == torch.float32
    assert rounded.tolist() == [float(grid[code]) for code in expected]


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
def test_random_bit_patterns_of_formats_beyond_int8(fmt: FloatFormat) -> None:
    bits = np.random.default_rng(5).integers(-(2**31), 2**31, 200_000).astype(np.int32)
    x = bits.view(np.float32)
    x = x[~np.isnan(x)]
    thresholds, levels = rounding.rung_tables(fmt, torch.device("cpu"))
    expected = levels.numpy()[np.searchsorted(thresholds.numpy(), x, side="right")]
    assert torch.equal(rounding.nearest_levels(torch.from_numpy(x), fmt), torch.from_numpy(expected))


@pytest.mark.parametrize("name", GRIDS)
def test_every_bfloat16_is_rounded_to_the_nearest_level(name: str) -> None:
    fmt, x = format_from_json(name), every_bfloat16()
    expected = torch.from_numpy(nearest_levels(x.numpy(), GRIDS[name])).to(torch.float32)
    assert torch.equal(round_to_format(x, fmt), expected)
    assert torch.equal(decode(encode(x, fmt), fmt), expected)


@pytest.mark.parametrize("name", GRIDS)
def test_dense_sweep(name: str) -> None:
    fmt, grid = format_from_json(name), GRIDS[name]
    low, high = float(min(grid.values())), float(max(grid.values()))
    x = np.linspace(1.2 * low - 1, 1.2 * high + 1, 30_001).astype(np.float32)
    expected = torch.from_numpy(nearest_levels(x, grid)).to(torch.float32)
    assert torch.equal(round_to_format(torch.from_numpy(x), fmt), expected)


@pytest.mark.parametrize("name", GRIDS)
def test_array_oracle_agrees_with_exact_fractions(name: str) -> None:
    # The oracle of the sweeps is itself checked where it could go wrong.
    grid = GRIDS[name]
    points = probes(grid)
    exact = [float(grid[nearest_code(point, grid)]) for point in points]
    assert nearest_levels(np.array(points, dtype=np.float32), grid).tolist() == exact


@pytest.mark.parametrize(("fmt", "dtype"), ML_DTYPES, ids=str)
def test_same_bits_as_ml_dtypes(fmt: FloatFormat, dtype: type) -> None:
    points = torch.cat([every_bfloat16(), torch.tensor(probes(GRIDS[fmt.name]), dtype=torch.float32)])
    dense = torch.linspace(-1.5 * fmt.max_value, 1.5 * fmt.max_value, 100_001)
    value = torch.cat([points, points * fmt.quantum, dense])
    if fmt in (E4M3, E5M2):  # these overflow to NaN or infinity in ml_dtypes, and saturate here
        value = value[value.abs() <= fmt.max_value]
    with np.errstate(all="ignore"):
        theirs = value.numpy().astype(dtype)
    assert torch.equal(encode(value / fmt.quantum, fmt), torch.from_numpy(theirs.view(np.uint8)))
    assert signed_equal(
        round_to_format(value / fmt.quantum, fmt) * fmt.quantum, torch.from_numpy(theirs.astype(np.float32))
    )


def test_e3m0_ties_go_to_the_even_code() -> None:
    # Levels 0 1 2 4 8 16 32 64 have codes 0..7; microxcaling differs here.
    ties = torch.tensor([0.5, 1.5, 3.0, 6.0, 12.0, 24.0, 48.0])
    assert round_to_format(ties, E3M0).tolist() == [0, 2, 2, 8, 8, 32, 32]


def test_e2m1_known_ties() -> None:
    assert (round_to_format(torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]) * 2, E2M1) / 2).tolist() == [
        *(0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0)
    ]


# Signs, infinities, NaN


@pytest.mark.parametrize("name", GRIDS)
def test_infinities_saturate(name: str) -> None:
    fmt = format_from_json(name)
    x = torch.tensor([math.inf, 3e38, -math.inf, -3e38])
    highest, lowest = float(max(GRIDS[name].values())), float(min(GRIDS[name].values()))
    assert round_to_format(x, fmt).tolist() == [highest, highest, lowest, lowest]


@pytest.mark.parametrize("name", [name for name in GRIDS if name.startswith("e")])
def test_sign_of_zero_is_kept(name: str) -> None:
    fmt = format_from_json(name)
    x = torch.tensor([0.0, -0.0, 0.5, -0.5, 1e-45, -1e-45])  # 0.5 is a tie that goes to the even code, 0
    rounded = round_to_format(x, fmt)
    assert rounded.tolist() == [0.0] * 6
    assert torch.signbit(rounded).tolist() == [False, True] * 3
    assert encode(x, fmt).tolist() == [0, 1 << (fmt.bits - 1)] * 3
    assert torch.signbit(decode(encode(x, fmt), fmt)).tolist() == [False, True] * 3


@pytest.mark.parametrize("name", ["int4", "int6", "int8"])
def test_integers_have_one_zero(name: str) -> None:
    fmt = format_from_json(name)
    x = torch.tensor([0.0, -0.0, -0.25])
    assert encode(x, fmt).tolist() == [0, 0, 0]
    assert not torch.signbit(round_to_format(x, fmt)).any()


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("function", [encode, round_to_format])
def test_nan_is_refused(name: str, function: object) -> None:
    x = torch.zeros(3, 4)
    x[1, 2] = math.nan
    x[2, 3] = -math.nan
    with pytest.raises(NumericsError, match=r"2 NaN \(first at index \(1, 2\)\)"):
        function(x, format_from_json(name))


# Shapes, strides, precisions


@pytest.mark.parametrize("name", GRIDS)
def test_strided_inputs(name: str) -> None:
    fmt = format_from_json(name)
    base = torch.randn(12, 10, generator=torch.Generator().manual_seed(0)) * fmt.max_level / 3
    for view in (base.T, base[::2, 1::3], base.reshape(2, 6, 10).permute(2, 0, 1), base[3], base[:, 4], base[0, 0]):
        dense = view.clone(memory_format=torch.contiguous_format)
        assert signed_equal(round_to_format(view, fmt), round_to_format(dense, fmt))
        assert torch.equal(encode(view, fmt), encode(dense, fmt))
        assert round_to_format(view, fmt).shape == view.shape
    assert round_to_format(base[:0], fmt).shape == (0, 10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", GRIDS)
def test_other_precisions_round_their_own_numbers(name: str, dtype: torch.dtype) -> None:
    fmt = format_from_json(name)
    x = (torch.randn(500, generator=torch.Generator().manual_seed(1)) * fmt.max_level / 2).to(dtype)
    x = torch.cat([x, torch.tensor([0.5, 1.5, -0.5, 0.0, -0.0, math.inf, -math.inf], dtype=dtype)])
    expected = [nearest_code(value, GRIDS[name]) for value in x.to(torch.float64).tolist()]
    assert encode(x, fmt).tolist() == expected
    assert round_to_format(x, fmt).tolist() == [float(GRIDS[name][code]) for code in expected]


@pytest.mark.parametrize("name", GRIDS)
def test_float64_is_not_rounded_twice(name: str) -> None:
    # Numbers so near a tie that float32 would call them a tie.
    grid = GRIDS[name]
    levels = sorted(set(grid.values()))
    ties = [(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)]
    points = [side for tie in ties for side in (np.nextafter(tie, -np.inf), np.nextafter(tie, np.inf))]
    expected = [nearest_code(float(point), grid) for point in points]
    assert encode(torch.tensor(np.array(points)), format_from_json(name)).tolist() == expected


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=30), st.sampled_from(sorted(GRIDS)))
def test_rounding_properties(values: list[float], name: str) -> None:
    fmt = format_from_json(name)
    x = torch.tensor(values, dtype=torch.float32)
    rounded = round_to_format(x, fmt)
    assert encode(x, fmt).tolist() == [nearest_code(value, GRIDS[name]) for value in values]
    assert signed_equal(round_to_format(rounded, fmt), rounded)  # idempotent
    ascending = round_to_format(x.sort().values, fmt)
    assert bool((ascending.diff() >= 0).all())  # monotone
    if isinstance(fmt, FloatFormat):
        assert signed_equal(round_to_format(-x, fmt), -rounded)  # odd


def test_int4_reaches_minus_eight() -> None:
    assert round_to_format(torch.tensor([-7.5, -7.51, -9.0, 7.5, 9.0]), INT4).tolist() == [-8, -8, -8, 7, 7]


def test_nearest_levels_are_int8_where_they_fit() -> None:
    x = torch.tensor([3.0])
    assert rounding.nearest_levels(x, E2M1).dtype == torch.int8
    assert rounding.nearest_levels(x, E4M3).dtype == torch.float32


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", GRIDS)
def test_every_float32_of_the_upper_half_of_its_bits(name: str) -> None:
    """2^24 float32 numbers: all signs and exponents, 15 bits of fraction."""
    fmt, grid = format_from_json(name), GRIDS[name]
    for start in range(-(2**23), 2**23, 2**18):
        x = (torch.arange(start, start + 2**18) << 8).to(torch.int32).view(torch.float32)
        x = x[~x.isnan()]
        expected = torch.from_numpy(nearest_levels(x.numpy(), grid)).to(torch.float32)
        assert torch.equal(round_to_format(x, fmt), expected)
