"""Measures of error, accumulated in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def decibel(signal: float, noise: float) -> float:
    """10 log10(signal / noise): infinite for no noise, NaN if either is NaN or both are zero."""
    if math.isnan(signal) or math.isnan(noise) or (signal == 0 and noise == 0):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


@dataclass
class SignalToNoise:
    """Running signal and noise power; `db` is the signal to quantization noise ratio (SQNR)."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, exact: Tensor, approximate: Tensor) -> None:
        """Add |exact|^2 and |approximate - exact|^2, any equal shapes."""
        exact64 = exact.detach().to(torch.float64)
        self.signal += float(exact64.square().sum())
        self.noise += float((approximate.detach().to(torch.float64) - exact64).square().sum())

    @property
    def db(self) -> float:
        """SQNR of everything added so far, in dB."""
        return decibel(self.signal, self.noise)


def sqnr_db(exact: Tensor, approximate: Tensor) -> float:
    """10 log10(|exact|^2 / |approximate - exact|^2), in dB."""
    ratio = SignalToNoise()
    ratio.add(exact, approximate)
    return ratio.db


def relative_error(exact: Tensor, approximate: Tensor) -> float:
    """|approximate - exact| / |exact| in the 2-norm; 0 where both vanish."""
    ratio = SignalToNoise()
    ratio.add(exact, approximate)
    if ratio.noise == 0:
        return 0.0
    return math.sqrt(ratio.noise / ratio.signal) if ratio.signal > 0 else math.inf
