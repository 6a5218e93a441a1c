"""Mean, variance, skewness and kurtosis of groups of numbers, gathered batch by batch in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Float64Array = npt.NDArray[np.float64]

#: Rows that are converted to float64 at once; bounds the memory for temporaries.
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over groups of numbers, from which the moments follow; all arrays have the shape of the groups.

    Sums of powers of deviations from each group's own mean, not raw powers, so that no digits cancel; groups are
    pooled exactly by shifting each to the common mean.

    Attributes:
        count: how many numbers.
        mean: their mean.
        squares: sum of (x - mean)^2.
        cubes: sum of (x - mean)^3.
        fourths: sum of (x - mean)^4.
        absmax: largest |x|.

    Source: Pébay 2008, "Formulas for robust, one-pass parallel computation of covariances and arbitrary-order
    statistical moments", Sandia report SAND2008-6212.
    """

    count: Float64Array
    mean: Float64Array
    squares: Float64Array
    cubes: Float64Array
    fourths: Float64Array
    absmax: Float64Array

    @classmethod
    def of_columns(cls, values: Tensor) -> Moments:
        """One group per column.

        Args:
            values: floating point (n, groups), n >= 1, finite.

        Returns:
            Arrays of shape (groups,).
        """
        return cls.stack([cls._of_rows(rows) for rows in torch.split(values.detach(), _ROWS)]).pooled(0)

    @classmethod
    def _of_rows(cls, rows: Tensor) -> Moments:
        exact = rows.to(torch.float64)
        mean = exact.mean(dim=0)
        deviation = exact - mean
        squared = deviation.square()
        count = torch.full_like(mean, len(rows))
        sums = (squared.sum(dim=0), (squared * deviation).sum(dim=0), squared.square().sum(dim=0))
        return cls(*(part.cpu().numpy() for part in (count, mean, *sums, exact.abs().amax(dim=0))))

    @classmethod
    def stack(cls, parts: Sequence[Moments]) -> Moments:
        """Equally shaped groups side by side along a new first axis."""
        return cls(*(np.stack([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def pooled(self, axis: int) -> Moments:
        """The groups along `axis` as one."""
        count = self.count.sum(axis=axis)
        mean = (self.count * self.mean).sum(axis=axis) / count
        shift = self.mean - np.expand_dims(mean, axis)
        squares = self.squares + self.count * shift**2
        cubes = self.cubes + 3 * shift * self.squares + self.count * shift**3
        fourths = self.fourths + 4 * shift * self.cubes + 6 * shift**2 * self.squares + self.count * shift**4
        return Moments(
            count,
            mean,
            squares.sum(axis=axis),
            cubes.sum(axis=axis),
            fourths.sum(axis=axis),
            self.absmax.max(axis=axis),
        )

    @property
    def variance(self) -> Float64Array:
        """Mean squared deviation (divided by n, not n - 1)."""
        return self.squares / self.count

    @property
    def mean_square(self) -> Float64Array:
        """Mean of x^2."""
        return self.variance + self.mean**2

    @property
    def skewness(self) -> Float64Array:
        """Third standardized moment, 0 for a symmetric distribution; NaN where all numbers are equal."""
        return self._standardized(self.cubes, 3)

    @property
    def kurtosis(self) -> Float64Array:
        """Fourth standardized moment (Pearson's: 3 for a normal distribution); NaN where all numbers are equal."""
        return self._standardized(self.fourths, 4)

    def _standardized(self, sums: Float64Array, power: int) -> Float64Array:
        # What rounding of the mean leaves of equal numbers is no spread.
        is_spread = self.variance > (np.finfo(np.float64).resolution * self.absmax) ** 2
        deviation = np.sqrt(np.where(is_spread, self.variance, np.nan))
        return np.asarray(sums / self.count / deviation**power)
