"""Jobs in forked children of this process, which has imported everything: they can be killed at any point.

A child runs one command line, as `hqdit` would, with its output in files. Children end with `os._exit`, so that nothing
of pytest runs in them.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tiny

from hqdit.cli.main import EXIT_TERMINATED, run

SMALL = {"attention_head_dim": 12, "num_layers": 2}
#: In a child, before the command runs: whatever makes it fail.
Preparation = Callable[[], None]


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code, or the negative number of the signal; and what it said on standard error."""

    code: int
    err: str


@dataclass(frozen=True)
class Command:
    """A command line whose result lies at `out`, a name in the current folder."""

    name: str
    words: tuple[str, ...]
    out: str


def commands(models: Path) -> dict[str, Command]:
    """The commands that can be resumed, on tiny models in the folder `models`."""
    lines = {
        "quantize": f"quantize {models}/pipe --out out --calibration-samples 8 --steps 2",
        "sample": f"sample {models}/quantized --out out --num 5 --batch-size 2 --steps 2",
        "evaluate": f"evaluate {models}/quantized --against {models}/pipe --num 3 --batch-size 2 --steps 1 --json out",
    }
    return {name: Command(name, (*line.split(), "--quiet"), "out") for name, line in lines.items()}


def start(words: tuple[str, ...], folder: Path, prepare: Preparation | None = None) -> int:
    """The process id of a child that runs `words` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        os.chdir(folder)
        log = os.open(folder.parent / f"{folder.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(SystemExit(EXIT_TERMINATED)))
        if prepare is not None:
            prepare()
        code = run(list(words))
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(process: int, folder: Path) -> Ended:
    """Wait for a child of `start`."""
    _, status = os.waitpid(process, 0)
    log = folder.parent / f"{folder.name}.log"
    return Ended(os.waitstatus_to_exitcode(status), log.read_text() if log.exists() else "")


def run_in(folder: Path, *words: str, prepare: Preparation | None = None) -> Ended:
    """Run a command line in a child and wait for it."""
    return ended(start(words, folder, prepare), folder)


def contents(folder: Path) -> dict[str, str]:
    """Everything below `folder`, hidden or not: relative name -> SHA-256, or "folder"."""
    files = tiny.file_hashes(folder)
    return files | {str(path.relative_to(folder)): "folder" for path in folder.rglob("*") if path.is_dir()}
