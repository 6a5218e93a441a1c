"""Outputs appear whole or not at all, and what existed before stays."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import file_hashes, require_complete

from hqdit.errors import UsageError
from hqdit.pipeline import publish
from hqdit.pipeline.manifest import MANIFEST_NAME
from hqdit.pipeline.publish import (
    REPLACED_PREFIX,
    TEMPORARY_PREFIX,
    publish_folder,
    publish_text,
    require_free,
    sweep,
    temporary_path,
)


def leftovers(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.name.startswith(TEMPORARY_PREFIX)]


def existing(folder: Path) -> Path:
    """A folder with something in it."""
    (folder / "deep").mkdir(parents=True)
    (folder / "old").write_text("old")
    (folder / "deep" / "older").write_text("older")
    return folder


def fail_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, number: int) -> Callable[[], int]:
    """Make call `number` (from 0) of `owner.name` raise OSError; returns how many calls there were."""
    original, calls = getattr(owner, name), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == number + 1:
            raise OSError(28, "No space left on device")
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, failing)
    return lambda: len(calls)


# --- folders


@pytest.mark.parametrize("parents", ["", "a", "a/b/c"])
def test_published_folder(tmp_path: Path, parents: str) -> None:
    out = tmp_path / parents / "out"
    with publish_folder(out) as staged:
        assert staged.parent == out.parent and staged.name.startswith(TEMPORARY_PREFIX)
        (staged / "sub").mkdir()
        (staged / "sub" / "file").write_bytes(b"x")
        assert not out.exists()
    assert (out / "sub" / "file").read_bytes() == b"x"
    assert leftovers(tmp_path) == []


def test_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for out in (Path("x"), Path("~/y"), Path("a/../z")):
        with publish_folder(out) as staged:
            (staged / "file").touch()
    assert {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("file")} == {"x", "home/y", "z"}


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt(), SystemExit(1), ValueError("x")], ids=repr)
@pytest.mark.parametrize("overwrite", [False, True])
def test_error_in_the_body(tmp_path: Path, error: BaseException, overwrite: bool) -> None:
    out = existing(tmp_path / "keep" / "out") if overwrite else tmp_path / "new" / "deeper" / "out"
    before = file_hashes(tmp_path)
    with pytest.raises(type(error)), publish_folder(out, overwrite) as staged:
        (staged / "half").write_text("half")
        raise error
    assert file_hashes(tmp_path) == before
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "new").exists()


def test_parents_that_others_filled_meanwhile_stay(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deeper" / "out"
    with pytest.raises(OSError), publish_folder(out):
        (tmp_path / "new" / "other").touch()
        raise OSError
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "other"]


@pytest.mark.parametrize("old", ["folder", "file"])
def test_overwrite_replaces_everything(tmp_path: Path, old: str) -> None:
    out = tmp_path / "out"
    if old == "folder":
        existing(out)
    else:
        out.write_text("a file")
    with publish_folder(out, overwrite=True) as staged:
        (staged / "new").write_text("new")
        assert out.exists()
    assert sorted(path.name for path in out.rglob("*")) == [MANIFEST_NAME, "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(params=["swap", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How one folder replaces another: as the system can, or as where it cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(publish, "_exchange", lambda first, second: False)
    return str(request.param)


@pytest.mark.parametrize("function", ["rename", "fsync", "open"])
def test_every_failing_step_leaves_the_old_or_the_new_folder(tmp_path: Path, function: str, way: str) -> None:
    """The n-th rename, fsync or open fails, for every n until there is no n-th one."""
    new = {"new", MANIFEST_NAME}
    for number in range(100):
        out = existing(tmp_path / str(number) / "out")
        old = file_hashes(out)
        with pytest.MonkeyPatch.context() as patch:
            calls = fail_at(patch, publish.os, function, number)
            try:
                with publish_folder(out, overwrite=True) as staged:
                    (staged / "new").write_text("new")
            except OSError:
                pass
        if calls() <= number:
            assert number > 1 or (function == "rename" and way == "swap")  # it did fail before
            assert set(file_hashes(out)) == new
            break
        if set(file_hashes(out)) == new:  # published; what failed was the removal of the old folder
            assert function == "open"
        else:
            assert file_hashes(out) == old
            assert leftovers(out.parent) == []
    else:
        pytest.fail("the loop did not end")


def test_everything_is_flushed_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def recorded_rename(source: Any, target: Any) -> None:
        events.append(("rename", Path(target).name))
        rename(source, target)

    monkeypatch.setattr(publish.os, "fsync", recorded_fsync)
    monkeypatch.setattr(publish.os, "rename", recorded_rename)
    with publish_folder(tmp_path / "out") as staged:
        (staged / "sub").mkdir()
        (staged / "sub" / "a").write_text("a")
        (staged / "b").write_text("b")
        name = staged.name
    renamed = events.index(("rename", "out"))
    assert {("fsync", part) for part in ("a", "b", "sub", name, MANIFEST_NAME)} == set(events[:renamed])
    # The manifest after everything that it lists, and then the folder that now holds it too.
    assert events[renamed - 2 : renamed] == [("fsync", MANIFEST_NAME), ("fsync", name)]
    assert events.index(("fsync", MANIFEST_NAME)) == renamed - 2
    assert events[renamed + 1 :] == [("fsync", tmp_path.name)]


# --- what a killed process leaves


def test_leftovers_of_one_output_are_swept_and_no_others(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "out-2"
    existing(temporary_path(out))
    temporary_path(out).write_text("half a file")
    kept = {existing(temporary_path(other)), tmp_path / f"{TEMPORARY_PREFIX}by-hand"}
    (tmp_path / f"{TEMPORARY_PREFIX}by-hand").touch()
    sweep(out)
    assert set(tmp_path.iterdir()) == kept


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_folder_that_was_moved_aside_goes_back_unless_it_was_replaced(tmp_path: Path, is_replaced: bool) -> None:
    out = tmp_path / "out"
    aside = existing(temporary_path(out, REPLACED_PREFIX))
    old = file_hashes(aside)
    if is_replaced:
        out.mkdir()
        (out / "new").touch()
    sweep(out)
    assert set(tmp_path.iterdir()) == {out}
    assert set(file_hashes(out)) == ({"new"} if is_replaced else set(old))


def test_swapping_is_one_step_here(tmp_path: Path) -> None:
    first, second = existing(tmp_path / "first"), tmp_path / "second"
    second.mkdir()
    if not publish._exchange(first, second):
        pytest.skip("this system cannot swap two names")
    assert list(first.iterdir()) == [] and len(list(second.iterdir())) == 2
    with pytest.raises(FileNotFoundError):
        publish._exchange(first, tmp_path / "missing")


# --- text


def test_text(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "report.html"
    for text in ("first é", "second"):
        publish_text(out, text)
        assert out.read_bytes() == text.encode()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("function", ["replace", "fsync", "open"])
@pytest.mark.parametrize("number", [0, 1])
def test_failing_text_leaves_the_old_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    out = tmp_path / "report.html"
    out.write_text("old")
    calls = fail_at(monkeypatch, publish.os, function, number)
    try:
        publish_text(out, "new")
    except OSError:
        assert calls() == number + 1
        assert out.read_text() in (("old",) if number == 0 else ("old", "new"))
    else:
        assert calls() <= number and out.read_text() == "new"
    assert leftovers(tmp_path) == []


def test_text_that_cannot_be_encoded(tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    out.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        publish_text(out, "\ud800")
    assert out.read_text() == "old" and leftovers(tmp_path) == []
    with pytest.raises(UnicodeEncodeError):
        publish_text(tmp_path / "new" / "deep" / "report.html", "\ud800")
    assert not (tmp_path / "new").exists()


def test_text_on_a_folder(tmp_path: Path) -> None:
    existing(tmp_path / "out")
    before = file_hashes(tmp_path)
    with pytest.raises(OSError):
        publish_text(tmp_path / "out", "text")
    assert file_hashes(tmp_path) == before


# --- what is refused


def refused(out: Path, *sources: Path, overwrite: bool = False, parts: tuple[str, ...] = ()) -> None:
    with pytest.raises(UsageError) as info:
        require_free(out, overwrite, *sources)
    assert info.value.exit_code == 2
    require_complete(info.value, "--out", str(out), *parts)


def test_existing_output(tmp_path: Path) -> None:
    for out in (existing(tmp_path / "folder"), tmp_path / "folder" / "old", tmp_path):
        refused(out, parts=("--overwrite",))
        require_free(out, True)
    require_free(tmp_path / "new", False)
    require_free(tmp_path / "new" / "deeper", False)


def test_output_at_inside_or_around_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = existing(tmp_path / "models" / "source")
    link = tmp_path / "link"
    link.symlink_to(source)
    monkeypatch.chdir(tmp_path)
    for out in (
        source,
        source / "out",
        source / "deep" / "out",
        tmp_path / "models",
        tmp_path,
        source / "deep" / "..",
        link,
        link / "out",
        Path("models/source"),
        Path("models/../models/source/x"),
    ):
        for overwrite in (False, True):
            refused(out, source, overwrite=overwrite, parts=(str(source),))
        refused(out, tmp_path / "elsewhere", source, overwrite=True)
    require_free(tmp_path / "models" / "source-2", False, source)
    require_free(tmp_path / "models" / "other", False, source)
    refused(tmp_path / "x", Path("x"), parts=("source",))


def test_output_that_holds_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    for out in (Path("."), Path(".."), tmp_path / "a", tmp_path):
        refused(out, overwrite=True, parts=("current folder",))
    require_free(Path("c"), True)
    require_free(tmp_path / "d", True)


def test_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "out", parts=(str(tmp_path / "file"),))
    refused(tmp_path / "file" / "a" / "b", overwrite=True)
