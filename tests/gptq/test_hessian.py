"""The streamed Hessian."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import U64

from hqdit.gptq.hessian import HessianAccumulator


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_pieces_are_one_shot_and_numpy(pieces: list[int], width: int, seed: int) -> None:
    x = np.random.default_rng(seed).standard_normal((sum(pieces), width)).astype(np.float32)
    streamed, whole = HessianAccumulator(width), HessianAccumulator(width)
    whole.add(torch.from_numpy(x))
    start = 0
    for piece in pieces:
        streamed.add(torch.from_numpy(x[start : start + piece]))
        start += piece
    count = max(len(x), 1)
    exact = 2 * x.astype(np.float64).T @ x.astype(np.float64) / count
    # Sums of `count` products in float64, in whatever order.
    allowed = 2 * (count + 3) * U64 * (2 * np.abs(x).astype(np.float64).T @ np.abs(x).astype(np.float64) / count)
    assert streamed.samples == whole.samples == len(x)
    for accumulator in (streamed, whole):
        assert accumulator.hessian.dtype == torch.float64
        assert bool((np.abs(accumulator.hessian.numpy() - exact) <= allowed).all())


def test_integers_are_exact_in_any_order() -> None:
    x = torch.randint(-12, 13, (101, 8), generator=torch.Generator().manual_seed(0))
    expected = [
        [2 * sum(a * b for a, b in zip(x[:, i].tolist(), x[:, j].tolist(), strict=True)) for j in range(8)]
        for i in range(8)
    ]
    for order in (slice(None), slice(None, None, 2)):
        accumulator = HessianAccumulator(8)
        accumulator.add(x[order].float())
        if order != slice(None):
            accumulator.add(x[1::2].float())
        assert torch.equal(accumulator.total * 2, torch.tensor(expected, dtype=torch.float64))
        assert torch.equal(accumulator.hessian, accumulator.total * (2 / 101))


def test_low_precision_inputs_are_summed_in_float64() -> None:
    # 4,096 squares of 1 + 2^-7 would lose their last bits in float32.
    x = torch.full((4096, 1), 1 + 2.0**-7, dtype=torch.bfloat16)
    accumulator = HessianAccumulator(1)
    for part in x.split(100):
        accumulator.add(part)
    assert accumulator.hessian.item() == 2 * (1 + 2.0**-7) ** 2


def test_nothing_added() -> None:
    accumulator = HessianAccumulator(3)
    assert accumulator.samples == 0
    assert torch.equal(accumulator.hessian, torch.zeros(3, 3, dtype=torch.float64))


def test_nan_is_kept_for_the_solver_to_refuse() -> None:
    accumulator = HessianAccumulator(2)
    accumulator.add(torch.tensor([[1.0, float("nan")]]))
    assert bool(accumulator.hessian.isnan().any())


def test_no_graph_is_kept() -> None:
    accumulator = HessianAccumulator(2)
    accumulator.add(torch.ones(3, 2, requires_grad=True))
    assert not accumulator.hessian.requires_grad
