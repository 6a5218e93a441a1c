"""The compiled kernels as ctypes sees them: finding the library, its structures, its instruction sets and threads.

This is the mirror of native/include/hqdit/kernels.h and native/src/c_api.cc; sizes are compared when it is loaded.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

import hqdit
from hqdit.errors import EnvironmentUnavailable, UsageError

LIBRARY_FILE = "_native.so"
ISA_VARIABLE = "HQDIT_CPU_ISA"

ELEMENT = {torch.float32: 0, torch.bfloat16: 1}
FUNCTION = {None: 0, "gelu-tanh": 1, "gelu-erf": 2}
FRONT_NONE, FRONT_LAYER_NORM_MODULATE = 0, 1
FRONT_POINTWISE = {"gelu-tanh": 2, "gelu-erf": 3, "silu": 4}
SCALE_RULE = {"absmax": 0, "rms": 1}
SCALE_STATIC = 2

_pointer, _int64, _int32, _float, _bool = (
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int32,
    ctypes.c_float,
    ctypes.c_bool,
)


class Weight(ctypes.Structure):
    """`hqdit::Weight`."""

    _fields_ = [
        ("packed", _pointer),
        ("row_bytes", _int64),
        ("rows", _int64),
        ("level_tables", _pointer),
        ("format_index", _pointer),
        ("scale", _pointer),
        ("scale_row_stride", _int64),
        ("scale_group_stride", _int64),
        ("bias", _pointer),
        ("out", _pointer),
        ("out_stride", _int64),
        ("gate", _pointer),
        ("gate_stride", _int64),
        ("tokens_per_gate", _int64),
        ("residual", _pointer),
        ("residual_stride", _int64),
    ]


class ProductArgs(ctypes.Structure):
    """`hqdit::ProductArgs`."""

    _fields_ = [
        ("levels", _pointer),
        ("levels_stride", _int64),
        ("levels_unsigned", _bool),
        ("token_scale", _pointer),
        ("token_scale_stride", _int64),
        ("token_scale_group_stride", _int64),
        ("tokens", _int64),
        ("width", _int64),
        ("group_size", _int64),
        ("weights", ctypes.POINTER(Weight)),
        ("weight_count", _int64),
        ("activation", _int32),
        ("out_type", _int32),
    ]


class RotateQuantizeArgs(ctypes.Structure):
    """`hqdit::RotateQuantizeArgs`."""

    _fields_ = [
        ("x", _pointer),
        ("x_stride", _int64),
        ("x_type", _int32),
        ("tokens", _int64),
        ("width", _int64),
        ("front", _int32),
        ("layer_norm_eps", _float),
        ("mod_scale", _pointer),
        ("mod_shift", _pointer),
        ("mod_stride", _int64),
        ("tokens_per_mod", _int64),
        ("input_shift", _pointer),
        ("input_scale", _pointer),
        ("sign_bits", _pointer),
        ("sylvester", _int64),
        ("paley", _int64),
        ("paley_matrix", _pointer),
        ("inner", _int64),
        ("normalization", _float),
        ("channel_scale", _pointer),
        ("rule", _int32),
        ("round_scales", _bool),
        ("rms_factor", _float),
        ("static_scale", _pointer),
        ("group_size", _int64),
        ("rungs", _int64),
        ("thresholds", _pointer),
        ("rung_levels", _pointer),
        ("levels_unsigned", _bool),
        ("top", _float),
        ("levels", _pointer),
        ("levels_stride", _int64),
        ("scale", _pointer),
    ]


class AttentionTensor(ctypes.Structure):
    """`hqdit::AttentionTensor`."""

    _fields_ = [("data", _pointer), ("batch_stride", _int64), ("token_stride", _int64), ("head_stride", _int64)]


class AttentionArgs(ctypes.Structure):
    """`hqdit::AttentionArgs`."""

    _fields_ = [
        *((name, AttentionTensor) for name in ("q", "k", "v", "out")),
        ("type", _int32),
        *((name, _int64) for name in ("batch", "heads", "query_tokens", "key_tokens", "head_dim")),
        ("softmax_scale", _float),
    ]


def library_path() -> Path | None:
    """Where the compiled kernels lie, or None if this installation was made without a compiler."""
    for folder in hqdit.__path__:
        candidate = Path(folder) / LIBRARY_FILE
        if candidate.is_file():
            return candidate
    return None


@lru_cache(maxsize=1)
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    path = library_path()
    if path is None:
        return "it was not compiled: pip found no GCC 12 or newer, or no C++ compiler at all"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} cannot be loaded: {error}"
    sizes = (_int64 * 4)()
    library.hqdit_struct_sizes(sizes)
    mirrors = [ctypes.sizeof(kind) for kind in (Weight, ProductArgs, RotateQuantizeArgs, AttentionArgs)]
    if list(sizes) != mirrors:
        return f"{path.name} was compiled from other sources: install hqdit again"
    library.hqdit_isa_name.restype = ctypes.c_char_p
    for name in ("select_isa", "environment_isa_is_usable", "has_gomp_parallel"):
        getattr(library, f"hqdit_{name}").restype = _bool
    library.hqdit_set_gomp_parallel.argtypes = [_pointer]
    for name, args in (("product", ProductArgs), ("rotate_quantize", RotateQuantizeArgs), ("attention", AttentionArgs)):
        function = getattr(library, f"hqdit_{name}")
        function.argtypes, function.restype = [ctypes.POINTER(args), ctypes.c_int], _bool
    if not library.hqdit_environment_isa_is_usable():
        return (
            f"{ISA_VARIABLE}: found {os.environ[ISA_VARIABLE]!r}, needed one of "
            f"{', '.join(_isa_names(library))} on this machine"
        )
    library.hqdit_set_gomp_parallel(_gomp_parallel_of_torch())
    return library


def _gomp_parallel_of_torch() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch has loaded, so that both share one pool of threads.

    A second runtime's threads would spin against torch's. None where torch runs on another kind of runtime.
    """
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        return None
    loaded = {line.split(maxsplit=5)[5] for line in maps.read_text().splitlines() if line.count("/")}
    runtimes = sorted(path for path in loaded if Path(path).name.startswith(("libgomp", "libiomp5", "libomp")))
    # Other packages bring runtimes of their own (scikit-learn does); torch's lies beside it.
    site = str(Path(torch.__file__).parents[1])
    beside_torch = [path for path in runtimes if path.startswith(os.path.join(site, "torch"))]
    for path in beside_torch or runtimes:
        try:
            runtime = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
            return ctypes.cast(runtime.GOMP_parallel, _pointer).value
        except (OSError, AttributeError):
            continue
    return None


