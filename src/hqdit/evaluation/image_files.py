"""Sets of images on disk: the `.npz` that ADM's evaluation suite reads, and folders of PNG files.

Source: guided-diffusion's evaluation suite (Dhariwal and Nichol 2021, arXiv 2105.05233): an array `arr_0`, uint8, NHWC,
three channels.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from hqdit.errors import CheckpointError, UsageError
from hqdit.pipeline.manifest import require_regular
from hqdit.pipeline.publish import publish_bytes

ARRAY_NAME = "arr_0"
#: What `hqdit sample` writes beside the images.
GRID_NAME = "grid.png"

Pixels = npt.NDArray[np.uint8]


def write_adm_npz(path: Path, images: Pixels | Tensor) -> None:
    """Write images so that ADM's evaluation suite can score them; the file is the old one or the whole new one.

    Equal images give equal bytes.

    Args:
        path: of the file; it is replaced if it exists, and its folder is made if it does not.
        images: uint8 (n, height, width, 1 or 3), n >= 1; one channel is repeated, because the suite takes RGB.

    Raises:
        UsageError: images of another kind.
    """
    pixels = images.cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or 0 in pixels.shape or pixels.shape[3] not in (1, 3):
        raise UsageError(
            f"npz: found images {pixels.dtype} of shape {pixels.shape}, needed uint8 (n, height, width, 1 or 3). "
            "Fix: pass what to_uint8 returns"
        )
    rgb = np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:3], 3)))
    archive = io.BytesIO()
    np.savez(archive, arr_0=rgb)
    publish_bytes(path, archive.getvalue())


def read_images(path: Path) -> Pixels:
    """The images of an `.npz` file or of a folder of PNG files, uint8 (n, height, width, 3).

    In a folder, files are taken in the order of their names; `grid.png`, which `hqdit sample` writes, is left out.

    Raises:
        CheckpointError: nothing there, or images that cannot be read, are not 8-bit grey or RGB, or differ in size.
    """
    place = path.expanduser()
    return _read_folder(place) if place.is_dir() else _read_npz(place)


def has_stored_statistics(path: Path) -> bool:
    """Whether an `.npz` of ADM's also holds the mean and covariance of a larger set, under `mu` and `sigma`."""
    place = path.expanduser()
    if not place.is_file() or not zipfile.is_zipfile(place):
        return False
    with zipfile.ZipFile(place) as archive:
        return "mu.npy" in archive.namelist()


def _read_npz(path: Path) -> Pixels:
    try:
        require_regular(path)
        with zipfile.ZipFile(path) as archive, archive.open(f"{ARRAY_NAME}.npy") as file:
            pixels = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # whatever comes out of libraries that do not expect these bytes
        raise CheckpointError(
            f"{path}: found no set of images ({_first_line(error)}), needed a folder of PNG files or an .npz with "
            f"{ARRAY_NAME}. Fix: check the path, or write one with hqdit sample --npz"
        ) from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3 or 0 in pixels.shape:
        raise CheckpointError(
            f"{path}: found {ARRAY_NAME} {pixels.dtype} of shape {pixels.shape}, needed uint8 (n, height, width, 3). "
            "Fix: write it with hqdit sample --npz"
        )
    return np.ascontiguousarray(pixels)


def _read_folder(folder: Path) -> Pixels:
    files = sorted(file for file in folder.glob("*.png") if file.name != GRID_NAME)
    if not files:
        raise CheckpointError(f"{folder}: found no PNG files, needed a folder of them. Fix: check the path")
    images = [_read_png(file) for file in files]
    for file, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise CheckpointError(
                f"{file}: found {image.shape[1]}x{image.shape[0]} pixels, needed {images[0].shape[1]}x"
                f"{images[0].shape[0]} as in {files[0].name}. Fix: keep one set per folder"
            )
    return np.stack(images)


def _read_png(file: Path) -> Pixels:
    try:
        require_regular(file)
        with Image.open(file, formats=("PNG",)) as image:
            if image.mode not in ("L", "RGB"):
                raise ValueError(f"mode {image.mode}")
            return np.asarray(image.convert("RGB"))
    except Exception as error:  # likewise
        raise CheckpointError(
            f"{file}: found an image that cannot be used ({_first_line(error)}), needed a PNG of 8-bit grey or RGB. "
            "Fix: convert it, or take it out of the folder"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def as_images(pixels: Pixels, channels: int = 3) -> Tensor:
    """Pixels uint8 (n, height, width, 3) as float32 (n, channels, height, width) in [-1, 1].

    Args:
        pixels: from `read_images`.
        channels: 3, or 1 for grey images.

    Raises:
        UsageError: one channel of images that are not grey.
    """
    if channels == 1 and not (pixels == pixels[..., :1]).all():
        raise UsageError("images: found colours, needed grey images. Fix: choose another --reference")
    kept = torch.from_numpy(pixels[..., :channels].copy())
    return kept.permute(0, 3, 1, 2).to(torch.float32).div(127.5).sub(1)
