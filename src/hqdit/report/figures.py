"""From plain records to pictures. The only import of matplotlib, through its object interface (no pyplot).

Equal input gives equal bytes on one machine: no time, no program name and no user's matplotlibrc enters a file.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import matplotlib.style
import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.lines import Line2D
from PIL import Image

from hqdit.errors import NumericsError, UsageError
from hqdit.report.tables import visible_text

FigureFormat = Literal["png", "svg"]

#: Resolution of pictures that hold grids, the height of a title above each, and the space between them.
PANEL_DPI, TITLE_PIXELS, PANEL_GAP = 100, 26, 12
#: White pixels between the images of a grid and around them.
GRID_GAP = 2

# Okabe and Ito's colours, which stay apart for colour-blind readers (their yellow is too pale for lines); markers
# tell the methods apart once more, and line styles do when there are more methods than colours.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X")
_LINE_STYLES = ("-", "--", ":", "-.")
_FONT = "DejaVu Sans"  # ships with matplotlib, so figures do not depend on the machine's fonts
_STYLE = {
    "font.family": _FONT,
    "font.size": 9.0,
    "text.parse_math": False,  # names are text, a dollar sign in one is a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.8,
    "svg.fonttype": "path",
    "svg.hashsalt": "hqdit",  # else the ids inside an SVG are random
}
_DOTS_PER_INCH = 144
# With more layers than this their names no longer fit along the axis, and only blocks are named.
_MOST_NAMED_LAYERS = 60
_MOST_TICKS = 30
# Longer names lose their middle, or they would squeeze the plot out of its picture.
_LONGEST_METHOD = 48
_LONGEST_LAYER = 32
# Entries side by side in the legend, while they fit in this share of the picture's width.
_MOST_ACROSS = 4
_LEGEND_SHARE = 0.92

_LAYER_OF_BLOCK = re.compile(r"(?P<family>[^\d]*)\.(?P<block>\d+)\.(?P<layer>.+)")


@dataclass(frozen=True)
class _Series:
    """What to draw for one method: x and dB, in the order of x; NaN where there is nothing."""

    label: str
    x: list[float]
    db: list[float]


def image_grid(images: npt.NDArray[np.uint8], columns: int = 10, scale: int = 4) -> bytes:
    """A PNG of `images` in rows of `columns`, each pixel enlarged to `scale` x `scale`, on white.

    Image i lies in row i // columns; what is left of the last row stays white. Between the images and around them
    are `GRID_GAP` white pixels. Grey images give a grey PNG, coloured ones an RGB one.

    Args:
        images: uint8 (n, height, width, c), n >= 1, c 1 (grey) or 3 (RGB).
        columns: images in a row, at least 1.
        scale: at least 1.

    Raises:
        UsageError: for anything else.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise UsageError(
            f"image grid: found {images.dtype} of shape {images.shape}, needed uint8 (n, height, width, 1 or 3) with"
            " at least one image and pixel. Fix: convert the images"
        )
    for name, number in (("columns", columns), ("scale", scale)):
        if number < 1:
            raise UsageError(f"image grid: found {name} {number}, needed at least 1. Fix: pass a larger one")
    enlarged = images.repeat(scale, axis=1).repeat(scale, axis=2)
    n, height, width, channels = enlarged.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    step_y, step_x = height + GRID_GAP, width + GRID_GAP
    canvas = np.full((rows * step_y + GRID_GAP, columns * step_x + GRID_GAP, channels), 255, dtype=np.uint8)
    for index, image in enumerate(enlarged):
        top = GRID_GAP + index // columns * step_y
        left = GRID_GAP + index % columns * step_x
        canvas[top : top + height, left : left + width] = image
    buffer = io.BytesIO()
    Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas).save(buffer, format="PNG", compress_level=9)
    return buffer.getvalue()


