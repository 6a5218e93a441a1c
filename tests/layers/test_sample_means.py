"""Layers that split off the mean of each sample's tokens: what is computed, of whose tokens, on every backend."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import RUNNABLE
from torch import Tensor

from hqdit.errors import CheckpointError, UsageError
from hqdit.formats.catalog import E2M1, format_from_json
from hqdit.kernels.activation import quantize_activation, quantize_centred, split_means
from hqdit.kernels.linear import Epilogue
from hqdit.kernels.preparation import LayerNormModulate, Pointwise
from hqdit.kernels.selection import current_backend, use_backend
from hqdit.layers.linear import HQLinear
from hqdit.layers.pointwise_conv import HQPointwiseConv2d
from hqdit.quantizers.quantized_tensor import QuantizedTensor, round_to_nearest, weight_scales
from hqdit.quantizers.spec import SHIFT_DTYPE, ActivationSpec, LinearSpec, WeightSpec
from hqdit.transforms.rotation import plan_rotation, random_signs, rotate, unrotate

WIDTH, OUT = 72, 20
SAMPLES, TOKENS = 3, 10
LLOYD_MAX = format_from_json("lloyd-max")

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "token": ("full", {}),
    "groups": ("full", {"granularity": "group", "group_size": 12}),
    "short groups": ("block:36", {"granularity": "group", "group_size": 36, "scale_format": "e4m3"}),
    "no rotation": ("none", {}),
    "emphasised": ("full", {"emphasis": 2}),
}


class Parts:
    """A layer made by hand, with an input whose samples have means of their own."""

    def __init__(self, kind: str, seed: int = 0, fmt: Any = LLOYD_MAX, layer_class: type[HQLinear] = HQLinear) -> None:
        rng = np.random.default_rng(seed)
        rotation, changes = KINDS[kind]
        activation = ActivationSpec(fmt, centring="sample", **{"granularity": "token", **changes})
        group = activation.group_size
        weight = WeightSpec((fmt,), "group" if group else "channel", group)
        self.spec = LinearSpec("fc", WIDTH, OUT, weight, activation, plan_rotation(rotation, WIDTH, "fc"))
        self.signs = None if rotation == "none" else random_signs(WIDTH, seed, "fc")
        self.shift = torch.from_numpy(rng.standard_normal(WIDTH)).to(SHIFT_DTYPE)
        directions = torch.from_numpy(rng.standard_normal((activation.emphasis, WIDTH))).to(torch.bfloat16)
        self.emphasis = directions if activation.emphasis else None
        w = torch.from_numpy(rng.standard_normal((OUT, WIDTH))).float()
        self.quantized: QuantizedTensor = round_to_nearest(w, weight_scales(w, weight, None, "absmax"), weight, None)
        self.bias = torch.from_numpy(rng.standard_normal(OUT)).float()
        self.layer = layer_class.from_quantized(
            self.spec,
            self.quantized,
            self.bias,
            self.signs,
            input_shift=self.shift,
            emphasis=self.emphasis,
        )
        means = 5 * rng.standard_normal((SAMPLES, 1, WIDTH))
        self.x = torch.from_numpy(means + rng.standard_normal((SAMPLES, TOKENS, WIDTH))).float()

    def rotated(self, y: Tensor) -> Tensor:
        """What comes before the means, in float64: shift, emphasis, rotation."""
        y = y.double() - self.shift.double()
        if self.emphasis is not None:
            b = self.emphasis.double()
            y = y + (y @ b.T) @ b
        return rotate(y, self.spec.rotation, self.signs)


def by_definition(parts: Parts, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output without the bias in float64, and the sizes that its rounding errors are relative to, for (S, T, K)."""
    y = parts.rotated(x)
    mean = y.mean(dim=1)
    rest = (y - mean.unsqueeze(1)).flatten(0, 1).float()
    plain = ActivationSpec(**{**vars(parts.spec.activation), "centring": "none", "emphasis": 0})
    levels = quantize_activation(rest, plain).dequantize().double()
    largest = mean.abs().amax(dim=1, keepdim=True)
    of_means = (mean * 127 / largest).round() * largest / 127
    whole = levels.reshape(y.shape) + of_means.unsqueeze(1)
    weight = parts.quantized.dequantize().double()
    return whole @ weight.T, (rest.double().abs().amax() + largest.amax()) * weight.abs().sum(dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(RUNNABLE))
