"""The shipped classifiers and held-out images, measured from the files that ship."""

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
from hqdit.evaluation.shapes import shapes_images
from hqdit.evaluation.surrogate import (
    SURROGATE_DATA,
    ClassifierNetwork,
    SurrogateClassifier,
    from_stored,
    held_out_images,
    to_stored,
)

TRAINING = Path(__file__).resolve().parents[2] / "training"
DATA = files("hqdit").joinpath("data")
DATASETS = sorted(SURROGATE_DATA)


@pytest.fixture(scope="module", params=DATASETS)
def dataset(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def classifier(dataset: str) -> SurrogateClassifier:
    return SurrogateClassifier.load(dataset)


@pytest.fixture(scope="module")
def held_out(dataset: str) -> tuple[torch.Tensor, torch.Tensor]:
    return held_out_images(dataset)


@pytest.fixture(scope="module")
def record(dataset: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((TRAINING / f"{dataset}_classifier_record.json").read_text())
    return loaded


def test_name_comes_from_the_file(dataset: str, classifier: SurrogateClassifier) -> None:
    assert classifier.name == f"{dataset}-cnn-v1"
    blob = DATA.joinpath(f"{dataset}_evaluation", "classifier.safetensors").read_bytes()
    assert f'"extractor":"{dataset}-cnn-v1"'.encode() in blob


def test_digits_are_the_default() -> None:
    assert SurrogateClassifier.load().name == "digits-cnn-v1"


@pytest.mark.parametrize("load", [SurrogateClassifier.load, held_out_images])
def test_an_unknown_data_set_is_refused(load: Any) -> None:
    with pytest.raises(UsageError, match="found 'letters', needed one of digits, shapes"):
        load("letters")


def test_held_out_accuracy(
    classifier: SurrogateClassifier, held_out: tuple[torch.Tensor, torch.Tensor], record: dict[str, Any]
) -> None:
    images, labels = held_out
    accuracy = float(np.mean(classifier.classify(images) == labels.numpy()))
    assert accuracy >= 0.97
    # One image is at least 0.001, so only a record of these very files agrees.
    assert accuracy == pytest.approx(record["held_out_accuracy"], abs=1e-12)
    assert record["svm_held_out_accuracy"] >= 0.97


def test_files_are_those_of_the_record(dataset: str, record: dict[str, Any]) -> None:
    stored = {"digits": {"classifier.safetensors", "held_out.safetensors"}, "shapes": {"classifier.safetensors"}}
    folder = DATA.joinpath(f"{dataset}_evaluation")
    assert set(record["files"]) == {path.name for path in folder.iterdir()} == stored[dataset]
    for name, expected in record["files"].items():
        blob = folder.joinpath(name).read_bytes()
        assert hashlib.sha256(blob).hexdigest() == expected["sha256"]
        assert len(blob) == expected["bytes"]


def test_weights_are_small_and_frozen(classifier: SurrogateClassifier, record: dict[str, Any]) -> None:
    parameters = list(classifier.network.parameters())
    assert sum(parameter.numel() for parameter in parameters) == record["parameters"]
    assert 4 * record["parameters"] < 300_000
    assert not any(parameter.requires_grad for parameter in parameters)
    assert not classifier.network.training


def test_held_out_images_have_the_documented_form(dataset: str, held_out: tuple[torch.Tensor, torch.Tensor]) -> None:
    images, labels = held_out
    facts = SURROGATE_DATA[dataset]
    assert (tuple(images.shape), images.dtype) == ((facts.held_out, *facts.image_shape), torch.float32)
    assert (tuple(labels.shape), labels.dtype) == ((facts.held_out,), torch.int64)
    assert -1 <= float(images.min()) <= -0.8 and 0.8 <= float(images.max()) <= 1
    assert set(labels.tolist()) == set(range(10))


def test_held_out_shapes_are_the_other_split() -> None:
    images, labels = held_out_images("shapes")
    drawn, truth = shapes_images("held-out", 1000)
    assert torch.equal(images, drawn) and torch.equal(labels, truth)
    train, _ = shapes_images("train", 500)
    seen = {image.numpy().tobytes() for image in train}
    assert not any(image.numpy().tobytes() in seen for image in images)


def test_held_out_digits_are_the_held_out_fifth_of_the_data_set() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    selection = pytest.importorskip("sklearn.model_selection")
    data = datasets.load_digits()
    train, held_out = selection.train_test_split(
        np.arange(len(data.target)), test_size=0.2, stratify=data.target, random_state=0
    )
    images, labels = held_out_images("digits")
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


def test_features_have_the_documented_form(
    classifier: SurrogateClassifier, held_out: tuple[torch.Tensor, torch.Tensor]
) -> None:
    n = 270  # crosses the internal batch of 256
    images = held_out[0][:n]
    features, classes, all_three = classifier.features(images), classifier.classify(images), classifier.extract(images)
    assert (features.shape, features.dtype) == ((n, 64), np.dtype(np.float64))
    assert (classes.shape, classes.dtype) == ((n,), np.dtype(np.int64))
    assert np.array_equal(all_three.pooled, features)
    assert all_three.spatial is not None and all_three.probabilities is not None
    assert (all_three.spatial.shape, all_three.spatial.dtype) == ((n, 112), np.dtype(np.float64))
    assert (all_three.probabilities.shape, all_three.probabilities.dtype) == ((n, 10), np.dtype(np.float64))
    assert np.abs(all_three.probabilities.sum(axis=1) - 1).max() <= 1e-14
    assert np.array_equal(all_three.probabilities.argmax(axis=1), classes)
    assert classifier.features(images[:0]).shape == (0, 64)
    assert classifier.classify(images[:0]).shape == (0,)


def test_features_are_those_that_the_name_promises(
    classifier: SurrogateClassifier, held_out: tuple[torch.Tensor, torch.Tensor], record: dict[str, Any]
) -> None:
    measured = float(np.square(classifier.features(held_out[0])).mean())
    assert classifier.name == record["extractor"]
    assert measured == pytest.approx(record["held_out_mean_square_feature"], rel=1e-9)


def test_features_are_those_that_the_head_classifies(
    classifier: SurrogateClassifier, held_out: tuple[torch.Tensor, torch.Tensor]
) -> None:
    images = held_out[0][:100]
    head = classifier.network.head
    logits = classifier.features(images) @ head.weight.numpy().T + head.bias.numpy()
    forward = classifier.network(images.double())
    assert np.array_equal(logits.argmax(axis=1), classifier.classify(images))
    assert np.array_equal(forward.argmax(dim=1).numpy(), classifier.classify(images))


def test_spatial_features_are_the_last_convolution_by_pixel_then_channel(
    classifier: SurrogateClassifier, held_out: tuple[torch.Tensor, torch.Tensor]
) -> None:
    images = held_out[0][:5]
    seen: list[torch.Tensor] = []
    last = [module for module in classifier.network.trunk if isinstance(module, torch.nn.Conv2d)][-1]
    handle = last.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    spatial = classifier.extract(images).spatial
    handle.remove()
    activations = torch.nn.functional.silu(seen[0])  # (5, 48, 4, 4)
    expected = [
        [float(activations[image, channel, y, x]) for y in range(4) for x in range(4) for channel in range(7)]
        for image in range(5)
    ]
    assert spatial is not None
    np.testing.assert_allclose(spatial, expected, rtol=1e-12, atol=1e-14)


def test_the_network_halves_images_down_to_two_by_two() -> None:
    for side in (8, 16, 32, 64):
        network = ClassifierNetwork((3, side, side))
        assert network.trunk[-2].in_features == 48 * 2 * 2
        assert network(torch.zeros(1, 3, side, side)).shape == (1, 10)
        assert network.penultimate_and_spatial(torch.zeros(1, 3, side, side))[1].shape == (1, 112)


def test_features_do_not_depend_on_the_batch(
    classifier: SurrogateClassifier, held_out: tuple[torch.Tensor, torch.Tensor]
) -> None:
    images = held_out[0][:270]  # crosses the internal batch of 256
    together = classifier.features(images)
    for parts in (1, 260):
        apart = np.concatenate([classifier.features(chunk) for chunk in torch.split(images, parts)])
        assert np.linalg.norm(apart - together) <= 1e-12 * np.linalg.norm(together)
    backwards = classifier.features(images.flip(0))[::-1]
    assert np.linalg.norm(backwards - together) <= 1e-12 * np.linalg.norm(together)


def test_covariances_of_the_features_have_full_rank(
    classifier: SurrogateClassifier, held_out: tuple[torch.Tensor, torch.Tensor]
) -> None:
    features = classifier.extract(held_out[0][:300])
    assert features.spatial is not None
    for rows in (features.pooled, features.spatial):
        covariance = GaussianStatistics.from_features(rows).covariance
        assert np.linalg.matrix_rank(covariance) == rows.shape[1]


def test_distance_grows_with_damage(
    classifier: SurrogateClassifier, held_out: tuple[torch.Tensor, torch.Tensor]
) -> None:
    images = held_out[0][:150]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    clean = classifier.extract(images)
    for kind in ("pooled", "spatial"):
        reference = GaussianStatistics.from_features(getattr(clean, kind))
        distances = []
        for level in (0.0, 0.1, 0.3, 1.0):
            damaged = getattr(classifier.extract(images + level * noise), kind)
            distances.append(frechet_distance(reference, GaussianStatistics.from_features(damaged)))
        assert distances[0] < 1e-9
        assert distances == sorted(distances)
        assert distances[1] > 1e-3 > distances[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_images_are_refused(
    classifier: SurrogateClassifier, held_out: tuple[torch.Tensor, torch.Tensor], bad: float
) -> None:
    images = held_out[0][:360].clone()
    images[300, 0, 7, 7] = bad
    for method in (classifier.features, classifier.classify, classifier.extract):
        with pytest.raises(NumericsError, match="images: found NaN or infinity in 1 of 360"):
            method(images)


def test_non_finite_features_are_refused() -> None:
    network = ClassifierNetwork((1, 8, 8))
    torch.nn.init.constant_(network.trunk[-2].bias, float("nan"))  # type: ignore[arg-type]
    broken = SurrogateClassifier("broken", network)
    with pytest.raises(NumericsError, match="broken: features: found NaN or infinity in 3 of 3"):
        broken.features(torch.zeros(3, 1, 8, 8))


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 8, 8),
        torch.zeros(2, 2, 8, 8),
        torch.zeros(2, 1, 16, 16),
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 1, 32, 32),
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8),  # 0..16 rather than [-1, 1]
        torch.zeros(2, 3, 32, 32, dtype=torch.uint8),
    ],
)
def test_other_images_are_refused(classifier: SurrogateClassifier, images: torch.Tensor) -> None:
    for method in (classifier.features, classifier.classify, classifier.extract):
        with pytest.raises(UsageError, match="needed float32"):
            method(images)


def test_importing_stays_within_the_floor() -> None:
    code = (
        "import sys, hqdit.evaluation.surrogate, hqdit.evaluation.frechet;"
        "print([m for m in ('matplotlib', 'diffusers', 'sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
