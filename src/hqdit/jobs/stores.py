"""What the long commands keep in a job: calibration data, blocks, batches of images, results in figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hqdit.calibration.capture import CalibrationData
from hqdit.calibration.recording import RecordedCalls, read_calibration
from hqdit.calibration.samples import CalibrationSet
from hqdit.errors import UsageError
from hqdit.jobs.job import Job
from hqdit.pipeline.finished_block import FinishedBlock


class JobBlocks:
    """The quantized blocks of a job, as `pipeline.finished_block.BlockStore`."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def finished(self, block: int) -> FinishedBlock | None:
        """What quantizing the block gave, or None."""
        found = self._job.kept(_block_name(block))
        return None if found is None else FinishedBlock(*found)

    def keep(self, block: int, finished: FinishedBlock) -> None:
        """Keep it. Raises as `jobs.job.Job.keep`."""
        self._job.keep(_block_name(block), dict(finished.layers), finished.tensors)


def _block_name(block: int) -> str:
    return f"block-{block:04d}"


class JobImages:
    """The batches of images of a job, as `sampling.sampler.ImageStore`.

    Args:
        job: where they are kept.
        name: of the set of images, where a job makes several.
    """

    def __init__(self, job: Job, name: str = "images") -> None:
        self._job, self._name = job, name

    def finished(self, batch: int) -> Tensor | None:
        """The images of a batch, float32, or None."""
        found = self._job.kept(f"{self._name}-{batch:06d}")
        return None if found is None else found[1]["images"]

    def keep(self, batch: int, images: Tensor) -> None:
        """Keep them. Raises as `jobs.job.Job.keep`."""
        self._job.keep(f"{self._name}-{batch:06d}", {}, {"images": images})


def figures(job: Job | None, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """The result of `compute`, plain JSON values, from the job if it is finished there; without a job, computed."""
    if job is None:
        return dict(compute())
    found = job.kept(name) or job.keep(name, dict(compute()), {})
    return dict(found[0])


def tensors(job: Job | None, name: str, compute: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """As `figures`, for tensors."""
    if job is None:
        return dict(compute())
    found = job.kept(name) or job.keep(name, {}, compute())
    return found[1]


def calibration(job: Job, draw: Callable[[], CalibrationData]) -> CalibrationData:
    """The job's calibration data, from `draw` if it is not finished there.

    Data that no file can hold are drawn again when the job is resumed, from the same seed.
    """
    path, origin = job.kept_file("calibration"), job.kept("calibration-origin")
    if path is None or origin is None:
        drawn = draw()
        if not isinstance(drawn, (CalibrationSet, RecordedCalls)):
            return drawn
        try:
            path = job.keep_file("calibration", drawn.save)
        except UsageError:  # an argument of a call that is neither a tensor nor a plain value
            return drawn
        origin = job.keep("calibration-origin", drawn.origin, {})
    # Read back in either case, so that a run that was never stopped sees the same data as one that was.
    found = read_calibration(path)
    assert isinstance(found, (CalibrationSet, RecordedCalls))
    return dataclasses.replace(found, origin=str(origin[0]))
