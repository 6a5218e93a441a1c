"""`hqdit report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hqdit.cli.options import Debug, Overwrite, Quiet, say
from hqdit.errors import UsageError

SUFFIX = ".html"


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or folders of such folders.")],
    out: Annotated[Path, typer.Option("--out", help="HTML file to write.")] = Path("report.html"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Draw records of hqdit reproduce and hqdit analyze again, as one HTML page that needs nothing else."""
    from hqdit.pipeline.publish import publish_text
    from hqdit.records.run_record_reader import read_run_records
    from hqdit.report.page import render_report

    require_page(out, overwrite)
    records = [entry for run in runs for entry in read_run_records(run.expanduser())]
    publish_text(out, render_report(records))
    if not quiet:
        titles = ", ".join(record.title for _, record in records)
        say(f"{out}: the report of {len(records)} run{'s' if len(records) > 1 else ''} ({titles})")


def require_page(out: Path, overwrite: bool) -> None:
    """Raise `UsageError` unless a page can be written to `out` without damage to anything else."""
    target = out.expanduser()
    if target.suffix.lower() != SUFFIX:  # so that no record and no picture can be overwritten by mistake
        raise UsageError(f"--out: found {out}, needed a name that ends in {SUFFIX}. Fix: for example report{SUFFIX}")
    if target.is_dir():
        raise UsageError(
            f"--out: found {out}, which is a folder, needed a file. Fix: for example {out / 'report.html'}"
        )
    if target.exists() and not overwrite:
        raise UsageError(f"--out: found {out}, which exists, needed a new path. Fix: choose another one or --overwrite")
    parent = next(path for path in target.resolve().parents if path.exists())
    if not parent.is_dir():
        raise UsageError(f"--out: found {out} below the file {parent}, needed a folder. Fix: choose another --out")
