"""What the tests of the native kernels share: where they run, and random products with their exact results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import strategies as st
from oracles import U32
from scipy.special import expit, ndtr

from hqdit.kernels import native_library, native_ops

_REASON = native_library.unavailable_reason()
#: For `pytestmark`: a machine without a compiler has no kernels to test.
needs_native = pytest.mark.skipif(_REASON is not None, reason=f"native kernels: {_REASON}")
#: Every instruction set that runs here.
INSTRUCTION_SETS = native_library.instruction_sets() if _REASON is None else []
each_instruction_set = pytest.mark.parametrize("isa", INSTRUCTION_SETS)

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


@contextmanager
def use_threads(count: int) -> Iterator[None]:
    """Run the body with `count` threads of torch, which the kernels take over."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(x: torch.Tensor | F32) -> npt.NDArray[Any]:
    """Bit patterns of float32 or bfloat16 numbers, so that 0 and -0 differ; every NaN is one NaN."""
    tensor = (torch.from_numpy(x) if isinstance(x, np.ndarray) else x).detach().contiguous()
    tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    return tensor.view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32).numpy()


# Memory: tensors whose rows lie apart, at an odd place of something wider


def column_slice(rng: np.random.Generator, matrix: npt.NDArray[Any], before: int, after: int) -> torch.Tensor:
    """`matrix` as columns of a wider tensor, whose other elements are noise."""
    if not before + after:
        return torch.from_numpy(matrix)
    rows, columns = matrix.shape
    wide = rng.integers(0, 256, (rows, (before + columns + after) * matrix.itemsize), dtype=np.uint8)
    view = torch.from_numpy(wide.view(matrix.dtype))[:, before : before + columns]
    view.copy_(torch.from_numpy(matrix))
    return view


# Products


@dataclass(frozen=True)
class ProductCase:
    """One call of the product, drawn by hypothesis; the numbers in it follow from `seed`.

    Attributes:
        rows: output channels of each weight.
        group_size, groups: their product is the width.
        token_scales, weight_scales: whether each side has scales of its own for (rows, groups).
        tables: formats of each weight; 0: one table for all rows, without an index.
        edge: "random" numbers, or the "largest" magnitudes on both sides.
        samples: rows of the gate; 0: no gate and no residual.
        padding: elements before and after each row of strided arguments.
        bad_token: whether the first token's scale is NaN.
    """

    tokens: int
    rows: tuple[int, ...]
    group_size: int
    groups: int
    is_unsigned: bool
    token_scales: tuple[bool, bool]
    weight_scales: tuple[bool, bool]
    tables: int
    edge: str
    has_bias: bool
    function: str | None
    samples: int
    dtype: torch.dtype
    padding: tuple[int, int]
    bad_token: bool
    threads: int
    seed: int

    @property
    def width(self) -> int:
        return self.group_size * self.groups


LARGEST_SIDE = 600
_GROUP_SIZES = st.one_of(st.sampled_from([16, 32, 36, 48, 64, 72, 128]), st.integers(1, 75).map(lambda n: 4 * n))
# Large sides one time in three: most of the code is about what is left over beside full tiles.
_TOKENS = st.one_of(st.integers(1, 65), st.integers(1, 65), st.integers(0, LARGEST_SIDE))
_ROWS = st.one_of(st.integers(1, 70), st.integers(1, 70), st.integers(0, LARGEST_SIDE))


