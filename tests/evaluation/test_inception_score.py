"""The Inception Score against its definition term by term, its limits, and torchmetrics."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.image.inception import InceptionScore as TorchmetricsInceptionScore

from hqdit.errors import NumericsError, UsageError
from hqdit.evaluation.inception_score import SPLIT_SIZE, inception_score

Array = npt.NDArray[np.float64]


def distributions(seed: int, n: int, classes: int, sharpness: float = 1.0) -> Array:
    logits = sharpness * np.random.default_rng(seed).standard_normal((n, classes))
    weights = np.exp(logits)
    return weights / weights.sum(axis=1, keepdims=True)


def term_by_term(rows: Array, split_size: int) -> float:
    scores = []
    for start in range(0, len(rows), split_size):
        part = rows[start : start + split_size].tolist()
        marginal = [math.fsum(row[c] for row in part) / len(part) for c in range(len(part[0]))]
        divergences = [
            math.fsum(p * (math.log(p) - math.log(q)) for p, q in zip(row, marginal, strict=True) if p > 0)
            for row in part
        ]
        scores.append(math.exp(math.fsum(divergences) / len(part)))
    return math.fsum(scores) / len(scores)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 12), st.integers(1, 50), st.booleans())
def test_the_definition_term_by_term(seed: int, n: int, classes: int, split_size: int, has_zeros: bool) -> None:
    rows = distributions(seed, n, classes, 2.0)
    if has_zeros:
        rows[rows < 0.5 / classes] = 0.0
        rows /= rows.sum(axis=1, keepdims=True)
    found = inception_score(rows, split_size)
    assert found.value == pytest.approx(term_by_term(rows, split_size), rel=1e-12)
    assert (found.splits, found.count) == (-(-n // split_size), n)


@pytest.mark.parametrize("classes", [1, 2, 10, 1008])
def test_uniform_predictions_score_one(classes: int) -> None:
    assert inception_score(np.full((7, classes), 1 / classes)).value == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("classes", [1, 2, 10, 1008])
def test_perfect_classes_score_their_number(classes: int) -> None:
    assert inception_score(np.tile(np.eye(classes), (3, 1))).value == pytest.approx(classes, rel=1e-12)


def test_sharper_and_more_diverse_is_higher() -> None:
    scores = [inception_score(distributions(0, 200, 10, sharpness)).value for sharpness in (0.1, 1.0, 5.0)]
    assert scores == sorted(scores)
    assert inception_score(np.tile(np.eye(10)[3], (50, 1))).value == 1.0  # sure, but always of the same class


def test_splits_are_consecutive_and_averaged() -> None:
    # Two splits of one class each score 1; the same rows interleaved score 2.
    apart = np.repeat(np.eye(2), SPLIT_SIZE, axis=0)
    assert (inception_score(apart).value, inception_score(apart).splits) == (1.0, 2)
    assert inception_score(np.tile(np.eye(2), (SPLIT_SIZE, 1))).value == pytest.approx(2.0, rel=1e-12)
    ragged = np.concatenate([np.repeat(np.eye(2), 2, axis=0), np.eye(2)])  # split of 4, split of 2
    assert inception_score(ragged, 4).value == pytest.approx(2.0, rel=1e-12)


def test_order_within_one_split_does_not_matter() -> None:
    rows = distributions(1, 300, 10)
    shuffled = rows[np.random.default_rng(2).permutation(300)]
    assert inception_score(rows).value == pytest.approx(inception_score(shuffled).value, rel=1e-13)


@pytest.mark.filterwarnings("ignore:Metric `InceptionScore` will save all:UserWarning")
@pytest.mark.filterwarnings("ignore:std..:UserWarning")  # its deviation over one split
def test_torchmetrics_agrees() -> None:
    class Logits(torch.nn.Module):
        """Images are the logits; torchmetrics takes their softmax."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images[:, 0, 0]

    for seed in range(12):
        logits = 2 * torch.randn(200, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        other = TorchmetricsInceptionScore(feature=Logits(), splits=1)
        other.set_dtype(torch.float64)
        other.update(logits[:, None, None, :])
        expected, _ = other.compute()
        assert inception_score(torch.softmax(logits, dim=1).numpy()).value == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("shape", [(4,), (0, 3), (3, 0), (2, 2, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="needed .n, classes."):
        inception_score(np.ones(shape))


def test_split_size_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="split size 0"):
        inception_score(np.ones((3, 1)), 0)


@pytest.mark.parametrize("row", [[0.5, 0.4], [1.5, -0.5], [math.nan, 1.0], [math.inf, 0.0]])
def test_rows_that_are_no_distribution_are_refused(row: list[float]) -> None:
    with pytest.raises(NumericsError, match="found 1 of 3"):
        inception_score([[0.5, 0.5], row, [1.0, 0.0]])
