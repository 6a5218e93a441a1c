"""The exponent search against the paper's formulas, written out in float64 with exponent biases instead of scales."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import Array
from tiny import require_complete

from hqdit.errors import NumericsError
from hqdit.formats.catalog import E1M2, E2M1, E2M3, E3M0, E4M3, FP4_FORMATS
from hqdit.formats.number_format import FloatFormat
from hqdit.quantizers.exponent_search import (
    BIAS_FRACTIONS,
    MAX_SHIFT,
    ROUNDS,
    candidate_scales,
    channel_shifts,
    search_exponents,
)
from hqdit.quantizers.scaling import MIN_SCALE, absmax_scale


def bias_of(clip: float, fmt: FloatFormat) -> float:
    """LLM-FP4: the exponent bias with which the format ends at `clip`."""
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    return float(2**e - math.log2(clip) + math.log2(2 - 2.0**-m) - 1)


def round_with_bias(x: Array, bias: Array | float, fmt: FloatFormat) -> Array:
    """LLM-FP4: clip, find the exponent, round the mantissa."""
    e, m = fmt.exponent_bits, fmt.mantissa_bits
    top = (2 - 2.0**-m) * 2.0 ** (2**e - 1 - np.asarray(bias))
    clipped = np.clip(x, -top, top)
    with np.errstate(divide="ignore"):
        # With b real, the first binade in use starts at 2^(1 - b); below it the numbers are subnormal.
        exponent = np.maximum(1.0, np.floor(np.log2(np.abs(clipped)) + bias + 1e-9))
    step = 2.0 ** (exponent - m - bias)
    return np.asarray(step * np.round(clipped / step))


def slow_search(x: Array, weight: Array, formats: tuple[FloatFormat, ...]) -> dict[str, float]:
    """Pair of formats -> squared error after the alternating search, one candidate and one channel at a time."""
    exact = x @ weight.T
    errors = {}
    for weight_format, input_format in itertools.product(formats, formats):
        first_w = [bias_of(float(np.abs(row).max()), weight_format) for row in weight]
        first_x = bias_of(float(np.abs(x).max()), input_format)
        w_biases, x_bias, error = list(first_w), first_x, math.inf
        for _ in range(ROUNDS):
            rounded_x = round_with_bias(x, x_bias, input_format)
            for row in range(len(weight)):
                tried = [w_biases[row], first_w[row], *(g * first_w[row] for g in BIAS_FRACTIONS)]
                found = [
                    float(((exact[:, row] - rounded_x @ round_with_bias(weight[row], b, weight_format)) ** 2).sum())
                    for b in tried
                ]
                w_biases[row] = tried[int(np.argmin(found))]
            rounded_w = round_with_bias(weight, np.array(w_biases)[:, None], weight_format)
            tried = [x_bias, first_x, *(g * first_x for g in BIAS_FRACTIONS)]
            found = [float(((exact - round_with_bias(x, b, input_format) @ rounded_w.T) ** 2).sum()) for b in tried]
            x_bias, error = tried[int(np.argmin(found))], min(found)
        errors[f"{weight_format} {input_format}"] = error
    return errors


def layer(tokens: int, width: int, rows: int, seed: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.standard_t(4, (tokens, width)) * np.exp(0.5 * rng.standard_normal(width))
    weight = 0.1 * rng.standard_normal((rows, width))
    return x.astype(np.float32).astype(np.float64), weight.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize(("tokens", "width", "rows"), [(12, 5, 2), (4, 9, 2), (7, 3, 4)])
def test_search_finds_what_the_slow_search_finds(tokens: int, width: int, rows: int) -> None:
    x, weight = layer(tokens, width, rows, seed=tokens)
    slow = slow_search(x, weight, FP4_FORMATS)
    power = float(((x @ weight.T) ** 2).sum())
    for w_format, a_format in itertools.product(FP4_FORMATS, FP4_FORMATS):
        one = search_exponents(torch.from_numpy(x).float(), torch.from_numpy(weight).float(), [w_format], [a_format])
        # float32 against float64: 1e-6 of the signal's power, where the error is a hundredth of it or more.
        assert one.error * power == pytest.approx(slow[f"{w_format} {a_format}"], rel=1e-4)
    found = search_exponents(torch.from_numpy(x).float(), torch.from_numpy(weight).float(), FP4_FORMATS, FP4_FORMATS)
    assert f"{found.weight_format} {found.activation_format}" == min(slow, key=slow.__getitem__)
    rounded_x = round_with_bias(
        x, bias_of_scale(found.activation_scale, found.activation_format), found.activation_format
    )
    w_bias = bias_of_scale(found.weight_scale, found.weight_format)[:, None]
    rounded_w = round_with_bias(weight, w_bias, found.weight_format)
    error = float(((x @ weight.T - rounded_x @ rounded_w.T) ** 2).sum())
    assert error / power == pytest.approx(found.error, rel=1e-4)  # the scales are those of the error


def bias_of_scale(scale: torch.Tensor, fmt: FloatFormat) -> Array:
    return np.asarray(1 - fmt.mantissa_bits - np.log2(scale.double().numpy()))


@given(st.floats(1e-6, 1e6), st.sampled_from([*FP4_FORMATS, E2M3]))
def test_candidates_are_fractions_of_the_bias(clip: float, fmt: FloatFormat) -> None:
    found = candidate_scales(torch.tensor([clip / fmt.max_level]), fmt)
    assert found.shape == (101, 1) and found.dtype == torch.float32
    e, m, bias = fmt.exponent_bits, fmt.mantissa_bits, bias_of(clip, fmt)
    for fraction, scale in zip((1.0, *BIAS_FRACTIONS), found.flatten().tolist(), strict=True):
        top = (2 - 2.0**-m) * 2.0 ** (2**e - 1 - fraction * bias)
        # The scale arrives in float32, and the bias multiplies its rounding's logarithm by at most 1.2.
        assert fmt.max_level * scale == pytest.approx(top, rel=1e-6)


def test_fractions() -> None:
    assert len(BIAS_FRACTIONS) == 100 and ROUNDS == 3
    np.testing.assert_allclose(BIAS_FRACTIONS, np.linspace(0.01, 1.2, 100), rtol=1e-12)


@pytest.mark.parametrize("fmt", [*FP4_FORMATS, E2M3, E4M3], ids=str)
def test_search_is_never_worse_than_min_max(fmt: FloatFormat) -> None:
    x, weight = (torch.from_numpy(side).float() for side in layer(40, 16, 8, seed=3))
    found = search_exponents(x, weight, [fmt], [fmt])
    exact = x @ weight.T
    plain = quantized(x, absmax_scale(x.reshape(1, -1), fmt), fmt) @ quantized(weight, absmax_scale(weight, fmt), fmt).T
    best = quantized(x, found.activation_scale.reshape(1), fmt) @ quantized(weight, found.weight_scale, fmt).T
    assert (exact - best).square().sum() <= (exact - plain).square().sum()


def quantized(x: torch.Tensor, scale: torch.Tensor, fmt: FloatFormat) -> torch.Tensor:
    levels = torch.tensor(fmt.levels, dtype=torch.float64)
    scaled = x.double() / scale.double().unsqueeze(1)
    upper = torch.searchsorted(levels, scaled).clamp(1, len(levels) - 1)
    low, high = levels[upper - 1], levels[upper]
    return (torch.where(scaled - low < high - scaled, low, high) * scale.double().unsqueeze(1)).float()


def test_zeros() -> None:
    found = search_exponents(torch.zeros(4, 6), torch.zeros(3, 6), FP4_FORMATS, FP4_FORMATS)
    assert found.error == 0.0
    assert found.weight_scale.shape == (3,) and bool((found.weight_scale >= MIN_SCALE).all())


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bad_numbers(side: int, bad: float) -> None:
    sides = [torch.ones(4, 6), torch.ones(3, 6)]
    sides[side][1, 2] = bad
    with pytest.raises(NumericsError) as info:
        search_exponents(*sides, [E2M1], [E1M2, E3M0])
    require_complete(info.value, "exponent search")


@given(st.lists(st.floats(0, 1e4, width=32), min_size=1, max_size=10).filter(lambda values: max(values) > 0))
def test_shifts_bring_channels_to_one_range(absmax: list[float]) -> None:
    shifts = channel_shifts(torch.tensor(absmax)).double().tolist()
    widest = max(absmax)
    for largest, shift in zip(absmax, shifts, strict=True):
        exponent = math.log2(shift)
        assert exponent == int(exponent) and 0 <= exponent <= MAX_SHIFT
        if largest == 0:
            assert shift == 1
        else:  # the logarithm decides to its own precision
            assert largest * shift <= widest * (1 + 1e-12)
            assert largest * shift > widest / 2 * (1 - 1e-12) or exponent == MAX_SHIFT


def test_shifts_by_hand() -> None:
    assert channel_shifts(torch.tensor([8.0, 8.0, 4.0, 3.9, 1.0, 1e-9, 0.0])).tolist() == [1, 1, 2, 2, 8, 128, 1]
    assert channel_shifts(torch.zeros(2)).tolist() == [1, 1]
