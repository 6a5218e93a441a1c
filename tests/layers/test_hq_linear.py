"""HQLinear against a straight-line recomputation with dense matrices in float64."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import GRIDS, ONE_SIDED_TABLE, U32, Array, nearest_levels, rotation_matrix, transform_bound
from tiny import RUNNABLE
from torch import nn

import hqdit
from hqdit.formats.catalog import E2M1, E4M3, FP4_FORMATS, INT4, INT8
from hqdit.formats.number_format import TableFormat
from hqdit.kernels.selection import use_backend
from hqdit.layers.linear import HQLinear
from hqdit.numerics.codes import decode, unpack_codes
from hqdit.quantizers.quantized_tensor import QuantizedTensor, round_to_nearest, weight_scales
from hqdit.quantizers.spec import ActivationSpec, LinearSpec, WeightSpec
from hqdit.transforms.hadamard import hadamard_matrix, require_factors
from hqdit.transforms.rotation import RotationSpec, pack_signs, plan_rotation, random_signs, rotate, unpack_signs

WIDTH, OUT = 144, 11
ONE_SIDED = TableFormat(ONE_SIDED_TABLE)


def spec_of(
    weight: WeightSpec | None = None,
    activation: ActivationSpec | None = None,
    rotation: str = "full",
    width: int = WIDTH,
    head_dim: int | None = None,
) -> LinearSpec:
    return LinearSpec(
        "fc1",
        width,
        OUT,
        weight or WeightSpec((E2M1,)),
        activation or ActivationSpec(E2M1),
        plan_rotation(rotation, width, "fc1", head_dim),
    )


def label(spec: LinearSpec) -> str:
    weight, activation = spec.weight, spec.activation
    formats = "/".join(map(str, weight.formats)) + (" short" if weight.has_short_scales else "")
    return f"{formats} {weight.granularity} x {activation.format} {activation.granularity} {spec.rotation.describe()}"


SPECS = [
    spec_of(),
    spec_of(rotation="none"),
    spec_of(rotation="block:36"),
    spec_of(rotation="block:16"),
    spec_of(head_dim=72),
    spec_of(head_dim=36),
    spec_of(width=64),
    spec_of(WeightSpec(FP4_FORMATS)),
    spec_of(WeightSpec((INT4,), "group", 48), ActivationSpec(INT4, "group", 48)),
    spec_of(WeightSpec((E2M1,), "tensor"), ActivationSpec(E2M1, "group", 16)),
    spec_of(WeightSpec(FP4_FORMATS, "group", 36), ActivationSpec(INT8)),
    spec_of(WeightSpec((E2M1,)), ActivationSpec(E2M1, "tensor")),
    spec_of(WeightSpec((E2M1,)), ActivationSpec(E2M1, "channel")),
    spec_of(WeightSpec((E2M1,)), ActivationSpec(E2M1, "channel-token")),
    spec_of(WeightSpec((E2M1,), "group", 72), ActivationSpec(ONE_SIDED), rotation="none"),
    spec_of(WeightSpec((INT8,)), ActivationSpec(INT8)),
    spec_of(WeightSpec((E4M3,)), ActivationSpec(E4M3)),
    spec_of(WeightSpec((E2M1,), "group", 16, scale_format="e4m3"), ActivationSpec(E2M1, "group", 16)),
    spec_of(WeightSpec(FP4_FORMATS, "group", 36, scale_format="e4m3"), rotation="block:36"),
]
each_spec = pytest.mark.parametrize("spec", SPECS, ids=label)


class Parts:
    """A layer and everything that it was made of."""

    def __init__(self, spec: LinearSpec, seed: int = 0, bias: bool = True) -> None:
        rng = np.random.default_rng(seed)
        width = spec.in_features
        self.spec = spec
        self.weight = torch.from_numpy(rng.standard_normal((OUT, width))).float()
        self.bias = torch.from_numpy(rng.standard_normal(OUT)).float() if bias else None
        self.signs = None if spec.rotation.is_identity else random_signs(width, seed, "fc1")
        has_channel, has_static = spec.activation.has_channel_scale, spec.activation.has_static_scale
        self.channel_scale = torch.from_numpy(np.exp(rng.standard_normal(width))).float() if has_channel else None
        self.static_scale = torch.tensor([0.31]) if has_static else None
        self.rotated = rotate(self.weight, spec.rotation, self.signs)  # what is quantized
        if self.channel_scale is not None:
            self.rotated = self.rotated * self.channel_scale
        index = torch.from_numpy(rng.integers(0, len(spec.weight.formats), OUT)).to(torch.uint8)
        self.index = index if len(spec.weight.formats) > 1 else None
        scale = weight_scales(self.rotated, spec.weight, self.index, "absmax")
        self.quantized = round_to_nearest(self.rotated, scale, spec.weight, self.index)
        self.layer = HQLinear.from_quantized(
            spec, self.quantized, self.bias, self.signs, self.channel_scale, self.static_scale
        )

    def online_matrix(self) -> Array:
        """What the layer multiplies its input by, dense, in float64."""
        rotation = self.spec.rotation
        if rotation.is_identity:
            return np.eye(rotation.width)
        assert self.signs is not None
        if rotation.is_folded:  # H_heads (x) I: the signs and the part within a head lie in the value projection
            return np.kron(hadamard_matrix(rotation.heads), np.eye(rotation.block)) / math.sqrt(rotation.heads)
        return rotation_matrix(self.signs, hadamard_matrix(rotation.block), repeats=rotation.heads)


def rotation_rounding(rotation: RotationSpec, online: bool = False) -> float:
    """Bound of the relative error of a rotation in float32, or of its online part."""
    if rotation.is_identity:
        return 0.0
    within, across = [rotation.block], [rotation.heads] if rotation.is_folded else []
    orders = across if online and rotation.is_folded else within + across
    return sum(transform_bound([f.sylvester], f.paley) for f in (require_factors(order, "test") for order in orders))


def inputs(width: int = WIDTH, tokens: int = 9, seed: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((tokens, width))).float()


# The forward pass, step by step


@each_spec
def test_forward_is_rotate_quantize_multiply_rescale(spec: LinearSpec) -> None:
    parts, x = Parts(spec), inputs(spec.in_features)
    fmt = spec.activation.format

    # Rotate and divide by the static channel scales, in float64.
    rotated = x.double().numpy() @ parts.online_matrix()
    error = np.full_like(rotated, rotation_rounding(spec.rotation, online=True)) * np.linalg.norm(
        x.double().numpy(), axis=1, keepdims=True
    )
    if parts.channel_scale is not None:
        rotated, error = (v / parts.channel_scale.double().numpy() for v in (rotated, error))
        error = error + 2 * U32 * np.abs(rotated)

    # Scales: the layer's own must be those of the definition up to what rotation may have rounded.
    activation = parts.layer.quantize_input(x)
    width = spec.activation.group_size or spec.in_features
    grouped = np.abs(rotated) if fmt.is_signed else np.maximum(rotated, 0)
    largest = grouped.reshape(len(x), -1, width).max(axis=2)
    if spec.activation.granularity == "tensor":
        expected_scale = np.full((len(x), 1), float(np.float32(0.31)))
    elif spec.activation.granularity == "channel":
        expected_scale = np.ones((len(x), 1))
    else:
        expected_scale = largest / fmt.max_level
    worst = error.reshape(len(x), -1, width).max(axis=2) / fmt.max_level
    scale = activation.scale.double().numpy()
    assert bool((np.abs(scale - expected_scale) <= worst + 2 * U32 * expected_scale).all())

    # Levels: those of the definition wherever no tie is within the rounding error.
    unit = np.repeat(scale, width, axis=1)
    low, high = ((rotated + side * (error + 2 * U32 * np.abs(rotated))) / unit for side in (-1, 1))
    lower, upper = nearest_levels(low, GRIDS[fmt.name]), nearest_levels(high, GRIDS[fmt.name])
    levels = activation.levels.double().numpy()
    assert bool(((lower <= levels) & (levels <= upper)).all())
    assert (lower == upper).mean() > 0.9 or fmt.bits == 8  # so that the check has teeth

    # The product of exactly these levels.
    codes = unpack_codes(parts.layer.qweight, spec.weight.formats[0])
    assert torch.equal(codes, parts.quantized.codes)
    numbers = parts.quantized.dequantize().double().numpy()
    exact = (levels * unit) @ numbers.T + (0 if parts.bias is None else parts.bias.double().numpy())
    magnitude = np.abs(levels * unit) @ np.abs(numbers).T + (0 if parts.bias is None else parts.bias.abs().numpy())
    groups = max(scale.shape[1], parts.quantized.scale.shape[1])
    # int8: per group the conversion, two scales and an addition, then the bias; the dequantized weight of the oracle is
    # rounded once too. float32: products and sums over the whole width instead.
    roundings = groups + 6 if spec.is_int8 else spec.in_features + 4
    output = parts.layer(x)
    assert output.dtype == torch.float32
    assert bool((np.abs(output.double().numpy() - exact) <= roundings * 1.01 * U32 * magnitude).all())


@pytest.mark.parametrize(("rotation", "width"), [("none", 144), ("full", 64), ("block:16", 144), ("block:4", 144)])
def test_exact_where_nothing_rounds(rotation: str, width: int) -> None:
    # Integers, rotations by powers of two, scales by powers of two: every step is exact, and so is the result.
    spec = spec_of(WeightSpec((INT8,), "tensor"), ActivationSpec(INT8, "tensor"), rotation, width)
    rng = np.random.default_rng(2)
    signs = None if rotation == "none" else random_signs(width, 0, "exact")
    matrix = (
        np.eye(width)
        if signs is None
        else rotation_matrix(signs, hadamard_matrix(spec.rotation.block), repeats=spec.rotation.heads)
    )
    x = rng.integers(-2, 3, (6, width)).astype(np.float64)
    codes = torch.from_numpy(rng.integers(0, 256, (OUT, width), dtype=np.uint8))
    levels = decode(codes, INT8).double().numpy()
    weight = QuantizedTensor(codes, torch.tensor([[0.5]]), None, spec.weight)
    layer = HQLinear.from_quantized(spec, weight, None, signs, static_scale=torch.tensor([0.125]))
    rotated = x @ matrix
    assert np.array_equal(rotated * 8, np.round(rotated * 8))  # on the grid of 1 / 8
    a = np.clip(rotated * 8, -128, 127)
    for backend in RUNNABLE:
        with use_backend(backend):
            assert np.array_equal(layer(torch.from_numpy(x).float()).double().numpy(), a @ levels.T * 0.125 * 0.5)


@each_spec
def test_composed_backends_give_the_same_bits(spec: LinearSpec) -> None:
    parts, x = Parts(spec), inputs(spec.in_features)
    outputs = []
    for backend in ("torch", "reference"):
        with use_backend(backend):
            outputs.append(parts.layer(x))
    assert torch.equal(outputs[0], outputs[1])


def saturates_nowhere(spec: LinearSpec) -> bool:
    """Dynamic scales and a signed format; and the whole rotation happens in this layer."""
    dynamic = spec.activation.granularity not in ("tensor", "channel")
    return dynamic and spec.activation.format.is_signed and not spec.rotation.is_folded


@pytest.mark.parametrize("spec", [spec for spec in SPECS if saturates_nowhere(spec)], ids=label)
def test_quantization_error_is_bounded_by_the_grids(spec: LinearSpec) -> None:
    parts, x = Parts(spec), inputs(spec.in_features)
    exact = x.double() @ parts.weight.double().T
    if parts.bias is not None:
        exact = exact + parts.bias.double()

    def reach(scale: torch.Tensor, gap: torch.Tensor | float) -> torch.Tensor:
        """Bound of the norm of a row's rounding error: half a gap for each number."""
        per_group = spec.in_features / scale.shape[1]
        return (scale.double() * gap / 2).square().mul(per_group).sum(dim=1).sqrt()

    def widest_gap(fmt: object) -> float:
        return float(max(b - a for a, b in itertools.pairwise(fmt.levels)))

    indices = [0] * OUT if parts.index is None else parts.index.tolist()
    gaps = torch.tensor([[widest_gap(spec.weight.formats[i])] for i in indices], dtype=torch.float64)
    weight_error = reach(parts.quantized.scale.expand(OUT, -1), gaps)
    activation_error = reach(parts.layer.quantize_input(x).scale, widest_gap(spec.activation.format))
    x_norm, w_norm = x.double().norm(dim=1), parts.weight.double().norm(dim=1)
    if parts.channel_scale is not None:  # the norms are those of what is quantized
        assert parts.signs is not None
        x_rotated = rotate(x.double(), spec.rotation, parts.signs) / parts.channel_scale
        x_norm, w_norm = x_rotated.norm(dim=1), parts.rotated.double().norm(dim=1)
    allowed = (
        activation_error[:, None] * w_norm + x_norm[:, None] * weight_error + activation_error[:, None] * weight_error
    )
    # float32 arithmetic: both rotations, at most `in_features` products and sums, and a few scales.
    roundings = 2 * rotation_rounding(spec.rotation) + (spec.in_features + 12) * U32
    slack = roundings * (x_norm + activation_error)[:, None] * (w_norm + weight_error)
    if parts.bias is not None:
        slack = slack + U32 * exact.abs()
    assert bool(((parts.layer(x).double() - exact).abs() <= allowed + slack).all())


