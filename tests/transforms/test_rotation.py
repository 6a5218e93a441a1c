"""Rotations against dense float64 matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import U32, U64, Array, rotation_matrix, transform_bound

from hqdit.errors import NumericsError, UsageError
from hqdit.transforms.hadamard import hadamard_matrix, require_factors, usable_blocks
from hqdit.transforms.rotation import (
    RotationSpec,
    fold_into_value,
    parse_block,
    plan_rotation,
    random_signs,
    rotate,
    rotate_online,
    unrotate,
)

SPECS = [
    plan_rotation("none", 144, "test"),
    plan_rotation("full", 144, "test"),
    plan_rotation("full", 64, "test"),
    plan_rotation("full", 72, "test"),
    plan_rotation("block:4", 144, "test"),
    plan_rotation("block:36", 144, "test"),
    plan_rotation("block:16", 144, "test"),
    plan_rotation("full", 144, "test", head_dim=72),
    plan_rotation("full", 144, "test", head_dim=36),
    plan_rotation("full", 96, "test", head_dim=8),  # 12 heads
]
IDS = [f"{spec.describe()} of {spec.width}" for spec in SPECS]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=IDS)


def dense(spec: RotationSpec, signs: torch.Tensor) -> Array:
    """R by its definition in the module's table."""
    if spec.kind == "none":
        return np.eye(spec.width)
    if spec.kind == "heads":
        return rotation_matrix(signs, hadamard_matrix(spec.heads), hadamard_matrix(spec.block))
    return rotation_matrix(signs, hadamard_matrix(spec.block), repeats=spec.width // spec.block)


def rounding(spec: RotationSpec) -> float:
    """Bound of |rotate(x) - x R| / |x| in float32; a folded rotation is two transforms."""
    if spec.is_identity:
        return 0.0
    orders = [spec.block, spec.heads] if spec.is_folded else [spec.block]
    factors = [require_factors(order, "test") for order in orders]
    return sum(transform_bound([f.sylvester], f.paley) for f in factors)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The rotation as a matrix


@each_spec
def test_rotate_multiplies_by_the_matrix(spec: RotationSpec) -> None:
    signs = random_signs(spec.width, 3, "a")
    matrix = dense(spec, signs)
    identity = torch.eye(spec.width, dtype=torch.float64)
    # Every entry is a sum of at most a few hundred +-1, exact, times one or two constants with an error of 2^-53 each.
    np.testing.assert_allclose(rotate(identity, spec, signs).numpy(), matrix, rtol=8 * U64, atol=0)


@each_spec
def test_matrix_is_orthogonal(spec: RotationSpec) -> None:
    matrix = rotate(torch.eye(spec.width, dtype=torch.float64), spec, random_signs(spec.width, 4, "b")).numpy()
    # A sum of `width` products of at most 1 / width in magnitude, each with a handful of roundings.
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(spec.width), rtol=0, atol=(spec.width + 16) * U64)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(spec.width), rtol=0, atol=(spec.width + 16) * U64)


@each_spec
def test_product_is_unchanged_in_float32(spec: RotationSpec) -> None:
    signs = random_signs(spec.width, 5, "c")
    x, w = randn(7, spec.width).float(), randn(9, spec.width, seed=1).float()
    product = rotate(x, spec, signs).double() @ rotate(w, spec, signs).double().T
    exact = x.double() @ w.double().T
    each = rounding(spec)
    # |x' w' - x w| <= |x' - xR| |w'| + |xR| |w' - wR|, and the two float64 products round too.
    allowed = (2 * each + each**2 + 2 * spec.width * U64) * x.double().norm(dim=1)[:, None] * w.double().norm(dim=1)
    assert bool(((product - exact).abs() <= allowed).all())


@each_spec
def test_float32_rotation_is_within_its_bound(spec: RotationSpec) -> None:
    signs = random_signs(spec.width, 6, "d")
    x = randn(11, spec.width, seed=2).float()
    error = rotate(x, spec, signs).double() - x.double() @ torch.from_numpy(dense(spec, signs))
    assert bool((error.norm(dim=1) <= rounding(spec) * x.double().norm(dim=1)).all())


@pytest.mark.parametrize(("rotation", "width"), [("full", 64), ("full", 256), ("block:4", 144), ("block:16", 144)])
def test_square_powers_of_two_rotate_integers_exactly(rotation: str, width: int) -> None:
    # 1 / sqrt(4^k) is a power of two, so that nothing rounds.
    spec = plan_rotation(rotation, width, "test")
    signs = random_signs(width, 7, "e")
    x = torch.randint(-50, 51, (5, width), generator=torch.Generator().manual_seed(3)).float()
    exact = x.double().numpy() @ dense(spec, signs)
    assert np.array_equal(rotate(x, spec, signs).numpy(), exact)
    assert torch.equal(unrotate(rotate(x, spec, signs), spec, signs), x)


