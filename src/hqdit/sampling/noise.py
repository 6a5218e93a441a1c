"""Noise that depends only on the seed, the purpose and the sample's number (and the step, for noise within a run)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hqdit.randomness import random_stream

#: Purposes: their noise is disjoint by construction, so that evaluation never sees calibration noise.
SAMPLE, CALIBRATION, EVALUATION = "sample", "calibration", "evaluation"


def starting_noise(seed: int, purpose: str, indices: Sequence[int], shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise of the samples numbered `indices`.

    Args:
        seed: of the whole run.
        purpose: one of `SAMPLE`, `CALIBRATION`, `EVALUATION`.
        indices: sample numbers; batch size and order do not change any sample's noise.
        shape: of one sample.

    Returns:
        float32 (len(indices), *shape).
    """
    return _normal(seed, [f"noise/{purpose}/{index}" for index in indices], shape)


def step_noise(seed: int, purpose: str, indices: Sequence[int], step: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise that a sampler adds at its step `step`: float32 (len(indices), *shape).

    Arguments as of `starting_noise`, from whose noise it is disjoint.
    """
    return _normal(seed, [f"noise/{purpose}/{index}/step/{step}" for index in indices], shape)


def _normal(seed: int, streams: Sequence[str], shape: tuple[int, ...]) -> Tensor:
    rows = [random_stream(seed, stream).standard_normal(shape, dtype=np.float32) for stream in streams]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty((0, *shape))