def unavailable_reason() -> str | None:
    """Why the compiled kernels cannot run here, or None if they can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        EnvironmentUnavailable: it is not there, or cannot run here.
    """
    loaded = _load()
    if isinstance(loaded, str):
        raise EnvironmentUnavailable(
            f"native kernels: {loaded}. Fix: install a compiler and reinstall, or use the torch backend"
        )
    return loaded


def _isa_names(loaded: ctypes.CDLL) -> list[str]:
    return [loaded.hqdit_isa_name(isa).decode() for isa in range(loaded.hqdit_best_isa() + 1)]


def instruction_sets() -> list[str]:
    """The instruction sets that can run here, the fastest last; errors as in `library`."""
    return _isa_names(library())


def current_instruction_set() -> str:
    """The instruction set in use; errors as in `library`."""
    loaded = library()
    name: bytes = loaded.hqdit_isa_name(loaded.hqdit_current_isa())
    return name.decode()


@contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Run the body on another instruction set, for the whole process.

    Raises:
        UsageError: this machine does not have it.
        EnvironmentUnavailable: as in `library`.
    """
    names, before = instruction_sets(), library().hqdit_current_isa()
    if name not in names:
        raise UsageError(f"instruction set: found {name!r}, needed one of {', '.join(names)}. Fix: pick one of them")
    library().hqdit_select_isa(names.index(name))
    try:
        yield
    finally:
        library().hqdit_select_isa(before)


def shares_threads_with_torch() -> bool:
    """Whether the kernels run on torch's own threads; otherwise each call starts and ends its own."""
    return bool(library().hqdit_has_gomp_parallel())


def call(function: str, args: ctypes.Structure) -> None:
    """Run one kernel with as many threads as torch uses.

    Raises:
        MemoryError: working memory could not be had.
    """
    if not getattr(library(), function)(ctypes.byref(args), torch.get_num_threads()):
        raise MemoryError(f"{function}: no working memory for its threads")
