"""Scales of groups in 8 bits: E4M3 numbers relative to a unit that the groups of a token or channel share.

number = level * (unit * E4M3). Rounding is to nearest, ties to the even code, and never to 0: the smallest scale is
2^-9 of the unit.

For a token the unit is a power of two, so that an exponent says it. For an output channel of a weight it is the largest
scale over 448, E4M3's largest number, so that the groups with the largest numbers keep their scale; cut to 20 bits of
mantissa, so that its product with an E4M3 number, which has 4, is exact in float32, and unit and codes can be told from
the product.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqdit.formats.catalog import E4M3
from hqdit.numerics.rounding import nearest_levels
from hqdit.quantizers.scaling import MIN_SCALE

SHORT_DTYPE = torch.float8_e4m3fn

#: Of a token, the unit is 2^(e - 7) for a largest scale in 2^e .. 2^(e + 1): that one is between 128 and 256 units, and
#: rounding cannot take it past 448.
_UNIT_EXPONENT = -7
_QUANTUM_EXPONENT = -9  # E4M3.quantum, the smallest positive number, is 2^-9

_LARGEST_CODE = E4M3.ladder[-1][1]

_FLOAT32_MANTISSA_BITS, _FLOAT32_BIAS = 23, 127
_FLOAT64_MANTISSA_BITS, _FLOAT64_BIAS = 52, 1023
#: The last bits of a float32 beside 20 bits of mantissa, the leading one included.
_CUT_BITS = 0b1111
#: The smallest unit of a channel: its smallest scale, 2^-9 of it, is `MIN_SCALE`.
_MIN_UNIT = MIN_SCALE / E4M3.quantum


def round_token_scales(scale: Tensor) -> Tensor:
    """Scales of the groups of each token, rounded to E4M3 numbers of the token's unit.

    Args:
        scale: float32 (tokens, groups), at least `MIN_SCALE`; NaN for all groups of a bad token.

    Returns:
        float32 (tokens, groups), at least `MIN_SCALE`, because that is one of the numbers that can be had, or less than
        all of them. NaN for bad tokens, and for tokens whose largest scale rounds to more than float32 holds.

    Exact: with e = floor(log2(largest scale)), equal to 2^(e - 7) times the nearest of E4M3's numbers.
    """
    largest_bits = scale.amax(dim=1, keepdim=True).view(torch.int32)
    exponent = (largest_bits >> _FLOAT32_MANTISSA_BITS) - _FLOAT32_BIAS
    # In float64, where the smallest number of any unit and the quotients by it are exact. A NaN gets some quantum.
    quantum_bits = (exponent + _UNIT_EXPONENT + _QUANTUM_EXPONENT + _FLOAT64_BIAS).to(torch.int64)
    quantum = (quantum_bits << _FLOAT64_MANTISSA_BITS).view(torch.float64)
    levels = nearest_levels(scale.to(torch.float64) / quantum, E4M3).clamp_min(1)
    rounded = (levels * quantum).to(torch.float32)
    is_sound = torch.isfinite(scale) & torch.isfinite(rounded)
    return torch.where(is_sound.all(dim=1, keepdim=True), rounded, torch.nan)


def split_scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scales of the groups of each output channel as E4M3 numbers and units; `merge_scales` is the way back.

    Args:
        scale: float32 (out_features, groups), at least `MIN_SCALE`; a NaN makes its whole channel NaN.

    Returns:
        float8_e4m3fn (out_features, groups), positive; and the units, float32 (out_features, 1).

    Exact: what `merge_scales` returned is split into the parts that it was merged from, if these come from here.
    """
    # Quotients in float64, where rounding hides no exact one and moves none to a tie.
    largest = scale.amax(dim=1, keepdim=True).to(torch.float64)
    unit = (largest / E4M3.max_value).to(torch.float32).clamp_min(_MIN_UNIT)
    unit = (unit.view(torch.int32) & ~_CUT_BITS).view(torch.float32)
    levels = nearest_levels(scale.to(torch.float64) / (unit.to(torch.float64) * E4M3.quantum), E4M3).clamp_min(1)
    return (levels * E4M3.quantum).to(SHORT_DTYPE), unit


def neighbour_scales(short: Tensor, step: int) -> Tensor:
    """The E4M3 numbers `step` codes further up, positive and at most 448; a 448 stays, because it makes the unit.

    Args:
        short: float8_e4m3fn, positive.
        step: codes in the order of their numbers; may be negative.
    """
    codes = short.view(torch.uint8).to(torch.int32)
    moved = (codes + step).clamp(1, _LARGEST_CODE)
    return torch.where(codes == _LARGEST_CODE, codes, moved).to(torch.uint8).view(SHORT_DTYPE)


def merge_scales(short: Tensor, unit: Tensor) -> Tensor:
    """The scales that E4M3 numbers and units stand for, float32 (out_features, groups).

    Args:
        short: float8_e4m3fn (out_features, groups).
        unit: float32 (out_features, 1).
    """
    # One look into a table of all codes, because torch converts float8 numbers one by one.
    codes = torch.arange(256, dtype=torch.uint8, device=short.device)
    numbers = codes.view(SHORT_DTYPE).to(torch.float32)
    return numbers.index_select(0, short.view(torch.uint8).to(torch.int32).flatten()).reshape(short.shape) * unit
