"""The gradient of a quantized layer, for what is trained around it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hqdit.layers.linear import HQLinear


class StraightThrough(torch.autograd.Function):
    """Forward as quantized; backward as the float layer with the dequantized weight.

    Rounding has no useful derivative, so that of the identity stands for it. Source: the straight-through estimator,
    Bengio et al. (arXiv 1308.3432), section 3. The codes themselves are not trained.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, bias: Tensor | None, layer: HQLinear) -> Tensor:
        """(..., in_features) -> (..., out_features); `bias` is the layer's, given so that it can get a gradient."""
        ctx.layer = layer
        return layer.forward_without_gradient(input)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """dL/dx = dL/dy W for the input, and the sum over tokens for the bias, in the dtype of dL/dy."""
        (gradient,) = gradients
        of_input = of_bias = None
        if ctx.needs_input_grad[0]:
            of_input = gradient @ ctx.layer.delivered_weight().to(gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.reshape(-1, gradient.shape[-1]).sum(dim=0)
        return of_input, of_bias, None
