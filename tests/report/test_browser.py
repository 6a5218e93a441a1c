"""The page in a real browser: headless Chromium opens it, every image decodes, and nothing is asked of anybody else."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hqdit.records.run_record import (
    Bars,
    Column,
    FormatMap,
    Heatmap,
    Histogram,
    ImageGrid,
    Interval,
    Lines,
    RunRecord,
    Series,
    Table,
)
from hqdit.report.figures import image_grid
from hqdit.report.page import render_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no chromium or chrome on the PATH; Debian's package is chromium"
)

#: Added to a copy of the page only, whose policy is widened for it: reports what the browser made of the page.
PROBE = """<script>
const found = {violations: [], errors: []};
addEventListener("securitypolicyviolation", event => found.violations.push(event.blockedURI));
addEventListener("error", event => found.errors.push(String(event.message || event.target.src).slice(0, 60)), true);
addEventListener("load", async () => {
  found.images = document.images.length;
  const decoded = await Promise.allSettled([...document.images].map(image => image.decode()));
  found.broken = decoded.filter(result => result.status === "rejected").length;
  found.empty = [...document.images].filter(image => !image.naturalWidth || !image.clientWidth).length;
  found.resources = performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 60));
  found.width = innerWidth;
  found.overflow = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  found.clipped = [...document.querySelectorAll("table, figure")].filter(element => {
    const box = element.closest(".scroll") || element.parentElement;
    return getComputedStyle(box).overflowX !== "auto" && element.scrollWidth > box.clientWidth + 1;
  }).length;
  found.pixelated = [...document.querySelectorAll(".grids img")].every(
    image => getComputedStyle(image).imageRendering === "pixelated");
  document.body.replaceChildren();
  document.title = JSON.stringify(found);
});
</script>"""


@dataclass(frozen=True)
class Visit:
    """What a browser left: the page's final title and the lines of its console."""

    title: str
    console: list[str]


def visit(page: Path, width: int, *flags: str) -> Visit:
    profile = page.parent / "profile"
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",  # the tests may run as root, where the sandbox refuses
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--enable-logging=stderr",
        "--virtual-time-budget=20000",
        f"--user-data-dir={profile}",
        f"--window-size={width},900",
        *flags,
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
    assert title is not None, done.stderr[-2000:]
    return Visit(html.unescape(title[1]), [line for line in done.stderr.splitlines() if ":CONSOLE" in line])


def probed(page: Path, width: int, *flags: str) -> dict[str, Any]:
    """What the probe found on a copy of `page`."""
    text = page.read_text(encoding="utf-8")
    policy = "style-src 'unsafe-inline'"
    assert policy in text
    copy = page.with_name("probed.html")
    widened = text.replace(policy, f"{policy}; script-src 'unsafe-inline'", 1)
    copy.write_text(widened.replace("<style>", f"{PROBE}<style>", 1), encoding="utf-8")
    found = json.loads(visit(copy, width, *flags).title)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every kind of table, figure and image, names that try to break out included."""
    folder = tmp_path_factory.mktemp("browser")
    hostile = '<script>document.title="run"</script><img src="http://example.com/x.png" onerror="alert(1)">'
    (folder / "grid.png").write_bytes(image_grid(np.arange(12 * 64, dtype=np.uint8).reshape(12, 8, 8, 1)))
    steps = tuple(map(float, range(950, -1, -50)))
    layers = tuple(f"blocks.{block}.{tail}" for block in range(6) for tail in ("q", "k", "v", "out", "fc1", "fc2"))
    line = Series("m", tuple(step / 100 for step in steps), steps)
    columns = (Column("Method"), *(Column(f"Column {index}", "dB", 2, hostile) for index in range(8)))
    record = RunRecord(
        name="browser",
        title=hostile,
        question=hostile,
        answers=(hostile,),
        tables=(Table(hostile, columns, tuple((hostile, *(Interval(12.34, 11.0, 13.0),) * 8) for _ in range(3))),),
        figures=(
            Lines(hostile, hostile, "y", (line,)),
            Bars("layers", layers, "dB", (Series(hostile, tuple(map(float, range(36)))),)),
            Histogram("h", "x", (0.0, 1.0, 2.0), (Series("s", (0.5, 0.5)),)),
            Heatmap("m", ("a", "b"), tuple(map(str, steps)), (tuple(steps), tuple(steps)), "dB"),
            FormatMap("f", layers, tuple({"e2m1": 0.5, "e1m2": 0.5} for _ in layers)),
        ),
        images=(ImageGrid(hostile, "grid.png", hostile), ImageGrid("b", "grid.png")),
        config={hostile: hostile},
        notes=(hostile,),
    )
    path = folder / "report.html"
    path.write_text(render_report([(folder, record), (folder, record)]), encoding="utf-8")
    return path


def test_the_page_itself_opens_without_a_word_on_the_console(page: Path) -> None:
    seen = visit(page, 1280)
    assert seen == Visit("hqdit report", [])


@pytest.mark.parametrize(("width", "scheme"), [(400, 0), (1280, 1)], ids=["phone, dark", "desktop, light"])
def test_every_image_decodes_and_nothing_is_requested(page: Path, width: int, scheme: int) -> None:
    found = probed(page, width, f"--blink-settings=preferredColorScheme={scheme}")
    assert found.pop("width") <= max(width, 500)  # some versions open no window under 500 pixels
    assert found == {
        "violations": [],
        "errors": [],
        "images": 2 * (5 + 2),
        "broken": 0,
        "empty": 0,
        "resources": [],
        "overflow": 0,
        "clipped": 0,
        "pixelated": True,
    }


def test_the_probe_sees_what_it_looks_for(page: Path) -> None:
    bad = page.with_name("bad.html")
    extra = '<img src="http://127.0.0.1:9/x.png"><img src="data:image/png;base64,AAAA"><p style="width:9000px">wide</p>'
    bad.write_text(page.read_text(encoding="utf-8").replace("<h1>", f"{extra}<h1>", 1), encoding="utf-8")
    found = probed(bad, 1280)
    assert found["broken"] == 2 and found["empty"] == 2 and found["overflow"] > 1000
    assert found["violations"] and found["errors"]
    assert visit(bad, 1280).console