def test_the_output_is_that_of_the_definition(name: str, kind: str) -> None:
    parts = Parts(kind)
    expected, size = by_definition(parts, parts.x)
    with use_backend(name):
        found = parts.layer(parts.x).double() - parts.bias.double()
    # A number that lies on a threshold may round the other way: one step of one number in a few.
    error = (found - expected).abs() / size
    assert float(error.max()) < 0.03 and float((error > 1e-5).double().mean()) < 0.2


@pytest.mark.parametrize("name", sorted(RUNNABLE))
def test_every_backend_gives_the_same_levels(name: str) -> None:
    for kind in KINDS:
        parts = Parts(kind, seed=1)
        with use_backend("reference"):
            expected = parts.layer.quantize_input(parts.x)
        with use_backend(name):
            found = parts.layer.quantize_input(parts.x)
        assert expected.mean is not None and found.mean is not None
        for one, other in ((found, expected), (found.mean, expected.mean)):
            off = (one.levels.int() - other.levels.int()).abs()
            # Levels of a table lie several integers apart; few numbers may take the neighbour's.
            assert int((off > 0).sum()) <= 1 + off.numel() // 500
            assert torch.allclose(one.scale, other.scale, rtol=1e-5 if "short" not in kind else 0.13)


@pytest.mark.parametrize("name", sorted(RUNNABLE))
@settings(max_examples=20)
@given(samples=st.integers(1, 4), tokens=st.integers(1, 9), seed=st.integers(0, 1000))
def test_a_sample_does_not_depend_on_its_neighbours(name: str, samples: int, tokens: int, seed: int) -> None:
    parts = Parts("groups", seed)
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((samples, tokens, WIDTH))).float() + 1
    with use_backend(name):
        together = parts.layer(x)
        alone = [parts.layer(sample.unsqueeze(0)) for sample in x]
    assert torch.equal(together, torch.cat(alone))


def test_tokens_by_themselves_are_one_sample() -> None:
    parts = Parts("token")
    assert torch.equal(parts.layer(parts.x[0]), parts.layer(parts.x[:1])[0])
    assert not torch.equal(parts.layer(parts.x.flatten(0, 1)), parts.layer(parts.x).flatten(0, 1))
    assert parts.layer(parts.x[:0]).shape == (0, TOKENS, OUT)


def test_what_a_sample_shares_costs_no_levels() -> None:
    parts = Parts("token")
    offset = 100 * torch.randn(SAMPLES, 1, WIDTH, generator=torch.Generator().manual_seed(2))
    plain, moved = parts.layer.quantize_input(parts.x), parts.layer.quantize_input(parts.x + offset)
    differ = float((plain.levels != moved.levels).double().mean())
    assert differ < 0.01
    assert torch.allclose(plain.scale, moved.scale, rtol=1e-3)


@pytest.mark.parametrize("name", sorted(RUNNABLE))
@pytest.mark.parametrize("front", ["modulated", "gelu", None])
def test_fronts_come_before_the_means(name: str, front: str | None) -> None:
    parts, rng = Parts("groups"), torch.Generator().manual_seed(4)
    scale, shift = (torch.randn(SAMPLES, WIDTH, generator=rng) for _ in range(2))
    fronts = {"modulated": LayerNormModulate(scale, shift, 1e-6), "gelu": Pointwise("gelu-tanh"), None: None}
    normal = torch.nn.functional.layer_norm(parts.x, (WIDTH,), eps=1e-6)
    applied = {
        "modulated": normal * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1),
        "gelu": torch.nn.functional.gelu(parts.x, approximate="tanh"),
        None: parts.x,
    }
    with use_backend(name):
        found = parts.layer.quantize_input(parts.x, fronts[front])
        expected = parts.layer.quantize_input(applied[front])
    assert float((found.levels != expected.levels).double().mean()) < 0.01


