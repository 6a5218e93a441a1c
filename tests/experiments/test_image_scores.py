"""The table of image scores: windows, exact images and the strata of guided samples."""

import math

import numpy as np
import pytest
import torch

from hqdit.evaluation.bootstrap import bootstrap_mean
from hqdit.evaluation.fidelity import psnr_of_images
from hqdit.experiments import image_scores
from hqdit.experiments.image_scores import RESAMPLES, _scores, image_table
from hqdit.records.run_record import Interval
from hqdit.report.cells import cell_text
from hqdit.sampling.sampler import SamplingConfig


@pytest.fixture(scope="module")
def pair(lab, tiny_subject):
    """Samples of the float model, and the same with some noise."""
    exact = lab.samples(tiny_subject, None, 12, SamplingConfig(3, 1.5))
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    return exact, exact + 0.1 * noise


def paired_cells(lab, tiny_subject, exact, images):
    row = {"method": "m", "samples": len(images), **_scores(lab, tiny_subject, exact, images, SamplingConfig(3, 1.5))}
    table = image_table("t", [row], tiny_subject)
    at = [column.title for column in table.columns].index("PSNR")
    return row, table.columns[at : at + 2], table.rows[0][at : at + 2]


def test_images_that_equal_their_originals_are_counted(lab, tiny_subject, pair):
    exact, noisy = pair
    some = torch.cat([exact[:3], noisy[3:]])
    for images, text in ((some, "3 of 12 exact"), (exact, "exact")):
        row, columns, cells = paired_cells(lab, tiny_subject, exact, images)
        assert row["psnr_db"] is None
        assert cell_text(cells[0], columns[0]) == text
    row, _, cells = paired_cells(lab, tiny_subject, exact, noisy)
    assert row["psnr_exact"] == 0 and isinstance(cells[0], Interval)
    assert cells[0].value == pytest.approx(np.mean(psnr_of_images(exact, noisy)))
    assert math.isfinite(cells[0].high)


def test_the_meaning_of_ssim_names_its_window(lab, tiny_subject, pair):
    row, columns, cells = paired_cells(lab, tiny_subject, *pair)
    # The largest odd window in images of 8x8 pixels.
    assert row["ssim_window"] == 7 and "windows of 7x7 pixels" in columns[1].meaning
    assert "windows" not in columns[0].meaning and isinstance(cells[1], Interval)


def test_guided_samples_are_resampled_within_their_classes(lab, tiny_subject, pair, monkeypatch):
    given = []

    def spy(*arguments, classes, resamples):
        given.append(classes)
        return {}

    monkeypatch.setattr(image_scores, "image_metrics", spy)
    exact, noisy = pair
    in_turn = [index % tiny_subject.num_classes for index in range(12)]
    for guidance, classes in ((1.5, in_turn), (0.0, None)):
        row = _scores(lab, tiny_subject, exact, noisy, SamplingConfig(3, guidance))
        expected = bootstrap_mean(psnr_of_images(exact, noisy), RESAMPLES, strata=classes)
        assert row["psnr_db"] == [expected.value, expected.low, expected.high]
    assert given == [in_turn, None]
