"""Activations: from numbers to levels and scales, as every backend sees them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hqdit.numerics.rounding import nearest_levels
from hqdit.quantizers.scaling import absmax_scale, rms_scale
from hqdit.quantizers.short_scales import round_token_scales
from hqdit.quantizers.spec import ActivationSpec


class QuantizedActivation(NamedTuple):
    """Levels and scales of a batch of tokens; number = level * scale.

    Attributes:
        levels: int8 (tokens, in_features), or float32 for formats that do not fit in int8.
        scale: float32 (tokens, groups), groups = 1 unless the granularity is group. NaN marks a token that held a
            NaN or an infinity, so that its outputs become NaN.
    """

    levels: Tensor
    scale: Tensor

    def dequantize(self) -> Tensor:
        """The numbers that the levels stand for, float32 (tokens, in_features)."""
        (tokens, width), groups = self.levels.shape, self.scale.shape[1]
        grouped = self.levels.to(torch.float32).reshape(tokens, groups, width // groups)
        return (grouped * self.scale.unsqueeze(-1)).reshape(self.levels.shape)


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


def _dynamic_scales(grouped: Tensor, spec: ActivationSpec) -> Tensor:
    """Scales of (tokens, groups, numbers), float32 (tokens, groups)."""
    if spec.scale_rule == "rms":
        scale = rms_scale(grouped, spec.scale_factor)
    else:
        scale = absmax_scale(grouped, spec.format, spec.scale_factor)
    # A token with one bad number is bad as a whole: its other groups must not look sound.
    scale = torch.where(torch.isfinite(scale).all(dim=1, keepdim=True), scale, torch.nan)
    return round_token_scales(scale) if spec.has_short_scales else scale
