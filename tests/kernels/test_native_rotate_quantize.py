"""The native rotation and rounding: exact where the arithmetic is, else the definition up to rare neighbours.

Two differences to the definition are promised. The kernel multiplies by 1 / scale where `prepare_input` divides, so a
quotient next to a tie may lie on its other side: the exact tests multiply too, or take powers of two as scales. And a
rotation adds in another order, so a rotated number next to a tie may go to the neighbouring level.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import F32, INSTRUCTION_SETS, bits, column_slice, each_instruction_set, needs_native, use_threads
from oracles import (
    GRIDS,
    ONE_SIDED_TABLE,
    SIGNED_TABLE,
    SKEW_TABLE,
    nearest_levels,
    probes,
    token_scales,
    transform_bound,
)

from hqdit.formats.catalog import format_from_json
from hqdit.formats.number_format import TableFormat
from hqdit.kernels import native_library, native_ops
from hqdit.kernels.activation import QuantizedActivation
from hqdit.kernels.preparation import (
    POINTWISE,
    Front,
    InputPreparation,
    LayerNormModulate,
    Pointwise,
    apply_front,
    input_tables,
    prepare_input,
)
from hqdit.kernels.selection import BACKENDS
from hqdit.quantizers.scaling import MIN_SCALE
from hqdit.quantizers.spec import SCALE_FORMATS, ActivationSpec
from hqdit.transforms.hadamard import hadamard_matrix, require_factors
from hqdit.transforms.rotation import RotationSpec, pack_signs, plan_rotation, random_signs

pytestmark = needs_native

FORMATS = ("e2m1", "e3m0", "e1m2", "int4", "int8", "e2m3") + tuple(
    TableFormat(table).name for table in (SIGNED_TABLE, SKEW_TABLE, ONE_SIDED_TABLE)
)
GRANULARITIES = ("token", "group", "tensor", "channel", "channel-token")
#: (rotation, width, head size) of the layers of DiT-XL/2, and their neighbours.
ROTATIONS = (
    ("none", 1152, None),
    ("block:128", 1152, None),
    ("block:36", 1152, None),
    ("full", 1152, None),
    ("full", 4608, None),
    ("full", 1152, 72),  # folded: H_16 across the heads is what is left
)


def prepared(
    fmt: str,
    granularity: str = "token",
    group_size: int | None = None,
    rotation: RotationSpec | None = None,
    seed: int = 0,
    scales: dict[str, Any] | None = None,
    **more: Any,
) -> InputPreparation:
    """A preparation with everything that its granularity and its rotation ask for; `scales` are parts of the spec."""
    spec = ActivationSpec(format_from_json(fmt), granularity, group_size, **(scales or {}))
    assert rotation is not None
    width, rng = rotation.width, np.random.default_rng(seed)
    if spec.has_channel_scale:
        more["channel_scale"] = torch.from_numpy(np.exp(rng.normal(-2, 0.5, width))).float()
    if spec.has_static_scale:
        more["static_scale"] = torch.tensor([0.21])
    signs = None if rotation.is_identity else pack_signs(random_signs(width, seed, "native"))
    return InputPreparation(spec, rotation, input_tables(spec, rotation), signs, **more)


def quantized(
    x: torch.Tensor, preparation: InputPreparation, isa: str, front: Front = None, threads: int = 1
) -> QuantizedActivation:
    with native_library.use_instruction_set(isa), use_threads(threads):
        return BACKENDS["native"].quantize_input(x, preparation, front)


def quantized_everywhere(
    x: torch.Tensor, preparation: InputPreparation, front: Front = None, most_threads: int = 2
) -> QuantizedActivation:
    """The result, after a look whether it is the same on every instruction set and with any number of threads."""
    first = quantized(x, preparation, INSTRUCTION_SETS[0], front)
    for isa, threads in itertools.product(INSTRUCTION_SETS, range(1, most_threads + 1)):
        found = quantized(x, preparation, isa, front, threads)
        assert torch.equal(found.levels, first.levels), f"levels of {isa}, {threads} threads"
        assert np.array_equal(bits(found.scale), bits(first.scale)), f"scales of {isa}, {threads} threads"
    return first


# Exact


def rounded(y: F32, preparation: InputPreparation) -> tuple[F32, F32]:
    """Levels and scales of rotated numbers in NumPy: one float32 operation after the other, in the kernel's order."""
    one, spec = np.float32(1), preparation.activation
    grid = GRIDS[spec.format.name]
    if preparation.channel_scale is not None:
        y = y * (one / preparation.channel_scale.numpy())
    tokens, width = y.shape
    size = spec.group_size or width
    groups = y.reshape(tokens, width // size, size)
    if spec.granularity in ("tensor", "channel"):
        static = preparation.static_scale
        scale = np.full((tokens, 1), one if static is None else static.numpy()[0], dtype=np.float32)
    else:
        largest = np.abs(groups) if min(grid.values()) < 0 else np.maximum(groups, 0)
        divisor = np.float32(max(grid.values()) / spec.scale_factor)
        scale = np.maximum(largest.max(axis=2) / divisor, np.float32(MIN_SCALE))
    if spec.has_short_scales:
        scale = token_scales(scale).astype(np.float32)
    with np.errstate(over="ignore"):  # negative numbers over the smallest scale, in one-sided formats
        levels = nearest_levels(groups * (one / scale)[:, :, None], grid).reshape(y.shape)
    return levels.astype(np.float32), scale


def check_exact(x: torch.Tensor, y: F32, preparation: InputPreparation) -> None:
    """The kernel's result for `x` is that of the numbers `y`, which every step before the scales gives exactly."""
    levels, scale = rounded(y, preparation)
    found = quantized_everywhere(x, preparation, most_threads=1)
    assert np.array_equal(bits(found.scale), bits(scale))
    assert np.array_equal(found.levels.numpy().astype(np.float32), levels)


def numbers(rng: np.random.Generator, tokens: int, width: int) -> F32:
    spread = 10.0 ** rng.uniform(-3, 3, (tokens, 1))
    return (rng.standard_normal((tokens, width)) * spread).astype(np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_exact_without_a_rotation(fmt: str, granularity: str, dtype: torch.dtype) -> None:
    for seed, (width, size) in enumerate([(2, 2), (36, 4), (72, 36), (145, 29), (256, 16)]):
        rng = np.random.default_rng(seed)
        x = torch.from_numpy(numbers(rng, 9, width)).to(dtype)
        rotation = plan_rotation("none", width, "test")
        preparation = prepared(fmt, granularity, size if granularity == "group" else None, rotation, seed)
        check_exact(x, x.float().numpy(), preparation)


@pytest.mark.parametrize("factor", [0.5, 0.8, 1 / 3, 6 / 7, 0.01, 4.0])
@pytest.mark.parametrize("granularity", ["token", "group", "channel-token"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_exact_with_a_scale_factor(fmt: str, granularity: str, factor: float) -> None:
    # Factors of which the divisor is an integer, 14 for e2m1 with 6 / 7, may take the same way as a factor of 1.
    rng = np.random.default_rng(0)
    x = numbers(rng, 20, 144)
    rotation, scales = plan_rotation("none", 144, "test"), {"scale_factor": factor}
    preparation = prepared(fmt, granularity, 36 if granularity == "group" else None, rotation, scales=scales)
    check_exact(torch.from_numpy(x), x, preparation)


@pytest.mark.parametrize("factor", [1.0, 0.8])
@pytest.mark.parametrize("size", [4, 12, 16, 36, 64, 576])
@pytest.mark.parametrize("fmt", FORMATS)
def test_exact_with_short_scales(fmt: str, size: int, factor: float) -> None:
    rng = np.random.default_rng(size)
    x = numbers(rng, 12, 576) * np.repeat(2.0 ** rng.uniform(-20, 1, (12, 576 // size)), size, axis=1)
    x[0], x[1, :size], x[2, size:] = 0, 0, 0
    x = x.astype(np.float32)
    scales = {"scale_factor": factor, "scale_format": "e4m3"}
    preparation = prepared(fmt, "group", size, plan_rotation("none", 576, "test"), scales=scales)
    check_exact(torch.from_numpy(x), x, preparation)
    assert np.array_equal(
        quantized(torch.from_numpy(x), preparation, INSTRUCTION_SETS[-1]).scale.numpy(),
        prepare_input(torch.from_numpy(x), preparation).scale.numpy(),
    )


@pytest.mark.parametrize("exponent", [-126, -113, -111, -110, -3, 0, 100, 126, 127])
def test_every_number_and_tie_of_short_scales(exponent: int) -> None:
    # With a factor of 12 the scale of an E2M1 group is its largest magnitude, whatever that is.
    points = np.array([level / 512 for level in GRIDS["e4m3"].values() if level > 0])
    points = np.sort(np.concatenate([points, points[1:] - np.diff(np.sort(points)) / 2, [2.0**-10]]))
    unit = 2.0 ** (exponent - 7)
    inside = points[(points < 256) & (points * unit >= MIN_SCALE)].astype(np.float64) * unit
    near = inside.astype(np.float32)
    every = np.concatenate([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))])
    every = every[(every >= np.float32(MIN_SCALE)) & (every < 2.0 ** (exponent + 1))]
    for lead in (1.0, 1.9375 if exponent < 127 else 1.875):
        largest = np.float32(lead * 2.0**exponent)
        scale = np.concatenate([[largest], every[every <= largest]])
        x = np.zeros((1, 4 * len(scale)), dtype=np.float32)
        x[0, 1::4] = scale
        rotation = RotationSpec("none", x.shape[1], x.shape[1])
        preparation = prepared("e2m1", "group", 4, rotation, scales={"scale_factor": 12.0, "scale_format": "e4m3"})
        found = quantized_everywhere(torch.from_numpy(x), preparation)
        assert np.array_equal(found.scale.double().numpy(), token_scales(scale[None]))
        assert torch.equal(found.scale, prepare_input(torch.from_numpy(x), preparation).scale)


@pytest.mark.parametrize("scale_format", ["float32", "e4m3"])
def test_scales_beyond_float32_spoil_the_token(scale_format: str) -> None:
    rotation = plan_rotation("none", 8, "test")
    x = torch.zeros(2, 8)
    x[0, 0], x[1] = 1e20, 1.0
    for largest, scales in ((1e20, {"scale_rule": "rms"}), (3e38, {"scale_factor": 24.0})):
        x[0, 0] = largest
        found = quantized_everywhere(
            x, prepared("e2m1", "group", 4, rotation, scales={**scales, "scale_format": scale_format})
        )
        assert found.scale.isnan().tolist() == [[True, True], [False, False]]
    # A scale that rounds up to 2^128.
    x[0, 0] = 3.4e38
    found = quantized_everywhere(
        x, prepared("e2m1", "group", 4, rotation, scales={"scale_factor": 12.0, "scale_format": scale_format})
    )
    assert found.scale.isnan().tolist() == [[scale_format == "e4m3"] * 2, [False] * 2]


@pytest.mark.parametrize("fmt", FORMATS)
def test_shift_and_scale_before_the_rotation(fmt: str) -> None:
    rng = np.random.default_rng(3)
    x, shift = numbers(rng, 20, 100), rng.standard_normal(100).astype(np.float32)
    factor = np.exp(rng.standard_normal(100)).astype(np.float32)
    rotation = plan_rotation("none", 100, "test")
    for given_shift, given_scale in ((shift, factor), (shift, None), (None, factor)):
        y = x if given_shift is None else x - given_shift
        y = y if given_scale is None else y * given_scale
        vectors = {
            name: None if vector is None else torch.from_numpy(vector)
            for name, vector in (("input_shift", given_shift), ("input_scale", given_scale))
        }
        check_exact(torch.from_numpy(x), y, prepared(fmt, rotation=rotation, **vectors))


@pytest.mark.parametrize("exponent", [-100, -3, 0, 5, 90])
@pytest.mark.parametrize("fmt", FORMATS)
def test_ties_and_their_neighbours_are_those_of_the_definition(fmt: str, exponent: int) -> None:
    # Each token ends in the largest level, so its scale is a power of two, and quotient and product are equal.
    grid, unit = GRIDS[fmt], np.float32(2.0**exponent)
    top = max(grid.values())
    # Numbers that the unit would round to a smaller multiple, or to 0, are left out.
    inside = [x for x in probes(grid) if -top <= x <= top and np.float32(x) * unit / unit == np.float32(x)]
    x = np.array([[number, top] for number in inside], dtype=np.float32) * unit
    preparation = prepared(fmt, rotation=plan_rotation("none", 2, "test"))
    found = quantized_everywhere(torch.from_numpy(x), preparation)
    assert bool((found.scale == float(unit)).all())
    assert found.levels[:, 0].tolist() == nearest_levels(np.array(inside, dtype=np.float32), grid).tolist()
    assert torch.equal(found.levels, prepare_input(torch.from_numpy(x), preparation).levels)


def rotated_integers(x: F32, rotation: RotationSpec, signs: torch.Tensor) -> F32:
    """Rotation of small integers: sums are exact in any order, and the normalization rounds once."""
    if rotation.is_folded:  # the signs lie in the value projection
        blocks, matrix = x.reshape(len(x), rotation.heads, rotation.block), hadamard_matrix(rotation.heads)
        sums = np.einsum("thd,hg->tgd", blocks.astype(np.float64), matrix.astype(np.float64))
    else:
        matrix = hadamard_matrix(rotation.block).astype(np.float64)
        sums = (x * signs.numpy()).astype(np.float64).reshape(len(x), -1, rotation.block) @ matrix
    assert np.abs(sums).max(initial=0) < 2**24
    return sums.reshape(x.shape).astype(np.float32) * np.float32(1 / math.sqrt(len(matrix)))


SMALL_ROTATIONS = [
    (f"block:{order}", order * repeats, None)
    for order, repeats in itertools.product((2, 4, 8, 12, 16, 20, 24, 32, 36, 40, 64, 72, 80, 128, 144, 256), (1, 3))
]
SMALL_ROTATIONS += [("full", heads * dim, dim) for heads, dim in ((2, 36), (4, 2), (12, 4), (6 * 6, 8), (16, 72))]


@pytest.mark.parametrize(("rotation", "width", "head_dim"), [*SMALL_ROTATIONS, *ROTATIONS[1:]])
def test_rotation_of_integers_is_exact(rotation: str, width: int, head_dim: int | None) -> None:
    spec = plan_rotation(rotation, width, "test", head_dim)
    rng = np.random.default_rng(width)
    x = rng.integers(-8, 9, (5, width)).astype(np.float32)
    for seed, granularity in enumerate(("token", "tensor", "channel-token")):
        preparation = prepared("e2m3", granularity, rotation=spec, seed=seed)
        y = rotated_integers(x, spec, random_signs(width, seed, "native"))
        check_exact(torch.from_numpy(x), y, preparation)
    preparation = prepared("e2m1", "group", spec.block, spec, scales={"scale_factor": 0.9, "scale_format": "e4m3"})
    check_exact(torch.from_numpy(x), rotated_integers(x, spec, random_signs(width, 0, "native")), preparation)


@given(
    st.integers(0, 40),
    st.integers(1, 80),
    st.integers(1, 6),
    st.sampled_from(FORMATS),
    st.sampled_from(["token", "group", "tensor", "channel", "channel-token"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.tuples(st.integers(0, 5), st.integers(0, 5)),
    st.sampled_from([1.0, 0.75]),
    st.sampled_from(SCALE_FORMATS),
    st.integers(0, 2**32 - 1),
)
@settings(max_examples=200)
def test_any_shape_and_stride(
    tokens: int,
    size: int,
    groups: int,
    fmt: str,
    granularity: str,
    dtype: torch.dtype,
    padding: tuple[int, int],
    factor: float,
    scale_format: str,
    seed: int,
) -> None:
    rng, width = np.random.default_rng(seed), size * groups
    dense = torch.from_numpy(numbers(rng, tokens, width)).to(dtype)
    rotation = RotationSpec("none", width, width)
    scales: dict[str, Any] = {} if granularity in ("tensor", "channel") else {"scale_factor": factor}
    scales |= {"scale_format": scale_format} if granularity == "group" else {}
    preparation = prepared(fmt, granularity, size if granularity == "group" else None, rotation, seed, scales)
    wide = torch.full((tokens, padding[0] + width + padding[1]), torch.nan, dtype=dtype)
    view = wide[:, padding[0] : padding[0] + width]
    view.copy_(dense)
    check_exact(view, dense.float().numpy(), preparation)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("rungs", [2, 3, 15, 16, 17, 31, 33, 64, 128, 255, 256])
def test_any_ladder(rungs: int, dtype: torch.dtype) -> None:
    # Thresholds need not be midpoints, nor levels those of a format.
    rng = np.random.default_rng(rungs)
    lowest, highest = (0, 256) if dtype == torch.uint8 else (-128, 128)
    ladder = np.sort(rng.choice(np.arange(lowest, highest), rungs, replace=False))
    ladder[-1] = max(ladder[-1], 1)
    thresholds = np.sort(rng.uniform(lowest, highest, rungs - 1)).astype(np.float32)
    x, scale = numbers(rng, 30, 129), np.float32(0.37)
    index = np.searchsorted(thresholds, x * (np.float32(1) / scale), side="right")
    for isa in INSTRUCTION_SETS:
        with native_library.use_instruction_set(isa):
            levels, _ = native_ops.rotate_quantize(
                torch.from_numpy(x), None, 1, 1, None, 1, 1.0, None, None, None, torch.tensor([scale]),
                "absmax", 1.0, False, 129, torch.from_numpy(thresholds), torch.from_numpy(ladder).to(dtype), None, None,
                None, 0.0,
            )  # fmt: skip
        assert levels.dtype == dtype
        assert np.array_equal(levels.numpy(), ladder[index]), isa


@pytest.mark.parametrize(("granularity", "size"), [("token", None), ("group", 24)])
def test_rms_scale(granularity: str, size: int | None) -> None:
    x = torch.from_numpy(numbers(np.random.default_rng(4), 50, 120))
    scales = {"scale_rule": "rms", "scale_factor": 0.3}
    preparation = prepared("e2m1", granularity, size, plan_rotation("none", 120, "test"), scales=scales)
    found = quantized_everywhere(x, preparation)
    exact = 0.3 * x.double().reshape(50, -1, size or 120).square().mean(dim=2).sqrt()
    # The sum of n squares rounds n times at most, each square once; then a quotient, a root and a product.
    allowed = ((size or 120) / 2 + 4) * 2.0**-24
    assert bool(((found.scale.double() - exact).abs() <= allowed * exact).all())
    reciprocal = np.repeat(np.float32(1) / found.scale.numpy(), size or 120, axis=1)
    assert np.array_equal(found.levels.numpy(), nearest_levels(x.numpy() * reciprocal, GRIDS["e2m1"]))
    if size is not None:
        short = prepared("e2m1", granularity, size, preparation.rotation, scales={**scales, "scale_format": "e4m3"})
        rounded_scale = token_scales(found.scale.numpy())
        found = quantized_everywhere(x, short)
        assert np.array_equal(found.scale.double().numpy(), rounded_scale)
        reciprocal = np.repeat(np.float32(1) / found.scale.numpy(), size, axis=1)
        assert np.array_equal(found.levels.numpy(), nearest_levels(x.numpy() * reciprocal, GRIDS["e2m1"]))


# Against the definition


@dataclass(frozen=True)
class Configuration:
    """A way to prepare a layer's input."""

    rotation: tuple[str, int, int | None]
    fmt: str
    granularity: str
    front: str
    dtype: torch.dtype
    is_shifted: bool
    scales: dict[str, Any]

    def __str__(self) -> str:
        name, width, head_dim = self.rotation
        extras = ("shifted " if self.is_shifted else "") + "".join(f"{value} " for value in self.scales.values())
        where = f"{name}-{width}" + (f"-heads of {head_dim}" if head_dim else "")
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{where} {self.fmt[:12]} {self.granularity} {self.front} {extras}{dtype}"


def configurations() -> list[Configuration]:
    """Every rotation with every format, and all values of the rest in turn, so that every pair of values occurs."""
    found = []
    fronts = ("layer-norm", *POINTWISE, "none")
    for turn, (rotation, fmt) in enumerate(itertools.product(ROTATIONS, FORMATS)):
        granularity = GRANULARITIES[turn % 5]
        # Without a rotation and a front there are many exact ties, which the tests above are about.
        front = fronts[(turn // 5 + turn) % (4 if rotation[0] == "none" else 5)]
        scales: dict[str, Any] = {}
        if granularity in ("token", "group") and turn % 3 == 0:
            scales = {"scale_rule": "rms", "scale_factor": 0.25}
        elif granularity not in ("tensor", "channel") and turn % 3 == 1:
            scales = {"scale_factor": 0.8}
        if granularity == "group" and turn % 2 == 0:
            scales["scale_format"] = "e4m3"
        dtype = torch.bfloat16 if turn % 4 == 1 else torch.float32
        found.append(Configuration(rotation, fmt, granularity, front, dtype, turn % 7 == 3, scales))
    return found


def front_of(name: str, rng: np.random.Generator, samples: int, width: int) -> Front:
    if name == "none":
        return None
    if name != "layer-norm":
        return Pointwise(name)
    # scale and shift are two of six parts of one tensor, as in a DiT block
    parts = torch.from_numpy(rng.standard_normal((samples, 6 * width)).astype(np.float32) / 3).chunk(6, dim=1)
    return LayerNormModulate(parts[1], parts[0], 1e-6)


@pytest.mark.parametrize("config", configurations(), ids=str)
def test_levels_are_those_of_the_definition_up_to_rare_neighbours(config: Configuration) -> None:
    rotation = plan_rotation(config.rotation[0], config.rotation[1], "test", config.rotation[2])
    width, rng = rotation.width, np.random.default_rng(5)
    tokens = -(-1_000_000 // width) // 4 * 4 + 4
    vectors = {}
    if config.is_shifted:
        vectors["input_shift"] = torch.from_numpy(rng.standard_normal(width).astype(np.float32) / 4)
        vectors["input_scale"] = torch.from_numpy(np.exp(rng.standard_normal(width) / 2).astype(np.float32))
    size = 36 if config.granularity == "group" else None
    preparation = prepared(config.fmt, config.granularity, size, rotation, scales=config.scales, **vectors)
    x = torch.from_numpy(rng.standard_normal((tokens, width), dtype=np.float32)).to(config.dtype)
    x[:, :: width // 8] *= 10  # outliers, for which the rotation is there
    front = front_of(config.front, rng, 4, width)

    found, defined = quantized_everywhere(x, preparation, front), prepare_input(x, preparation, front)
    assert found.levels.numel() >= 1_000_000
    ladder = torch.tensor(sorted(set(GRIDS[config.fmt].values())))
    rungs = [torch.bucketize(result.levels.int(), ladder) for result in (found, defined)]
    apart = (rungs[0] - rungs[1]).abs()
    if preparation.activation.has_short_scales:
        # A scale next to a tie may go to its neighbour, and all levels of its group with it.
        is_other = found.scale != defined.scale
        assert int(is_other.sum()) <= 1e-4 * is_other.numel()
        assert bool(((found.scale / defined.scale - 1).abs() <= 2.0**-3 + 2.0**-20).all())
        assert size is not None
        apart = apart.masked_fill(is_other.repeat_interleave(size, dim=1), 0)
    assert int(apart.max()) <= 1, "a level is no neighbour of the definition's"
    assert int((apart > 0).sum()) <= 1e-4 * apart.numel()
    if config.granularity in ("tensor", "channel"):
        assert torch.equal(found.scale, defined.scale)
    if config.granularity in ("tensor", "channel") or preparation.activation.has_short_scales:
        return
    difference = (found.scale.double() - defined.scale.double()).abs()
    assert bool((difference <= scale_bound(x, preparation, front).unsqueeze(1)).all())


def scale_bound(x: torch.Tensor, preparation: InputPreparation, front: Front) -> torch.Tensor:
    """How far the scales of each token may lie apart: as far as its rotated numbers, over the largest level.

    Either side is off by the bound of its transform, relative to the norm of what is rotated; where the front differs
    (GELU's tail, LayerNorm's sums) by at most 2^-17 of that norm.
    """
    rotation = preparation.rotation
    y = apply_front(x.float(), front)
    y = y if preparation.input_shift is None else y - preparation.input_shift
    y = y if preparation.input_scale is None else y * preparation.input_scale
    relative = 2.0**-17
    if not rotation.is_identity:
        factors = require_factors(rotation.heads if rotation.is_folded else rotation.block, "test")
        relative += 2 * transform_bound([factors.sylvester], factors.paley)
    smallest = 1.0 if preparation.channel_scale is None else float(preparation.channel_scale.min())
    spec = preparation.activation
    divisor = max(GRIDS[spec.format.name].values()) if spec.scale_rule == "absmax" else 1
    return relative * y.double().norm(dim=1) / smallest / divisor * spec.scale_factor


# Tokens that hold no number, no tokens, tokens by themselves


BAD_ROTATIONS = [("none", 144, None), ("block:16", 144, None), ("full", 144, None), ("full", 144, 36)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("rotation", BAD_ROTATIONS, ids=str)
@pytest.mark.parametrize("fmt", ["e2m1", "int8", TableFormat(ONE_SIDED_TABLE).name])
def test_bad_number_makes_its_whole_token_nan_and_no_other(
    fmt: str, rotation: tuple[str, int, int | None], granularity: str, bad: float
) -> None:
    spec = plan_rotation(rotation[0], rotation[1], "test", rotation[2])
    preparation = prepared(fmt, granularity, 12 if granularity == "group" else None, spec)
    others = [0, 1, 2, 3, 5, 6]
    for dtype, at in itertools.product((torch.float32, torch.bfloat16), (0, 77, 143)):
        x = torch.from_numpy(numbers(np.random.default_rng(at), 7, 144)).to(dtype)
        clean = quantized(x, preparation, INSTRUCTION_SETS[-1])
        x[4, at] = bad
        for isa in INSTRUCTION_SETS:
            found = quantized(x, preparation, isa)
            assert bool(found.scale[4].isnan().all()), isa
            assert torch.equal(found.scale[others], clean.scale[others])
            assert torch.equal(found.levels[others], clean.levels[others])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("front", ["layer-norm", *POINTWISE])
def test_bad_number_passes_the_front(front: str, bad: float) -> None:
    preparation = prepared("e2m1", "group", 12, plan_rotation("none", 72, "test"))
    x = torch.from_numpy(numbers(np.random.default_rng(0), 6, 72))
    x[3, 20] = bad
    found = quantized_everywhere(x, preparation, front_of(front, np.random.default_rng(1), 2, 72))
    assert found.scale.isnan().all(dim=1).tolist() == [False, False, False, True, False, False]
    assert bool(found.scale[[0, 1, 2, 4, 5]].isfinite().all())


def test_zero_tokens_have_the_smallest_scale() -> None:
    for fmt, rotation in itertools.product(("e2m1", "int8", FORMATS[-1]), ("none", "full")):
        preparation = prepared(fmt, rotation=plan_rotation(rotation, 144, "test"))
        found = quantized_everywhere(torch.zeros(3, 144), preparation)
        assert found.scale.tolist() == [[MIN_SCALE]] * 3
        assert not found.levels.any()


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("front", ["layer-norm", "none", "silu"])
def test_no_token_and_one_token(front: str, tokens: int) -> None:
    preparation = prepared("e2m1", "group", 36, plan_rotation("full", 144, "test"))
    x = torch.from_numpy(numbers(np.random.default_rng(0), tokens, 144))
    found = quantized_everywhere(x, preparation, front_of(front, np.random.default_rng(1), 1, 144))
    assert found.levels.shape == (tokens, 144)
    assert found.scale.shape == (tokens, 4)


@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
@each_instruction_set
def test_tokens_do_not_see_each_other(isa: str, rotation: tuple[str, int, int | None]) -> None:
    preparation = prepared("int8", rotation=plan_rotation(rotation[0], rotation[1], "test", rotation[2]))
    rng = np.random.default_rng(0)
    x = torch.from_numpy(numbers(rng, 21, rotation[1]))
    front = front_of("layer-norm", rng, 21, rotation[1])
    assert isinstance(front, LayerNormModulate)
    together = quantized(x, preparation, isa, front)
    for token in range(21):
        one = slice(token, token + 1)
        own = LayerNormModulate(front.scale[one], front.shift[one], front.eps)
        alone = quantized(x[one], preparation, isa, own)
        assert torch.equal(alone.levels[0], together.levels[token])
        assert torch.equal(alone.scale[0], together.scale[token])


def test_samples_have_their_own_modulation() -> None:
    # Tokens s T .. (s + 1) T - 1 belong to sample s.
    preparation = prepared("int8", rotation=plan_rotation("none", 72, "test"))
    rng = np.random.default_rng(0)
    x = torch.from_numpy(numbers(rng, 20, 72))
    front = front_of("layer-norm", rng, 4, 72)
    assert isinstance(front, LayerNormModulate)
    repeated = LayerNormModulate(*(part.repeat_interleave(5, dim=0) for part in front[:2]), front.eps)
    together, apart = (quantized_everywhere(x, preparation, f) for f in (front, repeated))
    assert torch.equal(together.levels, apart.levels)
    assert torch.equal(together.scale, apart.scale)


def test_nothing_outside_the_outputs_is_written() -> None:
    rng = np.random.default_rng(0)
    x = column_slice(rng, numbers(rng, 33, 144), 3, 5)
    assert x._base is not None
    before = x._base.clone()
    quantized_everywhere(x, prepared("e2m1", rotation=plan_rotation("full", 144, "test")), Pointwise("silu"))
    assert torch.equal(x._base.view(torch.int32), before.view(torch.int32))
