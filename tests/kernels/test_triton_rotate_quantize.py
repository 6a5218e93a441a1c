"""Rotation and rounding in Triton: exact where the arithmetic is, else the definition up to rare neighbours.

The kernel divides as the definition does, so without a front and a Paley factor there is nothing to be different.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from native_cases import F32, bits
from oracles import GRIDS, ONE_SIDED_TABLE, SIGNED_TABLE, SKEW_TABLE, nearest_levels, probes
from triton_cases import DEVICE, needs_triton, table_name

from hqdit.formats.catalog import E2M1, E4M3, format_from_json
from hqdit.kernels.activation import QuantizedActivation
from hqdit.kernels.preparation import (
    POINTWISE,
    Front,
    InputPreparation,
    LayerNormModulate,
    Pointwise,
    input_tables,
    prepare_input,
)
from hqdit.kernels.selection import BACKENDS
from hqdit.kernels.triton import tiles
from hqdit.quantizers.scaling import MIN_SCALE
from hqdit.quantizers.spec import ActivationSpec
from hqdit.transforms.hadamard import hadamard_matrix
from hqdit.transforms.rotation import RotationSpec, pack_signs, plan_rotation, random_signs

pytestmark = needs_triton

FORMATS = ("e2m1", "e3m0", "int4", "int8", "e2m3", *map(table_name, (SIGNED_TABLE, SKEW_TABLE, ONE_SIDED_TABLE)))
GRANULARITIES = ("token", "group", "tensor", "channel", "channel-token")


def prepared(
    fmt: str,
    granularity: str,
    group_size: int | None,
    rotation: RotationSpec,
    seed: int = 0,
    scales: tuple[str, float] = ("absmax", 1.0),
    **more: Any,
) -> InputPreparation:
    """A preparation with everything that its granularity and its rotation ask for, on the device."""
    rule, factor = scales
    spec = ActivationSpec(format_from_json(fmt), granularity, group_size, scale_rule=rule, scale_factor=factor)
    rng = np.random.default_rng(seed)
    if spec.has_channel_scale:
        more["channel_scale"] = torch.from_numpy(np.exp(rng.normal(-2, 0.5, rotation.width))).float()
    if spec.has_static_scale:
        more["static_scale"] = torch.tensor([0.21])
    if not rotation.is_identity:
        more["rotation_signs"] = pack_signs(random_signs(rotation.width, seed, "triton"))
    there = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in more.items()}
    return InputPreparation(spec, rotation, input_tables(spec, rotation), **there)


def quantized(x: torch.Tensor, preparation: InputPreparation, front: Front = None) -> QuantizedActivation:
    found = BACKENDS["triton"].quantize_input(x.to(DEVICE), preparation, front)
    assert found.levels.dtype == torch.int8
    assert found.levels.shape == x.shape
    return QuantizedActivation(found.levels.cpu(), found.scale.cpu())


def numbers(rng: np.random.Generator, tokens: int, width: int) -> F32:
    spread = 10.0 ** rng.uniform(-3, 3, (tokens, 1))
    return (rng.standard_normal((tokens, width)) * spread).astype(np.float32)


def rounded(y: F32, preparation: InputPreparation) -> tuple[F32, F32]:
    """Levels and scales of rotated numbers in NumPy, one float32 operation after the other."""
    spec = preparation.activation
    grid = GRIDS[spec.format.name]
    if preparation.channel_scale is not None:
        y = y / preparation.channel_scale.cpu().numpy()
    tokens, width = y.shape
    size = spec.group_size or width
    groups = y.reshape(tokens, width // size, size)
    if spec.granularity in ("tensor", "channel"):
        static = preparation.static_scale
        scale = np.full((tokens, 1), 1.0 if static is None else static.item(), dtype=np.float32)
    else:
        largest = np.abs(groups) if min(grid.values()) < 0 else np.maximum(groups, 0)
        scale = np.maximum(largest.max(axis=2) / np.float32(max(grid.values())), np.float32(MIN_SCALE))
    with np.errstate(over="ignore"):  # negative numbers over the smallest scale, in one-sided formats
        levels = nearest_levels(groups / scale[:, :, None], grid).reshape(y.shape)
    return levels.astype(np.int8), scale


def check_exact(x: torch.Tensor, y: F32, preparation: InputPreparation) -> None:
    """The kernel's result for `x` is that of the numbers `y`, which every step before the scales gives exactly."""
    levels, scale = rounded(y, preparation)
    found = quantized(x, preparation)
    assert np.array_equal(bits(found.scale), bits(scale))
    assert np.array_equal(found.levels.numpy(), levels)


