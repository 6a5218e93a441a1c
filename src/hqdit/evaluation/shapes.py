"""Coloured shapes and textures: the generated images behind the bundled model `shapes`.

Drawn from parameters by half-planes and circles, so that a data set is a seed and not a download: equal (split, count)
give equal images, and the splits use disjoint random streams.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hqdit.errors import UsageError
from hqdit.randomness import random_stream

SHAPES_CLASSES = (
    "disc",
    "square",
    "triangle",
    "cross",
    "ring",
    "star",
    "horizontal stripes",
    "vertical stripes",
    "checkerboard",
    "dots",
)
SPLITS = ("train", "held-out")
SIZE = 32  # pixels along an edge

_SUPERSAMPLING = 4  # samples along a pixel's edge: coverage in sixteenths, so edges are soft
_CHUNK = 250  # images drawn at once, whole rounds of the classes; bounds the memory for masks
_SEED = 0

Float = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]


def shapes_images(split: str, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` images of a split, classes in turn.

    Args:
        split: "train" or "held-out".
        count: at least 1.

    Returns:
        Images float32 (count, 3, 32, 32) in [-1, 1] on the grid of uint8, and labels int64 (count,), 0 to 9 in the
        order of `SHAPES_CLASSES`.

    Raises:
        UsageError: no such split, or a count below 1.
    """
    if split not in SPLITS or count < 1:
        raise UsageError(
            f"shapes: found split {split!r} and count {count}, needed one of {', '.join(SPLITS)} and at least 1. "
            "Fix: pass such values"
        )
    stream = random_stream(_SEED, f"shapes/{split}")
    chunks = [_draw(stream) for _ in range(-(-count // _CHUNK))]
    images = torch.from_numpy(np.concatenate(chunks)[:count])
    return images.to(torch.float32).div(127.5).sub(1), torch.arange(count) % len(SHAPES_CLASSES)


def _draw(stream: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The next `_CHUNK` images, uint8 (_CHUNK, 3, 32, 32); every chunk takes equally many numbers from the stream."""
    unit = stream.random((_CHUNK, 8))
    centre_x, centre_y = (SIZE * (0.5 + 0.03 * (2 * unit[:, k, None, None] - 1)) for k in (0, 1))
    radius, period = 9 + 1.5 * unit[:, 2, None, None], 8 + 0.5 * unit[:, 3, None, None]  # pixels
    # The hues differ by a quarter to three quarters of the circle, and the background is the darker one.
    foreground = _rgb(unit[:, 4], 0.85, 0.8 + 0.2 * unit[:, 5])
    background = _rgb((unit[:, 4] + 0.25 + 0.5 * unit[:, 6]) % 1, 0.6, 0.15 + 0.25 * unit[:, 7])
    along = (np.arange(SIZE * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING
    inside = np.empty((_CHUNK, along.size, along.size), dtype=np.bool_)
    for label in range(len(SHAPES_CLASSES)):
        rows = slice(label, None, len(SHAPES_CLASSES))
        x, y = along[None, None, :] - centre_x[rows], along[None, :, None] - centre_y[rows]
        inside[rows] = _mask(label, x, y, radius[rows], period[rows])
    blocks = inside.reshape(_CHUNK, SIZE, _SUPERSAMPLING, SIZE, _SUPERSAMPLING)
    coverage = blocks.mean(axis=(2, 4))[:, None]
    image = background[:, :, None, None] * (1 - coverage) + foreground[:, :, None, None] * coverage
    pixels: npt.NDArray[np.uint8] = np.rint(255 * image).astype(np.uint8)
    return pixels


def _mask(label: int, x: Float, y: Float, radius: Float, period: Float) -> Bool:
    """Where the foreground lies; x and y are in pixels from the centre, y downwards."""
    inside: Bool
    squared = x * x + y * y
    match SHAPES_CLASSES[label]:
        case "disc":
            inside = squared <= radius * radius
        case "square":
            inside = np.maximum(np.abs(x), np.abs(y)) <= 0.85 * radius
        case "triangle":
            inside = _half_planes(x, y, 0.6 * radius, 3) == 3
        case "cross":
            near, far = np.minimum(np.abs(x), np.abs(y)), np.maximum(np.abs(x), np.abs(y))
            inside = (near <= 0.32 * radius) & (far <= radius)
        case "ring":
            inside = (squared <= radius * radius) & (squared >= 0.3 * radius * radius)
        case "star":  # the tips of a pentagram lie outside one of its five lines
            inside = _half_planes(x, y, 0.42 * radius, 5) >= 4
        case "horizontal stripes":
            inside = _is_in_stripe(y + 0 * x, period)
        case "vertical stripes":
            inside = _is_in_stripe(x + 0 * y, period)
        case "checkerboard":
            inside = _is_in_stripe(x, period) ^ _is_in_stripe(y, period)
        case _:  # dots
            offset_x, offset_y = ((along + period / 2) % period - period / 2 for along in (x, y))
            inside = offset_x * offset_x + offset_y * offset_y <= 0.1 * period * period
    return inside


def _half_planes(x: Float, y: Float, distance: Float, lines: int) -> npt.NDArray[np.int64]:
    """How many of `lines` regular half-planes at `distance` from the centre hold each point; the first looks down."""
    count = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=np.int64)
    for line in range(lines):
        angle = 2 * math.pi * line / lines
        count += math.sin(angle) * x + math.cos(angle) * y <= distance
    return count


def _is_in_stripe(along: Float, period: Float) -> Bool:
    is_inside: Bool = along % period < period / 2
    return is_inside


def _rgb(hue: Float, saturation: float, value: Float) -> Float:
    """Red, green and blue in [0, 1], (n, 3), of hues in [0, 1): the usual HSV colours."""
    channel = (np.array([5.0, 3.0, 1.0]) + 6 * hue[:, None]) % 6
    ramp = np.clip(np.minimum(channel, 4 - channel), 0, 1)
    return value[:, None] * (1 - saturation * ramp)
