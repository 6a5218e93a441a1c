"""Calibration data: tuples (x_t, t, class) that the model will meet when it samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqdit.errors import CheckpointError, NumericsError, UsageError
from hqdit.models.adapter import class_conditional_adapter
from hqdit.models.calls import ModelCall
from hqdit.models.weights import read_safetensors, write_safetensors
from hqdit.randomness import random_stream
from hqdit.sampling.noise import CALIBRATION, starting_noise
from hqdit.sampling.sampler import BATCH_SIZE, SamplingConfig, sample_latents

DEFAULT_SAMPLES = 512
#: Trajectories are run until there are enough tuples, and at least this many, so that several classes are seen.
MIN_TRAJECTORIES = 16
#: Samples that pass through a model at once.
CALL_SIZE = 64

_FIELDS = ("latents", "timesteps", "classes")


@dataclass(frozen=True)
class CalibrationSet:
    """Model inputs for calibration.

    Attributes:
        latents: float32 (n, channels, height, width), noisy latents x_t.
        timesteps: int64 (n,), the time step of each.
        classes: int64 (n,), the class of each; the null class for the unconditional branch.
        origin: where the data came from, for the record.

    Raises:
        NumericsError: empty, unequal lengths, other dtypes, or NaN; the message names the field and the first sample.
    """

    latents: Tensor
    timesteps: Tensor
    classes: Tensor
    origin: str = "given"

    def __post_init__(self) -> None:
        shapes = {name: tuple(getattr(self, name).shape) for name in _FIELDS}
        dimensions = [len(shape) for shape in shapes.values()]
        if dimensions != [4, 1, 1] or len({shape[0] for shape in shapes.values()}) != 1:
            raise NumericsError(
                f"calibration ({self.origin}): found shapes {shapes}, needed latents (n, channels, height, width) with "
                "timesteps (n,) and classes (n,). Fix: give all three fields one entry per sample"
            )
        if len(self) == 0:
            raise NumericsError(
                f"calibration ({self.origin}): found no samples, needed at least 1. Fix: raise --calibration-samples"
            )
        if (
            self.latents.dtype != torch.float32
            or self.timesteps.is_floating_point()
            or self.classes.is_floating_point()
        ):
            dtypes = {name: str(getattr(self, name).dtype) for name in _FIELDS}
            raise NumericsError(
                f"calibration ({self.origin}): found dtypes {dtypes}, needed float32 latents and integer "
                "timesteps and classes. Fix: convert the fields"
            )
        is_bad = ~torch.isfinite(self.latents).flatten(1).all(dim=1)
        if bool(is_bad.any()):
            raise NumericsError(
                f"calibration ({self.origin}): latents of {int(is_bad.sum())} samples hold NaN or infinity (first: "
                f"sample {int(is_bad.nonzero()[0])}), needed finite numbers. Fix: remove these samples"
            )

    def __len__(self) -> int:
        return self.latents.shape[0]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the contents, for the record."""
        digest = hashlib.sha256()
        for name in _FIELDS:
            digest.update(getattr(self, name).contiguous().cpu().numpy().tobytes())
        return digest.hexdigest()

    def calls(self, model: nn.Module) -> Iterator[ModelCall]:
        """The samples as calls of `model`, `CALL_SIZE` at a time."""
        adapter = class_conditional_adapter(model)
        for start in range(0, len(self), CALL_SIZE):
            rows = slice(start, start + CALL_SIZE)
            yield adapter.call(model, self.latents[rows], self.timesteps[rows], self.classes[rows])

    def require_fits(self, model: nn.Module) -> None:
        """Check shapes, time steps and classes against `model`.

        Raises:
            NumericsError: the first mismatch, with field and sample.
        """
        adapter = class_conditional_adapter(model)
        shape = adapter.latent_shape(model)
        if tuple(self.latents.shape[1:]) != tuple(shape):
            raise NumericsError(
                f"calibration ({self.origin}): found latents of shape {tuple(self.latents.shape[1:])}, needed {shape} "
                "for this model. Fix: use data from the same model"
            )
        top = adapter.num_classes(model) if adapter.null_class(model) is not None else adapter.num_classes(model) - 1
        last_step = adapter.train_timesteps(model) - 1
        for name, values, last in (("classes", self.classes, top), ("timesteps", self.timesteps, last_step)):
            is_bad = (values < 0) | (values > last)
            if bool(is_bad.any()):
                first = int(is_bad.nonzero()[0])
                raise NumericsError(
                    f"calibration ({self.origin}): {name} of sample {first} is {int(values[first])}, needed "
                    f"0 to {last}. Fix: remove or correct the sample"
                )

    @classmethod
    def from_sampler(
        cls,
        model: nn.Module,
        scheduler: Any,
        samples: int = DEFAULT_SAMPLES,
        sampling: SamplingConfig | None = None,
        seed: int = 0,
    ) -> CalibrationSet:
        """Tuples from the model's own trajectories, over all time steps and both guidance branches.

        Whole trajectories are run with classes in a seeded order; `samples` of their tuples are kept, a seeded choice
        without replacement.

        Args:
            model: the float model.
            scheduler: a deterministic diffusers scheduler.
            samples: how many tuples, at least 1.
            sampling: steps and guidance that will be used later.
            seed: of noise, classes and choice; the noise is disjoint from that of sampling and evaluation.

        Raises:
            UsageError: fewer than one sample, or sampling options out of range.
        """
        if samples < 1:
            raise UsageError(f"--calibration-samples: found {samples}, needed at least 1. Fix: 512 is the default")
        sampling = sampling or SamplingConfig()
        adapter = class_conditional_adapter(model)
        null_class = adapter.null_class(model)
        branches = 1 if sampling.guidance == 1.0 or null_class is None else 2
        trajectories = max(MIN_TRAJECTORIES, -(-samples // (sampling.steps * branches)))
        stream = random_stream(seed, "calibration")
        repeats = -(-trajectories // adapter.num_classes(model))
        labels = [int(c) for _ in range(repeats) for c in stream.permutation(adapter.num_classes(model))][:trajectories]
        device = next(model.parameters()).device
        seen: list[tuple[Tensor, int, Tensor]] = []
        for start in range(0, trajectories, BATCH_SIZE):
            indices = range(start, min(start + BATCH_SIZE, trajectories))
            classes = torch.tensor(labels[start : indices.stop])
            noise = starting_noise(seed, CALIBRATION, indices, adapter.latent_shape(model)).to(device)

            def keep(_step: int, timestep: int, latents: Tensor, classes: Tensor = classes) -> None:
                seen.append((latents.cpu(), timestep, classes))
                if branches == 2 and null_class is not None:
                    seen.append((latents.cpu(), timestep, torch.full_like(classes, null_class)))

            what = "calibration trajectories"
            sample_latents(model, scheduler, noise, classes.to(device), sampling, keep, what=what)
        latents = torch.cat([entry[0] for entry in seen])
        timesteps = torch.cat([torch.full_like(entry[2], entry[1]) for entry in seen])
        labels_seen = torch.cat([entry[2] for entry in seen])
        chosen = torch.from_numpy(stream.permutation(len(latents))[:samples].copy())
        origin = (
            f"sampler: {trajectories} trajectories, {sampling.steps} steps, guidance {sampling.guidance}, seed {seed}"
        )
        return cls(latents[chosen], timesteps[chosen], labels_seen[chosen], origin)

    @classmethod
    def from_file(cls, path: str | Path) -> CalibrationSet:
        """Read the fields `latents`, `timesteps` and `classes` of a safetensors file.

        Raises:
            CheckpointError: missing or broken file, or missing fields.
            NumericsError: empty or non-finite contents.
        """
        tensors = read_safetensors(Path(path))
        missing = [name for name in _FIELDS if name not in tensors]
        if missing:
            raise CheckpointError(
                f"{path}: found {len(tensors)} tensors (first: {', '.join(sorted(tensors)[:3])}), needed "
                f"{', '.join(_FIELDS)} (missing: {', '.join(missing)}). Fix: write them with CalibrationSet.save"
            )
        latents = tensors["latents"]
        latents = latents.to(torch.float32) if latents.is_floating_point() else latents
        fields = [tensors[n] if tensors[n].is_floating_point() else tensors[n].to(torch.int64) for n in _FIELDS[1:]]
        return cls(latents, fields[0], fields[1], origin=Path(path).name)

    def save(self, path: str | Path) -> None:
        """Write a file that `from_file` reads."""
        write_safetensors({name: getattr(self, name).contiguous() for name in _FIELDS}, Path(path))
