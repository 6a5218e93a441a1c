"""Models that jobs work on, and what they give when nothing disturbs them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny
from job_runs import SMALL, Ended, commands, contents, run_in

from hqdit.cli.main import run


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `pipe`, a tiny model, and `quantized`."""
    root = tmp_path_factory.mktemp("job models")
    short = root.parent / "job-models"
    shutil.rmtree(short, ignore_errors=True)
    root.rename(short)
    tiny.save_pipeline(short / "pipe", tiny.tiny_dit(**SMALL), tiny.ddim())
    words = ["quantize", f"{short}/pipe", "--out", f"{short}/quantized", "--preset", "minmax", "--quiet"]
    assert run(words) == 0
    return short


@pytest.fixture(scope="session")
def exact(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Name of a command -> its whole result when nothing disturbs it."""
    found = {}
    for name, command in commands(models).items():
        folder = tmp_path_factory.mktemp(f"exact-{name}")
        done = run_in(folder, *command.words)
        assert done == Ended(0, ""), done
        found[name] = contents(folder)
        assert found[name], name
    return found


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
