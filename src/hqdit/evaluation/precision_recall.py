"""Improved precision and recall with k nearest neighbours, as ADM's evaluation suite defines them.

The manifold of a set is the union of balls around its points, each reaching to the point's k-th nearest neighbour in
the set. Precision is the share of samples inside the reference's manifold, recall the share of reference points inside
the samples' manifold.

Source: Kynkäänniemi et al. 2019 (arXiv 1904.06991), equations 1 and 2; guided-diffusion's evaluation suite (Dhariwal
and Nichol 2021, arXiv 2105.05233) for k and the cast to float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hqdit.errors import NumericsError, UsageError

#: The k-th nearest neighbour; a point is its own neighbour number 0.
NEIGHBOURS = 3

_CHUNK = 1024  # rows of distances at once; bounds the memory

Float64Array = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class PrecisionRecall:
    """Which points lie inside the other set's manifold.

    Attributes:
        sample_hits: bool (samples,), inside the reference's manifold.
        reference_hits: bool (references,), inside the samples' manifold.
        is_float16: whether the features were rounded to float16 first, as ADM does.
    """

    sample_hits: BoolArray
    reference_hits: BoolArray
    is_float16: bool

    @property
    def precision(self) -> float:
        """Share of samples that look like the reference; higher is better."""
        return float(self.sample_hits.mean())

    @property
    def recall(self) -> float:
        """Share of the reference that the samples cover; higher is better."""
        return float(self.reference_hits.mean())


def precision_recall(
    samples: npt.ArrayLike, reference: npt.ArrayLike, *, neighbours: int = NEIGHBOURS, adm_fp16: bool = False
) -> PrecisionRecall:
    """Precision and recall of samples against a reference set.

    A point on the surface of a ball is inside (<=). Distances are sums of squared differences in float64, which is
    exact for duplicates: they are at distance 0 from each other.

    Args:
        samples: features (n, d), n > `neighbours`.
        reference: features (m, d), m > `neighbours`.
        neighbours: k; the radius of a ball is the k-th smallest distance, its own distance 0 not counted.
        adm_fp16: round the features to float16 first. ADM also *computes* in float16, in an order that depends on the
            device; that part is not imitated.

    Raises:
        UsageError: shapes that do not fit, or too few points.
        NumericsError: a feature that is not finite, or that float16 cannot hold.
    """
    left = _features(samples, "samples", neighbours, adm_fp16)
    right = _features(reference, "reference", neighbours, adm_fp16)
    if left.shape[1] != right.shape[1]:
        raise UsageError(
            f"precision and recall: found feature widths {left.shape[1]} and {right.shape[1]}, needed the same"
            " extractor on both sides. Fix: recompute one of them"
        )
    return PrecisionRecall(
        _inside(left, right, _squared_radii(right, neighbours)),
        _inside(right, left, _squared_radii(left, neighbours)),
        adm_fp16,
    )


def _features(values: npt.ArrayLike, what: str, neighbours: int, adm_fp16: bool) -> Float64Array:
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 2 or rows.shape[1] == 0 or neighbours < 1 or len(rows) <= neighbours:
        raise UsageError(
            f"precision and recall: found {what} of shape {rows.shape} and k = {neighbours}, needed (n, d) with more"
            " rows than k, and k at least 1. Fix: use more images"
        )
    if adm_fp16:
        with np.errstate(over="ignore"):  # reported below
            rows = rows.astype(np.float16).astype(np.float64)
    bad = int(np.count_nonzero(~np.isfinite(rows)))
    if bad:
        raise NumericsError(
            f"precision and recall: found {bad} of {rows.size} values of the {what} NaN or infinite"
            f"{' after rounding to float16' if adm_fp16 else ''}, needed finite ones. Fix: check the images"
            f"{', or leave out the rounding' if adm_fp16 else ''}"
        )
    return rows


def _squared_radii(points: Float64Array, neighbours: int) -> Float64Array:
    """(n,): squared distance from each point to its k-th nearest neighbour, itself being number 0."""
    radii = np.empty(len(points))
    for start in range(0, len(points), _CHUNK):
        low, high = _distance_bounds(points[start : start + _CHUNK], points)
        # The k-th smallest distance is at most the k-th smallest upper bound; whatever may lie below that is looked at.
        limit = np.partition(high, neighbours, axis=1)[:, neighbours, None]
        for row, candidates in enumerate(low <= limit, start):
            distances = _squared_distances(points[row], points[candidates])
            radii[row] = np.partition(distances, neighbours)[neighbours]
    return radii


def _inside(points: Float64Array, centres: Float64Array, squared_radii: Float64Array) -> BoolArray:
    """(n,): whether a ball around any centre holds the point."""
    inside = np.empty(len(points), dtype=np.bool_)
    for start in range(0, len(points), _CHUNK):
        low, high = _distance_bounds(points[start : start + _CHUNK], centres)
        inside[start : start + _CHUNK] = (high <= squared_radii).any(axis=1)
        candidates = low <= squared_radii
        for row in np.flatnonzero(candidates.any(axis=1) & ~inside[start : start + _CHUNK]):
            which = candidates[row]
            distances = _squared_distances(points[start + row], centres[which])
            inside[start + row] = (distances <= squared_radii[which]).any()
    return inside


def _squared_distances(point: Float64Array, others: Float64Array) -> Float64Array:
    """(m,): the definition. Differences come first, so that a duplicate is at distance 0."""
    distances: Float64Array = np.square(others - point).sum(axis=1)
    return distances


def _distance_bounds(points: Float64Array, others: Float64Array) -> tuple[Float64Array, Float64Array]:
    """Bounds (n, m) below and above `_squared_distances`, from one matrix product, which is far quicker.

    |a|² + |b|² - 2 a·b is off by at most (d + 2) eps (|a| + |b|)² in any order of summation (Higham 2002, section 3.1),
    the definition by less; (|a| + |b|)² <= 2 (|a|² + |b|²). The factor 8 holds both with room.
    """
    squares = np.square(points).sum(axis=1)[:, None] + np.square(others).sum(axis=1)
    nearly = squares - 2 * points @ others.T
    margin = 8 * (points.shape[1] + 2) * np.finfo(np.float64).eps * squares
    return nearly - margin, nearly + margin
