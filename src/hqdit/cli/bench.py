"""`hqdit bench`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hqdit.cli.options import Debug, JsonFile, Quiet, require_count, require_json, running, say, write_json
from hqdit.errors import UsageError

if TYPE_CHECKING:
    import torch

Blocks = Annotated[int, typer.Option("--blocks", help="Blocks of DiT-XL/2; 28 is the whole model.")]
Repeats = Annotated[int, typer.Option("--repeats", help="Repeats of everything that is timed; medians count.")]
BenchThreads = Annotated[int, typer.Option("--threads", help="CPU threads of every contender.")]
Work = Annotated[
    Path | None,
    typer.Option("--work", help="Folder for 10 GB of models; default: temporary.", show_default=False),
]
BenchDevice = Annotated[str, typer.Option("--device", help="cpu, or cuda for the GPU benchmark.")]
Tune = Annotated[bool, typer.Option("--tune", help="With cuda: first measure the tiles of Triton's products.")]


def bench(
    json_file: JsonFile = None,
    blocks: Blocks = 28,
    repeats: Repeats = 7,
    threads: BenchThreads = 2,
    work: Work = None,
    device: BenchDevice = "cpu",
    tune: Tune = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure speed and memory against float32 and, after make bench-peers, against other libraries."""
    for flag, value in (("--blocks", blocks), ("--repeats", repeats), ("--threads", threads)):
        require_count(flag, value)
    require_json(json_file)
    if tune and device == "cpu":
        raise UsageError("--tune: found --device cpu, needed a CUDA device. Fix: --device cuda")
    with running(quiet_mode=quiet, device=device, threads=threads) as options:
        from hqdit.benchmark.suite import run_benchmark
        from hqdit.report.benchmark import benchmark_tables

        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="hqdit-bench-", dir=work) as folder:

            def tell(what: str) -> None:
                if not quiet:
                    typer.echo(f"{time.perf_counter() - start:6.0f} s  {what}", err=True)

            record: dict[str, Any]
            if options.device.type == "cuda":
                record = _run_on_gpu(Path(folder), options.device, repeats, blocks, tune, tell)
            else:
                record = run_benchmark(Path(folder), repeats, threads, blocks, tell)
        record["duration_seconds"] = time.perf_counter() - start
        write_json(json_file, record)
        say(benchmark_tables(record))


def _run_on_gpu(
    work: Path, device: torch.device, repeats: int, blocks: int, tune: bool, tell: Callable[[str], None]
) -> dict[str, Any]:
    from hqdit.benchmark.gpu_products import SHAPES
    from hqdit.benchmark.gpu_suite import run_gpu_benchmark
    from hqdit.kernels.selection import require_backend

    require_backend("triton")
    if tune:
        from hqdit.benchmark.clock import Clock
        from hqdit.benchmark.gpu_tuning import tune as tune_products

        tune_products(SHAPES, Clock(device), tell)
    return run_gpu_benchmark(work, device, repeats, blocks, tell)
