"""`hqdit score`, and the `.npz` of `hqdit sample` that it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Hqdit, Models
from PIL import Image

from hqdit.evaluation.image_files import read_images, write_adm_npz
from hqdit.evaluation.surrogate import held_out_images
from hqdit.sampling.sampler import to_uint8

METRICS = ("Fréchet distance", "spatial Fréchet distance", "classifier score", "precision", "recall")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 120 held-out digits as a file of samples."""
    path = tmp_path_factory.mktemp("digits") / "samples.npz"
    write_adm_npz(path, to_uint8(held_out_images("digits")[0][:120]))
    return path


def read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def test_score_prints_and_writes_every_metric(hqdit: Hqdit, digits: Path, tmp_path: Path) -> None:
    json_file = tmp_path / "score.json"
    outcome = hqdit("score", digits, "--reference", "digits", "--resamples", 5, "--json", json_file)
    assert (outcome.code, outcome.err) == (0, "")
    first, *lines = outcome.out.splitlines()
    assert first == "120 samples against 360 reference images (digits)"
    assert [line.partition(":")[0] for line in lines] == [f"{name} (digits-cnn-v1)" for name in METRICS]
    assert "FID" not in outcome.out
    found = read(json_file)
    assert (found["samples"], found["reference_images"], found["extractor"]) == (120, 360, "digits-cnn-v1")
    assert (found["resamples"], found["classifier_score_splits"], found["precision_recall_neighbours"]) == (5, 1, 3)
    assert (found["precision_recall_dtype"], found["reference_statistics_ignored"]) == ("float64", False)
    for name, value in found["metrics"].items():
        assert set(value) == {"value", "low", "high"}
        assert f"{name}: {value['value']:.4f} (95 %: {value['low']:.4f} to {value['high']:.4f})" in lines
    # Real images are close to real images: of 120, hardly any is beyond the reach of the other 360.
    assert found["metrics"]["precision (digits-cnn-v1)"]["value"] > 0.99


def test_a_folder_of_images_scores_as_their_npz(hqdit: Hqdit, digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for index, image in enumerate(read_images(digits)):
        Image.fromarray(image[..., 0]).save(folder / f"{index:04d}.png")
    results = []
    for samples in (digits, folder):
        arguments = ("--reference", "digits", "--resamples", 0, "--adm-fp16", "--quiet", "--json", tmp_path / "s.json")
        outcome = hqdit("score", samples, *arguments)
        assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
        results.append(read(tmp_path / "s.json"))
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["precision_recall_dtype"] == "float16"
    assert "recall, float16 features (digits-cnn-v1)" in results[0]["metrics"]


def test_shapes_are_judged_by_their_own_classifier(hqdit: Hqdit, tmp_path: Path) -> None:
    write_adm_npz(tmp_path / "shapes.npz", to_uint8(held_out_images("shapes")[0][:20]))
    arguments = ("--reference", "shapes", "--resamples", 0, "--quiet", "--json", tmp_path / "s.json")
    outcome = hqdit("score", tmp_path / "shapes.npz", *arguments)
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    found = read(tmp_path / "s.json")
    assert (found["samples"], found["reference_images"], found["extractor"]) == (20, 1000, "shapes-cnn-v1")
    assert found["metrics"]["precision (shapes-cnn-v1)"] == 1.0


def test_samples_are_written_as_npz_beside_the_folder(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    out, npz = tmp_path / "out", tmp_path / "samples.npz"
    outcome = hqdit("sample", models.pipeline, "--out", out, "--num", 6, "--steps", 2, "--npz", npz, "--quiet")
    assert (outcome.code, outcome.err) == (0, "")
    with np.load(npz) as stored:
        assert stored.files == ["arr_0"] and stored["arr_0"].shape == (6, 8, 8, 3)
    assert np.array_equal(read_images(npz), read_images(out))
    scored = hqdit("score", npz, "--reference", "digits", "--resamples", 0)
    assert (scored.code, scored.err) == (0, "") and scored.out.startswith("6 samples against 360")


@pytest.mark.parametrize("name", ["out", "out/samples.npz", "file/samples.npz", "folder"])
def test_npz_paths_that_cannot_be_are_refused_before_sampling(
    hqdit: Hqdit, models: Models, tmp_path: Path, name: str
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("kept")
    outcome = hqdit("sample", models.pipeline, "--out", tmp_path / "out", "--npz", tmp_path / name)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.first_line.startswith(f"hqdit: error: --npz: found {tmp_path / name}")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]


def test_npz_inside_the_model_is_refused(hqdit: Hqdit, models: Models, tmp_path: Path) -> None:
    outcome = hqdit("sample", models.pipeline, "--out", tmp_path / "out", "--npz", models.pipeline / "samples.npz")
    assert outcome.code == 2 and "inside the model" in outcome.first_line


def test_misuse_is_one_line_and_exit_code_two(hqdit: Hqdit, digits: Path, tmp_path: Path) -> None:
    coloured, large = tmp_path / "coloured.npz", tmp_path / "large.npz"
    rng = np.random.default_rng(0)
    write_adm_npz(coloured, rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8))
    write_adm_npz(large, rng.integers(0, 256, (5, 16, 16, 1), dtype=np.uint8))
    cases: dict[str, tuple[object, ...]] = {
        "--reference: found": (digits, "--reference", digits),
        "--sha256: found": (digits, "--reference", "digits", "--sha256", "0" * 64),
        "--resamples: found": (digits, "--reference", "digits", "--resamples", -1),
        "found colours": (coloured, "--reference", "digits"),
        "digits-cnn-v1: found images": (large, "--reference", "digits"),
        "--json: found": (digits, "--reference", "digits", "--json", digits),
    }
    for expected, arguments in cases.items():
        outcome = hqdit("score", *arguments)
        assert (outcome.code, outcome.out) == (2, "")
        assert expected in outcome.first_line and "needed" in outcome.first_line and "Fix:" in outcome.first_line
        assert len(outcome.err.splitlines()) == 1


def test_broken_files_are_exit_code_three(hqdit: Hqdit, digits: Path, tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"nothing")
    cases: tuple[tuple[object, ...], ...] = (
        (tmp_path / "missing.npz", "--reference", "digits"),
        (tmp_path, "--reference", "digits"),
        (digits, "--reference", tmp_path / "missing.npz", "--inception", weights),
        (digits, "--reference", digits, "--inception", weights),
        (digits, "--reference", "digits", "--inception", tmp_path / "missing.pth"),
    )
    for arguments in cases:
        outcome = hqdit("score", *arguments)
        assert (outcome.code, outcome.out) == (3, "")
        assert "needed" in outcome.first_line and "Fix:" in outcome.first_line
