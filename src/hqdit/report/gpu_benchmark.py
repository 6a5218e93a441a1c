"""The GPU benchmark's record as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hqdit.report.cells import MISSING

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, header, rows

#: Titles of the ratios of a product, others / ours.
_PRODUCT_RATIOS = {
    "vs_float32": "vs float32",
    "vs_float32_tf32": "vs TF32",
    "vs_bfloat16": "vs bfloat16",
    "vs_float8": "vs FP8",
    "vs_int_mm": "vs torch._int_mm",
    "vs_library": "vs library route",
}


def gpu_tables(record: dict[str, Any]) -> list[Table]:
    """Products, forward passes, memory and parts, titled with the device."""
    device = record["environment"]["accelerator"] or record["device"]
    return [
        _products(record, device),
        *(_forward(name, entry) for name, entry in record["workloads"].items()),
        _memory(record),
        *_profiles(record),
    ]


def ratio_text(value: float | None) -> str:
    """A ratio with two decimals, or that there is none."""
    return MISSING if value is None else f"{value:.2f}x"


def _products(record: dict[str, Any], device: str) -> Table:
    rows = [
        [
            entry["shape"],
            *(ratio_text(entry[key]) for key in _PRODUCT_RATIOS),
            f"{entry['giga_operations_per_second']:.0f}",
        ]
        for entry in record["product"]
    ]
    return f"Product with scales and bias, {device}", ("M x K x N", *_PRODUCT_RATIOS.values(), "Gop/s"), rows


def _forward(name: str, entry: dict[str, Any]) -> Table:
    medians, ours = entry["median_seconds"], entry["fastest_ours"]
    rows = []
    for contender, value in sorted(medians.items(), key=lambda item: item[1]):
        sqnr = entry["output_sqnr_db"].get(contender)
        quality = MISSING if sqnr is None else f"{sqnr:.1f}"
        rows.append([contender, f"{value * 1e3:.2f}", ratio_text(value / medians[ours]), quality])
    rows += [[contender, MISSING, MISSING, MISSING] for contender in entry["absent"]]
    return f"Forward pass: {name}", ("", "ms", "time / fastest hqdit", "output SQNR (dB)"), rows


def _memory(record: dict[str, Any]) -> Table:
    rows = [
        [name, ratio_text(entry["memory"]["model_ratio_bfloat16"]), ratio_text(entry["memory"]["file_ratio"])]
        for name, entry in record["workloads"].items()
    ]
    return "Memory", ("", "model on the device, bfloat16 / ours", "file, float32 / ours"), rows


def _profiles(record: dict[str, Any]) -> list[Table]:
    tables: list[Table] = []
    for name, parts in record["profile"].items():
        rows = [
            [part, f"{value * 1e3:.2f}", f"{100 * value / parts['forward']:.1f} %"]
            for part, value in sorted(parts.items(), key=lambda item: -item[1])
        ]
        tables.append((f"Where the time goes: {name}", ("Part", "ms", "Share"), rows))
    return tables
