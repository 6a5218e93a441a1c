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
DEMO, STRESS, BENCH = "docs/records/demo.json", "docs/records/outlier_stress.json", "benchmarks/results/cpu.json"


def demo_table(record: dict[str, Any]) -> str:
    """README's main table, and the machine that it was measured on."""
    rows = [DemoRow(**row) for row in record["rows"]]
    return f"{render_markdown_table(rows, record['extractor'])}\n\n{measured_on(record, DEMO)}"


def stress_table(record: dict[str, Any]) -> str:
    """Guided noise-prediction SQNR, a row per method and a column per factor."""
    factors = sorted({row["factor"] for row in record["rows"]})
    methods = list(dict.fromkeys(row["method"] for row in record["rows"]))
    found = {(row["method"], row["factor"]): row["eps_sqnr_db"]["guided"] for row in record["rows"]}
    lines = ["| method | " + " | ".join(f"c = {factor:g}" for factor in factors) + " |"]
    lines.append("| --- |" + " ---: |" * len(factors))
    for method in methods:
        lines.append(f"| {method} | " + " | ".join(f"{found[method, factor]:.2f}" for factor in factors) + " |")
    return "\n".join(lines) + f"\n\n{measured_on(record, STRESS)}"


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


SECTIONS = {"demo": (DEMO, demo_table), "stress": (STRESS, stress_table), "bench": (BENCH, bench_table)}


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
