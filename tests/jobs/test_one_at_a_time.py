"""Two runs on one output: the second is refused and told whom it met; the lock of a dead run counts for nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from job_runs import Ended, commands, contents, ended, run_in, start

from hqdit.errors import LockedError
from hqdit.jobs.lock import lock_path, locked
from hqdit.jobs.stores import JobBlocks


def test_the_second_run_is_refused_and_the_first_one_named(
    models: Path, exact: dict[str, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = commands(models)["quantize"]
    folder = tmp_path / "work"
    at_work, go_on = os.pipe(), os.pipe()

    def wait_in_the_middle() -> None:
        keep = JobBlocks.keep

        def kept(self: JobBlocks, block: int, *arguments: object) -> None:
            keep(self, block, *arguments)  # type: ignore[arg-type]
            os.write(at_work[1], b".")
            os.read(go_on[0], 1)

        monkeypatch.setattr(JobBlocks, "keep", kept)

    first = start(command.words, folder, wait_in_the_middle)
    try:
        os.read(at_work[0], 1)
        for words in ((), ("--resume",), ("--overwrite",)):
            # The first log is that of the first run.
            second = run_in(
                tmp_path / "beside", *(f"{folder}/out" if word == "out" else word for word in command.words), *words
            )
            line = second.err.splitlines()[0]
            assert second.code == 8, second
            assert all(part in line for part in (f"process {first} on ", "hqdit quantize", "since 2", "Fix: "))
    finally:
        os.write(go_on[1], b"..")
    assert ended(first, folder) == Ended(0, "")
    assert contents(folder) == exact["quantize"]


def test_the_lock_of_a_dead_process_is_free(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = os.fork()
    if not process:
        with locked(out, "hqdit first"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    assert lock_path(out).exists()
    with locked(out, "hqdit second"):
        assert b"second" in lock_path(out).read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_and_others_are_not_disturbed(tmp_path: Path) -> None:
    with locked(tmp_path / "a", "x"), locked(tmp_path / "b", "x"):
        assert len(list(tmp_path.iterdir())) == 2
        with pytest.raises(LockedError) as info, locked(tmp_path / "a", "y"):
            raise AssertionError("the lock was given twice")
        assert info.value.exit_code == 8 and f"process {os.getpid()} on" in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_a_hundred_runs_at_once_get_the_lock_one_after_the_other(tmp_path: Path) -> None:
    """Each child takes the lock until it has it, and would see another one's mark inside."""
    out, mark = tmp_path / "out", tmp_path / "inside"
    children = []
    for _ in range(100):
        if process := os.fork():
            children.append(process)
            continue
        code = 1
        try:
            while True:
                try:
                    with locked(out, "x"):
                        mark.touch(exist_ok=False)
                        mark.unlink()
                    code = 0
                    break
                except LockedError:
                    os.sched_yield()
        finally:
            os._exit(code)
    assert [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in children] == [0] * 100
    assert list(tmp_path.iterdir()) == []
