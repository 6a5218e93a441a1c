"""A quantized 1x1 convolution."""

from __future__ import annotations

from torch import Tensor, nn

from hqdit.layers.linear import HQLinear


class HQPointwiseConv2d(HQLinear):
    """`HQLinear` in the place of a 1x1 convolution: the channels of an image are the input of the layer."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features, height, width) -> (..., out_features, height, width) in the dtype of `input`."""
        if input.dim() == 3:  # one image, whose rows are no samples
            return self.forward(input.unsqueeze(0)).squeeze(0)
        return super().forward(input.movedim(-3, -1)).movedim(-1, -3).contiguous()


def quantized_class(module: nn.Module) -> type[HQLinear]:
    """The quantized layer that can stand where the float layer `module` is."""
    return HQPointwiseConv2d if isinstance(module, nn.Conv2d) else HQLinear
