"""Progress bars with the time left, on standard error; free to every floor."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

#: Work that ends sooner than this many seconds shows no bar.
DELAY_SECONDS = 1.0
#: Seconds between two states of a bar where standard error is a file or a pipe.
LOG_INTERVAL_SECONDS = 5.0

_is_quiet: ContextVar[bool] = ContextVar("hqdit_quiet", default=False)


@contextmanager
def quiet(enabled: bool = True) -> Iterator[None]:
    """Show no progress bars inside the body."""
    token = _is_quiet.set(enabled)
    try:
        yield
    finally:
        _is_quiet.reset(token)


def track(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """`items` with a progress bar called `what`."""
    bar: Iterable[Item] = tqdm(
        items,
        desc=what,
        total=total,
        delay=DELAY_SECONDS,
        mininterval=0.1 if sys.stderr.isatty() else LOG_INTERVAL_SECONDS,
        leave=False,
        disable=_is_quiet.get(),
    )
    return bar
