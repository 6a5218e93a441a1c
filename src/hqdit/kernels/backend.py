"""Which implementation multiplies: one seam, the exact integer product.

Everything around the product (rotation, rounding, scales) is the same code for every backend, so that two backends
that multiply exactly give the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from hqdit.errors import EnvironmentUnavailable, UsageError


class Backend(ABC):
    """An implementation of the integer product."""

    name: str

    @abstractmethod
    def unavailable_reason(self) -> str | None:
        """Why this backend cannot run here, or None if it can."""

    @abstractmethod
    def integer_product(self, activation: Tensor, weight: Tensor) -> Tensor:
        """A W^T, exactly.

        Args:
            activation: int8 (M, K), any strides.
            weight: int8 (N, K), any strides; K at least 2 and small enough for int32 sums.

        Returns:
            int32 (M, N).
        """


class ReferenceBackend(Backend):
    """The definition: a float64 product, exact because every sum stays far below 2^53."""

    name = "reference"

    def unavailable_reason(self) -> str | None:
        return None

    def integer_product(self, activation: Tensor, weight: Tensor) -> Tensor:
        return (activation.to(torch.float64) @ weight.to(torch.float64).T).to(torch.int32)


#: What cuBLAS asks of an int8 product: more than 16 rows, and K and N multiples of 8.
CUDA_MIN_ROWS, CUDA_MULTIPLE = 17, 8


class TorchBackend(Backend):
    """`torch._int_mm`: int8 with int32 sums, through oneDNN on CPUs and cuBLAS on CUDA devices."""

    name = "torch"

    def unavailable_reason(self) -> str | None:
        return None if hasattr(torch, "_int_mm") else f"torch {torch.__version__} has no torch._int_mm"

    def integer_product(self, activation: Tensor, weight: Tensor) -> Tensor:
        activation, weight = _row_major(activation), _row_major(weight)
        if activation.device.type == "cuda":
            return padded_int_mm(activation, weight, CUDA_MIN_ROWS, CUDA_MULTIPLE)
        return torch._int_mm(activation, weight.T)


def _row_major(matrix: Tensor) -> Tensor:
    """`matrix` itself if each row lies in one piece after the one before, else a copy that does.

    torch 2.13's `_int_mm` gives wrong numbers on CPUs for expanded operands and for the transpose of a single column,
    which `is_contiguous` calls contiguous.
    """
    is_regular = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return matrix if is_regular else matrix.clone(memory_format=torch.contiguous_format)


def padded_int_mm(activation: Tensor, weight: Tensor, min_rows: int, multiple: int) -> Tensor:
    """`torch._int_mm` on operands padded with zeros, which add nothing to an exact sum.

    Args:
        activation: int8 (M, K).
        weight: int8 (N, K).
        min_rows: smallest M that the device accepts.
        multiple: what K and N must be multiples of.

    Returns:
        int32 (M, N).
    """
    (rows, width), columns = activation.shape, weight.shape[0]
    pad_width, pad_columns = -width % multiple, -columns % multiple
    padded_activation = torch.nn.functional.pad(activation, (0, pad_width, 0, max(0, min_rows - rows)))
    padded_weight = torch.nn.functional.pad(weight, (0, pad_width, 0, pad_columns))
    return torch._int_mm(padded_activation, padded_weight.T)[:rows, :columns]


BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (TorchBackend(), ReferenceBackend())}
DEFAULT_BACKEND = "torch"
_selected: ContextVar[str] = ContextVar("hqdit_backend", default=DEFAULT_BACKEND)


def current_backend() -> Backend:
    """The backend that `HQLinear.forward` uses now."""
    return BACKENDS[_selected.get()]


def require_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        UsageError: no such backend.
        EnvironmentUnavailable: it cannot run here; there is no fallback to another one.
    """
    if name not in BACKENDS:
        raise UsageError(f"--backend: found {name!r}, needed one of {', '.join(BACKENDS)}. Fix: pick one of them")
    reason = BACKENDS[name].unavailable_reason()
    if reason:
        raise EnvironmentUnavailable(
            f"--backend: {name} cannot run here ({reason}). Fix: choose another one; hqdit doctor lists them"
        )
    return BACKENDS[name]


@contextmanager
def use_backend(name: str) -> Iterator[Backend]:
    """Run the body with the backend called `name`; errors as in `require_backend`."""
    backend = require_backend(name)
    token = _selected.set(name)
    try:
        yield backend
    finally:
        _selected.reset(token)
