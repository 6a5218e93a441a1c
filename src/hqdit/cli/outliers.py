"""`hqdit inject-outliers`."""

from __future__ import annotations

from typing import Annotated

import typer

from hqdit.cli.options import Debug, JsonFile, Out, Overwrite, Quiet, Seed, require_json, running, say, write_json


def inject_outliers(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Float model.")],
    out: Out,
    factor: Annotated[float, typer.Option(help="How much larger the chosen channels become.")] = 10.0,
    share: Annotated[float, typer.Option(help="Fraction of the channels.")] = 0.05,
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
    seed: Seed = 0,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write a stress variant: activation outliers without a change of the float function."""
    with running(quiet_mode=quiet, seed=seed):
        from hqdit.models.outliers import inject_outliers as inject
        from hqdit.models.source import find_model, load_float_transformer
        from hqdit.pipeline.checkpoint import save
        from hqdit.pipeline.publish import require_free

        folder = find_model(source)
        require_free(out, overwrite, folder.root)
        require_json(json_file, out, folder.root)
        save(inject(load_float_transformer(folder), factor, share, seed), out, folder, overwrite)
        write_json(json_file, {"source": source, "factor": factor, "share": share, "seed": seed})
        if not quiet:
            say(f"{out}: stress variant of {source}, {share:.0%} of the modulated channels times {factor:g}")
