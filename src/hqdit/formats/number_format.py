"""Low-bit number formats: a few independent facts each, everything else derived.

A format is described by its *levels*: the integers that its codes stand for, in units of its smallest positive
value. E2M1, for example, has the values 0, 0.5, 1, 1.5, 2, 3, 4, 6; in units of 0.5 its levels are 0, 1, 2, 3, 4, 6,
8, 12. Levels are what kernels multiply, so that a product of two formats whose levels fit in int8 is exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

from hqdit.errors import UsageError

INT8_MIN, INT8_MAX = -128, 127


class NumberFormat(ABC):
    """A finite set of numbers with a code for each; see the module's docstring for *levels*.

    Subclasses state `name`, `bits` and `level_of_code`; the rest is derived here, once for every format.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """Lower-case name, the one used in configurations and checkpoints."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a code."""

    @property
    @abstractmethod
    def level_of_code(self) -> tuple[int | None, ...]:
        """Level of each of the 2**bits codes; None marks a code that stands for no finite number."""

    @property
    def quantum(self) -> float:
        """Value of level 1: multiply a level by it to get the number in the format's customary scaling."""
        return 1.0

    @property
    def negative_zero_code(self) -> int | None:
        """The code of -0, or None where zero has no sign."""
        return None

    @cached_property
    def ladder(self) -> tuple[tuple[int, int], ...]:
        """(level, code) for every distinct level, ascending; +0 stands for both zeros."""
        rungs: dict[int, int] = {}
        for code, level in enumerate(self.level_of_code):
            if level is not None and code != self.negative_zero_code:
                rungs.setdefault(level, code)
        return tuple(sorted(rungs.items()))

    @property
    def levels(self) -> tuple[int, ...]:
        """The distinct levels, ascending."""
        return tuple(level for level, _ in self.ladder)

    @property
    def max_level(self) -> int:
        """The largest level; absmax scaling maps the largest magnitude to it."""
        return self.levels[-1]

    @property
    def max_value(self) -> float:
        """The largest number in the customary scaling: 6 for E2M1, 448 for E4M3."""
        return self.max_level * self.quantum

    @property
    def dynamic_range(self) -> float:
        """Largest over smallest positive magnitude: 7, 12 and 64 for E1M2, E2M1 and E3M0."""
        return self.max_level / min(level for level in self.levels if level > 0)

    @property
    def is_signed(self) -> bool:
        """Whether any level is negative."""
        return self.levels[0] < 0

    @property
    def is_int8(self) -> bool:
        """Whether every level fits in int8, so that products are exact in int32."""
        return self.levels[0] >= INT8_MIN and self.max_level <= INT8_MAX

    def to_json(self) -> str | list[int]:
        """What stands for this format in a configuration: its name, or the table itself."""
        return self.name

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class FloatFormat(NumberFormat):
    """A sign bit, `exponent_bits` and `mantissa_bits`, with subnormals and without infinities.

    Code layout, from the top bit: sign, exponent, mantissa. A biased exponent of 0 is subnormal.

    Attributes:
        exponent_bits: E, at least 1.
        mantissa_bits: M, 0 or more.
        reserved_codes: how many of the topmost magnitude codes are NaN or infinity (1 in OCP E4M3, 4 in E5M2).

    Source: OCP Microscaling Formats v1.0, section 5.3 (E2M1, E2M3, E4M3, E5M2). E3M0 and E1M2 follow the same
    rules, as in LLM-FP4 (arXiv 2310.16836).
    """

    exponent_bits: int
    mantissa_bits: int
    reserved_codes: int = 0

    @property
    def name(self) -> str:
        """Lower-case EnMm, as in "e2m1"; the ecosystem's spelling is float4_e2m1fn."""
        return f"e{self.exponent_bits}m{self.mantissa_bits}"

    @property
    def bits(self) -> int:
        """Bits of a code, the sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """The customary exponent bias, 2**(E-1) - 1; only `quantum` depends on it."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def quantum(self) -> float:
        """The smallest positive number: 2**(1 - bias - M), or 2**(1 - bias) without a mantissa."""
        return float(2.0 ** (1 - self.bias - self.mantissa_bits))

    @property
    def negative_zero_code(self) -> int:
        """The sign bit alone."""
        return 1 << (self.bits - 1)

    @cached_property
    def level_of_code(self) -> tuple[int | None, ...]:
        """Levels of the positive codes, then of the negative ones (sign and magnitude)."""
        half = 1 << (self.bits - 1)
        steps = 1 << self.mantissa_bits
        magnitudes: list[int | None] = []
        for code in range(half):
            exponent, mantissa = divmod(code, steps)
            # Subnormal: mantissa; normal: (1.mantissa) * 2**(exponent-1), both in units of 2**-M.
            magnitudes.append(mantissa if exponent == 0 else (steps + mantissa) << (exponent - 1))
        for code in range(half - self.reserved_codes, half):
            magnitudes[code] = None
        return tuple(magnitudes) + tuple(None if level is None else -level for level in magnitudes)


@dataclass(frozen=True)
class IntegerFormat(NumberFormat):
    """Two's complement integers of `width` bits: -2**(width-1) .. 2**(width-1) - 1."""

    width: int

    @property
    def name(self) -> str:
        """Lower-case intN, as in "int4"."""
        return f"int{self.width}"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.width

    @cached_property
    def level_of_code(self) -> tuple[int | None, ...]:
        """Code c stands for c, or for c - 2**width from the sign bit up."""
        half = 1 << (self.width - 1)
        return tuple(range(half)) + tuple(range(-half, 0))


@dataclass(frozen=True)
class TableFormat(NumberFormat):
    """A 16-entry codebook of int8 levels, signed or one-sided; the code is the index into the table.

    Attributes:
        table: 16 strictly ascending integers in -128..127.

    Raises:
        UsageError: the table is not of that form, or holds no positive level.
    """

    table: tuple[int, ...]

    def __post_init__(self) -> None:
        in_range = all(type(x) is int and INT8_MIN <= x <= INT8_MAX for x in self.table)  # a bool is no level
        ascending = in_range and all(a < b for a, b in zip(self.table, self.table[1:], strict=False))
        if len(self.table) != 16 or not ascending or self.table[-1] <= 0:
            raise UsageError(
                f"number format: found the table {list(self.table)}, needed 16 strictly ascending integers in "
                "-128..127 with a positive last one. Fix: sort the table and remove duplicates"
            )

    @property
    def name(self) -> str:
        """All 16 levels, so that the name says everything."""
        return "table:" + ",".join(str(level) for level in self.table)

    @property
    def bits(self) -> int:
        """Always 4."""
        return 4

    @property
    def level_of_code(self) -> tuple[int | None, ...]:
        """The table itself."""
        return self.table

    def to_json(self) -> list[int]:
        """The table as a list."""
        return list(self.table)
