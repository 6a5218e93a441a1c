"""Native attention against float64, within a bound that holds for every element."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import F64, INSTRUCTION_SETS, bits, each_instruction_set, needs_native, use_threads
from oracles import U32

from hqdit.kernels import native_library, native_ops
from hqdit.kernels.selection import BACKENDS

pytestmark = needs_native

#: A product of two 24-bit integers from which the lowest digits are left out, relative to the largest operands; AMX
#: works with such integers, the other instruction sets with float32.
DIGITS = 1.125 * 2.0**-22

LAYOUTS = ("dense", "fused", "heads outside", "padded", "one head for all")


def tensors(
    rng: np.random.Generator,
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype = torch.float32,
    layout: str = "dense",
    deviation: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v as (batch, tokens, heads, head size); scores of the given standard deviation.

    Args:
        shape: (batch, heads, queries, keys, head size).
        layout: how they lie in memory; what lies between their rows is NaN.
    """
    batch, heads, queries, keys, dim = shape
    if layout == "fused":
        keys = queries
    parts = []
    for tokens, spread in ((queries, deviation**0.5), (keys, deviation**0.5), (keys, 1.0)):
        x = rng.standard_normal((batch, tokens, heads, dim)) * spread
        parts.append(torch.from_numpy(x).to(dtype))
    if layout == "fused":  # three parts of one projection
        return torch.stack(parts, dim=2).unbind(dim=2)  # type: ignore[return-value]
    if layout == "heads outside":
        parts = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in parts]
    if layout == "padded":
        parts = [torch.nn.functional.pad(part, (3, 2), value=math.nan)[..., 3 : 3 + dim] for part in parts]
    if layout == "one head for all":
        parts = [part[:, :, :1].expand_as(part) for part in parts]
    return parts[0], parts[1], parts[2]


def attended(isa: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, threads: int = 1) -> torch.Tensor:
    with native_library.use_instruction_set(isa), use_threads(threads):
        result: torch.Tensor = native_ops.attention(q, k, v)
    return result


