"""Write README's measured tables from the committed records, or with --check say whether they agree."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hqdit.report.benchmark import forward_markdown
from hqdit.report.tables import DemoRow, render_markdown_table

ROOT = Path(__file__).parent.parent
DEMO, BENCH = "docs/records/demo.json", "benchmarks/results/cpu.json"
METHODS = "docs/records/reproduce/table-w4a4/record.json"


def demo_table(record: dict[str, Any]) -> str:
    """README's main table, and the machine that it was measured on."""
    rows = [DemoRow(**row) for row in record["rows"]]
    return f"{render_markdown_table(rows, record['extractor'])}\n\n{measured_on(record, DEMO)}"


def methods_table(record: dict[str, Any]) -> str:
    """Guided noise-prediction SQNR at W4A4: a row per method and a column per model, from the tables by model."""
    start = "Noise prediction after guidance 1.5, "
    tables = {t["title"].removeprefix(start): t for t in record["tables"] if t["title"].startswith(start)}
    found: dict[str, dict[str, str]] = {}
    for model, table in tables.items():
        column = [column["title"] for column in table["columns"]].index("W4A4")
        for row in table["rows"]:
            cell = row[column]
            found.setdefault(row[0], {})[model] = "exact" if cell == "inf" else f"{cell['value']:.1f}"
    lines = ["| W4A4, SQNR in dB | " + " | ".join(tables) + " |", "| --- |" + " ---: |" * len(tables)]
    lines += [
        f"| {method} | " + " | ".join(values[model] for model in tables) + " |" for method, values in found.items()
    ]
    return "\n".join(lines) + f"\n\n{measured_on(record, METHODS)}"


def bench_table(record: dict[str, Any]) -> str:
    """Forward passes of every contender, then the other ratios in a sentence each."""
    memory, fractions = record["memory"], record["rotate_quantize_fraction"]
    products = ", ".join(f"{entry['shape']}: {entry['vs_float32']:.1f}x" for entry in record["product"])
    full, block = (f"{100 * fractions[name]:.0f} %" for name in ("full", "block128"))
    sentences = (
        f"Products with scales and bias against float32: {products}.",
        f"File: {memory['file_ratio']:.1f}x smaller ({memory['file_ratio_shared_embedders']:.1f}x where the blocks'",
        f"embedders are copies); peak memory of load and one forward: {memory['peak_ratio']:.1f}x smaller.",
        f"Rotation and rounding: {full} of the forward pass with full rotation, {block} with block:128.",
        f"Kernels: {record['backend']}.",
    )
    return f"{forward_markdown(record)}\n\n{' '.join(sentences)}\n\n{measured_on(record, BENCH)}"


def measured_on(record: dict[str, Any], path: str) -> str:
    """One line that names machine, versions and commit."""
    found = record["environment"]
    return (
        f"Measured on {found['processor']}, {found['threads']} threads, torch {found['torch']}, diffusers "
        f"{found['diffusers']}, commit {found['commit']} ([record]({path}))."
    )


SECTIONS = {"demo": (DEMO, demo_table), "methods": (METHODS, methods_table), "bench": (BENCH, bench_table)}


def updated(readme: str) -> str:
    """`readme` with every section between its two markers rendered from its record."""
    for section, (path, render) in SECTIONS.items():
        opening, closing = f"<!-- {section} table -->", f"<!-- end of {section} table -->"
        before, _, rest = readme.partition(opening)
        _, _, after = rest.partition(closing)
        record = json.loads((ROOT / path).read_text(encoding="utf-8"))
        readme = f"{before}{opening}\n{render(record)}\n{closing}{after}"
    return readme


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if README is out of date")
    args = parser.parse_args()
    path = ROOT / "README.md"
    current = path.read_text(encoding="utf-8")
    wanted = updated(current)
    if args.check:
        sys.exit(0 if wanted == current else "README.md: its tables differ from the records. Fix: make readme")
    path.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
