"""What every experiment works with: subjects, quantized models, their scores and their images, each made once."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from hqdit.analysis.inspection import bits_per_activation, bits_per_weight
from hqdit.analysis.weights import format_shares
from hqdit.calibration.samples import DEFAULT_SAMPLES, CalibrationSet
from hqdit.evaluation.bootstrap import bootstrap_interval
from hqdit.evaluation.extractors import Features
from hqdit.evaluation.fidelity import (
    Branches,
    EvaluationInputs,
    layer_powers,
    mean_db_interval,
    noise_predictions,
    prediction_fidelity,
)
from hqdit.evaluation.surrogate import held_out_images
from hqdit.experiments.cache import ResultCache
from hqdit.experiments.subjects import Subject
from hqdit.numerics.error import decibel
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize
from hqdit.progress import track
from hqdit.records.run_record import Interval, RunRecord
from hqdit.sampling.noise import SAMPLE
from hqdit.sampling.sampler import SamplingConfig, generate_images

if TYPE_CHECKING:
    from hqdit.experiments.workers import Workers

GUIDANCES = (1.5, 4.0)
#: Images at once: measured to take the least time each on one core, where more no longer fit its cache.
IMAGE_BATCH = 64

#: Something that leaves its results in the cache of the laboratory that it gets; it can be sent to another process.
Job = Callable[["Laboratory"], object]


@dataclass
class Laboratory:
    """Settings of one `hqdit reproduce`, and everything that several experiments share.

    Attributes:
        cache: results of earlier runs.
        images: folder of the experiment that is running, for pictures beside its record.
        seed: of calibration, noise and rotations.
        is_quick: fewer samples and steps, for a look within minutes.
        is_full: also the parts of the grid that take hours.
        tell: says what is going on.
        workers: processes that prepare results, or None to compute them in this one.
        threads: for measurements of time; everything else is computed with one thread.
    """

    cache: ResultCache
    images: Path
    seed: int = 0
    is_quick: bool = False
    is_full: bool = False
    tell: Callable[[str], None] = print
    workers: Workers | None = None
    threads: int = 1
    _calibrations: dict[tuple[Any, ...], CalibrationSet] = field(default_factory=dict)
    _inputs: dict[tuple[Any, ...], EvaluationInputs] = field(default_factory=dict)
    _exact: dict[Subject, list[Branches]] = field(default_factory=dict)
    _references: dict[str, Features] = field(default_factory=dict)

    @property
    def sampling(self) -> SamplingConfig:
        """Of images, calibration and evaluation: 20 steps at guidance 1.5."""
        return SamplingConfig(8 if self.is_quick else 20, GUIDANCES[0])

    @property
    def calibration_samples(self) -> int:
        """Tuples behind every calibration that does not say otherwise: the paper's 512."""
        return 128 if self.is_quick else DEFAULT_SAMPLES

    @property
    def draws(self) -> int:
        """Draws of rotation signs behind comparisons of the paper's method with what differs from it in one part."""
        return 1 if self.is_quick else 3

    @property
    def image_count(self) -> int:
        """Images per method where images are judged."""
        return 128 if self.is_quick else 512

    @property
    def long_steps(self) -> int:
        """Steps of the longer sampler: the paper's 100."""
        return 10 if self.is_quick else 100

    def images_of(self, sampling: SamplingConfig) -> int:
        """Images per method with this sampling: half of `image_count` where each takes five times as long.

        Half still gives covariances of full rank. A quick run is at that limit, a full one takes its time.
        """
        is_halved = sampling.steps > self.sampling.steps and not (self.is_quick or self.is_full)
        return self.image_count // 2 if is_halved else self.image_count

    @property
    def settings(self) -> dict[str, Any]:
        """What every result depends on, for keys and records."""
        return {
            "seed": self.seed,
            "steps": self.sampling.steps,
            "guidance": self.sampling.guidance,
            "calibration_samples": self.calibration_samples,
        }

    def prepare(self, jobs: Sequence[Job], what: str) -> None:
        """Have the results of all `jobs` in the cache, computed side by side where there are workers."""
        if self.workers is not None:
            self.cache.misses += self.workers.run(jobs, what)
        else:
            for job in track(jobs, what):
                job(self)

    def subjects(self, subjects: Iterable[Subject]) -> tuple[Subject, ...]:
        """All of them, or in a quick run those on the first one's data."""
        listed = tuple(subjects)
        return tuple(s for s in listed if s.source == listed[0].source) if self.is_quick else listed

    def calibration(self, subject: Subject, samples: int | None = None, seed: int | None = None) -> CalibrationSet:
        """The subject's calibration data, drawn once per size and seed."""
        count = samples or self.calibration_samples
        key = (subject, count, self.seed if seed is None else seed)
        if key not in self._calibrations:
            self._calibrations[key] = subject.calibration(count, self.sampling, key[2])
        return self._calibrations[key]

    def inputs(self, subject: Subject) -> EvaluationInputs:
        """The subject's held-out noisy latents."""
        key = (subject,)
        if key not in self._inputs:
            self._inputs[key] = subject.inputs(self.sampling, self.seed)
        return self._inputs[key]

    def exact_predictions(self, subject: Subject) -> list[Branches]:
        """What the float model predicts on `inputs`."""
        if subject not in self._exact:
            self._exact[subject] = noise_predictions(subject.model, self.inputs(subject))
        return self._exact[subject]

    def reference_features(self, subject: Subject) -> Features:
        """Features of the held-out images of the subject's data set."""
        if subject.source not in self._references:
            images, _ = held_out_images(subject.source)
            self._references[subject.source] = subject.classifier.extract(images)
        return self._references[subject.source]

    def quantized(
        self, subject: Subject, config: QuantizationConfig, calibration: CalibrationSet | None = None, draw: int = 0
    ) -> nn.Module:
        """A quantized copy of the subject; not cached, because most experiments look at one model once."""
        data = calibration if calibration is not None or not config.needs_calibration else self.calibration(subject)
        return quantize(copy.deepcopy(subject.model), config.replace(seed=self.seed + draw), data)

    def score(
        self,
        subject: Subject,
        config: QuantizationConfig,
        calibration_samples: int | None = None,
        draw: int = 0,
    ) -> dict[str, Any]:
        """Paired fidelity of one quantized model; plain values from the cache if it was scored before.

        Args:
            subject: the model.
            config: how it is quantized.
            calibration_samples: None for those of this laboratory.
            draw: of the rotation's signs; calibration data and judging inputs stay the same.

        Returns:
            eps_sqnr_db: branch ("conditional", "unconditional", "guided 1.5", "guided 4") -> [value, low, high], where
                low and high bound the 95 % interval over trajectories.
            eps_noise_powers: branch -> power of the error of every trajectory, for paired comparisons (`eps_gain`).
            eps_sqnr_db_by_timestep: branch -> values, in the order of `timesteps`.
            timesteps: of the sampler.
            layer_sqnr_db: layer -> output SQNR alone, in dB.
            mean_layer_sqnr_db: mean of these, [value, low, high] as above.
            formats: layer -> {format name: share of the output channels}.
            bits_per_weight: scales and everything else included.
            bits_per_activation: of the layers' inputs, dynamic scales and means included.
            quantize_seconds: without drawing calibration data.
        """
        key = {
            "what": "score",
            "subject": subject.name,
            "config": config.to_json(),
            **self.settings,
            "calibration_samples": calibration_samples or self.calibration_samples,
            "draw": draw,
        }
        return self.cache.numbers(key, lambda: self._score(subject, config, calibration_samples, draw))

    def _score(
        self, subject: Subject, config: QuantizationConfig, calibration_samples: int | None, draw: int
    ) -> dict[str, Any]:
        data = self.calibration(subject, calibration_samples) if config.needs_calibration else None
        start = time.perf_counter()
        model = self.quantized(subject, config, data, draw)
        seconds = time.perf_counter() - start
        inputs, exact = self.inputs(subject), self.exact_predictions(subject)
        noise = prediction_fidelity(exact, noise_predictions(model, inputs), inputs.timesteps, *GUIDANCES)
        layers = layer_powers(subject.model, model, inputs)
        mean = mean_db_interval(layers)
        intervals = {branch: powers.db_interval for branch, powers in noise.branches.items()}
        return {
            "eps_sqnr_db": {branch: [found.value, found.low, found.high] for branch, found in intervals.items()},
            "eps_noise_powers": {b: powers.noise.sum(axis=0).tolist() for b, powers in noise.branches.items()},
            "eps_sqnr_db_by_timestep": {b: list(powers.db_by_timestep) for b, powers in noise.branches.items()},
            "timesteps": list(noise.timesteps),
            "layer_sqnr_db": {name: powers.db for name, powers in layers.items()},
            "mean_layer_sqnr_db": [mean.value, mean.low, mean.high],
            "formats": {name: format_shares(layer) for name, layer in quantized_layers(model).items()},
            "bits_per_weight": bits_per_weight(model),
            "bits_per_activation": bits_per_activation(model, subject.tokens),
            "quantize_seconds": seconds,
        }

    def samples(
        self,
        subject: Subject,
        config: QuantizationConfig | None,
        count: int,
        sampling: SamplingConfig | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Images of the float model (config None) or of a quantized one, classes in turn, from the same noise.

        Returns:
            float32 (count, channels, height, width) in [-1, 1].
        """
        how = sampling or self.sampling
        which = self.seed if seed is None else seed
        key = {
            "what": "samples",
            "subject": subject.name,
            "config": None if config is None else config.to_json(),
            **self.settings,
            "sampled": {"count": count, "steps": how.steps, "guidance": how.guidance, "seed": which},
        }

        def draw() -> dict[str, Tensor]:
            model = subject.model if config is None else self.quantized(subject, config)
            classes = [index % subject.num_classes for index in range(count)]
            images = generate_images(model, subject.scheduler, None, classes, how, which, SAMPLE, IMAGE_BATCH)
            return {"images": images}

        return self.cache.tensors(key, draw)["images"]


#: From the laboratory to a record; the runner fills in `seconds`, `environment` and the shared settings.
Experiment = Callable[[Laboratory], RunRecord]


def eps_gain(score: Mapping[str, Any], reference: Mapping[str, Any], branch: str) -> Interval:
    """By how many dB the noise prediction of `score` is better than that of `reference`, both of one subject.

    The interval is over trajectories, which both models share, so that it is narrower than the models' own intervals.
    """
    powers = [reference["eps_noise_powers"][branch], score["eps_noise_powers"][branch]]
    return bootstrap_interval(np.array(powers).T, lambda rows: decibel(*map(float, rows.sum(axis=0))))


def pooled(draws: Sequence[Mapping[str, Any]], branch: str) -> dict[str, Any]:
    """Scores of several draws as one that `eps_gain` takes: the mean power of the error of every trajectory."""
    return {"eps_noise_powers": {branch: np.mean([score["eps_noise_powers"][branch] for score in draws], axis=0)}}


def format_share(score: Mapping[str, Any], name: str) -> float:
    """Share of the output channels that hold the format `name`, mean over the layers of a score."""
    shares = [float(of_layer.get(name, 0.0)) for of_layer in score["formats"].values()]
    return sum(shares) / len(shares)
