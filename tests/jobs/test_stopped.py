"""Signals, lack of space, another request: what a stopped job says, and what it may be resumed with."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from job_runs import Command, Ended, commands, contents, run_in
from kill_points import at_every_point, kill_at

from hqdit.cli.job import shell_words
from hqdit.jobs.job import job_folder
from hqdit.jobs.lock import lock_path
from hqdit.jobs.stores import JobBlocks

#: A point at which a piece is finished.
MIDDLE = 45


def stop_at(point: int, number: int) -> object:
    return lambda: at_every_point(lambda now: os.kill(os.getpid(), number) if now == point else None)


def kill_after_block(number: int) -> Callable[[], None]:
    """A preparation after which the child kills itself when it has kept this block."""

    def prepare() -> None:
        keep = JobBlocks.keep

        def kept(self: JobBlocks, block: int, *arguments: Any) -> None:
            keep(self, block, *arguments)
            if block == number:
                os.kill(os.getpid(), signal.SIGKILL)

        JobBlocks.keep = kept  # type: ignore[method-assign]

    return prepare


def resume_line(err: str) -> tuple[str, ...]:
    """The words of the command that a stopped run prints."""
    (line,) = [line for line in err.splitlines() if "--resume" in line]
    return tuple(shlex.split(line[line.index("hqdit ", len("hqdit: ")) :]))[1:]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("name", ["quantize", "sample", "evaluate"])
def test_a_signal_leaves_a_job_and_the_command_that_goes_on(
    name: str, number: int, code: int, models: Path, exact: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    command = commands(models)[name]
    folder = tmp_path / "work"
    done = run_in(folder, *command.words, prepare=stop_at(MIDDLE, number))  # type: ignore[arg-type]
    assert done.code == code and "Traceback" not in done.err, done
    assert {path.name for path in folder.iterdir()} == {job_folder(folder / command.out).name}
    assert run_in(folder, *resume_line(done.err)) == Ended(0, "")
    assert contents(folder) == exact[name]


def test_before_anything_is_finished_a_signal_leaves_nothing(models: Path, tmp_path: Path) -> None:
    command = commands(models)["sample"]
    done = run_in(tmp_path / "work", *command.words, prepare=stop_at(5, signal.SIGINT))  # type: ignore[arg-type]
    assert done.code == 130 and "Fix: run the same command again" in done.err
    assert list((tmp_path / "work").iterdir()) == []


def test_a_full_disk_leaves_a_job_to_be_resumed(models: Path, exact: dict[str, dict[str, str]], tmp_path: Path) -> None:
    command = commands(models)["quantize"]

    def fail(now: int) -> None:
        if now >= MIDDLE:
            raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    done = run_in(tmp_path / "work", *command.words, prepare=lambda: at_every_point(fail))
    assert done.code == 5 and "No space left" in done.err.splitlines()[0]
    assert run_in(tmp_path / "work", *resume_line(done.err)) == Ended(0, "")
    assert contents(tmp_path / "work") == exact["quantize"]


@pytest.fixture
def stopped(models: Path, tmp_path: Path) -> tuple[Path, Command]:
    """A folder with a quantization that was killed after its first block."""
    command = commands(models)["quantize"]
    assert run_in(tmp_path / "work", *command.words, prepare=kill_at(MIDDLE)).code == -signal.SIGKILL
    lock_path(tmp_path / "work" / command.out).unlink()  # the next run would remove it, whatever else it does
    return tmp_path / "work", command


def test_a_begun_job_is_neither_lost_nor_taken_up_unasked(
    stopped: tuple[Path, Command], exact: dict[str, dict[str, str]]
) -> None:
    folder, command = stopped
    before = contents(folder)
    done = run_in(folder, *command.words)
    assert done.code == 2 and "--resume goes on" in done.err and "--overwrite discards" in done.err
    assert {**contents(folder)} == before
    assert run_in(folder, *command.words, "--overwrite") == Ended(0, "")
    assert contents(folder) == exact["quantize"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--alpha", "0.6"), "config.alpha: "),
        (("--seed", "1"), "config.seed: 0 when the job was begun, 1 now"),
        (("--calibration-samples", "9"), "calibration: "),
        (("--threads", "2"), "threads: 1 when the job was begun, 2 now"),
        (("--backend", "reference"), "backend: "),
    ],
)
def test_another_request_is_refused_with_a_table(
    stopped: tuple[Path, Command], more: tuple[str, ...], words: str
) -> None:
    folder, command = stopped
    before = contents(folder)
    done = run_in(folder, *command.words, *more, "--resume")
    assert done.code == 2 and "differs in" in done.err
    assert any(line.startswith(f"  {words}") for line in done.err.splitlines())
    assert contents(folder) == before


def test_another_model_or_other_code_is_refused(
    stopped: tuple[Path, Command], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, command = stopped
    source = Path(command.words[1])
    other = Path(shutil.copytree(source, tmp_path / "other"))
    (other / "README.md").write_text("another readme, which would be copied")
    words = [str(other) if word == str(source) else word for word in command.words]
    done = run_in(folder, *words, "--resume")
    assert done.code == 2 and "  model: " in done.err and "differs in 1 places" in done.err

    def change_code() -> None:
        monkeypatch.setattr("hqdit.jobs.description.code_digest", lambda: "0" * 64)

    done = run_in(folder, *command.words, "--resume", prepare=change_code)
    assert done.code == 2 and "  code: " in done.err and '"0000' in done.err


@pytest.mark.parametrize(
    "options",
    [
        ("--preset", "svdquant", "--low-rank", "4"),
        ("--preset", "fpq"),
        ("--preset", "smoothquant"),
        ("--preset", "minmax"),
        ("--activation-granularity", "channel-token", "--format-granularity", "channel"),
        ("--no-fold-value-rotation", "--no-modulation", "--keep-dtype", "bfloat16"),
    ],
    ids=" ".join,
)
def test_every_kind_of_layer_goes_through_a_job(options: tuple[str, ...], models: Path, tmp_path: Path) -> None:
    words = (*commands(models)["quantize"].words, *options)
    assert run_in(tmp_path / "whole", *words) == Ended(0, "")
    assert run_in(tmp_path / "work", *words, prepare=kill_after_block(0)).code == -signal.SIGKILL
    assert run_in(tmp_path / "work", *words, "--resume") == Ended(0, "")
    assert contents(tmp_path / "work") == contents(tmp_path / "whole")


def test_a_copy_of_the_model_elsewhere_is_the_same_model(
    stopped: tuple[Path, Command], exact: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    folder, command = stopped
    source = Path(command.words[1])
    copy = shutil.copytree(source, tmp_path / "copy")
    words = [str(copy) if word == str(source) else word for word in command.words]
    assert run_in(folder, *words, "--resume") == Ended(0, "")
    assert contents(folder) == exact["quantize"]


def test_a_damaged_piece_is_made_again_and_said(
    stopped: tuple[Path, Command], exact: dict[str, dict[str, str]]
) -> None:
    folder, command = stopped
    (piece,) = job_folder(folder / command.out).glob("block-0000-*")
    content = bytearray(piece.read_bytes())
    content[-1] ^= 1
    piece.write_bytes(content)
    done = run_in(folder, *command.words, "--resume")
    assert done.code == 0 and "block-0000 was changed after it was finished" in done.err
    assert contents(folder) == exact["quantize"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"code": 1}', b"\xff"])
def test_a_damaged_description_is_refused(stopped: tuple[Path, Command], content: bytes) -> None:
    folder, command = stopped
    (job_folder(folder / command.out) / "job.json").write_bytes(content)
    done = run_in(folder, *command.words, "--resume")
    assert done.code in (2, 3) and "Fix: " in done.err and "--overwrite" in done.err


def test_resume_without_a_job_begins_one(models: Path, exact: dict[str, dict[str, str]], tmp_path: Path) -> None:
    for name, command in commands(models).items():
        assert run_in(tmp_path / name, *command.words, "--resume") == Ended(0, "")
        assert contents(tmp_path / name) == exact[name]


def test_evaluate_cannot_resume_without_a_file(models: Path, tmp_path: Path) -> None:
    words = [word for word in commands(models)["evaluate"].words if word not in ("--json", "out")]
    done = run_in(tmp_path / "work", *words, "--resume")
    assert done.code == 2 and "--json" in done.err


def test_the_resume_command_is_safe_and_exact_in_a_shell() -> None:
    words = ("hqdit", "a b", "it's", "$(touch x)", "\x1b[2J", "new\nline", "é", "\u202e", "back\\slash\x01'", "", "-rf")
    line = shell_words(words)
    assert line.isprintable()
    script = f'for word in {line}; do printf "%s\\0" "$word"; done'
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    assert tuple(done.stdout.decode().split("\0")[:-1]) == words


def test_the_description_names_everything(stopped: tuple[Path, Command]) -> None:
    folder, command = stopped
    found = json.loads((job_folder(folder / command.out) / "job.json").read_text())
    needed = {"hqdit", "code", "torch", "diffusers", "numpy", "processor", "backend", "device", "threads", "model"}
    assert needed <= found.keys() and "calibration" in found and "config.gptq" in found
