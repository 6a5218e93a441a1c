"""Scale rules."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import GRIDS, ONE_SIDED_TABLE, SIGNED_TABLE, U32, Array, nearest_levels

from hqdit.formats.catalog import E2M1, INT4, format_from_json
from hqdit.formats.number_format import TableFormat
from hqdit.quantizers.scaling import MIN_SCALE, MSE_FRACTIONS, absmax_scale, choose_scale, mse_scale

FLOAT_FORMATS = [name for name in GRIDS if name.startswith("e")]
WITH_ZERO = [name for name in GRIDS if 0 in GRIDS[name].values()]
ONE_SIDED = TableFormat(ONE_SIDED_TABLE)


def samples(rows: int = 40, n: int = 48, seed: int = 0) -> torch.Tensor:
    """Rows of many sizes: Gaussian, heavy-tailed and constant."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, n)) * 10.0 ** rng.uniform(-20, 20, (rows, 1))
    x[::3] *= np.exp(rng.standard_normal((len(x[::3]), n)))
    x[1] = 3.7
    return torch.from_numpy(x).float()


def squared_error(x: torch.Tensor, scale: torch.Tensor, name: str) -> Array:
    """Rounding error of each row in float64, the division and the product in float32 as everywhere."""
    scaled = (x / scale.unsqueeze(-1)).numpy()
    levels = torch.from_numpy(nearest_levels(scaled, GRIDS[name])).float()
    return np.asarray(((levels * scale.unsqueeze(-1)).double() - x.double()).square().sum(dim=-1).numpy())


# absmax


@pytest.mark.parametrize("name", GRIDS)
def test_absmax_maps_the_largest_magnitude_to_the_largest_level(name: str) -> None:
    fmt, x = format_from_json(name), samples()
    scale = absmax_scale(x, fmt)
    assert scale.dtype == torch.float32
    assert scale.shape == (40,)
    largest = x.abs().amax(dim=1) if fmt.is_signed else x.amax(dim=1).clamp_min(0)
    expected = np.maximum(largest.numpy() / np.float32(max(GRIDS[name].values())), np.float32(MIN_SCALE))
    assert scale.numpy().tolist() == expected.tolist()


def test_absmax_by_hand() -> None:
    x = torch.tensor([[1.0, -24.0, 3.0], [6.0, 0.0, -1.0]])
    assert absmax_scale(x, E2M1).tolist() == [2.0, 0.5]
    assert absmax_scale(x, INT4).tolist() == pytest.approx([24 / 7, 6 / 7], rel=U32)
    assert absmax_scale(x, ONE_SIDED).tolist() == pytest.approx([3 / 127, 6 / 127], rel=U32)
    assert absmax_scale(x.unsqueeze(0), E2M1).shape == (1, 2)
    assert absmax_scale(x[0].to(torch.bfloat16), E2M1).item() == 2.0


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_nothing_saturates_under_absmax(name: str) -> None:
    # The largest magnitude comes back as the largest level up to the two roundings of the scale and the quotient.
    fmt, x = format_from_json(name), samples(seed=1)
    scale = absmax_scale(x, fmt)
    top = (x.abs().amax(dim=1).double() / scale.double()) / fmt.max_level
    assert bool(((top - 1).abs() <= 2 * U32).all())


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("name", GRIDS)
def test_scale_is_positive_and_scales_with_powers_of_two(name: str, rule: str) -> None:
    fmt, x = format_from_json(name), samples(seed=2)
    scale = choose_scale(x, fmt, rule)
    assert bool((scale >= MIN_SCALE).all())
    moderate = x[(x.abs().amax(dim=1) > 1e-10) & (x.abs().amax(dim=1) < 1e10)]
    assert len(moderate) > 5
    assert torch.equal(choose_scale(moderate * 2.0**-30, fmt, rule), choose_scale(moderate, fmt, rule) * 2.0**-30)


# Zeros and non-finite rows


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("name", WITH_ZERO)
def test_zero_rows_get_the_smallest_scale_and_stay_exactly_zero(name: str, rule: str) -> None:
    x = torch.zeros(3, 16)
    x[1] = -0.0
    scale = choose_scale(x, format_from_json(name), rule)
    assert scale.tolist() == [MIN_SCALE] * 3
    assert squared_error(x, scale, name).tolist() == [0.0] * 3


