"""Float layers that multiply every token by one matrix: linear layers, and 1x1 convolutions, seen as such."""

from __future__ import annotations

from torch import Tensor, nn


def is_pointwise_conv(module: nn.Module) -> bool:
    """Whether `module` is a 1x1 convolution without stride, padding or groups: a linear layer over channels."""
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride == (1, 1)
        and module.padding in ((0, 0), "valid", "same")
        and module.groups == 1
    )


def is_matrix_layer(module: nn.Module) -> bool:
    """Whether `module` is a linear layer, float or quantized, or a 1x1 convolution."""
    return isinstance(module, nn.Linear) or is_pointwise_conv(module)


def weight_matrix(module: nn.Module) -> Tensor:
    """The weight of a float matrix layer, (out_features, in_features)."""
    return module.get_parameter("weight").flatten(1)


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a matrix layer."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def channels_last(module: nn.Module, x: Tensor) -> Tensor:
    """An input or output of `module` with its channels on the last axis; a linear layer has them there."""
    return x.movedim(-3, -1) if isinstance(module, nn.Conv2d) else x


def channels_back(module: nn.Module, x: Tensor) -> Tensor:
    """The inverse of `channels_last`."""
    return x.movedim(-1, -3) if isinstance(module, nn.Conv2d) else x
