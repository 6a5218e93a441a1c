"""The Fréchet distance against closed forms and an independent formula."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.fid import FrechetInceptionDistance

from hqdit.errors import NumericsError, UsageError
from hqdit.evaluation.frechet import GaussianStatistics, frechet_distance

Array = npt.NDArray[np.float64]
SEEDS = st.integers(0, 2**32 - 1)
WIDTHS = st.integers(1, 12)


def rotation(rng: np.random.Generator, d: int) -> Array:
    return np.linalg.qr(rng.standard_normal((d, d)))[0]


def gaussian(rng: np.random.Generator, d: int) -> GaussianStatistics:
    """Eigenvalues in [0.1, 10]: full rank by construction, so that every formula is well conditioned."""
    axes = rotation(rng, d)
    covariance = (axes * rng.uniform(0.1, 10.0, d)) @ axes.T
    return GaussianStatistics(rng.standard_normal(d), (covariance + covariance.T) / 2, 100)


def size(*sides: GaussianStatistics) -> float:
    """Magnitude of the terms that are subtracted: what rounding of a distance is relative to."""
    return sum(float(np.trace(s.covariance) + s.mean @ s.mean) for s in sides)


# Statistics


def test_statistics_by_hand() -> None:
    features = [[0.0, 1.0, 5.0], [2.0, 1.0, 3.0], [4.0, 4.0, 4.0], [6.0, 6.0, 8.0]]
    statistics = GaussianStatistics.from_features(features)
    columns = [[Fraction(row[j]) for row in features] for j in range(3)]
    means = [sum(column) / 4 for column in columns]
    offsets = [[x - mean for x in column] for column, mean in zip(columns, means, strict=True)]
    expected = [
        [float(sum(x * y for x, y in zip(left, right, strict=True)) / 3) for right in offsets] for left in offsets
    ]
    assert statistics.count == 4
    np.testing.assert_allclose(statistics.mean, [float(mean) for mean in means], rtol=1e-15)
    np.testing.assert_allclose(statistics.covariance, expected, rtol=1e-14)


def test_divisor_is_n_minus_one() -> None:
    statistics = GaussianStatistics.from_features([[0.0], [2.0]])
    assert statistics.covariance.tolist() == [[2.0]]  # 1.0 with the divisor n


def test_rows_are_samples() -> None:
    features = np.random.default_rng(0).standard_normal((7, 3))
    statistics = GaussianStatistics.from_features(features)
    assert statistics.mean.shape == (3,)
    assert statistics.covariance.shape == (3, 3)
    np.testing.assert_allclose(statistics.covariance, np.cov(features, rowvar=False), rtol=1e-13, atol=1e-15)


def test_sums_are_float64() -> None:
    # In float32 the squares of values near 10,000 keep no digit of a variance of 1/12.
    features = (1e4 + np.arange(64) / 64).astype(np.float32)[:, None]
    statistics = GaussianStatistics.from_features(features)
    assert statistics.mean.dtype == statistics.covariance.dtype == np.float64
    exact = np.var(np.arange(64) / 64, ddof=1)
    assert statistics.covariance[0, 0] == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_features_are_refused(bad: float) -> None:
    features = np.zeros((5, 3))
    features[4, 2] = bad
    with pytest.raises(NumericsError, match="features: found 1 of 15"):
        GaussianStatistics.from_features(features)


def test_overflow_is_refused() -> None:
    with pytest.raises(NumericsError):
        GaussianStatistics.from_features([[1e200], [-1e200]])
    large = GaussianStatistics(np.array([1e200]), np.eye(1), 2)
    with pytest.raises(NumericsError, match="inf"):
        frechet_distance(large, GaussianStatistics(np.zeros(1), np.eye(1), 2))


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_are_refused(n: int) -> None:
    with pytest.raises(UsageError, match=f"{n} feature"):
        GaussianStatistics.from_features(np.zeros((n, 3)))
    with pytest.raises(UsageError, match=f"{n} feature"):
        GaussianStatistics(np.zeros(3), np.eye(3), n)


@pytest.mark.parametrize("shape", [(4,), (4, 0), (4, 3, 1)])
def test_features_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="shape"):
        GaussianStatistics.from_features(np.zeros(shape))


def test_statistics_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UsageError, match="shape"):
        GaussianStatistics(np.zeros(3), np.eye(2), 5)
    with pytest.raises(UsageError, match="transpose"):
        GaussianStatistics(np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), 5)
    with pytest.raises(NumericsError, match="covariance: found 1 of 4"):
        GaussianStatistics(np.zeros(2), np.diag([1.0, np.nan]), 5)
    with pytest.raises(NumericsError, match="mean: found 1 of 2"):
        GaussianStatistics(np.array([0.0, np.nan]), np.eye(2), 5)


# Distance


@settings(deadline=None)
@given(SEEDS, WIDTHS)
def test_equal_covariances(seed: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    a = gaussian(rng, d)
    b = GaussianStatistics(a.mean + rng.standard_normal(d), a.covariance, a.count)
    expected = float(np.sum((a.mean - b.mean) ** 2))
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-12 * size(a, b))


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 100, allow_subnormal=False), st.floats(0, 100, allow_subnormal=False)),
        min_size=1,
        max_size=10,
    )
)
def test_diagonal_covariances(pairs: list[tuple[float, float]]) -> None:
    left, right = np.array(pairs).T
    a = GaussianStatistics(np.zeros(len(pairs)), np.diag(left), 9)
    b = GaussianStatistics(np.zeros(len(pairs)), np.diag(right), 9)
    expected = float(np.sum((np.sqrt(left) - np.sqrt(right)) ** 2))
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-13 * size(a, b))


def test_one_dimension_by_hand() -> None:
    a = GaussianStatistics(np.array([1.0]), np.array([[4.0]]), 10)
    b = GaussianStatistics(np.array([4.0]), np.array([[25.0]]), 10)
    assert frechet_distance(a, b) == pytest.approx(3.0**2 + (2.0 - 5.0) ** 2, rel=1e-14)


@settings(deadline=None)
@given(SEEDS, WIDTHS)
def test_against_the_eigenvalues_of_the_product(seed: int, d: int) -> None:
    # tr((Sa^1/2 Sb Sa^1/2)^1/2) is the sum of the square roots of the eigenvalues of Sa Sb, a similar matrix.
    rng = np.random.default_rng(seed)
    a, b = gaussian(rng, d), gaussian(rng, d)
    eigenvalues = scipy.linalg.eigvals(a.covariance @ b.covariance)
    cross = float(np.sqrt(eigenvalues.real).sum())
    shift = a.mean - b.mean
    expected = shift @ shift + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross
    measured_cross = (shift @ shift + np.trace(a.covariance + b.covariance) - frechet_distance(a, b)) / 2
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-10 * size(a, b))
    assert measured_cross == pytest.approx(cross, rel=1e-10)


@pytest.mark.parametrize("n", [300, 20])  # full rank and, with 64 columns, rank 19
def test_same_features_are_at_distance_zero(n: int) -> None:
    features = np.random.default_rng(1).standard_normal((n, 64))
    a, b = (GaussianStatistics.from_features(features) for _ in range(2))
    assert 0 <= frechet_distance(a, b) < 1e-9


@pytest.mark.parametrize("n", [300, 20])
def test_shifted_features(n: int) -> None:
    rng = np.random.default_rng(2)
    features, shift = rng.standard_normal((n, 64)), rng.standard_normal(64)
    a, b = GaussianStatistics.from_features(features), GaussianStatistics.from_features(features + shift)
    assert frechet_distance(a, b) == pytest.approx(shift @ shift, rel=1e-9)


def by_product_eigenvalues(a: GaussianStatistics, b: GaussianStatistics) -> float:
    cross = float(np.sqrt(scipy.linalg.eigvals(a.covariance @ b.covariance).astype(complex)).real.sum())
    return terms(a, b) - 2 * cross


def by_matrix_square_root(a: GaussianStatistics, b: GaussianStatistics) -> float:
    return terms(a, b) - 2 * float(np.trace(scipy.linalg.sqrtm(a.covariance @ b.covariance)).real)


def terms(a: GaussianStatistics, b: GaussianStatistics) -> float:
    shift = a.mean - b.mean
    return float(shift @ shift + np.trace(a.covariance) + np.trace(b.covariance))


def by_nuclear_norm(left: Array, right: Array) -> float:
    """The trace of the root is the nuclear norm of A Bᵀ, A and B the centred rows over sqrt(n - 1), at any rank."""
    a, b = ((rows - rows.mean(axis=0)) / np.sqrt(len(rows) - 1) for rows in (left, right))
    cross = float(np.linalg.norm(a @ b.T, "nuc"))
    shift = left.mean(axis=0) - right.mean(axis=0)
    return float(shift @ shift + np.square(a).sum() + np.square(b).sum() - 2 * cross)


@pytest.mark.parametrize("seed", range(6))
def test_three_formulas_at_full_rank(seed: int) -> None:
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((600, 64)) @ rng.standard_normal((64, 64))
    right = 1 + rng.standard_normal((500, 64)) @ rng.standard_normal((64, 64))
    a, b = GaussianStatistics.from_features(left), GaussianStatistics.from_features(right)
    found = frechet_distance(a, b)
    assert found == pytest.approx(by_nuclear_norm(left, right), rel=1e-10)
    assert found == pytest.approx(by_product_eigenvalues(a, b), rel=1e-10)
    assert found == pytest.approx(by_matrix_square_root(a, b), rel=1e-10)
    stored = [GaussianStatistics(s.mean, s.covariance, s.count) for s in (a, b)]  # as if read from a file
    assert found == pytest.approx(frechet_distance(*stored), rel=1e-10)


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.integers(2, 40), st.integers(2, 80))
def test_the_nuclear_norm_at_any_rank(seed: int, n: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((n, 40)), 1 + 2 * rng.standard_normal((m, 40))
    found = frechet_distance(GaussianStatistics.from_features(left), GaussianStatistics.from_features(right))
    assert found == pytest.approx(by_nuclear_norm(left, right), rel=1e-10)


def test_two_points_each_by_hand() -> None:
    # Both sets lie on the first axis of a space of 50: Gaussians of one dimension with variances 2 and 18, means 1, 5.
    left, right = np.zeros((2, 50)), np.zeros((2, 50))
    left[:, 0], right[:, 0] = [0.0, 2.0], [2.0, 8.0]
    a, b = GaussianStatistics.from_features(left), GaussianStatistics.from_features(right)
    assert frechet_distance(a, b) == pytest.approx(4.0**2 + (np.sqrt(18) - np.sqrt(2)) ** 2, rel=1e-14)


def test_rank_deficient_sets_against_themselves_and_shifted() -> None:
    rng = np.random.default_rng(7)
    features, shift = rng.standard_normal((5, 200)), rng.standard_normal(200)
    a, b = GaussianStatistics.from_features(features), GaussianStatistics.from_features(features + shift)
    assert frechet_distance(a, a) <= 1e-12 * size(a)
    assert frechet_distance(a, b) == pytest.approx(shift @ shift, rel=1e-10)


def test_order_of_the_samples_does_not_matter() -> None:
    rng = np.random.default_rng(8)
    left, right = rng.standard_normal((50, 6)), 2 * rng.standard_normal((40, 6))
    reference = GaussianStatistics.from_features(right)
    shuffled = GaussianStatistics.from_features(left[rng.permutation(50)])
    in_order = frechet_distance(GaussianStatistics.from_features(left), reference)
    assert frechet_distance(shuffled, reference) == pytest.approx(in_order, rel=1e-12)


def test_a_common_eigenbasis() -> None:
    rng = np.random.default_rng(9)
    axes, left, right = rotation(rng, 20), rng.uniform(0.1, 9, 20), rng.uniform(0.1, 9, 20)
    covariances = [(axes * spectrum) @ axes.T for spectrum in (left, right)]
    a, b = (GaussianStatistics(np.zeros(20), (c + c.T) / 2, 9) for c in covariances)
    assert frechet_distance(a, b) == pytest.approx(float(np.sum((np.sqrt(left) - np.sqrt(right)) ** 2)), rel=1e-10)


def test_a_factor_of_another_covariance_is_refused() -> None:
    for factor in (2 * np.eye(3), np.eye(2), np.full((3, 3), np.nan)):
        with pytest.raises(UsageError, match="not one of the covariance"):
            GaussianStatistics(np.zeros(3), np.eye(3), 5, factor)


class RandomProjection(torch.nn.Module):
    """A fixed extractor for torchmetrics and for us: uint8 images (n, 3, 8, 8) to 16 features in float64."""

    num_features = 16

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(3 * 8 * 8, self.num_features, generator=random, dtype=torch.float64)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(torch.float64).flatten(1) @ self.matrix / 255


def require_torchmetrics_agrees(seed: int) -> None:
    extractor, random = RandomProjection(), torch.Generator().manual_seed(seed)
    sides = []
    for count, low, high in ((80, 0, 256), (60, 40, 200)):
        sides.append(torch.randint(low, high, (count, 3, 8, 8), generator=random).to(torch.uint8))
    other = FrechetInceptionDistance(feature=extractor, input_img_size=(3, 8, 8))
    other.set_dtype(torch.float64)
    for images, is_real in zip(sides, (True, False), strict=True):
        for batch in torch.split(images, 32):
            other.update(batch, real=is_real)
    statistics = [GaussianStatistics.from_features(extractor(images).numpy()) for images in sides]
    assert frechet_distance(*statistics) == pytest.approx(float(other.compute()), rel=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_torchmetrics_agrees(seed: int) -> None:
    require_torchmetrics_agrees(seed)


@pytest.mark.soak
def test_torchmetrics_agrees_on_two_hundred_sets() -> None:
    for seed in range(12, 212):
        require_torchmetrics_agrees(seed)


def test_ranks_that_differ() -> None:
    # Two planes that share one axis of a space of three, rotated together: only the shared axis interacts.
    axes = rotation(np.random.default_rng(3), 3)
    left, right = (axes * [4.0, 9.0, 0.0]) @ axes.T, (axes * [0.0, 1.0, 16.0]) @ axes.T
    a = GaussianStatistics(np.zeros(3), (left + left.T) / 2, 9)
    b = GaussianStatistics(np.zeros(3), (right + right.T) / 2, 9)
    # An eigenvalue of zero comes out as about 1e-16 of the largest, its square root as 1e-8: hence 1e-6.
    assert frechet_distance(a, b) == pytest.approx(4.0 + (3.0 - 1.0) ** 2 + 16.0, abs=1e-6)


@settings(deadline=None)
@given(SEEDS, WIDTHS)
def test_symmetric_in_its_arguments(seed: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = gaussian(rng, d), gaussian(rng, d)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), abs=1e-12 * size(a, b))


@settings(deadline=None)
@given(SEEDS, WIDTHS)
def test_rotating_and_shifting_both_changes_nothing(seed: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((40, d)), 2 * rng.standard_normal((30, d)) + 1
    turn, shift = rotation(rng, d), rng.standard_normal(d)
    a, b = GaussianStatistics.from_features(left), GaussianStatistics.from_features(right)
    turned = frechet_distance(
        GaussianStatistics.from_features(left @ turn + shift),
        GaussianStatistics.from_features(right @ turn + shift),
    )
    assert turned == pytest.approx(frechet_distance(a, b), abs=1e-12 * size(a, b))


@settings(deadline=None)
@given(SEEDS, st.floats(1e-3, 1e3))
def test_scaling_both_scales_by_the_square(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    left, right = rng.standard_normal((40, 5)), 2 * rng.standard_normal((30, 5)) + 1
    a, b = GaussianStatistics.from_features(left), GaussianStatistics.from_features(right)
    scaled = frechet_distance(
        GaussianStatistics.from_features(scale * left), GaussianStatistics.from_features(scale * right)
    )
    assert scaled == pytest.approx(scale**2 * frechet_distance(a, b), abs=1e-12 * scale**2 * size(a, b))


def test_widths_that_differ_are_refused() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(UsageError, match="3 and 4"):
        frechet_distance(gaussian(rng, 3), gaussian(rng, 4))


@pytest.mark.parametrize("spectrum", [[-0.01, 1.0], [-2.0, -1.0]])
def test_indefinite_covariance_is_refused(spectrum: list[float]) -> None:
    a = GaussianStatistics(np.zeros(2), np.diag(spectrum), 9)
    b = GaussianStatistics(np.zeros(2), np.eye(2), 9)
    with pytest.raises(NumericsError, match="second"):
        frechet_distance(b, a)
    with pytest.raises(NumericsError, match="first"):
        frechet_distance(a, b)


def test_negative_eigenvalues_of_rounding_size_are_clipped() -> None:
    a = GaussianStatistics(np.zeros(2), np.diag([1.0, -1e-15]), 9)
    b = GaussianStatistics(np.zeros(2), np.diag([4.0, 1.0]), 9)
    assert frechet_distance(a, b) == pytest.approx(1.0 + 1.0, abs=1e-12)
