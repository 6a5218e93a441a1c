"""ADM's `.npz` and folders of PNG files: what is written is read back, and what is no set of images is refused."""

from __future__ import annotations

import errno
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import require_complete

from hqdit.errors import CheckpointError, UsageError
from hqdit.evaluation.image_files import as_images, has_stored_statistics, read_images, write_adm_npz
from hqdit.sampling.sampler import to_uint8


def pixels(*shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# npz


@pytest.mark.parametrize("channels", [1, 3])
def test_the_file_is_what_the_suite_reads(tmp_path: Path, channels: int) -> None:
    images = pixels(5, 8, 6, channels)
    write_adm_npz(tmp_path / "samples.npz", torch.from_numpy(images))
    with np.load(tmp_path / "samples.npz") as stored:
        assert stored.files == ["arr_0"]
        assert stored["arr_0"].dtype == np.uint8 and stored["arr_0"].flags["C_CONTIGUOUS"]
        assert np.array_equal(stored["arr_0"], images.repeat(3 // channels, axis=3))
    # The suite streams the array from the archive, which it does for the header versions 1.0 and 2.0.
    with zipfile.ZipFile(tmp_path / "samples.npz") as archive, archive.open("arr_0.npy") as file:
        assert np.lib.format.read_magic(file) == (1, 0)
        assert np.lib.format.read_array_header_1_0(file) == ((5, 8, 6, 3), False, np.dtype(np.uint8))
    assert np.array_equal(read_images(tmp_path / "samples.npz"), images.repeat(3 // channels, axis=3))


def test_equal_images_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.npz", "b"):  # no suffix is added either
        write_adm_npz(tmp_path / name, pixels(3, 4, 4, 3))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((2, 3, 4, 4), np.uint8),
        np.zeros((0, 4, 4, 3), np.uint8),
    ],
)
def test_other_arrays_are_not_written(tmp_path: Path, images: Any) -> None:
    with pytest.raises(UsageError, match="needed uint8"):
        write_adm_npz(tmp_path / "x.npz", images)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_the_old_file_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "samples.npz"
    write_adm_npz(path, pixels(2, 4, 4, 3))
    before = path.read_bytes()

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_adm_npz(path, pixels(3, 4, 4, 3))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["samples.npz"]


def test_archives_that_hold_no_images_are_refused(tmp_path: Path) -> None:
    contents: dict[str, dict[str, Any]] = {
        "other name": {"images": pixels(2, 4, 4, 3)},
        "float": {"arr_0": np.zeros((2, 4, 4, 3))},
        "grey": {"arr_0": pixels(2, 4, 4, 1)},
        "one image": {"arr_0": pixels(4, 4, 3)},
        "empty": {"arr_0": pixels(0, 4, 4, 3)},
        "objects": {"arr_0": np.array([{}, {}], dtype=object)},
    }
    for name, arrays in contents.items():
        path = tmp_path / f"{name}.npz"
        np.savez(path, **arrays)
        with pytest.raises(CheckpointError) as caught:
            read_images(path)
        require_complete(caught.value, path.name, "hqdit sample --npz")


def test_files_that_are_no_archive_are_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole.npz"
    write_adm_npz(whole, pixels(4, 8, 8, 3))
    for name, content in {"text.npz": b"hello", "cut.npz": whole.read_bytes()[:300], "nothing.npz": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            read_images(tmp_path / name)
    with pytest.raises(CheckpointError, match="missing.npz"):
        read_images(tmp_path / "missing.npz")


def test_stored_statistics_are_noticed(tmp_path: Path) -> None:
    write_adm_npz(tmp_path / "plain.npz", pixels(2, 4, 4, 3))
    np.savez(tmp_path / "reference.npz", arr_0=pixels(2, 4, 4, 3), mu=np.zeros(3), sigma=np.eye(3))
    assert not has_stored_statistics(tmp_path / "plain.npz")
    assert has_stored_statistics(tmp_path / "reference.npz")
    assert not has_stored_statistics(tmp_path)


# Folders


def test_a_folder_is_read_in_the_order_of_names_without_the_grid(tmp_path: Path) -> None:
    images = pixels(3, 5, 4, 3)
    for index in (2, 0, 1):
        Image.fromarray(images[index]).save(tmp_path / f"{index:06d}_class0.png")
    Image.fromarray(pixels(50, 40, 3)).save(tmp_path / "grid.png")
    (tmp_path / "notes.txt").write_text("not an image")
    assert np.array_equal(read_images(tmp_path), images)


def test_grey_files_become_three_equal_channels(tmp_path: Path) -> None:
    grey = pixels(6, 4)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert np.array_equal(read_images(tmp_path), grey[None, :, :, None].repeat(3, axis=3))


def test_folders_without_a_set_of_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found no PNG files"):
        read_images(tmp_path)
    Image.fromarray(pixels(4, 4, 3)).save(tmp_path / "a.png")
    for save in (
        lambda path: Image.fromarray(pixels(5, 4, 3)).save(path),  # another size
        lambda path: Image.fromarray(pixels(4, 4, 4)).save(path),  # transparency
        lambda path: Image.fromarray(pixels(4, 4, 3)).convert("P").save(path),  # a palette
        lambda path: Image.fromarray(pixels(4, 4).astype(np.uint16)).save(path),  # 16 bits
        lambda path: Image.fromarray(pixels(4, 4, 3)).save(path, format="JPEG"),
        lambda path: path.write_bytes(b"no image"),
    ):
        save(tmp_path / "b.png")
        with pytest.raises(CheckpointError) as caught:
            read_images(tmp_path)
        require_complete(caught.value, "b.png")


# Pixels to images


def test_all_levels_survive_the_way_to_images_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    images = as_images(levels)
    assert (tuple(images.shape), images.dtype) == ((1, 3, 16, 16), torch.float32)
    assert (float(images.min()), float(images.max())) == (-1, 1)
    assert np.array_equal(to_uint8(images).numpy(), levels)
    assert torch.equal(as_images(levels, 1), images[:, :1])


def test_axes_are_not_mixed_up() -> None:
    stored = pixels(2, 5, 7, 3)
    images = as_images(stored)
    assert images[1, 2, 4, 6] == torch.tensor(float(stored[1, 4, 6, 2])) / 127.5 - 1


def test_colours_are_no_grey_images() -> None:
    with pytest.raises(UsageError, match="found colours"):
        as_images(pixels(2, 4, 4, 3), 1)
