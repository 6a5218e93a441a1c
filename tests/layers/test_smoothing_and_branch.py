"""HQLinear with a smoothed input and a low-rank branch: what is computed, in which basis, and what is kept."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from oracles import U32
from tiny import RUNNABLE

from hqdit.errors import CheckpointError, UsageError
from hqdit.formats.catalog import INT4, INT8
from hqdit.kernels.selection import use_backend
from hqdit.layers.linear import HQLinear
from hqdit.numerics.error import relative_error
from hqdit.quantizers.quantized_tensor import round_to_nearest, weight_scales
from hqdit.quantizers.spec import ActivationSpec, LinearSpec, WeightSpec
from hqdit.transforms.rotation import plan_rotation, random_signs, rotate

WIDTH, OUT, RANK = 72, 20, 5
PLACES, ROTATIONS = ("none", "folded", "applied"), ("none", "full", "block:36")


class Parts:
    """A layer made by hand: y = Q(x') Q(R)^T + x D^T U^T + b with x' = x * input_scale."""

    def __init__(self, place: str, rotation: str, rank: int, weight_format: Any = INT4, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.float_weight = torch.from_numpy(rng.standard_normal((OUT, WIDTH)))  # reads the plain input
        self.bias = torch.from_numpy(rng.standard_normal(OUT)).float()
        self.scale = None if place == "none" else torch.from_numpy(np.exp(0.3 * rng.standard_normal(WIDTH))).float()
        self.spec = LinearSpec(
            "fc2",
            WIDTH,
            OUT,
            WeightSpec((weight_format,), low_rank=rank),
            ActivationSpec(INT8, smoothing=place),
            plan_rotation(rotation, WIDTH, "fc2"),
        )
        self.signs = None if rotation == "none" else random_signs(WIDTH, seed, "fc2")
        rest = self.float_weight if self.scale is None else self.float_weight / self.scale.double()
        self.branch = None
        if rank:
            down = torch.from_numpy(0.3 * rng.standard_normal((rank, WIDTH)))
            up = torch.from_numpy(0.3 * rng.standard_normal((OUT, rank)))
            self.branch = down.bfloat16(), up.bfloat16()
            smoothed_down = self.branch[0].double()
            if place == "applied" and self.scale is not None:  # the branch reads the plain input
                smoothed_down = smoothed_down / self.scale.double()
            rest = rest - self.branch[1].double() @ smoothed_down
        rotated = rotate(rest, self.spec.rotation, self.signs).float()
        scale = weight_scales(rotated, self.spec.weight, None, "absmax")
        quantized = round_to_nearest(rotated, scale, self.spec.weight, None)
        self.layer = HQLinear.from_quantized(
            self.spec, quantized, self.bias, self.signs, input_scale=self.scale, branch=self.branch
        )

    def delivered(self, x: torch.Tensor) -> torch.Tensor:
        """What the layers before this one make of the plain input."""
        return x * self.scale if self.spec.activation.smoothing == "folded" and self.scale is not None else x


def inputs(tokens: int = 7) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(9).standard_normal((tokens, WIDTH))).float()


each_kind = pytest.mark.parametrize(
    ("place", "rotation", "rank"), [*itertools.product(PLACES, ROTATIONS, (0, RANK))], ids=str
)


@each_kind
def test_layer_stands_for_the_float_one(place: str, rotation: str, rank: int) -> None:
    parts, x = Parts(place, rotation, rank, INT8), inputs()
    exact = x.double() @ parts.float_weight.T + parts.bias.double()
    # Rounding to 8 bits costs 0.6 % for each side. Forgotten or repeated factors give 30 %, a forgotten branch 20 %.
    assert relative_error(exact, parts.layer(parts.delivered(x))) < 0.05
    assert relative_error(exact - parts.bias, x @ parts.layer.dequantized_weight().T) < 0.05
    assert torch.equal(parts.layer.delivered(x), parts.delivered(x))


@each_kind
def test_gradient_is_that_of_the_delivered_weight(place: str, rotation: str, rank: int) -> None:
    parts = Parts(place, rotation, rank)
    x = parts.delivered(inputs()).requires_grad_()
    weight = parts.layer.delivered_weight()
    assert torch.allclose(x @ weight.T, inputs() @ parts.layer.dequantized_weight().T, rtol=1e-4, atol=1e-4)
    parts.layer(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, weight.sum(dim=0).expand_as(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", RUNNABLE)
@each_kind
def test_branch_is_added_to_the_quantized_product(place: str, rotation: str, rank: int, backend: str) -> None:
    parts, x = Parts(place, rotation, rank), inputs()
    with use_backend(backend):
        output = parts.layer(x)
        product = parts.layer.forward_quantized(parts.layer.quantize_input(x))
    branch, size = torch.zeros(len(x), OUT, dtype=torch.float64), torch.zeros(len(x), OUT, dtype=torch.float64)
    if parts.branch is not None:
        down, up = (factor.double() for factor in parts.branch)
        branch = (x.double() @ down.T) @ up.T
        size = (x.double().abs() @ down.abs().T) @ up.abs().T
    # Two products in float32 and one addition.
    allowed = (WIDTH + RANK + 2) * U32 * size + U32 * (product.double().abs() + branch.abs()) * 2
    assert bool(((output.double() - product.double() - branch).abs() <= allowed).all())
    assert rank or torch.equal(output, product)


@pytest.mark.parametrize("rotation", ROTATIONS)
def test_applied_is_folded_with_the_factors_inside(rotation: str) -> None:
    applied, folded, x = Parts("applied", rotation, 0), Parts("folded", rotation, 0), inputs()
    assert applied.scale is not None
    with use_backend("reference"):
        assert torch.equal(applied.layer(x), folded.layer(x * applied.scale))
    assert applied.layer.preparation.input_scale is not None and folded.layer.preparation.input_scale is None


@each_kind
def test_state_dict_and_json_round_trip(place: str, rotation: str, rank: int) -> None:
    parts, x = Parts(place, rotation, rank), inputs()
    state = parts.layer.state_dict()
    assert ("input_scale" in state) == (place != "none")
    assert ("low_rank_down" in state) == ("low_rank_up" in state) == (rank > 0)
    restored = HQLinear(LinearSpec.from_json("fc2", parts.spec.to_json()))
    restored.load_state_dict(state, strict=True)
    assert torch.equal(restored(x), parts.layer(x)) and restored.spec == parts.spec
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in state.items()}
    assert parts.layer.storage_bytes == sum(sizes.values()) - sizes["bias"]
    assert sizes.get("low_rank_down", 0) + sizes.get("low_rank_up", 0) == 2 * rank * (WIDTH + OUT)


def test_specs_without_smoothing_and_branch_have_the_keys_of_before() -> None:
    value = Parts("none", "full", 0).spec.to_json()
    assert set(value["weight"]) == {"formats", "granularity"}
    assert set(value["activation"]) == {"format", "granularity"}


@pytest.mark.parametrize(("side", "key"), [("weight", "low_rank"), ("activation", "smoothing")])
@pytest.mark.parametrize("wrong", [-1, 1.5, "x", None, [], OUT + 1, 0, "none"], ids=repr)
def test_specs_that_cannot_be(side: str, key: str, wrong: object) -> None:
    value = Parts("applied", "none", RANK).spec.to_json()
    value[side][key] = wrong
    with pytest.raises(CheckpointError, match="layer fc2"):
        LinearSpec.from_json("fc2", value)


def test_rank_beyond_the_layer() -> None:
    assert Parts("none", "none", OUT).layer.low_rank_up is not None
    with pytest.raises(
        UsageError, match=f"fc2: found a low-rank branch of rank {OUT + 1} .* from 0 to {OUT}.*--low-rank"
    ):
        Parts("none", "none", OUT + 1)
    with pytest.raises(UsageError, match="no-fold-value-rotation"):
        LinearSpec(
            "out",
            144,
            144,
            WeightSpec((INT4,), low_rank=2),
            ActivationSpec(INT4),
            plan_rotation("full", 144, "out", 36),
        )


def test_tensors_that_are_missing_or_too_much() -> None:
    parts = Parts("applied", "none", RANK)
    quantized = round_to_nearest(torch.ones(OUT, WIDTH), torch.ones(OUT, 1), parts.spec.weight, None)
    for name, arguments in {
        "input_scale": {"branch": parts.branch},
        "low_rank_down": {"input_scale": parts.scale},
        "low_rank_up": {"input_scale": parts.scale, "branch": (parts.branch[0], parts.branch[0])},  # type: ignore[index]
    }.items():
        with pytest.raises(ValueError, match=f"fc2: found .* for {name}, needed"):
            HQLinear.from_quantized(parts.spec, quantized, parts.bias, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moving_to_a_dtype_keeps_scales_and_branch(dtype: torch.dtype) -> None:
    parts, x = Parts("applied", "full", RANK), inputs().to(dtype)
    expected = parts.layer(x.float()).to(dtype)
    moved = parts.layer.to(dtype)
    assert moved.low_rank_down is not None and moved.low_rank_down.dtype == torch.bfloat16
    assert moved.input_scale is not None and moved.input_scale.dtype == torch.float32
    moved.bias.data = parts.bias.clone()  # only the bias follows the dtype, and it is rounded
    assert torch.equal(moved(x), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_bad_token_is_nan_and_the_others_are_untouched(bad: float) -> None:
    layer, x = Parts("applied", "full", RANK).layer, inputs()
    with use_backend("reference"):
        clean = layer(x)
        x[3, 7] = bad
        output = layer(x)
    assert bool(output[3].isnan().all()) and bool(clean.isfinite().all())
    assert torch.equal(output[[0, 1, 2, 4, 5, 6]], clean[[0, 1, 2, 4, 5, 6]])


def test_layers_share_an_input_only_with_equal_factors() -> None:
    first, second = Parts("applied", "none", 0).layer, Parts("applied", "none", 0).layer
    assert first.shares_input_with(second)
    assert second.input_scale is not None
    second.input_scale = second.input_scale * 2
    assert not first.shares_input_with(second)
    assert not first.shares_input_with(Parts("folded", "none", 0).layer)
    assert not first.shares_input_with(Parts("none", "none", 0).layer)
    assert Parts("none", "none", 0).layer.is_fusible and not Parts("none", "none", RANK).layer.is_fusible
