"""Percentile bootstrap intervals: how far a figure would move if other samples had been drawn.

Source: Efron 1979, "Bootstrap methods: another look at the jackknife"; the percentile interval of Efron and Tibshirani
1993, chapter 13.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hqdit.errors import UsageError
from hqdit.randomness import random_stream
from hqdit.records.run_record import Interval

CONFIDENCE = 0.95
RESAMPLES = 1000

Float64Array = npt.NDArray[np.float64]


def bootstrap_interval(
    samples: npt.ArrayLike,
    statistic: Callable[[Float64Array], float],
    resamples: int = RESAMPLES,
    seed: int = 0,
    is_centred: bool = False,
) -> Interval:
    """The statistic of all samples, with its 95 % interval over resamples of the rows with replacement.

    Args:
        samples: (n, ...), one row per independent sample; n >= 1.
        statistic: from rows (n, ...), float64, to a number that is not NaN.
        resamples: how many; the interval's ends are quantiles of these (linear interpolation).
        seed: of the resampling.
        is_centred: shift the interval by the difference between the statistic and the resamples' mean. For statistics
            that repeated rows move to one side, as they raise a Fréchet distance: the interval then says how far the
            figure would scatter at this number of samples, instead of lying beside it.

    Raises:
        UsageError: no samples or no resamples.
    """
    rows = np.asarray(samples, dtype=np.float64)
    if rows.ndim == 0 or len(rows) == 0 or resamples < 1:
        raise UsageError(
            f"bootstrap: found samples of shape {rows.shape} and {resamples} resamples, needed at least one row and "
            "one resample. Fix: measure more samples"
        )
    stream = random_stream(seed, "bootstrap")
    found = [statistic(rows[stream.integers(0, len(rows), len(rows))]) for _ in range(resamples)]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(found, [tail, 100 - tail])
    value = statistic(rows)
    shift = value - float(np.mean(found)) if is_centred else 0.0
    return Interval(value, float(low) + shift, float(high) + shift)


def bootstrap_mean(samples: npt.ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """`bootstrap_interval` of the mean of numbers (n,)."""
    return bootstrap_interval(samples, lambda rows: float(rows.mean()), resamples, seed)
