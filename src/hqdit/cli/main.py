"""`hqdit`: parse, run one command, turn errors into one line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence

import typer

import hqdit
from hqdit.cli.demo import demo
from hqdit.cli.doctor import doctor
from hqdit.cli.evaluate import evaluate
from hqdit.cli.inspect import inspect
from hqdit.cli.outliers import inject_outliers
from hqdit.cli.quantize import quantize
from hqdit.cli.sample import sample
from hqdit.errors import EnvironmentUnavailable, HQDiTError, ResourceError, UsageError

EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143
_RESOURCE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM, errno.EROFS, errno.EACCES, errno.EPERM}

app = typer.Typer(
    name="hqdit",
    help="Quantize diffusion transformers to 4-bit floating point weights and activations (HQ-DiT).",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (demo, quantize, sample, evaluate, inspect, doctor, inject_outliers):
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


def _translate(error: BaseException) -> HQDiTError | None:
    """The error with an exit code that stands for `error`, or None for a defect of hqdit."""
    if isinstance(error, HQDiTError):
        return error
    if isinstance(error, _ParserError):
        message = error.format_message().strip().rstrip(".")  # type: ignore[attr-defined]
        return UsageError(f"{message}. Fix: see hqdit --help or hqdit COMMAND --help")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate memory" in str(error)):
        return ResourceError(
            f"memory: not enough for this model or batch ({error}). Fix: lower --batch-size or free memory"
        )
    if type(error).__name__ == "OutOfMemoryError":
        return ResourceError(
            f"device memory: {str(error).splitlines()[0]}. Fix: lower --batch-size or use --device cpu"
        )
    if isinstance(error, OSError) and error.errno in _RESOURCE_ERRNOS:
        return ResourceError(
            f"{error.filename or 'output'}: cannot be written ({os.strerror(error.errno)}), needed space and "
            "permission. Fix: choose another --out"
        )
    if isinstance(error, ModuleNotFoundError):
        return EnvironmentUnavailable(f"{error.name}: this package is not installed. Fix: pip install {error.name}")
    return None


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = typer.main.get_command(app).main(args=given, prog_name="hqdit", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        print("hqdit: interrupted; nothing was left at --out. Fix: run the same command again", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if type(error).__name__ == "Abort":
            return EXIT_INTERRUPTED
        translated = _translate(error)
        if "--debug" in given or translated is None:
            traceback.print_exc()
        if translated is None:
            print(
                f"hqdit: defect: {type(error).__name__}: {error}. Fix: please report the lines above", file=sys.stderr
            )
            return 1
        print(f"hqdit: error: {_printable(str(translated))}", file=sys.stderr)
        return translated.exit_code


def _printable(text: str) -> str:
    """`text` with control characters other than line ends escaped, so that a name in a file cannot drive a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def _terminate(_number: int, _frame: object) -> None:
    raise SystemExit(EXIT_TERMINATED)


def main() -> None:
    """Entry point of the `hqdit` script."""
    # Unwinds the stack, so that temporary output is removed, where the default would end the process at once.
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run())
