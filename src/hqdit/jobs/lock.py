"""One run at a time on one output."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from hqdit.errors import LockedError

_LARGEST_NOTE_BYTES = 65536


def lock_path(target: Path) -> Path:
    """Where the lock of `target`, an absolute path, lies."""
    return target.parent / f".{target.name}.hqdit-lock"


@contextmanager
def locked(target: Path, command: str) -> Iterator[None]:
    """Hold the lock of `target` inside the body; nothing is left afterwards.

    The system frees the lock of a process that dies, however it dies, so that no lock is ever stale. On a network file
    system whose locks do not work, two runs waste work, but every output is still one of theirs, whole.

    Args:
        target: an absolute path in a folder that exists.
        command: what is running, for the message to others.

    Raises:
        LockedError: another process holds it; the message names that process.
    """
    path = lock_path(target)
    descriptor = _acquired(path, target)
    try:
        note = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": _now()}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(note).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still held, so that nobody else's is removed
        os.close(descriptor)


def require_unlocked(target: Path) -> None:
    """Raise `LockedError` if another process holds the lock of `target`, an absolute path; takes nothing."""
    try:
        # Without waiting, should a pipe lie there.
        descriptor = os.open(lock_path(target), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _held(descriptor, target) from None
    finally:
        os.close(descriptor)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _acquired(path: Path, target: Path) -> int:
    """A descriptor of the lock file, locked."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the file between our opening and locking it.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            error = _held(descriptor, target)
            os.close(descriptor)
            raise error from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _held(descriptor: int, target: Path) -> LockedError:
    found = _described(os.pread(descriptor, _LARGEST_NOTE_BYTES, 0))
    return LockedError(
        f"{target}: found it in use by {found}, needed it alone. Fix: wait until that process has ended, or choose "
        "another path"
    )


def _described(note: bytes) -> str:
    """Who holds a lock, from what its file says."""
    try:
        found = json.loads(note)
        return f"process {found['pid']} on {found['host']} since {found['since']} ({found['command']})"
    except (ValueError, LookupError, TypeError):  # it has the lock but has not written yet
        return "a process that has only just begun"
