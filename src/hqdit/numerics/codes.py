"""Between numbers and codes, and between codes and bytes."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hqdit.errors import NumericsError, UsageError
from hqdit.formats.number_format import NumberFormat
from hqdit.formats.packed_layout import HIGH_NIBBLE_SHIFT, LOW_NIBBLE_SHIFT, NIBBLE_MASK, codes_per_byte
from hqdit.numerics.rounding import nearest_codes, require_no_nan


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # the cache outlives the mode of the call that fills it
def level_table(fmt: NumberFormat, device: torch.device) -> Tensor:
    """Level of every code: int8 (2**bits,), or float32 with NaN for codes that stand for no number."""
    if fmt.is_int8:
        return torch.tensor(fmt.level_of_code, dtype=torch.int8, device=device)
    levels = [float("nan") if level is None else float(level) for level in fmt.level_of_code]
    return torch.tensor(levels, dtype=torch.float32, device=device)


def encode(x: Tensor, fmt: NumberFormat) -> Tensor:
    """Code of the level nearest to each element (rounding as in `round_to_format`).

    Args:
        x: floating point, any shape, in units of level 1.

    Returns:
        uint8, shape of `x`.

    Raises:
        NumericsError: `x` holds a NaN.
    """
    require_no_nan(x, "encode")
    return nearest_codes(x, fmt)


def decode(codes: Tensor, fmt: NumberFormat) -> Tensor:
    """Level of each code, as float32 with the sign of zero kept.

    Args:
        codes: uint8, any shape.

    Raises:
        NumericsError: a code lies outside the format or stands for no finite number.
    """
    if codes.numel() and int(codes.max()) >= 1 << fmt.bits:
        raise NumericsError(
            f"decode: found code {int(codes.max())}, needed codes below {1 << fmt.bits} for {fmt}. "
            "Fix: unpack the codes with the format they were packed with"
        )
    levels = level_table(fmt, codes.device)[codes.long()].to(torch.float32)
    if not fmt.is_int8:
        require_no_nan(levels, f"decode from {fmt}")
    if fmt.negative_zero_code is None:
        return levels
    return torch.where(codes == fmt.negative_zero_code, -0.0, levels)


def pack_codes(codes: Tensor, fmt: NumberFormat) -> Tensor:
    """Bytes of a matrix of codes; the layout is `formats.packed_layout`'s.

    Args:
        codes: uint8 (..., K); K even for formats of at most 4 bits.

    Returns:
        uint8 (..., K / 2), or (..., K) for wider formats.

    Raises:
        UsageError: K is odd although two codes share a byte.
    """
    if codes_per_byte(fmt) == 1:
        return codes.contiguous()
    if codes.shape[-1] % 2:
        raise UsageError(
            f"pack_codes: found rows of {codes.shape[-1]} codes, needed an even number because two 4-bit codes "
            "share a byte. Fix: leave this layer out or use an 8-bit format"
        )
    return ((codes[..., 0::2] << LOW_NIBBLE_SHIFT) | (codes[..., 1::2] << HIGH_NIBBLE_SHIFT)).contiguous()


def unpack_codes(packed: Tensor, fmt: NumberFormat) -> Tensor:
    """The codes that `pack_codes` packed: uint8 (..., K)."""
    if codes_per_byte(fmt) == 1:
        return packed
    low, high = (packed >> LOW_NIBBLE_SHIFT) & NIBBLE_MASK, (packed >> HIGH_NIBBLE_SHIFT) & NIBBLE_MASK
    return torch.stack((low, high), dim=-1).flatten(-2)
