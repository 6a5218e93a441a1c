"""The HTML page of records: whole, self-contained, escaped, and refused where a record's images are not there."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hqdit.errors import CheckpointError
from hqdit.records.run_record import Bars, Column, ImageGrid, Interval, Lines, RunRecord, Series, Table
from hqdit.report.figures import image_grid
from hqdit.report.page import render_report

HOSTILE = "<script>alert('x')</script>\x1b[31m\" onload=\"y & z {{ 7 * 7 }}"
SHOWN = "<script>alert('x')</script>\\x1b[31m\" onload=\"y & z {{ 7 * 7 }}"
PNG = image_grid(np.arange(3 * 64, dtype=np.uint8).reshape(3, 8, 8, 1), columns=3, scale=2)
VOID = {"meta", "link", "img", "br", "hr"}

RESULTS = Table(
    "Results",
    (
        Column("Model"),
        Column("Method"),
        Column("SQNR", "dB", 2, "higher is better"),
        Column("Guided", "dB", 1, "higher is better"),
        Column("Accuracy", "%", 1, "of the samples"),
        Column("Images"),
    ),
    (
        ("digits", "float32", math.inf, None, 99.25, 2048),
        ("digits", "minmax", 12.345, Interval(12.34, 11.9, 12.8), 90.0, 2048),
        ("shapes", "minmax", -math.inf, Interval(2e7, -math.inf, math.inf), 5.0, 12),
    ),
    "All of them.",
)
LINES = Lines("By step", "t", "dB", (Series("a", (1.0, None), (2.0, 1.0)),), "falling")
BARS = Bars("By layer", tuple(f"blocks.{b}.fc" for b in range(20)), "dB", (Series("a", (1.0,) * 20),))


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

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.text.append((self._open[-1], data.strip()))

    def texts(self, *tags: str) -> list[str]:
        return [text for tag, text in self.text if tag in tags]

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def record(**changes: object) -> RunRecord:
    whole = RunRecord(
        name="table-w4a4",
        title="Methods",
        question="Which is better?",
        answers=("This one.", "By 2 dB."),
        tables=(RESULTS,),
        images=(ImageGrid("float32", "a.png", "three samples"), ImageGrid("minmax", "deep/b.png")),
        config={"steps_taken": 20, "methods": ["a", "b"], "note": None},
        environment={"processor": "Some CPU"},
        seconds=12.34,
        notes=("A limit.",),
    )
    return dataclasses.replace(whole, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run" / "deep").mkdir(parents=True)
    (tmp_path / "run" / "a.png").write_bytes(PNG)
    (tmp_path / "run" / "deep" / "b.png").write_bytes(PNG)
    return tmp_path / "run"


def rendered(folder: Path, **changes: object) -> str:
    return render_report([(folder, record(**changes))])


def test_every_part_of_a_record_is_on_the_page(folder: Path) -> None:
    html = rendered(folder, figures=(LINES, BARS))
    assert html.startswith("<!DOCTYPE html>")
    page = Page(html)
    assert page.attributes("html") == [{"lang": "en"}]
    assert page.texts("title") == page.texts("h1") == ["hqdit report"]
    assert page.texts("h2") == ["Methods"]
    assert page.texts("h3") == ["Tables", "Figures", "Images", "Notes", "What was run"]
    assert page.texts("h4") == ["Results", "By step", "By layer", "float32", "minmax"]
    assert page.texts("li") == ["This one.", "By 2 dB.", "A limit."]
    prose = page.texts("p")
    assert {"Which is better?", "All of them.", "falling", "three samples"} <= set(prose)
    facts = page.texts("dl", "dt", "dd")
    for fact in ("12.3 s", "steps taken", "20", "methods", '["a", "b"]', "processor", "Some CPU"):
        assert fact in facts
    assert "note" not in facts


def test_cells_show_units_intervals_and_what_is_missing(folder: Path) -> None:
    page = Page(rendered(folder))
    body = page.text[next(i for i, (_, text) in enumerate(page.text) if text == "digits") :]
    cells = [text for tag, text in body if tag in ("td", "span")][: 3 * 6]
    assert cells == [
        *("digits", "float32", "exact", "-", "99.2", "2,048"),
        *("digits", "minmax", "12.35", "12.3 [11.9, 12.8]", "90.0", "2,048"),
        *("shapes", "minmax", "-inf", "2e+07 [-inf, exact]", "5.0", "12"),
    ]
    headers = " ".join(text for tag, text in page.text[: page.text.index(("span", "digits"))] if tag == "span")
    assert headers == "Model Method SQNR (dB) Guided (dB) Accuracy (%) Images"
    assert page.texts("dt")[:2] == ["SQNR (dB), Guided (dB)", "Accuracy (%)"]
    (remark,) = [text for text in page.texts("p") if text.startswith("-: ")]
    assert "exact: no difference" in remark and "95 % confidence interval" in remark


def test_brackets_say_what_they_hold_by_column(folder: Path) -> None:
    cell = Interval(2.0, 1.0, 3.0)

    def remark(*intervals: str) -> list[str]:
        columns = tuple(Column(f"c{place}", "ms", interval=text) for place, text in enumerate(intervals))
        table = Table(
            "t", (Column("n"), *columns, Column("d", interval="never")), (("x", *(cell,) * len(columns), 1.0),)
        )
        return [text for text in Page(rendered(folder, tables=(table,))).texts("p") if text.startswith("In brackets")]

    assert remark("range of 5 repeats") == remark("range of 5 repeats", "range of 5 repeats")
    assert remark("range of 5 repeats") == ["In brackets: range of 5 repeats."]
    assert remark("a", "b", "a") == ["In brackets: a (c0 (ms), c2 (ms)); b (c1 (ms))."]
    assert remark() == []


def test_a_rule_is_drawn_where_a_group_of_rows_begins(folder: Path) -> None:
    rows = [attributes.get("class") for attributes in Page(rendered(folder)).attributes("tr")]
    assert rows == [None, None, None, "group"]
    alone = dataclasses.replace(RESULTS, rows=RESULTS.rows[1:])
    assert "group" not in [a.get("class") for a in Page(rendered(folder, tables=(alone,))).attributes("tr")]


def test_contents_lead_to_sections_with_names_of_their_own(folder: Path) -> None:
    records = [record(), record(), record(name=HOSTILE), record(name="数字")]
    page = Page(render_report([(folder, entry) for entry in records], "several"))
    anchors = [attributes["id"] for attributes in page.attributes("section")]
    assert anchors == ["table-w4a4", "table-w4a4-2", "script-alert-x-script-31m-onload-y-z-7-7", "run"]
    assert [attributes["href"] for attributes in page.attributes("a")] == [f"#{anchor}" for anchor in anchors]
    assert page.texts("h1") == ["several"]
    assert not Page(rendered(folder)).attributes("nav")


def test_nothing_is_loaded_or_run_from_anywhere(folder: Path) -> None:
    page = Page(rendered(folder, figures=(LINES,)))
    tags = {tag for tag, _ in page.tags}
    assert tags.isdisjoint({"script", "link", "iframe", "object", "embed", "base", "form"})
    for tag, attributes in page.tags:
        for name, entry in attributes.items():
            assert not name.startswith("on") and name not in ("srcset", "style", "action")
            assert name != "src" or (tag == "img" and str(entry).startswith("data:image/"))
            assert name != "href" or (tag == "a" and str(entry).startswith("#"))
    style = "".join(page.texts("style"))
    assert "url(" not in style and "@import" not in style
    policy = next(a for a in page.attributes("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert "prefers-color-scheme: dark" in style and "image-rendering: pixelated" in style and "@media print" in style


def test_images_are_inside_with_size_and_alternative_text(folder: Path) -> None:
    page = Page(rendered(folder, figures=(LINES, BARS)))
    images = page.attributes("img")
    assert [image["alt"] for image in images] == [
        "Chart: By step",
        "Chart: By layer",
        "Images: float32",
        "Images: minmax",
    ]
    charts, grids = images[:2], images[2:]
    assert all(str(chart["src"]).startswith("data:image/svg+xml;base64,") for chart in charts)
    size = Image.open(io.BytesIO(PNG)).size
    for grid in grids:
        kind, _, content = str(grid["src"]).partition(";base64,")
        assert kind == "data:image/png" and base64.b64decode(content, validate=True) == PNG
        assert (grid["width"], grid["height"]) == (str(size[0]), str(size[1]))
    classes = [attributes.get("class") for attributes in page.attributes("figure")]
    assert classes == [None, "wide", None, None]


def test_everything_from_outside_is_escaped(folder: Path) -> None:
    html = rendered(
        folder,
        name=HOSTILE,
        title=HOSTILE,
        question=HOSTILE,
        answers=(HOSTILE,),
        tables=(Table(HOSTILE, (Column(HOSTILE, HOSTILE, 1, HOSTILE),), ((HOSTILE,),), HOSTILE),),
        figures=(Lines(HOSTILE, HOSTILE, HOSTILE, (Series(HOSTILE, (1.0,), (1.0,)),), HOSTILE),),
        images=(ImageGrid(HOSTILE, "a.png", HOSTILE),),
        config={HOSTILE: HOSTILE, "nested": [HOSTILE]},
        environment={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
    )
    assert "\x1b" not in html and "<script" not in html
    page = Page(html)
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    for tag, count in (("h2", 1), ("h4", 3), ("li", 2), ("dt", 2), ("dd", 4)):
        assert page.texts(tag).count(SHOWN) == count
    assert {image["alt"] for image in page.attributes("img")} == {f"Chart: {SHOWN}", f"Images: {SHOWN}"}


def test_parts_without_content_are_left_out(folder: Path) -> None:
    page = Page(rendered(folder, tables=(), images=(), notes=(), answers=()))
    assert page.texts("h3") == ["What was run"]
    assert not page.attributes("li")


def test_equal_records_give_equal_pages(folder: Path) -> None:
    assert rendered(folder, figures=(LINES,)) == rendered(folder, figures=(LINES,))


@pytest.mark.parametrize("content", [b"", b"GIF89a", PNG[:20], b"<svg/>"])
def test_an_image_that_is_no_png_is_refused(folder: Path, content: bytes) -> None:
    (folder / "a.png").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.png: found bytes that are no PNG"):
        rendered(folder)


def test_a_missing_image_is_refused_in_one_line(folder: Path) -> None:
    (folder / "a.png").unlink()
    with pytest.raises(CheckpointError, match=r"a\.png: found no image that can be read .*needed .*Fix: ") as error:
        rendered(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["../outside.png", "/etc/hostname", "deep/../../outside.png"])
def test_a_record_reads_nothing_outside_its_folder(folder: Path, file: str) -> None:
    (folder.parent / "outside.png").write_bytes(PNG)
    with pytest.raises(CheckpointError, match="outside its record's folder"):
        rendered(folder, images=(ImageGrid("x", file),))
