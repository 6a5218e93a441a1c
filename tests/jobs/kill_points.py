"""Where a child can be killed: before and after every call that changes something on disk."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from collections.abc import Callable
from typing import Any

from hqdit.models import weights
from hqdit.pipeline import publish

#: Owner and name of the functions that change the file system; Python's own library calls these attributes too.
MUTATING: tuple[tuple[Any, str], ...] = (
    *((os, name) for name in ("mkdir", "rmdir", "rename", "replace", "unlink", "remove", "fsync", "ftruncate")),
    (publish, "_exchange"),
    (weights, "save_file"),
    (shutil, "copyfile"),
)


def at_every_point(reached: Callable[[int], None]) -> None:
    """Call `reached` with 0, 1, 2, ... before and after every mutating call of this process."""
    points = itertools.count()

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            reached(next(points))
            result = original(*arguments, **options)
            reached(next(points))
            return result

        return call

    for owner, name in MUTATING:
        setattr(owner, name, watched(getattr(owner, name)))


def kill_at(point: int) -> Callable[[], None]:
    """A preparation after which the child kills itself at this point."""

    def reached(now: int) -> None:
        if now == point:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: at_every_point(reached)


def count_into(descriptor: int) -> Callable[[], None]:
    """A preparation after which the child writes a byte to `descriptor` at every point."""
    return lambda: at_every_point(lambda _: os.write(descriptor, b".") and None)
