"""Outputs that appear whole or not at all.

Files are written under a temporary name next to their final one, flushed to disk and renamed; after an error or an
interruption nothing is left, and what existed before stays as it was.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hqdit.errors import UsageError

TEMPORARY_PREFIX = ".hqdit-tmp-"


def require_free(out: Path, overwrite: bool, *sources: Path) -> None:
    """Refuse an output path that exists (unless `overwrite`), touches a source, or holds the current folder.

    Raises:
        UsageError: see above; also for a parent that is a file.
    """
    target = out.expanduser().resolve()
    for source in sources:
        real = source.resolve()
        if target == real or real in target.parents or target in real.parents:
            raise UsageError(
                f"--out: found {out}, which is, holds or lies inside the source {source}, needed a folder of its own. "
                "Fix: choose another --out"
            )
    if target in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(
            f"--out: found {str(out)!r}, which is or holds the current folder, needed a folder of its own. "
            "Fix: choose another --out"
        )
    if target.exists() and not overwrite:
        raise UsageError(f"--out: found {out}, which exists, needed a new path. Fix: choose another one or --overwrite")
    parent = next(path for path in target.parents if path.exists())
    if not parent.is_dir():
        raise UsageError(f"--out: found {out} below the file {parent}, needed a folder. Fix: choose another --out")


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            _flush(path)
    _flush(folder)


@contextmanager
def publish_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the body ends without an error.

    With `overwrite`, what was at `out` is moved aside first and deleted last, so that a whole folder, old or new, is
    there at every moment but the one between two renames. After an error everything is as it was before.
    """
    target = out.expanduser().resolve()
    created = _make_parents(target.parent)
    staged, replaced = (target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}" for _ in range(2))
    is_publishing = False
    try:
        staged.mkdir()
        yield staged
        _flush_tree(staged)
        if target.exists() and overwrite:
            os.rename(target, replaced)
        is_publishing = True
        os.rename(staged, target)
        _flush(target.parent)
    except BaseException:
        if is_publishing and not staged.exists():
            os.rename(target, staged)
        if replaced.exists():
            os.rename(replaced, target)
        shutil.rmtree(staged, ignore_errors=True)
        _remove_empty(created)
        raise
    if replaced.exists():
        shutil.rmtree(replaced) if replaced.is_dir() else replaced.unlink()


def _make_parents(folder: Path) -> list[Path]:
    """Create `folder` and say which levels were new, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    """Undo `_make_parents`, except for folders that somebody has put something into."""
    for folder in reversed(folders):
        if not any(folder.iterdir()):
            folder.rmdir()


def publish_text(out: Path, text: str) -> None:
    """`publish_bytes` of UTF-8 text."""
    publish_bytes(out, text.encode("utf-8"))


def publish_bytes(out: Path, content: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one."""
    target = out.expanduser().resolve()
    created = _make_parents(target.parent)
    staged = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        staged.write_bytes(content)
        _flush(staged)
        os.replace(staged, target)
        _flush(target.parent)
    except BaseException:
        staged.unlink(missing_ok=True)
        _remove_empty(created)
        raise
