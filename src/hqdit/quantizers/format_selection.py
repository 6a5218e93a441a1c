"""The paper's choice of a floating point format from the spread of the weights.

Source: HQ-DiT (arXiv 2405.19751), section 3.3: s_w = max|W| / Quantile(|W|, alpha). The rule "the format whose
dynamic range is nearest to s_w in log2" is a reconstruction; see docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from hqdit.errors import UsageError
from hqdit.formats.number_format import FloatFormat
from hqdit.numerics.rounding import require_no_nan


def range_statistic(weight: Tensor, alpha: float) -> list[float]:
    """max|W| / Quantile(|W|, alpha) of every row.

    The quantile is exact (linear interpolation between order statistics, in float64) and has no limit on the number
    of elements, unlike `torch.quantile` with its 16 million.

    Args:
        weight: floating point (rows, n); pass `weight.reshape(1, -1)` for one statistic per layer.
        alpha: strictly between 0 and 1.

    Returns:
        One number per row: infinite if the quantile is zero, 1.0 for a row of zeros.

    Raises:
        UsageError: alpha outside (0, 1).
        NumericsError: `weight` holds a NaN.
    """
    if not 0.0 < alpha < 1.0:
        raise UsageError(f"alpha: found {alpha}, needed a number strictly between 0 and 1. Fix: 0.25 is the default")
    require_no_nan(weight, "range_statistic")
    magnitude = np.abs(weight.detach().cpu().double().numpy())
    largest = magnitude.max(axis=1)
    quantile = np.quantile(magnitude, alpha, axis=1)
    return [
        1.0 if top == 0 else math.inf if low == 0 else float(top / low)
        for top, low in zip(largest, quantile, strict=True)
    ]


def select_format(statistic: float, candidates: Sequence[FloatFormat]) -> FloatFormat:
    """The candidate whose dynamic range is nearest to `statistic` in log2; ties go to the longer mantissa.

    With E1M2, E2M1 and E3M0 (ranges 7, 12, 64) the borders lie at sqrt(7 * 12) = 9.17 and sqrt(12 * 64) = 27.7.
    """
    if math.isinf(statistic):
        return max(candidates, key=lambda fmt: fmt.dynamic_range)
    return min(
        candidates,
        key=lambda fmt: (abs(math.log2(statistic) - math.log2(fmt.dynamic_range)), -fmt.mantissa_bits),
    )
