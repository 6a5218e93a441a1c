"""How a scale is chosen: always float32, always positive, number = level * scale."""

from __future__ import annotations

import torch
from torch import Tensor

from hqdit.formats.number_format import NumberFormat
from hqdit.numerics.rounding import nearest_levels

SCALE_RULES = ("absmax", "mse")

#: Smallest scale: the smallest normal float32. It is what all-zero channels get, so that nothing divides by zero.
MIN_SCALE = 2.0**-126

#: Fractions of the absmax scale that the minimum squared error rule tries; 1.0 first, so that ties keep the range.
MSE_FRACTIONS = tuple(1.0 - 0.01 * step for step in range(61))


def absmax(x: Tensor, fmt: NumberFormat) -> Tensor:
    """Largest magnitude along the last axis that the format can follow; not finite where `x` is not."""
    magnitude = x.abs().amax(dim=-1)
    if fmt.is_signed:
        return magnitude
    return torch.where(torch.isfinite(magnitude), x.amax(dim=-1).clamp_min(0), magnitude)


def absmax_divisor(max_level: int, factor: float) -> float:
    """What a largest magnitude is divided by, as float32: the largest level over the factor.

    A quotient of the two, and not a product with the factor after the division, so that kernels divide once.
    """
    return max_level / factor


def absmax_scale(x: Tensor, fmt: NumberFormat, factor: float = 1.0) -> Tensor:
    """Scale that maps the largest magnitude of each row to the largest level, times `factor`.

    Args:
        x: floating point (..., n); for a one-sided format only positive values count.
        fmt: the format.
        factor: positive; below 1 the largest magnitudes saturate.

    Returns:
        float32 (...), at least `MIN_SCALE`; NaN for rows that hold a NaN or an infinity, so that no finite number
        can come out of them.
    """
    largest = absmax(x.to(torch.float32), fmt)
    scale = (largest / absmax_divisor(fmt.max_level, factor)).clamp_min(MIN_SCALE)
    return torch.where(torch.isfinite(largest), scale, torch.nan)


def rms_scale(x: Tensor, factor: float) -> Tensor:
    """Scale that is `factor` times the root mean square of each row, so that tails may saturate.

    Args:
        x: floating point (..., n).
        factor: positive.

    Returns:
        float32 (...), at least `MIN_SCALE`; NaN for rows that hold a NaN or an infinity.
    """
    x32 = x.to(torch.float32)
    scale = (x32.square().mean(dim=-1).sqrt() * factor).clamp_min(MIN_SCALE)
    return torch.where(torch.isfinite(x32).all(dim=-1), scale, torch.nan)


def mse_scale(x: Tensor, fmt: NumberFormat) -> Tensor:
    """Scale of least squared rounding error per row among `MSE_FRACTIONS` of the absmax scale.

    Never worse than `absmax_scale`, which is the first candidate.

    Args:
        x: floating point (..., n).

    Returns:
        float32 (...).
    """
    x32 = x.to(torch.float32)
    widest = absmax_scale(x32, fmt)
    best, best_error = widest, torch.full_like(widest, torch.inf, dtype=torch.float64)
    for fraction in MSE_FRACTIONS:
        scale = (widest * fraction).clamp_min(MIN_SCALE).unsqueeze(-1)
        rounded = nearest_levels(x32 / scale, fmt).to(torch.float32) * scale
        error = (rounded - x32).to(torch.float64).square().sum(dim=-1)
        better = error < best_error
        best = torch.where(better, scale.squeeze(-1), best)
        best_error = torch.where(better, error, best_error)
    return best


def choose_scale(x: Tensor, fmt: NumberFormat, rule: str) -> Tensor:
    """`absmax_scale` or `mse_scale`, by the name of the rule."""
    return {"absmax": absmax_scale, "mse": mse_scale}[rule](x, fmt)
