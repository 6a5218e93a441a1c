"""Scales of 8 bits: every number and tie of E4M3, at every magnitude, against distances to all numbers."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import GRIDS, short_numbers, token_scales

from hqdit.quantizers.scaling import MIN_SCALE
from hqdit.quantizers.short_scales import (
    SHORT_DTYPE,
    merge_scales,
    neighbour_scales,
    round_token_scales,
    split_scales,
)

LARGEST = float(np.finfo(np.float32).max)
NUMBERS = sorted(level / 512 for level in GRIDS["e4m3"].values() if level > 0)
scales = st.floats(MIN_SCALE, LARGEST, width=32)


def critical(unit: float) -> np.ndarray:
    """E4M3's numbers times `unit`, the ties between them, half of the smallest, and the neighbours of all."""
    points = np.array(NUMBERS + [(a + b) / 2 for a, b in zip([0, *NUMBERS], NUMBERS, strict=False)]) * unit
    points = points[(points >= MIN_SCALE) & (points < LARGEST)].astype(np.float32)
    near = [np.nextafter(points, np.float32(side)) for side in (-np.inf, np.inf)]
    every = np.concatenate([points, *near])
    return every[(every >= MIN_SCALE) & np.isfinite(every)]


def test_there_are_126_positive_numbers() -> None:
    assert len(NUMBERS) == 126 and NUMBERS[0] == 2**-9 and NUMBERS[-1] == 448


# Of tokens


@pytest.mark.parametrize("lead", [1.0, 1.0625, 1.5, 1.9375, 2 - 2.0**-23])
@pytest.mark.parametrize("exponent", [-126, -125, -120, -113, -112, -111, -110, -109, -60, 0, 60, 120, 125, 126])
def test_every_number_and_tie_of_a_token(exponent: int, lead: float) -> None:
    largest = np.float32(lead * 2.0**exponent)
    others = critical(2.0 ** (exponent - 7))
    scale = np.concatenate([[largest], others[others <= largest], [largest, np.float32(MIN_SCALE)]])[None]
    found = round_token_scales(torch.from_numpy(scale))
    assert found.dtype == torch.float32
    assert np.array_equal(found.double().numpy(), token_scales(scale))
    assert bool((found >= MIN_SCALE).all())


@given(st.lists(st.lists(scales, min_size=5, max_size=5), min_size=1, max_size=4))
def test_tokens_of_any_scales(rows: list[list[float]]) -> None:
    scale = np.array(rows, dtype=np.float32)
    expected = token_scales(scale)
    found = round_token_scales(torch.from_numpy(scale)).double().numpy()
    is_too_large = (expected > LARGEST).any(axis=1)
    assert np.isnan(found[is_too_large]).all()
    assert np.array_equal(found[~is_too_large], expected[~is_too_large])


def test_a_token_by_hand() -> None:
    # 3 lies in 2 .. 4: the unit is 2^(1 - 7) = 1/64; 3 is 192 units, 0.3 is 19.2, of which 20 is the nearest number.
    # The others are so much smaller that they get 2^-9 units, the smallest number.
    scale = torch.tensor([[3.0, 0.3, 1e-6, MIN_SCALE]])
    assert round_token_scales(scale).tolist() == [[3.0, 20 / 64, 2.0**-15, 2.0**-15]]
    assert round_token_scales(scale * 2.0**90).tolist() == [[3 * 2.0**90, 20 * 2.0**84, 2.0**75, 2.0**75]]
    # The scales of a token of zeros are numbers of its unit, 2^-133.
    assert round_token_scales(torch.full((2, 3), MIN_SCALE)).tolist() == [[MIN_SCALE] * 3] * 2


def test_tokens_of_one_group_and_no_tokens() -> None:
    scale = torch.tensor([[1.0], [1.05], [1.07], [240.0], [255.0]])
    assert round_token_scales(scale).flatten().tolist() == [1.0, 1.0, 1.125, 240.0, 256.0]
    assert round_token_scales(torch.empty(0, 7)).shape == (0, 7)


def test_bad_tokens_stay_bad_and_tokens_do_not_see_each_other() -> None:
    scale = torch.tensor([[1.0, 2.0], [math.nan, math.nan], [math.nan, 1.0], [1.0, math.inf], [5.0, 0.7]])
    found = round_token_scales(scale)
    assert found.isnan().tolist() == [[False] * 2, [True] * 2, [True] * 2, [True] * 2, [False] * 2]
    for good in (0, 4):
        assert torch.equal(round_token_scales(scale[good : good + 1]), found[good : good + 1])
    assert bool(round_token_scales(torch.tensor([[LARGEST, 1.0]])).isnan().all())  # 2^128


