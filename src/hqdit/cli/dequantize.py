"""`hqdit dequantize`."""

from __future__ import annotations

from typing import Annotated

import typer

from hqdit.cli.options import Debug, JsonFile, Out, Overwrite, Quiet, require_json, running, say, write_json


def dequantize(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="Quantized model or pipeline folder.")],
    out: Out,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; what a class keeps in float32 stays.")
    ] = "float32",
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write the float model that a quantized one stands for, for tools that know nothing of hqdit."""
    with running(quiet_mode=quiet, dtype=dtype) as options:
        from hqdit.models.precision import to_dtype
        from hqdit.models.source import find_model
        from hqdit.pipeline.checkpoint import load_folder, quantized_layers, save
        from hqdit.pipeline.dequantize import dequantize as dequantize_model
        from hqdit.pipeline.publish import require_free

        folder = find_model(source)
        require_free(out, overwrite, folder.root)
        require_json(json_file, out, folder.root)
        model = load_folder(folder)
        layers = len(quantized_layers(model))
        save(to_dtype(dequantize_model(model), options.dtype, "cpu"), out, folder, overwrite)
        write_json(json_file, {"source": source, "layers": layers, "dtype": dtype})
        if not quiet:
            say(f"{out}: {source} with {layers} layers back in {dtype}; what rounding took is not in it")
