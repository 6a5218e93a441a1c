"""The small frozen classifiers that stand in for Inception-v3 in judging the bundled models.

Each was trained on the same data as the diffusion model that it judges, by `training/train_digits_classifier.py` and
`training/train_shapes_classifier.py`. Scores made with its features must carry its name (`SurrogateClassifier.name`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn

from hqdit.errors import NumericsError, UsageError
from hqdit.evaluation.extractors import Features
from hqdit.evaluation.shapes import shapes_images

# The only metadata key: safetensors writes several in no fixed order, and the file must be reproducible.
NAME_KEY = "extractor"
FEATURE_WIDTH = 64
CLASSES = 10
#: Channels of the last convolution that are spatial features, as many as ADM takes of Inception's: at 4x4 pixels they
#: are 112 numbers, fewer than the images of any set that is compared here, so that covariances can have full rank.
SPATIAL_CHANNELS = 7

_BATCH = 256  # bounds the memory for activations
_LAST_WIDTH, _LAST_SIDE = 48, 2  # channels and pixels along an edge in front of the linear layer
_FINE_SIDE = 8  # images up to this size keep their resolution in the first convolution


@dataclass(frozen=True)
class SurrogateData:
    """One of the bundled data sets.

    Attributes:
        extractor: name that its classifier carries.
        image_shape: (channels, height, width).
        held_out: images that neither the diffusion model nor the classifier was trained on.
    """

    extractor: str
    image_shape: tuple[int, int, int]
    held_out: int


SURROGATE_DATA = {
    "digits": SurrogateData("digits-cnn-v1", (1, 8, 8), 360),
    "shapes": SurrogateData("shapes-cnn-v1", (3, 32, 32), 1000),
}


def surrogate_data(dataset: str) -> SurrogateData:
    """The facts about a bundled data set.

    Raises:
        UsageError: there is no such data set.
    """
    if dataset not in SURROGATE_DATA:
        raise UsageError(
            f"data set: found {dataset!r}, needed one of {', '.join(SURROGATE_DATA)}. Fix: name one of them"
        )
    return SURROGATE_DATA[dataset]


class ClassifierNetwork(nn.Module):
    """Images (n, channels, side, side) to 64 features to 10 logits; the side is 8, 16, 32 or another power of two.

    Convolutions and pooling halve the image until 2x2 pixels are left: 36,442 parameters for digits, 57,802 for
    shapes. SiLU rather than ReLU, so that no feature is constant over a set of images and covariances keep full rank.
    """

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        channels, side, _ = image_shape
        self.image_shape = image_shape
        stride = 1 if side <= _FINE_SIDE else 2  # a kernel of 3 with stride 2 still sees every pixel
        layers: list[nn.Module] = [
            nn.Conv2d(channels, 32, 3, stride, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.SiLU(),
            nn.MaxPool2d(2),
        ]
        width, side = 32, side // stride // 2
        while side > _LAST_SIDE:
            layers += [nn.Conv2d(width, _LAST_WIDTH, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2)]
            width, side = _LAST_WIDTH, side // 2
        self.last_convolution = len(layers) - 1  # layers of the trunk up to the last convolution and its SiLU
        flat = width * side * side
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, FEATURE_WIDTH), nn.SiLU())
        self.head = nn.Linear(FEATURE_WIDTH, CLASSES)

    def penultimate(self, images: Tensor) -> Tensor:
        """Features (n, 64) of images in [-1, 1], in the dtype of the weights."""
        features: Tensor = self.trunk(images)
        return features

    def penultimate_and_spatial(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`penultimate`, and the first `SPATIAL_CHANNELS` channels of the last convolution, (n, 4 * 4 * 7), NHWC."""
        activations = self.trunk[: self.last_convolution](images)
        spatial = activations[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return self.trunk[self.last_convolution :](activations), spatial

    def forward(self, images: Tensor) -> Tensor:
        """Logits (n, 10) of images in [-1, 1], in the dtype of the weights."""
        logits: Tensor = self.head(self.penultimate(images))
        return logits


class SurrogateClassifier:
    """A frozen classifier. It computes in float64 on the CPU, so that scores agree between machines.

    Attributes:
        name: the extractor's name from the weights' file; every score made with it must carry this name.
        is_inception: false; its numbers are never called FID.
        network: the network, in float64 and without gradients.
    """

    is_inception = False

    def __init__(self, name: str, network: ClassifierNetwork) -> None:
        self.name = name
        self.network = network.to("cpu", torch.float64).eval().requires_grad_(False)

    @classmethod
    def load(cls, dataset: str = "digits") -> SurrogateClassifier:
        """The classifier of a bundled data set, "digits" or "shapes".

        Raises:
            UsageError: there is no such data set.
        """
        network = ClassifierNetwork(surrogate_data(dataset).image_shape)
        blob = _package_data(dataset, "classifier.safetensors")
        network.load_state_dict(safetensors.torch.load(blob))
        # A safetensors file opens with the length of its JSON header, 8 bytes little-endian, and the header.
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        return cls(header["__metadata__"][NAME_KEY], network)

    def features(self, images: Tensor) -> npt.NDArray[np.float64]:
        """Activations of the penultimate layer.

        Args:
            images: float32 (n, *image_shape) in [-1, 1], any device; taken as they are, nothing is clamped.

        Returns:
            float64 (n, 64), one row per image.

        Raises:
            UsageError: if `images` is not a floating point tensor of that shape.
            NumericsError: if an image or a feature is not finite.
        """
        with torch.inference_mode():
            return self._penultimate(self._inputs(images)).numpy()

    def classify(self, images: Tensor) -> npt.NDArray[np.int64]:
        """The most likely class of each image, int64 (n,), values 0 to 9; arguments and errors as of `features`."""
        with torch.inference_mode():
            logits = self.network.head(self._penultimate(self._inputs(images)))
            classes: npt.NDArray[np.int64] = logits.argmax(dim=1).numpy()
        return classes

    def extract(self, images: Tensor) -> Features:
        """Features (n, 64), spatial features (n, 112) and probabilities (n, 10); arguments and errors as of `features`.

        The spatial features are the first 7 channels of the last convolution, 4x4 pixels, in the order NHWC.
        """
        with torch.inference_mode():
            batches = torch.split(self._inputs(images), _BATCH)
            parts = [self.network.penultimate_and_spatial(batch) for batch in batches]
            pooled, spatial = (torch.cat(part) for part in zip(*parts, strict=True))
            _require_finite(pooled, f"{self.name}: features")
            probabilities = torch.softmax(self.network.head(pooled), dim=1)
            return Features(pooled.numpy(), spatial.numpy(), probabilities.numpy())

    def _inputs(self, images: Tensor) -> Tensor:
        shape = self.network.image_shape
        if images.ndim != 4 or tuple(images.shape[1:]) != shape or not images.is_floating_point():
            raise UsageError(
                f"{self.name}: found images {images.dtype} of shape {tuple(images.shape)}, needed float32 of"
                f" shape (n, {', '.join(map(str, shape))}) with values in [-1, 1]. Fix: convert them"
            )
        inputs = images.detach().to("cpu", torch.float64)
        _require_finite(inputs, f"{self.name}: images")
        return inputs

    def _penultimate(self, inputs: Tensor) -> Tensor:
        features = torch.cat([self.network.penultimate(batch) for batch in torch.split(inputs, _BATCH)])
        _require_finite(features, f"{self.name}: features")
        return features


def held_out_images(dataset: str) -> tuple[Tensor, Tensor]:
    """Images that neither the bundled diffusion model nor the classifier was trained on.

    For "digits" the stored fifth of scikit-learn's digits, 360; for "shapes" the first 1,000 of the held-out split,
    drawn anew.

    Returns:
        Images float32 (n, channels, height, width) in [-1, 1], and labels int64 (n,).

    Raises:
        UsageError: there is no such data set.
    """
    facts = surrogate_data(dataset)
    if dataset == "shapes":
        return shapes_images("held-out", facts.held_out)
    stored = safetensors.torch.load(_package_data(dataset, "held_out.safetensors"))
    return from_stored(stored["images"]), stored["labels"].to(torch.int64)


def from_stored(images: Tensor) -> Tensor:
    """Stored uint8 digits (n, 8, 8), values 0 to 16, as float32 (n, 1, 8, 8) in [-1, 1]; exact."""
    return images.to(torch.float32).div(8).sub(1).unsqueeze(1)


def to_stored(images: Tensor) -> Tensor:
    """The inverse of `from_stored` for images that lie on its grid."""
    return images.add(1).mul(8).round().to(torch.uint8).squeeze(1)


def _package_data(dataset: str, file: str) -> bytes:
    return files("hqdit").joinpath("data", f"{dataset}_evaluation", file).read_bytes()


def _require_finite(values: Tensor, what: str) -> None:
    finite = torch.isfinite(values)
    if not finite.all():
        rows = int((~finite.flatten(1).all(dim=1)).sum())
        raise NumericsError(
            f"{what}: found NaN or infinity in {rows} of {len(values)}, needed finite values. Fix: check the model"
            " and the sampler that made the images"
        )