@st.composite
def product_cases(draw: st.DrawFn) -> ProductCase:
    """Any product of up to 600 tokens, output channels and input channels."""
    tokens = draw(_TOKENS)
    size, groups = 2 * draw(st.integers(1, LARGEST_SIDE // 2)), 1
    token_groups, weight_groups = False, False
    if draw(st.booleans()):
        size = draw(_GROUP_SIZES)
        groups = draw(st.integers(1, LARGEST_SIDE // size))
        token_groups, weight_groups = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    samples = draw(st.sampled_from([0, *(n for n in range(1, 66) if tokens % n == 0)]))
    rows = (draw(_ROWS),) if samples or draw(st.booleans()) else tuple(draw(st.lists(_ROWS, min_size=2, max_size=3)))
    padding = draw(st.sampled_from([(0, 0), (0, 1), (1, 0), (3, 2), (16, 7)]))
    return ProductCase(
        tokens=tokens,
        rows=rows,
        group_size=size,
        groups=groups,
        is_unsigned=draw(st.booleans()),
        token_scales=(draw(st.booleans()), token_groups),
        weight_scales=(draw(st.booleans()), weight_groups),
        tables=draw(st.sampled_from([0, 1, 2, 5])),
        edge=draw(st.sampled_from(["random", "random", "random", "largest"])),
        has_bias=draw(st.booleans()),
        function=draw(st.sampled_from([None, None, None, None, "gelu-tanh", "gelu-erf"])),
        samples=samples,
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        padding=padding,
        bad_token=draw(st.integers(0, 9)) == 0,
        threads=draw(st.sampled_from([1, 1, 1, 1, 1, 2])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


class Product:
    """The arguments of a case, and what must come out."""

    def __init__(self, case: ProductCase) -> None:
        self.case = case
        rng = np.random.default_rng(case.seed)
        levels = rng.integers(0, 256, (case.tokens, case.width), dtype=np.uint8)
        if case.edge == "largest":
            levels[:] = 255 if case.is_unsigned else 128  # int8: -128
        levels = levels if case.is_unsigned else levels.view(np.int8)
        self.levels = levels
        self.token_scale = self._scales(rng, case.tokens, case.token_scales)
        if case.bad_token and self.token_scale.size:
            self.token_scale[0, -1] = np.nan
        self.tables, self.index, self.packed, self.scale, self.bias = [], [], [], [], []
        for rows in case.rows:
            self._add_weight(rng, rows)
        out = case.rows[0]
        self.gate = rng.standard_normal((case.samples, out), dtype=np.float32)
        # Rounded so that it is the same number in both dtypes.
        residual = rng.standard_normal((case.tokens, out)).astype(ml_dtypes.bfloat16).astype(np.float32)
        self.residual = residual if case.samples else None
        self.arguments = self._arguments(rng)

    def _scales(self, rng: np.random.Generator, rows: int, own: tuple[bool, bool]) -> F32:
        shape = (rows if own[0] else 1, self.case.groups if own[1] else 1)
        return (rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 3, shape)).astype(np.float32)

    def _add_weight(self, rng: np.random.Generator, rows: int) -> None:
        case = self.case
        tables = rng.integers(-128, 128, (max(1, case.tables), 16), dtype=np.int8)
        if case.edge == "largest":
            tables = rng.choice(np.array([-128, -127, 127], dtype=np.int8), tables.shape)
        self.tables.append(tables)
        self.index.append(rng.integers(0, case.tables, rows, dtype=np.uint8) if case.tables else None)
        self.packed.append(rng.integers(0, 256, (rows, case.width // 2), dtype=np.uint8))
        self.scale.append(self._scales(rng, rows, case.weight_scales))
        self.bias.append(rng.standard_normal(rows, dtype=np.float32) if case.has_bias else None)

    def _arguments(self, rng: np.random.Generator) -> list[Any]:
        def dense(parts: list[Any]) -> list[torch.Tensor | None]:
            return [None if part is None else torch.from_numpy(part) for part in parts]

        case, padding = self.case, self.case.padding
        gate = residual = None
        if self.residual is not None:
            gate = column_slice(rng, self.gate, *padding)
            wide = column_slice(rng, self.residual, 0, 0).to(case.dtype)
            residual = torch.nn.functional.pad(wide, padding)[:, padding[0] : padding[0] + case.rows[0]]
        return [
            column_slice(rng, self.levels, *padding),
            torch.from_numpy(self.token_scale),
            [column_slice(rng, packed, *padding) for packed in self.packed],
            dense(self.tables),
            dense(self.index),
            dense(self.scale),
            dense(self.bias),
            case.function,
            gate,
            residual,
            case.dtype,
        ]

    def run(self, isa: str, threads: int) -> list[torch.Tensor]:
        """The kernel's outputs."""
        with native_library.use_instruction_set(isa), use_threads(threads):
            outputs: list[torch.Tensor] = native_ops.product(*self.arguments)
        return outputs

    def before_function(self, weight: int) -> F32:
        """Sums, scales and bias of one weight: exact sums in float64, then float32 in the documented order."""
        case = self.case
        tables, index, packed = self.tables[weight], self.index[weight], self.packed[weight]
        codes = np.stack([packed & 15, packed >> 4], axis=2).reshape(len(packed), case.width)
        w = (tables[0][codes] if index is None else tables[index[:, None], codes]).astype(np.float64)
        y = np.zeros((case.tokens, len(w)), dtype=np.float32)
        # torch's product, because NumPy's would start threads of its own.
        left, right = torch.from_numpy(self.levels.astype(np.float64)), torch.from_numpy(w).T
        for group in range(case.groups):
            part = slice(group * case.group_size, (group + 1) * case.group_size)
            sums = (left[:, part] @ right[part]).numpy().astype(np.float32)
            token, channel = (s[:, min(group, s.shape[1] - 1)] for s in (self.token_scale, self.scale[weight]))
            term = (sums * token[:, None]) * channel[None, :]
            y = term if group == 0 else y + term
        return y if self.bias[weight] is None else y + self.bias[weight]

    def expected(self, weight: int) -> torch.Tensor:
        """The output of one weight, bit for bit, where no function is asked for."""
        y = self.before_function(weight)
        if self.residual is not None:
            y = y * self._gate_of_tokens() + self.residual
        if self.case.dtype == torch.float32:
            return torch.from_numpy(y)
        return torch.from_numpy(y.astype(ml_dtypes.bfloat16).view(np.int16)).view(torch.bfloat16)

    def expected_range(self, weight: int) -> tuple[F64, F64]:
        """Middle and half width of the range that an output with a function must lie in; NaN where it must be NaN."""
        y = self.before_function(weight).astype(np.float64)
        exact, error = gelu(y, self.case.function or "")
        if self.residual is not None:
            gate = self._gate_of_tokens().astype(np.float64)
            exact, error = exact * gate, error * np.abs(gate)
            error = error + U32 * (np.abs(exact) + error)
            exact = exact + self.residual
            error = error + U32 * (np.abs(exact) + error)
        if self.case.dtype == torch.bfloat16:
            error = error + 2.0**-8 * (np.abs(exact) + error)
        return exact, error

    def _gate_of_tokens(self) -> F32:
        return np.repeat(self.gate, self.case.tokens // self.case.samples, axis=0)


def gelu(y: F64, function: str) -> tuple[F64, F64]:
    """GELU in float64 of one of its two kinds, and how far a float32 kernel may be off.

    The exact kind: 2^-21 of the result, and 1e-36 where the result is below that, on its way to 0.
    The tanh kind, y / (1 + e^E) with E = -2 sqrt(2 / pi) (y + 0.044715 y^3): E is a float32 number after 5 roundings
    (two constants, y^2, a fused product and sum, a product), so e^E is off by 5 U32 |E| of itself, which moves the
    result by at most as much; exp, the sum and the quotient add 2^-22.
    """
    if function == "gelu-erf":
        exact = y * ndtr(y)
        return exact, 2.0**-21 * np.abs(exact) + 1e-36
    exponent = -2 * np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)
    exact = y * expit(-exponent)
    moved = expit(exponent) * 5 * U32 * np.minimum(np.abs(exponent), 1000.0)
    return exact, (moved + 2.0**-22) * np.abs(exact) + 1e-36


def check_product(case: ProductCase, isas: list[str] | None = None) -> int:
    """Compare a case on every instruction set with its exact result; the number of calls compared."""
    product, names = Product(case), INSTRUCTION_SETS if isas is None else isas
    first: list[npt.NDArray[Any]] | None = None
    for isa in names:
        outputs = product.run(isa, case.threads)
        found = [bits(output) for output in outputs]
        assert [tuple(output.shape) for output in outputs] == [(case.tokens, rows) for rows in case.rows]
        if first is None:
            first = found
            _check_numbers(product, outputs, isa)
        for weight, (one, other) in enumerate(zip(first, found, strict=True)):
            assert np.array_equal(one, other), f"weight {weight}: {isa} differs from {names[0]}"
    return len(names)


def _check_numbers(product: Product, outputs: list[torch.Tensor], isa: str) -> None:
    for weight, output in enumerate(outputs):
        if product.case.function is None:
            wrong = int((bits(output) != bits(product.expected(weight))).sum())
            assert wrong == 0, f"{isa}, weight {weight}: {wrong} of {output.numel()} numbers have other bits"
            continue
        exact, error = product.expected_range(weight)
        found = output.double().numpy()
        assert np.array_equal(np.isnan(found), np.isnan(exact)), f"{isa}, weight {weight}: other NaNs"
        is_right = (np.abs(found - exact) <= error) | np.isnan(exact)
        assert bool(is_right.all()), f"{isa}, weight {weight}: {int((~is_right).sum())} numbers are beyond the bound"