def head(q: F64, k: F64, v: F64, dtype: torch.dtype) -> tuple[F64, F64]:
    """Exact outputs of one head, and how far each may be off.

    s_j is the exact score of key j, m the largest, p_j = exp(s_j - m), l = sum p_j, w_j = p_j / l, o = sum w_j v_j.
    1. A score is a sum of d float32 products, or of d products of integers (d rounded up to 16); scaling it and taking
       m away round a few times more.
    2. p_j is off by p_j times the errors of s_j and m and of exp, and by 2 U32 where it is rounded to an integer.
    3. o is a ratio: it moves by w_j |v_j - o| for each relative change of p_j.
    4. The sum of n products w_j v_j is float32, or integers relative to the largest |v|.
    """
    (keys, dim), scale = k.shape, q.shape[1] ** -0.5
    products = q @ k.T
    magnitude = np.abs(q) @ np.abs(k).T
    digits = -(-dim // 16) * 16 * DIGITS * np.abs(q).max(axis=1)[:, None] * np.abs(k).max(axis=1)[None, :]
    error = scale * ((dim + 8) * U32 * magnitude + digits + 4 * U32 * np.abs(products))
    scores = products * scale
    largest = scores.max(axis=1, keepdims=True)
    powers = np.exp(scores - largest)
    total = powers.sum(axis=1, keepdims=True)
    weights = powers / total
    change = np.expm1(error + error.max(axis=1, keepdims=True) + 4 * U32 * (1 + np.abs(largest)))
    moved = weights * change + 2 * U32 / total  # (queries, keys)
    exact = weights @ v
    allowed = (keys + 8) * U32 * (weights @ np.abs(v)) + DIGITS * np.abs(v).max(axis=0) * (1 + keys / total / 2)
    for query in range(len(q)):
        allowed[query] += moved[query] @ np.abs(v - exact[query])
    if dtype == torch.bfloat16:
        allowed = allowed + 2.0**-8 * (np.abs(exact) + allowed)
    return exact, allowed


def check(isa: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, threads: int = 1) -> None:
    found = attended(isa, q, k, v, threads)
    assert found.shape == q.shape
    assert found.dtype == q.dtype
    assert found.is_contiguous()
    numbers = [part.double().numpy() for part in (q, k, v)]
    for batch in range(q.shape[0]):
        for at in range(q.shape[2]):
            exact, allowed = head(*(part[batch, :, at] for part in numbers), q.dtype)
            off = np.abs(found[batch, :, at].double().numpy() - exact)
            assert bool((off <= allowed).all()), f"{isa}: off by {(off / allowed).max():.2f} of the bound"


@given(
    st.tuples(
        st.integers(0, 3),
        st.integers(1, 3),
        st.one_of(st.integers(0, 20), st.integers(0, 140)),
        st.one_of(st.integers(1, 20), st.integers(1, 300)),
        st.one_of(st.integers(1, 80), st.integers(1, 256)),
    ),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from(LAYOUTS),
    st.sampled_from([0.1, 1.0, 5.0]),
    st.sampled_from([1, 1, 1, 2]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=60)
def test_any_shape_and_stride(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    layout: str,
    deviation: float,
    threads: int,
    seed: int,
) -> None:
    if layout == "fused":
        shape = (*shape[:2], max(1, shape[2]), *shape[3:])
    q, k, v = tensors(np.random.default_rng(seed), shape, dtype, layout, deviation)
    for isa in INSTRUCTION_SETS:
        check(isa, q, k, v, threads)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_instruction_set
def test_a_head_of_dit_xl(isa: str, dtype: torch.dtype, layout: str) -> None:
    check(isa, *tensors(np.random.default_rng(0), (1, 1, 256, 256, 72), dtype, layout))


@each_instruction_set
def test_float32_accuracy_on_normal_inputs(isa: str) -> None:
    # The bound is the worst case; errors of random signs are far smaller: 3e-6 of the norm of a row.
    for shape in ((1, 2, 256, 256, 72), (1, 1, 64, 1024, 64), (1, 1, 64, 256, 256)):
        q, k, v = tensors(np.random.default_rng(1), shape)
        found = attended(isa, q, k, v).double()
        scores = torch.einsum("bthd,bshd->bhts", q.double(), k.double()) * shape[4] ** -0.5
        exact = torch.einsum("bhts,bshd->bthd", scores.softmax(dim=-1), v.double())
        assert float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max()) <= 3e-6


@pytest.mark.parametrize("threads", [2, 3, 8])
@each_instruction_set
def test_any_number_of_threads_gives_the_same_bits(isa: str, threads: int) -> None:
    for shape in ((1, 1, 1, 1, 1), (2, 3, 33, 40, 20), (1, 1, 130, 300, 72)):
        parts = tensors(np.random.default_rng(2), shape)
        assert np.array_equal(bits(attended(isa, *parts, threads=threads)), bits(attended(isa, *parts)))


@each_instruction_set
def test_batches_do_not_see_each_other(isa: str) -> None:
    q, k, v = tensors(np.random.default_rng(3), (4, 2, 37, 51, 36))
    together = attended(isa, q, k, v)
    for batch in range(4):
        one = slice(batch, batch + 1)
        assert torch.equal(attended(isa, q[one], k[one], v[one]), together[one])


@each_instruction_set
def test_far_apart_scores_pick_one_key(isa: str) -> None:
    # exp of the differences is 0 or 1; nothing overflows on the way.
    for size in (30.0, 1e4, 1e15):
        q, k, v = (torch.zeros(1, tokens, 1, 8) for tokens in (3, 301, 301))
        v.normal_(generator=torch.Generator().manual_seed(0))
        q[..., 0], k[..., 0] = size, -size
        k[0, 300, 0, 0] = size
        found = attended(isa, q, k, v)
        # A weight of 1 times v: one product of integers or floats.
        assert bool(((found - v[:, 300:]).abs() <= 2 * DIGITS * v.abs().max()).all()), size


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@each_instruction_set
def test_bad_number_makes_nan_of_the_rows_that_read_it(isa: str, dtype: torch.dtype, bad: float) -> None:
    for which in range(3):
        parts = tensors(np.random.default_rng(4), (2, 2, 70, 300, 20), dtype)
        parts[which][1, 66 if which == 0 else 280, 0, 19] = bad
        found = attended(isa, *parts)
        is_bad = torch.zeros(2, 70, 2, dtype=torch.bool)
        is_bad[1, 66 if which == 0 else slice(None), 0] = True
        assert torch.equal(found.isnan().all(dim=-1), is_bad)
        assert torch.equal(found.isfinite().all(dim=-1), ~is_bad)


def test_head_that_is_too_large_runs_as_in_torch() -> None:
    q, k, v = tensors(np.random.default_rng(5), (1, 2, 5, 7, native_ops.LARGEST_HEAD + 1))
    results = [BACKENDS[name].attention(q, k, v) for name in ("native", "torch")]
    assert torch.equal(results[0], results[1])
    with pytest.raises(ValueError, match="head size 257"):
        native_ops.attention(q, k, v)
