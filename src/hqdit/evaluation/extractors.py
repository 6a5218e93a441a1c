"""What a feature extractor is: images to the three kinds of numbers that image metrics are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Features:
    """What a network says about n images, float64, one row per image in their order.

    Attributes:
        pooled: (n, d), for the Fréchet distance and for precision and recall.
        spatial: (n, k) with k = height * width * channels of one layer, flattened in that order, for the spatial
            Fréchet distance; None if the network has none.
        probabilities: (n, classes), rows that sum to 1, for the Inception Score; None if it does not classify.
    """

    pooled: Float64Array
    spatial: Float64Array | None
    probabilities: Float64Array | None


def joined(parts: Sequence[Features]) -> Features:
    """The features of one extractor for several batches, in order, as those of one."""

    def rows(values: Sequence[Float64Array | None]) -> Float64Array | None:
        present = [value for value in values if value is not None]
        return np.concatenate(present) if present else None

    return Features(
        np.concatenate([part.pooled for part in parts]),
        rows([part.spatial for part in parts]),
        rows([part.probabilities for part in parts]),
    )


class FeatureExtractor(Protocol):
    """A fixed network that images are judged by."""

    @property
    def name(self) -> str:
        """Network and weights; every number made with its features carries this name."""

    @property
    def is_inception(self) -> bool:
        """Whether it is Inception-v3, so that its numbers are FID, sFID and the Inception Score."""

    def extract(self, images: Tensor) -> Features:
        """Features of images.

        Args:
            images: floating point (n, channels, height, width) in [-1, 1], any device; an image's features do not
                depend on the other images.

        Raises:
            UsageError: images of another kind or shape than the network takes.
            NumericsError: an image or a feature is not finite.
        """