@pytest.mark.parametrize("name", sorted(RUNNABLE))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "gated", "gelu", "gelu gated"])
def test_the_epilogue_follows_the_means(name: str, dtype: torch.dtype, kind: str) -> None:
    parts, rng = Parts("groups"), torch.Generator().manual_seed(5)
    gate = torch.randn(SAMPLES, OUT, generator=rng) if "gated" in kind else None
    residual = torch.randn(SAMPLES * TOKENS, OUT, generator=rng).to(dtype) if "gated" in kind else None
    epilogue = Epilogue("gelu-erf" if "gelu" in kind else None, gate, residual)
    with use_backend(name):
        activation = parts.layer.quantize_input(parts.x)
        (found,) = current_backend().linear(activation, [parts.layer.packed_weight], epilogue, dtype)
        expected = parts.layer(parts.x).double().flatten(0, 1)
    if "gelu" in kind:
        expected = torch.nn.functional.gelu(expected)
    if gate is not None and residual is not None:
        expected = residual.double() + gate.repeat_interleave(TOKENS, dim=0).double() * expected
    assert found.dtype == dtype
    # The order of a handful of sums in float32, then one rounding to the dtype.
    scale = expected.abs().amax()
    assert float((found.double() - expected).abs().max() / scale) < (1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("name", sorted(RUNNABLE))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
def test_a_compiled_layer_gives_the_same_bits(name: str, kind: str) -> None:
    parts = Parts(kind)
    torch._dynamo.reset()
    with use_backend(name), torch.no_grad():
        compiled = torch.compile(parts.layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(parts.x), parts.layer(parts.x))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_token_spoils_its_sample_only(bad: float) -> None:
    parts = Parts("groups")
    x = parts.x.clone()
    x[1, 3, 5] = bad
    found, sound = parts.layer(x), parts.layer(parts.x)
    assert found[1].isnan().all()
    assert torch.equal(found[[0, 2]], sound[[0, 2]])


def test_pixels_of_an_image_are_its_tokens() -> None:
    conv, linear = Parts("token", layer_class=HQPointwiseConv2d), Parts("token")
    images = conv.x.reshape(SAMPLES, 2, TOKENS // 2, WIDTH).movedim(-1, 1)
    expected = linear.layer(linear.x).reshape(SAMPLES, 2, TOKENS // 2, OUT).movedim(-1, 1)
    assert torch.equal(conv.layer(images), expected)
    # One image by itself: its rows are no samples.
    assert torch.equal(conv.layer(images[0]), expected[0])


def test_dequantized_it_is_the_same_function() -> None:
    parts = Parts("emphasised")
    weight, bias = parts.layer.delivered_weight(), parts.layer.delivered_bias()
    found = parts.layer.quantize_input(parts.x).dequantize()
    numbers = unrotate(found.double(), parts.spec.rotation, parts.signs)
    assert parts.emphasis is not None and bias is not None
    b = parts.emphasis.double()
    inverse = torch.linalg.inv(torch.eye(WIDTH, dtype=torch.float64) + b.T @ b)
    seen = (numbers @ inverse + parts.shift.double()).reshape(parts.x.shape)
    expected = seen @ weight.double().T + bias.double()
    assert torch.allclose(parts.layer(parts.x).double(), expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@given(seed=st.integers(0, 2**31), samples=st.integers(1, 5), tokens=st.integers(1, 7))
def test_means_and_rest_make_up_the_input(seed: int, samples: int, tokens: int) -> None:
    x = torch.from_numpy(np.random.default_rng(seed).standard_normal((samples * tokens, 8))).float()
    mean, rest = split_means(x, samples)
    wide = x.double().reshape(samples, tokens, 8)
    assert torch.allclose(mean.double(), wide.mean(dim=1), rtol=0, atol=1e-6)
    assert torch.allclose(rest + mean.repeat_interleave(tokens, dim=0), x, rtol=0, atol=1e-6)
    centred = quantize_centred(x, ActivationSpec(E2M1, centring="sample"), samples=samples)
    assert centred.mean is not None and centred.mean.levels.shape == (samples, 8)
    # A rounding error is at most half the widest gap: 1/6 of absmax for E2M1, 1/254 for the means.
    limit = rest.abs().amax(dim=1) / 6 + mean.abs().amax(dim=1).repeat_interleave(tokens) / 254
    assert ((centred.dequantize() - x).abs().amax(dim=1) <= limit * 1.0001 + 1e-6).all()


def test_the_specification_is_in_the_checkpoint() -> None:
    spec = Parts("groups").spec
    value = spec.to_json()
    assert value["activation"]["centring"] == "sample"
    assert LinearSpec.from_json("fc", json.loads(json.dumps(value))) == spec
    value["activation"]["centring"] = "batch"
    with pytest.raises(CheckpointError, match="needed one of none, static, sample"):
        LinearSpec.from_json("fc", value)
    rotation = plan_rotation("full", WIDTH, "fc")
    with pytest.raises(UsageError, match="--centring static"):
        LinearSpec("fc", WIDTH, OUT, WeightSpec((E2M1,)), ActivationSpec(E2M1, "tensor", centring="sample"), rotation)
