"""Images of several methods from the same noise, judged beside the float model's and beside a noise floor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from hqdit.evaluation.bootstrap import bootstrap_mean
from hqdit.evaluation.fidelity import psnr_of_images
from hqdit.evaluation.image_metrics import image_metrics, metric_name
from hqdit.evaluation.ssim import structural_similarity
from hqdit.experiments.laboratory import Job, Laboratory
from hqdit.experiments.subjects import Subject
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.publish import publish_bytes
from hqdit.records.run_record import Cell, Column, ImageGrid, Interval, Table
from hqdit.report.figures import image_grid
from hqdit.sampling.sampler import SamplingConfig, to_uint8

FLOAT32 = "float32"
#: The float model from other noise: what a metric says of two sets that differ by chance alone.
OTHER_SEEDS = {1: "float32, another seed", 2: "float32, a third seed"}
OTHER_SEED = OTHER_SEEDS[1]

RESAMPLES = 100
GRID_IMAGES, GRID_COLUMNS = 30, 10

#: Metrics on features, by the key of a row; `metric_name` gives the name that they are shown under.
_METRICS = {
    "frechet": "Fréchet distance",
    "spatial_frechet": "spatial Fréchet distance",
    "score": "classifier score",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "class accuracy",
}
#: Against the float model's image from the same noise.
_PAIRED = ("psnr_db", "ssim")
_MEANINGS = {
    "frechet": "distance of feature statistics to those of held-out images; lower is better",
    "spatial_frechet": "the same on spatial features",
    "score": "how certain and how varied the classifier's answers are; higher is better",
    "precision": "share of samples that look like held-out images; higher is better",
    "recall": "share of held-out images that the samples cover; higher is better",
    "accuracy": "share of samples in the class asked for, by the classifier; higher is better",
}


def image_rows(
    lab: Laboratory,
    subject: Subject,
    methods: Mapping[str, QuantizationConfig],
    sampling: SamplingConfig,
    *,
    has_grids: bool = True,
    other_seeds: Sequence[int] = tuple(OTHER_SEEDS),
) -> tuple[list[dict[str, Any]], list[ImageGrid]]:
    """Scores of the float model, of the float model from other seeds, and of every method.

    Args:
        lab: gives images, cache and folder.
        subject: the model.
        methods: name -> configuration.
        sampling: steps and guidance; guidance 0 is unconditional, where class accuracy says nothing and is left out.
        has_grids: write a PNG of the first images of each row.
        other_seeds: keys of `OTHER_SEEDS` whose rows are wanted.

    Returns:
        Rows (float32, `OTHER_SEEDS`, methods) with "method", "samples" and [value, low, high] or None for each metric;
        "psnr_exact", the number of images that equal the float model's, which leaves "psnr_db" without a mean;
        "ssim_window" in pixels; and the pictures.
    """
    everything: dict[str, tuple[QuantizationConfig | None, int]] = {
        FLOAT32: (None, lab.seed),
        **{OTHER_SEEDS[offset]: (None, lab.seed + offset) for offset in other_seeds},
        **{name: (config, lab.seed) for name, config in methods.items()},
    }
    rows, grids = [], []
    for method, (config, seed) in everything.items():
        row = _row(lab, subject, config, sampling, seed)
        rows.append({"method": method, "samples": lab.images_of(sampling), **row})
        if has_grids:
            images = lab.samples(subject, config, lab.images_of(sampling), sampling, seed)
            grids.append(_grid(lab, subject, method, images))
    return rows, grids


def float_jobs(
    subject: Subject, sampling: SamplingConfig, other_seeds: Sequence[int] = tuple(OTHER_SEEDS)
) -> list[Job]:
    """What has to be in the cache before the rows of methods: the float model's images, which all are compared with."""
    return [partial(_floor_row, subject=subject, sampling=sampling, seed_offset=k) for k in (0, *other_seeds)]


def method_jobs(subject: Subject, methods: Iterable[QuantizationConfig], sampling: SamplingConfig) -> list[Job]:
    """A job for the row of every method."""
    return [partial(_method_row, subject=subject, config=config, sampling=sampling) for config in methods]


def _floor_row(lab: Laboratory, subject: Subject, sampling: SamplingConfig, seed_offset: int) -> None:
    _row(lab, subject, None, sampling, lab.seed + seed_offset)


