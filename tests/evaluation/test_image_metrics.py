"""All metrics together: names, values, directions and intervals, on the bundled data."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hqdit.errors import UsageError
from hqdit.evaluation.extractors import FeatureExtractor, Features, joined
from hqdit.evaluation.frechet import GaussianStatistics, frechet_distance
from hqdit.evaluation.image_metrics import image_metrics
from hqdit.evaluation.inception_score import inception_score
from hqdit.evaluation.precision_recall import precision_recall
from hqdit.evaluation.surrogate import SurrogateClassifier, held_out_images
from hqdit.records.run_record import Interval

METRICS = ("Fréchet distance", "spatial Fréchet distance", "classifier score", "precision", "recall")


@pytest.fixture(scope="module")
def classifier() -> SurrogateClassifier:
    return SurrogateClassifier.load("digits")


@pytest.fixture(scope="module")
def halves() -> tuple[Tensor, Tensor, list[int]]:
    """Two halves of the held-out digits, with the labels of the first."""
    images, labels = held_out_images("digits")
    return images[::2], images[1::2], labels[::2].tolist()


class Plain:
    """An extractor without spatial features and probabilities; images are their own features."""

    name = "plain"
    is_inception = False

    def extract(self, images: Tensor) -> Features:
        return Features(images.double().flatten(1).numpy(), None, None)


def test_names_carry_the_extractor_and_never_say_fid(
    classifier: SurrogateClassifier, halves: tuple[Tensor, Tensor, list[int]]
) -> None:
    found = image_metrics(classifier, halves[0], halves[1], classes=halves[2], resamples=0)
    assert list(found) == [f"{metric} (digits-cnn-v1)" for metric in (*METRICS, "class accuracy")]
    assert not any("FID" in name or "Inception" in name for name in found)
    rounded = image_metrics(classifier, halves[0], halves[1], resamples=0, adm_fp16=True)
    assert "precision, float16 features (digits-cnn-v1)" in rounded
    assert "recall, float16 features (digits-cnn-v1)" in rounded


def test_values_are_those_of_the_single_metrics(
    classifier: SurrogateClassifier, halves: tuple[Tensor, Tensor, list[int]]
) -> None:
    left, right = (classifier.extract(images) for images in halves[:2])
    assert left.spatial is not None and right.spatial is not None and left.probabilities is not None
    hits = precision_recall(left.pooled, right.pooled)
    distances = [
        frechet_distance(GaussianStatistics.from_features(a), GaussianStatistics.from_features(b))
        for a, b in ((left.pooled, right.pooled), (left.spatial, right.spatial))
    ]
    right_classes = float(np.mean(classifier.classify(halves[0]) == np.array(halves[2])))
    expected = [*distances, inception_score(left.probabilities).value, hits.precision, hits.recall, right_classes]
    for resamples in (0, 10):
        for samples, reference in ((halves[0], halves[1]), (left, right)):
            found = image_metrics(classifier, samples, reference, classes=halves[2], resamples=resamples)
            values = [value.value if isinstance(value, Interval) else value for value in found.values()]
            assert values == expected


def test_damage_is_seen_in_every_metric(
    classifier: SurrogateClassifier, halves: tuple[Tensor, Tensor, list[int]]
) -> None:
    noise = torch.randn(halves[0].shape, generator=torch.Generator().manual_seed(0))
    clean, damaged = (
        list(image_metrics(classifier, images, halves[1], classes=halves[2], resamples=0).values())
        for images in (halves[0], halves[0] + noise)
    )
    assert all(worse > better for better, worse in zip(clean[:2], damaged[:2], strict=True))  # distances
    assert all(worse < better for better, worse in zip(clean[2:], damaged[2:], strict=True))  # scores and shares


def test_intervals_come_from_resampling(
    classifier: SurrogateClassifier, halves: tuple[Tensor, Tensor, list[int]]
) -> None:
    left, right = (classifier.extract(images) for images in halves[:2])
    found = image_metrics(classifier, left, right, classes=halves[2], resamples=40)
    again = image_metrics(classifier, left, right, classes=halves[2], resamples=40)
    other = image_metrics(classifier, left, right, classes=halves[2], resamples=40, seed=1)
    assert found == again and found != other
    for name, value in found.items():
        assert isinstance(value, Interval) and all(map(math.isfinite, (value.value, value.low, value.high)))
        assert value.low < value.high or "accuracy" in name
        assert value.low <= value.value <= value.high


def test_balanced_and_nearly_perfect_samples_have_intervals_around_their_values(
    classifier: SurrogateClassifier,
) -> None:
    # Of each class the 12 digits that the classifier is surest of, classes in turn, as samples have them.
    images, labels = held_out_images("digits")
    features = classifier.extract(images)
    assert features.probabilities is not None
    sure = features.probabilities[np.arange(len(labels)), labels.numpy()]
    best = [np.flatnonzero(labels.numpy() == c)[np.argsort(-sure[labels.numpy() == c])[:12]] for c in range(10)]
    rows = np.stack(best, axis=1).ravel()
    samples = images[torch.from_numpy(rows)]
    classes = [index % 10 for index in range(120)]
    found = image_metrics(classifier, samples, images, classes=classes, resamples=40)
    unstratified = image_metrics(classifier, samples, images, resamples=40)
    for value in (*found.values(), *unstratified.values()):
        assert isinstance(value, Interval)
        assert value.low <= value.value <= value.high
    for name in ("Fréchet distance (digits-cnn-v1)", "spatial Fréchet distance (digits-cnn-v1)"):
        value = found[name]
        assert isinstance(value, Interval) and value.low >= 0
    score, loose = (f["classifier score (digits-cnn-v1)"] for f in (found, unstratified))
    assert isinstance(score, Interval) and isinstance(loose, Interval)
    # Nearly 10 and hardly in doubt: no resample lacks a class. Of one set, resamples have uneven classes.
    assert 9.9 < score.low <= score.high <= 10 and loose.low < 9.8
    accuracy = found["class accuracy (digits-cnn-v1)"]
    assert isinstance(accuracy, Interval) and (accuracy.low, accuracy.high) == (1.0, 1.0)


def test_intervals_need_a_class_with_two_samples(classifier: SurrogateClassifier) -> None:
    images, _ = held_out_images("digits")
    with pytest.raises(UsageError, match="found 10 labels of 10 kinds for 10 rows"):
        image_metrics(classifier, images[:10], images, classes=list(range(10)), resamples=5)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_interval_of_a_distance_holds_the_mean_over_sets_of_that_size(shift: float) -> None:
    # Repeated rows raise a distance: uncorrected, the interval would lie above every distance of fresh sets.
    rng = np.random.default_rng(1)
    reference = Features(rng.standard_normal((200, 10)), None, None)
    fresh = []
    for _ in range(40):
        samples = Features(shift + rng.standard_normal((60, 10)), None, None)
        found = image_metrics(Plain(), samples, reference, resamples=60)["Fréchet distance (plain)"]
        assert isinstance(found, Interval)
        fresh.append(found)
    mean = np.mean([interval.value for interval in fresh])
    covered = [interval.low <= mean <= interval.high for interval in fresh]
    assert np.mean(covered) >= 0.85  # nominally 0.95, of 40 sets


def test_what_an_extractor_lacks_is_left_out() -> None:
    extractor: FeatureExtractor = Plain()
    rng = np.random.default_rng(0)
    samples, reference = (torch.from_numpy(rng.uniform(-1, 1, (30, 1, 2, 2))) for _ in range(2))
    found = image_metrics(extractor, samples, reference, classes=[0] * 30, resamples=0)
    assert list(found) == ["Fréchet distance (plain)", "precision (plain)", "recall (plain)"]


def test_batches_join_to_the_whole(classifier: SurrogateClassifier, halves: tuple[Tensor, Tensor, list[int]]) -> None:
    whole = classifier.extract(halves[0])
    parts = joined([classifier.extract(batch) for batch in torch.split(halves[0], 70)])
    for name in ("pooled", "spatial", "probabilities"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
    plain = joined([Plain().extract(batch) for batch in torch.split(halves[0], 70)])
    assert plain.spatial is None and plain.probabilities is None and len(plain.pooled) == 180


def test_another_number_of_classes_is_refused(
    classifier: SurrogateClassifier, halves: tuple[Tensor, Tensor, list[int]]
) -> None:
    with pytest.raises(UsageError, match="found 3 classes for 180 samples"):
        image_metrics(classifier, halves[0], halves[1], classes=[1, 2, 3], resamples=0)
