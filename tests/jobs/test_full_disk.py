"""A real file system that is too small: no half file under a final name, and the job goes on where there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from job_runs import Command, Ended, commands, contents, run_in

from hqdit.jobs import job
from hqdit.jobs.job import job_folder

PAGE = 4096
#: Sizes of the file system, as fractions of what the whole run needs there; the last one is enough.
FRACTIONS = (0.02, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.5)


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A mounted tmpfs, to be given its size by `resize`."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def resize(folder: Path, size: int) -> None:
    pages = max(1, -(-size // PAGE))
    subprocess.run(["mount", "-o", f"remount,size={pages * PAGE}", str(folder)], check=True)


def keep_the_job() -> None:
    """In a child: what a job has finished stays when it ends."""
    job._remove = lambda folder: None


def needed_bytes(command: Command, folder: Path) -> int:
    """What a run has on disk when its output has just got its name, in whole pages: pieces and output."""
    assert run_in(folder, *command.words, prepare=keep_the_job) == Ended(0, "")
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["quantize", "sample", "evaluate"])
def test_no_space_left(name: str, models: Path, exact: dict[str, dict[str, str]], small: Path, tmp_path: Path) -> None:
    command = commands(models)[name]
    needed = needed_bytes(command, tmp_path / "undisturbed")
    refused = 0
    for number, fraction in enumerate(FRACTIONS):
        folder = small / str(number)
        folder.mkdir()
        resize(small, int(fraction * needed))
        # Without the estimate, which would refuse most sizes before anything is written.
        words = [str(folder / "out") if word == "out" else word for word in (*command.words, "--ignore-estimate")]
        done = run_in(tmp_path / str(number), *words)
        assert done.code in (0, 5) and "Traceback" not in done.err, done
        if done.code == 5:
            refused += 1
            assert not (folder / command.out).exists()
            assert {path.name for path in folder.iterdir()} <= {job_folder(folder / command.out).name}
        resize(small, 1 << 26)
        if done.code == 5:
            assert run_in(tmp_path / str(number), *words, "--resume") == Ended(0, "")
        assert contents(folder) == exact[name]
        subprocess.run(["rm", "-r", str(folder)], check=True)
    assert 0 < refused < len(FRACTIONS)


@pytest.mark.parametrize("name", ["quantize", "sample", "evaluate"])
def test_far_too_little_space_is_refused_before_the_work(name: str, models: Path, small: Path, tmp_path: Path) -> None:
    command = commands(models)[name]
    resize(small, PAGE)
    words = [str(small / "out") if word == "out" else word for word in command.words]
    done = run_in(tmp_path / "work", *words)
    assert done.code == 5 and done.err.startswith("hqdit: error: disk of ") and "--ignore-estimate" in done.err
    assert list(small.iterdir()) == []
