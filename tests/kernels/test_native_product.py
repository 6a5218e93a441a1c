"""The native product against exact sums and the documented float32 operations: not one bit may differ."""

from __future__ import annotations

import itertools
import os
import sys
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from native_cases import (
    INSTRUCTION_SETS,
    Product,
    ProductCase,
    bits,
    check_product,
    each_instruction_set,
    gelu,
    needs_native,
    product_cases,
)
from oracles import GRIDS

from hqdit.kernels import native_library, native_ops

pytestmark = needs_native

#: One plain call, which tests change in one respect.
PLAIN = ProductCase(
    tokens=7, rows=(13,), group_size=144, groups=1, is_unsigned=False, token_scales=(True, False),
    weight_scales=(True, False), tables=0, edge="random", has_bias=False, function=None, samples=0,
    dtype=torch.float32, padding=(0, 0), bad_token=False, threads=1, seed=0,
)  # fmt: skip

#: A case is one random product, compared on every instruction set of the machine.
CASES, SOAK_CASES = 1000, int(os.environ.get("HQDIT_SOAK_CASES", "20000"))


def check_random_cases(count: int) -> Counter[str]:
    """Compare `count` random cases; how many products, and calls of a kernel, that were."""
    done: Counter[str] = Counter()

    @settings(max_examples=count, database=None)
    @given(product_cases())
    def check(case: ProductCase) -> None:
        done["calls"] += check_product(case)
        done["cases"] += 1

    check()
    return done


def test_no_bit_differs_in_random_products() -> None:
    done = check_random_cases(CASES)
    # Fewer would mean that the generator repeats itself.
    assert done["cases"] >= CASES
    assert done["calls"] == done["cases"] * len(INSTRUCTION_SETS)


@pytest.mark.soak
@pytest.mark.timeout(6 * 3600)
def test_no_bit_differs_in_a_soak(record_property: Any, capsys: pytest.CaptureFixture[str]) -> None:
    # benchmarks/native_soak.py reads these properties.
    done = check_random_cases(SOAK_CASES)
    assert done["cases"] >= SOAK_CASES
    for name, count in done.items():
        record_property(name, count)
    record_property("instruction_sets", ",".join(INSTRUCTION_SETS))
    with capsys.disabled():
        sys.stdout.write(f"\nnative product: {done['cases']} cases, {done['calls']} calls, no bit differs\n")


# Corners that random cases may miss


@pytest.mark.parametrize("tokens", range(66))
def test_few_tokens(tokens: int) -> None:
    # The code for one token, for a few and for full tiles are different loops.
    for rows, width in ((1, 2), (17, 70), (49, 130)):
        check_product(replace(PLAIN, tokens=tokens, rows=(rows,), group_size=width, seed=tokens))


@pytest.mark.parametrize("width", [*range(2, 140, 2), 190, 254, 256, 258, 510, 514])
def test_every_tail_of_the_width(width: int) -> None:
    for tokens, rows in ((1, 5), (19, 33)):
        check_product(replace(PLAIN, tokens=tokens, rows=(rows,), group_size=width, has_bias=True, seed=width))


@pytest.mark.parametrize("rows", [*range(0, 70), 95, 96, 97, 127, 128, 129, 143, 144, 145])
def test_every_tail_of_the_output_channels(rows: int) -> None:
    for tokens in (1, 18):
        check_product(replace(PLAIN, tokens=tokens, rows=(rows,), padding=(1, 1), seed=rows))


@pytest.mark.parametrize("size", [*range(4, 132, 4), 144, 192, 256])
def test_every_group_size(size: int) -> None:
    for groups, tokens in itertools.product((1, 2, 5), (1, 18)):
        both = replace(PLAIN, tokens=tokens, group_size=size, groups=groups, seed=size)
        check_product(replace(both, token_scales=(True, True), weight_scales=(True, True)))
        check_product(replace(both, token_scales=(True, True), weight_scales=(False, False), is_unsigned=True))


@pytest.mark.parametrize("is_unsigned", [False, True])
@pytest.mark.parametrize("level", [-128, -127, 127])
def test_largest_sums(level: int, is_unsigned: bool) -> None:
    # Where a kernel adds products in 16 bits, or shifts int8 levels to unsigned ones, this is what overflows first.
    for tokens, width in itertools.product((1, 4, 33), (64, 576, 4608)):
        product = Product(replace(PLAIN, tokens=tokens, group_size=width, edge="largest", is_unsigned=is_unsigned))
        product.tables[0][:] = level
        assert np.abs(product.before_function(0)).max() > 0
        for isa in INSTRUCTION_SETS:
            (found,) = product.run(isa, 1)
            assert np.array_equal(bits(found), bits(product.expected(0))), isa


