"""Slow definitions to compare with: plain Python, fractions, and NumPy in float64.

Written from the specifications (OCP Microscaling Formats v1.0, OCP 8-bit Floating Point, LLM-FP4, GPTQ), never from the
package, and by other means than the package uses: distances instead of thresholds, dense matrices instead of fast
transforms, least squares instead of Cholesky updates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

#: Unit roundoff of float32 and float64.
U32, U64 = 2.0**-24, 2.0**-53

# Formats: the value of every code

#: Magnitudes in the order of their codes, as the specifications print them.
E2M1_VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E3M0_VALUES = [0, 0.25, 0.5, 1, 2, 4, 8, 16]
E1M2_VALUES = [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5]
# fmt: off
E2M3_VALUES = [
    0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875,
    1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875,
    2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75,
    4, 4.5, 5, 5.5, 6, 6.5, 7, 7.5,
]
# fmt: on

SIGNED_TABLE = (-104, -80, -62, -48, -36, -25, -14, -4, 4, 14, 25, 36, 48, 62, 80, 104)  # without a zero
SKEW_TABLE = (-127, -90, -64, -45, -30, -18, -8, 0, 3, 9, 20, 33, 50, 70, 95, 120)
ONE_SIDED_TABLE = (0, 2, 5, 9, 13, 18, 24, 31, 39, 48, 58, 70, 83, 97, 112, 127)

Grid = dict[int, int]  # code -> value in units of the smallest positive value ("level")


def _sign_and_magnitude(values: Sequence[float | Fraction], bits: int) -> Grid:
    unit = min(Fraction(value) for value in values if value > 0)
    assert all((Fraction(value) / unit).denominator == 1 for value in values)
    magnitudes = {code: int(Fraction(value) / unit) for code, value in enumerate(values)}
    return magnitudes | {code + 2 ** (bits - 1): -level for code, level in magnitudes.items()}


def _minifloat(exponent_bits: int, mantissa_bits: int, bias: int, count: int) -> list[Fraction]:
    """The first `count` magnitudes by the formula of the OCP specification."""
    values = []
    for code in range(count):
        exponent, mantissa = code >> mantissa_bits, Fraction(code % 2**mantissa_bits, 2**mantissa_bits)
        assert exponent < 2**exponent_bits
        is_subnormal = exponent == 0
        values.append(
            Fraction(2) ** (1 - bias) * mantissa if is_subnormal else Fraction(2) ** (exponent - bias) * (1 + mantissa)
        )
    return values


def _twos_complement(bits: int) -> Grid:
    return {value % 2**bits: value for value in range(-(2 ** (bits - 1)), 2 ** (bits - 1))}


def _table(levels: Sequence[int]) -> Grid:
    return dict(enumerate(levels))


#: Every format that the package knows and three tables, by the name that configurations use.
GRIDS: dict[str, Grid] = {
    "e3m0": _sign_and_magnitude(E3M0_VALUES, 4),
    "e2m1": _sign_and_magnitude(E2M1_VALUES, 4),
    "e1m2": _sign_and_magnitude(E1M2_VALUES, 4),
    "int4": _twos_complement(4),
    "e2m3": _sign_and_magnitude(E2M3_VALUES, 6),
    "int6": _twos_complement(6),
    "int8": _twos_complement(8),
    "e4m3": _sign_and_magnitude(_minifloat(4, 3, 7, 127), 8),
    "e5m2": _sign_and_magnitude(_minifloat(5, 2, 15, 124), 8),
} | {"table:" + ",".join(map(str, t)): _table(t) for t in (SIGNED_TABLE, SKEW_TABLE, ONE_SIDED_TABLE)}


def nearest_code(x: float, grid: Grid) -> int:
    """Code of the level nearest to `x`: exact; ties to the even code; saturating; the sign of zero is that of x."""
    negative = math.copysign(1.0, x) < 0
    exact = Fraction(x) if math.isfinite(x) else Fraction(10**400 * (-1 if negative else 1))
    top, bottom = exact.numerator, exact.denominator
    distances = {code: abs(top - level * bottom) for code, level in grid.items()}
    distance = min(distances.values())
    nearest = [code for code in grid if distances[code] == distance]
    zeros = [code for code in nearest if grid[code] == 0]
    if len(zeros) == 2:  # +0 and -0: one number with two codes, of which the sign picks
        nearest = [code for code in nearest if code not in zeros] + [max(zeros) if negative else min(zeros)]
    if len(nearest) == 1:
        return nearest[0]
    (even,) = [code for code in nearest if code % 2 == 0]
    return even


def nearest_levels(x: npt.ArrayLike, grid: Grid) -> Array:
    """The same for a float32 array, as levels: by distances in float64, and exactly where two of them are equal."""
    levels = np.array(sorted(set(grid.values())), dtype=np.float64)
    flat = np.asarray(x, dtype=np.float64).ravel()
    result = np.empty_like(flat)
    for start in range(0, flat.size, 4096):
        part = np.clip(flat[start : start + 4096], levels[0] - 1, levels[-1] + 1)  # else 1e38 - 1 == 1e38
        distance = np.abs(part[:, None] - levels)
        chosen = levels[distance.argmin(axis=1)]
        is_tie = (distance == distance.min(axis=1, keepdims=True)).sum(axis=1) > 1
        chosen[is_tie] = [grid[nearest_code(number, grid)] for number in part[is_tie].tolist()]
        result[start : start + 4096] = chosen
    return result.reshape(np.shape(x))


def probes(grid: Grid) -> list[float]:
    """float32 numbers where rounding can go wrong: levels, ties, the neighbours of both, zeros, far and tiny ones."""
    levels = sorted(set(grid.values()))
    points = [float(level) for level in levels]
    points += [(a + b) / 2 for a, b in zip(levels, levels[1:], strict=False)]
    near = [float(np.nextafter(np.float32(p), np.float32(side))) for p in points for side in (-math.inf, math.inf)]
    far = [float(np.float32(sign * size)) for sign in (-1, 1) for size in (2.0**-149, 2.0**-126, 1e-10, 1e10, 3.4e38)]
    return points + near + far + [0.0, -0.0, math.inf, -math.inf]


# Scales of 8 bits


def short_numbers(x: npt.ArrayLike) -> Array:
    """The positive E4M3 number nearest to each x > 0, never 0: by distances to all numbers, ties to the even code."""
    levels = nearest_levels(np.asarray(x, dtype=np.float64) * 512, GRIDS["e4m3"])  # in units of the smallest, 2^-9
    return np.maximum(levels, 1) / 512


def token_scales(scale: npt.NDArray[np.float32]) -> Array:
    """Scales (tokens, groups) relative to a power of two of each token, of which the largest is 128 to 256 units."""
    rows = []
    for row in scale.astype(np.float64):
        unit = 2.0 ** (math.floor(math.log2(row.max())) - 7)
        while row.max() >= 256 * unit:  # log2 may round up or down next to a power of two
            unit *= 2
        while row.max() < 128 * unit:
            unit /= 2
        rows.append(short_numbers(row / unit) * unit)
    return np.array(rows).reshape(scale.shape)


# Hadamard matrices


def is_prime(n: int) -> bool:
    return n > 1 and not any(n % d == 0 for d in range(2, n))


def has_paley_order(order: int) -> bool:
    """Whether order = 2^k m with m = 1, or m - 1 a prime 3 mod 4, or m / 2 - 1 a prime 1 mod 4."""
    m = order
    while True:
        first = is_prime(m - 1) and (m - 1) % 4 == 3
        second = m % 2 == 0 and is_prime(m // 2 - 1) and (m // 2 - 1) % 4 == 1
        if m == 1 or first or second:
            return True
        if m % 2:
            return False
        m //= 2


def is_hadamard(matrix: npt.NDArray[np.generic], block: int = 1536) -> bool:
    """Entries +-1 and H H^T = n I.

    In float32, which is exact: every partial sum is an integer of at most n < 2^24 in magnitude.
    """
    n = len(matrix)
    if matrix.shape != (n, n) or not bool(np.isin(matrix, (-1, 1)).all()):
        return False
    dense = matrix.astype(np.float32)
    for top in range(0, n, block):
        for left in range(top, n, block):  # the product is symmetric
            product = dense[top : top + block] @ dense[left : left + block].T
            expected = n * np.eye(*product.shape, dtype=np.float32) if top == left else np.zeros_like(product)
            if not np.array_equal(product, expected):
                return False
    return True


def rotation_matrix(signs: npt.ArrayLike, *hadamard: npt.NDArray[np.int8], repeats: int = 1) -> Array:
    """diag(signs) (I_repeats (x) H_1 (x) H_2 ...) / sqrt(order), dense."""
    product = np.eye(repeats)
    for matrix in hadamard:
        product = np.kron(product, matrix.astype(np.float64))
    return np.asarray(signs, dtype=np.float64)[:, None] * product / math.sqrt(len(product) // repeats)


def transform_bound(factors: Sequence[int], m: int) -> float:
    """Bound of |computed - exact|_2 / |x|_2 for one fast transform in float32.

    Each of the log2(sylvester) butterflies rounds once, at most U32 of the norm that it produces; a product with the
    m x m factor P errs by at most m U32 |x| |P| elementwise, and the 2-norm of |P| is m = sqrt(m) |P|_2; two more
    roundings for the signs and the final scale, one of them in the constant.
    """
    stages = sum(math.log2(f) for f in factors)
    return (stages + m * math.sqrt(m) + 4) * U32 * 1.01  # 1.01: products of (1 + U32)


# GPTQ


def quadratic_error(difference: Array, hessian: Array) -> Array:
    """d H d^T of every row."""
    return np.einsum("ri,ij,rj->r", difference, hessian, difference, optimize=True)


def quadratic_error_bound(difference: Array, hessian: Array) -> Array:
    """How far two evaluations of `quadratic_error` in float64 can lie apart."""
    magnitude = np.abs(difference)
    return 2 * (2 * len(hessian) + 4) * U64 * quadratic_error(magnitude, np.abs(hessian))


def sequential_quantization(
    row: Array, hessian: Array, scales: Array, grid: Grid, order: Sequence[int], damp_fraction: float
) -> Array:
    """Numbers of one row by the definition of OBQ in a fixed order.

    Round one coordinate; choose the others, still free, such that (t - w) H (t - w) is least given all coordinates
    rounded so far (a least squares problem solved from scratch); go on. Channels without signal are rounded alone.
    """
    diagonal = np.diag(hessian)
    live = [j for j in order if diagonal[j] > 1e-12 * diagonal.mean()]
    damped = hessian + damp_fraction * diagonal[live].mean() * np.eye(len(hessian))
    result = np.array([grid[nearest_code(w / s, grid)] * s for w, s in zip(row, scales, strict=True)])
    for position, j in enumerate(live):
        done, free = live[:position], live[position:]
        target = row[free]
        if done:
            pull = damped[np.ix_(free, done)] @ (result[done] - row[done])
            target = target - np.linalg.solve(damped[np.ix_(free, free)], pull)
        result[j] = grid[nearest_code(target[0] / scales[j], grid)] * scales[j]
    return result