@pytest.mark.parametrize("rule", ["absmax", "mse"])
def test_rows_below_every_scale_become_zero_not_noise(rule: str) -> None:
    x = torch.tensor([[2.0**-149, -(2.0**-140)], [1e-40, 0.0]])
    scale = choose_scale(x, E2M1, rule)
    assert scale.tolist() == [MIN_SCALE] * 2
    assert (nearest_levels((x / scale.unsqueeze(1)).numpy(), GRIDS["e2m1"]) == 0).all()


def test_one_sided_table_sees_positive_values_only() -> None:
    x = torch.tensor([[-1000.0, 12.7], [-3.0, -1.0], [0.0, 0.0]])
    assert absmax_scale(x, ONE_SIDED).tolist() == pytest.approx([0.1, MIN_SCALE, MIN_SCALE], rel=2 * U32)


def test_table_without_zero_turns_zero_rows_into_the_smallest_scale() -> None:
    # Such a table cannot say 0: the result is one unit of 2^-126, which vanishes in any product.
    scale = absmax_scale(torch.zeros(1, 4), TableFormat(SIGNED_TABLE))
    assert scale.item() == MIN_SCALE


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_rows_get_a_nan_scale(name: str, rule: str, bad: float) -> None:
    fmt = format_from_json(name)
    x = samples(4, 8, seed=3)
    clean = choose_scale(x, fmt, rule)
    x[2, 5] = bad
    scale = choose_scale(x, fmt, rule)
    assert scale.isnan().tolist() == [False, False, True, False]
    others = [0, 1, 3]
    assert torch.equal(scale[others], clean[others])


def test_largest_float32_keeps_a_finite_scale() -> None:
    top = torch.finfo(torch.float32).max
    for name in GRIDS:
        assert math.isfinite(absmax_scale(torch.tensor([[top, 0.0]]), format_from_json(name)).item())


# mse


@pytest.mark.parametrize("name", GRIDS)
def test_mse_is_never_worse_than_absmax(name: str) -> None:
    fmt, x = format_from_json(name), samples(200, 32, seed=4)
    better = squared_error(x, mse_scale(x, fmt), name)
    plain = squared_error(x, absmax_scale(x, fmt), name)
    # The rule measures each difference in float32, one rounding, so that squares may be off by 2 U32 and a bit.
    assert bool((better <= plain * (1 + 5 * U32)).all())


@pytest.mark.parametrize("name", ["e2m1", "int4", "e3m0", "e4m3"])
def test_mse_is_the_best_of_its_candidates(name: str) -> None:
    fmt, x = format_from_json(name), samples(30, 32, seed=5)
    found = squared_error(x, mse_scale(x, fmt), name)
    widest = absmax_scale(x, fmt)
    for fraction in MSE_FRACTIONS:
        assert bool((found <= squared_error(x, widest * fraction, name) * (1 + 5 * U32)).all())


def test_mse_shrinks_the_scale_where_one_value_sticks_out() -> None:
    # 63 ones and one 12: the best INT4 scale gives up a part of the 12 to hold the ones.
    x = torch.ones(1, 64)
    x[0, 0] = 12.0
    assert mse_scale(x, INT4).item() < absmax_scale(x, INT4).item()
    exact = torch.tensor([[6.0, -3.0, 0.5, 2.0]])  # on the grid already: the first candidate stays
    assert mse_scale(exact, E2M1).item() == absmax_scale(exact, E2M1).item() == 0.5


def test_candidates_start_with_absmax() -> None:
    assert MSE_FRACTIONS[0] == 1.0
    assert all(0.39 < fraction <= 1.0 for fraction in MSE_FRACTIONS)


def test_unknown_rule() -> None:
    with pytest.raises(KeyError):
        choose_scale(torch.ones(1, 4), E2M1, "median")


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=24),
    st.sampled_from(sorted(GRIDS)),
)
def test_any_finite_row_has_a_finite_positive_scale(row: list[float], name: str) -> None:
    fmt = format_from_json(name)
    x = torch.tensor([row], dtype=torch.float32)
    for rule in ("absmax", "mse"):
        scale = choose_scale(x, fmt, rule).item()
        assert MIN_SCALE <= scale < math.inf
        assert scale <= max(MIN_SCALE, float(x.abs().max()) / fmt.max_level * (1 + U32))
