"""`hqdit`: parse, run one command, turn errors into one line and an exit code."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence

import typer

import hqdit
from hqdit.cli.analyze import analyze
from hqdit.cli.bench import bench
from hqdit.cli.convert import convert
from hqdit.cli.demo import demo
from hqdit.cli.dequantize import dequantize
from hqdit.cli.doctor import doctor
from hqdit.cli.evaluate import evaluate
from hqdit.cli.inspect import inspect
from hqdit.cli.job import begin, resume_command
from hqdit.cli.options import printable
from hqdit.cli.outliers import inject_outliers
from hqdit.cli.quantize import quantize
from hqdit.cli.report import report
from hqdit.cli.reproduce import reproduce
from hqdit.cli.sample import sample
from hqdit.cli.score import score
from hqdit.cli.verify import verify
from hqdit.errors import CheckpointError, EnvironmentUnavailable, HQDiTError, ResourceError, UsageError

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143

app = typer.Typer(
    name="hqdit",
    help="Quantize diffusion transformers to 4-bit floating point weights and activations (HQ-DiT).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (
    demo,
    quantize,
    dequantize,
    sample,
    evaluate,
    score,
    analyze,
    inspect,
    verify,
    doctor,
    convert,
    inject_outliers,
    bench,
    reproduce,
    report,
):
    app.command()(command)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"hqdit {hqdit.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Quantize diffusion transformers to 4-bit floating point weights and activations (HQ-DiT)."""


#: The parent of typer's own parameter error is what its parser raises for any misuse of the command line.
_ParserError = typer.BadParameter.__mro__[1]


def _misuse(error: BaseException, given: Sequence[str]) -> UsageError:
    """The parser's `error` in our form; the parser itself does not say which value it found."""
    if type(error).__name__ == "NoArgsIsHelpError":
        names = ", ".join(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
        return UsageError(f"command: found none, needed one of {names}. Fix: hqdit --help says what they do")
    message = error.format_message().strip().rstrip(".")  # type: ignore[attr-defined]
    flags = getattr(getattr(error, "param", None), "opts", ())
    values = [value for flag, value in zip(given, given[1:], strict=False) if flag in flags]
    values += [text.partition("=")[2] for text in given if text.partition("=")[0] in flags and "=" in text]
    found = f" (found {values[-1]!r})" if values else ""
    end = "" if message.endswith("?") else "."
    return UsageError(f"{message}{found}{end} Fix: see hqdit --help or hqdit COMMAND --help")


def _translate(error: BaseException, given: Sequence[str]) -> HQDiTError | None:
    """The error with an exit code that stands for `error`, or None for a defect of hqdit."""
    if isinstance(error, HQDiTError):
        return error
    if isinstance(error, _ParserError):
        return _misuse(error, given)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return ResourceError(
            f"memory: found too little for this model or batch ({reason}), needed more. "
            "Fix: free memory, or lower --batch-size where there is one"
        )
    if type(error).__name__ == "OutOfMemoryError":
        return ResourceError(
            f"device memory: found too little ({str(error).splitlines()[0]}), needed more. "
            "Fix: use --device cpu, or lower --batch-size where there is one"
        )
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return UsageError(f"{error.filename}: found a name that is too long, needed a shorter one. Fix: shorten it")
    if isinstance(error, OSError) and error.errno is not None:
        return ResourceError(
            f"{error.filename or 'output'}: found that it cannot be written or read ({os.strerror(error.errno)}), "
            "needed space and permission. Fix: make room, or choose another path"
        )
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from "):
        return CheckpointError(
            f"{str(error).removeprefix('Symlink loop from ')}: found links that lead in a circle, needed a file or a "
            "folder. Fix: check where the link leads"
        )
    if isinstance(error, RuntimeError) and "home directory" in str(error):
        return UsageError(f"~: found a path whose home folder is unknown ({error}), needed one. Fix: write it in full")
    if isinstance(error, ModuleNotFoundError):
        return EnvironmentUnavailable(
            f"{error.name}: found no such package, needed it installed. Fix: pip install {error.name}"
        )
    return None


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    begin(given)
    code = None
    try:
        code = _run(given)
        return code
    finally:
        if code != EXIT_INTERRUPTED and (again := resume_command()) is not None:
            print(f"hqdit: finished work is kept; to go on: {again}", file=sys.stderr)


def _run(given: list[str]) -> int:
    try:
        _require_text(given)
        code = typer.main.get_command(app).main(args=given, prog_name="hqdit", standalone_mode=False)
        if code == EXIT_INTERRUPTED:  # what the parser makes of a KeyboardInterrupt; older ones raise Abort
            return _interrupted()
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _interrupted()
    except Exception as error:
        if type(error).__name__ == "Abort":
            return _interrupted()
        translated = _translate(error, given)
        if "--debug" in given or translated is None:
            traceback.print_exc()
        if translated is None:
            print(
                f"hqdit: defect: {type(error).__name__}: {error}. Fix: please report the lines above", file=sys.stderr
            )
            return 1
        print(f"hqdit: error: {printable(_in_one_line(str(translated), given))}", file=sys.stderr)
        return translated.exit_code


def _in_one_line(message: str, given: Sequence[str]) -> str:
    """`message` with the line ends of names escaped; other line ends are those of its table."""
    names = {name for argument in given for name in re.split("[/=]", argument) if len(name.splitlines()) > 1}
    for name in sorted(names, key=len, reverse=True):
        message = message.replace(name, name.replace("\n", "\\n"))
    return message


def _interrupted() -> int:
    fix = f"go on with {again}" if (again := resume_command()) is not None else "run the same command again"
    print(f"hqdit: interrupted; what was at --out is there as before. Fix: {fix}", file=sys.stderr)
    return EXIT_INTERRUPTED


def _require_text(given: Sequence[str]) -> None:
    """Refuse bytes that are no UTF-8: safetensors could write such a path but not read it."""
    for argument in given:
        try:
            os.fsencode(argument).decode("utf-8")
        except UnicodeError as error:
            raise UsageError(
                f"argument: found {argument!r}, needed UTF-8 text. Fix: rename the file or folder"
            ) from error


def _terminate(_number: int, _frame: object) -> None:
    raise SystemExit(EXIT_TERMINATED)


def main() -> None:
    """Entry point of the `hqdit` script."""
    # Threads that wait for each other sleep instead of spinning: beside one other busy process, spinning made a forward
    # pass of the bundled model three times slower. Read when torch is loaded, which no import above has done.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Unwinds the stack, so that temporary output is removed, where the default would end the process at once.
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run())
