"""The estimate that the long commands print before they begin, and the early refusal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hqdit.cli.options import say

if TYPE_CHECKING:
    import torch

    from hqdit.pipeline.resources import Estimate

IgnoreEstimate = Annotated[
    bool, typer.Option("--ignore-estimate", help="Begin even if memory or disk will probably not suffice.")
]


def announce(
    estimate: Estimate, out: Path, *, device: torch.device | None, is_ignored: bool, is_quiet: bool, fix: str = ""
) -> None:
    """Print an estimate beside what there is, and refuse work that clearly does not fit.

    Args:
        estimate: of the work, from nothing.
        out: the output; what its job has finished counts as written already.
        device: where the work is done; the memory of others than the CPU is not looked at.
        is_ignored: value of --ignore-estimate.
        is_quiet: value of --quiet.
        fix: how to make it fit, besides more memory or disk.

    Raises:
        ResourceError: clearly too little memory or disk.
    """
    import dataclasses

    from hqdit.jobs.job import job_folder
    from hqdit.pipeline.resources import available, describe, require_resources

    if device is not None and device.type != "cpu":
        estimate = dataclasses.replace(estimate, memory_bytes=None)
    finished = sum(path.lstat().st_size for path in job_folder(out).rglob("*"))
    estimate = dataclasses.replace(estimate, disk_bytes=max(0, estimate.disk_bytes - finished))
    there = available(out.expanduser().resolve())
    if not is_quiet:
        say(describe(estimate, there))
    if not is_ignored:
        remedies = [f"free some, {fix}" if fix else "free some", "or --ignore-estimate to begin all the same"]
        require_resources(estimate, there, ", ".join(remedies), out)
