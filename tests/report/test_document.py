"""The HTML report: whole, self-contained, escaped."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from hqdit.errors import UsageError
from hqdit.report.document import render_demo_report
from hqdit.report.figures import image_grid
from hqdit.report.tables import DemoRow, columns

EXTRACTOR = "digits-cnn-v1"
HOSTILE = "<script>alert('x')</script>\x1b[31m\" onload=\"y & z"
SHOWN = "<script>alert('x')</script>\\x1b[31m\" onload=\"y & z"
PNG = image_grid(np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8, 1), columns=3, scale=2)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
ROWS = [
    DemoRow("digits", "float32", None, 8012344, math.inf, math.inf, 0.992, 0.084, None),
    DemoRow("digits", "minmax W4A4", 4.11, 1212344, 18.41, 16.23, 0.969, 0.412, 3.2),
    DemoRow("digits, outliers c = 10", "hqdit W4A4", 4.22, 1233120, 16.07, None, 0.961, 0.655, 42.3),
]
VOID = {"meta", "link", "img", "br", "hr"}


class Page(HTMLParser):
    """Tags with attributes, the text of each tag, and a check that every tag is closed in turn."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[tuple[str, str]] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
            self.text.append((tag, ""))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self._open[-1], data.strip()))

    def texts(self, *tags: str) -> list[str]:
        return [text for tag, text in self.text if tag in tags and text]

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def rendered(**changes: object) -> str:
    arguments: dict[str, object] = {
        "rows": ROWS,
        "grids": [("digits: float32", "3 samples", PNG), ("digits: minmax", "", PNG)],
        "figures": [("Layer SQNR", "by layer", SVG, "image/svg+xml"), ("Noise SQNR", "", PNG, "image/png")],
        "facts": {"Machine": "2 cores", "Seed": "0"},
        "extractor": EXTRACTOR,
        "notes": ["first note", "second note"],
    }
    return render_demo_report(**{**arguments, **changes})  # type: ignore[arg-type]


def test_report_parses_and_has_its_title() -> None:
    html = rendered()
    assert html.startswith("<!DOCTYPE html>")
    page = Page(html)
    assert page.texts("title") == page.texts("h1") == ["hqdit demo"]
    assert page.attributes("html") == [{"lang": "en"}]


def test_table_holds_every_cell_and_marks_where_the_model_changes() -> None:
    page = Page(rendered())
    body = page.tags[[tag for tag, _ in page.tags].index("tbody") :]
    assert [attributes.get("class") for tag, attributes in body if tag == "tr"] == [None, None, "model"]
    expected = [column.cell(row) for row in ROWS for column in columns(EXTRACTOR)]
    cells = page.text[[tag for tag, _ in page.text].index("tbody") :]
    assert [text for tag, text in cells if tag in ("td", "span") and text] == expected
    words = page.text[: [tag for tag, _ in page.text].index("tbody")]
    assert " ".join(text for tag, text in words if tag == "span" and text) == " ".join(
        column.title for column in columns(EXTRACTOR)
    )


def test_every_column_is_explained_and_the_limits_are_named() -> None:
    page = Page(rendered())
    for column in columns(EXTRACTOR):
        assert column.title in page.texts("dt")
        assert column.meaning in page.texts("dd")
    limits = " ".join(page.texts("li"))
    assert f"come from {EXTRACTOR}" in limits
    assert "equal sample counts" in limits


def test_nothing_is_loaded_or_run_from_anywhere() -> None:
    page = Page(rendered())
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    for tag, attributes in page.tags:
        for name, entry in attributes.items():
            assert not name.startswith("on")
            assert name not in ("href", "srcset", "style", "action")
            assert name != "src" or (tag == "img" and str(entry).startswith("data:image/"))
    style = "".join(page.texts("style"))
    assert "url(" not in style and "@import" not in style
    policy = next(a for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "prefers-color-scheme: dark" in style and "image-rendering: pixelated" in style


def test_images_are_inside_with_size_and_alternative_text() -> None:
    images = Page(rendered()).attributes("img")
    kinds = [str(image["src"]).partition(";base64,")[0] for image in images]
    assert kinds == ["data:image/png", "data:image/png", "data:image/svg+xml", "data:image/png"]
    contents = [base64.b64decode(str(image["src"]).partition(";base64,")[2], validate=True) for image in images]
    assert contents == [PNG, PNG, SVG, PNG]
    size = Image.open(io.BytesIO(PNG)).size
    assert all((image["width"], image["height"]) == (str(size[0]), str(size[1])) for image in images[:2])
    assert [image["alt"] for image in images] == [
        "Grid of sampled images: digits: float32",
        "Grid of sampled images: digits: minmax",
        "Chart: Layer SQNR",
        "Chart: Noise SQNR",
    ]


def test_everything_from_outside_is_escaped() -> None:
    row = dataclasses.replace(ROWS[0], model=HOSTILE, method=HOSTILE)
    page_text = rendered(
        rows=[row],
        grids=[(HOSTILE, HOSTILE, PNG)],
        figures=[(HOSTILE, HOSTILE, PNG, "image/png")],
        facts={HOSTILE: HOSTILE},
        extractor=HOSTILE,
        notes=[HOSTILE],
    )
    assert "\x1b" not in page_text
    assert "<script" not in page_text
    page = Page(page_text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.texts("span").count(SHOWN) == 2  # model and method
    assert page.texts("h3") == [SHOWN, SHOWN]
    assert page.texts("figcaption", "p").count(SHOWN) == 2
    assert SHOWN in page.texts("dt") and SHOWN in page.texts("dd") and SHOWN in page.texts("li")
    assert [image["alt"] for image in page.attributes("img")] == [
        f"Grid of sampled images: {SHOWN}",
        f"Chart: {SHOWN}",
    ]


def test_template_syntax_in_a_name_is_only_text() -> None:
    page = Page(rendered(notes=["{{ 7 * 7 }} {% raw %}"]))
    assert "{{ 7 * 7 }} {% raw %}" in page.texts("li")


def test_sections_without_content_are_left_out() -> None:
    full = Page(rendered()).texts("h2")
    bare = Page(rendered(rows=[], grids=[], figures=[], facts={}, notes=[])).texts("h2")
    assert set(full) - set(bare) == {"Samples", "Where the error arises", "Notes on this run", "How this was made"}


def test_equal_input_gives_equal_text() -> None:
    assert rendered() == rendered()


@pytest.mark.parametrize("content", [b"", b"GIF89a", PNG[:20]])
def test_a_grid_that_is_no_png_is_refused(content: bytes) -> None:
    with pytest.raises(UsageError, match="image grid 'g': found bytes that are no PNG"):
        rendered(grids=[("g", "", content)])


def test_a_figure_of_another_type_is_refused() -> None:
    with pytest.raises(UsageError, match="figure 'f': found MIME type 'text/html'"):
        rendered(figures=[("f", "", b"<b>", "text/html")])


def test_an_extractor_without_a_name_is_refused() -> None:
    with pytest.raises(UsageError, match="extractor without a name"):
        rendered(extractor="")
