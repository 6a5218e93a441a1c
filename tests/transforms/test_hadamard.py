"""Hadamard matrices, exactly; and the fast transform as the same matrix."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import has_paley_order, is_hadamard, transform_bound

from hqdit.errors import NumericsError
from hqdit.transforms.fwht import hadamard_transform
from hqdit.transforms.hadamard import (
    hadamard_factors,
    hadamard_matrix,
    paley_matrix,
    require_factors,
    usable_blocks,
)

SMALL = [order for order in range(1, 257) if has_paley_order(order)]
#: What diffusion transformers need: heads of 72, and DiT's 1152 and 4608 among others.
LARGE = [288, 320, 384, 576, 768, 1152]
REFUSED = [3, 5, 6, 7, 9, 10, 18, 30, 52, 92, 100, 116, 118, 143]


# Matrices


@pytest.mark.parametrize("order", SMALL + LARGE)
def test_rows_are_orthogonal_exactly(order: int) -> None:
    matrix = hadamard_matrix(order)
    assert matrix.dtype == np.int8
    assert is_hadamard(matrix)


def test_the_check_itself_in_python_integers() -> None:
    matrix = hadamard_matrix(36).tolist()
    gram = [[sum(a * b for a, b in zip(row, other, strict=True)) for other in matrix] for row in matrix]
    assert gram == [[36 * (i == j) for j in range(36)] for i in range(36)]
    broken = hadamard_matrix(36)
    broken[7, 9] *= -1
    assert not is_hadamard(broken)
    assert not is_hadamard(2 * hadamard_matrix(36))


def test_order_4608() -> None:
    assert is_hadamard(hadamard_matrix(4608))


@pytest.mark.soak
@pytest.mark.parametrize("order", [order for order in range(257, 16385) if order % 256 == 0 and has_paley_order(order)])
def test_rows_of_large_orders_are_orthogonal(order: int) -> None:
    if order <= 6144:
        assert is_hadamard(hadamard_matrix(order))
    else:  # 200 rows of H, by the fast transform of unit vectors, against each other
        units = torch.zeros(200, order)
        units[torch.arange(200), torch.from_numpy(np.random.default_rng(order).choice(order, 200, replace=False))] = 1.0
        matrix = hadamard_transform(units, require_factors(order, "test"))
        assert bool((matrix.abs() == 1).all())
        assert torch.equal(matrix @ matrix.T, order * torch.eye(200))


@pytest.mark.soak
def test_which_orders_exist_up_to_16384() -> None:
    wrong = [order for order in range(1, 16385) if (hadamard_factors(order) is not None) != has_paley_order(order)]
    assert wrong == []


@pytest.mark.parametrize("order", [2**k for k in range(11)])
def test_powers_of_two_are_sylvesters(order: int) -> None:
    assert np.array_equal(hadamard_matrix(order), scipy.linalg.hadamard(order))


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 44, 60, 72, 84, 140])
def test_paley_one(order: int) -> None:
    matrix = paley_matrix(order, "paley1")
    assert is_hadamard(matrix)
    assert np.array_equal(matrix + matrix.T, 2 * np.eye(order))  # I + S with S skew


@pytest.mark.parametrize("order", [12, 28, 36, 60, 76, 84, 108, 124])
def test_paley_two(order: int) -> None:
    matrix = paley_matrix(order, "paley2")
    assert is_hadamard(matrix)
    assert np.array_equal(matrix, matrix.T)


def test_paley_over_the_critical_primes() -> None:
    # Heads of 72: Paley I over q = 71. Widths 36 * 2^k: Paley II over q = 17.
    residues = {x * x % 71 for x in range(1, 71)}
    core = paley_matrix(72, "paley1")[1:, 1:]
    assert [int(core[0, j]) for j in range(1, 71)] == [1 if (0 - j) % 71 in residues else -1 for j in range(1, 71)]
    assert is_hadamard(paley_matrix(72, "paley1"))
    assert is_hadamard(paley_matrix(36, "paley2"))


def test_cached_matrices_cannot_be_written_to() -> None:
    with pytest.raises(ValueError, match="read-only"):
        paley_matrix(36, "paley2")[0, 0] = 5
    hadamard_matrix(36)[0, 0] = 5  # a copy
    assert is_hadamard(hadamard_matrix(36))


# Factorizations


def test_served_orders_are_exactly_the_constructible_ones() -> None:
    for order in range(1, 1300):
        factors = hadamard_factors(order)
        assert (factors is not None) == has_paley_order(order), order
        if factors is not None:
            assert factors.order == factors.sylvester * factors.paley == order
            assert factors.sylvester in [2**k for k in range(11)]


@pytest.mark.parametrize(
    ("order", "text"),
    [
        (1, "1"),
        (2, "2"),
        (64, "64"),
        (12, "12(paley1)"),
        (36, "36(paley2)"),
        (72, "2*36(paley2)"),
        (144, "4*36(paley2)"),
        (576, "16*36(paley2)"),
        (1152, "32*36(paley2)"),
        (4608, "128*36(paley2)"),
        (384, "32*12(paley1)"),
    ],
)
def test_factorization_is_spelled_out(order: int, text: str) -> None:
    assert str(hadamard_factors(order)) == text


@pytest.mark.parametrize("order", REFUSED)
def test_other_orders_are_refused(order: int) -> None:
    assert hadamard_factors(order) is None
    with pytest.raises(NumericsError, match=rf"found width {order}, which has no Hadamard matrix"):
        hadamard_matrix(order)


@pytest.mark.parametrize("order", [0, -4])
def test_no_matrix_without_rows(order: int) -> None:
    assert hadamard_factors(order) is None


@pytest.mark.parametrize(
    ("order", "blocks"), [(52, [4]), (100, [4, 20]), (92, [4]), (184, [4, 8]), (1160, [4, 8, 20, 40])]
)
def test_refusal_names_the_layer_and_the_blocks_that_work(order: int, blocks: list[int]) -> None:
    assert usable_blocks(order) == blocks
    with pytest.raises(NumericsError) as error:
        require_factors(order, "layer blocks.3.fc1")
    assert str(error.value).startswith(f"layer blocks.3.fc1: found width {order},")
    assert str(error.value).endswith(f"use --rotation block:B with B in {blocks}")


def test_refusal_without_any_block() -> None:
    assert usable_blocks(7) == []
    with pytest.raises(NumericsError, match="leave this layer unrotated or out"):
        require_factors(7, "layer x")


@pytest.mark.parametrize("width", [72, 144, 576, 1152])
def test_usable_blocks_divide_and_exist(width: int) -> None:
    assert usable_blocks(width) == [size for size in range(4, width + 1) if width % size == 0 and has_paley_order(size)]


# The fast transform


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", SMALL + LARGE)
def test_transform_is_the_dense_product_bit_for_bit_on_integers(order: int, dtype: torch.dtype) -> None:
    x = np.random.default_rng(order).integers(-100, 101, (3, order))
    exact = x @ hadamard_matrix(order).astype(np.int64)
    assert np.abs(exact).max() < 2**24
    result = hadamard_transform(torch.from_numpy(x).to(dtype), require_factors(order, "test"))
    assert result.dtype == dtype
    assert np.array_equal(result.numpy(), exact)


def test_transform_of_4608_on_integers() -> None:
    x = np.random.default_rng(0).integers(-100, 101, (2, 4608))
    exact = x.astype(np.float64) @ hadamard_matrix(4608).astype(np.float64)  # below 2^53: exact
    result = hadamard_transform(torch.from_numpy(x).to(torch.float32), require_factors(4608, "test"))
    assert np.array_equal(result.numpy(), exact)


def test_transform_of_bfloat16_integers() -> None:
    x = torch.randint(-1, 2, (5, 36), generator=torch.Generator().manual_seed(0))
    result = hadamard_transform(x.to(torch.bfloat16), require_factors(36, "test"))
    assert result.dtype == torch.bfloat16
    assert result.tolist() == (x.numpy() @ hadamard_matrix(36).astype(np.int64)).tolist()


@pytest.mark.parametrize("order", [8, 36, 144])
def test_transform_of_any_shape_and_stride(order: int) -> None:
    factors = require_factors(order, "test")
    base = torch.randint(-9, 10, (3, 2 * order, 5), generator=torch.Generator().manual_seed(order)).float()
    x = base.transpose(1, 2)[..., ::2]
    dense = torch.from_numpy(hadamard_matrix(order)).float()
    result = hadamard_transform(x, factors)
    assert result.shape == x.shape
    assert torch.equal(result, x @ dense)
    assert torch.equal(hadamard_transform(x[0, 0], factors), (x @ dense)[0, 0])
    assert hadamard_transform(x[:0], factors).shape == (0, 5, order)
    assert hadamard_transform(x[:, :0], factors).shape == (3, 0, order)


@given(st.sampled_from([4, 12, 20, 36, 64, 144, 288, 576]), st.integers(0, 2**32 - 1), st.floats(-30, 30))
def test_transform_in_float32_is_within_its_bound(order: int, seed: int, exponent: float) -> None:
    factors = require_factors(order, "test")
    x = (np.random.default_rng(seed).standard_normal((4, order)) * 10.0**exponent).astype(np.float32)
    exact = x.astype(np.float64) @ hadamard_matrix(order)
    error = hadamard_transform(torch.from_numpy(x), factors).double().numpy() - exact
    allowed = transform_bound([factors.sylvester], factors.paley) * np.linalg.norm(exact, axis=1)
    assert bool((np.linalg.norm(error, axis=1) <= allowed).all())
