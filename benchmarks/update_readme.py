"""Write README's measured tables from the committed records, or with --check say whether they agree."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from hqdit.report.tables import DemoRow, render_markdown_table

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "docs" / "records"


def demo_table(record: dict[str, Any]) -> str:
    """README's main table, and the machine that it was measured on."""
    rows = [DemoRow(**row) for row in record["rows"]]
    return f"{render_markdown_table(rows, record['extractor'])}\n\n{measured_on(record, 'demo.json')}"


def stress_table(record: dict[str, Any]) -> str:
    """Guided noise-prediction SQNR, a row per method and a column per factor."""
    factors = sorted({row["factor"] for row in record["rows"]})
    methods = list(dict.fromkeys(row["method"] for row in record["rows"]))
    found = {(row["method"], row["factor"]): row["eps_sqnr_db"]["guided"] for row in record["rows"]}
    lines = ["| method | " + " | ".join(f"c = {factor:g}" for factor in factors) + " |"]
    lines.append("| --- |" + " ---: |" * len(factors))
    for method in methods:
        lines.append(f"| {method} | " + " | ".join(f"{found[method, factor]:.2f}" for factor in factors) + " |")
    return "\n".join(lines) + f"\n\n{measured_on(record, 'outlier_stress.json')}"


def measured_on(record: dict[str, Any], name: str) -> str:
    """One line that names machine, versions and commit."""
    found = record["environment"]
    return (
        f"Measured on {found['processor']}, {found['threads']} threads, torch {found['torch']}, diffusers "
        f"{found['diffusers']}, commit {found['commit']} ([record](docs/records/{name}))."
    )


SECTIONS = {"demo": ("demo.json", demo_table), "stress": ("outlier_stress.json", stress_table)}


def updated(readme: str) -> str:
    """`readme` with every section between its two markers rendered from its record."""
    for section, (name, render) in SECTIONS.items():
        opening, closing = f"<!-- {section} table -->", f"<!-- end of {section} table -->"
        before, _, rest = readme.partition(opening)
        _, _, after = rest.partition(closing)
        record = json.loads((RECORDS / name).read_text(encoding="utf-8"))
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
        sys.exit(0 if wanted == current else "README.md: its tables differ from docs/records. Fix: make readme")
    path.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
