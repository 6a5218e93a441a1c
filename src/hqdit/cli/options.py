"""Options that several commands share, and the set-up that they ask for."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hqdit.errors import EnvironmentUnavailable, UsageError
from hqdit.progress import quiet

if TYPE_CHECKING:
    import torch

Out = Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist.", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what lies at --out.")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the result to this JSON file.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars and no summary.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16 for the unquantized rest.")]
BackendName = Annotated[str, typer.Option("--backend", help="torch or reference; see hqdit doctor.")]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads; default: all cores.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Steps = Annotated[int, typer.Option("--steps", help="Denoising steps.")]
Guidance = Annotated[float, typer.Option("--guidance", help="Classifier-free guidance scale; 1.0 switches it off.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Images at once; changes speed and memory only.")]

DTYPE_NAMES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class RunOptions:
    """Where and how to compute."""

    device: torch.device
    dtype: torch.dtype


@contextmanager
def running(
    *,
    quiet_mode: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    backend: str | None = None,
    threads: int | None = None,
    seed: int = 0,
) -> Iterator[RunOptions]:
    """Check the shared options and set them up for the body.

    Raises:
        UsageError: a value out of range.
        EnvironmentUnavailable: a device or backend that is not here.
    """
    if seed < 0:
        raise UsageError(f"--seed: found {seed}, needed at least 0. Fix: 0 is the default")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads: found {threads}, needed at least 1. Fix: leave it out to use all cores")
    if dtype not in DTYPE_NAMES:
        raise UsageError(f"--dtype: found {dtype!r}, needed one of {', '.join(DTYPE_NAMES)}. Fix: pick one of them")
    import torch

    from hqdit.integrations.diffusers_logging import silence_diffusers
    from hqdit.kernels.backend import use_backend

    silence_diffusers()
    with ExitStack() as stack:
        stack.enter_context(quiet(quiet_mode))
        if backend is not None:
            stack.enter_context(use_backend(backend))
        if threads is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        yield RunOptions(_require_device(device), getattr(torch, dtype))


def _require_device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device: found {name!r}, needed cpu, cuda or cuda:N. Fix: --device cpu") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: found {name!r}, needed cpu, cuda or cuda:N. Fix: --device cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentUnavailable(
            f"--device: found {name!r}, but torch {torch.__version__} sees no CUDA device. Fix: --device cpu"
        )
    return device


def parse_classes(text: str) -> list[int]:
    """The numbers of a comma-separated list.

    Raises:
        UsageError: empty, or an entry that is no number.
    """
    parts = [part.strip() for part in text.split(",")]
    try:
        return [int(part) for part in parts]
    except ValueError as error:
        raise UsageError(
            f"--classes: found {text!r}, needed comma-separated numbers. Fix: for example --classes 0,1,2"
        ) from error


def require_count(flag: str, value: int) -> None:
    """Raise `UsageError` unless `value` is at least 1."""
    if value < 1:
        raise UsageError(f"{flag}: found {value}, needed at least 1. Fix: raise it")


def finite_json(value: Any) -> Any:
    """`value` with infinities and NaN, which JSON lacks, as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(item) for item in value]
    return value


def write_json(path: Path | None, result: dict[str, Any]) -> None:
    """Write `result` to the file of `--json`, if one was asked for."""
    if path is not None:
        from hqdit.pipeline.publish import publish_text

        publish_text(path, json.dumps(finite_json(result), indent=2) + "\n")


def decibels(value: float | None) -> str:
    """A dB figure for people."""
    if value is None:
        return "-"
    return "exact" if value == math.inf else f"{value:.2f} dB"
