"""The Hessian of a layer's squared output error, streamed over calibration batches."""

from __future__ import annotations

import torch
from torch import Tensor


class HessianAccumulator:
    """Running H = (2 / n) sum of x^T x over n input vectors, in float64.

    Source: GPTQ (arXiv 2210.17323), section 3; the same H for every output channel.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros((in_features, in_features), dtype=torch.float64, device=device)
        self.samples = 0

    def add(self, x: Tensor) -> None:
        """Add inputs, floating point (tokens, in_features): the rotated, quantized ones that the layer will see."""
        x64 = x.detach().to(torch.float64)
        self.total.addmm_(x64.T, x64)
        self.samples += x.shape[0]

    @property
    def hessian(self) -> Tensor:
        """H, float64 (in_features, in_features); zeros before anything was added."""
        return self.total * (2.0 / max(self.samples, 1))