def test_scales_within_a_factor_of_8192_of_the_largest_move_by_a_sixteenth_at_most() -> None:
    rng = np.random.default_rng(0)
    scale = torch.from_numpy(np.exp(3 * rng.standard_normal((200, 9)))).float()
    is_near = scale >= 2.0**-13 * scale.amax(dim=1, keepdim=True)
    moved = (round_token_scales(scale) / scale - 1).abs()
    assert 0.5 < float(is_near.float().mean()) < 1
    assert 2.0**-5 < float(moved[is_near].max()) <= 2.0**-4


# Of output channels


def test_every_code_stands_for_its_number() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    found = merge_scales(codes.view(SHORT_DTYPE).reshape(16, 16), torch.ones(16, 1)).flatten().tolist()
    for code, number in enumerate(found):
        if code in (0x7F, 0xFF):
            assert math.isnan(number)
        else:
            assert number == GRIDS["e4m3"][code] / 512


@pytest.mark.parametrize("unit", [2.0**-117, 1.0, 1.2345e-3, 1 / 3, 7.7e5, 2.0**110])
def test_every_number_and_tie_of_a_channel(unit: float) -> None:
    exact_unit = np.float32(unit).view(np.int32) & ~15
    unit = float(np.int32(exact_unit).view(np.float32))
    scale = np.append(critical(unit), np.float32(448 * unit))
    scale = scale[scale <= np.float32(448 * unit)][None]
    short, found = split_scales(torch.from_numpy(scale))
    assert (short.dtype, short.shape) == (torch.float8_e4m3fn, scale.shape)
    assert found.tolist() == [[unit]]
    assert np.array_equal(short.to(torch.float64).numpy(), short_numbers(scale.astype(np.float64) / unit))


@given(st.lists(st.lists(scales, min_size=6, max_size=6), min_size=1, max_size=3))
def test_channels_of_any_scales(rows: list[list[float]]) -> None:
    scale = torch.tensor(rows, dtype=torch.float32)
    short, unit = split_scales(scale)
    merged = merge_scales(short, unit)
    for row, row_scale in enumerate(scale.tolist()):
        exact_unit, largest = Fraction(unit[row].item()), Fraction(max(row_scale))
        # The largest scale over 448, cut to 20 bits of mantissa; no smaller than what keeps every scale normal.
        if largest > 448 * Fraction(2) ** -117:
            assert abs(exact_unit * 448 / largest - 1) <= Fraction(2) ** -19
            assert short[row].float().max() == 448
        else:
            assert exact_unit == Fraction(2) ** -117
        numbers = [Fraction(number) for number in short[row].tolist()]
        expected = short_numbers([float(Fraction(s) / exact_unit) for s in row_scale])
        assert [float(number) for number in numbers] == expected.tolist()
        # Exact in float32: nothing is rounded when a scale is put together, and levels may be multiplied in any order.
        assert [Fraction(s) for s in merged[row].tolist()] == [number * exact_unit for number in numbers]
    assert bool((merged >= MIN_SCALE).all()) and bool(merged.isfinite().all())
    again = split_scales(merged)
    assert torch.equal(again[0].view(torch.uint8), short.view(torch.uint8)) and torch.equal(again[1], unit)


def test_channels_by_hand() -> None:
    # 3 over 448 is no short number; its first 20 bits are, and 3 / unit is 448 up to 2^-19.
    short, unit = split_scales(torch.tensor([[3.0, 1.5, 0.1], [448.0, 1.0, 1e-9], [MIN_SCALE] * 3]))
    assert short.to(torch.float32).tolist() == [[448, 224, 15], [448, 1, 2**-9], [2**-9] * 3]
    assert unit[1:].tolist() == [[1.0], [2.0**-117]]
    assert merge_scales(short, unit)[2].tolist() == [MIN_SCALE] * 3


def test_neighbours_are_the_next_numbers() -> None:
    numbers = torch.tensor(NUMBERS)
    short = numbers.to(SHORT_DTYPE)
    assert neighbour_scales(short, 0).float().tolist() == NUMBERS
    assert neighbour_scales(short, 1).float().tolist() == [*NUMBERS[1:], 448]
    assert neighbour_scales(short, -1).float().tolist() == [NUMBERS[0], *NUMBERS[:-2], 448]


def test_a_nan_spoils_its_channel_alone() -> None:
    short, unit = split_scales(torch.tensor([[1.0, math.nan], [2.0, 1.0]]))
    assert merge_scales(short, unit).isnan().tolist() == [[True, True], [False, False]]
