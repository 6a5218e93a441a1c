"""The whole low-bit product: both backends, every pair of formats and granularities, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GRIDS, ONE_SIDED_TABLE, SIGNED_TABLE, U32
from tiny import RUNNABLE

from hqdit.formats.catalog import FP4_FORMATS, format_from_json
from hqdit.formats.number_format import NumberFormat, TableFormat
from hqdit.kernels.activation import QuantizedActivation, quantize_activation
from hqdit.kernels.backend import Backend
from hqdit.kernels.linear import PackedWeight, packed_level_tables, unpack_levels
from hqdit.kernels.selection import BACKENDS
from hqdit.numerics.codes import pack_codes
from hqdit.quantizers.quantized_tensor import QuantizedTensor, round_to_nearest, weight_scales
from hqdit.quantizers.spec import ActivationSpec, WeightSpec

TOKENS, OUT, WIDTH = 5, 7, 144  # odd, odd, and divisible by every group size below
WEIGHT_NAMES = [name for name in GRIDS if min(GRIDS[name].values()) < 0]
INT8_NAMES = [name for name in GRIDS if format_from_json(name).is_int8]
GROUP_SIZES = (4, 16, 36, 48, 72)
GRANULARITIES: list[tuple[str, int | None, str, int | None]] = [
    *((a, None, w, None) for a in ("token", "tensor", "channel", "channel-token") for w in ("tensor", "channel")),
    *((a, None, "group", 36) for a in ("token", "tensor", "channel", "channel-token")),
    *(
        ("group", size, w, size if w == "group" else None)
        for size in GROUP_SIZES
        for w in ("tensor", "channel", "group")
    ),
]

F32 = npt.NDArray[np.float32]


def operands(
    weight_formats: tuple[NumberFormat, ...],
    activation_format: NumberFormat,
    granularity: tuple[str, int | None, str, int | None] = ("token", None, "channel", None),
    tokens: int = TOKENS,
    out: int = OUT,
    width: int = WIDTH,
    seed: int = 0,
) -> tuple[torch.Tensor, ActivationSpec, QuantizedActivation, QuantizedTensor, PackedWeight, torch.Tensor]:
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal((tokens, width)) * 10.0 ** rng.uniform(-2, 2, (tokens, 1))).float()
    w = torch.from_numpy(rng.standard_normal((out, width)) * 10.0 ** rng.uniform(-2, 2, (out, 1))).float()
    bias = torch.from_numpy(rng.standard_normal(out)).float()
    activation_spec = ActivationSpec(activation_format, *granularity[:2])
    weight_spec = WeightSpec(weight_formats, *granularity[2:])
    index = (
        torch.from_numpy(rng.integers(0, len(weight_formats), out)).to(torch.uint8) if len(weight_formats) > 1 else None
    )
    quantized = round_to_nearest(w, weight_scales(w, weight_spec, index, "absmax"), weight_spec, index)
    packed = PackedWeight(
        pack_codes(quantized.codes, weight_formats[0]),
        quantized.scale,
        index,
        weight_formats,
        packed_level_tables(weight_formats),
    )
    static = torch.tensor([0.8]) if granularity[0] == "tensor" else None
    return x, activation_spec, quantize_activation(x, activation_spec, static), quantized, packed, bias


def defined_product(activation: QuantizedActivation, weight: QuantizedTensor) -> F32:
    """The definition in NumPy: int64 sums per group, then float32 in the documented order; no bias."""
    tables = [np.array([GRIDS[fmt.name].get(code, 10**9) for code in range(256)]) for fmt in weight.spec.formats]
    codes = weight.codes.numpy()
    index = np.zeros(len(codes), dtype=int) if weight.format_index is None else weight.format_index.numpy()
    w = np.stack([tables[i][row] for i, row in zip(index, codes, strict=True)])
    a = activation.levels.numpy().astype(np.int64)
    token_scale, weight_scale = activation.scale.numpy(), weight.scale.numpy()
    groups = max(token_scale.shape[1], weight_scale.shape[1])
    size = a.shape[1] // groups
    result = np.zeros((len(a), len(w)), dtype=np.float32)
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        sums = (a[:, part] @ w[:, part].T).astype(np.float32)
        scale_a = token_scale[:, min(group, token_scale.shape[1] - 1)][:, None]
        scale_w = weight_scale[:, min(group, weight_scale.shape[1] - 1)][None, :]
        term = (sums * scale_a) * scale_w
        result = term if group == 0 else result + term
    return result


def bits(x: F32) -> npt.NDArray[np.int32]:
    """Bit patterns; 0 and -0 differ."""
    assert x.dtype == np.float32
    return np.ascontiguousarray(x).view(np.int32)


def linear(
    activation: QuantizedActivation, packed: PackedWeight, bias: torch.Tensor | None, backend: Backend
) -> torch.Tensor:
    (output,) = backend.linear(activation, [packed._replace(bias=bias)])
    return output


def check(
    parts: tuple[torch.Tensor, ActivationSpec, QuantizedActivation, QuantizedTensor, PackedWeight, torch.Tensor],
) -> None:
    _, _, activation, weight, packed, bias = parts
    expected = defined_product(activation, weight)
    for backend in RUNNABLE.values():
        plain = linear(activation, packed, None, backend)
        assert np.array_equal(bits(plain.numpy()), bits(expected)), backend.name
        biased = linear(activation, packed, bias, backend)
        assert np.array_equal(bits(biased.numpy()), bits(expected + bias.numpy())), backend.name


@pytest.mark.parametrize("activation", INT8_NAMES)
@pytest.mark.parametrize("weight", [name for name in INT8_NAMES if name in WEIGHT_NAMES])
def test_every_pair_of_formats_in_every_granularity(weight: str, activation: str) -> None:
    for seed, granularity in enumerate(GRANULARITIES):
        check(operands((format_from_json(weight),), format_from_json(activation), granularity, seed=seed))


@pytest.mark.parametrize("granularity", [g for g in GRANULARITIES if g[2] != "tensor"], ids=str)
@pytest.mark.parametrize("activation", ["e2m1", "int8", TableFormat(ONE_SIDED_TABLE).name])
def test_formats_per_output_channel(granularity: tuple[str, int | None, str, int | None], activation: str) -> None:
    formats = (*FP4_FORMATS, TableFormat(SIGNED_TABLE))
    check(operands(formats, format_from_json(activation), granularity, out=13, seed=1))


@given(
    st.integers(0, 20),
    st.integers(1, 20),
    st.integers(1, 40),
    st.sampled_from([name for name in INT8_NAMES if name in WEIGHT_NAMES]),
    st.sampled_from(INT8_NAMES),
    st.sampled_from(["token", "group", "tensor", "channel", "channel-token"]),
    st.sampled_from(["tensor", "channel", "group"]),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=200)
def test_any_shape(
    tokens: int,
    out: int,
    quads: int,
    weight: str,
    activation: str,
    granularity: str,
    weight_granularity: str,
    seed: int,
) -> None:
    size = max(s for s in (4, 8, 12, 16, 36) if (4 * quads) % s == 0)
    sizes = (size if granularity == "group" else None), (size if weight_granularity == "group" else None)
    check(
        operands(
            (format_from_json(weight),),
            format_from_json(activation),
            (granularity, sizes[0], weight_granularity, sizes[1]),
            tokens,
            out,
            4 * quads,
            seed,
        )
    )


@pytest.mark.parametrize("width", [2, 6, 10, 146])
def test_widths_that_are_no_multiple_of_four(width: int) -> None:
    check(operands((format_from_json("e2m1"),), format_from_json("e2m1"), width=width))


@pytest.mark.parametrize("tokens", [0, 1, 2, 33])
@pytest.mark.parametrize("granularity", GRANULARITIES[::4], ids=str)
def test_any_number_of_tokens(tokens: int, granularity: tuple[str, int | None, str, int | None]) -> None:
    parts = operands((format_from_json("e2m1"),), format_from_json("e2m1"), granularity, tokens=tokens)
    check(parts)
    assert linear(parts[2], parts[4], parts[5], BACKENDS["torch"]).shape == (tokens, OUT)


def test_strided_activations_and_weights() -> None:
    _, _, activation, _, packed, bias = operands(
        (format_from_json("e2m1"),), format_from_json("e2m1"), tokens=10, out=14
    )
    wide = torch.empty(10, 3 * WIDTH, dtype=torch.int8)
    wide[:, WIDTH : 2 * WIDTH] = activation.levels
    views = QuantizedActivation(wide[::2, WIDTH : 2 * WIDTH], activation.scale[::2])
    rows = packed._replace(packed=packed.packed[::2], scale=packed.scale[::2])
    expected = linear(activation, packed, bias, BACKENDS["reference"])[::2, ::2]
    columns_first = rows._replace(packed=rows.packed.T.contiguous().T)
    for name, backend in RUNNABLE.items():
        assert torch.equal(linear(views, rows, bias[::2], backend), expected)
        if name == "native":  # rows have to lie in one piece; a packed weight never lies otherwise
            with pytest.raises(ValueError, match="packed: found strides"):
                linear(views, columns_first, bias[::2], backend)
        else:
            assert torch.equal(linear(views, columns_first, bias[::2], backend), expected)


def test_bias_of_any_precision_is_added_in_float32() -> None:
    _, _, activation, _, packed, bias = operands((format_from_json("e2m1"),), format_from_json("e2m1"))
    plain = linear(activation, packed, None, BACKENDS["torch"])
    for dtype in (torch.float64, torch.bfloat16):
        result = linear(activation, packed, bias.to(dtype), BACKENDS["torch"])
        assert torch.equal(result, plain + bias.to(dtype).float())


# Formats beyond int8: float32 arithmetic


@pytest.mark.parametrize(
    ("weight", "activation"),
    [("e4m3", "e4m3"), ("e2m1", "e4m3"), ("e4m3", "e2m1"), ("e5m2", "int8"), ("int4", "e5m2"), ("e5m2", "e4m3")],
)
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_wide_formats_run_dequantized(
    weight: str, activation: str, granularity: tuple[str, int | None, str, int | None]
) -> None:
    _, _, quantized, tensor, packed, bias = operands(
        (format_from_json(weight),), format_from_json(activation), granularity
    )
    a, w = quantized.dequantize().double(), tensor.dequantize().double()
    exact = a @ w.T + bias.double()
    # One rounding for each of WIDTH products, sums and the bias, at most; the operands are the same float32 numbers.
    allowed = (WIDTH + 2) * U32 * 1.01 * (a.abs() @ w.abs().T + bias.double().abs())
    results = [linear(quantized, packed, bias, backend) for backend in RUNNABLE.values()]
    assert bool(((results[0].double() - exact).abs() <= allowed).all())
    assert torch.equal(results[0], results[1])
    assert results[0].dtype == torch.float32


# Non-finite tokens


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", ["e2m1", "int8", "e4m3"])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("backend", RUNNABLE.values(), ids=RUNNABLE)
def test_bad_token_gives_nan_outputs_and_leaves_the_others_alone(
    backend: Backend, granularity: tuple[str, int | None, str, int | None], activation: str, bad: float
) -> None:
    x, spec, clean, _, packed, bias = operands((format_from_json("e2m1"),), format_from_json(activation), granularity)
    expected = linear(clean, packed, bias, backend)
    assert bool(expected.isfinite().all())
    x[3, 77] = bad
    static = torch.tensor([0.8]) if granularity[0] == "tensor" else None
    result = linear(quantize_activation(x, spec, static), packed, bias, backend)
    others = [0, 1, 2, 4]
    assert bool(result[3].isnan().all())
    assert torch.equal(result[others], expected[others])


def test_nan_reaches_the_outputs_of_a_zero_weight() -> None:
    # 0 * NaN is NaN: a dead output channel does not hide it.
    x, spec, _, _, packed, _ = operands((format_from_json("e2m1"),), format_from_json("e2m1"))
    x[0, 0] = math.nan
    zeros = packed._replace(packed=torch.zeros_like(packed.packed))
    result = linear(quantize_activation(x, spec), zeros, None, BACKENDS["torch"])
    assert bool(result[0].isnan().all())
    assert torch.equal(result[1:], torch.zeros(TOKENS - 1, OUT))


# Unpacking


@pytest.mark.parametrize("name", WEIGHT_NAMES)
def test_unpacked_levels_are_those_of_the_codes(name: str) -> None:
    fmt, grid = format_from_json(name), GRIDS[name]
    codes = torch.tensor(sorted(grid), dtype=torch.uint8)[: len(grid) // 2 * 2].repeat(3, 1)
    codes[1] = codes[1].flip(0)
    levels = unpack_levels(PackedWeight(pack_codes(codes, fmt), torch.ones(3, 1), None, (fmt,), None))
    assert levels.dtype == (torch.int8 if fmt.is_int8 else torch.float32)
    assert levels.tolist() == [[grid[code] for code in row] for row in codes.tolist()]


@pytest.mark.soak
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_layers_of_the_size_of_dit_xl(granularity: tuple[str, int | None, str, int | None]) -> None:
    check(operands((format_from_json("e2m1"),), format_from_json("e2m1"), granularity, tokens=33, out=289, width=4608))
