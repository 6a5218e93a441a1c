"""How the answers of experiments put an interval into words."""

from __future__ import annotations

from hqdit.records.run_record import Interval


def signed_db(gain: Interval, digits: int = 2) -> str:
    """Value and bounds with their signs, as in "+1.20 dB [+0.90, +1.50]"."""
    value, low, high = (f"{number:+.{digits}f}" for number in (gain.value, gain.low, gain.high))
    return f"{value} dB [{low}, {high}]"


def compared(gain: Interval, above: str = "better than", below: str = "worse than") -> str:
    """What a gain says about its first side: `above` or `below` only where the interval leaves out zero."""
    return above if gain.low > 0 else below if gain.high < 0 else "not distinguishable from"


def interval_notes(drawn: str) -> tuple[str, str]:
    """What a record's intervals leave out.

    Args:
        drawn: what was drawn once, as in "the rotation's signs".
    """
    return (
        f"Intervals and verdicts are for one draw of {drawn}; another draw moves the results too, and no interval "
        "contains that.",
        "Several 95 % intervals are read at once, without a correction: of every twenty that should hold zero, about "
        "one leaves it out by chance.",
    )
