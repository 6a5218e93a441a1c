"""Structural similarity of pairs of images, in float64.

Source: Wang, Bovik, Sheikh and Simoncelli 2004, "Image quality assessment: from error visibility to structural
similarity", equation 13 and the weights of section III.B.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hqdit.errors import NumericsError, UsageError

WINDOW = 11  # pixels along an edge
SIGMA = 1.5  # pixels
K1, K2 = 0.01, 0.03
DATA_RANGE = 2.0  # of images in [-1, 1]


@dataclass(frozen=True, eq=False)
class StructuralSimilarity:
    """One number per pair of images, and the window they were taken with.

    Attributes:
        values: float64 (n,); 1 for equal images, at least -1; higher is better.
        window: pixels along an edge. Images under 11 pixels get the largest odd window that fits; their values cannot
            be compared with those of window 11.
    """

    values: npt.NDArray[np.float64]
    window: int


def structural_similarity(exact: Tensor, approximate: Tensor) -> StructuralSimilarity:
    """Mean over channels and over the positions at which the Gaussian window lies inside the image.

    Args:
        exact: floating point images (n, channels, height, width) in [-1, 1].
        approximate: the same shape.

    Raises:
        UsageError: other shapes, or no images.
        NumericsError: a pixel that is not finite.
    """
    if exact.ndim != 4 or 0 in exact.shape or exact.shape != approximate.shape:
        raise UsageError(
            f"SSIM: found images of shapes {tuple(exact.shape)} and {tuple(approximate.shape)}, needed equal shapes"
            " (n, channels, height, width) with n >= 1. Fix: compare images from the same noise"
        )
    x, y = (images.detach().to("cpu", torch.float64) for images in (exact, approximate))
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise NumericsError("SSIM: found NaN or infinite pixels, needed finite ones. Fix: check the images")
    shortest = min(x.shape[2:])
    window = min(WINDOW, shortest - 1 + shortest % 2)
    weights = _gaussian(window)

    def smooth(images: Tensor) -> Tensor:
        flat = images.reshape(-1, 1, *images.shape[2:])
        rows = torch.nn.functional.conv2d(flat, weights.view(1, 1, -1, 1))
        return torch.nn.functional.conv2d(rows, weights.view(1, 1, 1, -1))

    mean_x, mean_y = smooth(x), smooth(y)
    variance_x, variance_y = smooth(x * x) - mean_x**2, smooth(y * y) - mean_y**2
    covariance = smooth(x * y) - mean_x * mean_y
    c1, c2 = (K1 * DATA_RANGE) ** 2, (K2 * DATA_RANGE) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return StructuralSimilarity(similarity.reshape(len(x), -1).mean(dim=1).numpy(), window)


def _gaussian(window: int) -> Tensor:
    """Weights (window,) that sum to 1; their outer product is the window of the definition."""
    offsets = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
    weights = torch.exp(-0.5 * (offsets / SIGMA) ** 2)
    return weights / weights.sum()
