"""Charts by what matplotlib was asked to draw, and by their bytes."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import xml.etree.ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from hqdit.errors import UsageError
from hqdit.records.run_record import Bars, Figure, FormatMap, Heatmap, Histogram, Lines, Series
from hqdit.report import charts
from hqdit.report.charts import draw, is_wide

TAILS = ["norm1.linear", "attn1.to_q", "ff.net.2"]
LAYERS = tuple(f"transformer_blocks.{block}.{tail}" for block in range(3) for tail in TAILS)
STEPS = (980.0, 500.0, 20.0)

LINES = Lines(
    "noise",
    "time step",
    "SQNR (dB)",
    (
        Series("minmax", (3.5, None, 11.0), STEPS, (3.0, None, 10.0), (4.5, None, 11.5)),
        Series("hqdit", (8.0, 9.0, math.inf), STEPS),
    ),
)
BARS = Bars(
    "layers",
    LAYERS,
    "SQNR (dB)",
    (
        Series("minmax", (math.inf, -math.inf, None, *map(float, range(6)))),
        Series("hqdit", tuple(map(float, range(9))), low=(0.0,) * 9, high=(20.0,) * 9),
    ),
)
HISTOGRAM = Histogram(
    "input", "value", (-2.0, 0.0, 1.0, 3.0), (Series("before", (0.1, 0.0, 0.2)), Series("after", (0.2, 0.3, 0.1)))
)
HEATMAP = Heatmap(
    "blocks",
    ("0", "1"),
    ("980", "500", "20"),
    ((1.0, None, 3.0), (math.inf, 5.0, -1.0)),
    "dB",
    "",
    "time step",
    "block",
)
FORMATS = FormatMap("formats", LAYERS[:3], ({"e2m1": 1.0}, {"e2m1": 0.25, "e1m2": 0.75}, {"e3m0": 1.0}))
FIGURES: list[Figure] = [LINES, BARS, HISTOGRAM, HEATMAP, FORMATS]
each_kind = pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: type(figure).__name__)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The first axes of every figure that is drawn during the test."""
    axes: list[Axes] = []
    save = charts.svg_bytes

    def spy(drawing: Drawing) -> bytes:
        axes.append(drawing.axes[0])
        return save(drawing)

    monkeypatch.setattr(charts, "svg_bytes", spy)
    return axes


def legend_labels(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


def tick_labels(axes: Axes) -> list[str]:
    return [label.get_text() for label in axes.get_xticklabels()]


@each_kind
def test_charts_parse_repeat_and_refer_to_nothing_outside(figure: Figure) -> None:
    svg = draw(figure)
    assert svg == draw(figure)
    for element in xml.etree.ElementTree.fromstring(svg.decode("utf-8")).iter():
        assert element.tag.split("}")[1] not in ("script", "image", "date", "creator", "text")
        for name, entry in element.attrib.items():
            assert not name.endswith("href") or entry.startswith("#")


def test_charts_ignore_and_keep_the_users_settings() -> None:
    plain = draw(LINES)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 50}):
        assert draw(LINES) == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_charts_need_neither_pyplot_nor_torch() -> None:
    script = (
        "import sys, hqdit.report.page; from hqdit.report.charts import draw; from hqdit.records.run_record import *;"
        "draw(Lines('t', 'x', 'y', (Series('a', (1.0,), (1.0,)),)));"
        "print([name for name in ('matplotlib.pyplot', 'torch', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_lines_hold_every_point_and_leave_gaps(drawn: list[Axes]) -> None:
    draw(LINES)
    (axes,) = drawn
    first, second = (line for line in axes.lines if len(line.get_xdata()) == 3 and line.get_linestyle() == "-")
    assert list(first.get_xdata()) == list(STEPS)
    assert np.array_equal(first.get_ydata(), [3.5, math.nan, 11.0], equal_nan=True)
    assert np.array_equal(second.get_ydata(), [8.0, 9.0, math.nan], equal_nan=True)
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("time step", "SQNR (dB)")
    assert legend_labels(axes) == ["minmax", "hqdit", "infinite (exact)"]


def test_the_axis_runs_as_the_points_do(drawn: list[Axes]) -> None:
    draw(LINES)
    draw(dataclasses.replace(LINES, series=(Series("a", (1.0, 2.0), (1.0, 2.0)),)))
    (left, right), (start, end) = (axes.get_xlim() for axes in drawn)
    assert left > right and start < end


def test_whiskers_reach_from_low_to_high(drawn: list[Axes]) -> None:
    draw(LINES)
    draw(BARS)
    segments = [[list(path.vertices[:, 1]) for path in axes.collections[0].get_paths()] for axes in drawn]
    assert [segment for segment in segments[0] if not np.isnan(segment).any()] == [[3.0, 4.5], [10.0, 11.5]]
    assert segments[1] == [[0.0, 20.0]] * 9


def test_many_points_get_a_band(drawn: list[Axes]) -> None:
    x = tuple(map(float, range(40)))
    draw(Lines("t", "x", "y", (Series("a", x, x, tuple(v - 1 for v in x), tuple(v + 2 for v in x)),)))
    vertices = drawn[0].collections[0].get_paths()[0].vertices
    for position in x:
        heights = vertices[vertices[:, 0] == position, 1]
        assert (heights.min(), heights.max()) == (position - 1, position + 2)


def test_logarithmic_axes_have_plain_numbers_at_the_points(drawn: list[Axes]) -> None:
    x = (16.0, 64.0, 2048.0)
    svg = draw(Lines("t", "samples", "y", (Series("a", (1e-3, 1.0, 10.0), x),), x_scale="log", y_scale="log"))
    (axes,) = drawn
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert tick_labels(axes) == ["16", "64", "2048"]
    assert all("mathdefault" not in label.get_text() for label in axes.get_yticklabels()) and svg


def test_series_differ_in_colour_and_marker_then_in_line_style(drawn: list[Axes]) -> None:
    draw(Lines("t", "x", "y", tuple(Series(f"m{index}", (1.0, 2.0), (0.0, 1.0)) for index in range(10))))
    lines = drawn[0].lines
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in lines}) == 10
    assert len({line.get_color() for line in lines[:7]}) == len({line.get_marker() for line in lines[:7]}) == 7


