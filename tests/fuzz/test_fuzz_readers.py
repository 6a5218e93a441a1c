"""Readers of foreign bytes refuse them with an `HQDiTError` or read them: nothing else comes out, and soon.

`make test` reads the committed corpus and a few thousand mutations of it; `make soak` lets coverage guide tens of
thousands (`coverage_guided.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from coverage_guided import PROGRAM, has_atheris
from fuzz_targets import CORPUS, LARGEST_BYTES, TARGETS, corpus
from mutations import mutations

#: Mutations of each target in `make test`; those that build a model or unpickle take longest.
EXECUTIONS = {name: 250 for name in TARGETS} | {"config": 100, "description": 150, "torch_file": 200}
#: Seconds that one input may take, on a busy machine.
LONGEST = 20.0

each_target = pytest.mark.parametrize("name", sorted(TARGETS))


@pytest.fixture
def _quiet() -> None:
    """Foreign libraries may warn of bad bytes."""
    warnings.simplefilter("ignore")


@each_target
def test_seeds_are_sound_and_kept(name: str, tmp_path: Path, _quiet: None) -> None:
    """Else the mutations would all fail at the first byte."""
    TARGETS[name].prepare(tmp_path)
    seeds = [path.read_bytes() for path in sorted((CORPUS / name).glob("seed-*"))]
    assert seeds and sum(TARGETS[name](tmp_path, seed) for seed in seeds) >= 1
    assert len(seeds) == len(TARGETS[name].seeds())


@each_target
def test_the_corpus_and_mutations_of_it(
    name: str, tmp_path: Path, _quiet: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, files = TARGETS[name], corpus(name)
    monkeypatch.setattr("hqdit.models.torch_file_reader._limit_resources", lambda _: None)
    target.prepare(tmp_path)
    read = 0
    for data in [*files, *mutations(files, EXECUTIONS[name], 0, LARGEST_BYTES)]:
        begun = time.monotonic()
        try:
            read += target(tmp_path, data)
        except Exception as error:
            kept = tmp_path / "found"
            kept.write_bytes(data)
            raise AssertionError(f"{name}: found {error!r} for {data[:200]!r}, kept as {kept}") from error
        assert time.monotonic() - begun < LONGEST, data[:200]
    assert read > 0


def test_a_defect_would_be_found(tmp_path: Path) -> None:
    """The mutations reach deep: a reader with a hole in one branch fails within a few hundred of them."""
    from dataclasses import replace

    def careless(folder: Path) -> None:
        value = json.loads((folder / "names").read_text(encoding="utf-8", errors="replace"))
        _ = value["id2label"]["0"] + "x"

    target = replace(TARGETS["class_names"], read=careless)
    seen = set()
    for data in mutations(corpus("class_names"), 500, 0, LARGEST_BYTES):
        try:
            target(tmp_path, data)
        except Exception as error:
            seen.add(type(error).__name__)
    assert {"KeyError", "TypeError", "JSONDecodeError"} <= seen


@pytest.mark.soak
@pytest.mark.skipif(not has_atheris(), reason="atheris is not installed here; see CONTRIBUTING.md")
def test_coverage_guided(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--executions", "50000", "--record", str(tmp_path / "r.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert json.loads((tmp_path / "r.json").read_text())["executions"] >= 50_000