@pytest.mark.parametrize("activation", [name for name, grid in GRIDS.items() if max(grid.values()) <= 127])
@pytest.mark.parametrize("weight", [name for name, grid in GRIDS.items() if len(grid) <= 16])
def test_every_pair_of_formats_in_every_granularity(weight: str, activation: str) -> None:
    table = np.array([[GRIDS[weight][code] for code in range(16)]], dtype=np.int8)
    granularities = itertools.product([(True, True), (True, False), (False, False)], repeat=2)
    for seed, (token_scales, weight_scales) in enumerate(granularities):
        groups = 4 if token_scales[1] or weight_scales[1] else 1
        case = replace(
            PLAIN, group_size=144 // groups, groups=groups, token_scales=token_scales, weight_scales=weight_scales
        )
        product = Product(replace(case, seed=seed))
        product.tables[0][:] = table
        found_levels = np.random.default_rng(seed).choice(sorted(set(GRIDS[activation].values())), (7, 144))
        product.levels[:] = found_levels
        for isa in INSTRUCTION_SETS:
            (found,) = product.run(isa, 1)
            assert np.array_equal(bits(found), bits(product.expected(0))), (isa, token_scales, weight_scales)


def test_three_weights_of_one_activation_are_three_products() -> None:
    case = replace(PLAIN, tokens=70, rows=(72, 0, 145), has_bias=True, tables=3, seed=5)
    product = Product(case)
    for isa in INSTRUCTION_SETS:
        together = product.run(isa, 2)
        for weight, output in enumerate(together):
            assert np.array_equal(bits(output), bits(product.expected(weight)))


@each_instruction_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_do_not_see_each_other(isa: str, dtype: torch.dtype) -> None:
    case = replace(PLAIN, tokens=67, rows=(50,), tables=2, samples=67, has_bias=True, dtype=dtype)
    product = Product(case)
    (together,) = product.run(isa, 1)
    levels, token_scale, *rest = product.arguments
    gate, residual = rest[6], rest[7]
    with native_library.use_instruction_set(isa):
        for token in range(67):
            one = slice(token, token + 1)
            rest[6], rest[7] = gate[one], residual[one]
            (alone,) = native_ops.product(levels[one], token_scale[one], *rest)
            assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@each_instruction_set
def test_any_number_of_threads_gives_the_same_bits(isa: str, threads: int) -> None:
    for tokens, rows in ((1, 1), (1, 600), (65, 3), (130, 400)):
        product = Product(replace(PLAIN, tokens=tokens, rows=(rows,), group_size=36, groups=4, function="gelu-tanh"))
        one, several = product.run(isa, 1), product.run(isa, threads)
        assert np.array_equal(bits(one[0]), bits(several[0]))


def test_nothing_outside_the_outputs_is_written() -> None:
    # Inputs are views of wider tensors; these stay as they were.
    product = Product(replace(PLAIN, tokens=65, rows=(97,), samples=5, padding=(3, 5), tables=2))
    wide = [product.arguments[at] for at in (0, 8, 9)] + [product.arguments[2][0]]
    before = [tensor._base.clone() for tensor in wide]
    for isa in INSTRUCTION_SETS:
        product.run(isa, 2)
        for tensor, copy in zip(wide, before, strict=True):
            assert np.array_equal(tensor._base.view(torch.uint8).numpy(), copy.view(torch.uint8).numpy()), isa


# GELU


@pytest.mark.parametrize("function", ["gelu-tanh", "gelu-erf"])
@each_instruction_set
def test_gelu_over_its_whole_range(isa: str, function: str) -> None:
    # A product of one level 1 by a weight of 1 gives the token's scale: any float32 number can be had.
    tiny_to_huge = np.geomspace(1e-38, 1e30, 20_000)
    parts = [np.linspace(-14, 14, 200_001), tiny_to_huge, -tiny_to_huge, [0.0, -0.0, np.inf]]
    y = np.concatenate(parts).astype(np.float32)
    levels = torch.zeros(len(y), 2, dtype=torch.int8)
    levels[:, 0] = 1
    table = torch.zeros(1, 16, dtype=torch.int8)
    table[0, 1] = 1
    packed = torch.ones(1, 1, dtype=torch.uint8)
    with native_library.use_instruction_set(isa):
        (found,) = native_ops.product(
            levels, torch.from_numpy(y).unsqueeze(1), [packed], [table], [None], [torch.ones(1, 1)], [None], function,
            None, None, torch.float32,
        )  # fmt: skip
    exact, error = gelu(y[:-1].astype(np.float64), function)
    assert bool((np.abs(found[:-1, 0].double().numpy() - exact) <= error).all())
    assert found[-1, 0] == torch.inf
