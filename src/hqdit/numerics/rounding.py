"""Rounding to a format's levels: the single definition of nearest, ties and saturation.

Inputs are in units of level 1, that is already divided by their scale.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hqdit.errors import NumericsError
from hqdit.formats.number_format import NumberFormat


class _Rungs(NamedTuple):
    """A format's ladder as tensors: rung r holds the r-th smallest level."""

    thresholds: Tensor  # float32 or float64 (rungs - 1,): x lies on rung r or above iff x >= thresholds[r - 1]
    codes: Tensor  # uint8 (rungs,)
    levels: Tensor  # int8 (rungs,) where they fit, else float32


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # the cache outlives the mode of the call that fills it
def _rungs(fmt: NumberFormat, device: torch.device, is_double: bool) -> _Rungs:
    """Midpoints between neighbouring levels, moved up by one ulp where a tie belongs to the lower level.

    Every midpoint is exact in float32: it needs at most one bit more than the levels. Of two neighbouring codes one
    is even, and the tie goes to it. The ulp is that of the inputs' precision, so that float64 is not rounded twice.
    """
    precision = np.dtype(np.float64 if is_double else np.float32)
    thresholds = []
    for (low, _), (high, high_code) in zip(fmt.ladder, fmt.ladder[1:], strict=False):
        midpoint = precision.type((low + high) / 2)
        tie_goes_up = high_code % 2 == 0
        thresholds.append(midpoint if tie_goes_up else np.nextafter(midpoint, precision.type(np.inf)))
    return _Rungs(
        torch.from_numpy(np.array(thresholds, dtype=precision)).to(device),
        torch.tensor([code for _, code in fmt.ladder], dtype=torch.uint8, device=device),
        torch.tensor(fmt.levels, dtype=torch.int8 if fmt.is_int8 else torch.float32, device=device),
    )


def _rungs_for(x: Tensor, fmt: NumberFormat) -> _Rungs:
    return _rungs(fmt, x.device, x.dtype == torch.float64)


