"""Low-rank factors: nearest of their rank, and balanced."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import require_complete

from hqdit.errors import UsageError
from hqdit.quantizers.low_rank import low_rank_factors


def matrix(rows: int, columns: int, decay: float = 1.0) -> torch.Tensor:
    rng = np.random.default_rng(rows + columns)
    return torch.from_numpy(rng.standard_normal((rows, columns)) * np.arange(1, columns + 1) ** -decay)


@pytest.mark.parametrize("shape", [(12, 12), (20, 8), (8, 20), (3, 2)])
def test_error_is_the_tail_of_the_singular_values(shape: tuple[int, int]) -> None:
    weight = matrix(*shape)
    singular = np.sqrt(np.linalg.eigvalsh((weight @ weight.T).numpy())[::-1].clip(0))[: min(shape)]
    for rank in range(1, min(shape) + 1):
        down, up = low_rank_factors(weight, rank)
        assert (down.shape, up.shape) == ((rank, shape[1]), (shape[0], rank))
        error = (weight - up @ down).square().sum().item()
        # Squares of small singular values come from an eigenvalue problem, exact to epsilon times the largest one.
        slack = 1e-13 * min(shape) * singular[0] ** 2
        assert error == pytest.approx(float((singular[rank:] ** 2).sum()), rel=1e-9, abs=slack)


def test_no_other_matrix_of_that_rank_is_nearer() -> None:
    weight = matrix(10, 14)
    down, up = low_rank_factors(weight, 3)
    best = (weight - up @ down).norm()
    random = torch.Generator().manual_seed(0)
    for step in (1e-3, 1e-1):
        for _ in range(50):
            moved_down = down + step * torch.randn(down.shape, generator=random, dtype=torch.float64)
            moved_up = up + step * torch.randn(up.shape, generator=random, dtype=torch.float64)
            assert (weight - moved_up @ moved_down).norm() >= best


def test_factors_share_the_range() -> None:
    down, up = low_rank_factors(matrix(16, 24), 5)
    # Equal norms pair by pair: the square root of a singular value each.
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0), rtol=1e-12, atol=0)
    assert bool((down.norm(dim=1).diff() <= 0).all())


def test_a_matrix_of_low_rank_is_reproduced() -> None:
    weight = matrix(9, 2) @ matrix(2, 11)
    down, up = low_rank_factors(weight.float(), 2)
    assert down.dtype == up.dtype == torch.float64
    torch.testing.assert_close(up @ down, weight, rtol=0, atol=1e-6 * float(weight.abs().max()))


@pytest.mark.parametrize("rank", [-1, 0, 5, 100])
def test_ranks_that_cannot_be(rank: int) -> None:
    with pytest.raises(UsageError) as info:
        low_rank_factors(torch.ones(4, 6), rank)
    require_complete(info.value, str(rank), "(4, 6)")