def test_folded_rotation_is_completed_online() -> None:
    # The input that a folded value projection delivers gives the same levels as the whole rotation of the plain input.
    spec = spec_of(WeightSpec((INT8,)), ActivationSpec(INT8), head_dim=36)
    parts, x = Parts(spec), inputs()
    assert parts.signs is not None
    within = rotation_matrix(parts.signs, hadamard_matrix(36), repeats=4)
    delivered = torch.from_numpy(x.double().numpy() @ within).float()
    full = rotate(x, spec.rotation, parts.signs)
    activation = parts.layer.quantize_input(delivered)
    difference = (activation.levels.double() * activation.scale.double() - full.double()).abs()
    bound = rotation_rounding(spec.rotation) + rotation_rounding(spec.rotation, online=True) + U32
    assert bool((difference <= activation.scale.double() / 2 + bound * x.double().norm(dim=1, keepdim=True)).all())


# Shapes and precisions


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (2, 3, WIDTH), (2, 1, 4, WIDTH), (0, WIDTH), (2, 0, WIDTH)])
@each_spec
def test_any_leading_shape(spec: LinearSpec, shape: tuple[int, ...]) -> None:
    shape = (*shape[:-1], spec.in_features)
    layer = Parts(spec).layer
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    output = layer(x)
    assert output.shape == (*shape[:-1], OUT)
    flat = layer(x.reshape(-1, spec.in_features))
    assert torch.equal(output.reshape(-1, OUT), flat)


