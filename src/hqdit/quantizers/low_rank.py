"""The best matrix of low rank: what a 16-bit branch carries so that 4 bits need not.

Source: SVDQuant (arXiv 2411.05007), section 4: W = U D + R, where U D holds the largest singular values and R, which
is quantized, has the small ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqdit.errors import UsageError

#: The dtype in which a branch is stored.
BRANCH_DTYPE = torch.bfloat16


def low_rank_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Two factors whose product is nearest to `weight` in the Frobenius norm.

    The squared distance is the sum of the squared singular values beyond the first `rank` (Eckart and Young, 1936).
    Singular values are shared equally between both factors, so that neither needs a range of its own.

    Args:
        weight: floating point (out_features, in_features).
        rank: from 1 to the smaller side.

    Returns:
        down, float64 (rank, in_features), and up, float64 (out_features, rank): weight is about up @ down.

    Raises:
        UsageError: a rank that the matrix cannot have.
    """
    if not 1 <= rank <= min(weight.shape):
        raise UsageError(
            f"low_rank: found rank {rank} for a weight of shape {tuple(weight.shape)}, needed 1 to "
            f"{min(weight.shape)}. Fix: choose a smaller rank"
        )
    left, singular, right = torch.linalg.svd(weight.to(torch.float64), full_matrices=False)
    root = singular[:rank].sqrt()
    return root.unsqueeze(1) * right[:rank], left[:, :rank] * root