def test_bars_stand_over_their_category_and_differ_in_hatch(drawn: list[Axes]) -> None:
    draw(BARS)
    (axes,) = drawn
    first, second = axes.containers[0], next(c for c in axes.containers[1:] if hasattr(c, "patches"))
    for index, bar in enumerate(second.patches):
        assert bar.get_height() == index and index - 0.5 < bar.get_x() < index + 0.5
    assert first.patches[0].get_hatch() != second.patches[0].get_hatch()
    assert legend_labels(axes) == ["minmax", "hqdit", "infinite (exact)", "minus infinity"]
    top, bottom = (
        next(line for line in axes.lines if line.get_marker() == mark and len(line.get_xdata())) for mark in "^v"
    )
    assert round(top.get_xdata()[0]) == 0 and list(top.get_ydata()) == [1.0]
    assert round(bottom.get_xdata()[0]) == 1 and list(bottom.get_ydata()) == [0.0]


def test_layers_are_grouped_by_block(drawn: list[Axes]) -> None:
    draw(BARS)
    (axes,) = drawn
    assert tick_labels(axes) == TAILS * 3
    assert [text.get_text() for text in axes.texts] == ["block 0", "block 1", "block 2"]
    assert [text.get_position()[0] for text in axes.texts] == [1, 4, 7]


def test_many_layers_name_their_blocks_only(drawn: list[Axes]) -> None:
    names = tuple(f"blocks.{block}.{tail}" for block in range(40) for tail in TAILS)
    draw(Bars("t", names, "y", (Series("a", (1.0,) * 120),)))
    draw(Bars("t", tuple(f"layer{index}" for index in range(80)), "y", (Series("a", (1.0,) * 80),)))
    assert tick_labels(drawn[0]) == [str(block) for block in range(0, 40, 2)]
    assert len(tick_labels(drawn[1])) < 31


def test_a_chart_of_exact_numbers_only_shows_no_invented_scale(drawn: list[Axes]) -> None:
    draw(Bars("t", ("x", "y"), "dB", (Series("a", (math.inf, math.inf)),)))
    assert len(drawn[0].get_yticks()) == 0


def test_histograms_keep_densities_and_leave_empty_bins_out(drawn: list[Axes]) -> None:
    draw(HISTOGRAM)
    (axes,) = drawn
    before, after = axes.patches
    assert np.array_equal(before.get_data().values, [0.1, math.nan, 0.2], equal_nan=True)
    assert list(after.get_data().values) == [0.2, 0.3, 0.1] and list(after.get_data().edges) == list(HISTOGRAM.edges)
    assert before.get_linestyle() != after.get_linestyle()
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("value", "density", "log")


