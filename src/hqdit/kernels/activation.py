"""Activations: from numbers to levels and scales, as every backend sees them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hqdit.formats.catalog import INT8
from hqdit.numerics.rounding import nearest_levels
from hqdit.quantizers.scaling import absmax_scale, rms_scale
from hqdit.quantizers.short_scales import round_token_scales
from hqdit.quantizers.spec import ActivationSpec

#: Means of samples keep 8 bits and a scale each, which costs next to nothing, because there are few of them.
MEAN_SPEC = ActivationSpec(INT8)


class QuantizedActivation(NamedTuple):
    """Levels and scales of a batch of tokens; number = level * scale.

    Attributes:
        levels: int8 (tokens, in_features), or float32 for formats that do not fit in int8.
        scale: float32 (tokens, groups), groups = 1 unless the granularity is group. NaN marks a token that held a
            NaN or an infinity, so that its outputs become NaN.
        mean: what was subtracted from the tokens of each sample, (samples, in_features) likewise, or None. Sample s
            holds tokens s * T .. (s + 1) * T - 1, T = tokens / samples.
    """

    levels: Tensor
    scale: Tensor
    mean: QuantizedActivation | None = None

    def dequantize(self) -> Tensor:
        """The numbers that the levels stand for, means included, float32 (tokens, in_features)."""
        (tokens, width), groups = self.levels.shape, self.scale.shape[1]
        grouped = self.levels.to(torch.float32).reshape(tokens, groups, width // groups)
        numbers = (grouped * self.scale.unsqueeze(-1)).reshape(self.levels.shape)
        return numbers if self.mean is None else add_to_tokens(numbers, self.mean.dequantize())


def split_means(x: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """The mean of every channel over the tokens of each sample, and what it leaves.

    Args:
        x: float32 (tokens, width), of equally many tokens for each sample.
        samples: how many there are.

    Returns:
        float32 (samples, width) and (tokens, width).
    """
    by_sample = x.reshape(samples, len(x) // max(samples, 1), x.shape[1])
    mean = by_sample.mean(dim=1)
    return mean, (by_sample - mean.unsqueeze(1)).reshape(x.shape)


def add_to_tokens(x: Tensor, of_samples: Tensor) -> Tensor:
    """Rows of samples, (samples, width), added to all of their tokens, x (tokens, width)."""
    samples, width = of_samples.shape
    by_sample = x.reshape(samples, len(x) // max(samples, 1), width)
    return (by_sample + of_samples.unsqueeze(1)).reshape(x.shape)


def quantize_activation(x: Tensor, spec: ActivationSpec, static_scale: Tensor | None = None) -> QuantizedActivation:
    """Levels and scales of rotated inputs.

    Args:
        x: float32 (tokens, in_features), rotated and already divided by static channel scales if there are any.
        spec: format, granularity and how dynamic scales are found and kept.
        static_scale: float32 (1,) for granularity tensor.

    Raises:
        ValueError: granularity tensor without its scale.
    """
    tokens, width = x.shape
    if spec.has_dynamic_scale:
        size = spec.group_size or width
        grouped = x.reshape(tokens, width // size, size)
        scale = _dynamic_scales(grouped, spec)
        levels = nearest_levels((grouped / scale.unsqueeze(-1)).reshape(x.shape), spec.format)
        return QuantizedActivation(levels, scale)
    if spec.has_static_scale and static_scale is None:
        raise ValueError("granularity tensor needs its static scale")
    # Static scales cannot carry a NaN by themselves; the token's scale does.
    unit = static_scale if static_scale is not None else torch.ones(1, dtype=torch.float32, device=x.device)
    is_finite = torch.isfinite(x).all(dim=1, keepdim=True)
    return QuantizedActivation(nearest_levels(x / unit, spec.format), torch.where(is_finite, unit, torch.nan))


def quantize_centred(
    x: Tensor, spec: ActivationSpec, static_scale: Tensor | None = None, samples: int = 1
) -> QuantizedActivation:
    """As `quantize_activation`, after the means of samples were split off if `spec` asks for that.

    A rotation is linear, so that the means of rotated tokens are the rotated means.

    Args:
        x: float32 (tokens, width), of equally many tokens for each sample.
        spec: as there.
        static_scale: as there.
        samples: how many there are.
    """
    if spec.centring != "sample":
        return quantize_activation(x, spec, static_scale)
    mean, rest = split_means(x, samples)
    return quantize_activation(rest, spec, static_scale)._replace(mean=quantize_activation(mean, MEAN_SPEC))


def _dynamic_scales(grouped: Tensor, spec: ActivationSpec) -> Tensor:
    """Scales of (tokens, groups, numbers), float32 (tokens, groups)."""
    if spec.scale_rule == "rms":
        scale = rms_scale(grouped, spec.scale_factor)
    else:
        scale = absmax_scale(grouped, spec.format, spec.scale_factor)
    # A token with one bad number is bad as a whole: its other groups must not look sound.
    scale = torch.where(torch.isfinite(scale).all(dim=1, keepdim=True), scale, torch.nan)
    return round_token_scales(scale) if spec.has_short_scales else scale
