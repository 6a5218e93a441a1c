"""`table-w4a4`: the record, the verdicts on orderings, and scores of images by an independent route."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hqdit.evaluation.fidelity import psnr_db
from hqdit.evaluation.frechet import GaussianStatistics, frechet_distance
from hqdit.evaluation.surrogate import held_out_images
from hqdit.experiments import table_w4a4
from hqdit.experiments.cache import ResultCache
from hqdit.experiments.image_scores import FLOAT32, OTHER_SEED, OTHER_SEEDS, image_rows, image_table
from hqdit.experiments.laboratory import Laboratory
from hqdit.experiments.noise_floor import FLOOR
from hqdit.experiments.table_w4a4 import METHODS, ORDERINGS, method_config
from hqdit.pipeline.config import PRESETS, QuantizationConfig
from hqdit.records.run_record import Interval
from hqdit.sampling.sampler import SamplingConfig

FEW = ("minmax", "hqdit")


def test_every_method_and_ordering_is_a_preset():
    assert set(METHODS) == PRESETS.keys() - {"hqdit-plus", "hqdit-plus-token", "w4a8"}  # which are no baselines
    assert {name for better, worse, _ in ORDERINGS for name in (better, worse)} <= set(METHODS)
    assert method_config("svdquant").low_rank == 4 and QuantizationConfig.preset("svdquant").low_rank == 32
    assert method_config("hqdit", "W4A8") == QuantizationConfig.preset("hqdit", "W4A8")


def score(error: float, pairs: int = 8) -> dict:
    """What the laboratory says of a model whose error has this power on every trajectory."""
    return {"eps_noise_powers": {"guided 1.5": [error * (1 + 0.01 * k) for k in range(pairs)]}}


@pytest.mark.parametrize(
    ("errors", "verdict"),
    [
        (((1.0, 10.0), (1.0, 2.0)), "holds ("),
        (((10.0, 1.0), (2.0, 1.0)), "does not hold ("),
        (((1.0, 10.0), (2.0, 1.0)), "holds on 1 of 2 models, the opposite does on 1 ("),
        (((1.0, 10.0), (1.0, 1.0)), "holds on 1 of 2 models, the opposite does on 0 ("),
    ],
)
def test_verdicts_follow_the_numbers(monkeypatch, errors, verdict):
    monkeypatch.setattr(table_w4a4, "ORDERINGS", (("a", "b", "a is better than b"),))
    draws = {}
    for name, (first, second) in zip(("x", "y"), errors, strict=True):
        draws |= {(name, "a"): [score(first)], (name, "b"): [score(second)]}
    (sentence,) = table_w4a4._orderings(["x", "y"], draws)
    assert sentence.startswith(f"A is better than b: {verdict}")
    assert f"x {10 * np.log10(errors[0][1] / errors[0][0]):+.2f} dB" in sentence


@pytest.mark.parametrize(
    ("better", "worse", "verdict", "spread"),
    [
        ([1.0, 2.0], [4.0, 4.0], "holds (", "draws +3.01 to +6.02"),
        ([1.0, 2.0], [4.0], "holds (", "draws +3.01 to +6.02"),
        ([4.0], [1.0, 2.0], "does not hold (", "draws -6.02 to -3.01"),
        # Pooled, it would hold; one draw says the opposite.
        ([1.0, 5.0], [4.0, 4.0], "holds on 0 of 1 models, the opposite does on 0 (", "draws -0.97 to +6.02"),
    ],
)
def test_a_verdict_needs_every_draw(monkeypatch, better, worse, verdict, spread):
    monkeypatch.setattr(table_w4a4, "ORDERINGS", (("a", "b", "a is better than b"),))
    draws = {("x", "a"): [score(error) for error in better], ("x", "b"): [score(error) for error in worse]}
    (sentence,) = table_w4a4._orderings(["x"], draws)
    assert sentence.startswith(f"A is better than b: {verdict}")
    assert spread in sentence
    gain = 10 * np.log10(np.mean(worse) / np.mean(better))
    assert f"x {gain:+.2f} dB [" in sentence


def test_the_record(lab, tiny_subject, loud_subject, monkeypatch, require_whole):
    monkeypatch.setattr(table_w4a4, "SUBJECTS", (tiny_subject, loud_subject))
    monkeypatch.setattr(table_w4a4, "METHODS", FEW)
    monkeypatch.setattr(table_w4a4, "IMAGE_METHODS", FEW)
    monkeypatch.setattr(table_w4a4, "QUICK_BITS", ("W4A8", "W4A4"))
    monkeypatch.setattr(type(lab), "long_steps", 4)
    monkeypatch.setattr(table_w4a4, "ORDERINGS", tuple(o for o in ORDERINGS if o[0] in FEW and o[1] in FEW))
    record = table_w4a4.run(lab)
    require_whole(record, "table-w4a4")
    titles = [table.title for table in record.tables]
    assert len(titles) == 2 * 3 + 2 + 2 and len(set(titles)) == len(titles)
    grid = record.tables[0]
    assert [row[0] for row in grid.rows] == [FLOAT32, FLOOR, *FEW]
    assert all(cell == np.inf for cell in grid.rows[0][1:])
    assert all(isinstance(cell, Interval) for row in grid.rows[1:] for cell in row[1:])
    images = next(table for table in record.tables if table.title.startswith("Images"))
    assert [row[0] for row in images.rows] == [FLOAT32, *OTHER_SEEDS.values(), *FEW]
    assert {row[1] for row in images.rows} == {12}
    assert len(record.images) == 10 and all((lab.images / grid.file).is_file() for grid in record.images)


def test_scores_of_images_by_hand(lab, tiny_subject):
    sampling = SamplingConfig(3, 1.5)
    rows, _ = image_rows(lab, tiny_subject, {"minmax": method_config("minmax")}, sampling, has_grids=False)
    by_method = {row["method"]: row for row in rows}
    exact = lab.samples(tiny_subject, None, 12, sampling)
    found = lab.samples(tiny_subject, method_config("minmax"), 12, sampling)
    assert not torch.equal(exact, found)
    classifier = tiny_subject.classifier
    reference = GaussianStatistics.from_features(classifier.features(held_out_images("digits")[0]))
    ours = GaussianStatistics.from_features(classifier.features(found))
    assert by_method["minmax"]["frechet"][0] == pytest.approx(frechet_distance(ours, reference))
    assert by_method["minmax"]["psnr_db"][0] == pytest.approx(psnr_db(exact, found))
    asked = np.arange(12) % tiny_subject.num_classes
    assert by_method["minmax"]["accuracy"][0] == pytest.approx((classifier.classify(found) == asked).mean())
    assert by_method[FLOAT32]["psnr_db"] is None and by_method[FLOAT32]["ssim"] is None
    # Other noise, other images: the floor of paired measures.
    assert by_method[OTHER_SEED]["psnr_db"][0] < by_method["minmax"]["psnr_db"][0]


def test_unconditional_images_have_no_class_to_be_right_about(lab, tiny_subject):
    rows, _ = image_rows(lab, tiny_subject, {}, SamplingConfig(3, 0.0), has_grids=False)
    assert [row["accuracy"] for row in rows] == [None, None, None]
    table = image_table("t", rows, tiny_subject)
    accuracy = next(k for k, column in enumerate(table.columns) if column.title.startswith("Class accuracy"))
    assert {row[accuracy] for row in table.rows} == {None}
    assert any("digits-cnn-v1" in column.title for column in table.columns)


@pytest.mark.parametrize(
    ("is_quick", "is_full", "guided", "long"),
    [(False, False, 512, 256), (True, False, 128, 128), (False, True, 512, 512)],
)
def test_only_the_default_run_halves_the_images_of_the_longer_sampler(tmp_path, is_quick, is_full, guided, long):
    lab = Laboratory(ResultCache(tmp_path), tmp_path, is_quick=is_quick, is_full=is_full)
    assert lab.images_of(lab.sampling) == guided
    assert lab.images_of(SamplingConfig(lab.long_steps, 4.0)) == long
