"""Grids pixel by pixel; charts by what matplotlib was asked to draw and by their bytes."""

from __future__ import annotations

import io
import math
import re
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from hqdit.errors import NumericsError, UsageError
from hqdit.report import figures
from hqdit.report.figures import (
    GRID_GAP,
    PANEL_GAP,
    TITLE_PIXELS,
    FigureFormat,
    eps_sqnr_figure,
    image_grid,
    layer_sqnr_figure,
    titled_grids,
)

TAILS = ["norm1.linear", "attn1.to_q", "ff.net.2"]
LAYERS = [f"transformer_blocks.{block}.{tail}" for block in range(3) for tail in TAILS]
PER_METHOD = {
    "minmax W4A4": {name: 10.0 + index for index, name in enumerate(LAYERS)},
    "hqdit W4A4": {name: 20.0 - index for index, name in enumerate(LAYERS)},
}
EPS = {"minmax W4A4": [(20, 11.0), (980, 3.5), (500, 7.0)], "hqdit W4A4": [(20, math.inf), (980, 8.0), (500, 9.0)]}
CHARTS: list[Callable[[FigureFormat], bytes]] = [
    lambda file_format: layer_sqnr_figure(PER_METHOD, file_format),
    lambda file_format: eps_sqnr_figure(EPS, file_format),
]


