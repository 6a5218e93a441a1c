"""Which backend runs: the native kernels where they are built, else torch, unless the caller says."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

from hqdit.errors import EnvironmentUnavailable, UsageError
from hqdit.kernels.backend import Backend, ReferenceBackend, TorchBackend
from hqdit.kernels.native import NativeBackend
from hqdit.kernels.native_library import ISA_VARIABLE
from hqdit.kernels.triton.backend import TritonBackend

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (NativeBackend(), TritonBackend(), TorchBackend(), ReferenceBackend())
}
_selected: ContextVar[str | None] = ContextVar("hqdit_backend", default=None)


def default_backend() -> str:
    """Name of the native backend if it can run here, else of torch's; `hqdit doctor` says which and why.

    Raises:
        EnvironmentUnavailable: HQDIT_CPU_ISA asks for native kernels that cannot run here.
    """
    reason = BACKENDS["native"].unavailable_reason()
    if reason and os.environ.get(ISA_VARIABLE):
        require_backend("native")
    return "torch" if reason else "native"


@torch.compiler.assume_constant_result
def _current_name() -> str:
    return _selected.get() or default_backend()


def current_backend() -> Backend:
    """The backend that `HQLinear.forward` uses now. A compiled graph keeps the one that it was compiled with."""
    return BACKENDS[_current_name()]


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