def rung_tables(fmt: NumberFormat, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rounding of float32 numbers as two tables: thresholds (rungs - 1,) and levels (rungs,), both ascending.

    A number lies on the highest rung whose threshold is not above it; ties are part of the thresholds.
    """
    rungs = _rungs(fmt, device, False)
    return rungs.thresholds, rungs.levels


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _rung_of_quarter(fmt: NumberFormat, device: torch.device) -> Tensor:
    """Rung at every quarter from the lowest to the highest level, int32 (4 * (highest - lowest) + 1,)."""
    quarters = torch.arange(4 * fmt.levels[0], 4 * fmt.max_level + 1, device=device)
    return torch.bucketize(quarters / 4, _rungs(fmt, device, False).thresholds, right=True, out_int32=True)


#: Of a float32's 32 bits: what lies below sign, exponent and the first four bits of the mantissa.
_DROPPED_BITS = 19
_DROPPED_MASK = (1 << _DROPPED_BITS) - 1
_PREFIXES = 1 << (32 - _DROPPED_BITS)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def _rung_of_prefix(fmt: NumberFormat, device: torch.device) -> Tensor | None:
    """Rung by the leading bits of a float32, int32 (2 * _PREFIXES,); None for levels that are too fine for it.

    Where every midpoint is a float32 whose dropped bits are zero, the rung of x depends only on the leading bits of x
    and on whether any dropped bit is set. The sum of the leading bits, rounded down and up, says both: an even number
    where none is set, an odd one otherwise.
    """
    ladder = [level for level, _ in fmt.ladder]
    midpoints = np.array([(low + high) / 2 for low, high in zip(ladder, ladder[1:], strict=False)], dtype=np.float32)
    if np.any(midpoints.view(np.int32) & _DROPPED_MASK):
        return None
    places = np.arange(-_PREFIXES, _PREFIXES, dtype=np.int64)
    # The smallest number of every place; those with a dropped bit set begin one above the even one before them.
    bits = ((places >> 1) << _DROPPED_BITS) + (places & 1)
    numbers = torch.from_numpy(bits.astype(np.int32)).view(torch.float32).nan_to_num(0.0).to(device)
    return torch.bucketize(numbers, _rungs(fmt, device, False).thresholds, right=True, out_int32=True)


def _rung_index(x: Tensor, fmt: NumberFormat) -> Tensor:
    """Rung of each element, int32, shape of `x`; a NaN gets some rung.

    Levels are integers, so every midpoint is a multiple of 1/2, and the rung of x depends only on the multiple of 1/2
    that x equals or the two that it lies between. floor(2x) + ceil(2x) counts exactly that, in quarters: an even number
    for a multiple of 1/2, an odd one for anything between. One look into a small table then replaces a search.
    """
    thresholds = _rungs_for(x, fmt).thresholds
    exact = x.to(thresholds.dtype)
    if not fmt.is_int8:  # the table of quarters would be too large
        by_prefix = _rung_of_prefix(fmt, x.device) if exact.dtype == torch.float32 else None
        if by_prefix is None:
            return torch.bucketize(exact.contiguous(), thresholds, right=True, out_int32=True)
        bits = exact.contiguous().view(torch.int32)
        place = (bits >> _DROPPED_BITS).add_((bits + _DROPPED_MASK) >> _DROPPED_BITS).add_(_PREFIXES)
        return by_prefix.index_select(0, place.flatten()).reshape(x.shape)
    doubled = (exact + exact).clamp_(2 * fmt.levels[0], 2 * fmt.max_level)
    quarter = doubled.floor().add_(doubled.ceil_()).sub_(4 * fmt.levels[0]).nan_to_num_(0.0).to(torch.int32)
    return _rung_of_quarter(fmt, x.device).index_select(0, quarter.flatten()).reshape(x.shape)


def nearest_levels(x: Tensor, fmt: NumberFormat) -> Tensor:
    """Level nearest to each element; no check, so that a forward pass stays free of synchronisation.

    A NaN gets some level: callers must carry it in the scale (see `kernels.activation`).

    Args:
        x: floating point, any shape, in units of level 1.

    Returns:
        int8 (float32 for formats that do not fit in int8), shape of `x`.
    """
    return _rungs_for(x, fmt).levels.index_select(0, _rung_index(x, fmt).flatten()).reshape(x.shape)


def nearest_codes(x: Tensor, fmt: NumberFormat) -> Tensor:
    """Code of the nearest level, uint8, with the sign of a zero result kept; no check, as `nearest_levels`."""
    rungs = _rungs_for(x, fmt)
    index = _rung_index(x, fmt).long()
    codes = rungs.codes[index]
    if fmt.negative_zero_code is None:
        return codes
    is_negative_zero = (rungs.levels[index] == 0) & torch.signbit(x)
    return torch.where(is_negative_zero, fmt.negative_zero_code, codes)


def require_no_nan(x: Tensor, what: str) -> None:
    """Raise `NumericsError` naming the count and the first position if `x` holds a NaN."""
    is_nan = torch.isnan(x)
    if bool(is_nan.any()):
        first = tuple(int(i) for i in is_nan.nonzero()[0])
        raise NumericsError(
            f"{what}: found {int(is_nan.sum())} NaN (first at index {first}), needed numbers, because no 4-bit "
            "format has a NaN. Fix: look for the layer or file that produced it"
        )


def round_to_format(x: Tensor, fmt: NumberFormat) -> Tensor:
    """Nearest level of `fmt` to each element of `x`, as float32 with the sign of zero kept.

    Ties go to the code whose last bit is 0 (in E3M0 too); magnitudes beyond the largest level saturate, infinities
    included.

    Args:
        x: floating point, any shape, in units of level 1 (already divided by its scale).

    Returns:
        float32, shape of `x`, every element a level of `fmt`.

    Raises:
        NumericsError: `x` holds a NaN.
    """
    require_no_nan(x, "round_to_format")
    levels = nearest_levels(x, fmt).to(torch.float32)
    if fmt.negative_zero_code is None:
        return levels
    return torch.where(levels == 0, torch.copysign(levels, x.to(torch.float32)), levels)