@each_spec
def test_unrotate_is_the_inverse(spec: RotationSpec) -> None:
    signs = random_signs(spec.width, 8, "f")
    x = randn(6, spec.width, seed=4)
    back = unrotate(rotate(x, spec, signs), spec, signs)
    # A float64 transform of x, one of the identity (whose error is at most sqrt(width) that of a row), and a product of
    # `width` terms, whose error is at most width U64 |x| |R| with a matrix |R| of norm sqrt(width) at most.
    root = math.sqrt(spec.width)
    allowed = ((1 + root) * rounding(spec) * U64 / U32 + spec.width * root * U64) * x.norm(dim=1)
    assert bool(((back - x).norm(dim=1) <= allowed).all())
    x32 = x.float()
    back32 = unrotate(rotate(x32, spec, signs), spec, signs)
    assert back32.dtype == torch.float32
    assert bool(((back32 - x32).double().norm(dim=1) <= (rounding(spec) + 2 * U32) * x.norm(dim=1)).all())


@each_spec
def test_any_shape_and_no_tokens(spec: RotationSpec) -> None:
    signs = random_signs(spec.width, 9, "g")
    x = randn(2, 3, spec.width)
    flat = rotate(x.reshape(6, -1), spec, signs)
    assert torch.equal(rotate(x, spec, signs), flat.reshape(2, 3, -1))
    assert torch.equal(rotate(x[0, 0], spec, signs), flat[0])
    assert torch.equal(rotate_online(x, spec, signs)[0, 1], rotate_online(x[0, 1], spec, signs))
    for empty in (x[:0], x[:, :0]):
        assert rotate(empty, spec, signs).shape == empty.shape
        assert rotate_online(empty, spec, signs).shape == empty.shape
    strided = randn(spec.width, 4).T
    assert torch.equal(rotate(strided, spec, signs), rotate(strided.contiguous(), spec, signs))


@each_spec
def test_input_is_not_changed(spec: RotationSpec) -> None:
    x = randn(3, spec.width).float()
    before = x.clone()
    rotate(x, spec, random_signs(spec.width, 0, "h"))
    rotate_online(x, spec, random_signs(spec.width, 0, "h"))
    assert torch.equal(x, before)


def test_outlier_is_spread_evenly() -> None:
    # What the rotation is for: one channel of size 1 becomes 144 channels of 1 / 12.
    spec = plan_rotation("full", 144, "test")
    one = torch.zeros(1, 144, dtype=torch.float64)
    one[0, 17] = 1.0
    np.testing.assert_allclose(rotate(one, spec, random_signs(144, 0, "i")).abs().numpy(), 1 / 12, rtol=8 * U64)


def test_full_rotation_needs_its_signs() -> None:
    with pytest.raises(ValueError, match="signs"):
        rotate(torch.ones(2, 64), plan_rotation("full", 64, "test"), None)
    with pytest.raises(ValueError, match="signs"):
        unrotate(torch.ones(2, 64), plan_rotation("full", 64, "test"), None)


# The fold into the value projection


@pytest.mark.parametrize(("heads", "head_dim"), [(2, 72), (12, 8), (4, 36), (16, 16)])
def test_attention_output_is_rotated_by_folding_and_online_part(heads: int, head_dim: int) -> None:
    width, tokens = heads * head_dim, 5
    spec = plan_rotation("full", width, "test", head_dim=head_dim)
    signs = random_signs(width, 1, "out")
    hidden, weight, bias = randn(tokens, 48), randn(width, 48, seed=1), randn(width, seed=2)
    attention = torch.softmax(randn(heads, tokens, tokens, seed=3), dim=-1)

    def attend(weight: torch.Tensor, bias: torch.Tensor, hidden: torch.Tensor = hidden) -> torch.Tensor:
        value = (hidden @ weight.T + bias).reshape(tokens, heads, head_dim).transpose(0, 1)
        return (attention @ value).transpose(0, 1).reshape(tokens, width)

    folded_weight, folded_bias = fold_into_value(weight, bias, spec, signs)
    assert folded_bias is not None
    assert folded_weight.is_contiguous()
    online = rotate_online(attend(folded_weight, folded_bias), spec, signs)
    offline = attend(weight, bias).numpy() @ dense(spec, signs)
    # float64 throughout: sums of at most 48, `tokens` and `width` terms, of these magnitudes.
    magnitude = attend(weight.abs(), bias.abs(), hidden.abs()).numpy() @ np.abs(dense(spec, signs))
    assert bool((np.abs(online.numpy() - offline) <= 2 * (48 + tokens + width + 16) * U64 * magnitude).all())