def test_heat_maps_hold_every_number_in_its_place(drawn: list[Axes]) -> None:
    draw(HEATMAP)
    (axes,) = drawn
    mesh = axes.collections[0]
    expected = np.ma.masked_invalid([[1.0, math.nan, 3.0], [math.nan, 5.0, -1.0]])
    assert np.ma.allequal(mesh.get_array(), expected) and np.array_equal(mesh.get_array().mask, expected.mask)
    assert mesh.get_clim() == (-1.0, 5.0)
    assert axes.yaxis_inverted() and (axes.get_xlabel(), axes.get_ylabel()) == ("time step", "block")
    written = {(text.get_position(), text.get_text()) for text in axes.texts}
    assert written == {((0.5, 0.5), "1"), ((2.5, 0.5), "3"), ((0.5, 1.5), "∞"), ((1.5, 1.5), "5"), ((2.5, 1.5), "-1")}
    assert axes.figure.axes[1].get_ylabel() == "dB"


def test_format_maps_stack_shares_to_the_whole(drawn: list[Axes]) -> None:
    draw(FORMATS)
    (axes,) = drawn
    assert legend_labels(axes) == ["e2m1", "e1m2", "e3m0"]
    shares = {
        name: [bar.get_height() for bar in bars]
        for name, bars in zip(legend_labels(axes), axes.containers, strict=True)
    }
    assert shares == {"e2m1": [100, 25, 0], "e1m2": [0, 75, 0], "e3m0": [0, 0, 100]}
    assert axes.containers[1][1].get_y() == 25
    assert axes.get_ylabel() == "output channels (%)"
    assert len({bars[0].get_hatch() for bars in axes.containers}) == 3
    draw(dataclasses.replace(FORMATS, y_label="layers (%)"))
    assert drawn[1].get_ylabel() == "layers (%)"


@pytest.mark.parametrize(
    "name", ["\x1b[31mred", "$\\frac{", "_hidden", "数字", "<script>", "a\nb", "\udc80", "x" * 200]
)
def test_hostile_names_are_drawn_as_text_without_a_warning(name: str, drawn: list[Axes]) -> None:
    draw(Bars(name, (f"{name}.0.{name}", f"{name}.1.{name}"), name[:40], (Series(name, (1.0, 2.0)),)))
    draw(Lines(name, name[:40], name[:40], (Series(name, (1.0,), (0.0,)),)))
    draw(Heatmap(name, (name,), (name,), ((1.0,),), name[:40]))
    draw(FormatMap(name, (name,), ({name: 1.0},)))
    for axes in (drawn[0], drawn[1], drawn[3]):
        (label,) = legend_labels(axes)
        assert label.isprintable()
        assert label == name or "\\" in label or "…" in label


def test_many_long_names_leave_room_for_the_plot(drawn: list[Axes]) -> None:
    draw(Lines("t", "x", "y", tuple(Series(f"{index} {'w' * 60}", (1.0, 2.0), (0.0, 1.0)) for index in range(8))))
    assert drawn[0].get_window_extent().height > 60
    legend = drawn[0].get_legend()
    assert legend is not None and legend.get_window_extent().x0 >= 0


@pytest.mark.parametrize(
    "figure",
    [
        dataclasses.replace(LINES, series=()),
        dataclasses.replace(BARS, series=()),
        Bars("t", (), "y", (Series("a", ()),)),
        dataclasses.replace(HISTOGRAM, series=()),
        Heatmap("t", (), (), (), "v"),
        Heatmap("t", ("a",), (), ((),), "v"),
        FormatMap("t", (), ()),
        FormatMap("t", ("a",), ({},)),
    ],
)
def test_charts_refuse_emptiness(figure: Figure) -> None:
    with pytest.raises(UsageError, match=r"figure '\w+': found no \w+, needed at least one"):
        draw(figure)


def test_charts_refuse_unknown_scales() -> None:
    with pytest.raises(UsageError, match="figure 'noise': found scale 'cubic', needed linear or log"):
        draw(dataclasses.replace(LINES, y_scale="cubic"))


def test_only_figures_of_many_categories_are_wide() -> None:
    assert not is_wide(LINES) and not is_wide(HISTOGRAM) and not is_wide(HEATMAP) and not is_wide(FORMATS)
    assert is_wide(Bars("t", tuple(f"m{index}" for index in range(20)), "y", (Series("a", (1.0,) * 20),)))
