"""Grids of images as PNG: pixels enlarged, several grids side by side under their titles."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from PIL import Image

from hqdit.errors import UsageError
from hqdit.report.cells import visible_text
from hqdit.report.style import house_style

#: Resolution of pictures that hold grids, the height of a title above each, and the space between them.
PANEL_DPI, TITLE_PIXELS, PANEL_GAP = 100, 26, 12
#: White pixels between the images of a grid and around them.
GRID_GAP = 2


def image_grid(images: npt.NDArray[np.uint8], columns: int = 10, scale: int = 4) -> bytes:
    """A PNG of `images` in rows of `columns`, each pixel enlarged to `scale` x `scale`, on white.

    Image i lies in row i // columns; what is left of the last row stays white. Between the images and around them
    are `GRID_GAP` white pixels. Grey images give a grey PNG, coloured ones an RGB one.

    Args:
        images: uint8 (n, height, width, c), n >= 1, c 1 (grey) or 3 (RGB).
        columns: images in a row, at least 1.
        scale: at least 1.

    Raises:
        UsageError: for anything else.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise UsageError(
            f"image grid: found {images.dtype} of shape {images.shape}, needed uint8 (n, height, width, 1 or 3) with"
            " at least one image and pixel. Fix: convert the images"
        )
    for name, number in (("columns", columns), ("scale", scale)):
        if number < 1:
            raise UsageError(f"image grid: found {name} {number}, needed at least 1. Fix: pass a larger one")
    enlarged = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, channels = enlarged.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    step_y, step_x = height + GRID_GAP, width + GRID_GAP
    canvas = np.full((rows * step_y + GRID_GAP, columns * step_x + GRID_GAP, channels), 255, dtype=np.uint8)
    for index, image in enumerate(enlarged):
        top = GRID_GAP + index // columns * step_y
        left = GRID_GAP + index % columns * step_x
        canvas[top : top + height, left : left + width] = image
    buffer = io.BytesIO()
    Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas).save(buffer, format="PNG", compress_level=9)
    return buffer.getvalue()


def titled_grids(panels: Sequence[tuple[str, bytes]], columns: int = 3) -> bytes:
    """A PNG of equally large grids side by side, each under its title.

    Args:
        panels: (title, PNG as `image_grid` returns it), at least one.
        columns: panels in a row, at least 1.

    Raises:
        UsageError: no panels.
    """
    if not panels or columns < 1:
        raise UsageError(
            f"titled grids: found {len(panels)} panels in {columns} columns, needed at least one of both. "
            "Fix: pass some"
        )
    pictures = [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for _, png in panels]
    height, width = pictures[0].shape[0], pictures[0].shape[1] + PANEL_GAP
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with house_style():
        # A pixel of a grid is a pixel of the picture, so that nothing is resampled.
        size = (columns * width, rows * (height + TITLE_PIXELS))
        figure = Figure(figsize=(size[0] / PANEL_DPI, size[1] / PANEL_DPI), dpi=PANEL_DPI)
        for index, ((title, _), picture) in enumerate(zip(panels, pictures, strict=True)):
            row, column = divmod(index, columns)
            bottom = size[1] - (row + 1) * (height + TITLE_PIXELS)
            figure.figimage(picture, xo=column * width + PANEL_GAP // 2, yo=bottom)
            middle, top = (column + 0.5) * width / size[0], (bottom + height + TITLE_PIXELS / 2) / size[1]
            figure.text(middle, top, visible_text(title), ha="center", va="center", fontsize=9, parse_math=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=PANEL_DPI, metadata={"Software": None})
    return buffer.getvalue()
