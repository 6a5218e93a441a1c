"""Grids of images, pixel by pixel."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from hqdit.errors import UsageError
from hqdit.report.figures import GRID_GAP, PANEL_GAP, TITLE_PIXELS, image_grid, titled_grids


def decoded(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grid_puts_every_pixel_in_its_place(channels: int, mode: str) -> None:
    images = np.random.default_rng(0).integers(0, 255, (5, 4, 6, channels), dtype=np.uint8)
    picture = decoded(image_grid(images, columns=3, scale=2))
    step_x, step_y = 6 * 2 + GRID_GAP, 4 * 2 + GRID_GAP
    assert (picture.mode, picture.size) == (mode, (3 * step_x + GRID_GAP, 2 * step_y + GRID_GAP))
    pixels = np.asarray(picture).reshape(picture.height, picture.width, channels)
    expected = np.full_like(pixels, 255)
    for index in range(5):
        for y in range(8):
            for x in range(12):
                row, column = index // 3 * step_y + GRID_GAP + y, index % 3 * step_x + GRID_GAP + x
                expected[row, column] = images[index, y // 2, x // 2]
    assert np.array_equal(pixels, expected)


def test_grid_is_no_wider_than_its_images() -> None:
    picture = decoded(image_grid(np.zeros((2, 8, 8, 1), np.uint8), columns=10, scale=1))
    assert picture.size == (2 * (8 + GRID_GAP) + GRID_GAP, 8 + 2 * GRID_GAP)


def test_grid_does_not_touch_its_input_and_repeats_its_bytes() -> None:
    images = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    images.flags.writeable = False
    assert image_grid(images) == image_grid(images.copy())
    assert decoded(image_grid(images)).info == {}


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 1), np.float32),
        np.zeros((2, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 2), np.uint8),
        np.zeros((0, 8, 8, 1), np.uint8),
        np.zeros((2, 0, 8, 1), np.uint8),
    ],
)
def test_grid_refuses_what_is_no_batch_of_images(images: np.ndarray) -> None:
    with pytest.raises(UsageError, match=re.escape(f"found {images.dtype} of shape {images.shape}")):
        image_grid(images)


@pytest.mark.parametrize("argument", ["columns", "scale"])
def test_grid_refuses_nothing_across(argument: str) -> None:
    with pytest.raises(UsageError, match=f"found {argument} 0, needed at least 1"):
        image_grid(np.zeros((1, 8, 8, 1), np.uint8), **{argument: 0})


def test_titled_grids_keep_every_pixel_and_stand_side_by_side():
    shades = [np.full((1, 4, 4, 1), value, dtype=np.uint8) for value in (0, 100, 200)]
    panels = [(f"panel {index}", image_grid(shade, columns=1, scale=8)) for index, shade in enumerate(shades)]
    side = 4 * 8 + 2 * GRID_GAP
    picture = np.asarray(Image.open(io.BytesIO(titled_grids(panels, columns=2))).convert("L"))
    width, height = side + PANEL_GAP, side + TITLE_PIXELS
    assert picture.shape == (2 * height, 2 * width)
    for index, value in enumerate((0, 100, 200)):
        top = (index // 2) * height + TITLE_PIXELS + GRID_GAP
        left = (index % 2) * width + PANEL_GAP // 2 + GRID_GAP
        assert (picture[top : top + 32, left : left + 32] == value).all()
    assert (picture[:TITLE_PIXELS, :width] < 128).any()  # the title is drawn
    assert titled_grids(panels) == titled_grids(panels)
    with pytest.raises(UsageError, match="0 panels"):
        titled_grids([])
