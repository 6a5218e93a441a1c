"""Formats against their specifications, written out."""

from __future__ import annotations

import json
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import (
    E1M2_VALUES,
    E2M1_VALUES,
    E2M3_VALUES,
    E3M0_VALUES,
    GRIDS,
    ONE_SIDED_TABLE,
    SIGNED_TABLE,
    SKEW_TABLE,
)

from hqdit.errors import UsageError
from hqdit.formats.catalog import (
    E1M2,
    E2M1,
    E2M3,
    E3M0,
    E4M3,
    E5M2,
    FORMAT_NAMES,
    FP4_FORMATS,
    INT4,
    INT6,
    INT8,
    format_from_json,
)
from hqdit.formats.number_format import FloatFormat, NumberFormat, TableFormat

ALL = [format_from_json(name) for name in GRIDS]


def values_by_code(fmt: NumberFormat) -> list[float | None]:
    return [None if level is None else level * fmt.quantum for level in fmt.level_of_code]


# Values and codes


@pytest.mark.parametrize(
    ("fmt", "magnitudes"),
    [(E2M1, E2M1_VALUES), (E3M0, E3M0_VALUES), (E1M2, E1M2_VALUES), (E2M3, E2M3_VALUES)],
    ids=str,
)
def test_values_of_small_floats(fmt: FloatFormat, magnitudes: list[float]) -> None:
    assert values_by_code(fmt) == magnitudes + [-value for value in magnitudes]


@pytest.mark.parametrize(
    ("fmt", "levels"),
    [(E1M2, [0, 1, 2, 3, 4, 5, 6, 7]), (E2M1, [0, 1, 2, 3, 4, 6, 8, 12]), (E3M0, [0, 1, 2, 4, 8, 16, 32, 64])],
    ids=str,
)
def test_integer_magnitudes_that_kernels_see(fmt: FloatFormat, levels: list[int]) -> None:
    assert list(fmt.level_of_code[:8]) == levels
    assert list(fmt.levels) == [-level for level in levels[:0:-1]] + levels


@pytest.mark.parametrize(("fmt", "bits"), [(INT4, 4), (INT6, 6), (INT8, 8)], ids=str)
def test_integers_are_twos_complement(fmt: NumberFormat, bits: int) -> None:
    assert fmt.bits == bits
    for code, level in enumerate(fmt.level_of_code):
        assert level == int.from_bytes([code if code < 1 << (bits - 1) else code + 256 - (1 << bits)], signed=True)
    assert fmt.levels == tuple(range(-(2 ** (bits - 1)), 2 ** (bits - 1)))


@pytest.mark.parametrize("name", GRIDS)
def test_every_code_of_every_format(name: str) -> None:
    fmt = format_from_json(name)
    assert len(fmt.level_of_code) == 2**fmt.bits
    for code, level in enumerate(fmt.level_of_code):
        assert level == GRIDS[name].get(code), f"code {code}"


@pytest.mark.parametrize(
    ("fmt", "largest", "smallest_normal", "largest_subnormal", "smallest_subnormal"),
    [
        # OCP 8-bit Floating Point, table 1
        (E4M3, 448, 2**-6, 0.875 * 2**-6, 2**-9),
        (E5M2, 57344, 2**-14, 0.75 * 2**-14, 2**-16),
        # OCP Microscaling Formats v1.0, tables 3 and 5
        (E2M3, 7.5, 1.0, 0.875, 0.125),
        (E2M1, 6.0, 1.0, 0.5, 0.5),
    ],
    ids=str,
)
def test_extremes_of_the_ocp_tables(
    fmt: FloatFormat, largest: float, smallest_normal: float, largest_subnormal: float, smallest_subnormal: float
) -> None:
    values = values_by_code(fmt)
    assert fmt.max_value == largest == max(value for value in values if value is not None)
    assert values[1 << fmt.mantissa_bits] == smallest_normal
    assert values[(1 << fmt.mantissa_bits) - 1] == largest_subnormal
    assert values[1] == fmt.quantum == smallest_subnormal


@pytest.mark.parametrize(
    ("fmt", "dtype"),
    [
        (E2M1, ml_dtypes.float4_e2m1fn),
        (E2M3, ml_dtypes.float6_e2m3fn),
        (E4M3, ml_dtypes.float8_e4m3fn),
        (E5M2, ml_dtypes.float8_e5m2),
    ],
    ids=str,
)
def test_every_code_as_ml_dtypes_decodes_it(fmt: FloatFormat, dtype: type) -> None:
    theirs = np.arange(2**fmt.bits, dtype=np.uint8).view(dtype).astype(np.float32)
    for code, (value, their_value) in enumerate(zip(values_by_code(fmt), theirs.tolist(), strict=True)):
        if value is None:
            assert not np.isfinite(their_value), f"code {code}"
        else:
            assert value == their_value, f"code {code}"


@pytest.mark.parametrize(("fmt", "count"), [(E4M3, 1), (E5M2, 4), (E2M1, 0), (E2M3, 0)], ids=str)
def test_codes_without_a_number(fmt: FloatFormat, count: int) -> None:
    half = 1 << (fmt.bits - 1)
    missing = [code for code, level in enumerate(fmt.level_of_code) if level is None]
    assert missing == [*range(half - count, half), *range(2 * half - count, 2 * half)]


