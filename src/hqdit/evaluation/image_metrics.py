"""All metrics of one set of images against a reference, under names that carry the extractor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from hqdit.errors import UsageError
from hqdit.evaluation.bootstrap import bootstrap_interval, bootstrap_mean
from hqdit.evaluation.extractors import FeatureExtractor, Features, Float64Array
from hqdit.evaluation.frechet import GaussianStatistics, frechet_distance
from hqdit.evaluation.inception import PUBLIC_NAME
from hqdit.evaluation.inception_score import inception_score
from hqdit.evaluation.precision_recall import precision_recall
from hqdit.records.run_record import Interval

#: Enough for the ends of a 95 % interval to settle to about a tenth of its width.
RESAMPLES = 200

_Strata = npt.NDArray[np.integer] | None

#: What the metrics are called on Inception-v3; the others keep their names.
_INCEPTION_NAMES = {
    "Fréchet distance": "FID",
    "spatial Fréchet distance": "sFID",
    "classifier score": "Inception Score",
}


def metric_name(metric: str, extractor: FeatureExtractor) -> str:
    """The name that a number is shown under.

    With Inception-v3 the Fréchet distances are FID and sFID and the classifier score is the Inception Score; with the
    public weights these names stand alone. Every other number carries the extractor's name in brackets.

    Args:
        metric: "Fréchet distance", "spatial Fréchet distance", "classifier score", "precision", "recall" or
            "class accuracy".
        extractor: whose features it was made with.
    """
    name = _INCEPTION_NAMES.get(metric, metric) if extractor.is_inception else metric
    return name if extractor.name == PUBLIC_NAME else f"{name} ({extractor.name})"


def image_metrics(
    extractor: FeatureExtractor,
    samples: Tensor | Features,
    reference: Tensor | Features,
    *,
    classes: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
    adm_fp16: bool = False,
    seed: int = 0,
) -> dict[str, float | Interval]:
    """Fréchet distance, spatial Fréchet distance, classifier score, precision and recall, by `metric_name`.

    Intervals are 95 % percentile intervals. What is resampled with replacement: the samples, with the reference fixed,
    for distances, score, accuracy and precision; the reference images, with the samples' manifold fixed, for recall.
    With classes the samples are drawn within their classes, because sets of samples have fixed numbers of each: the
    chance of other numbers is none of theirs, and would lower the classifier score of every resample. A resample holds
    only about 63 % of the samples, some of them repeatedly, so its distances are higher on average than that of the
    whole set; the interval of a distance is shifted back by that difference, and ends at 0. Every interval holds its
    value (`bootstrap_interval`).

    Args:
        extractor: the network that judges.
        samples: images (n, channels, height, width) in [-1, 1], or what the extractor made of them; n >= 4.
        reference: the same for the reference set.
        classes: class asked for, per sample, if the numbers of samples per class were fixed; adds "class accuracy" if
            the extractor classifies. None for unconditional samples.
        resamples: for the intervals; 0 gives plain numbers instead. With 2,048 features each one takes seconds.
        adm_fp16: round features to float16 for precision and recall, as ADM's suite does; their names then say so.
        seed: of the resampling.

    Returns:
        Name to value; metrics that the extractor cannot give are left out.

    Raises:
        UsageError: too few images, a number of classes that differs from that of the samples, or intervals asked for
            with a class of its own for every sample.
        NumericsError: an image or a feature is not finite.
    """
    left = samples if isinstance(samples, Features) else extractor.extract(samples)
    right = reference if isinstance(reference, Features) else extractor.extract(reference)
    if classes is not None and len(classes) != len(left.pooled):
        raise UsageError(
            f"image metrics: found {len(classes)} classes for {len(left.pooled)} samples, needed one each. "
            "Fix: pass the class that each sample was asked to be"
        )
    found: dict[str, float | Interval] = {}
    strata = None if classes is None else np.asarray(classes)
    found["Fréchet distance"] = _distance(left.pooled, right.pooled, resamples, seed, strata)
    if left.spatial is not None and right.spatial is not None:
        found["spatial Fréchet distance"] = _distance(left.spatial, right.spatial, resamples, seed, strata)
    if left.probabilities is not None:
        found["classifier score"] = _score(left.probabilities, resamples, seed, strata)
    hits = precision_recall(left.pooled, right.pooled, adm_fp16=adm_fp16)
    suffix = ", float16 features" if adm_fp16 else ""
    found[f"precision{suffix}"] = _share(hits.sample_hits, resamples, seed, strata)
    found[f"recall{suffix}"] = _share(hits.reference_hits, resamples, seed, None)
    if classes is not None and left.probabilities is not None:
        is_right = left.probabilities.argmax(axis=1) == np.asarray(classes)
        found["class accuracy"] = _share(is_right, resamples, seed, strata)
    return {metric_name(metric, extractor): value for metric, value in found.items()}


def _distance(
    samples: Float64Array, reference: Float64Array, resamples: int, seed: int, strata: _Strata
) -> float | Interval:
    fixed = GaussianStatistics.from_features(reference)

    def distance(rows: Float64Array) -> float:
        return frechet_distance(GaussianStatistics.from_features(rows), fixed)

    if not resamples:
        return distance(samples)
    return bootstrap_interval(samples, distance, resamples, seed, True, strata=strata, lowest=0.0)


def _score(probabilities: Float64Array, resamples: int, seed: int, strata: _Strata) -> float | Interval:
    def score(rows: Float64Array) -> float:
        return inception_score(rows).value

    return (
        bootstrap_interval(probabilities, score, resamples, seed, strata=strata) if resamples else score(probabilities)
    )


def _share(hits: npt.NDArray[np.bool_], resamples: int, seed: int, strata: _Strata) -> float | Interval:
    return bootstrap_mean(hits, resamples, seed, strata=strata) if resamples else float(hits.mean())
