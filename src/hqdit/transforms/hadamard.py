"""Hadamard matrices of order 2^k * m: H with entries +-1 and H H^T = n I, exactly, in integers.

The factor of order 2^k is Sylvester's; the factor of order m is Paley's first or second construction over a prime
field (so 36, 72, 144, 1152 and 4608 exist, while 52, 92 and 100 would need prime powers or searched matrices and
are refused). Widths are never padded.

Source: Sylvester 1867; Paley 1933, "On orthogonal matrices".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from hqdit.errors import NumericsError

#: Far beyond any layer's width; a bound, so that a mistyped block size is answered at once.
LARGEST_ORDER = 1 << 20

IntMatrix = npt.NDArray[np.int8]


@dataclass(frozen=True)
class HadamardFactors:
    """H = S_{sylvester} (x) P_{paley}: the factorization used for one order.

    Attributes:
        sylvester: the power of two, 2^k.
        paley: order of the other factor; 1 where the order is a power of two.
        construction: "none", "paley1" or "paley2".
    """

    sylvester: int
    paley: int
    construction: str

    @property
    def order(self) -> int:
        """The product of both factors."""
        return self.sylvester * self.paley

    def __str__(self) -> str:
        parts = [str(self.sylvester)] if self.sylvester > 1 or self.paley == 1 else []
        return "*".join(parts + ([f"{self.paley}({self.construction})"] if self.paley > 1 else []))


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def _paley_construction(order: int) -> str | None:
    """Which construction over a *prime* field gives this order, the first one preferred."""
    if order % 4 == 0 and _is_prime(order - 1):
        return "paley1"  # q = order - 1 = 3 mod 4
    if order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _is_prime(order // 2 - 1):
        return "paley2"  # q = order / 2 - 1 = 1 mod 4
    return None


@lru_cache(maxsize=1024)
def hadamard_factors(order: int) -> HadamardFactors | None:
    """The factorization with the largest power of two, which is the fastest to apply; None if there is none."""
    if not 1 <= order <= LARGEST_ORDER:
        return None
    sylvester = order & -order  # the largest power of two that divides it
    if sylvester == order:
        return HadamardFactors(order, 1, "none")
    while sylvester >= 1:
        rest = order // sylvester
        construction = _paley_construction(rest)
        if construction:
            return HadamardFactors(sylvester, rest, construction)
        sylvester //= 2
    return None


def usable_blocks(width: int) -> list[int]:
    """Divisors of `width`, from 4 up, that have a Hadamard matrix: the sizes that `block:B` accepts."""
    return [size for size in range(4, width + 1) if width % size == 0 and hadamard_factors(size)]


def require_factors(order: int, where: str, width: int | None = None) -> HadamardFactors:
    """`hadamard_factors(order)`, or an error that names `where` and the block sizes that would work.

    Raises:
        NumericsError: the order cannot be served.
    """
    factors = hadamard_factors(order)
    if factors is None:
        blocks = usable_blocks(width or order)
        fix = f"use --rotation block:B with B in {blocks}" if blocks else "leave this layer unrotated or out"
        raise NumericsError(
            f"{where}: found width {order}, which has no Hadamard matrix of the form 2^k * m with m from Paley I or "
            f"II over a prime, needed one that has. Fix: {fix}"
        )
    return factors


def _sylvester(order: int) -> IntMatrix:
    matrix = np.ones((1, 1), dtype=np.int8)
    while matrix.shape[0] < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def _jacobsthal(q: int) -> IntMatrix:
    """Q with Q[i, j] = chi(i - j), chi the quadratic character of the field of q elements."""
    character = np.full(q, -1, dtype=np.int8)
    character[[x * x % q for x in range(1, q)]] = 1
    character[0] = 0
    index = np.arange(q)
    matrix: IntMatrix = character[(index[:, None] - index[None, :]) % q]
    return matrix


@lru_cache(maxsize=16)
def paley_matrix(order: int, construction: str) -> IntMatrix:
    """The Paley factor alone, int8 (order, order); "none" gives [[1]].

    Paley I, q = 3 mod 4:  H = I + S with S = [[0, 1], [-1, Q]] skew.
    Paley II, q = 1 mod 4: C = [[0, 1], [1, Q]] symmetric, and H = C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]].
    """
    if construction == "none":
        return np.ones((1, 1), dtype=np.int8)
    q = order - 1 if construction == "paley1" else order // 2 - 1
    bordered = np.zeros((q + 1, q + 1), dtype=np.int8)
    bordered[0, 1:] = 1
    bordered[1:, 0] = -1 if construction == "paley1" else 1
    bordered[1:, 1:] = _jacobsthal(q)
    identity = np.eye(q + 1, dtype=np.int8)
    if construction == "paley1":
        matrix = identity + bordered
    else:
        plus = np.array([[1, 1], [1, -1]], dtype=np.int8)
        minus = np.array([[1, -1], [-1, -1]], dtype=np.int8)
        matrix = np.kron(bordered, plus) + np.kron(identity, minus)
    matrix.setflags(write=False)  # cached, so nobody may write into it
    return matrix


def hadamard_matrix(order: int) -> IntMatrix:
    """Dense +-1 matrix, int8 (order, order); `fwht` applies the same matrix without building it.

    Raises:
        NumericsError: the order cannot be served.
    """
    factors = require_factors(order, f"hadamard_matrix({order})")
    return np.kron(_sylvester(factors.sylvester), paley_matrix(factors.paley, factors.construction))
