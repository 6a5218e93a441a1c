"""The byte contract of packed codes, decided here and nowhere else.

A row of K codes of at most 4 bits becomes K / 2 bytes: byte j holds element 2j in bits 3..0 and element 2j + 1 in
bits 7..4 (low nibble first, the order of NVFP4 checkpoints in diffusers). Wider codes take one byte each, so that
6-bit codes are stored in 8 bits. The order is that of memory: files outlive instruction sets.
"""

from __future__ import annotations

from hqdit.formats.number_format import NumberFormat

LOW_NIBBLE_SHIFT = 0
HIGH_NIBBLE_SHIFT = 4
NIBBLE_MASK = 0x0F


def codes_per_byte(fmt: NumberFormat) -> int:
    """2 for formats of at most 4 bits, else 1."""
    return 2 if fmt.bits <= 4 else 1


def packed_row_bytes(in_features: int, fmt: NumberFormat) -> int:
    """Bytes of one packed row of `in_features` codes; `in_features` must be even for 4-bit formats."""
    return in_features // codes_per_byte(fmt)
