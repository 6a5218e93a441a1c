"""Static scales that move outliers of a layer's input into its weight.

With x' = x / s and W' = W diag(s) the product stays, x' W'^T = x W^T, and s decides how the range of each input
channel is divided between the two operands.

Source: SmoothQuant (arXiv 2211.10438), section 4, equation 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqdit.errors import NumericsError

#: Smallest and largest factor.
FACTOR_RANGE = (1e-5, 1e5)


def smoothing_factors(activation_size: Tensor, weight_size: Tensor, alpha: float) -> Tensor:
    """s_j = max|x_j|^alpha / max|w_j|^(1 - alpha) for every input channel j.

    With root mean squares instead of largest magnitudes and alpha = 1/2 the rounding errors that a rotation spreads
    over all channels become least: (sum a_j^2 / s_j^2) (sum w_j^2 s_j^2) has its minimum (sum a_j w_j)^2 there (Cauchy
    and Schwarz).

    A channel that is silent in the calibration data, or that no weight reads, has no range to divide: its factor is 1.
    Others are kept within `FACTOR_RANGE`, so that a channel that is almost silent here cannot drown the others where it
    speaks.

    Args:
        activation_size: (in_features,), the largest magnitude, or the root mean square, of every input channel over
            calibration data.
        weight_size: (in_features,), the same of every column of the weights that read the input.
        alpha: migration strength, from 0 (weights get the easy part) to 1 (activations do).

    Returns:
        float64 (in_features,), positive and finite.

    Raises:
        NumericsError: a magnitude is not finite.
    """
    largest, columns = activation_size.to(torch.float64), weight_size.to(torch.float64)
    if not bool(torch.isfinite(largest).all() and torch.isfinite(columns).all()):
        raise NumericsError(
            "smoothing: found NaN or infinity in calibration inputs or weights, needed finite numbers. "
            "Fix: check the calibration data and the float model"
        )
    is_live = (largest > 0) & (columns > 0)
    factors = (largest.pow(alpha) / columns.pow(1 - alpha)).clamp(*FACTOR_RANGE)
    return torch.where(is_live, factors, 1.0)
