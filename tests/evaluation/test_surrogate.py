"""The shipped classifier and held-out digits, measured from the files that ship."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hqdit.errors import NumericsError, UsageError
from hqdit.evaluation.frechet import GaussianStatistics, frechet_distance
from hqdit.evaluation.surrogate import (
    DigitsClassifierNetwork,
    SurrogateClassifier,
    from_stored,
    held_out_digits,
    to_stored,
)

RECORD = Path(__file__).resolve().parents[2] / "training" / "digits_classifier_record.json"
DATA = files("hqdit").joinpath("data", "digits_evaluation")


@pytest.fixture(scope="module")
def classifier() -> SurrogateClassifier:
    return SurrogateClassifier.load()


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(RECORD.read_text())
    return loaded


def test_name_comes_from_the_file(classifier: SurrogateClassifier) -> None:
    assert classifier.name == "digits-cnn-v1"
    assert b'"extractor":"digits-cnn-v1"' in DATA.joinpath("classifier.safetensors").read_bytes()


def test_held_out_accuracy(classifier: SurrogateClassifier, record: dict[str, Any]) -> None:
    images, labels = held_out_digits()
    accuracy = float(np.mean(classifier.classify(images) == labels.numpy()))
    assert accuracy >= 0.97
    # One image of 360 is 0.0028, so only a record of these very files agrees.
    assert accuracy == pytest.approx(record["held_out_accuracy"], abs=1e-12)
    assert record["svm_held_out_accuracy"] >= 0.97


def test_files_are_those_of_the_record(record: dict[str, Any]) -> None:
    assert set(record["files"]) == {"classifier.safetensors", "held_out.safetensors"}
    for name, expected in record["files"].items():
        blob = DATA.joinpath(name).read_bytes()
        assert hashlib.sha256(blob).hexdigest() == expected["sha256"]
        assert len(blob) == expected["bytes"]


def test_weights_are_small_and_frozen(classifier: SurrogateClassifier, record: dict[str, Any]) -> None:
    parameters = list(classifier.network.parameters())
    assert sum(parameter.numel() for parameter in parameters) == record["parameters"]
    assert 4 * record["parameters"] < 300_000
    assert not any(parameter.requires_grad for parameter in parameters)
    assert not classifier.network.training


def test_held_out_digits_have_the_documented_form() -> None:
    images, labels = held_out_digits()
    assert (tuple(images.shape), images.dtype) == ((360, 1, 8, 8), torch.float32)
    assert (tuple(labels.shape), labels.dtype) == ((360,), torch.int64)
    assert (float(images.min()), float(images.max())) == (-1, 1)
    assert set(labels.tolist()) == set(range(10))


def test_held_out_digits_are_the_held_out_fifth_of_the_data_set() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    selection = pytest.importorskip("sklearn.model_selection")
    data = datasets.load_digits()
    train, held_out = selection.train_test_split(
        np.arange(len(data.target)), test_size=0.2, stratify=data.target, random_state=0
    )
    images, labels = held_out_digits()
    assert np.array_equal(images.squeeze(1).numpy(), data.images[held_out] / 8 - 1)
    assert np.array_equal(labels.numpy(), data.target[held_out])
    seen = {image.tobytes() for image in data.images[train]}
    assert not any(image.tobytes() in seen for image in data.images[held_out])


def test_stored_form_is_exact() -> None:
    stored = torch.arange(17, dtype=torch.uint8).repeat(64)[: 64 * 17].reshape(17, 8, 8)
    images = from_stored(stored)
    assert (tuple(images.shape), images.dtype) == ((17, 1, 8, 8), torch.float32)
    assert (float(images.min()), float(images.max())) == (-1, 1)
    assert torch.equal(to_stored(images), stored)


def test_features_have_the_documented_form(classifier: SurrogateClassifier) -> None:
    images, _ = held_out_digits()
    features, classes = classifier.features(images), classifier.classify(images)
    assert (features.shape, features.dtype) == ((360, 64), np.dtype(np.float64))
    assert (classes.shape, classes.dtype) == ((360,), np.dtype(np.int64))
    assert classifier.features(images[:0]).shape == (0, 64)
    assert classifier.classify(images[:0]).shape == (0,)


def test_features_are_those_that_the_name_promises(classifier: SurrogateClassifier, record: dict[str, Any]) -> None:
    images, _ = held_out_digits()
    measured = float(np.square(classifier.features(images)).mean())
    assert classifier.name == record["extractor"]
    assert measured == pytest.approx(record["held_out_mean_square_feature"], rel=1e-9)


def test_features_are_those_that_the_head_classifies(classifier: SurrogateClassifier) -> None:
    images, _ = held_out_digits()
    head = classifier.network.head
    logits = classifier.features(images) @ head.weight.numpy().T + head.bias.numpy()
    forward = classifier.network(images.double())
    assert np.array_equal(logits.argmax(axis=1), classifier.classify(images))
    assert np.array_equal(forward.argmax(dim=1).numpy(), classifier.classify(images))


def test_features_do_not_depend_on_the_batch(classifier: SurrogateClassifier) -> None:
    images, _ = held_out_digits()  # 360 images cross the internal batch of 256
    together = classifier.features(images)
    for parts in (1, 7, 300):
        apart = np.concatenate([classifier.features(chunk) for chunk in torch.split(images, parts)])
        assert np.linalg.norm(apart - together) <= 1e-5 * np.linalg.norm(together)
    backwards = classifier.features(images.flip(0))[::-1]
    assert np.linalg.norm(backwards - together) <= 1e-5 * np.linalg.norm(together)


def test_covariance_of_the_features_has_full_rank(classifier: SurrogateClassifier) -> None:
    images, _ = held_out_digits()
    covariance = GaussianStatistics.from_features(classifier.features(images)).covariance
    assert np.linalg.matrix_rank(covariance) == 64


def test_distance_grows_with_damage(classifier: SurrogateClassifier) -> None:
    images, _ = held_out_digits()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    reference = GaussianStatistics.from_features(classifier.features(images))
    distances = []
    for level in (0.0, 0.1, 0.3, 1.0):
        damaged = GaussianStatistics.from_features(classifier.features(images + level * noise))
        distances.append(frechet_distance(reference, damaged))
    assert distances[0] < 1e-9
    assert distances == sorted(distances)
    assert distances[1] > 1e-3 > distances[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_images_are_refused(classifier: SurrogateClassifier, bad: float) -> None:
    images, _ = held_out_digits()
    images[300, 0, 7, 7] = bad
    with pytest.raises(NumericsError, match="images: found NaN or infinity in 1 of 360"):
        classifier.features(images)
    with pytest.raises(NumericsError, match="images: found NaN or infinity in 1 of 360"):
        classifier.classify(images)


def test_non_finite_features_are_refused() -> None:
    network = DigitsClassifierNetwork()
    torch.nn.init.constant_(network.trunk[-2].bias, float("nan"))  # type: ignore[arg-type]
    broken = SurrogateClassifier("broken", network)
    with pytest.raises(NumericsError, match="broken: features: found NaN or infinity in 3 of 3"):
        broken.features(torch.zeros(3, 1, 8, 8))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 8, 8),
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 1, 16, 16),
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8),  # 0..16 rather than [-1, 1]
    ],
)
def test_other_images_are_refused(classifier: SurrogateClassifier, images: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="needed float32"):
        classifier.features(images)


def test_importing_stays_within_the_floor() -> None:
    code = (
        "import sys, hqdit.evaluation.surrogate, hqdit.evaluation.frechet;"
        "print([m for m in ('matplotlib', 'diffusers', 'sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
