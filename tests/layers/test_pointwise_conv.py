"""A 1x1 convolution is a linear layer over channels, before and after quantizing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hqdit.formats.catalog import E2M1
from hqdit.layers.linear import HQLinear
from hqdit.layers.matrix_layers import (
    channels_back,
    channels_last,
    is_matrix_layer,
    is_pointwise_conv,
    matrix_shape,
    weight_matrix,
)
from hqdit.layers.pointwise_conv import HQPointwiseConv2d, quantized_class
from hqdit.quantizers.quantized_tensor import round_to_nearest, weight_scales
from hqdit.quantizers.spec import ActivationSpec, LinearSpec, WeightSpec
from hqdit.transforms.rotation import plan_rotation, random_signs, rotate


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (nn.Conv2d(4, 6, 1), True),
        (nn.Conv2d(4, 6, 1, bias=False), True),
        (nn.Conv2d(4, 6, 1, padding="same"), True),
        (nn.Conv2d(4, 6, 3, padding=1), False),
        (nn.Conv2d(4, 6, 1, stride=2), False),
        (nn.Conv2d(4, 6, 1, padding=1), False),
        (nn.Conv2d(4, 4, 1, groups=4), False),
        (nn.Conv1d(4, 6, 1), False),
        (nn.Linear(4, 6), False),
    ],
)
def test_what_is_a_linear_layer_over_channels(conv: nn.Module, expected: bool) -> None:
    assert is_pointwise_conv(conv) == expected
    assert is_matrix_layer(conv) == (expected or isinstance(conv, nn.Linear))
    if expected:
        x = torch.randn(2, 4, 3, 5)
        tokens = channels_last(conv, x) @ weight_matrix(conv).T
        bias = conv.bias
        tokens = tokens if bias is None else tokens + bias
        torch.testing.assert_close(channels_back(conv, tokens), conv(x), rtol=1e-5, atol=1e-6)
        assert matrix_shape(conv) == (4, 6) and channels_last(conv, x).shape == (2, 3, 5, 4)


def test_quantized_as_the_linear_layer_with_the_same_matrix() -> None:
    conv, linear = nn.Conv2d(36, 12, 1), nn.Linear(36, 12)
    assert quantized_class(conv) is HQPointwiseConv2d and quantized_class(linear) is HQLinear
    spec = LinearSpec("c", 36, 12, WeightSpec((E2M1,)), ActivationSpec(E2M1), plan_rotation("full", 36, "c"))
    signs = random_signs(36, 0, "test")
    rotated = rotate(weight_matrix(conv).detach(), spec.rotation, signs)
    scale = weight_scales(rotated, spec.weight, None, "absmax")
    quantized = round_to_nearest(rotated, scale, spec.weight, None)
    layers: list[Any] = [
        kind.from_quantized(spec, quantized, conv.bias, signs) for kind in (HQPointwiseConv2d, HQLinear)
    ]
    x = torch.randn(2, 36, 3, 5)
    found = layers[0](x)
    assert found.shape == (2, 12, 3, 5) and found.is_contiguous()
    assert torch.equal(found, layers[1](x.movedim(1, -1)).movedim(-1, 1))
    assert torch.equal(layers[0](x[0]), found[0])  # without a batch
