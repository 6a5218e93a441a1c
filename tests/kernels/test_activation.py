"""Quantized activations: levels and scales, and how a NaN travels."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import GRIDS, ONE_SIDED_TABLE, nearest_levels, token_scales

from hqdit.formats.catalog import E2M1, E4M3, format_from_json
from hqdit.formats.number_format import TableFormat
from hqdit.kernels.activation import QuantizedActivation, quantize_activation
from hqdit.quantizers.scaling import MIN_SCALE
from hqdit.quantizers.spec import ActivationSpec

GRANULARITIES = [
    ("token", None),
    *(("group", size) for size in (4, 16, 36, 48, 72, 144)),
    ("tensor", None),
    ("channel", None),
    ("channel-token", None),
]
STATIC_SCALE = torch.tensor([0.37])


def tokens_of(count: int = 6, width: int = 144, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.standard_normal((count, width)) * 10.0 ** rng.uniform(-3, 3, (count, 1))).float()


def quantized(x: torch.Tensor, name: str, granularity: str, size: int | None) -> QuantizedActivation:
    spec = ActivationSpec(format_from_json(name), granularity, size)
    return quantize_activation(x, spec, STATIC_SCALE if granularity == "tensor" else None)


each_granularity = pytest.mark.parametrize(("granularity", "size"), GRANULARITIES)


@each_granularity
@pytest.mark.parametrize("name", GRIDS)
def test_levels_and_scales_one_group_at_a_time(name: str, granularity: str, size: int | None) -> None:
    fmt, x = format_from_json(name), tokens_of()
    result = quantized(x, name, granularity, size)
    width = size or 144
    groups = 144 // width
    assert result.scale.shape == (6, groups)
    assert result.scale.dtype == torch.float32
    assert result.levels.shape == (6, 144)
    assert result.levels.dtype == (torch.int8 if fmt.is_int8 else torch.float32)
    for token in range(6):
        for group in range(groups):
            part = x[token, group * width : (group + 1) * width].numpy()
            if granularity == "tensor":
                unit = np.float32(0.37)
            elif granularity == "channel":  # the static scale is in x already
                unit = np.float32(1)
            else:
                largest = np.abs(part).max() if min(GRIDS[name].values()) < 0 else max(part.max(), np.float32(0))
                unit = max(largest / np.float32(max(GRIDS[name].values())), np.float32(MIN_SCALE))
            assert result.scale[token, group].item() == unit
            with np.errstate(over="ignore"):  # negative numbers over the smallest scale, in one-sided formats
                expected = nearest_levels(part / unit, GRIDS[name])
            assert result.levels[token, group * width : (group + 1) * width].tolist() == expected.tolist()


@each_granularity
def test_dequantize_is_level_times_scale(granularity: str, size: int | None) -> None:
    result = quantized(tokens_of(), "e2m1", granularity, size)
    expected = result.levels.numpy().astype(np.float32) * np.repeat(result.scale.numpy(), size or 144, axis=1)
    assert np.array_equal(result.dequantize().numpy(), expected)


@each_granularity
@pytest.mark.parametrize("name", ["e2m1", "int8", "e4m3"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_number_makes_its_whole_token_nan_and_no_other(
    bad: float, name: str, granularity: str, size: int | None
) -> None:
    x = tokens_of()
    clean = quantized(x, name, granularity, size)
    x[2, 100] = bad
    result = quantized(x, name, granularity, size)
    others = [0, 1, 3, 4, 5]
    assert bool(result.scale[2].isnan().all())
    assert bool(result.dequantize()[2].isnan().all())
    assert torch.equal(result.scale[others], clean.scale[others])
    assert torch.equal(result.levels[others], clean.levels[others])


@each_granularity
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_number_in_a_one_sided_format(bad: float, granularity: str, size: int | None) -> None:
    # It must be carried where negative numbers are not even looked at.
    x = tokens_of()
    x[1, 0] = bad
    spec = ActivationSpec(TableFormat(ONE_SIDED_TABLE), granularity, size)
    result = quantize_activation(x, spec, STATIC_SCALE if granularity == "tensor" else None)
    assert bool(result.scale[1].isnan().all())
    assert bool(result.scale[[0, 2, 3, 4, 5]].isfinite().all())


@each_granularity
@pytest.mark.parametrize("name", [name for name in GRIDS if 0 in GRIDS[name].values()])
def test_zero_tokens_are_exactly_zero(name: str, granularity: str, size: int | None) -> None:
    x = tokens_of()
    x[3] = 0.0
    result = quantized(x, name, granularity, size)
    assert not result.levels[3].any()
    assert torch.equal(result.dequantize()[3], torch.zeros(144))


@each_granularity
@pytest.mark.parametrize("count", [0, 1])
def test_no_tokens_and_one_token(count: int, granularity: str, size: int | None) -> None:
    result = quantized(tokens_of(count), "e2m1", granularity, size)
    assert result.levels.shape == (count, 144)
    assert result.scale.shape == (count, 144 // (size or 144))
    assert result.dequantize().shape == (count, 144)


@each_granularity
def test_tokens_do_not_see_each_other(granularity: str, size: int | None) -> None:
    x = tokens_of()
    together = quantized(x, "e2m1", granularity, size)
    for token in range(6):
        alone = quantized(x[token : token + 1], "e2m1", granularity, size)
        assert torch.equal(alone.levels[0], together.levels[token])
        assert torch.equal(alone.scale[0], together.scale[token])


@each_granularity
def test_strided_inputs(granularity: str, size: int | None) -> None:
    for view in (tokens_of(12)[::2], tokens_of(144, 6).T, tokens_of(6, 432)[:, 100:244]):
        strided, dense = (
            quantized(view, "e2m1", granularity, size),
            quantized(view.contiguous(), "e2m1", granularity, size),
        )
        assert torch.equal(strided.levels, dense.levels)
        assert torch.equal(strided.scale, dense.scale)


def test_static_scale_saturates() -> None:
    result = quantize_activation(
        torch.tensor([[100.0, -100.0, 1.0, 0.0]]), ActivationSpec(E2M1, "tensor"), torch.ones(1)
    )
    assert result.levels.tolist() == [[12, -12, 1, 0]]
    wide = quantize_activation(torch.tensor([[1e9, -1.0]]), ActivationSpec(E4M3, "channel"))
    assert wide.levels.tolist() == [[E4M3.max_level, -1.0]]


@pytest.mark.parametrize("granularity", ["token", "tensor"])
@pytest.mark.parametrize("name", ["e2m1", "int4", "int8"])
def test_numbers_are_divided_by_the_scale(name: str, granularity: str) -> None:
    # Half levels times many scales: a product with 1 / scale would put some of them on the wrong side of a tie.
    grid = GRIDS[name]
    levels = sorted(set(grid.values()))
    ties = np.array([(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)], dtype=np.float32)
    ties = np.append(ties[ties > -levels[-1]], levels[-1]).astype(np.float32)  # the last one sets the token's scale
    spec = ActivationSpec(format_from_json(name), granularity)
    for unit in np.random.default_rng(0).uniform(0.01, 10, 50).astype(np.float32):
        x = ties * unit
        static = torch.tensor([unit]) if granularity == "tensor" else None
        result = quantize_activation(torch.from_numpy(x).unsqueeze(0), spec, static)
        scale = unit if granularity == "tensor" else x[-1] / np.float32(levels[-1])
        assert result.scale.item() == scale
        assert result.levels[0].tolist() == nearest_levels(x / scale, grid).tolist()


# How dynamic scales are found and kept


@pytest.mark.parametrize(("granularity", "size"), [("token", None), ("group", 36), ("channel-token", None)])
@pytest.mark.parametrize("factor", [0.5, 0.9, 1 / 3, 2.0])
@pytest.mark.parametrize("name", ["e2m1", "int4", "e4m3", "e2m3"])
def test_absmax_times_a_factor(name: str, factor: float, granularity: str, size: int | None) -> None:
    # One division, by the largest level over the factor as float32, so that kernels can do the same.
    x, grid = tokens_of(), GRIDS[name]
    spec = ActivationSpec(format_from_json(name), granularity, size, scale_factor=factor)
    result = quantize_activation(x, spec)
    groups = x.reshape(6, -1, size or 144).numpy()
    scale = np.abs(groups).max(axis=2) / np.float32(max(grid.values()) / factor)
    assert np.array_equal(result.scale.numpy(), scale)
    assert np.array_equal(result.levels.numpy(), nearest_levels(groups / scale[:, :, None], grid).reshape(6, 144))
    plain = np.abs(groups).max(axis=2) / max(grid.values())
    assert np.allclose(scale, factor * plain, rtol=2.0**-22, atol=0)
    is_largest = np.abs(groups) == np.abs(groups).max(axis=2, keepdims=True)
    reached = np.abs(result.levels.numpy().reshape(groups.shape)[is_largest])
    assert (reached >= max(grid.values())).all() == (factor <= 1)  # int4 has one more level below than above


@pytest.mark.parametrize(("granularity", "size"), [("token", None), ("group", 36), ("channel-token", None)])
@pytest.mark.parametrize("factor", [1.0, 0.28])
def test_root_mean_square_times_a_factor(factor: float, granularity: str, size: int | None) -> None:
    x = tokens_of()
    spec = ActivationSpec(E2M1, granularity, size, scale_rule="rms", scale_factor=factor)
    result = quantize_activation(x, spec)
    groups = x.reshape(6, -1, size or 144)
    exact = factor * groups.double().square().mean(dim=2).sqrt()
    # Sums of n squares round n times at most; then a quotient, a root, a factor and a product.
    assert bool(((result.scale.double() / exact - 1).abs() <= (144 / 2 + 4) * 2.0**-24).all())
    expected = nearest_levels((groups / result.scale.unsqueeze(-1)).numpy(), GRIDS["e2m1"])
    assert np.array_equal(result.levels.numpy(), expected.reshape(6, 144))
    assert quantize_activation(torch.zeros(1, 144), spec).scale.unique().tolist() == [MIN_SCALE]


@pytest.mark.parametrize("rule", ["absmax", "rms"])
@pytest.mark.parametrize("size", [4, 16, 36, 144])
@pytest.mark.parametrize("name", ["e2m1", "int8", "e4m3", TableFormat(ONE_SIDED_TABLE).name])
def test_short_scales_are_rounded_before_the_levels(name: str, size: int, rule: str) -> None:
    x, fmt = tokens_of(seed=3), format_from_json(name)
    x[1, :size] = 0  # one group of zeros
    x[2] = 0
    x[3, : size // 2] *= 1e-6
    long = ActivationSpec(fmt, "group", size, scale_rule=rule, scale_factor=0.7)
    found, plain = quantize_activation(x, replace(long, scale_format="e4m3")), quantize_activation(x, long)
    assert np.array_equal(found.scale.double().numpy(), token_scales(plain.scale.numpy()))
    scaled = x.numpy() / np.repeat(found.scale.numpy(), size, axis=1)
    assert np.array_equal(found.levels.numpy(), nearest_levels(scaled, GRIDS[name]))
    assert found.scale[2].tolist() == [MIN_SCALE] * (144 // size)
    if size < 144:
        assert found.scale[1, 0] == 2.0**-16 * 2.0 ** math.floor(math.log2(float(plain.scale[1].max())))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_number_spoils_all_short_scales_of_its_token(bad: float) -> None:
    x, spec = tokens_of(), ActivationSpec(E2M1, "group", 36, scale_format="e4m3")
    clean = quantize_activation(x, spec)
    x[2, 100] = bad
    result = quantize_activation(x, spec)
    others = [0, 1, 3, 4, 5]
    assert bool(result.scale[2].isnan().all())
    assert torch.equal(result.scale[others], clean.scale[others])
    assert torch.equal(result.levels[others], clean.levels[others])


@pytest.mark.parametrize("scale_format", ["float32", "e4m3"])
def test_scales_beyond_float32_spoil_the_token(scale_format: str) -> None:
    # Squares beyond 3.4e38 have no sum; a factor of 12 leaves no room for the largest level.
    x = torch.zeros(2, 8)
    x[0, 0], x[1] = 1e20, 1.0
    result = quantize_activation(x, ActivationSpec(E2M1, "group", 4, scale_rule="rms", scale_format=scale_format))
    assert result.scale.isnan().tolist() == [[True, True], [False, False]]
    x[0, 0] = 3e38
    wide = ActivationSpec(E2M1, "group", 4, scale_factor=24.0, scale_format=scale_format)
    assert quantize_activation(x, wide).scale.isnan().tolist() == [[True, True], [False, False]]


def test_tensor_granularity_needs_its_scale() -> None:
    with pytest.raises(ValueError, match="static scale"):
        quantize_activation(tokens_of(), ActivationSpec(E2M1, "tensor"))


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=8, max_size=8),
    st.sampled_from(sorted(GRIDS)),
    st.sampled_from(["token", "group", "channel-token"]),
)
def test_any_finite_token_quantizes_to_finite_levels(row: list[float], name: str, granularity: str) -> None:
    x = torch.tensor([row], dtype=torch.float32)
    result = quantized(x, name, granularity, 4 if granularity == "group" else None)
    assert bool(result.scale.isfinite().all())
    size = 4 if granularity == "group" else 8
    with np.errstate(over="ignore"):  # negative numbers over the smallest scale, in one-sided formats
        scaled = x.numpy() / np.repeat(result.scale.numpy(), size, axis=1)
    assert result.levels.tolist() == nearest_levels(scaled, GRIDS[name]).tolist()
