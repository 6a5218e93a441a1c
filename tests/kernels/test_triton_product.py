"""The product in Triton against exact sums and the documented float32 operations: not one bit may differ.

Without a GPU the kernels are interpreted: the same source, run with NumPy.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_cases import bits
from oracles import SIGNED_TABLE
from triton_cases import (
    ACTIVATION_FORMATS,
    DEVICE,
    SMALL_TILE,
    WEIGHT_FORMATS,
    WIDE_TILE,
    Case,
    Product,
    as_bits,
    cases,
    check,
    needs_triton,
    table_name,
)

from hqdit.formats.catalog import E2M1, E3M0, format_from_json
from hqdit.kernels.activation import QuantizedActivation
from hqdit.kernels.linear import Epilogue, PackedWeight, packed_level_tables
from hqdit.kernels.selection import BACKENDS
from hqdit.kernels.triton import product_operation, tiles
from hqdit.kernels.triton.tiles import use_tile

pytestmark = needs_triton

SIGNED = table_name(SIGNED_TABLE)


@given(cases(largest=40), st.sampled_from([SMALL_TILE, WIDE_TILE]))
@settings(max_examples=25)
def test_no_bit_differs_in_random_products(case: Case, tile: tiles.ProductTile) -> None:
    with use_tile(tile):
        check(case)


@pytest.mark.gpu
@pytest.mark.timeout(3600)
def test_no_bit_differs_in_2000_random_products() -> None:
    assert DEVICE.type == "cuda"
    done = 0

    @given(cases(largest=600), st.sampled_from([None, SMALL_TILE, WIDE_TILE]))
    @settings(max_examples=int(os.environ.get("HQDIT_GPU_CASES", "2000")), database=None)
    def run(case: Case, tile: tiles.ProductTile | None) -> None:
        nonlocal done
        done += 1
        if tile is None:
            check(case)  # the tile that products of this shape get
        else:
            with use_tile(tile):
                check(case)

    run()
    assert done >= int(os.environ.get("HQDIT_GPU_CASES", "2000"))


@pytest.mark.parametrize("activation", ACTIVATION_FORMATS)
def test_every_pair_of_formats_in_every_granularity(activation: str) -> None:
    # One call has every format of weights: each output channel picks its own.
    granularities = itertools.product([(True, True), (True, False), (False, False)], repeat=2)
    for seed, (token_scales, weight_scales) in enumerate(granularities):
        groups = 3 if token_scales[1] or weight_scales[1] else 1
        case = Case(
            tokens=3, channels=16, group_size=48 // groups, groups=groups, formats=tuple(WEIGHT_FORMATS),
            token_scales=token_scales, weight_scales=weight_scales, activation=activation, seed=seed,
        )  # fmt: skip
        product = Product(case)
        product.index = np.arange(16, dtype=np.uint8) % len(WEIGHT_FORMATS)
        with use_tile(SMALL_TILE):
            found = product.run()
        assert np.array_equal(bits(found), bits(product.after_function(product.before_function())))


@pytest.mark.parametrize("size", [4, 8, 12, 20, 28, 36, 40, 64, 68, 72, 132])
def test_group_sizes_that_no_tile_divides(size: int) -> None:
    scales = (True, True)
    with use_tile(SMALL_TILE):
        # Code 0, which masked bytes hold, is a level of the table that is not 0.
        check(Case(group_size=size, groups=2, token_scales=scales, weight_scales=scales, formats=("e2m1", SIGNED)))


@pytest.mark.parametrize("groups", [1, 3])
def test_sign_of_zero(groups: int) -> None:
    # 0 times a negative scale is -0, and so is the sum of such groups.
    scales = (True, groups > 1)
    product = Product(Case(group_size=8, groups=groups, token_scales=scales, weight_scales=scales))
    product.levels[:] = 0
    product.token_scale, product.weight_scale = np.abs(product.token_scale), -np.abs(product.weight_scale)
    with use_tile(SMALL_TILE):
        found = product.run()
    assert np.array_equal(bits(found), bits(product.after_function(product.before_function())))
    assert bool(found.signbit().all())


@pytest.mark.parametrize(("tokens", "channels", "width"), [(1, 1, 2), (16, 16, 32), (17, 33, 34), (40, 15, 66)])
def test_tails(tokens: int, channels: int, width: int) -> None:
    with use_tile(SMALL_TILE):
        check(Case(tokens, channels, width, has_bias=True, samples=1, has_residual=True, padding=(1, 2)))


def test_largest_sums() -> None:
    product = Product(Case(group_size=4608, formats=(table_name((*range(-128, -113), 127)),)))
    product.levels[:], product.packed[:] = -128, 0  # codes of the level -128
    with use_tile(replace(SMALL_TILE, depth=1024)):
        assert np.array_equal(bits(product.run()), bits(product.after_function(product.before_function())))


@pytest.mark.parametrize("function", ["gelu-tanh", "gelu-erf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gelu_behind_a_product(function: str, dtype: torch.dtype) -> None:
    product = Case(tokens=16, channels=16, function=function, dtype=dtype, has_bias=True, weight_scales=(False, False))
    with use_tile(SMALL_TILE):
        for seed in range(3):
            check(replace(product, seed=seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rounding_of_outputs(dtype: torch.dtype) -> None:
    # One level 1 times a weight of 1 gives the token's scale: any float32 number can be had.
    ties = [1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, 1 + 2.0**-8 + 2.0**-20, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 65519.0]
    edges = [0.0, -0.0, 2.0**-126, 2.0**-130, 6e-8, 65504.0, 65520.0, 3.3895e38, 3.4e38, np.inf, -np.inf, np.nan]
    y = torch.tensor(ties + edges, dtype=torch.float32)
    levels = torch.zeros(len(y), 32, dtype=torch.int8)
    levels[:, 0] = 1
    packed = torch.zeros(1, 16, dtype=torch.uint8)
    packed[0, 0] = 1  # the code of E2M1's level 1
    with use_tile(SMALL_TILE):
        found = product_operation.product(
            levels.to(DEVICE), y.unsqueeze(1).to(DEVICE), packed.to(DEVICE), ["e2m1"], None,
            torch.ones(1, 1, device=DEVICE), None, None, None, None, dtype,
        ).cpu()  # fmt: skip
    assert np.array_equal(as_bits(found[:, 0]), as_bits(y.to(dtype)))


def test_index_beyond_the_tables_is_nan_and_reads_nothing() -> None:
    product = Product(Case(formats=("e2m1", "e3m0")))
    assert product.index is not None
    product.index[3] = 200
    with use_tile(SMALL_TILE):
        found = product.run()
    assert bool(found[:, 3].isnan().all())
    others = [channel for channel in range(19) if channel != 3]
    product.index[3] = 0
    assert torch.equal(found[:, others], product.after_function(product.before_function())[:, others])


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_to_compute(shape: tuple[int, int]) -> None:
    assert Product(Case(*shape)).run().shape == shape


def test_every_candidate_of_tiles_gives_the_same_bits() -> None:
    case = Case(tokens=20, channels=40, group_size=36, groups=2, weight_scales=(True, True), has_bias=True)
    product = Product(case)
    expected = bits(product.after_function(product.before_function()))
    seen = {(tile.tokens, tile.channels, tile.depth): tile for n in (1, 20, 999) for tile in tiles.candidates(n, 64)}
    for tile in seen.values():
        with use_tile(tile):
            assert np.array_equal(bits(product.run()), expected), tile


# Through the backend


def packed_weight(rows: int, width: int, seed: int, formats: tuple[Any, ...] = (E2M1,)) -> PackedWeight:
    rng = np.random.default_rng(seed)
    index = torch.from_numpy(rng.integers(0, len(formats), rows, dtype=np.uint8)) if len(formats) > 1 else None
    return PackedWeight(
        torch.from_numpy(rng.integers(0, 256, (rows, width // 2), dtype=np.uint8)).to(DEVICE),
        torch.from_numpy(rng.standard_normal((rows, 1), dtype=np.float32)).to(DEVICE),
        None if index is None else index.to(DEVICE),
        formats,
        packed_level_tables(formats),
        torch.from_numpy(rng.standard_normal(rows, dtype=np.float32)).to(DEVICE),
    )


def test_three_weights_read_one_activation() -> None:
    levels = torch.randint(-128, 128, (36, 9), dtype=torch.int8, device=DEVICE).T  # rows that do not lie in one piece
    activation = QuantizedActivation(levels, torch.rand(9, 1, device=DEVICE))
    weights = [
        packed_weight(rows, 36, rows, formats) for rows, formats in ((7, (E2M1,)), (20, (E3M0, E2M1)), (1, (E2M1,)))
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        with use_tile(SMALL_TILE):
            found = BACKENDS["triton"].linear(activation, weights, dtype=dtype)
        for one, other in zip(found, BACKENDS["reference"].linear(activation, weights, dtype=dtype), strict=True):
            assert one.dtype == dtype
            assert torch.equal(one, other)


@pytest.mark.parametrize("epilogue", ["gate", "residual", "both", "silu"])
def test_what_may_follow(epilogue: str) -> None:
    activation = QuantizedActivation(
        torch.randint(-12, 13, (6, 24), dtype=torch.int8, device=DEVICE), torch.rand(6, 1, device=DEVICE)
    )
    gate = torch.randn(5, 2, device=DEVICE).T if epilogue in ("gate", "both") else None
    residual = torch.randn(5, 6, device=DEVICE).T if epilogue in ("residual", "both") else None
    given = Epilogue("silu" if epilogue == "silu" else None, gate, residual)
    with use_tile(SMALL_TILE):
        found, defined = (
            BACKENDS[b].linear(activation, [packed_weight(5, 24, 0)], given)[0] for b in ("triton", "reference")
        )
    assert torch.allclose(found, defined, rtol=0, atol=1e-5) if epilogue == "silu" else torch.equal(found, defined)


@pytest.mark.parametrize("name", ["e2m3", "int8"])
def test_wider_weights_run_as_in_the_torch_backend(name: str) -> None:
    fmt = format_from_json(name)
    codes = torch.randint(0, 1 << fmt.bits, (5, 24), dtype=torch.uint8, device=DEVICE)
    weight = PackedWeight(codes, torch.ones(5, 1, device=DEVICE), None, (fmt,), packed_level_tables((fmt,)))
    activation = QuantizedActivation(
        torch.randint(-12, 13, (6, 24), dtype=torch.int8, device=DEVICE), torch.ones(6, 1, device=DEVICE)
    )
    found, defined = (BACKENDS[b].linear(activation, [weight])[0] for b in ("triton", "torch"))
    assert torch.equal(found, defined)
