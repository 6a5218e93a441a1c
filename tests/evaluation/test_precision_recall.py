"""Precision and recall: hits counted one by one, ties, orientation, the rounding to float16."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hqdit.errors import NumericsError, UsageError
from hqdit.evaluation import precision_recall as module
from hqdit.evaluation.precision_recall import precision_recall

Array = npt.NDArray[np.float64]


def brute_force_hits(points: Array, centres: Array, k: int) -> list[bool]:
    """One pair of points after another, with Python's sort."""

    def squared(a: Array, b: Array) -> float:
        return float(np.square(a - b).sum())

    radii = [sorted(squared(centre, other) for other in centres)[k] for centre in centres]
    return [any(squared(point, c) <= r for c, r in zip(centres, radii, strict=True)) for point in points]


def require_equal_hits(samples: Array, reference: Array, k: int = 3) -> None:
    found = precision_recall(samples, reference, neighbours=k)
    assert found.sample_hits.tolist() == brute_force_hits(samples, reference, k)
    assert found.reference_hits.tolist() == brute_force_hits(reference, samples, k)
    assert found.precision == np.mean(found.sample_hits) and found.recall == np.mean(found.reference_hits)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(5, 30), st.integers(5, 30), st.integers(1, 6), st.integers(1, 4))
def test_hits_of_random_points(seed: int, n: int, m: int, d: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    require_equal_hits(rng.standard_normal((n, d)), 0.3 + rng.standard_normal((m, d)), k)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(5, 30), st.integers(5, 30), st.integers(1, 3))
def test_hits_on_a_grid_full_of_ties_and_duplicates(seed: int, n: int, m: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    require_equal_hits(rng.integers(0, 4, (n, d)).astype(float), rng.integers(0, 4, (m, d)).astype(float))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_hits_far_from_the_origin(seed: int) -> None:
    # |a|² + |b|² - 2ab keeps no digit of distances near 1 here; hits must not come from it.
    rng = np.random.default_rng(seed)
    require_equal_hits(1e9 + rng.standard_normal((20, 3)), 1e9 + rng.standard_normal((25, 3)))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    samples, reference = rng.standard_normal((40, 4)), rng.standard_normal((31, 4))
    whole = precision_recall(samples, reference)
    for chunk in (1, 7, 31):
        monkeypatch.setattr(module, "_CHUNK", chunk)
        parts = precision_recall(samples, reference)
        assert np.array_equal(parts.sample_hits, whole.sample_hits)
        assert np.array_equal(parts.reference_hits, whole.reference_hits)


def test_by_hand_on_a_line() -> None:
    reference = np.array([[0.0], [1.0], [2.0], [3.0]])  # third neighbours: radii 3, 2, 2, 3, so from -3 to 6
    samples = np.array([[-3.0], [6.0], [6.5], [-3.5]])
    found = precision_recall(samples, reference)
    assert found.sample_hits.tolist() == [True, True, False, False]  # the surface is inside
    assert found.recall == 1.0  # each sample's third neighbour lies on the other side


def test_a_point_is_its_own_neighbour_number_zero() -> None:
    # Three pairs of duplicates: with k = 1 every radius is 0, with k = 2 it reaches the next pair.
    reference = np.array([[0.0], [0.0], [10.0], [10.0], [30.0], [30.0]])
    samples = np.array([[0.0], [9.0], [10.0], [500.0]])
    assert precision_recall(samples, reference, neighbours=1).sample_hits.tolist() == [True, False, True, False]
    assert precision_recall(samples, reference, neighbours=2).sample_hits.tolist() == [True, True, True, False]


def test_a_set_against_itself_is_covered() -> None:
    points = np.random.default_rng(1).standard_normal((50, 8))
    found = precision_recall(points, points)
    assert (found.precision, found.recall) == (1.0, 1.0)


def test_collapsed_samples_have_precision_without_recall() -> None:
    rng = np.random.default_rng(2)
    wide, tight = rng.standard_normal((300, 4)), 0.1 * rng.standard_normal((300, 4))
    collapsed = precision_recall(tight, wide)
    assert collapsed.precision > 0.8 and collapsed.recall < 0.3
    scattered = precision_recall(wide, tight)
    assert (scattered.precision, scattered.recall) == (collapsed.recall, collapsed.precision)


def test_order_moves_hits_with_their_points() -> None:
    rng = np.random.default_rng(3)
    samples, reference = rng.standard_normal((40, 3)), 1 + rng.standard_normal((50, 3))
    order = rng.permutation(40)
    found, moved = precision_recall(samples, reference), precision_recall(samples[order], reference)
    assert np.array_equal(moved.sample_hits, found.sample_hits[order])
    assert np.array_equal(moved.reference_hits, found.reference_hits)


def test_scaling_both_changes_nothing() -> None:
    rng = np.random.default_rng(4)
    samples, reference = rng.standard_normal((40, 3)), 0.5 + rng.standard_normal((50, 3))
    found, scaled = precision_recall(samples, reference), precision_recall(1024 * samples, 1024 * reference)
    assert np.array_equal(scaled.sample_hits, found.sample_hits)
    assert np.array_equal(scaled.reference_hits, found.reference_hits)


def test_float16_rounds_the_features_and_says_so() -> None:
    rng = np.random.default_rng(5)
    samples, reference = 8 + 0.01 * rng.standard_normal((200, 2)), 8 + 0.01 * rng.standard_normal((200, 2))
    rounded = precision_recall(samples, reference, adm_fp16=True)
    by_hand = precision_recall(samples.astype(np.float16), reference.astype(np.float16))
    exact = precision_recall(samples, reference)
    assert rounded.is_float16 and not exact.is_float16
    assert np.array_equal(rounded.sample_hits, by_hand.sample_hits)
    assert np.array_equal(rounded.reference_hits, by_hand.reference_hits)
    assert not np.array_equal(rounded.sample_hits, exact.sample_hits)  # steps of 1/128 among deviations of 1/100


def test_features_beyond_float16_are_refused_only_there() -> None:
    points = np.arange(8.0)[:, None] * 1e5
    assert precision_recall(points, points).precision == 1.0
    with pytest.raises(NumericsError, match="after rounding to float16"):
        precision_recall(points, points, adm_fp16=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_features_are_refused(bad: float) -> None:
    points, broken = np.zeros((5, 2)), np.zeros((5, 2))
    broken[3, 1] = bad
    with pytest.raises(NumericsError, match="1 of 10 values of the samples"):
        precision_recall(broken, points)
    with pytest.raises(NumericsError, match="1 of 10 values of the reference"):
        precision_recall(points, broken)


@pytest.mark.parametrize(("shape", "k"), [((3, 2), 3), ((5,), 3), ((5, 0), 3), ((5, 2), 0)])
def test_too_few_points_and_other_shapes_are_refused(shape: tuple[int, ...], k: int) -> None:
    with pytest.raises(UsageError, match="needed .n, d. with more"):
        precision_recall(np.zeros(shape), np.zeros((9, 2)), neighbours=k)


def test_widths_that_differ_are_refused() -> None:
    with pytest.raises(UsageError, match="2 and 3"):
        precision_recall(np.zeros((5, 2)), np.zeros((5, 3)))
