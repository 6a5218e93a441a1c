"""Outputs that appear whole or not at all.

Files are written under a temporary name next to their final one, flushed to disk and renamed; after an error or an
interruption nothing is left, and what existed before stays as it was. A process that is killed can leave temporary
names, which `sweep` finds and removes.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hqdit.errors import CheckpointError, UsageError
from hqdit.pipeline.manifest import write_manifest

TEMPORARY_PREFIX = ".hqdit-tmp-"
#: Of what a new folder replaces, while it does.
REPLACED_PREFIX = ".hqdit-old-"


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


def temporary_path(target: Path, prefix: str = TEMPORARY_PREFIX) -> Path:
    """A new name beside `target`, from which `sweep` can tell whose it was."""
    return target.parent / f"{prefix}{_mark(target)}-{uuid.uuid4().hex}"


def _mark(target: Path) -> str:
    # Of fixed length, so that a long name does not become too long.
    return hashlib.sha256(os.fsencode(target.name)).hexdigest()[:16]


def sweep(target: Path) -> None:
    """Remove what killed processes left beside `target`; the caller makes sure that no other one is at work.

    A folder that was moved aside and not yet replaced goes back to its place.
    """
    if not target.parent.is_dir():
        return
    pattern = re.compile(f"({re.escape(TEMPORARY_PREFIX)}|{re.escape(REPLACED_PREFIX)}){_mark(target)}-[0-9a-f]{{32}}")
    for path in sorted(target.parent.iterdir()):
        found = pattern.fullmatch(path.name)
        if found is not None and found[1] == REPLACED_PREFIX and not target.exists():
            os.rename(path, target)
        elif found is not None:
            remove(path)


def remove(path: Path) -> None:
    """Remove a file or a folder, or nothing if there is none."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Make the system write a file's contents, or a folder's entries, to disk.

    Raises:
        OSError: it could not; what has not been written then is lost, and flushing again would not show it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            flush(path)
    flush(folder)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step, so that both names exist at every moment; False where the system cannot.

    Source: renameat2(2), RENAME_EXCHANGE, which Python does not offer.
    """
    at_current_folder, rename_exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    names = os.fsencode(first), os.fsencode(second)
    if renameat2(at_current_folder, names[0], at_current_folder, names[1], rename_exchange) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(second))


@contextmanager
def publish_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the body ends without an error.

    Its manifest (`pipeline.manifest`) is written last. After an error everything is as it was before.
    """
    target = out.expanduser().resolve()
    created = make_parents(target.parent)
    staged = temporary_path(target)
    try:
        staged.mkdir()
        yield staged
        _flush_tree(staged)
        flush(write_manifest(staged))
        flush(staged)
        move_into_place(staged, target, overwrite)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        remove_empty(created)
        raise


def require_copyable(source: Path) -> None:
    """Look at everything that `copy_tree` would copy.

    Raises:
        CheckpointError: a link that leads nowhere or to a folder around it, a pipe, a device or a socket.
    """
    is_folder = source.is_dir()
    around = source.parent.resolve()
    is_around_itself = is_folder and source.is_symlink() and source.resolve() in (around, *around.parents)
    if is_around_itself or not (is_folder or source.is_file()):
        raise CheckpointError(
            f"{source}: found something that is neither a file nor a folder, or a link in a circle, needed what can be "
            "copied. Fix: take it out of the model's folder"
        )
    if is_folder:
        for path in sorted(source.iterdir()):
            require_copyable(path)


def copy_tree(source: Path, target: Path) -> None:
    """Copy a file, or a folder with everything in it; links are followed. `target` must not exist.

    Unlike shutil's, it raises the system's own error, such as that of a full disk; what `require_copyable` refuses
    must not be in it.
    """
    if source.is_dir():
        target.mkdir()
        for path in sorted(source.iterdir()):
            copy_tree(path, target / path.name)
    else:
        shutil.copyfile(source, target)


def move_into_place(staged: Path, target: Path, overwrite: bool) -> None:
    """Give a flushed folder its final name; with `overwrite`, what was there is removed afterwards.

    Where the system can swap two names there is a whole folder, old or new, at every moment; elsewhere at every moment
    but the one between two renames, after which `sweep` restores the old one. After an error the old one is there, and
    `staged` is what it was.

    Args:
        staged: on the file system of `target`.
        target: an absolute path.
        overwrite: whether there may be something at `target`.
    """
    replaced = temporary_path(target, REPLACED_PREFIX)
    is_exchanged = is_publishing = False
    try:
        is_exchanged = overwrite and target.exists() and _exchange(staged, target)
        if not is_exchanged:
            if target.exists() and overwrite:
                os.rename(target, replaced)
            is_publishing = True
            os.rename(staged, target)
        flush(target.parent)
    except BaseException:
        if is_exchanged:
            _exchange(staged, target)
        elif is_publishing and not staged.exists():
            os.rename(target, staged)
        if replaced.exists():
            os.rename(replaced, target)
        raise
    remove(staged if is_exchanged else replaced)


def make_parents(folder: Path) -> list[Path]:
    """Create `folder` and say which levels were new, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()][::-1]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Undo `make_parents`, except for folders that somebody has put something into."""
    for folder in reversed(folders):
        if not any(folder.iterdir()):
            folder.rmdir()


def publish_text(out: Path, text: str) -> None:
    """`publish_bytes` of UTF-8 text."""
    publish_bytes(out, text.encode("utf-8"))


def publish_bytes(out: Path, content: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one."""
    target = out.expanduser().resolve()
    created = make_parents(target.parent)
    staged = temporary_path(target)
    try:
        staged.write_bytes(content)
        flush(staged)
        os.replace(staged, target)
        flush(target.parent)
    except BaseException:
        staged.unlink(missing_ok=True)
        remove_empty(created)
        raise
