"""The models that experiments are about: the bundled ones, and the same functions with activation outliers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from torch import nn

from hqdit.calibration.samples import CalibrationSet
from hqdit.evaluation.fidelity import EvaluationInputs, evaluation_inputs
from hqdit.evaluation.surrogate import SurrogateClassifier
from hqdit.models.adapter import class_conditional_adapter
from hqdit.models.outliers import inject_outliers
from hqdit.models.source import ModelFolder, find_model, load_float_transformer, load_scheduler
from hqdit.sampling.sampler import SamplingConfig


@dataclass(frozen=True)
class Subject:
    """One model, loaded when it is first looked at.

    Attributes:
        source: bundled name, "digits" or "shapes".
        outlier_factor: c of `inject_outliers`; 1.0 leaves the model as it was trained.
    """

    source: str
    outlier_factor: float = 1.0

    def __reduce__(self) -> tuple[Any, ...]:
        # Without what was loaded; a process that gets it several times loads it once.
        return _known, (type(self), self.source, self.outlier_factor)

    @property
    def name(self) -> str:
        """For tables: "digits" or "digits, c = 10"."""
        return self.source if self.outlier_factor == 1 else f"{self.source}, c = {self.outlier_factor:g}"

    @cached_property
    def folder(self) -> ModelFolder:
        """Where the float model lies."""
        return find_model(self.source)

    @cached_property
    def model(self) -> nn.Module:
        """The float32 model; copy it before quantizing."""
        return inject_outliers(load_float_transformer(self.folder), self.outlier_factor)

    @cached_property
    def scheduler(self) -> Any:
        """The scheduler that the model samples with."""
        return load_scheduler(self.folder)

    @cached_property
    def classifier(self) -> SurrogateClassifier:
        """The classifier trained on the same data."""
        return SurrogateClassifier.load(self.source)

    @property
    def num_classes(self) -> int:
        """Classes, without the null class."""
        return class_conditional_adapter(self.model).num_classes(self.model)

    @property
    def tokens(self) -> int:
        """Tokens of a sample."""
        config: Any = self.model.config
        tokens: int = (config.sample_size // config.patch_size) ** 2
        return tokens

    def calibration(self, samples: int, sampling: SamplingConfig, seed: int) -> CalibrationSet:
        """Tuples from the model's own sampler."""
        return CalibrationSet.from_sampler(self.model, self.scheduler, samples, sampling, seed)

    def inputs(self, sampling: SamplingConfig, seed: int) -> EvaluationInputs:
        """Held-out noisy latents at every step of the sampler."""
        return evaluation_inputs(self.model, self.scheduler, sampling, seed)


@cache
def _known(kind: type[Subject], source: str, outlier_factor: float) -> Subject:
    return kind(source, outlier_factor)


SUBJECTS = tuple(Subject(source, factor) for factor in (1.0, 10.0) for source in ("digits", "shapes"))
