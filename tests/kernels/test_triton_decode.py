"""The assembly that decodes packed codes on a GPU, run by a few lines of Python: the interpreter passes it by."""

from __future__ import annotations

import re

import numpy as np
import pytest
from triton_cases import needs_triton

pytestmark = needs_triton


def permuted(a: int, b: int, selector: int) -> int:
    """PTX's prmt.b32: byte i of the result is one of the eight bytes of b:a, by nibble i of the selector."""
    source = (b << 32 | a).to_bytes(8, "little")
    nibbles = [selector >> 4 * i & 15 for i in range(4)]
    assert max(nibbles) < 8  # bit 3 would ask for the sign instead of the byte
    return int.from_bytes(bytes(source[nibble] for nibble in nibbles), "little")


def run(assembly: str, operands: dict[str, int]) -> dict[str, int]:
    """The registers after the instructions of `assembly`; registers of 32 bits."""
    registers = dict(operands)

    def value(operand: str) -> int:
        return registers[operand] if operand in registers else int(operand, 0)

    for line in re.findall(r"^ +(?![ .])(.+);", assembly, flags=re.MULTILINE):
        operation, *names = re.split(r"[ ,]+", line)
        a, *rest = map(value, names[1:])
        registers[names[0]] = {
            "and.b32": lambda a=a, rest=rest: a & rest[0],
            "or.b32": lambda a=a, rest=rest: a | rest[0],
            "shr.u32": lambda a=a, rest=rest: a >> rest[0],
            "prmt.b32": lambda a=a, rest=rest: permuted(a, *rest),
            "cvt.u32.u8": lambda a=a: a & 0xFF,
            "cvt.u16.u32": lambda a=a: a & 0xFFFF,
        }[operation]()
    return registers


@pytest.fixture(params=range(4))
def table(request: pytest.FixtureRequest) -> np.ndarray:
    return np.random.default_rng(request.param).integers(-128, 128, 16, dtype=np.int8)


def words(table: np.ndarray) -> list[int]:
    return [int(word) for word in table.view("<u4")]


def test_every_byte_with_a_table_of_its_own(table: np.ndarray) -> None:
    from hqdit.kernels.triton.product import DECODE_ONE_BYTE

    for byte in range(256):
        # What lies above the byte in its register must not matter.
        given = {f"${2 + i}": word for i, word in enumerate(words(table))} | {"$1": byte | 0xAB00}
        found = np.array([run(DECODE_ONE_BYTE.value, given)["$0"]], dtype="<u2").view(np.int8)
        assert found.tolist() == [table[byte & 15], table[byte >> 4]]


def test_every_byte_in_every_place_of_four(table: np.ndarray) -> None:
    from hqdit.kernels.triton.product import DECODE_FOUR_BYTES

    rng = np.random.default_rng(0)
    for byte in range(256):
        for place in range(4):
            codes = rng.integers(0, 256, 4, dtype=np.uint8)
            codes[place] = byte
            # Each word comes once for each byte: registers 3 to 6, 7 to 10, 11 to 14, 15 to 18.
            given = {f"${3 + 4 * i + j}": word for i, word in enumerate(words(table)) for j in range(4)}
            done = run(DECODE_FOUR_BYTES.value, given | {"$2": int(codes.view("<u4")[0])})
            found = np.array([done["$0"], done["$1"]], dtype="<u4").view(np.int8)
            assert found.tolist() == [table[code] for byte in codes for code in (byte & 15, byte >> 4)]
