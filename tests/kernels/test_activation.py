"""Quantized activations: levels and scales, and how a NaN travels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import GRIDS, ONE_SIDED_TABLE, nearest_levels

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
