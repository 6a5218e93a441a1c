"""The measurements behind `hqdit demo`: one model, several methods, the same noise for all of them."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from hqdit.calibration.samples import CalibrationSet
from hqdit.evaluation.fidelity import evaluation_inputs, layer_fidelity, noise_fidelity, psnr_db
from hqdit.evaluation.frechet import GaussianStatistics, frechet_distance
from hqdit.evaluation.surrogate import SurrogateClassifier, held_out_images
from hqdit.models.source import ModelFolder
from hqdit.pipeline.checkpoint import load, save
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize
from hqdit.sampling.sampler import SamplingConfig, generate_images

FLOAT32 = "float32"


@dataclass(frozen=True)
class MethodResult:
    """What one method scored; the float original has no SQNR against itself and no bits per quantized weight.

    Attributes:
        method: "float32" or a preset's name.
        path: folder of the checkpoint that was sampled.
        images: float32 (samples, channels, height, width) in [-1, 1].
        class_accuracy: share of samples that the surrogate classifier puts in the class asked for.
        frechet: Fréchet distance on surrogate features against the held-out images.
        eps_sqnr_db: conditional, unconditional and guided; None for the float original.
        eps_by_timestep: (time step, guided SQNR).
        layer_sqnr_db: name -> output SQNR of the layer alone.
        sample_psnr_db: mean PSNR against the float samples.
        seconds: wall-clock time of quantization, with drawing the calibration data where the method needs any.
    """

    method: str
    path: Path
    images: Tensor
    class_accuracy: float
    frechet: float
    eps_sqnr_db: Mapping[str, float | None] | None = None
    eps_by_timestep: tuple[tuple[int, float], ...] = ()
    layer_sqnr_db: Mapping[str, float] | None = None
    sample_psnr_db: float | None = None
    seconds: float | None = None

    @property
    def mean_layer_sqnr_db(self) -> float | None:
        """Mean of the layers' SQNR in dB."""
        if not self.layer_sqnr_db:
            return None
        return sum(self.layer_sqnr_db.values()) / len(self.layer_sqnr_db)

    def to_json(self) -> dict[str, Any]:
        """Everything but the images."""
        return {
            "method": self.method,
            "class_accuracy": self.class_accuracy,
            "frechet": self.frechet,
            "eps_sqnr_db": dict(self.eps_sqnr_db) if self.eps_sqnr_db else None,
            "eps_sqnr_db_by_timestep": [list(pair) for pair in self.eps_by_timestep],
            "layer_sqnr_db": dict(self.layer_sqnr_db) if self.layer_sqnr_db else None,
            "sample_psnr_db": self.sample_psnr_db,
            "quantize_seconds": self.seconds,
        }


def compare_presets(
    model: nn.Module,
    folder: ModelFolder,
    scheduler: Any,
    presets: Mapping[str, QuantizationConfig],
    out: Path,
    *,
    label: str,
    images: int,
    sampling: SamplingConfig,
    calibration_samples: int,
    seed: int,
) -> list[MethodResult]:
    """Quantize `model` with every preset, save and reload each checkpoint, and measure it beside the original.

    Args:
        model: the float digits model, or a variant with the same function.
        folder: where the original lies; checkpoints take everything but the transformer from there.
        scheduler: a deterministic diffusers scheduler.
        presets: method -> configuration.
        out: folder for the checkpoints, one subfolder per method.
        label: of the model, for progress bars.
        images: samples per method, classes in turn.
        sampling: steps and guidance.
        calibration_samples: tuples from the model's own sampler.
        seed: of noise and calibration.

    Returns:
        The float original first, then the presets in order.
    """
    classifier = SurrogateClassifier.load()
    reference = GaussianStatistics.from_features(classifier.features(held_out_images("digits")[0]))
    classes = [index % 10 for index in range(images)]
    device = next(model.parameters()).device

    def sampled(which: nn.Module, method: str) -> tuple[Tensor, float, float]:
        pictures = generate_images(
            which, scheduler, None, classes, sampling, seed, batch_size=images, what=f"{label}: sampling {method}"
        )
        found = classifier.classify(pictures)
        statistics = GaussianStatistics.from_features(classifier.features(pictures))
        return pictures, float((found == np.array(classes)).mean()), frechet_distance(statistics, reference)

    save(model, out / FLOAT32, folder)
    exact_images, accuracy, distance = sampled(model, FLOAT32)
    results = [MethodResult(FLOAT32, out / FLOAT32, exact_images, accuracy, distance)]
    start = time.perf_counter()
    calibration = CalibrationSet.from_sampler(model, scheduler, calibration_samples, sampling, seed)
    calibration_seconds = time.perf_counter() - start
    inputs = evaluation_inputs(model, scheduler, sampling, seed)
    for method, config in presets.items():
        start = time.perf_counter()
        quantized = quantize(copy.deepcopy(model), config, calibration)
        seconds = time.perf_counter() - start + (calibration_seconds if config.needs_calibration else 0.0)
        save(quantized, out / method, folder)
        reloaded = load(out / method, device=device)  # what is measured is what lies on disk
        noise = noise_fidelity(model, reloaded, inputs, sampling.guidance)
        pictures, accuracy, distance = sampled(reloaded, method)
        results.append(
            MethodResult(
                method,
                out / method,
                pictures,
                accuracy,
                distance,
                {"conditional": noise.conditional, "unconditional": noise.unconditional, "guided": noise.guided},
                noise.by_timestep,
                layer_fidelity(model, reloaded, inputs),
                _finite_or_none(psnr_db(exact_images, pictures)),
                seconds,
            )
        )
    return results


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
