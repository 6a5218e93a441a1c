"""The Fréchet distance between Gaussians fitted to two sets of image features, in float64.

With the features of the bundled surrogate classifier the number must carry that extractor's name (for
example "Fréchet distance, digits-cnn-v1"). It is never called plain FID: that name is reserved for
Inception-v3 features, and numbers from different extractors cannot be compared.

Source: Heusel et al. 2017 (arXiv 1706.08500) for the use on features; Dowson and Landau 1982, "The Fréchet
distance between multivariate normal distributions", for the formula.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hqdit.errors import NumericsError, UsageError

Float64Array = npt.NDArray[np.float64]

# A computed covariance is positive semidefinite up to rounding, d * 2^-52 of its largest eigenvalue (1e-13
# for d = 500). Anything more negative than this share was never a covariance.
_NEGATIVE_SHARE = 1e-10


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """Mean and covariance of a set of feature vectors.

    Attributes:
        mean: float64 (d,).
        covariance: float64 (d, d), symmetric, with the unbiased divisor `count` - 1.
        count: how many feature vectors there were, at least 2.
        factor: float64 (r, d) with factorᵀ factor = covariance, where the features were at hand. It keeps the digits
            that an eigenvalue of the covariance near zero loses, above all with fewer features than dimensions. None
            for statistics from elsewhere: the square root of the covariance stands in.

    Raises:
        UsageError: for shapes that do not fit, an asymmetric covariance, another matrix's factor, or `count` < 2.
        NumericsError: for values that are not finite.
    """

    mean: Float64Array
    covariance: Float64Array
    count: int
    factor: Float64Array | None = None

    def __post_init__(self) -> None:
        d = len(self.mean) if self.mean.ndim == 1 else 0
        if d == 0 or self.covariance.shape != (d, d):
            raise UsageError(
                f"GaussianStatistics: found mean of shape {self.mean.shape} and covariance of shape"
                f" {self.covariance.shape}, needed (d,) and (d, d) with d >= 1."
                " Fix: build them with GaussianStatistics.from_features"
            )
        if self.count < 2:
            raise UsageError(_too_few(self.count))
        _require_finite(self.mean, "GaussianStatistics: mean")
        _require_finite(self.covariance, "GaussianStatistics: covariance")
        asymmetry = float(np.abs(self.covariance - self.covariance.T).max())
        if asymmetry > 1e-10 * float(np.abs(self.covariance).max()):
            raise UsageError(
                f"GaussianStatistics: found a covariance that differs from its transpose by up to {asymmetry:.3g},"
                " needed a symmetric matrix. Fix: build it with GaussianStatistics.from_features"
            )

        trace = float(np.trace(self.covariance))
        if self.factor is not None and (
            self.factor.shape[1:] != (d,) or not abs(float(np.square(self.factor).sum()) - trace) <= 1e-10 * trace
        ):
            raise UsageError(
                f"GaussianStatistics: found a factor of shape {self.factor.shape} that is not one of the covariance,"
                f" needed (r, {d}) with the same trace. Fix: build it with GaussianStatistics.from_features"
            )

    @classmethod
    def from_features(cls, features: npt.ArrayLike) -> GaussianStatistics:
        """Mean and covariance over the rows of `features`.

        Args:
            features: (n, d), one feature vector per row, n >= 2; converted to float64 before any arithmetic.

        Raises:
            UsageError: if `features` is not two-dimensional, has no columns, or has fewer than 2 rows.
            NumericsError: if a feature, or a sum over them, is not finite.
        """
        rows = np.asarray(features, dtype=np.float64)
        if rows.ndim != 2 or rows.shape[1] == 0:
            raise UsageError(
                f"Fréchet statistics: found features of shape {rows.shape}, needed (n, d) with d >= 1, one"
                " feature vector per row. Fix: reshape them"
            )
        n = rows.shape[0]
        if n < 2:
            raise UsageError(_too_few(n))
        _require_finite(rows, "Fréchet statistics: features")
        with np.errstate(over="ignore", invalid="ignore"):  # an overflow is reported below, by name
            mean = rows.mean(axis=0)
            centred = rows - mean
            covariance = centred.T @ centred / (n - 1)
            # The triangle of the QR decomposition stands for the n rows: it has min(n, d) of them.
            factor = np.linalg.qr(centred, mode="r") / np.sqrt(n - 1)
        return cls(mean=mean, covariance=covariance, count=n, factor=factor)


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2), in squared units of the features.

    The trace of the outer root is the sum of the singular values of F_b F_aᵀ for any F with FᵀF = S, the features'
    factor where there is one: forming S_a^1/2 S_b S_a^1/2 first would square them and lose half of the digits of the
    small ones. Without a factor, F is the symmetric square root from an eigendecomposition, with negative eigenvalues
    of rounding size clipped to zero. A result below zero by rounding is returned as 0.

    Exact: to 1e-10 of the magnitude of the terms at any rank if both sides have a factor; without, to 1e-10 at full
    rank and about 1e-7 below it, where the square root of a zero eigenvalue comes out as 1e-8.

    With features of the surrogate classifier the number must carry the extractor's name; it is never called
    plain FID.

    Args:
        a: statistics of the one set, any count.
        b: statistics of the other, of the same width d.

    Returns:
        The distance (already squared, as is customary), >= 0; symmetric in its arguments.

    Raises:
        UsageError: if the widths differ.
        NumericsError: if a covariance is not positive semidefinite, or the result is not finite.

    Source: Heusel et al. 2017 (arXiv 1706.08500), equation 6; Dowson and Landau 1982.
    """
    if a.mean.shape != b.mean.shape:
        raise UsageError(
            f"Fréchet distance: found feature widths {len(a.mean)} and {len(b.mean)}, needed the same"
            " extractor on both sides. Fix: recompute one of them"
        )
    with np.errstate(over="ignore", invalid="ignore"):  # an overflow is reported below, by name
        difference = a.mean - b.mean
        product = _factor(b, "second") @ _factor(a, "first").T
        _require_finite(product, "Fréchet distance: product of the covariance roots")
        cross = np.linalg.svd(product, compute_uv=False).sum()
        traces = np.trace(a.covariance) + np.trace(b.covariance)
        distance = float(difference @ difference + traces - 2.0 * cross)
    if not np.isfinite(distance):
        raise NumericsError(
            f"Fréchet distance: found {distance}, needed a finite number. Fix: rescale the features, which are too"
            " large for float64"
        )
    return max(distance, 0.0)


def _factor(statistics: GaussianStatistics, which: str) -> Float64Array:
    """A matrix (r, d) whose transpose times itself is the covariance."""
    if statistics.factor is not None:
        return statistics.factor
    eigenvalues, vectors = np.linalg.eigh(statistics.covariance)
    if eigenvalues[0] < -_NEGATIVE_SHARE * max(float(eigenvalues[-1]), 0.0):
        raise NumericsError(
            f"Fréchet distance: found eigenvalues from {eigenvalues[0]:.3g} to"
            f" {eigenvalues[-1]:.3g} in the {which} covariance, needed none below zero."
            " Fix: build it with GaussianStatistics.from_features"
        )
    root: Float64Array = (vectors * np.sqrt(np.clip(eigenvalues, 0.0, None))) @ vectors.T
    return root


def _require_finite(values: Float64Array, what: str) -> None:
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise NumericsError(
            f"{what}: found {bad} of {values.size} values NaN or infinite, needed finite ones. Fix: check the"
            " images and the model that made them"
        )


def _too_few(count: int) -> str:
    return f"Fréchet statistics: found {count} feature vector(s), needed at least 2. Fix: use more images"
