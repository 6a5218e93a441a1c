"""Every kind of figure that a record can hold, drawn as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from hqdit.errors import UsageError
from hqdit.records.run_record import Bars, Figure, FormatMap, Heatmap, Histogram, Lines, Series
from hqdit.report.category_axis import name_categories
from hqdit.report.cells import visible_text
from hqdit.report.style import (
    COLOUR_MAP,
    COLOURS,
    HATCHES,
    LINE_STYLES,
    LONGEST_AXIS,
    LONGEST_TICK,
    MARKERS,
    add_legend,
    drawable,
    empty_figure,
    house_style,
    svg_bytes,
)

#: Inches. Figures with many categories are wide and scroll on a small screen; the others shrink with it.
NARROW, WIDE = 5.8, 10.0
_MOST_NARROW_CATEGORIES = 16
_HEIGHT = 3.3
# Confidence bounds are whiskers while they can be told apart, else a band.
_MOST_WHISKERS = 12
# With more points, markers would run into each other; they stay often enough to tell lines apart.
_MOST_MARKERS = 40
# Numbers are written into the cells of a heat map of at most this many columns and cells.
_MOST_WRITTEN_COLUMNS, _MOST_WRITTEN_CELLS = 12, 150
_MOST_TICKS = 24
_MOST_LOG_POSITIONS = 10
_QUIET = "#666666"


def is_wide(figure: Figure) -> bool:
    """Whether the figure needs the width of a desktop page to be read."""
    return _width(figure) == WIDE


def draw(figure: Figure) -> bytes:
    """`figure` as SVG on white, with labelled axes.

    Infinite numbers of lines and bars are triangles at the edge of the plot; None is a gap.

    Raises:
        UsageError: nothing to draw, an infinite number where none can be shown, or an unknown scale.
    """
    with house_style():
        match figure:
            case Lines():
                return _lines(figure)
            case Bars():
                return _bars(figure)
            case Histogram():
                return _histogram(figure)
            case Heatmap():
                return _heatmap(figure)
            case FormatMap():
                return _format_map(figure)


def _width(figure: Figure) -> float:
    match figure:
        case Bars():
            # Short names side by side (methods) need less room than long ones (layers).
            count = len(figure.categories) * math.sqrt(max(len(figure.series), 1))
        case FormatMap():
            count = len(figure.row_labels)
        case Heatmap():
            count = len(figure.column_labels)
        case _:
            count = 0
    return WIDE if count > _MOST_NARROW_CATEGORIES else NARROW


def _lines(figure: Lines) -> bytes:
    _require(figure.title, "series", figure.series)
    drawing, axes = empty_figure(NARROW, _HEIGHT)
    _set_scale(axes, "x", figure.x_scale, figure.title, [x for series in figure.series for x in series.x])
    _set_scale(axes, "y", figure.y_scale, figure.title)
    handles: list[Artist] = []
    for index, series in enumerate(figure.series):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        style = LINE_STYLES[index // len(COLOURS) % len(LINE_STYLES)]
        y = _finite(series.y)
        if series.low and len(series.y) > _MOST_WHISKERS:
            axes.fill_between(
                series.x, _finite(series.low), _finite(series.high), color=colour, alpha=0.18, linewidth=0
            )
        elif series.low:
            axes.errorbar(series.x, y, _whiskers(series), fmt="none", ecolor=colour, elinewidth=0.8, capsize=2.5)
        every = max(1, len(series.x) // _MOST_MARKERS)
        handles += axes.plot(series.x, y, color=colour, linestyle=style, marker=marker, markevery=every)
        _mark_infinite(axes, series.x, series.y, colour)
    axes.set_xlabel(drawable(figure.x_label, LONGEST_AXIS))
    axes.set_ylabel(drawable(figure.y_label, LONGEST_AXIS))
    if all(_descends(series.x) for series in figure.series):
        axes.invert_xaxis()
    _finish(axes, handles, figure.series)
    return svg_bytes(drawing)


def _bars(figure: Bars) -> bytes:
    _require(figure.title, "series", figure.series)
    _require(figure.title, "categories", figure.categories)
    drawing, axes = empty_figure(_width(figure), _HEIGHT + 0.8)
    room = 0.8 / len(figure.series)
    handles: list[Artist] = []
    for index, series in enumerate(figure.series):
        colour, hatch = COLOURS[index % len(COLOURS)], HATCHES[index % len(HATCHES)]
        x = [position - 0.4 + room * (index + 0.5) for position in range(len(figure.categories))]
        y = _finite(series.y)
        axes.bar(x, y, 0.92 * room, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        if series.low:
            axes.errorbar(x, y, _whiskers(series), fmt="none", ecolor="#222222", elinewidth=0.7, capsize=1.6)
        _mark_infinite(axes, x, series.y, colour)
        handles.append(Patch(facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0))
    axes.axhline(0, color="#444444", linewidth=0.7)
    axes.set_ylabel(drawable(figure.y_label, LONGEST_AXIS))
    name_categories(axes, figure.categories)
    _finish(axes, handles, figure.series)
    return svg_bytes(drawing)


def _histogram(figure: Histogram) -> bytes:
    _require(figure.title, "series", figure.series)
    drawing, axes = empty_figure(NARROW, _HEIGHT)
    _set_scale(axes, "y", figure.y_scale, figure.title)
    handles: list[Artist] = []
    for index, series in enumerate(figure.series):
        colour, style = COLOURS[index % len(COLOURS)], LINE_STYLES[index % len(LINE_STYLES)]
        heights = _finite(series.y)
        # A logarithmic axis has no place for an empty bin.
        shown = np.where(heights > 0, heights, np.nan) if figure.y_scale == "log" else heights
        handles.append(axes.stairs(shown, figure.edges, color=colour, linestyle=style, linewidth=1.2, baseline=None))
    axes.set_xlabel(drawable(figure.x_label, LONGEST_AXIS))
    axes.set_ylabel("density")
    _finish(axes, handles, figure.series)
    return svg_bytes(drawing)


def _heatmap(figure: Heatmap) -> bytes:
    _require(figure.title, "rows", figure.row_labels)
    _require(figure.title, "columns", figure.column_labels)
    rows, columns = len(figure.row_labels), len(figure.column_labels)
    drawing, axes = empty_figure(_width(figure), min(max(1.2 + 0.26 * rows, 2.6), 12.0))
    values = np.stack([_finite(row) for row in figure.values])
    found = values[np.isfinite(values)]
    bounds = (float(found.min()), float(found.max())) if found.size else (0.0, 1.0)
    # Edges in the colour of their cells, or hairlines of the page show between them.
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(values), cmap=COLOUR_MAP, norm=Normalize(*bounds), edgecolors="face", linewidth=0.2
    )
    axes.grid(visible=False)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    _tick(axes, figure.column_labels, "x")
    _tick(axes, figure.row_labels, "y")
    axes.set_xlabel(drawable(figure.x_label, LONGEST_AXIS))
    axes.set_ylabel(drawable(figure.y_label, LONGEST_AXIS))
    if found.size:
        bar = drawing.colorbar(mesh, ax=axes, label=drawable(figure.value_label, LONGEST_AXIS), pad=0.015, aspect=24)
        assert bar.solids is not None  # a colour bar of filled cells has them
        bar.solids.set(rasterized=False, edgecolor="face")
    is_written = columns <= _MOST_WRITTEN_COLUMNS and rows * columns <= _MOST_WRITTEN_CELLS
    middle = sum(bounds) / 2
    for row, entries in enumerate(figure.values):
        for column, entry in enumerate(entries):
            if entry is not None and not math.isfinite(entry):
                text, colour = ("∞" if entry > 0 else "-∞"), _QUIET
            elif entry is not None and is_written:
                text, colour = f"{entry:.3g}", ("black" if entry > middle else "white")
            else:
                continue
            axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=7, color=colour)
    return svg_bytes(drawing)


def _format_map(figure: FormatMap) -> bytes:
    _require(figure.title, "rows", figure.row_labels)
    formats = list(dict.fromkeys(name for shares in figure.shares for name in shares))
    _require(figure.title, "formats", formats)
    drawing, axes = empty_figure(_width(figure), _HEIGHT)
    bottom = np.zeros(len(figure.row_labels))
    handles: list[Artist] = []
    for index, name in enumerate(formats):
        colour, hatch = COLOURS[index % len(COLOURS)], HATCHES[index % len(HATCHES)]
        share = 100 * np.array([shares.get(name, 0.0) for shares in figure.shares])
        x = range(len(share))
        axes.bar(x, share, 0.9, bottom=bottom, color=colour, hatch=hatch, edgecolor="white", linewidth=0)
        handles.append(Patch(facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0))
        bottom += share
    axes.set_ylim(0, 100)
    axes.set_ylabel(drawable(figure.y_label, LONGEST_AXIS))
    name_categories(axes, figure.row_labels)
    add_legend(axes, handles, formats)
    return svg_bytes(drawing)


def _require(title: str, what: str, members: Sequence[object]) -> None:
    if not members:
        raise UsageError(
            f"figure {visible_text(title)!r}: found no {what}, needed at least one. Fix: leave the figure out"
        )


def _set_scale(axes: Axes, side: str, scale: str, title: str, positions: Sequence[float] = ()) -> None:
    """A logarithmic axis has plain numbers at its ticks: at `positions`, if they are few, else at powers of ten."""
    if scale not in ("linear", "log"):
        raise UsageError(
            f"figure {visible_text(title)!r}: found scale {scale!r}, needed linear or log. Fix: use one of them"
        )
    if scale == "log":
        axis = axes.xaxis if side == "x" else axes.yaxis
        axes.set(**{f"{side}scale": "log"})
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
        distinct = sorted(set(positions))
        if 1 < len(distinct) <= _MOST_LOG_POSITIONS:
            axis.set_major_locator(FixedLocator(distinct))
            axis.set_minor_locator(NullLocator())


def _finite(numbers: Sequence[float | None]) -> npt.NDArray[np.float64]:
    """Float64, with NaN for what is missing or infinite."""
    values = np.array([math.nan if number is None else number for number in numbers], dtype=np.float64)
    return np.where(np.isfinite(values), values, np.nan)


def _whiskers(series: Series) -> npt.NDArray[np.float64]:
    """Lengths below and above, (2, n); zero where a bound is missing."""
    y = _finite(series.y)
    lengths = np.stack([y - _finite(series.low), _finite(series.high) - y])
    return np.where(np.isfinite(lengths), np.maximum(lengths, 0), 0.0)


def _descends(x: Sequence[float]) -> bool:
    return len(x) > 1 and all(a > b for a, b in zip(x, x[1:], strict=False))


def _mark_infinite(axes: Axes, x: Sequence[float], y: Sequence[float | None], colour: str) -> None:
    """Triangles at the edge of the plot where a number is infinite."""
    at_edge = axes.get_xaxis_transform()
    for infinite, edge, triangle in ((math.inf, 1.0, "^"), (-math.inf, 0.0, "v")):
        positions = [position for position, number in zip(x, y, strict=True) if number == infinite]
        if positions:
            heights = [edge] * len(positions)
            axes.plot(positions, heights, transform=at_edge, color=colour, ls="", marker=triangle, clip_on=False)


def _finish(axes: Axes, handles: list[Artist], all_series: Sequence[Series]) -> None:
    """No invented scale where nothing is finite, and a legend that also explains the triangles that occur."""
    numbers = {number for series in all_series for number in series.y if number is not None}
    if not any(math.isfinite(number) for number in numbers):
        axes.set_yticks([])
    labels = [series.name for series in all_series]
    for infinite, triangle, meaning in ((math.inf, "^", "infinite (exact)"), (-math.inf, "v", "minus infinity")):
        if infinite in numbers:
            handles.append(Line2D([], [], color=_QUIET, linestyle="", marker=triangle))
            labels.append(meaning)
    add_legend(axes, handles, labels)


def _tick(axes: Axes, labels: Sequence[str], side: str) -> None:
    """Names along one side of a heat map, every so many if there are too many."""
    every = -(-len(labels) // _MOST_TICKS)
    positions = [index + 0.5 for index in range(0, len(labels), every)]
    names = [drawable(label, LONGEST_TICK) for label in labels[::every]]
    if side == "y":
        axes.set_yticks(positions, names, fontsize=7.5)
    else:
        is_long = sum(map(len, names)) > 70
        axes.set_xticks(positions, names, fontsize=7.5, rotation=90 if is_long else 0)
