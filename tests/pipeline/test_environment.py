"""What a record says of the machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

import hqdit
from hqdit.pipeline import environment
from hqdit.pipeline.environment import cpu_name, describe_environment, source_commit


def test_description() -> None:
    found = describe_environment()
    assert found["hqdit"] == hqdit.__version__
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["processor"] == cpu_name() != ""


def test_commit_is_that_of_a_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is installed inside somebody else's checkout does not have its commit."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    for place, is_checkout in (("src/hqdit/pipeline", True), (".venv/lib/site-packages/hqdit/pipeline", False)):
        (tmp_path / place).mkdir(parents=True)
        monkeypatch.setattr(environment, "__file__", str(tmp_path / place / "environment.py"))
        assert source_commit() == (head[:12] if is_checkout else None)
