"""`hqdit bench` where it cannot run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Hqdit

from hqdit.kernels.triton import library


def test_without_a_gpu_it_ends_with_6_and_one_line(
    hqdit: Hqdit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = hqdit("bench", "--device", "cuda", "--json", tmp_path / "gpu.json")
    assert outcome.code == 6
    assert "no CUDA device" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "gpu.json").exists()


def test_without_triton_it_ends_with_6_and_one_line(hqdit: Hqdit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(library, "find_spec", lambda name: None)
    outcome = hqdit("bench", "--device", "cuda", "--tune")
    assert outcome.code == 6
    assert "triton is not installed" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


def test_tiles_are_a_gpus(hqdit: Hqdit) -> None:
    outcome = hqdit("bench", "--tune")
    assert outcome.code == 2
    assert "--tune" in outcome.err
