"""Backends: the exact integer product, and how one is chosen."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hqdit.errors import EnvironmentUnavailable, UsageError
from hqdit.kernels.backend import (
    CUDA_MIN_ROWS,
    CUDA_MULTIPLE,
    ComposedBackend,
    ReferenceBackend,
    TorchBackend,
    padded_int_mm,
)
from hqdit.kernels.selection import BACKENDS, current_backend, default_backend, require_backend, use_backend

COMPOSED = (TorchBackend(), ReferenceBackend())
each_backend = pytest.mark.parametrize("backend", COMPOSED, ids=lambda backend: backend.name)
SIZES = st.integers(0, 70)
WIDTHS = st.integers(2, 140)  # torch 2.13's _int_mm is wrong for K = 1 on CPUs; a 4-bit layer has at least 2 channels


def int8(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(-128, 128, shape, dtype=np.int8))


def exact(activation: torch.Tensor, weight: torch.Tensor) -> npt.NDArray[np.int64]:
    return np.asarray(activation.numpy().astype(np.int64) @ weight.numpy().astype(np.int64).T)


def strided(rng: np.random.Generator, rows: int, columns: int, layout: int) -> torch.Tensor:
    """int8 (rows, columns) in one of several memory layouts."""
    if layout == 0:
        return int8(rng, rows, columns)
    if layout == 1:
        return int8(rng, columns, rows).T
    if layout == 2:
        return int8(rng, rows, 3 * columns + 1)[:, columns + 1 : 2 * columns + 1]  # a group of a wider matrix
    if layout == 3:
        return int8(rng, 2 * rows, 2 * columns)[::2, ::2]
    return int8(rng, 1, columns).expand(rows, columns)


@each_backend
def test_product_by_hand_in_python_integers(backend: ComposedBackend) -> None:
    a, w = [[1, -2, 3], [-128, 127, 0]], [[4, 5, 6], [-128, 127, 1], [0, 0, -1]]
    expected = [[sum(x * y for x, y in zip(row, column, strict=True)) for column in w] for row in a]
    result = backend.integer_product(torch.tensor(a, dtype=torch.int8), torch.tensor(w, dtype=torch.int8))
    assert result.dtype == torch.int32
    assert result.tolist() == expected


def check_product(m: int, n: int, k: int, seed: int, layouts: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    activation, weight = strided(rng, m, k, layouts[0]), strided(rng, n, k, layouts[1])
    expected = exact(activation, weight)
    for backend in COMPOSED:
        result = backend.integer_product(activation, weight)
        assert result.shape == (m, n)
        assert result.dtype == torch.int32
        assert np.array_equal(result.numpy(), expected), backend.name


LAYOUTS = st.tuples(st.integers(0, 4), st.integers(0, 4))


@given(SIZES, st.integers(1, 70), WIDTHS, st.integers(0, 2**32 - 1), LAYOUTS)
@settings(max_examples=300)
def test_product_is_exact_for_any_shape_and_stride(m: int, n: int, k: int, seed: int, layouts: tuple[int, int]) -> None:
    check_product(m, n, k, seed, layouts)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@given(st.integers(0, 513), st.integers(1, 513), st.integers(2, 513), st.integers(0, 2**32 - 1), LAYOUTS)
@settings(max_examples=20_000)
def test_product_is_exact_20_000_times(m: int, n: int, k: int, seed: int, layouts: tuple[int, int]) -> None:
    check_product(m, n, k, seed, layouts)


@each_backend
@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 5), (17, 2)])
@pytest.mark.parametrize("value", [(-128, -128), (-128, 127), (127, 127)])
def test_extremes_at_the_bound_of_int32(backend: ComposedBackend, m: int, n: int, value: tuple[int, int]) -> None:
    # 128 * 128 * K <= 2^31 - 1 is what a layer's specification checks.
    k = (2**31 - 1) // (128 * 128)
    assert 128 * 128 * k <= 2**31 - 1 < 128 * 128 * (k + 1)
    activation = torch.full((m, k), value[0], dtype=torch.int8)
    weight = torch.full((n, k), value[1], dtype=torch.int8)
    assert backend.integer_product(activation, weight).tolist() == [[value[0] * value[1] * k] * n] * m


@each_backend
@pytest.mark.parametrize("m", [0, 1])
def test_no_rows_and_one_row(backend: ComposedBackend, m: int) -> None:
    rng = np.random.default_rng(m)
    activation, weight = int8(rng, m, 36), int8(rng, 7, 36)
    result = backend.integer_product(activation, weight)
    assert result.shape == (m, 7)
    assert np.array_equal(result.numpy(), exact(activation, weight))


@given(SIZES, st.integers(1, 40), WIDTHS, st.integers(0, 2**32 - 1), st.integers(0, 40), st.integers(1, 32))
def test_padding_adds_nothing(m: int, n: int, k: int, seed: int, min_rows: int, multiple: int) -> None:
    rng = np.random.default_rng(seed)
    activation, weight = int8(rng, m, k), int8(rng, n, k)
    result = padded_int_mm(activation, weight, min_rows, multiple)
    assert result.shape == (m, n)
    assert np.array_equal(result.numpy(), exact(activation, weight))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 3, 4), (1, 1, 2), (16, 8, 8), (17, 8, 8), (5, 9, 15), (18, 16, 24)])
def test_padding_meets_the_rule_of_cuda(monkeypatch: pytest.MonkeyPatch, m: int, n: int, k: int) -> None:
    shapes = []
    plain = torch._int_mm

    def recorded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        shapes.append((tuple(a.shape), tuple(b.shape)))
        return plain(a, b)

    monkeypatch.setattr(torch, "_int_mm", recorded)
    rng = np.random.default_rng(0)
    activation, weight = int8(rng, m, k), int8(rng, n, k)
    result = padded_int_mm(activation, weight, CUDA_MIN_ROWS, CUDA_MULTIPLE)
    assert np.array_equal(result.numpy(), exact(activation, weight))
    (((rows, width), (width_too, columns)),) = shapes
    assert rows > 16
    assert width == width_too
    assert width % 8 == 0
    assert columns % 8 == 0


@pytest.mark.gpu
@given(SIZES, st.integers(1, 70), WIDTHS, st.integers(0, 2**32 - 1), LAYOUTS)
def test_product_on_cuda(m: int, n: int, k: int, seed: int, layouts: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    activation, weight = strided(rng, m, k, layouts[0]), strided(rng, n, k, layouts[1])
    for backend in COMPOSED:
        result = backend.integer_product(activation.cuda(), weight.cuda())
        assert np.array_equal(result.cpu().numpy(), exact(activation, weight))


# Choosing


def test_default_is_native_where_it_was_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(BACKENDS) == ["native", "triton", "torch", "reference"]
    for name in ("torch", "reference"):
        assert require_backend(name).unavailable_reason() is None
    for reason, expected in ((None, "native"), ("not compiled", "torch")):
        monkeypatch.setattr(BACKENDS["native"], "unavailable_reason", lambda reason=reason: reason)
        assert default_backend() == current_backend().name == expected


def test_use_backend_nests_and_ends_on_errors() -> None:
    with use_backend("reference") as outer:
        assert current_backend() is outer is BACKENDS["reference"]
        with use_backend("torch"):
            assert current_backend().name == "torch"
        assert current_backend().name == "reference"
    with pytest.raises(RuntimeError, match="body"), use_backend("reference"):
        raise RuntimeError("body")
    assert current_backend().name == default_backend()


def test_choice_is_not_shared_between_threads() -> None:
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(current_backend().name))
        thread.start()
        thread.join()
    assert seen == [default_backend()]


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(UsageError, match="'cuda', needed one of native, triton, torch, reference"):
        require_backend("cuda")
    with pytest.raises(UsageError), use_backend(""):
        pytest.fail("entered")
    assert current_backend().name == default_backend()


def test_backend_that_cannot_run_is_refused_without_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch, "_int_mm")
    reason = TorchBackend().unavailable_reason()
    assert reason is not None
    assert "no torch._int_mm" in reason
    with pytest.raises(EnvironmentUnavailable, match="torch cannot run here"):
        require_backend("torch")
    assert require_backend("reference").name == "reference"
