"""Percentile bootstrap intervals: how far a figure would move if other samples had been drawn.

Source: Efron 1979, "Bootstrap methods: another look at the jackknife"; the percentile interval of Efron and Tibshirani
1993, chapter 13. Resampling within strata: Davison and Hinkley 1997, "Bootstrap methods and their application",
section 3.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

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
    *,
    strata: Sequence[int] | npt.NDArray[np.integer] | None = None,
    lowest: float = -math.inf,
) -> Interval:
    """The statistic of all samples, with its 95 % interval over resamples of the rows with replacement.

    The interval always holds the value: where the statistic of repeated rows lies to one side of it, as a share near
    1 or an entropy does, the end on that side is moved to the value. Such an interval is one-sided and says only how
    far the figure would move the other way.

    Args:
        samples: (n, ...), one row per independent sample; n >= 1.
        statistic: from rows (n, ...), float64, to a number that is not NaN.
        resamples: how many; the interval's ends are quantiles of these (linear interpolation).
        seed: of the resampling.
        is_centred: shift the interval by the difference between the statistic and the resamples' mean. For statistics
            that repeated rows move to one side, as they raise a Fréchet distance: the interval then says how far the
            figure would scatter at this number of samples, instead of lying beside it.
        strata: a label per row, for samples whose numbers per label were fixed beforehand, as classes in turn are:
            rows are drawn among those of their own label and every label keeps its number and its places. With m rows
            per label the interval is short by a factor of about sqrt((m - 1) / m).
        lowest: the least value that the statistic can take; a shifted end does not go below it.

    Raises:
        UsageError: no samples, no resamples, another number of labels than of rows, or no label that occurs twice.
    """
    rows = np.asarray(samples, dtype=np.float64)
    if rows.ndim == 0 or len(rows) == 0 or resamples < 1:
        raise UsageError(
            f"bootstrap: found samples of shape {rows.shape} and {resamples} resamples, needed at least one row and "
            "one resample. Fix: measure more samples"
        )
    groups = _groups(len(rows), strata)
    stream = random_stream(seed, "bootstrap")
    found = np.sort([statistic(rows[_drawn(stream, len(rows), groups)]) for _ in range(resamples)])
    value = statistic(rows)
    low, high = _ends(found)
    if is_centred:
        shift = value - float(found.mean())
        low, high = max(low + shift, lowest), max(high + shift, lowest)
    return Interval(value, min(low, value), max(high, value))


def bootstrap_mean(
    samples: npt.ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
    *,
    strata: Sequence[int] | npt.NDArray[np.integer] | None = None,
) -> Interval:
    """`bootstrap_interval` of the mean of numbers (n,)."""
    return bootstrap_interval(samples, lambda rows: float(rows.mean()), resamples, seed, strata=strata)


def _groups(count: int, strata: Sequence[int] | npt.NDArray[np.integer] | None) -> list[npt.NDArray[np.intp]]:
    """The places of the rows of each label."""
    if strata is None:
        return [np.arange(count)]
    labels = np.asarray(strata)
    groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    if labels.shape != (count,) or all(len(group) == 1 for group in groups):
        raise UsageError(
            f"bootstrap: found {labels.size} labels of {len(groups)} kinds for {count} rows, needed one per row and "
            "one that occurs twice. Fix: measure more samples, or ask for no interval"
        )
    return groups


def _drawn(stream: np.random.Generator, count: int, groups: list[npt.NDArray[np.intp]]) -> npt.NDArray[np.intp]:
    """Indices of one resample; each row is replaced by one of its own label, so that their order is kept."""
    chosen = np.empty(count, dtype=np.intp)
    for group in groups:
        chosen[group] = group[stream.integers(0, len(group), len(group))]
    return chosen


def _ends(found: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % quantiles of sorted numbers; next to an infinite one the outer neighbour, as nothing lies between."""
    tail = (1 - CONFIDENCE) / 2
    if np.isfinite(found).all():
        low, high = np.percentile(found, [100 * tail, 100 * (1 - tail)])
        return float(low), float(high)
    last = len(found) - 1
    return float(found[math.floor(tail * last)]), float(found[math.ceil((1 - tail) * last)])