def titled_grids(panels: Sequence[tuple[str, bytes]], columns: int = 3) -> bytes:
    """A PNG of equally large grids side by side, each under its title.

    Args:
        panels: (title, PNG as `image_grid` returns it), at least one.
        columns: panels in a row, at least 1.

    Raises:
        UsageError: no panels.
    """
    if not panels or columns < 1:
        raise UsageError(
            f"titled grids: found {len(panels)} panels in {columns} columns, needed at least one of both. "
            "Fix: pass some"
        )
    pictures = [np.asarray(Image.open(io.BytesIO(png)).convert("RGB")) for _, png in panels]
    height, width = pictures[0].shape[0], pictures[0].shape[1] + PANEL_GAP
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with _house_style():
        # A pixel of a grid is a pixel of the picture, so that nothing is resampled.
        size = (columns * width, rows * (height + TITLE_PIXELS))
        figure = Figure(figsize=(size[0] / PANEL_DPI, size[1] / PANEL_DPI), dpi=PANEL_DPI)
        for index, ((title, _), picture) in enumerate(zip(panels, pictures, strict=True)):
            row, column = divmod(index, columns)
            bottom = size[1] - (row + 1) * (height + TITLE_PIXELS)
            figure.figimage(picture, xo=column * width + PANEL_GAP // 2, yo=bottom)
            middle, top = (column + 0.5) * width / size[0], (bottom + height + TITLE_PIXELS / 2) / size[1]
            figure.text(middle, top, visible_text(title), ha="center", va="center", fontsize=9, parse_math=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=PANEL_DPI, metadata={"Software": None})
    return buffer.getvalue()


def layer_sqnr_figure(per_method: Mapping[str, Mapping[str, float]], file_format: FigureFormat = "png") -> bytes:
    """The SQNR of each layer's output by method, against the layers in forward order.

    Layers are drawn in the order in which they first appear in `per_method`; a layer that a method lacks is a gap in
    its line. Infinite ratios are triangles at the edge of the plot. Names such as `blocks.3.attn.to_q` are grouped by
    block.

    Args:
        per_method: method -> layer name -> dB.
        file_format: "png" or "svg".

    Raises:
        UsageError: there is no method, or a method without a layer.
        NumericsError: for a NaN.
    """
    _require_methods("layer SQNR figure", {method: list(layers.values()) for method, layers in per_method.items()})
    layers = list(dict.fromkeys(name for by_layer in per_method.values() for name in by_layer))
    series = [
        _Series(method, [float(x) for x in range(len(layers))], [by_layer.get(name, math.nan) for name in layers])
        for method, by_layer in per_method.items()
    ]
    with _house_style():
        figure, axes = _empty_figure(width=10.0, height=4.6)
        _draw(axes, series)
        axes.set_ylabel("layer output SQNR (dB)")
        axes.set_xlim(-0.7, len(layers) - 0.3)
        _name_layers(axes, layers)
        return _saved(figure, file_format)


def eps_sqnr_figure(
    per_method: Mapping[str, Sequence[tuple[float, float]]], file_format: FigureFormat = "png"
) -> bytes:
    """The SQNR of the noise prediction by method, against the time step, in the order in which sampling visits it.

    Infinite ratios are triangles at the edge of the plot.

    Args:
        per_method: method -> (time step, dB) in any order.
        file_format: "png" or "svg".

    Raises:
        UsageError: there is no method, or a method without a point.
        NumericsError: for a NaN.
    """
    _require_methods("noise prediction figure", {m: [db for _, db in points] for m, points in per_method.items()})
    series = []
    for method, points in per_method.items():
        ordered = sorted(points)
        series.append(_Series(method, [float(step) for step, _ in ordered], [db for _, db in ordered]))
    with _house_style():
        figure, axes = _empty_figure(width=10.0, height=3.6)
        _draw(axes, series)
        axes.set_ylabel("noise prediction SQNR (dB)")
        axes.set_xlabel("time step: sampling runs from left (noise) to right (image)")
        axes.invert_xaxis()
        return _saved(figure, file_format)


def _require_methods(what: str, per_method: Mapping[str, Sequence[float]]) -> None:
    if not per_method:
        raise UsageError(f"{what}: found no method, needed at least one. Fix: leave the figure out")
    for method, numbers in per_method.items():
        name = repr(visible_text(method))
        if not numbers:
            raise UsageError(f"{what}: found no number for {name}, needed at least one. Fix: leave the method out")
        if any(math.isnan(number) for number in numbers):
            raise NumericsError(f"{what}: found a NaN for {name}, needed numbers in dB. Fix: leave the point out")


@contextmanager
def _house_style() -> Iterator[None]:
    """Matplotlib's own defaults and ours, whatever the user's matplotlibrc says; put back afterwards."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def _empty_figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def _draw(axes: Axes, series: Sequence[_Series]) -> None:
    """Lines, triangles at the edges for infinite ratios, and a legend above the plot."""
    handles = []
    has_edge = {math.inf: False, -math.inf: False}
    for index, line in enumerate(series):
        colour = _COLOURS[index % len(_COLOURS)]
        style = _LINE_STYLES[index // len(_COLOURS) % len(_LINE_STYLES)]
        db = [number if math.isfinite(number) else math.nan for number in line.db]
        marker = _MARKERS[index % len(_MARKERS)]
        handles += axes.plot(line.x, db, color=colour, linestyle=style, marker=marker)
        for infinite, edge, triangle in ((math.inf, 1.0, "^"), (-math.inf, 0.0, "v")):
            x = [position for position, number in zip(line.x, line.db, strict=True) if number == infinite]
            if x:
                has_edge[infinite] = True
                at_edge = axes.get_xaxis_transform()
                axes.plot(x, [edge] * len(x), transform=at_edge, color=colour, ls="", marker=triangle, clip_on=False)
    if not any(math.isfinite(number) for line in series for number in line.db):
        axes.set_yticks([])
    labels = [_drawable(line.label, _LONGEST_METHOD) for line in series]
    for infinite, triangle, meaning in ((math.inf, "^", "exact"), (-math.inf, "v", "nothing but noise")):
        if has_edge[infinite]:
            handles.append(Line2D([], [], color="#666666", linestyle="", marker=triangle))
            labels.append(meaning)
    _add_legend(axes, handles, labels)


def _add_legend(axes: Axes, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """A legend above the plot, as many entries side by side as fit."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    for across in range(_MOST_ACROSS, 0, -1):
        legend = axes.legend(
            handles,
            labels,
            loc="lower left",
            bbox_to_anchor=(0.0, 1.06),
            ncols=across,
            frameon=False,
            borderaxespad=0,
        )
        if legend.get_window_extent().width <= _LEGEND_SHARE * figure.bbox.width:
            break


def _name_layers(axes: Axes, layers: Sequence[str]) -> None:
    """Ticks along the axis: layers by name while they fit, and the blocks that they belong to."""
    axes.grid(axis="x", visible=False)
    matches = [_LAYER_OF_BLOCK.fullmatch(name) for name in layers]
    blocks = [match["block"] for match in matches if match]
    has_blocks = len(blocks) == len(layers) and len({match["family"] for match in matches if match}) == 1
    are_named = len(layers) <= _MOST_NAMED_LAYERS
    if are_named:
        names = [match["layer"] if has_blocks and match else name for match, name in zip(matches, layers, strict=True)]
        axes.set_xticks(
            range(len(layers)), [_drawable(name, _LONGEST_LAYER) for name in names], rotation=90, fontsize=7
        )
    if not has_blocks:
        axes.set_xlabel("layer, in forward order")
        return
    starts = [index for index in range(len(layers)) if index == 0 or blocks[index] != blocks[index - 1]]
    ends = [*starts[1:], len(layers)]
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="#bbbbbb", linewidth=0.7, zorder=0.5)
    every = -(-len(starts) // _MOST_TICKS)
    middles = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)][::every]
    shown = [blocks[start] for start in starts][::every]
    if are_named:
        for middle, block in zip(middles, shown, strict=True):
            axes.text(
                middle, 1.01, f"block {block}", transform=axes.get_xaxis_transform(), ha="center", va="bottom", size=7.5
            )
    else:
        axes.set_xticks(middles, shown)
    axes.set_xlabel("layer, in forward order" if are_named else "block, its layers in forward order")


def _drawable(text: str, most: int) -> str:
    r"""`text` in about `most` characters, those that cannot be printed or drawn in our font as `\x1b` or `\u4e2d`."""
    glyphs = get_font(findfont(_FONT)).get_charmap()
    known = [c if ord(c) in glyphs else c.encode("unicode_escape").decode("ascii") for c in visible_text(text)]
    drawable = "".join(known)
    return drawable if len(drawable) <= most else f"{drawable[: most // 2]}…{drawable[-(most // 2) :]}"


def _saved(figure: Figure, file_format: FigureFormat) -> bytes:
    buffer = io.BytesIO()
    if file_format == "png":
        figure.savefig(buffer, format="png", metadata={"Software": None})
    else:
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
