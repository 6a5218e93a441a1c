"""The formats that hqdit knows by name."""

from __future__ import annotations

from hqdit.errors import UsageError
from hqdit.formats.codebooks import lloyd_max
from hqdit.formats.number_format import FloatFormat, IntegerFormat, NumberFormat, TableFormat

E3M0 = FloatFormat(3, 0)  # levels 0 1 2 4 8 16 32 64
E2M1 = FloatFormat(2, 1)  # float4_e2m1fn: levels 0 1 2 3 4 6 8 12
E1M2 = FloatFormat(1, 2)  # levels 0..7: the same numbers as a symmetric 4-bit integer
INT4 = IntegerFormat(4)
E2M3 = FloatFormat(2, 3)  # float6_e2m3fn: levels up to 60, so int8 holds them
INT6 = IntegerFormat(6)
INT8 = IntegerFormat(8)
E4M3 = FloatFormat(4, 3, reserved_codes=1)  # float8_e4m3fn: the top code is NaN
E5M2 = FloatFormat(5, 2, reserved_codes=4)  # float8_e5m2: the top exponent is infinity and NaN

#: The 4-bit floating point formats that the paper chooses among, in order of growing mantissa.
FP4_FORMATS: tuple[FloatFormat, ...] = (E3M0, E2M1, E1M2)

_BY_NAME: dict[str, NumberFormat] = {fmt.name: fmt for fmt in (E3M0, E2M1, E1M2, INT4, E2M3, INT6, INT8, E4M3, E5M2)}

#: The table that is optimal for normal numbers; computed when it is asked for.
LLOYD_MAX = "lloyd-max"

FORMAT_NAMES = (*_BY_NAME, LLOYD_MAX)


def format_from_json(value: object) -> NumberFormat:
    """The format that `value` names: one of `FORMAT_NAMES`, "table:..." or a list of 16 integers.

    Raises:
        UsageError: no such format, or a table that is not one.
    """
    if isinstance(value, str):
        key = value.strip().lower()
        if key == LLOYD_MAX:
            return lloyd_max()
        if key in _BY_NAME:
            return _BY_NAME[key]
        if key.startswith("table:"):
            try:
                return TableFormat(tuple(int(part) for part in key.removeprefix("table:").split(",")))
            except ValueError as error:
                if isinstance(error, UsageError):
                    raise
                raise UsageError(
                    f"number format: found {value!r}, needed 16 integers after 'table:'. Fix: separate them by commas"
                ) from error
    elif isinstance(value, (list, tuple)):
        return TableFormat(tuple(value))
    raise UsageError(
        f"number format: found {value!r}, needed one of {', '.join(FORMAT_NAMES)} or a table of 16 integers. "
        "Fix: pick a name from that list"
    )