def decoded(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of every figure that is saved during the test."""
    axes: list[Axes] = []
    save = figures._saved

    def spy(figure: Figure, file_format: FigureFormat) -> bytes:
        axes.extend(figure.axes)
        return save(figure, file_format)

    monkeypatch.setattr(figures, "_saved", spy)
    return axes


def legend_labels(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    assert legend is not None
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_grid_puts_every_pixel_in_its_place(channels: int, mode: str) -> None:
    images = np.random.default_rng(0).integers(0, 255, (5, 4, 6, channels), dtype=np.uint8)
    picture = decoded(image_grid(images, columns=3, scale=2))
    step_x, step_y = 6 * 2 + GRID_GAP, 4 * 2 + GRID_GAP
    assert (picture.mode, picture.size) == (mode, (3 * step_x + GRID_GAP, 2 * step_y + GRID_GAP))
    pixels = np.asarray(picture).reshape(picture.height, picture.width, channels)
    expected = np.full_like(pixels, 255)
    for index in range(5):
        for y in range(8):
            for x in range(12):
                row, column = index // 3 * step_y + GRID_GAP + y, index % 3 * step_x + GRID_GAP + x
                expected[row, column] = images[index, y // 2, x // 2]
    assert np.array_equal(pixels, expected)


def test_grid_is_no_wider_than_its_images() -> None:
    picture = decoded(image_grid(np.zeros((2, 8, 8, 1), np.uint8), columns=10, scale=1))
    assert picture.size == (2 * (8 + GRID_GAP) + GRID_GAP, 8 + 2 * GRID_GAP)


def test_grid_does_not_touch_its_input_and_repeats_its_bytes() -> None:
    images = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    images.flags.writeable = False
    assert image_grid(images) == image_grid(images.copy())
    assert decoded(image_grid(images)).info == {}


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 8, 8, 1), np.float32),
        np.zeros((2, 8, 8), np.uint8),
        np.zeros((2, 8, 8, 2), np.uint8),
        np.zeros((0, 8, 8, 1), np.uint8),
        np.zeros((2, 0, 8, 1), np.uint8),
    ],
)
def test_grid_refuses_what_is_no_batch_of_images(images: np.ndarray) -> None:
    with pytest.raises(UsageError, match=re.escape(f"found {images.dtype} of shape {images.shape}")):
        image_grid(images)


@pytest.mark.parametrize("argument", ["columns", "scale"])
def test_grid_refuses_nothing_across(argument: str) -> None:
    with pytest.raises(UsageError, match=f"found {argument} 0, needed at least 1"):
        image_grid(np.zeros((1, 8, 8, 1), np.uint8), **{argument: 0})


@pytest.mark.parametrize("chart", CHARTS)
def test_png_charts_decode_repeat_and_name_no_program(chart: Callable[[FigureFormat], bytes]) -> None:
    png = chart("png")
    picture = decoded(png)
    assert picture.width == 1440
    assert set(picture.info) <= {"dpi"}
    assert png == chart("png")


@pytest.mark.parametrize("chart", CHARTS)
def test_svg_charts_parse_repeat_and_refer_to_nothing_outside(chart: Callable[[FigureFormat], bytes]) -> None:
    svg = chart("svg")
    assert svg == chart("svg")
    for element in xml.etree.ElementTree.fromstring(svg.decode("utf-8")).iter():
        assert element.tag.split("}")[1] not in ("script", "image", "date", "creator")
        for name, entry in element.attrib.items():
            assert not name.endswith("href") or entry.startswith("#")


def test_charts_ignore_and_keep_the_users_settings() -> None:
    plain = layer_sqnr_figure(PER_METHOD)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "savefig.dpi": 50}):
        assert layer_sqnr_figure(PER_METHOD) == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_charts_need_neither_pyplot_nor_torch() -> None:
    script = (
        "import sys, hqdit.report.document, hqdit.report.figures as f; f.eps_sqnr_figure({'m': [(1, 2.0)]});"
        "print([name for name in ('matplotlib.pyplot', 'torch', 'diffusers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_layer_chart_keeps_forward_order_and_groups_blocks(drawn: list[Axes]) -> None:
    layer_sqnr_figure(PER_METHOD)
    (axes,) = drawn
    assert [list(line.get_ydata()) for line in axes.lines[:2]] == [list(db.values()) for db in PER_METHOD.values()]
    assert [label.get_text() for label in axes.get_xticklabels()] == TAILS * 3
    assert [text.get_text() for text in axes.texts] == ["block 0", "block 1", "block 2"]
    assert [text.get_position()[0] for text in axes.texts] == [1, 4, 7]
    assert legend_labels(axes) == list(PER_METHOD)
    assert "dB" in axes.get_ylabel()


def test_layer_chart_leaves_a_gap_for_a_missing_layer(drawn: list[Axes]) -> None:
    layer_sqnr_figure({"a": {"x": 1.0, "y": 2.0, "z": 3.0}, "b": {"x": 4.0, "z": 5.0}})
    (axes,) = drawn
    shown = np.asarray(axes.lines[1].get_ydata(), dtype=float)
    assert np.array_equal(shown, [4.0, math.nan, 5.0], equal_nan=True)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["x", "y", "z"]


def test_layer_chart_of_a_large_model_names_blocks_only(drawn: list[Axes]) -> None:
    layer_sqnr_figure({"a": {f"blocks.{block}.{tail}": 1.0 * block for block in range(40) for tail in TAILS}})
    (axes,) = drawn
    assert [label.get_text() for label in axes.get_xticklabels()] == [str(block) for block in range(0, 40, 2)]
    assert not axes.texts


def test_layer_chart_of_many_layers_without_blocks(drawn: list[Axes]) -> None:
    layer_sqnr_figure({"a": {f"layer{index}": 1.0 * index for index in range(80)}})
    (axes,) = drawn
    assert len(axes.get_xticklabels()) < 30


def test_infinite_ratios_become_triangles_at_the_edges(drawn: list[Axes]) -> None:
    layer_sqnr_figure({"a": {"x": math.inf, "y": 2.0, "z": -math.inf}})
    (axes,) = drawn
    line, top, bottom = axes.lines
    assert np.array_equal(np.asarray(line.get_ydata(), dtype=float), [math.nan, 2.0, math.nan], equal_nan=True)
    assert (list(top.get_xdata()), list(top.get_ydata()), top.get_marker()) == ([0.0], [1.0], "^")
    assert (list(bottom.get_xdata()), list(bottom.get_ydata()), bottom.get_marker()) == ([2.0], [0.0], "v")
    assert legend_labels(axes) == ["a", "exact", "nothing but noise"]


def test_a_chart_of_exact_layers_only_shows_no_invented_scale(drawn: list[Axes]) -> None:
    layer_sqnr_figure({"float32": {"x": math.inf, "y": math.inf}})
    (axes,) = drawn
    assert len(axes.get_yticks()) == 0


def test_eps_chart_runs_in_the_order_of_sampling(drawn: list[Axes]) -> None:
    eps_sqnr_figure(EPS)
    (axes,) = drawn
    assert (list(axes.lines[0].get_xdata()), list(axes.lines[0].get_ydata())) == ([20, 500, 980], [11.0, 7.0, 3.5])
    left, right = axes.get_xlim()
    assert left > right
    assert legend_labels(axes) == ["minmax W4A4", "hqdit W4A4", "exact"]


def test_methods_differ_in_colour_and_marker_then_in_line_style(drawn: list[Axes]) -> None:
    eps_sqnr_figure({f"method {index}": [(0, 1.0 * index), (1, 2.0)] for index in range(10)})
    (axes,) = drawn
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in axes.lines}
    assert len(looks) == 10
    assert (
        len({line.get_color() for line in axes.lines[:7]}) == len({line.get_marker() for line in axes.lines[:7]}) == 7
    )


@pytest.mark.parametrize(
    "name", ["\x1b[31mred", "$\\frac{", "_hidden", "数字", "<script>", "a\nb", "\udc80", "x" * 200]
)
def test_hostile_names_are_drawn_as_text_without_a_warning(name: str, drawn: list[Axes]) -> None:
    layer_sqnr_figure({name: {f"{name}.0.{name}": 1.0, f"{name}.1.{name}": 2.0}}, "svg")
    eps_sqnr_figure({name: [(0, 1.0)]})
    for axes in drawn:
        (label,) = legend_labels(axes)
        assert label.isprintable()
        assert label == name or "\\" in label or "…" in label


def test_many_long_methods_leave_room_for_the_plot(drawn: list[Axes]) -> None:
    picture = decoded(eps_sqnr_figure({f"{index} {'w' * 60}": [(0, 1.0), (1, 2.0)] for index in range(8)}))
    (axes,) = drawn
    assert axes.get_window_extent().height > 100
    assert picture.width == 1440
    legend = axes.get_legend()
    assert legend is not None
    assert 0 <= legend.get_window_extent().x0 and legend.get_window_extent().x1 <= 1440


@pytest.mark.parametrize("chart", [layer_sqnr_figure, eps_sqnr_figure])
def test_charts_refuse_emptiness(chart: Callable[[dict[str, object]], bytes]) -> None:
    with pytest.raises(UsageError, match="found no method, needed at least one"):
        chart({})
    with pytest.raises(UsageError, match="found no number for 'm'"):
        chart({"m": {}})


def test_charts_refuse_nan() -> None:
    with pytest.raises(NumericsError, match="layer SQNR figure: found a NaN for 'm'"):
        layer_sqnr_figure({"m": {"x": math.nan}})
    with pytest.raises(NumericsError, match="noise prediction figure: found a NaN for 'm'"):
        eps_sqnr_figure({"m": [(0, math.nan)]})


def test_titled_grids_keep_every_pixel_and_stand_side_by_side():
    shades = [np.full((1, 4, 4, 1), value, dtype=np.uint8) for value in (0, 100, 200)]
    panels = [(f"panel {index}", image_grid(shade, columns=1, scale=8)) for index, shade in enumerate(shades)]
    side = 4 * 8 + 2 * GRID_GAP
    picture = np.asarray(Image.open(io.BytesIO(titled_grids(panels, columns=2))).convert("L"))
    width, height = side + PANEL_GAP, side + TITLE_PIXELS
    assert picture.shape == (2 * height, 2 * width)
    for index, value in enumerate((0, 100, 200)):
        top = (index // 2) * height + TITLE_PIXELS + GRID_GAP
        left = (index % 2) * width + PANEL_GAP // 2 + GRID_GAP
        assert (picture[top : top + 32, left : left + 32] == value).all()
    assert (picture[:TITLE_PIXELS, :width] < 128).any()  # the title is drawn
    assert titled_grids(panels) == titled_grids(panels)
    with pytest.raises(UsageError, match="0 panels"):
        titled_grids([])
