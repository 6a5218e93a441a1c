"""The byte contract."""

from __future__ import annotations

import pytest
from oracles import GRIDS

from hqdit.formats.catalog import format_from_json
from hqdit.formats.packed_layout import codes_per_byte, packed_row_bytes


@pytest.mark.parametrize("name", GRIDS)
def test_two_codes_a_byte_up_to_four_bits(name: str) -> None:
    fmt = format_from_json(name)
    assert codes_per_byte(fmt) == (2 if fmt.bits == 4 else 1)
    assert packed_row_bytes(144, fmt) == (72 if fmt.bits == 4 else 144)
