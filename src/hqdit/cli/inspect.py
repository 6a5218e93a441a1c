"""`hqdit inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hqdit.cli.options import Debug, JsonFile, Quiet, require_json, running, say, write_json

HEADER = (
    "layer",
    "formats",
    "input",
    "statistic",
    "granularity",
    "rotation",
    "smoothing",
    "rank",
    "method",
    "damping",
    "bits",
)


def inspect(
    model: Annotated[str, typer.Argument(metavar="DST", help="Folder that hqdit quantize wrote.")],
    json_file: JsonFile = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Show what a quantized checkpoint holds, layer by layer."""
    with running(quiet_mode=quiet):
        from hqdit.analysis.inspection import inspect_checkpoint
        from hqdit.models.source import find_model

        require_json(json_file, None, find_model(model).root)
        result = inspect_checkpoint(model)
        write_json(json_file, result)
        if quiet:
            return
        rows = [HEADER, *(_row(name, facts) for name, facts in result["layers"].items())]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADER))]
        for row in rows:
            say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        print_sizes(Path(model), result)


def _row(name: str, facts: dict[str, Any]) -> tuple[str, ...]:
    statistic = facts.get("statistic")
    damping = facts.get("damp_fraction")
    return (
        name,
        "/".join(map(_short, facts["formats"])),
        _short(facts["activation"]),
        "infinite" if statistic is None else f"{statistic:.1f}",
        f"{_granularity(facts, 'weight')} x {_granularity(facts, 'activation')}",
        facts["rotation"],
        facts["smoothing"],
        str(facts["low_rank"]) if facts["low_rank"] else "-",
        facts["method"],
        "-" if damping is None else f"{damping:g}",
        f"{facts['bits_per_weight']:.3f}",
    )


def _short(name: str) -> str:
    """A format's name, or that of the codebook whose 16 numbers it lists."""
    from hqdit.formats.catalog import format_from_json

    return "lloyd-max" if name == format_from_json("lloyd-max").name else name


def _granularity(facts: dict[str, Any], side: str) -> str:
    """Of the weight or the activation, with the format of its scales where that is not float32."""
    granularity, scale_format = facts[f"{side}_granularity"], facts[f"{side}_scale_format"]
    return str(granularity) if scale_format == "float32" else f"{granularity} {scale_format}"


def print_sizes(path: Path, result: dict[str, Any]) -> None:
    """The totals of a checkpoint, for people."""
    layers = result["layers"].values()
    floats = sum(facts["arithmetic"] != "int8" for facts in layers)
    kept = sum(facts.get("rows_kept_nearest", 0) for facts in layers)
    dead = sum(facts.get("dead_channels", 0) for facts in layers)
    zero = sum(facts.get("zero_output_channels", 0) for facts in layers)
    say(
        f"{path}: {len(layers)} quantized layers, {result['bits_per_weight']:.3f} bits per quantized weight (scales "
        f"included), {result['bits_per_parameter']:.2f} bits per parameter, {result['file_bytes']:,} bytes, "
        f"{result['file_ratio']:.2f} times smaller than float32"
    )
    say(
        f"output channels kept at round-to-nearest: {kept}; dead input channels: {dead}; all-zero output channels: "
        f"{zero}; layers multiplied in float32 instead of int8: {floats}"
    )
    wide = [name for name, facts in result["layers"].items() if facts["activation_bits"] == 8]
    if 0 < len(wide) < len(layers):
        say(f"inputs with 8 bits, {len(wide)} of {len(layers)} layers: {', '.join(wide)}")
