"""The calibration data that `hqdit quantize` draws: from the model's own sampler, or from its pipeline and prompts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqdit.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

    from hqdit.calibration.capture import CalibrationData
    from hqdit.models.source import ModelFolder

DEFAULT_STEPS, DEFAULT_GUIDANCE = 50, 1.5


@dataclass(frozen=True)
class CalibrationRequest:
    """What the command line says of it.

    Attributes:
        prompts: a text file, for models that are conditioned on text.
        samples: how many to keep; None for the default of the kind.
        steps: denoising steps; None for 50, or for the pipeline's own default.
        guidance: likewise; None for 1.5.
        seed: of everything random.
    """

    prompts: Path | None
    samples: int | None
    steps: int | None
    guidance: float | None
    seed: int

    def require_fits(self, model: nn.Module, folder: ModelFolder) -> None:
        """Find what cannot work before any work begins.

        Raises:
            UsageError: prompts for a model on classes, none for another, or steps or guidance that do not fit.
        """
        from hqdit.models.adapter import ClassConditionalAdapter, adapter_for
        from hqdit.models.source import load_scheduler
        from hqdit.sampling.sampler import require_guidance, require_steps

        sampling = self._sampling()  # refuses numbers that no sampler takes
        name = type(model).__name__
        if not isinstance(adapter_for(model), ClassConditionalAdapter):
            if self.prompts is None or not folder.is_pipeline:
                raise UsageError(
                    f"--prompts: found {self.prompts} for a {name} in {folder.root}, needed prompts and a pipeline "
                    "folder to calibrate in. Fix: add --prompts FILE, or --calibration FILE, or --no-gptq for a data-"
                    "free request"
                )
            _read_prompts(self.prompts)
            return
        if self.prompts is not None:
            raise UsageError(
                f"--prompts: found {self.prompts} for a {name}, which takes classes, needed no prompts. "
                "Fix: leave --prompts out"
            )
        require_steps(load_scheduler(folder), sampling.steps)
        require_guidance(model, sampling.guidance)

    @property
    def description(self) -> dict[str, Any]:
        """Everything that the data depend on, as plain values, besides the model."""
        from hqdit.pipeline.manifest import sha256_of

        prompts = None if self.prompts is None else sha256_of(self.prompts.expanduser())
        return {**asdict(self), "prompts": prompts}

    def draw(self, model: nn.Module, folder: ModelFolder) -> CalibrationData:
        """The data, for a model that `require_fits` has accepted."""
        from hqdit.calibration.recording import DEFAULT_CALLS, RecordedCalls
        from hqdit.calibration.samples import DEFAULT_SAMPLES, CalibrationSet
        from hqdit.models.source import load_scheduler

        if self.prompts is None:
            samples = self.samples or DEFAULT_SAMPLES
            return CalibrationSet.from_sampler(model, load_scheduler(folder), samples, self._sampling(), self.seed)
        import torch

        from hqdit.integrations.diffusers_logging import silence_transformers
        from hqdit.integrations.load_pipeline import pipeline_around

        silence_transformers()
        device = next(model.parameters()).device
        pipeline = pipeline_around(model, folder, torch.float32, device)
        pipeline.set_progress_bar_config(disable=True)
        settings: dict[str, Any] = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        asked = {key: value for key, value in settings.items() if value is not None}
        # Latents are all that is wanted: nothing needs to be decoded.
        inputs = [{"prompt": prompt, "output_type": "latent", **asked} for prompt in _read_prompts(self.prompts)]
        return RecordedCalls.from_pipeline(pipeline, inputs, self.samples or DEFAULT_CALLS, self.seed)

    def _sampling(self) -> Any:
        from hqdit.sampling.sampler import SamplingConfig

        steps = DEFAULT_STEPS if self.steps is None else self.steps
        return SamplingConfig(steps, DEFAULT_GUIDANCE if self.guidance is None else self.guidance)


def _read_prompts(path: Path) -> list[str]:
    from hqdit.pipeline.manifest import require_regular

    try:
        require_regular(path.expanduser())
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UsageError(
            f"--prompts: found {path}, which cannot be read ({reason}), needed a text file with a prompt a line. "
            "Fix: check the path"
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts: found no line with text in {path}, needed at least one. Fix: add a prompt")
    return prompts
