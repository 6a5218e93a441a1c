"""SSIM against the definition window by window, closed forms, and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

from hqdit.errors import NumericsError, UsageError
from hqdit.evaluation.ssim import structural_similarity


def pictures(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def window_by_window(x: np.ndarray, y: np.ndarray, window: int) -> float:
    """One pair of images (channels, height, width); weighted moments of every window by themselves."""
    middle = (window - 1) / 2
    distances = [[(i - middle) ** 2 + (j - middle) ** 2 for j in range(window)] for i in range(window)]
    weights = np.exp(-np.array(distances) / (2 * 1.5**2))
    weights /= weights.sum()
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    found = []
    for a, b in zip(x, y, strict=True):
        for top in range(a.shape[0] - window + 1):
            for left in range(a.shape[1] - window + 1):
                p, q = (image[top : top + window, left : left + window] for image in (a, b))
                mean_p, mean_q = (weights * p).sum(), (weights * q).sum()
                variance_p, variance_q = (weights * (p - mean_p) ** 2).sum(), (weights * (q - mean_q) ** 2).sum()
                covariance = (weights * (p - mean_p) * (q - mean_q)).sum()
                luminance = (2 * mean_p * mean_q + c1) / (mean_p**2 + mean_q**2 + c1)
                found.append(luminance * (2 * covariance + c2) / (variance_p + variance_q + c2))
    return float(np.mean(found))


@pytest.mark.parametrize(
    ("height", "width", "window"),
    [(32, 32, 11), (11, 13, 11), (12, 11, 11), (10, 32, 9), (8, 8, 7), (7, 9, 7), (1, 1, 1)],
)
def test_the_definition_window_by_window(height: int, width: int, window: int) -> None:
    x, y = pictures(0, 3, 2, height, width), pictures(1, 3, 2, height, width)
    y = 0.7 * x + 0.3 * y
    found = structural_similarity(x, y)
    expected = [window_by_window(a, b, window) for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True)]
    assert found.window == window and found.values.dtype == np.float64
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
def test_torchmetrics_agrees(channels: int) -> None:
    x, noise = pictures(2, 6, channels, 32, 32).double(), pictures(3, 6, channels, 32, 32).double()
    for level in (0.01, 0.3, 1.0):
        y = (x + level * noise).clamp(-1, 1)
        # Its mean includes a border of 5 pixels whose windows reach into mirrored pixels; the definition has none.
        _, everywhere = structural_similarity_index_measure(y, x, data_range=2.0, return_full_image=True)
        expected = everywhere[:, :, 5:-5, 5:-5].flatten(1).mean(dim=1)
        np.testing.assert_allclose(structural_similarity(x, y).values, expected.numpy(), rtol=0, atol=1e-6)


def test_equal_images_score_one() -> None:
    x = pictures(4, 5, 3, 16, 16)
    assert structural_similarity(x, x).values.tolist() == pytest.approx([1.0] * 5, abs=1e-12)


def test_constant_images_by_hand() -> None:
    # Without variance only the luminance term is left: (2ab + C1) / (a² + b² + C1), C1 = 0.0004.
    a, b = torch.full((1, 1, 16, 16), 0.5), torch.full((1, 1, 16, 16), -0.25)
    expected = (-0.25 + 0.0004) / (0.25 + 0.0625 + 0.0004)
    assert structural_similarity(a, b).values[0] == pytest.approx(expected, abs=1e-10)


def test_symmetric_and_lower_with_more_noise() -> None:
    x, noise = pictures(5, 4, 1, 16, 16), pictures(6, 4, 1, 16, 16)
    values = [structural_similarity(x, x + level * noise).values for level in (0.0, 0.1, 0.3, 1.0)]
    assert all((better > worse).all() for better, worse in zip(values, values[1:], strict=False))
    np.testing.assert_allclose(structural_similarity(x + noise, x).values, values[-1], rtol=0, atol=1e-12)


def test_each_pair_is_judged_by_itself() -> None:
    x, y = pictures(7, 5, 3, 16, 16), pictures(8, 5, 3, 16, 16)
    alone = [structural_similarity(x[i : i + 1], y[i : i + 1]).values[0] for i in range(5)]
    np.testing.assert_allclose(structural_similarity(x, y).values, alone, rtol=0, atol=1e-14)


def test_other_shapes_are_refused() -> None:
    for x, y in ((pictures(0, 2, 1, 8, 8), pictures(0, 3, 1, 8, 8)), (pictures(0, 8, 8), pictures(0, 8, 8))):
        with pytest.raises(UsageError, match="needed equal shapes"):
            structural_similarity(x, y)
    with pytest.raises(UsageError, match="needed equal shapes"):
        structural_similarity(torch.zeros(0, 1, 8, 8), torch.zeros(0, 1, 8, 8))


def test_non_finite_pixels_are_refused() -> None:
    x = pictures(0, 2, 1, 8, 8)
    broken = x.clone()
    broken[1, 0, 3, 3] = math.nan
    for pair in ((x, broken), (broken, x)):
        with pytest.raises(NumericsError, match="SSIM"):
            structural_similarity(*pair)
