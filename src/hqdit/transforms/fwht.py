"""Fast Walsh-Hadamard transform: multiply rows by a Hadamard matrix without building it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hqdit.transforms.hadamard import HadamardFactors, paley_matrix


# torch.compile cannot follow how numpy builds the matrix.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _paley_tensor(order: int, construction: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _cached_paley_tensor(order, construction, dtype, device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the cache outlives the mode of the call that fills it
def _cached_paley_tensor(order: int, construction: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.from_numpy(paley_matrix(order, construction).copy()).to(device=device, dtype=dtype)


def hadamard_transform(x: Tensor, factors: HadamardFactors) -> Tensor:
    """X H for the +-1 matrix H = S (x) P of `factors`, without normalisation.

    Needs k = log2(sylvester) passes of additions and one product with the small Paley factor, O(n (k + m)).

    Args:
        x: floating point (..., n), n = `factors.order`.

    Returns:
        Shape and dtype of `x`.

    Exact: in integers as long as the dtype holds n * max|x|; otherwise up to rounding.
    """
    shape, n = x.shape, factors.order
    y = x.reshape(-1, factors.sylvester, factors.paley)
    if factors.paley > 1:
        y = y @ _paley_tensor(factors.paley, factors.construction, x.dtype, x.device)
    rows = y.shape[0]
    half = 1
    # Butterflies over rows of P-sized vectors that lie `half` apart; S is symmetric, so its side is moot. Two passes
    # at once where two are left: the same sums in the same order, with half the copies.
    while 4 * half <= factors.sylvester:
        a, b, c, d = y.reshape(rows, factors.sylvester // (4 * half), 4, half * factors.paley).unbind(2)
        sum_ab, difference_ab, sum_cd, difference_cd = a + b, a - b, c + d, c - d
        y = torch.stack(
            (sum_ab + sum_cd, difference_ab + difference_cd, sum_ab - sum_cd, difference_ab - difference_cd), dim=2
        )
        half *= 4
    if half < factors.sylvester:
        low, high = y.reshape(rows, 1, 2, half * factors.paley).unbind(2)
        y = torch.stack((low + high, low - high), dim=2)
    return y.reshape(*shape[:-1], n)
