"""Killed at any point, a job goes on with --resume and ends with the same bytes; what was there before stays."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from job_runs import Command, Ended, commands, contents, ended, run_in, start
from kill_points import count_into, kill_at

from hqdit.jobs.job import job_folder
from hqdit.pipeline.manifest import MANIFEST_NAME

POINTS = {"quantize": 20, "sample": 10, "evaluate": 10}
RANDOM_KILLS = {"quantize": 10, "sample": 5, "evaluate": 5}
each_command = pytest.mark.parametrize("name", sorted(POINTS))


def points_of(command: Command, folder: Path) -> int:
    """How many points an undisturbed run passes."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    assert run_in(folder, *command.words, prepare=count_into(writing)) == Ended(0, "")
    count = len(os.read(reading, 1 << 16))
    os.close(reading)
    os.close(writing)
    return count


def require_whole(folder: Path, command: Command, wanted: dict[str, str]) -> bool:
    """Whether the output is there; if so it is the whole one, for no final name ever holds less."""
    out = folder / command.out
    if out.exists():
        found = {name: value for name, value in contents(folder).items() if name.split("/")[0] == command.out}
        assert found == wanted
    return out.exists()


def require_resumed(folder: Path, command: Command, wanted: dict[str, str]) -> None:
    """`--resume` leads to the exact result, and nothing else is left."""
    if require_whole(folder, command, wanted) and not job_folder(folder / command.out).exists():
        # Killed after the job had ended. One that has ended is not begun again without --overwrite.
        assert run_in(folder, *command.words, "--resume").code in (0, 2)
        again = run_in(folder, *command.words, "--resume", "--overwrite")
    else:
        again = run_in(folder, *command.words, "--resume")
    assert again == Ended(0, "")
    assert contents(folder) == wanted


@each_command
def test_killed_at_points(name: str, models: Path, exact: dict[str, dict[str, str]], tmp_path: Path) -> None:
    command = commands(models)[name]
    count = points_of(command, tmp_path / "count")
    assert count > POINTS[name]
    # Spread evenly, the first and the last among them.
    for number in range(POINTS[name]):
        point = number * (count - 1) // (POINTS[name] - 1)
        folder = tmp_path / str(point)
        assert run_in(folder, *command.words, prepare=kill_at(point)).code == -signal.SIGKILL
        require_resumed(folder, command, exact[name])


@each_command
def test_killed_at_random_times(name: str, models: Path, exact: dict[str, dict[str, str]], tmp_path: Path) -> None:
    command = commands(models)[name]
    begun = time.monotonic()
    assert run_in(tmp_path / "undisturbed", *command.words).code == 0
    whole = time.monotonic() - begun
    draw = random.Random(name)
    killed = 0
    for number in range(RANDOM_KILLS[name]):
        folder = tmp_path / str(number)
        process = start(command.words, folder)
        time.sleep(draw.uniform(0, whole))  # a moment, not a deadline: whatever it hits has to be right
        os.kill(process, signal.SIGKILL)
        killed += ended(process, folder).code == -signal.SIGKILL
        require_resumed(folder, command, exact[name])
    assert killed > 0


def test_killed_again_and_again(models: Path, exact: dict[str, dict[str, str]], tmp_path: Path) -> None:
    """Every run gets a little further than the one before, whatever it is stopped by."""
    command = commands(models)["quantize"]
    folder = tmp_path / "work"
    for point in (30, 40, 50, 60):
        assert run_in(folder, *command.words, "--resume", prepare=kill_at(point)).code == -signal.SIGKILL
    require_resumed(folder, command, exact["quantize"])


@pytest.mark.parametrize("name", ["quantize", "sample"])
def test_what_was_there_stays_until_the_new_one_is_whole(
    name: str, models: Path, exact: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    command = commands(models)[name]
    folder = tmp_path / "old"
    (folder / command.out).mkdir(parents=True)
    (folder / command.out / "precious").write_text("the only copy")
    count = points_of(command, tmp_path / "count")
    for back in (1, 3, 5, 7, 9, 11, 13, 15, 17):  # the points around the moment when it gets its name
        words = (*command.words, "--overwrite")
        assert run_in(folder, *words, prepare=kill_at(count - back)).code in (-signal.SIGKILL, 0)
        if (folder / command.out / "precious").exists():
            assert {path.name for path in (folder / command.out).iterdir()} == {"precious"}
        else:
            assert require_whole(folder, command, exact[name])
        assert run_in(folder, *words, "--resume") == Ended(0, "")
        assert contents(folder) == exact[name]
        (folder / command.out / "precious").write_text("the only copy")
        for path in sorted((folder / command.out).rglob("*"), reverse=True):
            if path.name != "precious":
                path.unlink() if path.is_file() else path.rmdir()


def test_at_most_one_block_is_redone(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two blocks, the finished one is taken from the job: its layers are not quantized again."""
    command = commands(models)["quantize"]
    folder = tmp_path / "work"

    def counting(stop_at: int) -> None:
        from hqdit.jobs.stores import JobBlocks
        from hqdit.pipeline.input_group import InputGroup

        quantize, keep = InputGroup.quantize, JobBlocks.keep

        def noted(self: InputGroup, *arguments: object) -> None:
            with (folder.parent / "groups").open("a") as file:
                file.write(self._first.site.name + "\n")
            quantize(self, *arguments)  # type: ignore[arg-type]

        def kept(self: JobBlocks, block: int, *arguments: object) -> None:
            keep(self, block, *arguments)  # type: ignore[arg-type]
            if block == stop_at:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(InputGroup, "quantize", noted)
        monkeypatch.setattr(JobBlocks, "keep", kept)

    assert run_in(folder, *command.words, prepare=lambda: counting(0)).code == -signal.SIGKILL
    assert run_in(folder, *command.words, "--resume", prepare=lambda: counting(-1)).code == 0
    groups = (tmp_path / "groups").read_text().splitlines()
    assert len(groups) == len(set(groups)) == 10  # five inputs in each of two blocks, each once in both runs together
    assert (folder / command.out / MANIFEST_NAME).exists()
