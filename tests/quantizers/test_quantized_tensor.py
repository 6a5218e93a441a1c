"""Weights as codes and scales."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from oracles import GRIDS, SIGNED_TABLE, U32, nearest_code, nearest_levels, short_numbers

from hqdit.errors import NumericsError
from hqdit.formats.catalog import E1M2, E2M1, E3M0, FP4_FORMATS, INT4, INT8, format_from_json
from hqdit.formats.number_format import TableFormat
from hqdit.quantizers.quantized_tensor import (
    QuantizedTensor,
    refit_scales,
    round_to_nearest,
    spread_scale,
    storable_scales,
    weight_scales,
)
from hqdit.quantizers.scaling import MIN_SCALE, absmax_scale, mse_scale
from hqdit.quantizers.spec import WeightSpec

SPECS = [
    *(WeightSpec((format_from_json(name),)) for name in GRIDS if min(GRIDS[name].values()) < 0),
    WeightSpec((E2M1,), "tensor"),
    *(WeightSpec((E2M1,), "group", size) for size in (4, 16, 36, 48, 72, 144)),
    WeightSpec((INT8,), "group", 12),
    WeightSpec(FP4_FORMATS),
    WeightSpec((E3M0, INT4, TableFormat(SIGNED_TABLE)), "group", 48),
    WeightSpec((E2M1,), "group", 36, scale_format="e4m3"),
    WeightSpec(FP4_FORMATS, "group", 72, scale_format="e4m3"),
]


def label(spec: WeightSpec) -> str:
    return f"{'/'.join(map(str, spec.formats))} per {spec.granularity} {spec.group_size or ''}".strip()


def weight_of(seed: int = 0, rows: int = 9, width: int = 144) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(4, (rows, width))).float()


def index_of(spec: WeightSpec, rows: int = 9) -> torch.Tensor | None:
    return torch.arange(rows).to(torch.uint8) % len(spec.formats) if len(spec.formats) > 1 else None


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_scales_are_those_of_each_tensor_channel_or_group(spec: WeightSpec, rule: str) -> None:
    weight, index = weight_of(), index_of(spec)
    scale = weight_scales(weight, spec, index, rule)
    assert scale.dtype == torch.float32
    assert scale.shape == spec.scale_shape(9, 144)
    function = {"absmax": absmax_scale, "mse": mse_scale}[rule]
    if spec.granularity == "tensor":
        assert scale.item() == function(weight.reshape(-1), spec.formats[0]).item()
        return
    size = spec.group_size or 144
    for row in range(9):
        fmt = spec.formats[0 if index is None else int(index[row])]
        chosen = [function(weight[row, at : at + size], fmt).item() for at in range(0, 144, size)]
        if spec.has_short_scales:  # rounded before any code is chosen
            unit = float(np.float32(max(chosen) / 448).view(np.int32).__and__(~15).view(np.float32))
            numbers = [float(number) for number in short_numbers(np.array(chosen) / unit)]
            if rule == "mse":  # the best of three
                parts = weight[row].double().numpy().reshape(-1, size)
                grid = GRIDS[fmt.name]
                numbers = [best_of_three(x, unit, number, grid) for x, number in zip(parts, numbers, strict=True)]
            chosen = [number * unit for number in numbers]
        assert scale[row].tolist() == chosen


def best_of_three(x: np.ndarray, unit: float, number: float, grid: dict[int, int]) -> float:
    """Of an E4M3 number and the two beside it the one that makes the best scale; the largest stays."""
    numbers = sorted(level / 512 for level in GRIDS["e4m3"].values() if level > 0)
    at = numbers.index(number)
    if at == len(numbers) - 1:
        return number
    errors = {}
    for candidate in (numbers[at], *numbers[max(0, at - 1) : at], numbers[at + 1]):
        levels = nearest_levels(x.astype(np.float32) / np.float32(unit * candidate), grid)
        errors[candidate] = float(np.square(levels * unit * candidate - x).sum())
    return min(errors, key=lambda candidate: errors[candidate])


def test_the_best_short_scales_lose_little() -> None:
    # Rounding scales to nearest costs several per cent of squared error; choosing among neighbours wins most back.
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((32, 576))).float()
    long = WeightSpec((E2M1,), "group", 16)
    short = replace(long, scale_format="e4m3")
    exact = weight_scales(weight, long, None, "mse")

    def error(scale: torch.Tensor) -> float:
        return float((round_to_nearest(weight, scale, short, None).dequantize() - weight).square().sum())

    best, nearest = weight_scales(weight, short, None, "mse"), storable_scales(exact, short)
    assert torch.equal(storable_scales(best, short), best)
    assert 1 < error(best) / error(exact) < 1.03 < error(nearest) / error(exact)


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_round_to_nearest_one_weight_at_a_time(spec: WeightSpec) -> None:
    weight, index = weight_of(1), index_of(spec)
    scale = weight_scales(weight, spec, index, "absmax")
    quantized = round_to_nearest(weight, scale, spec, index)
    assert quantized.codes.dtype == torch.uint8
    assert quantized.scale is scale
    numbers = quantized.dequantize()
    assert numbers.dtype == torch.float32
    size = 144 if spec.granularity == "tensor" else 144 // scale.shape[1]
    for row in range(9):
        grid = GRIDS[spec.formats[0 if index is None else int(index[row])].name]
        for column in range(0, 144, 7):
            unit = np.float32(scale[min(row, len(scale) - 1), column // size if spec.granularity == "group" else 0])
            code = nearest_code(float(np.float32(weight[row, column]) / unit), grid)
            assert quantized.codes[row, column] == code
            assert numbers[row, column] == np.float32(grid[code]) * unit


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_error_is_at_most_half_a_gap(spec: WeightSpec) -> None:
    weight, index = weight_of(2), index_of(spec)
    scale = weight_scales(weight, spec, index, "absmax")
    error = (round_to_nearest(weight, scale, spec, index).dequantize().double() - weight.double()).abs()
    for row in range(9):
        fmt = spec.formats[0 if index is None else int(index[row])]
        gap = max(b - a for a, b in zip(fmt.levels, fmt.levels[1:], strict=False))
        # Negative magnitudes may lie beyond a table's lowest level; those saturate.
        reach = max(gap / 2, fmt.max_level + fmt.levels[0])
        unit = spread_scale(scale, 144)[min(row, len(scale) - 1)].double()
        assert bool((error[row] <= unit * (reach + 3 * U32 * fmt.max_level)).all())


def test_numbers_on_the_grid_come_back() -> None:
    spec = WeightSpec((E2M1,))
    weight = torch.tensor([[level * 0.25 for level in E2M1.levels]])  # -3 .. 3
    quantized = round_to_nearest(weight, weight_scales(weight, spec, None, "absmax"), spec, None)
    assert torch.equal(quantized.dequantize(), weight)


def test_zero_rows() -> None:
    weight = weight_of(3)
    weight[4] = 0.0
    for spec in SPECS:
        if any(0 not in fmt.levels for fmt in spec.formats):
            continue
        index = index_of(spec)
        scale = weight_scales(weight, spec, index, "mse")
        assert torch.equal(round_to_nearest(weight, scale, spec, index).dequantize()[4], torch.zeros(144))
        if spec.granularity != "tensor":
            assert scale[4].tolist() == [MIN_SCALE] * scale.shape[1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused(bad: float) -> None:
    spec = WeightSpec((E2M1,))
    weight = weight_of(4)
    weight[3, 5] = bad
    with pytest.raises(NumericsError, match="round_to_nearest: found"):
        round_to_nearest(weight, weight_scales(weight, spec, None, "absmax"), spec, None)


def test_formats_per_row_are_independent_of_their_neighbours() -> None:
    weight = weight_of(5)
    mixed = WeightSpec((E3M0, E2M1, E1M2))
    index = torch.tensor([2, 2, 0, 1, 0, 2, 1, 1, 0], dtype=torch.uint8)
    together = round_to_nearest(weight, weight_scales(weight, mixed, index, "mse"), mixed, index).dequantize()
    for row in range(9):
        alone = WeightSpec((mixed.formats[int(index[row])],))
        one = weight[row : row + 1]
        assert torch.equal(
            round_to_nearest(one, weight_scales(one, alone, None, "mse"), alone, None).dequantize()[0], together[row]
        )


def test_spread_scale() -> None:
    scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert spread_scale(scale, 6).tolist() == [[1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]]
    assert spread_scale(torch.tensor([[5.0]]), 3).tolist() == [[5, 5, 5]]


def test_dequantize_is_level_times_scale() -> None:
    codes = torch.tensor([[0, 7, 8, 15], [1, 2, 3, 9]], dtype=torch.uint8)
    spec = WeightSpec((E2M1, E3M0), "group", 4)
    quantized = QuantizedTensor(codes, torch.tensor([[0.5], [2.0]]), torch.tensor([0, 1], dtype=torch.uint8), spec)
    assert quantized.dequantize().tolist() == [[0.0, 6.0, -0.0, -6.0], [2.0, 4.0, 8.0, -2.0]]


# Scales for given levels


def error_of(weight: torch.Tensor, quantized: QuantizedTensor, shape: tuple[int, int]) -> np.ndarray:
    """Squared error of each part that has a factor of its own."""
    difference = (quantized.dequantize().double() - weight.double()).numpy()
    return np.square(difference).reshape(*shape, -1).sum(axis=2)


@pytest.mark.parametrize("rule", ["absmax", "mse"])
@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_refitted_scales_are_those_of_least_squares(spec: WeightSpec, rule: str) -> None:
    weight, index = weight_of(5), index_of(spec)
    scale = weight_scales(weight, spec, index, rule)
    quantized = round_to_nearest(weight, scale, spec, index)
    found = refit_scales(weight, quantized)
    assert found.dtype == torch.float32 and found.shape == scale.shape
    assert quantized.scale is scale and torch.equal(scale, weight_scales(weight, spec, index, rule))
    assert torch.equal(storable_scales(found, spec), found)
    shape = (9, 1) if spec.has_short_scales else (scale.shape[0], scale.shape[1])
    before, after = (error_of(weight, replace(quantized, scale=s), shape) for s in (scale, found))
    assert (after <= before).all() and after.sum() < before.sum()
    # Up to the rounding of scales; and where the best one is as near as that, rounding decides what has the less error.
    directions = quantized.dequantize().double().numpy().reshape(*shape, -1)
    exact = weight.double().numpy().reshape(*shape, -1)
    best = np.array([[np.linalg.lstsq(d[:, None], w, rcond=None)[0][0] for d, w in zip(*rows, strict=True)]
                     for rows in zip(directions, exact, strict=True)])  # fmt: skip
    moved = (found.double() / scale.double()).numpy()
    moved = moved.reshape(*shape, -1)
    is_kept = moved[:, :, :1] == 1
    allowed = 2.0**-18 if spec.has_short_scales else 2.0**-22
    assert (np.abs(moved - best[:, :, None]) <= allowed * np.abs(best[:, :, None]) + is_kept * 2.0**-16).all()
    assert is_kept.mean() < 0.2


def test_refit_by_hand() -> None:
    # Levels 2 and 1 for 2.2 and 0.8: <w, q> / <q, q> = 5.2 / 5. Levels of 0 have no best scale.
    spec = WeightSpec((INT8,), "group", 4)
    codes = torch.tensor([[2, 1, 0, 0, 0, 0, 0, 0]], dtype=torch.uint8)
    weight = torch.tensor([[2.2, 0.8, 0.0, 0.0, 0.1, -0.1, 0.0, 0.0]])
    quantized = QuantizedTensor(codes, torch.tensor([[1.0, 0.5]]), None, spec)
    assert refit_scales(weight, quantized).tolist() == [[pytest.approx(1.04, rel=U32), 0.5]]
    # Levels that point away from the weight would want a negative scale.
    assert torch.equal(refit_scales(-weight, quantized), quantized.scale)
    # Scales that are the best ones already stay as they are, to the bit.
    best = replace(quantized, scale=torch.tensor([[0.3, 0.5]]))
    assert torch.equal(refit_scales(best.dequantize(), best), best.scale)


def test_refit_of_zero_channels_keeps_the_smallest_scale() -> None:
    for spec in (WeightSpec((E2M1,), "group", 4), WeightSpec((E2M1,), "group", 4, scale_format="e4m3")):
        weight = torch.zeros(2, 8)
        weight[1] = torch.tensor([1e-44, 0, 0, 0, 3e-38, 0, 0, 2e-38])
        quantized = round_to_nearest(weight, weight_scales(weight, spec, None, "absmax"), spec, None)
        found = refit_scales(weight, quantized)
        assert bool((found >= MIN_SCALE).all()) and found[0].tolist() == [MIN_SCALE] * 2
        assert torch.equal(storable_scales(found, spec), found)


def test_scales_without_short_ones_are_stored_as_they_are() -> None:
    scale = torch.tensor([[0.1, 0.7]])
    assert storable_scales(scale, WeightSpec((E2M1,), "group", 4)) is scale