@pytest.mark.parametrize("fmt", [E3M0, E2M1, E1M2, E2M3, E4M3, E5M2], ids=str)
def test_top_bit_is_the_sign(fmt: FloatFormat) -> None:
    half = 1 << (fmt.bits - 1)
    assert fmt.negative_zero_code == half
    for code in range(half):
        level, mirrored = fmt.level_of_code[code], fmt.level_of_code[code + half]
        assert (level is None) == (mirrored is None)
        if level is not None and mirrored is not None:
            assert level >= 0
            assert mirrored == -level


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_ladder_ascends_and_names_each_level_once(fmt: NumberFormat) -> None:
    levels = [level for level, _ in fmt.ladder]
    assert levels == sorted(set(levels)) == sorted({level for level in fmt.level_of_code if level is not None})
    assert all(fmt.level_of_code[code] == level for level, code in fmt.ladder)
    zeros = [code for code, level in enumerate(fmt.level_of_code) if level == 0]
    assert dict(fmt.ladder).get(0) == (min(zeros) if zeros else None)  # +0 stands for both


# Derived facts


@pytest.mark.parametrize(
    ("fmt", "expected"), [(E1M2, 7), (INT4, 7), (E2M1, 12), (E3M0, 64), (E2M3, 60), (INT8, 127)], ids=str
)
def test_dynamic_range(fmt: NumberFormat, expected: int) -> None:
    assert fmt.dynamic_range == expected


@given(st.integers(1, 5), st.integers(0, 4))
def test_dynamic_range_formula(exponent_bits: int, mantissa_bits: int) -> None:
    # R(E, M) = 2^(2^E - 2 + M) (2 - 2^-M), in units of the smallest subnormal, or of the smallest normal if M = 0.
    formula = Fraction(2) ** (2**exponent_bits - 2 + mantissa_bits) * (2 - Fraction(1, 2**mantissa_bits))
    assert FloatFormat(exponent_bits, mantissa_bits).dynamic_range == formula


def test_e1m2_is_int4_without_minus_eight() -> None:
    assert set(E1M2.levels) == set(INT4.levels) - {-8}
    assert E1M2.max_level == INT4.max_level == 7


def test_fp4_formats_grow_in_mantissa() -> None:
    assert FP4_FORMATS == (E3M0, E2M1, E1M2)
    assert all(fmt.bits == 4 for fmt in FP4_FORMATS)


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_which_formats_fit_in_int8(fmt: NumberFormat) -> None:
    assert fmt.is_int8 == all(-128 <= level <= 127 for level in fmt.levels)
    assert fmt.is_int8 == (fmt not in (E4M3, E5M2))


def test_which_formats_are_signed() -> None:
    assert [fmt for fmt in ALL if not fmt.is_signed] == [TableFormat(ONE_SIDED_TABLE)]


@pytest.mark.parametrize("name", [name for name in FORMAT_NAMES if name != "lloyd-max"])  # which is a table
def test_name_says_exponent_and_mantissa(name: str) -> None:
    fmt = format_from_json(name)
    assert str(fmt) == fmt.name == name
    if isinstance(fmt, FloatFormat):
        assert name == f"e{fmt.exponent_bits}m{fmt.mantissa_bits}"
        assert fmt.bits == 1 + fmt.exponent_bits + fmt.mantissa_bits


# Tables


@pytest.mark.parametrize("table", [SIGNED_TABLE, SKEW_TABLE, ONE_SIDED_TABLE])
def test_table_is_its_own_codebook(table: tuple[int, ...]) -> None:
    fmt = TableFormat(table)
    assert fmt.bits == 4
    assert fmt.level_of_code == table
    assert fmt.negative_zero_code is None
    assert fmt.max_level == table[-1]
    assert fmt.is_signed == (table[0] < 0)


ASCENDING = tuple(range(16))


@pytest.mark.parametrize(
    "table",
    [
        (),
        ASCENDING[:15],
        (*ASCENDING, 16),
        (*ASCENDING[:14], 14, 14),  # twice the same
        ASCENDING[::-1],
        (*ASCENDING[:15], 128),
        (-129, *ASCENDING[1:]),
        tuple(range(-15, 1)),  # nothing positive
        tuple(float(level) for level in ASCENDING),
        (*ASCENDING[:15], 15.5),
        (*ASCENDING[:15], "15"),
        (*ASCENDING[:15], None),
        (False, True, *ASCENDING[2:]),
        tuple("abcdefghijklmnop"),
    ],
    ids=repr,
)
def test_bad_table_is_refused(table: tuple[object, ...]) -> None:
    with pytest.raises(UsageError, match="16 strictly ascending integers"):
        TableFormat(table)
    with pytest.raises(UsageError, match="16 strictly ascending integers"):
        format_from_json(list(table))


@given(st.lists(st.integers(-128, 127), min_size=16, max_size=16, unique=True))
def test_every_good_table_is_taken(levels: list[int]) -> None:
    table = tuple(sorted(levels))
    if table[-1] > 0:
        assert TableFormat(table).levels == table
    else:
        with pytest.raises(UsageError):
            TableFormat(table)


# JSON


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_json_round_trip(fmt: NumberFormat) -> None:
    assert format_from_json(json.loads(json.dumps(fmt.to_json()))) == fmt
    assert format_from_json(fmt.name) == fmt
    assert format_from_json(f"  {fmt.name.upper()} ") == fmt


def test_formats_of_equal_content_are_equal() -> None:
    # Caches and grouping rest on it.
    assert FloatFormat(2, 1) == E2M1
    assert hash(FloatFormat(2, 1)) == hash(E2M1)
    assert FloatFormat(4, 3) != E4M3
    assert TableFormat(SIGNED_TABLE) != TableFormat(SKEW_TABLE)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "fp4",
        "e2m2",
        "int5",
        "e2m1fn",
        "table:",
        "table:1,2,3",
        "table:a,b",
        "table",
        4,
        None,
        2.5,
        {"name": "e2m1"},
    ],
    ids=repr,
)
def test_unknown_format_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="number format: found"):
        format_from_json(value)
