"""`hqdit score`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hqdit.cli.options import (
    Debug,
    Device,
    JsonFile,
    Quiet,
    Seed,
    Threads,
    require_count,
    require_json,
    running,
    say,
    write_json,
)
from hqdit.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from hqdit.evaluation.extractors import FeatureExtractor, Features
    from hqdit.evaluation.image_files import Pixels
    from hqdit.records.run_record import Interval

_BATCH = 256  # images that are floating point at once
_FEWEST_FOR_FID = 10_000  # images of each side; the fewest that published figures are made of


def score(
    samples: Annotated[Path, typer.Argument(metavar="SAMPLES", help="An .npz as ADM's suite reads it, or PNG files.")],
    reference: Annotated[
        str, typer.Option("--reference", help="digits or shapes (held-out images), an .npz, or a folder of PNG files.")
    ],
    inception: Annotated[
        Path | None,
        typer.Option("--inception", help="Inception-v3 weights; default: the classifier of the reference."),
    ] = None,
    sha256: Annotated[
        str | None, typer.Option("--sha256", help="Of other Inception weights than the public ones.")
    ] = None,
    resamples: Annotated[
        int | None,
        typer.Option("--resamples", help="For 95 % intervals; default: 200, or none with --inception."),
    ] = None,
    adm_fp16: Annotated[
        bool, typer.Option("--adm-fp16", help="Round features to float16 for precision and recall, as ADM does.")
    ] = False,
    json_file: JsonFile = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    device: Device = "cpu",
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Score a set of images against a reference: Fréchet distances, classifier score, precision and recall."""
    if resamples is not None:
        require_count("--resamples", resamples, at_least=0)
    if sha256 is not None and inception is None:
        raise UsageError("--sha256: found it without --inception, needed both. Fix: name the weights with --inception")
    with running(quiet_mode=quiet, device=device, threads=threads, seed=seed) as options:
        from hqdit.evaluation.image_files import has_stored_statistics, read_images
        from hqdit.evaluation.image_metrics import RESAMPLES, image_metrics
        from hqdit.evaluation.inception import InceptionExtractor
        from hqdit.evaluation.inception_score import SPLIT_SIZE
        from hqdit.evaluation.precision_recall import NEIGHBOURS
        from hqdit.evaluation.surrogate import SURROGATE_DATA, SurrogateClassifier, held_out_images
        from hqdit.pipeline.environment import describe_environment

        is_bundled = reference in SURROGATE_DATA
        if inception is None and not is_bundled:
            raise UsageError(
                f"--reference: found {reference} without --inception, needed one of {', '.join(SURROGATE_DATA)}, whose "
                "classifier judges both sides. Fix: name Inception weights with --inception"
            )
        read = (samples, *(() if is_bundled else (Path(reference),)), *(() if inception is None else (inception,)))
        require_json(json_file, None, *(path.expanduser() for path in read))
        pixels = read_images(samples)
        other = None if is_bundled else read_images(Path(reference))
        has_statistics = not is_bundled and has_stored_statistics(Path(reference))
        extractor: FeatureExtractor
        if inception is None:
            extractor, channels = SurrogateClassifier.load(reference), SURROGATE_DATA[reference].image_shape[0]
        else:
            extractor, channels = InceptionExtractor.load(inception, sha256, options.device), 3
        count = (RESAMPLES if inception is None else 0) if resamples is None else resamples
        references = held_out_images(reference)[0] if other is None else other
        right = _features(extractor, references, channels, "features of the reference")
        left = _features(extractor, pixels, channels, "features of the samples")
        metrics = image_metrics(extractor, left, right, resamples=count, adm_fp16=adm_fp16, seed=seed)
        warnings = few_images(extractor, len(left.pooled), len(right.pooled))
        result = {
            "samples": len(left.pooled),
            "reference": reference,
            "reference_images": len(right.pooled),
            "reference_statistics_ignored": has_statistics,
            "extractor": extractor.name,
            "metrics": {name: _plain(value) for name, value in metrics.items()},
            "classifier_score_splits": -(-len(left.pooled) // SPLIT_SIZE),
            "precision_recall_neighbours": NEIGHBOURS,
            "precision_recall_dtype": "float16" if adm_fp16 else "float64",
            "resamples": count,
            "warnings": warnings,
            "seed": seed,
            "environment": describe_environment(),
        }
        write_json(json_file, result)
        if quiet:
            return
        say(f"{len(left.pooled)} samples against {len(right.pooled)} reference images ({reference})")
        if has_statistics:
            say("the mean and covariance stored in the reference are not used; ADM's own suite would use them")
        for warning in warnings:
            say(f"warning: {warning}")
        for name, value in metrics.items():
            say(f"{name}: {_shown(value)}")


def few_images(extractor: FeatureExtractor, samples: int, references: int) -> list[str]:
    """The warning that FID and sFID of few images need; surrogates have no published numbers to be taken for."""
    if not extractor.is_inception or min(samples, references) >= _FEWEST_FOR_FID:
        return []
    return [
        f"FID and sFID of {samples:,} samples against {references:,} reference images, fewer than "
        f"{_FEWEST_FOR_FID:,}: both depend on the number of images and cannot be compared with published ones, which "
        "are mostly of 50,000 samples"
    ]


def _features(extractor: FeatureExtractor, images: Tensor | Pixels, channels: int, what: str) -> Features:
    """Features of a set, batch by batch; images float32 (n, channels, ...) or pixels uint8 (n, ..., 3)."""
    import numpy as np

    from hqdit.evaluation.extractors import joined
    from hqdit.evaluation.image_files import as_images
    from hqdit.progress import track

    parts = []
    for start in track(range(0, len(images), _BATCH), what):
        batch = images[start : start + _BATCH]
        parts.append(extractor.extract(as_images(batch, channels) if isinstance(batch, np.ndarray) else batch))
    return joined(parts)


def _plain(value: float | Interval) -> float | dict[str, float]:
    return value if isinstance(value, float) else {"value": value.value, "low": value.low, "high": value.high}


def _shown(value: float | Interval) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value.value:.4f} (95 %: {value.low:.4f} to {value.high:.4f})"
