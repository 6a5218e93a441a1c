"""Commands that can be stopped and resumed: what their result depends on, and the line that says how to go on."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hqdit.cli.options import RunOptions, printable

if TYPE_CHECKING:
    from hqdit.jobs.job import Job

Resume = Annotated[bool, typer.Option("--resume", help="Go on with what a stopped run has finished.")]

#: The command line that `cli.main.run` was given.
command_line: ContextVar[tuple[str, ...]] = ContextVar("hqdit_command_line", default=())
#: How to go on with the job that was stopped, once one has been.
_resume_command: ContextVar[str | None] = ContextVar("hqdit_resume_command", default=None)


def begin(given: Sequence[str]) -> None:
    """Note the command line; nothing has been stopped yet."""
    command_line.set(tuple(given))
    _resume_command.set(None)


def resume_command() -> str | None:
    """The command that goes on with the job that was stopped, ready for a shell, or None."""
    return _resume_command.get()


@contextmanager
def running_job(
    target: Path, description: Mapping[str, Any], options: RunOptions, *, resume: bool, overwrite: bool
) -> Iterator[Job]:
    """The job of `target`; if it is stopped and worth resuming, `resume_command` says how. Raises as `open_job`.

    Args:
        target: the output.
        description: what the result depends on, besides code, machine and `options`.
        options: backend and device.
        resume: value of --resume.
        overwrite: value of --overwrite.
    """
    from hqdit.jobs.description import surroundings
    from hqdit.jobs.job import job_folder, open_job

    given = command_line.get()
    arithmetic = {"backend": options.backend, "device": str(options.device), "threads": options.threads}
    again = shell_words(("hqdit", *(word for word in given if word != "--resume"), "--resume"))
    job = None
    try:
        with open_job(
            target,
            {**surroundings(), **arithmetic, **description},
            shell_words(("hqdit", *given)),
            is_resumed=resume,
            is_discarding=overwrite,
        ) as job:
            yield job
    except BaseException:
        if job is not None and job_folder(target).exists():
            _resume_command.set(again)
        raise
    finally:
        for name in job.damaged if job is not None else ():
            warning = f"hqdit: {job_folder(target)}: {name} was changed after it was finished; it was made again"
            print(printable(warning), file=sys.stderr)


def shell_words(words: Sequence[str]) -> str:
    """A command line that a shell reads as these words, in printable characters only."""
    return " ".join(_quoted(word) for word in words)


def _quoted(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    # The only quotes in which bash, zsh and ksh read escapes.
    escaped = re.sub(r"[\\']", lambda found: "\\" + found[0], word)
    return "$'" + "".join(c if c.isprintable() else _escape(c) for c in escaped) + "'"


def _escape(character: str) -> str:
    # Byte by byte, which does not depend on the shell's own character set.
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogateescape"))
