"""What the tests of the Triton kernels share: where they run, and random products with their exact results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import strategies as st
from native_cases import F32, bits, column_slice, gelu
from oracles import GRIDS, U32

from hqdit.kernels.triton import library, product_operation
from hqdit.kernels.triton.tiles import ProductTile

_REASON = library.unavailable_reason()
#: For `pytestmark`. NumPy warns in the interpreter where a GPU is silent.
needs_triton = [
    pytest.mark.skipif(_REASON is not None, reason=f"Triton kernels: {_REASON}"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
#: Compiled kernels on a GPU, interpreted ones elsewhere.
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

#: 4-bit formats of weights, and activations whose levels fit in int8.
WEIGHT_FORMATS = [name for name, grid in GRIDS.items() if len(grid) <= 16 and min(grid.values()) < 0]
ACTIVATION_FORMATS = [name for name, grid in GRIDS.items() if max(grid.values()) <= 127]

SMALL_TILE = ProductTile(tokens=16, channels=16, depth=32, rows_together=2, warps=4, stages=2)
WIDE_TILE = ProductTile(tokens=32, channels=64, depth=64, rows_together=1, warps=4, stages=3)

_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


def table_name(levels: Sequence[int]) -> str:
    """What names the format of these 16 levels."""
    return "table:" + ",".join(map(str, levels))


def grid_of(name: str) -> dict[int, int]:
    """Level of each code of any format."""
    if name in GRIDS:
        return GRIDS[name]
    return dict(enumerate(int(level) for level in name.removeprefix("table:").split(",")))


@dataclass(frozen=True)
class Case:
    """One product; the numbers in it follow from `seed`.

    Attributes:
        group_size, groups: their product is the width.
        token_scales, weight_scales: whether each side has scales of its own for (rows, groups).
        formats: of the weight; with several, each channel has an index.
        samples: rows of the gate; 0 for no gate.
        padding: elements before and after each row of strided arguments.
    """

    tokens: int = 5
    channels: int = 19
    group_size: int = 48
    groups: int = 1
    token_scales: tuple[bool, bool] = (True, False)
    weight_scales: tuple[bool, bool] = (True, False)
    formats: tuple[str, ...] = ("e2m1",)
    activation: str = "int8"
    has_bias: bool = False
    function: str | None = None
    samples: int = 0
    has_residual: bool = False
    dtype: torch.dtype = torch.float32
    padding: tuple[int, int] = (0, 0)
    seed: int = 0


class Product:
    """The arguments of a case, and what must come out."""

    def __init__(self, case: Case) -> None:
        self.case = case
        rng = np.random.default_rng(case.seed)
        width = case.group_size * case.groups
        self.levels = rng.choice(sorted(set(grid_of(case.activation).values())), (case.tokens, width)).astype(np.int8)
        self.token_scale = self._scales(rng, case.tokens, case.token_scales)
        self.weight_scale = self._scales(rng, case.channels, case.weight_scales)
        self.packed = rng.integers(0, 256, (case.channels, width // 2), dtype=np.uint8)
        count = len(case.formats)
        self.index = rng.integers(0, count, case.channels, dtype=np.uint8) if count > 1 else None
        self.bias = rng.standard_normal(case.channels, dtype=np.float32) if case.has_bias else None
        self.gate = rng.standard_normal((case.samples, case.channels), dtype=np.float32) if case.samples else None
        residual = rng.standard_normal((case.tokens, case.channels)).astype(_NUMPY[case.dtype])
        self.residual = residual if case.has_residual else None
        self.noise = rng

    def _scales(self, rng: np.random.Generator, rows: int, own: tuple[bool, bool]) -> F32:
        shape = (rows if own[0] else 1, self.case.groups if own[1] else 1)
        # Negative ones too: the sign of zero is part of the definition.
        return (rng.standard_normal(shape) * 10.0 ** rng.uniform(-2, 2, shape)).astype(np.float32)

    def arguments(self) -> list[Any]:
        """Of `product_operation.product`, on the device."""

        def there(part: npt.NDArray[Any] | None, is_strided: bool = False) -> torch.Tensor | None:
            if part is None:
                return None
            is_bfloat16 = part.dtype == ml_dtypes.bfloat16
            plain = part.view(np.int16) if is_bfloat16 else part
            tensor = column_slice(self.noise, plain, *(self.case.padding if is_strided else (0, 0)))
            if DEVICE.type == "cuda" and is_strided:  # a copy to the device would lie in one piece
                base = tensor if tensor._base is None else tensor._base
                tensor = base.to(DEVICE).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            tensor = tensor.to(DEVICE)
            return tensor.view(torch.bfloat16) if is_bfloat16 else tensor

        return [
            there(self.levels, True),
            there(self.token_scale),
            there(self.packed, True),
            list(self.case.formats),
            there(self.index),
            there(self.weight_scale),
            there(self.bias),
            self.case.function,
            there(self.gate, True),
            there(self.residual, True),
            self.case.dtype,
        ]

    def run(self) -> torch.Tensor:
        """The kernel's output, on the CPU."""
        output: torch.Tensor = product_operation.product(*self.arguments())
        return output.cpu()

    def before_function(self) -> F32:
        """Sums, scales and bias: exact sums in int64, then float32 in the documented order."""
        case = self.case
        codes = np.stack([self.packed & 15, self.packed >> 4], axis=2).reshape(
            case.channels, case.group_size * case.groups
        )
        tables = np.array([[grid_of(name)[code] for code in range(16)] for name in case.formats])
        weight = tables[0][codes] if self.index is None else tables[self.index[:, None], codes]
        y = np.zeros((case.tokens, case.channels), dtype=np.float32)
        for group in range(case.groups):
            part = slice(group * case.group_size, (group + 1) * case.group_size)
            sums = self.levels[:, part].astype(np.int64) @ weight[:, part].astype(np.int64).T
            assert np.abs(sums).max(initial=0) < 2**31
            token, channel = (s[:, min(group, s.shape[1] - 1)] for s in (self.token_scale, self.weight_scale))
            term = sums.astype(np.float32) * token[:, None] * channel[None, :]
            y = term if group == 0 else y + term
        return y if self.bias is None else y + self.bias

    def after_function(self, y: F32) -> torch.Tensor:
        """Gate, residual and rounding of float32 numbers."""
        if self.gate is not None:
            y = y * np.repeat(self.gate, self.case.tokens // self.case.samples, axis=0)
        if self.residual is not None:
            y = y + self.residual.astype(np.float32)
        with np.errstate(over="ignore"):
            rounded = y.astype(_NUMPY[self.case.dtype])
        if self.case.dtype == torch.bfloat16:
            return torch.from_numpy(rounded.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(rounded)


def check(case: Case) -> None:
    """No bit of a product differs; behind a function, no number by more than the function's error."""
    product = Product(case)
    found, y = product.run(), product.before_function()
    if case.function is None:
        expected = product.after_function(y)
        assert found.dtype == expected.dtype
        wrong = int((as_bits(found) != as_bits(expected)).sum())
        assert wrong == 0, f"{wrong} of {found.numel()} numbers have other bits"
        return
    assert case.function.startswith("gelu")
    assert not case.samples
    assert not case.has_residual
    exact, _ = gelu(y.astype(np.float64), case.function)
    # 1 + erf and the exponent of exp are a few float32 roundings; near zero and far left the result is relative to y.
    error = 8 * U32 * np.abs(y) + 1e-36
    unit = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[case.dtype]
    # 2^-24: the smallest subnormal of float16.
    allowed = error + unit * (np.abs(exact) + error) + (2.0**-24 if case.dtype == torch.float16 else 0.0)
    numbers = found.double().numpy()
    is_beyond = (np.abs(exact) > 65504) & np.isinf(numbers) & (case.dtype == torch.float16)
    assert bool(((np.abs(numbers - exact) <= allowed) | is_beyond).all())


def as_bits(x: torch.Tensor) -> npt.NDArray[Any]:
    """Bit patterns, every NaN as one NaN."""
    return x.where(~x.isnan(), torch.nan).view(torch.int16).numpy() if x.dtype == torch.float16 else bits(x)


#: Any table whose largest level is positive.
TABLES = st.sets(st.integers(-128, 127), min_size=16, max_size=16).map(sorted).filter(lambda table: table[-1] > 0)


@st.composite
def cases(draw: st.DrawFn, largest: int) -> Case:
    """Any product of up to `largest` tokens, channels and input channels, without a function."""
    tokens, channels = draw(st.integers(0, largest)), draw(st.integers(0, largest))
    size, groups = 2 * draw(st.integers(1, largest // 2)), 1
    token_groups = weight_groups = False
    weight_formats = st.one_of(st.sampled_from(WEIGHT_FORMATS), TABLES.map(table_name))
    if draw(st.booleans()):
        size = 4 * draw(st.integers(1, largest // 4))
        groups = draw(st.integers(1, min(6, largest // size)))
        token_groups, weight_groups = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    return Case(
        tokens=tokens,
        channels=channels,
        group_size=size,
        groups=groups,
        token_scales=(draw(st.booleans()), token_groups),
        weight_scales=(draw(st.booleans()), weight_groups),
        formats=tuple(draw(st.lists(weight_formats, min_size=1, max_size=3))),
        activation=draw(st.sampled_from(ACTIVATION_FORMATS)),
        has_bias=draw(st.booleans()),
        samples=draw(st.sampled_from([0, *(n for n in range(1, 5) if tokens % n == 0)])),
        has_residual=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        padding=draw(st.sampled_from([(0, 0), (0, 1), (3, 2), (16, 7)])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
