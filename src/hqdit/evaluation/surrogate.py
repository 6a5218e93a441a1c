"""The small frozen classifier of 8x8 digits that stands in for Inception-v3 in judging the bundled model.

Its weights and the held-out digits lie in `hqdit/data/digits_evaluation`, written by
`training/train_digits_classifier.py`. Scores made with its features must carry its name
(`SurrogateClassifier.name`).
"""

from __future__ import annotations

import json
from importlib.resources import files

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn

from hqdit.errors import NumericsError, UsageError

EXTRACTOR_NAME = "digits-cnn-v1"
# The only metadata key: safetensors writes several in no fixed order, and the file must be reproducible.
NAME_KEY = "extractor"
FEATURE_WIDTH = 64
CLASSES = 10
IMAGE_SHAPE = (1, 8, 8)

_BATCH = 256  # bounds the memory for activations


class DigitsClassifierNetwork(nn.Module):
    """Images (n, 1, 8, 8) to 64 features to 10 logits, in 36,442 parameters.

    SiLU rather than ReLU, so that no feature is constant over a set of images and covariances keep full rank.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 48, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(48 * 2 * 2, FEATURE_WIDTH),
            nn.SiLU(),
        )
        self.head = nn.Linear(FEATURE_WIDTH, CLASSES)

    def penultimate(self, images: Tensor) -> Tensor:
        """Features (n, 64) of images (n, 1, 8, 8) in [-1, 1], in the dtype of the weights."""
        features: Tensor = self.trunk(images)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10) of images (n, 1, 8, 8) in [-1, 1], in the dtype of the weights."""
        logits: Tensor = self.head(self.penultimate(images))
        return logits


class SurrogateClassifier:
    """The frozen classifier. It computes in float64 on the CPU, so that scores agree between machines.

    Attributes:
        name: the extractor's name from the weights' file; every score made with it must carry this name.
        network: the network, in float64 and without gradients.
    """

    def __init__(self, name: str, network: DigitsClassifierNetwork) -> None:
        self.name = name
        self.network = network.to("cpu", torch.float64).eval().requires_grad_(False)

    @classmethod
    def load(cls) -> SurrogateClassifier:
        """The classifier that ships with the package."""
        blob = _package_data("classifier.safetensors")
        network = DigitsClassifierNetwork()
        network.load_state_dict(safetensors.torch.load(blob))
        # A safetensors file opens with the length of its JSON header, 8 bytes little-endian, and the header.
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        return cls(header["__metadata__"][NAME_KEY], network)

    def features(self, images: Tensor) -> npt.NDArray[np.float64]:
        """Activations of the penultimate layer.

        Args:
            images: float32 (n, 1, 8, 8) in [-1, 1], any device; taken as they are, nothing is clamped.

        Returns:
            float64 (n, 64), one row per image.

        Raises:
            UsageError: if `images` is not a floating point tensor of shape (n, 1, 8, 8).
            NumericsError: if an image or a feature is not finite.
        """
        with torch.inference_mode():
            return self._penultimate(images).numpy()

    def classify(self, images: Tensor) -> npt.NDArray[np.int64]:
        """The most likely digit of each image.

        Args:
            images: float32 (n, 1, 8, 8) in [-1, 1], any device; taken as they are, nothing is clamped.

        Returns:
            int64 (n,), values 0 to 9.

        Raises:
            UsageError: if `images` is not a floating point tensor of shape (n, 1, 8, 8).
            NumericsError: if an image or a feature is not finite.
        """
        with torch.inference_mode():
            logits = self.network.head(self._penultimate(images))
            classes: npt.NDArray[np.int64] = logits.argmax(dim=1).numpy()
        return classes

    def _penultimate(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or tuple(images.shape[1:]) != IMAGE_SHAPE or not images.is_floating_point():
            raise UsageError(
                f"{self.name}: found images {images.dtype} of shape {tuple(images.shape)}, needed float32 of"
                " shape (n, 1, 8, 8) with values in [-1, 1]. Fix: convert them"
            )
        inputs = images.detach().to("cpu", torch.float64)
        _require_finite(inputs, f"{self.name}: images")
        features = torch.cat([self.network.penultimate(batch) for batch in torch.split(inputs, _BATCH)])
        _require_finite(features, f"{self.name}: features")
        return features


def held_out_digits() -> tuple[Tensor, Tensor]:
    """The fifth of scikit-learn's digits that neither the bundled model nor the classifier was trained on.

    Returns:
        Images float32 (360, 1, 8, 8) in [-1, 1], and labels int64 (360,).
    """
    stored = safetensors.torch.load(_package_data("held_out.safetensors"))
    return from_stored(stored["images"]), stored["labels"].to(torch.int64)


def from_stored(images: Tensor) -> Tensor:
    """Stored uint8 images (n, 8, 8), values 0 to 16, as float32 (n, 1, 8, 8) in [-1, 1]; exact."""
    return images.to(torch.float32).div(8).sub(1).unsqueeze(1)


def to_stored(images: Tensor) -> Tensor:
    """The inverse of `from_stored` for images that lie on its grid."""
    return images.add(1).mul(8).round().to(torch.uint8).squeeze(1)


def _package_data(file: str) -> bytes:
    return files("hqdit").joinpath("data", "digits_evaluation", file).read_bytes()


def _require_finite(values: Tensor, what: str) -> None:
    finite = torch.isfinite(values)
    if not finite.all():
        rows = int((~finite.flatten(1).all(dim=1)).sum())
        raise NumericsError(
            f"{what}: found NaN or infinity in {rows} of {len(values)}, needed finite values. Fix: check the model"
            " and the sampler that made the images"
        )
