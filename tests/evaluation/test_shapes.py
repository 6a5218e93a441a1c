"""The generated data set: repeatable, on its grid, and every class is what its name says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hqdit.errors import UsageError
from hqdit.evaluation.shapes import SHAPES_CLASSES, SIZE, SPLITS, shapes_images


@pytest.fixture(scope="module")
def drawn():
    return shapes_images("held-out", 500)


def foreground(image: torch.Tensor) -> np.ndarray:
    """Where an image is nearer to its brightest pixel than to its darkest one, (32, 32)."""
    pixels = image.flatten(1).T.double().numpy()
    bright, dark = (pixels[pick(pixels.max(axis=1))] for pick in (np.argmax, np.argmin))
    nearer = ((pixels - bright) ** 2).sum(axis=1) < ((pixels - dark) ** 2).sum(axis=1)
    return nearer.reshape(SIZE, SIZE)


def of_class(drawn, name: str) -> list[np.ndarray]:
    images, labels = drawn
    return [foreground(image) for image in images[labels == SHAPES_CLASSES.index(name)][:20]]


def test_images_are_uint8_in_disguise_and_labels_take_turns(drawn):
    images, labels = drawn
    assert images.shape == (500, 3, SIZE, SIZE) and images.dtype == torch.float32
    levels = (images.double() + 1) * 127.5
    assert float(images.min()) >= -1 and float(images.max()) <= 1
    assert torch.allclose(levels, levels.round(), atol=1e-4)  # float32 holds k / 127.5 - 1 to 6e-8, times 127.5
    assert labels.tolist() == [index % 10 for index in range(500)]


def test_a_longer_data_set_begins_with_the_shorter_one(drawn):
    assert torch.equal(shapes_images("held-out", 260)[0], drawn[0][:260])


def test_splits_have_no_image_in_common(drawn):
    train, _ = shapes_images("train", 500)
    assert not {image.numpy().tobytes() for image in train} & {image.numpy().tobytes() for image in drawn[0]}
    assert len({image.numpy().tobytes() for image in drawn[0]}) == 500


@pytest.mark.parametrize("name", ["disc", "square", "cross", "ring", "star", "triangle"])
def test_a_shape_touches_no_more_than_its_surroundings_and_textures_cover_the_image(drawn, name):
    for mask in of_class(drawn, name):
        assert 0.03 < mask.mean() < 0.5
    for texture in ("horizontal stripes", "vertical stripes", "checkerboard"):
        assert all(0.3 < mask.mean() < 0.7 for mask in of_class(drawn, texture))


def test_stripes_run_as_their_names_say(drawn):
    for mask in of_class(drawn, "horizontal stripes"):
        assert (mask == mask[:, :1]).all() and 0 < mask[:, 0].sum() < SIZE
    for mask in of_class(drawn, "vertical stripes"):
        assert (mask == mask[:1]).all() and 0 < mask[0].sum() < SIZE


def test_a_ring_has_a_hole_and_a_disc_has_none(drawn):
    for name, has_hole in (("ring", True), ("disc", False)):
        for mask in of_class(drawn, name):
            rows, columns = np.nonzero(mask)
            assert mask[round(rows.mean()), round(columns.mean())] == (not has_hole)


def test_a_triangle_points_up(drawn):
    for mask in of_class(drawn, "triangle"):
        widths = mask.sum(axis=1)[mask.any(axis=1)]
        assert widths[-2] > 2 * widths[1] - 1


@pytest.mark.parametrize(("split", "count"), [("test", 10), ("train", 0), ("", 1)])
def test_other_splits_and_counts_are_refused(split, count):
    with pytest.raises(UsageError, match="shapes: found"):
        shapes_images(split, count)
    assert SPLITS == ("train", "held-out")