def _method_row(lab: Laboratory, subject: Subject, config: QuantizationConfig, sampling: SamplingConfig) -> None:
    _row(lab, subject, config, sampling, lab.seed)


def _row(
    lab: Laboratory, subject: Subject, config: QuantizationConfig | None, sampling: SamplingConfig, seed: int
) -> dict[str, Any]:
    """Scores of the images of one model, from the cache if they were scored before."""
    count = lab.images_of(sampling)
    key = {
        "what": "image scores",
        "subject": subject.name,
        "config": None if config is None else config.to_json(),
        **lab.settings,
        "sampled": {"count": count, "steps": sampling.steps, "guidance": sampling.guidance, "seed": seed},
        "resamples": RESAMPLES,
    }

    def score() -> dict[str, Any]:
        images = lab.samples(subject, config, count, sampling, seed)
        is_exact = config is None and seed == lab.seed
        return _scores(
            lab, subject, None if is_exact else lab.samples(subject, None, count, sampling), images, sampling
        )

    return lab.cache.numbers(key, score)


def _scores(
    lab: Laboratory, subject: Subject, exact: Tensor | None, images: Tensor, sampling: SamplingConfig
) -> dict[str, Any]:
    classes = [index % subject.num_classes for index in range(len(images))]
    strata = classes if sampling.guidance > 0 else None
    found = image_metrics(
        subject.classifier, images, lab.reference_features(subject), classes=strata, resamples=RESAMPLES
    )
    row: dict[str, Any] = {key: None for key in (*_METRICS, *_PAIRED, "psnr_exact", "ssim_window")}
    for key, metric in _METRICS.items():
        value = found.get(metric_name(metric, subject.classifier))
        if isinstance(value, Interval):
            row[key] = [value.value, value.low, value.high]
    if exact is not None:
        ratios, similarity = psnr_of_images(exact, images), structural_similarity(exact, images)
        row["psnr_exact"] = sum(map(math.isinf, ratios))
        row["ssim_window"] = similarity.window
        for key, values in (("psnr_db", ratios), ("ssim", similarity.values)):
            if all(map(math.isfinite, values)):
                interval = bootstrap_mean(values, RESAMPLES, strata=strata)
                row[key] = [interval.value, interval.low, interval.high]
    return row


def _grid(lab: Laboratory, subject: Subject, method: str, images: Tensor) -> ImageGrid:
    """A PNG beside the record, named after subject and method."""
    words = "".join(c if c.isalnum() else " " for c in f"{subject.name} {method}").split()
    file = f"{'-'.join(words)}.png"
    scale = 4 if images.shape[-1] < 16 else 2
    shown = to_uint8(images[:GRID_IMAGES]).numpy()
    publish_bytes(lab.images / file, image_grid(shown, columns=GRID_COLUMNS, scale=scale))
    return ImageGrid(f"{subject.name}: {method}", file, f"the first {len(shown)} samples, classes in turn")


def image_table(title: str, rows: list[dict[str, Any]], subject: Subject) -> Table:
    """The rows as a table; the headers carry the classifier's name."""
    columns = [Column("Method"), Column("Samples", "", 0)]
    columns += [
        Column(metric_name(metric, subject.classifier).capitalize(), "", 3, _MEANINGS[key])
        for key, metric in _METRICS.items()
    ]
    windows = sorted({f"{row['ssim_window']}x{row['ssim_window']}" for row in rows if row["ssim_window"] is not None})
    window = f"; windows of {' or '.join(windows)} pixels" if windows else ""
    columns.append(Column("PSNR", "dB", 2, "against the float32 samples from the same noise; higher is better"))
    columns.append(Column("SSIM", "", 3, f"against the float32 samples from the same noise{window}; higher is better"))
    cells = tuple(
        (row["method"], row["samples"], *(_cell(row[key]) for key in _METRICS), _psnr(row), _cell(row["ssim"]))
        for row in rows
    )
    return Table(title, tuple(columns), cells)


def _psnr(row: dict[str, Any]) -> Cell:
    """The mean with its interval; where images equal their originals it is infinite, and their number is given."""
    if not row["psnr_exact"]:
        return _cell(row["psnr_db"])
    return math.inf if row["psnr_exact"] == row["samples"] else f"{row['psnr_exact']} of {row['samples']} exact"


def _cell(value: list[float] | None) -> Cell:
    return None if value is None else Interval(*value)
