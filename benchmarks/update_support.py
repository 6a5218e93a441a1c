"""Write docs/support.md for the installed diffusers, and print its line of totals."""

from __future__ import annotations

from pathlib import Path

from hqdit.integrations.support_matrix import support_page, support_rows, totals

PAGE = Path(__file__).parent.parent / "docs" / "support.md"

if __name__ == "__main__":
    rows = list(support_rows())
    PAGE.write_text(support_page(rows), encoding="utf-8")
    print(totals(rows))
