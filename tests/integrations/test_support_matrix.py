"""The support matrix: rows against what is known of some classes, and the committed page against the code."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

from hqdit.integrations.support_matrix import (
    SupportRow,
    support_page,
    support_row,
    support_rows,
    totals,
    transformer_classes,
)

PAGE = Path(__file__).parents[2] / "docs" / "support.md"

# diffusers' own: a class that uses what another of its files deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")


def row_of(name: str) -> SupportRow:
    return support_row(name, transformer_classes()[name])


def test_a_row_by_hand() -> None:
    row = row_of("FluxTransformer2DModel")
    # 19 double blocks of 14 layers (2 modulations, 6 projections, 2 outputs, 2 MLPs of 2), 38 single ones of 6.
    assert (row.adapter, row.layers) == ("Flux", 19 * 14 + 38 * 6)
    # Of a double block 10 inputs, 2 shared; of a single one 3 inputs, 1 shared.
    assert (row.inputs, row.shared_inputs) == (19 * 10 + 38 * 3, 19 * 2 + 38)
    width, mlp = 3072, 4 * 3072
    double = 2 * 6 * width**2 + 8 * width**2 + 4 * width * mlp
    single = 3 * width**2 + 3 * width**2 + width * mlp + (width + mlp) * width
    assert row.weights == 19 * double + 38 * single
    assert row.rotations[15360] == ("full 256*60(paley1)", 38)
    assert set(row.kept) == {"outside the repeated blocks"} and not row.refused


def test_layers_of_a_width_without_a_matrix_are_named_with_what_would_work() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            blocks = [nn.Sequential(nn.Linear(24, 52), nn.Linear(52, 24)) for _ in range(2)]
            self.blocks = nn.ModuleList(blocks)

    row = support_row("Model", Model)
    assert row.refused == {52: ([4], 2)}  # 4 divides 52; 13, 26 and 52 are no orders
    assert (row.layers, row.rotations) == (2, {24: ("full 2*12(paley1)", 2)})
    assert "52: **no matrix** (2); --rotation block:B works with B in [4]" in support_page([row])


def test_a_class_without_defaults_or_blocks_says_why() -> None:
    assert "cannot be built" in row_of("TransformerTemporalModel").problem
    assert "without repeated blocks" in support_row("Linear", lambda: nn.Linear(2, 2)).problem  # type: ignore[arg-type]


def test_nothing_is_allocated() -> None:
    with torch.device("meta"):
        model = transformer_classes()["WanTransformer3DModel"]()
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.skipif(
    f"diffusers {diffusers.__version__}," not in PAGE.read_text(encoding="utf-8"),
    reason=f"docs/support.md is of another diffusers than {diffusers.__version__}",
)
def test_the_page_is_current() -> None:
    rows = list(support_rows())
    assert support_page(rows) == PAGE.read_text(encoding="utf-8"), "run `make support-matrix`"
    planned = int(re.match(r"Totals: (\d+) of", totals(rows)).group(1))  # type: ignore[union-attr]
    assert planned == sum(not row.problem for row in rows)
