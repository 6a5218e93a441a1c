"""Every error that hqdit raises on purpose, each with the exit code that the command line returns for it.

A message is one line that is complete in itself: what is wrong, where (file, tensor, layer or flag), what was
found, what is needed, and how to fix it. A table may follow on further lines.
"""

from __future__ import annotations


class HQDiTError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line exits with."""

    exit_code = 1


class UsageError(HQDiTError, ValueError):
    """A flag, argument or configuration value that cannot be used (exit code 2)."""

    exit_code = 2


class CheckpointError(HQDiTError):
    """Anything wrong in a file or folder (exit code 3)."""

    exit_code = 3


class NumericsError(HQDiTError, ArithmeticError):
    """Calibration data, a Hessian, a layer width or a result that cannot be worked with (exit code 4)."""

    exit_code = 4


class ResourceError(HQDiTError):
    """Not enough disk or memory (exit code 5)."""

    exit_code = 5


class EnvironmentUnavailable(HQDiTError):
    """Something outside is missing: the hub, an extra, a backend, a device (exit code 6)."""

    exit_code = 6


class IntegrityError(HQDiTError):
    """Files that are not those that their manifest lists (exit code 7)."""

    exit_code = 7


class LockedError(HQDiTError):
    """An output that another run is working on (exit code 8)."""

    exit_code = 8


def reason_of(error: BaseException) -> str:
    """The first line of a foreign error's message, or its class, so that ours stays on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
