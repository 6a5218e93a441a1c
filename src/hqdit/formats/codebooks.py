"""16-level tables that are optimal for a distribution, computed where they are needed; no torch.

Source: Lloyd 1982, "Least squares quantization in PCM", and Max 1960, "Quantizing for minimum distortion": a quantizer
of least squared error has every level at the mean of the numbers that are rounded to it, and rounds to the nearest
level. Both conditions in turn converge to it for a normal distribution (whose density is log-concave).
"""

from __future__ import annotations

import math
from functools import cache

from hqdit.formats.number_format import TableFormat

LEVELS = 16
#: Largest level of `LLOYD_MAX`: products of two levels are at most 441, so that 74 of them fit in 16 bits. It costs
#: 0.1 dB against levels that use the whole of int8 (tests/formats).
LARGEST_LEVEL = 21
_ROUNDS = 1000
#: Candidates for the unit of the integer table, as shares of the one that puts the outermost level at the top.
_UNITS = tuple(0.85 + 0.001 * step for step in range(301))


def _density(x: float) -> float:
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi) if math.isfinite(x) else 0.0


def _distribution(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


@cache
def gaussian_centroids() -> tuple[float, ...]:
    """The positive half of the 16 levels of least squared error for a standard normal number, ascending."""
    half = LEVELS // 2
    levels = [3 * (k + 0.5) / half for k in range(half)]
    for _ in range(_ROUNDS):
        edges = [0.0, *((a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)), math.inf]
        levels = [
            (_density(a) - _density(b)) / (_distribution(b) - _distribution(a))
            for a, b in zip(edges, edges[1:], strict=False)
        ]
    return tuple(levels)


def gaussian_error(levels: tuple[float, ...]) -> float:
    """Mean squared error of rounding a standard normal number to the nearest of `levels` and their negatives.

    Args:
        levels: positive and ascending.
    """
    edges = [0.0, *((a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)), math.inf]
    total = 0.0
    for level, a, b in zip(levels, edges, edges[1:], strict=False):
        mass = _distribution(b) - _distribution(a)
        mean = _density(a) - _density(b)
        square = mass + a * _density(a) - (b * _density(b) if math.isfinite(b) else 0.0)
        total += 2 * (square - 2 * level * mean + level * level * mass)
    return total


@cache
def lloyd_max(largest: int = LARGEST_LEVEL) -> TableFormat:
    """The symmetric integer table nearest to optimal for a normal distribution, in the sense of squared error.

    The centroids are rounded to integers for many units, and the table of least error is kept; its scale is free.

    Args:
        largest: the outermost level, 8 to 127.
    """
    centroids = gaussian_centroids()
    best, best_error = None, math.inf
    for share in _UNITS:
        unit = share * centroids[-1] / largest
        table = [min(round(level / unit), largest) for level in centroids]
        table[-1] = largest
        if table[0] < 1 or any(a >= b for a, b in zip(table, table[1:], strict=False)):
            continue
        error = min(gaussian_error(tuple(level * unit * s for level in table)) for s in (0.98, 0.99, 1.0, 1.01, 1.02))
        if error < best_error:
            best, best_error = tuple(table), error
    assert best is not None  # the rounded centroids themselves are distinct for every such `largest`
    return TableFormat(tuple(-level for level in reversed(best)) + best)