# Exact


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("fmt", FORMATS)
def test_exact_without_a_rotation(fmt: str, granularity: str) -> None:
    seed = FORMATS.index(fmt) + GRANULARITIES.index(granularity)
    width, size = ((36, 12), (72, 36), (50, 10), (64, 4))[seed % 4]
    dtype = (torch.float32, torch.bfloat16, torch.float16)[seed % 3]
    x = torch.from_numpy(numbers(np.random.default_rng(seed), 2, width)).to(dtype)
    rotation = plan_rotation("none", width, "test")
    check_exact(
        x, x.float().numpy(), prepared(fmt, granularity, size if granularity == "group" else None, rotation, seed)
    )


@pytest.mark.parametrize("fmt", FORMATS)
def test_ties_and_their_neighbours(fmt: str) -> None:
    probed = np.array([number for number in probes(GRIDS[fmt]) if math.isfinite(number)], dtype=np.float32)
    x = torch.from_numpy(probed).unsqueeze(0)
    preparation = prepared(fmt, "tensor", None, plan_rotation("none", len(probed), "test"), static_scale=torch.ones(1))
    preparation = preparation._replace(static_scale=torch.ones(1, device=DEVICE))
    found = quantized(x, preparation)
    assert found.levels[0].tolist() == nearest_levels(probed, GRIDS[fmt]).tolist()


SMALL_ROTATIONS = [
    ("block:2", 6, None), ("block:16", 48, None), ("block:12", 36, None), ("block:20", 20, None),
    ("block:72", 144, None), ("full", 256, None), ("full", 8, 4), ("full", 144, 12), ("full", 1152, 72),
]  # fmt: skip