def test_fold_without_bias_and_with_its_definition() -> None:
    spec = plan_rotation("full", 96, "test", head_dim=8)
    signs = random_signs(96, 2, "v")
    weight = randn(96, 10)
    folded, no_bias = fold_into_value(weight, None, spec, signs)
    assert no_bias is None
    matrix = rotation_matrix(signs, hadamard_matrix(8), repeats=12)  # diag(s) (I (x) H_headdim)
    magnitude = (weight.T.abs().numpy() @ np.abs(matrix)).T
    assert bool((np.abs(folded.numpy() - (weight.T.numpy() @ matrix).T) <= 2 * (8 + 4) * U64 * magnitude).all())


# Random signs


@given(st.integers(1, 300), st.integers(0, 2**63 - 1), st.text(max_size=20))
def test_signs_depend_on_seed_and_stream_only(width: int, seed: int, stream: str) -> None:
    first = random_signs(width, seed, stream)
    torch.rand(3)
    np.random.default_rng(0).random()
    assert torch.equal(random_signs(width, seed, stream), first)
    assert first.dtype == torch.float32
    assert first.shape == (width,)
    assert set(first.tolist()) <= {-1.0, 1.0}
    state = torch.get_rng_state()
    random_signs(width, seed, stream)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers move


def test_signs_are_the_same_on_every_machine() -> None:
    # Pinned: a checkpoint's rotation must not change with a release of NumPy. The digest and Philox are specified.
    assert "".join("+" if sign > 0 else "-" for sign in random_signs(24, 0, "layer")) == "+--+---++++++-++-++-++++"


def test_signs_differ_between_streams_and_seeds_and_are_balanced() -> None:
    draws = [random_signs(1152, seed, stream) for seed in range(20) for stream in ("a", "b", "ab", "")]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            # Independent: the sum of 1152 products has deviation 34; 8 deviations never happen.
            assert abs(float(one @ other)) < 8 * math.sqrt(1152)
        assert abs(float(one.sum())) < 8 * math.sqrt(1152)


# Plans


@pytest.mark.parametrize(
    ("rotation", "width", "head_dim", "text"),
    [
        ("none", 7, None, "none"),
        ("full", 144, None, "full 4*36(paley2)"),
        ("full", 4608, None, "full 128*36(paley2)"),
        ("block:64", 1152, None, "block:64 64"),
        ("block:36", 144, None, "block:36 36(paley2)"),
        ("full", 1152, 72, "heads 16 x 2*36(paley2)"),
        ("full", 96, 8, "heads 12(paley1) x 8"),
        ("none", 144, 72, "none"),
        ("block:36", 144, 72, "block:36 36(paley2)"),  # a block rotation is never folded
    ],
)
def test_plan_says_what_is_used(rotation: str, width: int, head_dim: int | None, text: str) -> None:
    spec = plan_rotation(rotation, width, "layer x", head_dim)
    assert spec.describe() == text
    assert RotationSpec.from_json(spec.to_json(), width) == spec


def test_full_width_without_a_matrix_is_refused() -> None:
    with pytest.raises(NumericsError) as error:
        plan_rotation("full", 100, "layer blocks.0.fc1")
    assert str(error.value).startswith("layer blocks.0.fc1: found width 100")
    assert "[4, 20]" in str(error.value)
    with pytest.raises(NumericsError, match="layer y"):
        plan_rotation("full", 6 * 8, "layer y (across heads)", head_dim=8)  # 6 heads


def test_block_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(UsageError) as error:
        plan_rotation("block:64", 144, "layer x")
    assert str(error.value).startswith("layer x: found --rotation block:64 on width 144")
    assert str(usable_blocks(144)) in str(error.value)


@pytest.mark.parametrize("order", [3, 52, 92, 100])
def test_block_without_a_matrix_is_a_usage_error(order: int) -> None:
    with pytest.raises(UsageError, match=f"order {order} has no Hadamard matrix"):
        parse_block(f"block:{order}")
    with pytest.raises(UsageError, match=f"order {order} has no Hadamard matrix"):
        plan_rotation(f"block:{order}", 5200 * 69, "layer x")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "block",
        "block:",
        "block:abc",
        "block:-4",
        "block:0",
        "block:1",
        "block:4.0",
        "block:²",
        "blocks:4",
        "Full",
        "half",
    ],
)
def test_other_words_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="needed full, none or block:B"):
        plan_rotation(text, 144, "layer x")


@pytest.mark.parametrize(
    ("kind", "width", "block"),
    [("block", 144, 64), ("full", 144, 72), ("none", 144, 2), ("block", 144, 0), ("half", 8, 8)],
)
def test_specs_that_would_mix_tokens_are_refused(kind: str, width: int, block: int) -> None:
    with pytest.raises(UsageError, match="blocks that divide the width"):
        RotationSpec(kind, width, block)
