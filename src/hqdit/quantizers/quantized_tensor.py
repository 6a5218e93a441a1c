"""A weight as codes and scales: choosing scales, round-to-nearest, and scales that fit given codes better."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hqdit.formats.number_format import NumberFormat
from hqdit.numerics.codes import decode
from hqdit.numerics.rounding import nearest_codes, require_no_nan
from hqdit.quantizers.scaling import MIN_SCALE, choose_scale
from hqdit.quantizers.short_scales import SHORT_DTYPE, merge_scales, neighbour_scales, split_scales
from hqdit.quantizers.spec import WeightSpec


@dataclass(frozen=True)
class QuantizedTensor:
    """Codes and scales of one weight matrix.

    Attributes:
        codes: uint8 (out_features, in_features), one code each.
        scale: float32, shape `spec.scale_shape(...)`; number = level * scale. Where the spec keeps scales in 8 bits,
            numbers that can be kept so (`storable_scales`).
        format_index: uint8 (out_features,) into `spec.formats`, or None where there is one format.
        spec: formats and granularity.
    """

    codes: Tensor
    scale: Tensor
    format_index: Tensor | None
    spec: WeightSpec

    @property
    def levels(self) -> Tensor:
        """The levels that the codes stand for, float32 (out_features, in_features)."""
        levels = torch.empty(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        for rows, fmt in rows_by_format(self.format_index, self.spec, self.codes.shape[0], self.codes.device):
            levels[rows] = decode(self.codes[rows], fmt)
        return levels

    def dequantize(self) -> Tensor:
        """The numbers that the codes stand for, float32 (out_features, in_features)."""
        return self.levels * spread_scale(self.scale, self.codes.shape[1])


def rows_by_format(
    format_index: Tensor | None, spec: WeightSpec, out_features: int, device: torch.device
) -> list[tuple[Tensor, NumberFormat]]:
    """(row numbers, format) for each format that is in use."""
    if format_index is None:
        return [(torch.arange(out_features, device=device), spec.formats[0])]
    return [
        (rows, fmt)
        for position, fmt in enumerate(spec.formats)
        if len(rows := (format_index == position).nonzero().flatten())
    ]


def spread_scale(scale: Tensor, in_features: int) -> Tensor:
    """Scales repeated along the input axis: (rows, groups) -> (rows, in_features)."""
    return scale.repeat_interleave(in_features // scale.shape[1], dim=1)


def weight_scales(weight: Tensor, spec: WeightSpec, format_index: Tensor | None, rule: str) -> Tensor:
    """Scales of every tensor, channel or group by the rule "absmax" or "mse", as they are stored.

    Args:
        weight: floating point (out_features, in_features).

    Returns:
        float32, shape `spec.scale_shape(...)`; rounded already where the spec keeps scales in 8 bits, so that codes
        are chosen for the scales that they are multiplied with. The rule "mse" then has its way once more: of the
        nearest number and the two beside it, a scale gets the one with the least squared rounding error.
    """
    out_features, in_features = weight.shape
    if spec.granularity == "tensor":
        return choose_scale(weight.reshape(1, -1), spec.formats[0], rule).reshape(1, 1)
    shape = spec.scale_shape(out_features, in_features)
    grouped = weight.reshape(*shape, -1)
    scale = torch.empty(shape, dtype=torch.float32, device=weight.device)
    for rows, fmt in rows_by_format(format_index, spec, out_features, weight.device):
        scale[rows] = choose_scale(grouped[rows], fmt, rule)
    if spec.has_short_scales and rule == "mse":
        return _best_short_scales(weight, scale, spec, format_index)
    return storable_scales(scale, spec)


def _best_short_scales(weight: Tensor, scale: Tensor, spec: WeightSpec, format_index: Tensor | None) -> Tensor:
    """Scales in 8 bits next to `scale`, by the least squared error of rounding to nearest with them."""
    short, unit = split_scales(scale)
    best, best_error = short, torch.full_like(scale, torch.inf, dtype=torch.float64)
    for step in (0, -1, 1):  # the nearest first, so that ties keep it
        candidate = neighbour_scales(short, step)
        rounded = round_to_nearest(weight, merge_scales(candidate, unit), spec, format_index).dequantize()
        error = (rounded - weight).to(torch.float64).square().reshape(*scale.shape, -1).sum(dim=-1)
        is_better = error < best_error
        best = torch.where(is_better, candidate.view(torch.uint8), best.view(torch.uint8)).view(SHORT_DTYPE)
        best_error = torch.where(is_better, error, best_error)
    return merge_scales(best, unit)


def storable_scales(scale: Tensor, spec: WeightSpec) -> Tensor:
    """The scales that stand for `scale` in a checkpoint: the same, or rounded to 8 bits.

    Args:
        scale: float32, shape `spec.scale_shape(...)`, at least `MIN_SCALE`; NaN where the weight is not finite.

    Exact: what it returns, it leaves as it is.
    """
    return merge_scales(*split_scales(scale)) if spec.has_short_scales else scale


def round_to_nearest(weight: Tensor, scale: Tensor, spec: WeightSpec, format_index: Tensor | None) -> QuantizedTensor:
    """Every weight rounded on its own.

    Args:
        weight: floating point (out_features, in_features).
        scale: float32 from `weight_scales`.

    Raises:
        NumericsError: `weight` or `scale` holds a NaN (absmax and mse scales do where the weight is not finite).
    """
    scaled = weight.to(torch.float32) / spread_scale(scale, weight.shape[1])
    require_no_nan(scaled, "round_to_nearest")
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for rows, fmt in rows_by_format(format_index, spec, weight.shape[0], weight.device):
        codes[rows] = nearest_codes(scaled[rows], fmt)
    return QuantizedTensor(codes, scale, format_index, spec)


def refit_scales(weight: Tensor, quantized: QuantizedTensor) -> Tensor:
    """Scales of least squared error for the levels that `quantized` has: <w, q> / <q, q> of each of them.

    Scales in 8 bits keep their E4M3 numbers, and it is the units that are refitted, for each output channel as a whole.
    A scale (or a channel's unit) stays as it is where the refitted one would not be positive or not lower the error.

    Args:
        weight: floating point (out_features, in_features), what `quantized` stands for.
        quantized: codes, whose levels are kept.

    Returns:
        float32, shape of `quantized.scale`; scales that can be stored.
    """
    spec, scale = quantized.spec, quantized.scale
    directions, parts, shape = quantized.levels.to(torch.float64), torch.ones_like(scale), scale.shape
    if spec.has_short_scales:
        short, unit = split_scales(scale)
        parts, shape = merge_scales(short, torch.ones_like(unit)), unit.shape
        directions = directions * spread_scale(parts, weight.shape[1])
    exact = weight.to(torch.float64)

    def error(candidate: Tensor) -> Tensor:
        difference = exact - replace(quantized, scale=candidate).dequantize().to(torch.float64)
        return difference.square().reshape(*shape, -1).sum(dim=-1)

    power = directions.square().reshape(*shape, -1).sum(dim=-1)
    factor = (exact * directions).reshape(*shape, -1).sum(dim=-1) / power  # NaN where all levels are 0
    refitted = factor.to(torch.float32) * parts
    is_positive = (refitted >= MIN_SCALE).reshape(*shape, -1).all(dim=-1)
    refitted = storable_scales(torch.where(is_positive, refitted, scale), spec)
    return torch.where(is_positive & (error(refitted) < error(scale)), refitted, scale)
