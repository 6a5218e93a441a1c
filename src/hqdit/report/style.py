"""How charts look: colours, marks, fonts and legends, in one place for all of them.

matplotlib is used through its object interface (no pyplot). Equal input gives equal bytes on one machine: no time, no
program name and no user's matplotlibrc enters a file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib.style
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from hqdit.report.cells import visible_text

#: Okabe and Ito's colours, which stay apart for colour-blind readers (their yellow is too pale for lines). Colour is
#: never alone: lines have markers and, beyond the number of colours, styles; areas have hatches.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
LINE_STYLES = ("-", "--", ":", "-.")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "++")
#: From dark blue to yellow with even steps in lightness, also for colour-blind readers and in grey print.
COLOUR_MAP = "cividis"

#: Longer names lose their middle, or they would squeeze the plot out of its picture.
LONGEST_LEGEND, LONGEST_TICK, LONGEST_AXIS = 48, 32, 72

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
    "hatch.linewidth": 0.5,
    "svg.fonttype": "path",
    "svg.hashsalt": "hqdit",  # else the ids inside an SVG are random
}
_DOTS_PER_INCH = 144
# Entries side by side in the legend, while they fit in this share of the picture's width.
_MOST_ACROSS = 4
_LEGEND_SHARE = 0.92


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib's own defaults and ours, whatever the user's matplotlibrc says; put back afterwards."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def empty_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A white figure of `width` x `height` inches with one pair of axes; call it inside `house_style`."""
    figure = Figure(figsize=(width, height), dpi=_DOTS_PER_INCH, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def add_legend(axes: Axes, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """A legend above the plot, as many entries side by side as fit."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    for across in range(_MOST_ACROSS, 0, -1):
        legend = axes.legend(
            handles,
            [drawable(label, LONGEST_LEGEND) for label in labels],
            loc="lower left",
            bbox_to_anchor=(0.0, 1.06),
            ncols=across,
            frameon=False,
            borderaxespad=0,
        )
        if legend.get_window_extent().width <= _LEGEND_SHARE * figure.bbox.width:
            break


def drawable(text: str, most: int) -> str:
    r"""`text` in about `most` characters, those that cannot be printed or drawn in our font as `\x1b` or `\u4e2d`."""
    glyphs = get_font(findfont(_FONT)).get_charmap()
    known = [c if ord(c) in glyphs else c.encode("unicode_escape").decode("ascii") for c in visible_text(text)]
    whole = "".join(known)
    return whole if len(whole) <= most else f"{whole[: most // 2]}…{whole[-(most // 2) :]}"


def svg_bytes(figure: Figure) -> bytes:
    """The figure as SVG, text as paths, without date and program name."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
