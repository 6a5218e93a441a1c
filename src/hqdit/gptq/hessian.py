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


class InputMoments:
    """Running moments of input vectors x and of their rounded forms q: the Hessian of q, and both means, in float64.

    A bias can take over the mean of a layer's output error. Then only what varies counts, and the Hessian is that of
    q - mean(q).
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._accumulator = HessianAccumulator(in_features, device)
        self._sums = torch.zeros((2, in_features), dtype=torch.float64, device=device)

    def add(self, x: Tensor, quantized: Tensor) -> None:
        """Add inputs, both floating point (tokens, in_features): rotated, before and after rounding."""
        self._accumulator.add(quantized)
        self._sums += torch.stack([x.detach().to(torch.float64).sum(dim=0), quantized.to(torch.float64).sum(dim=0)])

    @property
    def mean(self) -> Tensor:
        """Mean of x, float64 (in_features,); zeros before anything was added."""
        return self._sums[0] / max(self._accumulator.samples, 1)

    @property
    def quantized_mean(self) -> Tensor:
        """Mean of q, likewise."""
        return self._sums[1] / max(self._accumulator.samples, 1)

    @property
    def hessian(self) -> Tensor:
        """H of q, float64 (in_features, in_features)."""
        return self._accumulator.hessian

    @property
    def centred_hessian(self) -> Tensor:
        """H of q - mean(q), float64 (in_features, in_features)."""
        return self.hessian - 2.0 * torch.outer(self.quantized_mean, self.quantized_mean)