@pytest.mark.parametrize(("rotation", "width", "head_dim"), SMALL_ROTATIONS)
def test_rotation_of_integers_is_exact(rotation: str, width: int, head_dim: int | None) -> None:
    spec = plan_rotation(rotation, width, "test", head_dim)
    x = np.random.default_rng(width).integers(-8, 9, (2, width)).astype(np.float32)
    if spec.is_folded:  # the signs lie in the value projection
        matrix = hadamard_matrix(spec.heads).astype(np.float64)
        sums = np.einsum("thd,hg->tgd", x.reshape(len(x), spec.heads, spec.block).astype(np.float64), matrix)
    else:
        matrix = hadamard_matrix(spec.block).astype(np.float64)
        signs = random_signs(width, 0, "triton").numpy()
        sums = (x * signs).astype(np.float64).reshape(len(x), -1, spec.block) @ matrix
    y = sums.reshape(x.shape).astype(np.float32) * np.float32(1 / math.sqrt(len(matrix)))
    granularity = "group" if width % 8 == 0 else "channel-token"
    check_exact(
        torch.from_numpy(x), y, prepared("e2m3", granularity, width // 2 if granularity == "group" else None, spec)
    )


def test_shift_and_scale_before_the_rotation() -> None:
    rng = np.random.default_rng(3)
    x, shift = numbers(rng, 3, 100), rng.standard_normal(100).astype(np.float32)
    factor = np.exp(rng.standard_normal(100)).astype(np.float32)
    rotation = plan_rotation("none", 100, "test")
    vectors = {"input_shift": torch.from_numpy(shift), "input_scale": torch.from_numpy(factor)}
    check_exact(torch.from_numpy(x), (x - shift) * factor, prepared("int8", "token", None, rotation, **vectors))


@pytest.mark.parametrize("size", [None, 24])
def test_rms_scale(size: int | None) -> None:
    x = torch.from_numpy(numbers(np.random.default_rng(4), 4, 120))
    rotation = plan_rotation("none", 120, "test")
    found = quantized(x, prepared("e2m1", "group" if size else "token", size, rotation, scales=("rms", 0.3)))
    exact = 0.3 * x.double().reshape(4, -1, size or 120).square().mean(dim=2).sqrt()
    # The sum of n squares rounds n times at most, each square once; then a quotient, a root and a product.
    assert bool(((found.scale.double() - exact).abs() <= ((size or 120) / 2 + 4) * 2.0**-24 * exact).all())
    quotient = (x.reshape(4, -1, size or 120) / found.scale.unsqueeze(-1)).reshape(x.shape).numpy()
    assert np.array_equal(found.levels.numpy(), nearest_levels(quotient, GRIDS["e2m1"]))


@pytest.mark.parametrize("size", [None, 24])
def test_clipped_scale(size: int | None) -> None:
    x = torch.from_numpy(numbers(np.random.default_rng(5), 4, 120))
    rotation = plan_rotation("none", 120, "test")
    found = quantized(x, prepared("e2m1", "group" if size else "token", size, rotation, scales=("absmax", 0.9)))
    largest = x.reshape(4, -1, size or 120).abs().amax(dim=2)
    assert torch.equal(found.scale, largest / np.float32(12 / 0.9))


# Against the definition

#: (rotation, width, head size), format, granularity, front, dtype: the layers of DiT-XL/2 and others.
CONFIGURATIONS = [
    (("full", 1152, None), "e2m1", "token", "layer-norm", torch.bfloat16),
    (("full", 4608, None), "e2m1", "token", "gelu-tanh", torch.float32),
    (("full", 4608, None), "e3m0", "group", "none", torch.bfloat16),
    (("block:128", 1152, None), "int8", "group", "layer-norm", torch.float32),
    (("block:36", 1152, None), FORMATS[-1], "channel-token", "gelu-erf", torch.float32),
    (("full", 1152, 72), "e2m1", "token", "none", torch.float16),
    (("full", 1152, None), "int4", "channel", "silu", torch.float32),
    (("none", 1152, None), "e2m1", "tensor", "layer-norm", torch.float32),
]


def check_rare(config: tuple[Any, ...], tokens: int) -> tuple[int, int]:
    """(codes that differ, codes) of one configuration; each differs by one level, and scales by rounding."""
    (name, width, head_dim), fmt, granularity, front_name, dtype = config
    rng = np.random.default_rng(5)
    rotation = plan_rotation(name, width, "test", head_dim)
    preparation = prepared(fmt, granularity, 36 if granularity == "group" else None, rotation)
    x = torch.from_numpy(rng.standard_normal((tokens, width), dtype=np.float32)).to(dtype)
    x[:, :: width // 8] *= 10  # outliers, for which the rotation is there
    front = front_of(front_name, rng, 2, width)
    found, defined = quantized(x, preparation, front), prepare_input(x.to(DEVICE), preparation, front)
    ladder = torch.tensor(sorted(set(GRIDS[fmt].values())))
    rungs = [torch.bucketize(result.levels.cpu().int(), ladder) for result in (found, defined)]
    apart = (rungs[0] - rungs[1]).abs()
    assert int(apart.max()) <= 1, "a level is no neighbour of the definition's"
    # A scale is a largest number over a constant; the transform moves it by a few units of the token's norm.
    norm = x.double().norm(dim=1, keepdim=True) * (3 if front_name == "layer-norm" else 1)
    assert bool(((found.scale.double() - defined.scale.cpu().double()).abs() <= 2.0**-17 * norm).all())
    return int((apart > 0).sum()), apart.numel()


def front_of(name: str, rng: np.random.Generator, samples: int, width: int) -> Front:
    if name == "none":
        return None
    if name != "layer-norm":
        return Pointwise(name)
    # scale and shift are two of six parts of one tensor, as in a DiT block
    parts = (
        torch.from_numpy(rng.standard_normal((samples, 6 * width)).astype(np.float32) / 3).to(DEVICE).chunk(6, dim=1)
    )
    return LayerNormModulate(parts[1], parts[0], 1e-6)


def test_levels_are_those_of_the_definition_up_to_rare_neighbours() -> None:
    counts = [check_rare(config, tokens=-(-16_000 // config[0][1]) // 2 * 2) for config in CONFIGURATIONS]
    different, codes = (sum(column) for column in zip(*counts, strict=True))
    assert codes >= 100_000
    assert different <= 1e-4 * codes


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGURATIONS, ids=lambda config: f"{config[0]} {config[1][:8]} {config[2:]}")
def test_levels_on_a_gpu(config: tuple[Any, ...]) -> None:
    assert DEVICE.type == "cuda"
    different, codes = check_rare(config, tokens=2000)
    assert different <= 1e-4 * codes


# Tokens that hold no number, no tokens, tokens by themselves


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("granularity", ["token", "group", "tensor"])
@pytest.mark.parametrize("rotation", ["none", "full"])
def test_bad_number_makes_its_whole_token_nan_and_no_other(rotation: str, granularity: str, bad: float) -> None:
    spec = plan_rotation(rotation, 144, "test")
    preparation = prepared(FORMATS[-1], granularity, 12 if granularity == "group" else None, spec)
    x = torch.from_numpy(numbers(np.random.default_rng(1), 3, 144))
    clean = quantized(x, preparation)
    x[1, 77] = bad
    found = quantized(x, preparation)
    assert bool(found.scale[1].isnan().all())
    assert torch.equal(found.scale[[0, 2]], clean.scale[[0, 2]])
    assert torch.equal(found.levels[[0, 2]], clean.levels[[0, 2]])


@pytest.mark.parametrize("front", ["layer-norm", *POINTWISE])
def test_bad_number_passes_the_front(front: str) -> None:
    preparation = prepared("e2m1", "group", 12, plan_rotation("none", 72, "test"))
    x = torch.from_numpy(numbers(np.random.default_rng(0), 2, 72))
    x[1, 20] = math.nan
    found = quantized(x, preparation, front_of(front, np.random.default_rng(1), 1, 72))
    assert found.scale.isnan().all(dim=1).tolist() == [False, True]
    assert bool(found.scale[0].isfinite().all())


def test_zero_tokens_have_the_smallest_scale() -> None:
    for fmt, rotation in itertools.product(("e2m1", FORMATS[-1]), ("none", "full")):
        found = quantized(torch.zeros(1, 144), prepared(fmt, "token", None, plan_rotation(rotation, 144, "test")))
        assert found.scale.tolist() == [[MIN_SCALE]]
        assert not found.levels.any()


def test_no_token() -> None:
    found = quantized(torch.zeros(0, 144), prepared("e2m1", "group", 36, plan_rotation("full", 144, "test")))
    assert found.scale.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_strides_do_not_matter_and_nothing_else_is_read(dtype: torch.dtype) -> None:
    dense = torch.from_numpy(numbers(np.random.default_rng(0), 2, 72)).to(dtype)
    preparation = prepared("e2m1", "token", None, plan_rotation("block:36", 72, "test"))
    expected = quantized(dense, preparation)
    wide = torch.full((2, 79), math.nan, dtype=dtype)
    wide[:, 3:75] = dense
    for view in (wide.to(DEVICE)[:, 3:75], dense.T.contiguous().to(DEVICE).T):
        found = quantized(view, preparation)
        assert torch.equal(found.levels, expected.levels)
        assert torch.equal(found.scale, expected.scale)


def test_samples_have_their_own_modulation() -> None:
    # Tokens s T .. (s + 1) T - 1 belong to sample s.
    preparation = prepared("int8", "token", None, plan_rotation("none", 72, "test"))
    x = torch.from_numpy(numbers(np.random.default_rng(0), 6, 72))
    front = front_of("layer-norm", np.random.default_rng(1), 2, 72)
    assert isinstance(front, LayerNormModulate)
    repeated = LayerNormModulate(*(part.repeat_interleave(3, dim=0) for part in front[:2]), front.eps)
    together, apart = (quantized(x, preparation, each) for each in (front, repeated))
    assert torch.equal(together.levels, apart.levels)
    assert torch.equal(together.scale, apart.scale)


def test_what_has_no_kernel_runs_as_in_the_torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(numbers(np.random.default_rng(0), 4, 72)).to(DEVICE)
    rotation = plan_rotation("full", 72, "test")
    wide = prepared("e2m1", "token", None, rotation)._replace(activation=ActivationSpec(E4M3), tables=None)
    assert BACKENDS["triton"].quantize_input(x, wide).levels.dtype == torch.float32
    # A token that is too long for one program.
    monkeypatch.setattr(tiles, "LARGEST_TOKEN_TILE", 64)
    preparation = prepared(E2M1.name, "token", None, rotation)
    found, defined = BACKENDS["triton"].quantize_input(x, preparation), prepare_input(x, preparation)
    assert torch.equal(found.levels, defined.levels)
    assert torch.equal(found.scale, defined.scale)