def adds_in_one_order(spec: LinearSpec) -> bool:
    """No float32 matrix product, whose order of additions may depend on a row's place: no Paley factor, int8 levels."""
    factors = None if spec.rotation.is_identity else require_factors(spec.rotation.block, "test")
    return spec.is_int8 and (factors is None or factors.paley == 1) and not spec.rotation.is_folded


@pytest.mark.parametrize("spec", [spec for spec in SPECS if adds_in_one_order(spec)], ids=label)
def test_tokens_do_not_see_each_other(spec: LinearSpec) -> None:
    layer, x = Parts(spec).layer, inputs(spec.in_features)
    together = layer(x)
    assert torch.equal(layer(x.flip(0)).flip(0), together)
    for token in range(len(x)):
        assert torch.equal(layer(x[token]), together[token])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_output_has_the_precision_of_the_input(dtype: torch.dtype) -> None:
    layer, x = Parts(spec_of()).layer, inputs().to(dtype)
    output = layer(x)
    assert output.dtype == dtype
    assert torch.equal(output, layer(x.float()).to(dtype))


def test_strided_input() -> None:
    layer = Parts(spec_of()).layer
    x = torch.randn(WIDTH, 5, 3, generator=torch.Generator().manual_seed(0)).permute(2, 1, 0)
    assert not x.is_contiguous()
    assert torch.equal(layer(x), layer(x.contiguous()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@each_spec
def test_bad_token_is_nan_and_the_others_are_untouched(spec: LinearSpec, bad: float) -> None:
    layer, x = Parts(spec).layer, inputs(spec.in_features)
    clean = layer(x)
    x[4, 50] = bad
    output = layer(x)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert bool(clean.isfinite().all())
    assert bool(output[4].isnan().all())
    assert torch.equal(output[others], clean[others])


def test_no_gradient_is_needed() -> None:
    layer = Parts(spec_of()).layer
    assert all(not parameter.requires_grad for parameter in layer.parameters())
    with torch.inference_mode():
        first = layer(inputs())
    assert torch.equal(layer(inputs()), first)


# Gradients: those of the float layer that has the weight which the codes stand for


@each_spec
def test_gradients_are_straight_through(spec: LinearSpec) -> None:
    layer, x = Parts(spec).layer, inputs(spec.in_features).requires_grad_()
    assert layer.bias is not None
    layer.bias.requires_grad_()
    toward = torch.from_numpy(np.random.default_rng(5).standard_normal((len(x), OUT))).float()
    output = layer(x)
    output.backward(toward)
    with torch.no_grad():
        assert torch.equal(output, layer(x))
    twin = nn.Linear(spec.in_features, OUT).double()
    twin.weight.data = layer.delivered_weight().double()
    other = x.detach().double().requires_grad_()
    twin(other).backward(toward.double())
    assert x.grad is not None and layer.bias.grad is not None and other.grad is not None
    assert torch.allclose(x.grad.double(), other.grad, rtol=1e-5, atol=1e-5)
    assert torch.allclose(layer.bias.grad.double(), twin.bias.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head_dim", [None, 36, 72])
def test_delivered_weight_acts_on_the_delivered_input(head_dim: int | None) -> None:
    layer, x = Parts(spec_of(head_dim=head_dim)).layer, inputs()
    of_plain, of_delivered = x @ layer.dequantized_weight().T, layer.delivered(x) @ layer.delivered_weight().T
    assert torch.allclose(of_plain, of_delivered, rtol=1e-4, atol=1e-4)
    assert (head_dim is None) == torch.equal(layer.dequantized_weight(), layer.delivered_weight())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_have_the_precision_of_the_input(dtype: torch.dtype) -> None:
    layer, x = Parts(spec_of()).layer, inputs().to(dtype).requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype
    expected = layer.dequantized_weight().sum(dim=0)
    assert torch.allclose(x.grad[0].float(), expected, rtol=0.02, atol=0.2)


def test_no_graph_where_no_gradient_is_asked_for() -> None:
    layer, x = Parts(spec_of()).layer, inputs()
    assert layer(x).grad_fn is None
    with torch.no_grad():
        assert layer(x.requires_grad_()).grad_fn is None
    assert layer(x).grad_fn is not None


# Weight


@each_spec
def test_dequantized_weight_is_near_the_original(spec: LinearSpec) -> None:
    parts = Parts(spec)
    weight = parts.layer.dequantized_weight()
    assert weight.dtype == torch.float32
    assert weight.shape == parts.weight.shape
    # In the rotated basis each number is off by at most half the widest gap, and a rotation keeps the norm of a row.
    for row in range(OUT):
        fmt = spec.weight.formats[0 if parts.index is None else int(parts.index[row])]
        gap = max(b - a for a, b in itertools.pairwise(fmt.levels)) / 2
        scale = parts.quantized.scale[min(row, len(parts.quantized.scale) - 1)].double()
        each = (gap * scale).repeat_interleave(spec.in_features // len(scale))
        if parts.channel_scale is not None:
            each = each / parts.channel_scale.double()
        original = parts.weight[row].double()
        slack = (rotation_rounding(spec.rotation) + 6 * U32) * original.norm()
        assert (weight[row].double() - original).norm() <= each.norm() + slack


@each_spec
def test_dequantized_weight_is_rotated_back_by_the_dense_matrix(spec: LinearSpec) -> None:
    parts = Parts(spec)
    numbers = parts.quantized.dequantize().double().numpy()
    if parts.channel_scale is not None:
        numbers = numbers / parts.channel_scale.double().numpy()
    if spec.rotation.is_folded:
        assert parts.signs is not None
        matrix = rotation_matrix(
            parts.signs, hadamard_matrix(spec.rotation.heads), hadamard_matrix(spec.rotation.block)
        )
    else:
        matrix = parts.online_matrix()
    expected = numbers @ matrix.T
    error = parts.layer.dequantized_weight().double().numpy() - expected
    # One rounding for the channel scale and one for the result; the rotation itself runs in float64.
    allowed = 2.01 * U32 * np.linalg.norm(numbers, axis=1)
    assert bool((np.linalg.norm(error, axis=1) <= allowed).all())


@pytest.mark.parametrize("rotation", ["none", "full", "block:36"])
def test_dequantized_weight_does_what_the_layer_does(rotation: str) -> None:
    # With 8 bits a side the layer is nearly linear: y = x W'^T for the dequantized W'.
    parts = Parts(spec_of(WeightSpec((E2M1,)), ActivationSpec(INT8), rotation), bias=False)
    x = inputs()
    exact = x.double() @ parts.layer.dequantized_weight().double().T
    scale = parts.layer.quantize_input(x).scale.double()
    row_norm = parts.quantized.dequantize().double().norm(dim=1)
    # The activation's rounding: half a level in each of WIDTH channels; the rest is float32: one rotation, the cast of
    # the dequantized weight, scales and the conversion of sums.
    rounding = (rotation_rounding(parts.spec.rotation) + 8 * U32) * x.double().norm(dim=1, keepdim=True)
    allowed = (scale / 2 * math.sqrt(WIDTH) + rounding) * row_norm * (1 + 8 * U32)
    assert bool(((parts.layer(x).double() - exact).abs() <= allowed).all())


def test_weight_is_the_packed_tensor_and_cannot_be_assigned() -> None:
    layer = Parts(spec_of()).layer
    assert layer.weight is layer.qweight
    with pytest.raises((AttributeError, KeyError)):
        layer.weight = nn.Parameter(torch.zeros(OUT, WIDTH))
    assert layer.weight.dtype == torch.uint8


# As a module


@each_spec
def test_is_a_linear_layer_with_its_buffers(spec: LinearSpec) -> None:
    parts = Parts(spec)
    layer = parts.layer
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, hqdit.HQLinear)
    assert (layer.in_features, layer.out_features) == (spec.in_features, OUT)
    expected = {"qweight", "weight_scale", "bias"}
    expected |= {"weight_scale_unit"} if spec.weight.has_short_scales else set()
    expected |= {"format_index"} if len(spec.weight.formats) > 1 else set()
    expected |= set() if spec.rotation.is_identity else {"rotation_signs"}
    expected |= {"channel_scale"} if spec.activation.has_channel_scale else set()
    expected |= {"static_scale"} if spec.activation.has_static_scale else set()
    state = layer.state_dict()
    assert set(state) == expected
    bytes_per_row = spec.in_features // 2 if spec.weight.formats[0].bits == 4 else spec.in_features
    assert state["qweight"].shape == (OUT, bytes_per_row)
    assert all(tensor.is_contiguous() for tensor in state.values())
    sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in state.items()}
    assert layer.storage_bytes == sum(sizes.values()) - sizes["bias"]
    assert f"in_features={spec.in_features}" in repr(layer)
    assert spec.rotation.describe() in repr(layer)


@each_spec
def test_state_dict_round_trip_is_bit_exact(spec: LinearSpec) -> None:
    parts, x = Parts(spec), inputs(spec.in_features)
    restored = HQLinear(LinearSpec.from_json("fc1", spec.to_json()))
    restored.load_state_dict(parts.layer.state_dict(), strict=True)
    assert torch.equal(restored(x), parts.layer(x))
    assert torch.equal(copy.deepcopy(parts.layer)(x), parts.layer(x))


def test_strict_loading_refuses_what_is_missing_or_too_much() -> None:
    layer = Parts(spec_of()).layer
    for key in layer.state_dict():
        state = layer.state_dict()
        del state[key]
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            HQLinear(layer.spec).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        HQLinear(layer.spec).load_state_dict({**layer.state_dict(), "channel_scale": torch.ones(WIDTH)})


def test_without_bias() -> None:
    parts = Parts(spec_of(), bias=False)
    assert parts.layer.bias is None
    assert "bias" not in parts.layer.state_dict()
    biased = Parts(spec_of())
    assert biased.bias is not None
    assert torch.equal(biased.layer(inputs()), parts.layer(inputs()) + biased.bias)


def test_bias_is_a_copy() -> None:
    parts = Parts(spec_of())
    assert parts.bias is not None
    before = parts.layer(inputs())
    parts.bias.add_(100)
    assert torch.equal(parts.layer(inputs()), before)


@pytest.mark.parametrize(
    "change",
    [
        {"signs": None},
        {"signs": torch.ones(WIDTH - 8)},
        {"channel_scale": torch.ones(WIDTH)},
        {"static_scale": torch.ones(1)},
    ],
    ids=str,
)
def test_parts_that_do_not_fit_the_spec_are_refused(change: dict[str, torch.Tensor | None]) -> None:
    parts = Parts(spec_of())
    arguments = {"signs": parts.signs, "channel_scale": None, "static_scale": None} | change
    with pytest.raises(ValueError, match="fc1: found .* needed"):
        HQLinear.from_quantized(parts.spec, parts.quantized, parts.bias, **arguments)


@pytest.mark.parametrize(
    ("activation", "missing"),
    [("tensor", "static_scale"), ("channel", "channel_scale"), ("channel-token", "channel_scale")],
)
def test_missing_static_scales_are_refused(activation: str, missing: str) -> None:
    parts = Parts(spec_of(activation=ActivationSpec(E2M1, activation)))
    with pytest.raises(ValueError, match=f"None for {missing}"):
        HQLinear.from_quantized(parts.spec, parts.quantized, parts.bias, parts.signs)


def test_scales_beyond_8_bits_are_refused() -> None:
    parts = Parts(spec_of(WeightSpec((E2M1,), "group", 36, scale_format="e4m3")))
    scale = parts.quantized.scale.clone()
    scale[3, 1] *= 1 + 2**-23
    with pytest.raises(ValueError, match="fc1: found scales beyond 8 bits, needed what storable_scales gives"):
        HQLinear.from_quantized(parts.spec, replace(parts.quantized, scale=scale), parts.bias, parts.signs)


def test_short_scales_are_kept_as_bytes_and_units() -> None:
    weight = WeightSpec((E2M1,), "group", 36, scale_format="e4m3")
    parts = Parts(spec_of(weight, ActivationSpec(E2M1, "group", 36, scale_format="e4m3")))
    layer = parts.layer
    assert layer.weight_scale_unit is not None
    assert (layer.weight_scale.dtype, layer.weight_scale.shape) == (torch.float8_e4m3fn, (OUT, 4))
    assert (layer.weight_scale_unit.dtype, layer.weight_scale_unit.shape) == (torch.float32, (OUT, 1))
    assert torch.equal(layer.effective_scale, parts.quantized.scale)
    assert torch.equal(layer.packed_weight.scale, parts.quantized.scale)
    assert "e2m1 per group with e4m3 scales, activation=e2m1 per group with e4m3 scales" in repr(layer)
    plain = Parts(spec_of()).layer
    assert plain.weight_scale_unit is None and plain.effective_scale is plain.weight_scale


# Sharing an input


def test_layers_that_share_an_input() -> None:
    q, k = Parts(spec_of(), seed=3), Parts(spec_of(WeightSpec((INT4,), "group", 36)), seed=3)
    assert q.layer.shares_input_with(k.layer)
    assert q.layer.shares_input_with(q.layer)
    x = inputs()
    shared = q.layer.quantize_input(x)
    assert torch.equal(k.layer.forward_quantized(shared), k.layer(x))


@pytest.mark.parametrize(
    ("other", "seed"),
    [
        (spec_of(), 4),  # other signs
        (spec_of(rotation="none"), 3),
        (spec_of(rotation="block:36"), 3),
        (spec_of(activation=ActivationSpec(INT8)), 3),
        (spec_of(activation=ActivationSpec(E2M1, "group", 36)), 3),
        (spec_of(activation=ActivationSpec(E2M1, "tensor")), 3),
        (spec_of(activation=ActivationSpec(E2M1, scale_factor=0.9)), 3),
        (spec_of(activation=ActivationSpec(E2M1, scale_rule="rms")), 3),
    ],
)
def test_layers_that_do_not_share_an_input(other: LinearSpec, seed: int) -> None:
    first = Parts(spec_of(), seed=3).layer
    second = Parts(other, seed=seed).layer
    assert not first.shares_input_with(second)
    assert not second.shares_input_with(first)


@pytest.mark.parametrize("granularity", ["tensor", "channel", "channel-token"])
def test_static_scales_must_be_equal_to_share(granularity: str) -> None:
    spec = spec_of(activation=ActivationSpec(E2M1, granularity))
    first, second = Parts(spec, seed=5).layer, Parts(spec, seed=5).layer
    assert first.shares_input_with(second)
    name = "static_scale" if granularity == "tensor" else "channel_scale"
    setattr(second, name, getattr(second, name) * 2)
    assert not first.shares_input_with(second)


# Signs


@pytest.mark.parametrize("width", range(1, 25))
def test_signs_round_trip_through_bits(width: int) -> None:
    # Every pattern of up to 12 signs; beyond, every pattern of each 8 neighbours among all +, all - and mixed ones.
    if width <= 12:
        rows = torch.tensor(list(itertools.product([1.0, -1.0], repeat=width)))
    else:
        patterns = torch.tensor(list(itertools.product([1.0, -1.0], repeat=8)))
        around = (torch.ones(width), -torch.ones(width), random_signs(width, 0, "around"))
        cases = []
        for start, context in itertools.product({0, 8, width - 8}, around):
            part = context.repeat(256, 1)
            part[:, start : start + 8] = patterns[:, : min(8, width - start)]
            cases.append(part)
        rows = torch.cat(cases)
    for row in rows:
        packed = pack_signs(row)
        assert packed.dtype == torch.uint8
        assert packed.shape == (-(-width // 8),)
        assert torch.equal(unpack_signs(packed, width), row)


def test_every_pattern_of_12_signs_has_its_own_bytes() -> None:
    patterns = torch.tensor(list(itertools.product([1.0, -1.0], repeat=12)))
    packed = [tuple(pack_signs(row).tolist()) for row in patterns]
    assert len(set(packed)) == 2**12
    assert all(second < 16 for _, second in packed)  # padding is positive: no stray bits in the file
    assert all(
        torch.equal(unpack_signs(torch.tensor(p, dtype=torch.uint8), 12), row)
        for p, row in zip(packed, patterns, strict=True)
    )


def test_bit_order_of_signs() -> None:
    assert pack_signs(torch.tensor([-1.0, 1, 1, 1, 1, 1, 1, 1, 1, -1])).tolist() == [0b1, 0b10]
    assert pack_signs(torch.tensor([1.0, 1, 1, 1, 1, 1, 1, -1])).tolist() == [0b1000_0000]


@given(st.integers(1, 400), st.integers(0, 1000))
def test_random_signs_survive_the_layer(width: int, seed: int) -> None:
    signs = random_signs(width, seed, "x")
    assert torch.equal(unpack_signs(pack_signs(signs), width), signs)
