"""`hqdit convert`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from hqdit.cli.estimate import IgnoreEstimate, announce
from hqdit.cli.options import (
    Debug,
    JsonFile,
    Out,
    Overwrite,
    Quiet,
    discarded_on_error,
    require_count,
    require_json,
    running,
    say,
    write_json,
)


def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="FILE", help="Checkpoint of the original DiT (.pt).")],
    out: Out,
    vae: Annotated[Path | None, typer.Option("--vae", help="AutoencoderKL folder to copy into the pipeline.")] = None,
    class_names: Annotated[
        Path | None, typer.Option("--class-names", help="Names of the classes: a line each, or JSON.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="ema or model, of a training checkpoint; default: ema where there is one.")
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads, for widths of no published model.")] = None,
    overwrite: Overwrite = False,
    ignore_estimate: IgnoreEstimate = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Convert a checkpoint of the original DiT to a diffusers pipeline folder."""
    if heads is not None:
        require_count("--heads", heads)
    with running(quiet_mode=quiet):
        from hqdit.models.original_dit import AUTOENCODER_REDUCTION
        from hqdit.pipeline.estimate import convert_estimate
        from hqdit.pipeline.original_checkpoint import convert_original
        from hqdit.pipeline.publish import require_free

        existed = out.expanduser().exists()
        sources = [path for path in (checkpoint, vae, class_names) if path is not None]
        require_free(out, overwrite, *sources)
        require_json(json_file, out, *sources)
        announce(
            convert_estimate(checkpoint.expanduser(), vae and vae.expanduser()),
            out,
            device=None,
            is_ignored=ignore_estimate,
            is_quiet=quiet,
        )
        done = convert_original(
            checkpoint.expanduser(),
            out,
            weights=weights,
            heads=heads,
            vae=vae and vae.expanduser(),
            class_names=class_names and class_names.expanduser(),
            overwrite=overwrite,
        )
        sizes = done.sizes
        result = {
            "source": str(checkpoint),
            "model": sizes.name,
            "weights": done.weights,
            "parameters": done.parameters,
            "blocks": sizes.blocks,
            "width": sizes.width,
            "heads": sizes.heads,
            "patch_size": sizes.patch_size,
            "in_channels": sizes.in_channels,
            "out_channels": sizes.out_channels,
            "sample_size": sizes.sample_size,
            "classes": sizes.classes,
            "vae": done.has_vae,
            "class_names": done.has_class_names,
        }
        # What was replaced is gone already: then the new folder, which is whole, is worth keeping.
        with nullcontext() if existed else discarded_on_error(out):
            write_json(json_file, result)
        if not quiet:
            pixels = sizes.sample_size * AUTOENCODER_REDUCTION
            say(
                f"{out}: {sizes.name}, {done.parameters / 1e6:.1f} M parameters, latents of {sizes.sample_size} x "
                f"{sizes.sample_size} ({pixels} x {pixels} pixels), {sizes.classes} classes"
                + (f", weights: {done.weights}" if done.weights else "")
            )
            if not done.has_vae:
                say("no autoencoder: --vae FOLDER puts one beside it, which images need")
