"""Getting the weights out of a PyTorch file, which is a pickle, without ever unpickling in this process."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from hqdit.errors import CheckpointError, EnvironmentUnavailable, UsageError
from hqdit.models.weights import NOT_WEIGHTS, read_safetensors

#: Names under which a training checkpoint holds weights: averaged over the training, or as of its last step.
EMA, MODEL = WEIGHTS = ("ema", "model")

#: Wall-clock limit of the child: what an unhurried machine needs, and what a slow disk needs for each byte.
_SECONDS, _BYTES_PER_SECOND = 120.0, 10e6
#: The child's environment: what finds an interpreter and its libraries, and no token that happens to lie there.
_INHERITED = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TMPDIR", "VIRTUAL_ENV")
_MAX_ANSWER_BYTES = 65_536
_FIX = "download or copy the file again"


def read_torch_file(path: Path, weights: str | None, workspace: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a state dict that `torch.save` wrote, and which of several was taken.

    A child process with limits on memory, processor time and file size loads the file (weights only) and hands a
    safetensors file over, which is checked as any other.

    Args:
        path: the file.
        weights: one of `WEIGHTS` for a training checkpoint; None takes ema where there is one, and is what a plain
            state dict needs.
        workspace: a folder on a disk with room for the weights; what is left there after the call is nothing.

    Returns:
        name -> tensor on the CPU, mapped from a file that is deleted with the last of them; and the key they lay
        under, None for a plain state dict.

    Raises:
        UsageError: another name than those in `WEIGHTS`.
        CheckpointError: no regular file, not what `torch.save` writes, something else than named tensors in it, or
            more than the limits allow.
        EnvironmentUnavailable: a system without limits for processes.
    """
    if weights not in (None, *WEIGHTS):
        raise UsageError(f"--weights: found {weights!r}, needed one of {', '.join(WEIGHTS)}. Fix: leave it out")
    if importlib.util.find_spec("resource") is None:
        raise EnvironmentUnavailable(
            f"{path}: found a system without limits for processes ({sys.platform}), needed one to load a pickle under. "
            "Fix: convert the file on Linux"
        )
    _require_archive(path)
    with tempfile.TemporaryDirectory(dir=workspace) as temporary:
        answer, handed = Path(temporary) / "answer.json", Path(temporary) / "weights.safetensors"
        status = _run_child(path, handed, answer, weights)
        key = _require_success(path, status, answer)
        return read_safetensors(handed), key


def _require_archive(path: Path) -> None:
    """Look at the first bytes: since torch 1.6 such a file is a zip archive."""
    if not path.is_file():
        found = "something that is no regular file" if path.exists() else "no such file"
        raise CheckpointError(f"{path}: found {found}, needed a PyTorch checkpoint (.pt). Fix: check the path")
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise CheckpointError(
            f"{path}: found a file that cannot be read ({error.strerror}), needed a PyTorch checkpoint (.pt). "
            "Fix: check its permissions"
        ) from error
    if start.startswith(b"PK\x03\x04"):
        return
    found, fix = "no zip archive", _FIX
    for magic, what, remedy in NOT_WEIGHTS:
        if start.startswith(magic):
            found, fix = what, remedy
    if not start:
        found = "an empty file"
    elif start[:1] == b"\x80":
        found = "a bare Python pickle, as torch wrote before version 1.6"
        fix = "load it where it can be trusted and save it again with torch.save"
    elif start[8:9] == b"{":
        found, fix = "a safetensors file", "convert the .pt file that it was made of"
    raise CheckpointError(f"{path}: found {found}, needed a PyTorch checkpoint (.pt), a zip archive. Fix: {fix}")


def _run_child(path: Path, handed: Path, answer: Path, weights: str | None) -> int | None:
    """Exit status of the child, negative for a signal, or None where it took too long."""
    command = [sys.executable, "-P", "-m", "hqdit.models.torch_file_reader"]
    command += [str(path.resolve()), str(handed), str(answer), weights or ""]
    environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**environment, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            timeout=_SECONDS + path.stat().st_size / _BYTES_PER_SECOND,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


def _require_success(path: Path, status: int | None, answer: Path) -> str | None:
    """The key that the child took the weights from.

    Raises:
        CheckpointError: it refused the file, was stopped, or answered something else.
    """
    if status is None or status < 0:
        how = "took too long" if status is None else f"was ended by signal {-status}"
        raise CheckpointError(
            f"{path}: found a file whose reader {how}, needed one that loads within its limits. Fix: {_FIX}, from a "
            "source that you trust"
        )
    said = _parse_answer(answer)
    if status == 0 and said.get("weights") in (None, *WEIGHTS) and "weights" in said:
        return cast(str | None, said["weights"])
    parts = [said.get(part) for part in ("found", "needed", "fix")]
    found, needed, fix = (
        [" ".join(str(part).split())[:400] for part in parts]
        if all(parts)
        else [f"a file whose reader ended with status {status}", "one that can be read", _FIX]
    )
    raise CheckpointError(f"{path}: found {found}, needed {needed}. Fix: {fix}")


def _parse_answer(path: Path) -> dict[str, Any]:
    """What the child wrote; an empty object where that is nothing of ours. A pickle may have written it."""
    try:
        with path.open("rb") as file:
            said = json.loads(file.read(_MAX_ANSWER_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}
