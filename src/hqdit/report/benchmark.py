"""The benchmark's record as tables, for a terminal and for README."""

from __future__ import annotations

from typing import Any

from hqdit.report.cells import MISSING
from hqdit.report.gpu_benchmark import Table, gpu_tables, ratio_text


def benchmark_tables(record: dict[str, Any]) -> str:
    """Every table of the record as aligned plain text."""
    return "\n\n".join(_text(table) for table in _tables(record))


def forward_markdown(record: dict[str, Any]) -> str:
    """The table of forward passes in GitHub's markdown, without a line break at the end."""
    _, header, rows = _forward(record)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _tables(record: dict[str, Any]) -> list[Table]:
    if record.get("device") == "cuda":
        return gpu_tables(record)
    return [
        _products(record),
        _forward(record),
        _tokens(record),
        _rotation(record),
        _memory(record),
        *_profiles(record),
    ]


def _products(record: dict[str, Any]) -> Table:
    rows = [
        [
            entry["shape"],
            ratio_text(entry["vs_float32"]),
            ratio_text(entry["vs_int_mm"]),
            f"{entry['giga_operations_per_second']:.0f}",
        ]
        for entry in record["product"]
    ]
    return "Product with scales and bias", ("M x K x N", "vs float32", "vs torch._int_mm", "Gop/s"), rows


def _forward(record: dict[str, Any]) -> Table:
    forward = record["forward"]
    ours = min(value for name, value in forward["median_seconds"].items() if name.startswith("hqdit"))
    slowest = max(forward["median_seconds"].values())
    rows = []
    for name, value in sorted(forward["median_seconds"].items(), key=lambda item: item[1]):
        sqnr = forward["output_sqnr_db"].get(name)
        rows.append(
            [
                name,
                f"{value * 1e3:.0f}",
                ratio_text(slowest / value),
                ratio_text(value / ours),
                MISSING if sqnr is None else f"{sqnr:.1f}",
            ]
        )
    rows += [[name, MISSING, MISSING, MISSING, MISSING] for name in forward["absent"]]
    title = f"Forward pass of DiT-XL/2, {record['blocks']} blocks, batch 2, {record['threads']} threads"
    return title, ("", "ms", "vs slowest", "time / fastest hqdit", "output SQNR (dB)"), rows


def _tokens(record: dict[str, Any]) -> Table:
    rows = [
        [str(entry["tokens"]), str(entry["blocks"]), ratio_text(entry["vs_float32_eager"])]
        for entry in record["forward"]["by_tokens"]
    ]
    return "By number of tokens, batch 1", ("Tokens", "Blocks", "vs float32"), rows


def _rotation(record: dict[str, Any]) -> Table:
    rows = [[name, f"{100 * value:.1f} %"] for name, value in record["rotate_quantize_fraction"].items()]
    return "Rotation and rounding alone, share of the forward pass", ("Rotation", "Share"), rows


def _memory(record: dict[str, Any]) -> Table:
    memory = record["memory"]
    rows = [
        ["file, distinct embedders", ratio_text(memory["file_ratio"])],
        ["file, embedders stored once", ratio_text(memory["file_ratio_shared_embedders"])],
        ["peak of load and one forward, distinct embedders", ratio_text(memory["peak_ratio"])],
        ["peak of load and one forward, embedders stored once", ratio_text(memory["peak_ratio_shared_embedders"])],
    ]
    return "Memory", ("", "float32 / ours"), rows


def _profiles(record: dict[str, Any]) -> list[Table]:
    tables: list[Table] = []
    for name, parts in record["profile"].items():
        total = parts["forward"]
        rows = [
            [part, f"{value * 1e3:.1f}", f"{100 * value / total:.1f} %"]
            for part, value in sorted(parts.items(), key=lambda item: -item[1])
        ]
        tables.append((f"Where the time goes: {name}", ("Part", "ms", "Share"), rows))
    return tables


def _text(table: Table) -> str:
    title, header, rows = table
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in (header, ["-" * width for width in widths], *rows)
    ]
    return "\n".join([title, *(line.rstrip() for line in lines)])
