"""Options that several commands share, and the set-up that they ask for."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
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
BackendName = Annotated[
    str | None,
    typer.Option(
        "--backend", help="native, triton, torch or reference; see hqdit doctor for the default.", show_default=False
    ),
]
Threads = Annotated[int | None, typer.Option("--threads", help="CPU threads; default: all cores.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Steps = Annotated[int, typer.Option("--steps", help="Denoising steps.")]
Guidance = Annotated[float, typer.Option("--guidance", help="Classifier-free guidance scale; 1.0 switches it off.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Images at once; changes speed and memory only.")]

#: Bounds that a number typed by mistake runs into at once, instead of into the end of memory.
MAX_COUNT, MAX_THREADS = 1_000_000, 1024


@dataclass(frozen=True)
class RunOptions:
    """Where and how to compute; `backend` is its description for records, `threads` the number of CPU threads."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    threads: int


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
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise UsageError(
            f"--threads: found {threads}, needed a number from 1 to {MAX_THREADS}. Fix: leave it out to use all cores"
        )
    import torch

    from hqdit.integrations.diffusers_logging import silence_diffusers
    from hqdit.kernels.selection import current_backend, default_backend, use_backend
    from hqdit.pipeline.config_checks import KEEP_DTYPES

    if dtype not in KEEP_DTYPES:
        raise UsageError(f"--dtype: found {dtype!r}, needed one of {', '.join(KEEP_DTYPES)}. Fix: pick one of them")
    silence_diffusers()
    with ExitStack() as stack:
        stack.enter_context(quiet(quiet_mode))
        stack.enter_context(use_backend(backend or default_backend()))
        if threads is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(threads)
        yield RunOptions(
            _require_device(device), getattr(torch, dtype), current_backend().description, torch.get_num_threads()
        )


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
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentUnavailable(
            f"--device: found {name!r}, needed a number below {torch.cuda.device_count()}, the devices here. "
            "Fix: --device cuda:0"
        )
    return device


def require_count(flag: str, value: int, at_least: int = 1) -> None:
    """Raise `UsageError` unless `value` is from `at_least` to `MAX_COUNT`."""
    if not at_least <= value <= MAX_COUNT:
        fix = "raise" if value < at_least else "lower"
        raise UsageError(f"{flag}: found {value}, needed a number from {at_least} to {MAX_COUNT:,}. Fix: {fix} it")


def require_json(path: Path | None, out: Path | None = None, *sources: Path) -> None:
    """Raise `UsageError` unless `path` can become a file without damage to a source.

    Args:
        path: value of --json; None is fine.
        out: value of --out, which has to be another path.
        sources: what is read; a new file inside such a folder is fine, an existing one is not.
    """
    if path is None:
        return
    target = path.expanduser().resolve()
    parent = next(folder for folder in target.parents if folder.exists())
    if target.exists() and not target.is_file():
        found = "which is no regular file"
    elif not parent.is_dir():
        found = f"below the file {parent}"
    elif out is not None and target == out.expanduser().resolve():
        found = "which is --out as well"
    elif target.exists() and any(source.resolve() in (target, *target.parents) for source in sources):
        found = "which belongs to what is read"
    else:
        return
    raise UsageError(f"--json: found {path}, {found}, needed a file of its own. Fix: choose another --json")


def finite_json(value: Any) -> Any:
    """`value` with infinities and NaN, which JSON lacks, as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_json(item) for item in value]
    return value


@contextmanager
def discarded_on_error(out: Path) -> Iterator[None]:
    """Remove `out`, which has just been written, if the body fails, so that no error leaves anything at --out."""
    try:
        yield
    except BaseException:
        shutil.rmtree(out.expanduser(), ignore_errors=True)
        raise


def printable(text: str) -> str:
    """`text` with control characters other than line ends escaped, so that a name in a file cannot drive a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def say(text: str) -> None:
    """Print a line of a command's result on standard output, if there is still somebody who reads it."""
    try:
        typer.echo(printable(text))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
