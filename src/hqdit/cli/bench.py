"""`hqdit bench`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from hqdit.cli.options import Debug, JsonFile, Quiet, require_count, require_json, running, say, write_json

Blocks = Annotated[int, typer.Option("--blocks", help="Blocks of DiT-XL/2; 28 is the whole model.")]
Repeats = Annotated[int, typer.Option("--repeats", help="Repeats of everything that is timed; medians count.")]
BenchThreads = Annotated[int, typer.Option("--threads", help="CPU threads of every contender.")]
Work = Annotated[
    Path | None,
    typer.Option("--work", help="Folder for 10 GB of models; default: temporary.", show_default=False),
]


def bench(
    json_file: JsonFile = None,
    blocks: Blocks = 28,
    repeats: Repeats = 7,
    threads: BenchThreads = 2,
    work: Work = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure speed and memory against float32 and, after make bench-peers, against other libraries."""
    for flag, value in (("--blocks", blocks), ("--repeats", repeats), ("--threads", threads)):
        require_count(flag, value)
    require_json(json_file)
    with running(quiet_mode=quiet, threads=threads):
        from hqdit.benchmark.suite import run_benchmark
        from hqdit.report.benchmark import benchmark_tables

        start = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="hqdit-bench-", dir=work) as folder:

            def tell(what: str) -> None:
                if not quiet:
                    typer.echo(f"{time.perf_counter() - start:6.0f} s  {what}", err=True)

            record: dict[str, Any] = run_benchmark(Path(folder), repeats, threads, blocks, tell)
        record["duration_seconds"] = time.perf_counter() - start
        write_json(json_file, record)
        say(benchmark_tables(record))
