"""`hqdit score`, and the `.npz` of `hqdit sample` that it reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import Hqdit, Models
from PIL import Image
from scipy.linalg import eigvals
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

from hqdit.cli.score import few_images
from hqdit.evaluation.extractors import Features
from hqdit.evaluation.image_files import as_images, read_images, write_adm_npz
from hqdit.evaluation.inception import InceptionExtractor
from hqdit.evaluation.shapes import shapes_images
from hqdit.evaluation.surrogate import SurrogateClassifier, from_stored, held_out_images
from hqdit.sampling.sampler import to_uint8

Array = npt.NDArray[np.float64]
METRICS = ("Fréchet distance", "spatial Fréchet distance", "classifier score", "precision", "recall")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 digits as a file of samples; none of them is in the reference, the held-out digits."""
    path = tmp_path_factory.mktemp("digits") / "samples.npz"
    seen = {image.numpy().tobytes() for image in held_out_images("digits")[0]}
    images = from_stored(torch.from_numpy(load_digits().images.astype(np.uint8)))
    chosen = torch.stack([image for image in images if image.numpy().tobytes() not in seen][:120])
    write_adm_npz(path, to_uint8(chosen))
    return path


def frechet(a: Array, b: Array) -> float:
    """Dowson and Landau's formula, with the eigenvalues of the product of the covariances."""
    left, right = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.maximum(eigvals(left @ right).real, 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(left) + np.trace(right) - 2 * root)


def share_within(points: Array, others: Array) -> float:
    """Share of the points within the third-nearest-neighbour ball of any of the others."""
    radii = np.sort(cdist(others, others), axis=1)[:, 3]
    return float((cdist(points, others) <= radii).any(axis=1).mean())


def expected_values(dataset: str, pixels: npt.NDArray[np.uint8]) -> list[float]:
    """The five metrics by their formulas, from the features of both sets."""
    classifier = SurrogateClassifier.load(dataset)
    reference = held_out_images(dataset)[0]
    left, right = classifier.extract(as_images(pixels, reference.shape[1])), classifier.extract(reference)
    assert left.spatial is not None and right.spatial is not None and left.probabilities is not None
    p = left.probabilities
    divergence = (p * np.log(p / p.mean(axis=0))).sum(axis=1).mean()
    return [
        frechet(left.pooled, right.pooled),
        frechet(left.spatial, right.spatial),
        float(np.exp(divergence)),
        share_within(left.pooled, right.pooled),
        share_within(right.pooled, left.pooled),
    ]


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
    values = [value["value"] for value in found["metrics"].values()]
    # Square roots of eigenvalues near zero cost half the digits.
    assert values == pytest.approx(expected_values("digits", read_images(digits)), rel=1e-6)
    assert all(value["low"] <= value["value"] <= value["high"] for value in found["metrics"].values())
    assert found["warnings"] == [] and "warning" not in outcome.out


@pytest.mark.parametrize("is_quiet", [False, True])
def test_fid_of_few_images_is_never_without_a_warning(
    hqdit: Hqdit, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_quiet: bool
) -> None:
    class Stub:
        name, is_inception = "inception-2015-12-05", True

        def extract(self, images: torch.Tensor) -> Features:
            pixels = images[:, 0, ::3, ::3].double().flatten(1).numpy()
            return Features(pixels, pixels, None)

    monkeypatch.setattr(InceptionExtractor, "load", lambda *_: Stub())
    weights, json_file = tmp_path / "weights.pth", tmp_path / "s.json"
    weights.write_bytes(b"")
    arguments = ("--reference", "digits", "--inception", weights, "--json", json_file)
    outcome = hqdit("score", digits, *arguments, *(["--quiet"] if is_quiet else []))
    assert (outcome.code, outcome.err) == (0, "")
    (warning,) = read(json_file)["warnings"]
    assert warning.startswith("FID and sFID of 120 samples against 360 reference images, fewer than 10,000")
    assert outcome.out.count(f"warning: {warning}\n") == (not is_quiet)
    assert is_quiet or "\nFID: " in outcome.out


@pytest.mark.parametrize(
    ("samples", "references", "warned"), [(10_000, 10_000, False), (9_999, 50_000, True), (50_000, 9_999, True)]
)
def test_both_sides_need_ten_thousand_images(samples: int, references: int, warned: bool) -> None:
    class Inception:
        name, is_inception = "inception-2015-12-05", True

        def extract(self, images: torch.Tensor) -> Features:
            raise NotImplementedError

    assert bool(few_images(Inception(), samples, references)) == warned
    assert few_images(SurrogateClassifier.load("digits"), samples, references) == []


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
    # The reference is the first 1,000 of the split.
    write_adm_npz(tmp_path / "shapes.npz", to_uint8(shapes_images("held-out", 1150)[0][1000:]))
    arguments = ("--reference", "shapes", "--resamples", 0, "--quiet", "--json", tmp_path / "s.json")
    outcome = hqdit("score", tmp_path / "shapes.npz", *arguments)
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    found = read(tmp_path / "s.json")
    assert (found["samples"], found["reference_images"], found["extractor"]) == (150, 1000, "shapes-cnn-v1")
    expected = expected_values("shapes", read_images(tmp_path / "shapes.npz"))
    assert list(found["metrics"].values()) == pytest.approx(expected, rel=1e-6)


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
