"""The command line in this process, and small models for it to work on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny

from hqdit.cli.main import run
from hqdit.models import torch_file, torch_file_reader


@dataclass(frozen=True)
class Outcome:
    """What one command left: exit code, standard output and standard error."""

    code: int
    out: str
    err: str

    @property
    def first_line(self) -> str:
        return self.err.splitlines()[0] if self.err else ""


Hqdit = Callable[..., Outcome]


@pytest.fixture
def hqdit(capsys: pytest.CaptureFixture[str]) -> Hqdit:
    """Run a command; arguments may be anything that has a text."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def reads_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch files, all our own, are read by the child's program in this process, where it starts in no time."""

    def run_here(path: Path, handed: Path, answer: Path, weights: str | None) -> int:
        return torch_file_reader.main([str(path), str(handed), str(answer), weights or ""])

    monkeypatch.setattr(torch_file_reader, "_limit_resources", lambda _: None)
    monkeypatch.setattr(torch_file, "_run_child", run_here)


@dataclass(frozen=True)
class Models:
    """Folders of tiny models; nobody writes into them."""

    transformer: Path
    pipeline: Path
    quantized: Path
    quantized_pipeline: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    root = tmp_path_factory.mktemp("models")
    found = Models(*(root / name for name in ("transformer", "pipeline", "quantized", "quantized_pipeline")))
    tiny.tiny_dit().save_pretrained(found.transformer)
    tiny.save_pipeline(found.pipeline, tiny.tiny_dit(), tiny.ddim())
    for source, out in ((found.transformer, found.quantized), (found.pipeline, found.quantized_pipeline)):
        assert run(["quantize", str(source), "--out", str(out), "--preset", "minmax", "--quiet"]) == 0
    return found


def tree(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of a file, or what else it is, for everything below `folder`."""

    def state(path: Path) -> str:
        if path.is_symlink():
            return f"link to {path.readlink()}"
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"

    return {str(path.relative_to(folder)): state(path) for path in sorted(folder.rglob("*"))}
