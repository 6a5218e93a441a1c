"""`hqdit reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hqdit.cli.options import BackendName, Debug, Quiet, Seed, Threads, running, say
from hqdit.errors import UsageError

if TYPE_CHECKING:
    from hqdit.records.run_record import RunRecord

ALL = "all"
#: A bound that a number typed by mistake runs into.
MAX_JOBS = 64


def reproduce(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Experiments; all is the nine of the paper, without plus.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; a run that was cut off goes on there.")],
    quick: Annotated[bool, typer.Option("--quick", help="Fewer samples and steps: minutes, not an hour.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The whole grid of table-w4a4: hours.")] = False,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", help="Processes side by side; default: one per thread, at most 8.", show_default=False),
    ] = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    backend: BackendName = None,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Repeat experiments of the paper and its open questions on the bundled models, and write a report."""
    if quick and full:
        raise UsageError("--quick, --full: found both, needed at most one. Fix: leave one out")
    if jobs is not None and not 1 <= jobs <= MAX_JOBS:
        raise UsageError(f"--jobs: found {jobs}, needed a number from 1 to {MAX_JOBS}. Fix: leave it out")
    with running(quiet_mode=quiet, device="cpu", backend=backend, threads=threads, seed=seed):
        from hqdit.experiments.runner import EXPERIMENTS, run_experiments
        from hqdit.pipeline.publish import publish_text
        from hqdit.report.page import render_report

        of_the_paper = [name for name, entry in EXPERIMENTS.items() if entry.is_of_the_paper]
        chosen = list(dict.fromkeys(part for name in names for part in (of_the_paper if name == ALL else [name])))
        for name in chosen:
            if name not in EXPERIMENTS:
                raise UsageError(
                    f"NAME: found {name!r}, needed {ALL} or some of {', '.join(EXPERIMENTS)}. Fix: pick such a name"
                )
        target = out.expanduser()
        if target.exists() and not target.is_dir():
            raise UsageError(f"--out: found {out}, which is a file, needed a folder. Fix: choose another --out")

        def tell(text: str) -> None:
            if not quiet:
                say(text)

        # Read before hours of work: a record that cannot be drawn is found now.
        earlier = _earlier_records(target, chosen)
        records = run_experiments(chosen, target, seed=seed, is_quick=quick, is_full=full, jobs=jobs, tell=tell)
        order = {name: place for place, name in enumerate(EXPERIMENTS)}
        shown = sorted([*earlier, *records], key=lambda entry: (order.get(entry[0].name, len(order)), entry[0].name))
        publish_text(target / "report.html", render_report(shown))
        if not quiet:
            for _, record in records:
                say(f"\n{record.title}")
                for answer in record.answers:
                    say(f"  {answer}")
            say(f"\n{out / 'report.html'}: the report; records and pictures are beside it")


def _earlier_records(out: Path, chosen: list[str]) -> list[tuple[Path, RunRecord]]:
    """The records in folders below `out` that this run will not write."""
    from hqdit.records.run_record import RECORD_NAME
    from hqdit.records.run_record_reader import read_run_records

    folders = sorted(file.parent for file in out.glob(f"*/{RECORD_NAME}"))
    return [entry for folder in folders if folder.name not in chosen for entry in read_run_records(folder)]
