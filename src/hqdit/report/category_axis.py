"""Names along an axis of categories; names of layers are grouped by their block."""

from __future__ import annotations

import re
from collections.abc import Sequence

from matplotlib.axes import Axes

from hqdit.report.style import LONGEST_TICK, drawable

# With more layers than this their names no longer fit along the axis, and only blocks are named.
_MOST_NAMED = 60
_MOST_TICKS = 30
# Characters of all names together that fit side by side without turning them.
_MOST_LEVEL_CHARACTERS = 72
_LAYER_OF_BLOCK = re.compile(r"(?P<family>[^\d]*)\.(?P<block>\d+)\.(?P<layer>.+)")


def name_categories(axes: Axes, names: Sequence[str]) -> None:
    """Ticks at 0, 1, ... along the x axis: names while they fit, and the blocks that layers belong to."""
    axes.grid(axis="x", visible=False)
    axes.set_xlim(-0.7, len(names) - 0.3)
    matches = [_LAYER_OF_BLOCK.fullmatch(name) for name in names]
    blocks = [match["block"] for match in matches if match]
    has_blocks = len(blocks) == len(names) and len({match["family"] for match in matches if match}) == 1
    are_named = len(names) <= _MOST_NAMED
    if are_named:
        shown = [match["layer"] if has_blocks and match else name for match, name in zip(matches, names, strict=True)]
        labels = [drawable(name, LONGEST_TICK) for name in shown]
        if sum(map(len, labels)) <= _MOST_LEVEL_CHARACTERS:
            axes.set_xticks(range(len(names)), labels)
        elif len(labels) <= _MOST_TICKS:
            axes.set_xticks(range(len(names)), labels, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
        else:
            axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=7)
    if has_blocks:
        _name_blocks(axes, blocks, are_named)
    elif not are_named:
        every = -(-len(names) // _MOST_TICKS)
        axes.set_xticks(range(0, len(names), every), [drawable(name, LONGEST_TICK) for name in names[::every]])
        axes.tick_params(axis="x", rotation=90, labelsize=7)


def _name_blocks(axes: Axes, blocks: Sequence[str], are_named: bool) -> None:
    """Rules between blocks, and their numbers above the plot, or along the axis if the layers have no names there."""
    starts = [index for index in range(len(blocks)) if index == 0 or blocks[index] != blocks[index - 1]]
    ends = [*starts[1:], len(blocks)]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="#bbbbbb", linewidth=0.7, zorder=0.5)
    every = -(-len(starts) // _MOST_TICKS)
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)][::every]
    shown = [blocks[start] for start in starts][::every]
    if not are_named:
        axes.set_xticks(middles, shown)
        axes.set_xlabel("block, its layers in forward order")
        return
    for middle, block in zip(middles, shown, strict=True):
        transform = axes.get_xaxis_transform()
        axes.text(middle, 1.01, f"block {block}", transform=transform, ha="center", va="bottom", size=7.5)
    axes.set_xlabel("layer, in forward order")
