"""Encoding, decoding and packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import GRIDS

from hqdit.errors import NumericsError, UsageError
from hqdit.formats.catalog import E2M1, E4M3, E5M2, INT6, format_from_json
from hqdit.numerics.codes import decode, encode, level_table, pack_codes, unpack_codes

FOUR_BIT = [name for name in GRIDS if len(GRIDS[name]) == 16]
WIDER = [name for name in GRIDS if len(GRIDS[name]) > 16]
EVERY_BYTE = torch.arange(256, dtype=torch.uint8)


@pytest.mark.parametrize("name", GRIDS)
def test_decode_then_encode_is_the_identity_on_every_code(name: str) -> None:
    fmt, grid = format_from_json(name), GRIDS[name]
    codes = torch.tensor(sorted(grid), dtype=torch.uint8)
    levels = decode(codes, fmt)
    assert levels.dtype == torch.float32
    assert levels.tolist() == [float(grid[code]) for code in sorted(grid)]
    assert torch.equal(encode(levels, fmt), codes)  # -0 included
    square = codes[: len(codes) // 2 * 2].reshape(2, -1)
    assert torch.equal(decode(square.T, fmt), decode(square, fmt).T)


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=str)
def test_codes_that_are_no_number_do_not_decode(fmt: object) -> None:
    for code, level in enumerate(fmt.level_of_code):
        if level is None:
            with pytest.raises(NumericsError, match=f"decode from {fmt}"):
                decode(torch.tensor([0, code], dtype=torch.uint8), fmt)


@pytest.mark.parametrize("fmt", [E2M1, INT6], ids=str)
def test_codes_outside_the_format_do_not_decode(fmt: object) -> None:
    first = 1 << fmt.bits
    with pytest.raises(NumericsError, match=f"found code {first}, needed codes below {first}"):
        decode(torch.tensor([0, first], dtype=torch.uint8), fmt)


def test_level_table_of_int8_formats_is_int8() -> None:
    cpu = torch.device("cpu")
    assert level_table(E2M1, cpu).tolist() == [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]
    assert level_table(E2M1, cpu).dtype == torch.int8
    assert level_table(E4M3, cpu).isnan().sum() == 2


# Packing


def test_low_nibble_first() -> None:
    codes = torch.tensor([[0x1, 0xA, 0xF, 0x0], [0x0, 0x7, 0x8, 0x9]], dtype=torch.uint8)
    assert pack_codes(codes, E2M1).tolist() == [[0xA1, 0x0F], [0x70, 0x98]]


@pytest.mark.parametrize("name", FOUR_BIT)
def test_every_byte_unpacks_and_packs(name: str) -> None:
    fmt = format_from_json(name)
    codes = unpack_codes(EVERY_BYTE.unsqueeze(1), fmt)
    assert codes.tolist() == [[byte % 16, byte // 16] for byte in range(256)]
    assert pack_codes(codes, fmt).flatten().tolist() == list(range(256))
    # The same bytes as one row and as a 3-D tensor.
    assert torch.equal(unpack_codes(EVERY_BYTE, fmt), codes.flatten())
    assert torch.equal(pack_codes(codes.reshape(4, 8, 16), fmt), EVERY_BYTE.reshape(4, 8, 8))


@pytest.mark.parametrize("name", WIDER)
def test_wider_codes_take_a_byte_each(name: str) -> None:
    fmt = format_from_json(name)
    codes = torch.tensor(sorted(GRIDS[name]), dtype=torch.uint8)
    assert torch.equal(pack_codes(codes, fmt), codes)
    assert torch.equal(unpack_codes(codes, fmt), codes)
    assert torch.equal(pack_codes(codes[:3], fmt), codes[:3])  # odd widths are fine here


@pytest.mark.parametrize("width", [1, 3, 143])
def test_odd_rows_are_refused(width: int) -> None:
    with pytest.raises(UsageError, match=f"rows of {width} codes, needed an even number"):
        pack_codes(torch.zeros(2, width, dtype=torch.uint8), E2M1)


@given(st.integers(0, 5), st.integers(0, 40), st.integers(0, 2**32 - 1), st.sampled_from(sorted(GRIDS)))
def test_pack_round_trip(rows: int, pairs: int, seed: int, name: str) -> None:
    fmt = format_from_json(name)
    generator = torch.Generator().manual_seed(seed)
    columns_first = torch.randint(0, 1 << fmt.bits, (2 * pairs, rows), generator=generator, dtype=torch.uint8)
    codes = columns_first.T  # not contiguous
    packed = pack_codes(codes, fmt)
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert packed.shape == (rows, pairs if fmt.bits <= 4 else 2 * pairs)
    assert torch.equal(unpack_codes(packed, fmt), codes)


def test_bytes_are_those_of_nvfp4_in_diffusers() -> None:
    nvfp4 = pytest.importorskip("diffusers.quantizers.bfl.utils")
    generator = torch.Generator().manual_seed(5)
    value = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6])
    weight = value[torch.randint(0, len(value), (8, 64), generator=generator)]
    weight[:, ::16] = 6.0  # so that every block of 16 has the scale 1
    packed, block_scale, scale = nvfp4.quantize_nvfp4(weight)
    assert bool((block_scale.float() * scale == 1.0).all())
    ours = pack_codes(encode(weight / E2M1.quantum, E2M1), E2M1)
    assert torch.equal(packed, ours)
    assert torch.equal(decode(unpack_codes(packed, E2M1), E2M1) * E2M1.quantum, weight)
