"""Dynamic scales that fit what a rotation leaves: numbers close to normal ones.

The largest magnitude of a token is a poor unit where outer levels are rare: letting a few numbers saturate makes all
the others finer. How far to go depends on the format and on how many numbers share the scale, not on the data.

Source: docs/method.md, "Scales of normal numbers"; the trade between saturation and resolution is that of Max 1960,
"Quantizing for minimum distortion".
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hqdit.formats.number_format import NumberFormat
from hqdit.numerics.rounding import nearest_levels
from hqdit.randomness import random_stream

#: Numbers that a factor is tried on, and the steps that are tried.
_NUMBERS = 1 << 17
_STEP = 0.01
_ABSMAX_STEPS = range(60, 106)
_RMS_STEPS = range(60, 141)


@lru_cache(maxsize=256)
def absmax_factor(fmt: NumberFormat, size: int) -> float:
    """The share of absmax / top that rounds `size` standard normal numbers with the least squared error.

    Args:
        fmt: signed; a one-sided format keeps the whole range, because no normal number suits it.
        size: how many numbers share the scale.

    Returns:
        A multiple of 0.01 from 0.6 to 1.05.
    """
    if not fmt.is_signed:
        return 1.0
    rows = _normal_rows(size)
    widest = rows.abs().amax(dim=1, keepdim=True) / fmt.max_level
    return min((step * _STEP for step in _ABSMAX_STEPS), key=lambda factor: _error(rows, widest * factor, fmt))


@lru_cache(maxsize=256)
def rms_factor(fmt: NumberFormat, size: int) -> float:
    """The multiple of the root mean square that, as scale, rounds `size` standard normal numbers best.

    Args:
        fmt: signed.
        size: how many numbers share the scale.

    Returns:
        One of 81 steps around the scale that puts the largest level at three standard deviations.
    """
    rows = _normal_rows(size)
    rms = rows.square().mean(dim=1, keepdim=True).sqrt()
    unit = 3.0 / fmt.max_level
    return min((unit * step * _STEP for step in _RMS_STEPS), key=lambda factor: _error(rows, rms * factor, fmt))


@lru_cache(maxsize=256)
def normal_error(fmt: NumberFormat, size: int, rule: str) -> float:
    """Squared error of `size` normal numbers that share a scale, relative to their power.

    Args:
        fmt: signed.
        size: how many numbers share the scale.
        rule: "absmax", "clipped" or "rms".
    """
    rows = _normal_rows(size)
    if rule == "rms":
        scale = rows.square().mean(dim=1, keepdim=True).sqrt() * rms_factor(fmt, size)
    else:
        share = absmax_factor(fmt, size) if rule == "clipped" else 1.0
        scale = rows.abs().amax(dim=1, keepdim=True) / fmt.max_level * share
    return _error(rows, scale, fmt) / float(rows.to(torch.float64).square().sum())


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # the cache outlives the mode of the call that fills it
def _normal_rows(size: int) -> Tensor:
    """Float32 (rows, size), always the same numbers."""
    count = max(_NUMBERS // size, 16)
    numbers = random_stream(0, f"expected scale/{size}").standard_normal((count, size), dtype="float32")
    return torch.from_numpy(numbers)


def _error(rows: Tensor, scale: Tensor, fmt: NumberFormat) -> float:
    rounded = nearest_levels(rows / scale, fmt).to(torch.float32) * scale
    return float((rounded - rows).to(torch.float64).square().sum())
