"""A job: a long command whose finished pieces lie in a folder beside its output, until the output is there.

For an output `OUT`, the folder `.OUT.hqdit-job` holds

    job.json                   all that the result depends on: a job is gone on with only if it is the same
    NAME-SHA256.safetensors    a finished piece; its name ends with the digest of its bytes
    result                     the whole output, before it gets its name
    publishing.json            the digest of the manifest of what was about to get its name

Every file is written under a temporary name, flushed and renamed, so that whatever has its final name is whole, at
whatever moment the process is killed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hqdit.errors import CheckpointError, IntegrityError, NumericsError, UsageError
from hqdit.jobs.lock import locked, require_unlocked
from hqdit.models.weights import read_safetensors, write_safetensors
from hqdit.pipeline.manifest import MANIFEST_NAME, require_regular, require_sound, sha256_of
from hqdit.pipeline.publish import (
    flush,
    make_parents,
    move_into_place,
    publish_text,
    remove,
    remove_empty,
    sweep,
    temporary_path,
)

DESCRIPTION_NAME, RESULT_NAME, PUBLISHING_NAME = "job.json", "result", "publishing.json"
_PIECE = re.compile(r"(.+)-([0-9a-f]{64})\.safetensors")
_FACTS, _TENSOR = "facts", "tensor."
#: Characters of a value in the table of what differs.
_SHOWN = 60


def job_folder(target: Path) -> Path:
    """Where the job of the output `target` lies."""
    path = target.expanduser().resolve()
    return path.parent / f".{path.name}.hqdit-job"


def has_published(target: Path) -> bool:
    """Whether `target` is what its job was about to publish: then only the end of the job is missing."""
    note, manifest = job_folder(target) / PUBLISHING_NAME, target.expanduser() / MANIFEST_NAME
    if not (note.is_file() and manifest.is_file()):
        return False
    try:
        described = json.loads(note.read_text(encoding="utf-8"))
        return bool(described["manifest"] == sha256_of(manifest))
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return False


def require_startable(target: Path, *, is_resumed: bool, is_discarding: bool) -> None:
    """Refuse early what `open_job` would refuse, before a model is loaded.

    Raises:
        LockedError: another process works on this output.
        UsageError: a job has been begun, and it is not said what shall become of it.
    """
    require_unlocked(target.expanduser().resolve())
    _require_decided(target, is_resumed, is_discarding)


def _require_decided(target: Path, is_resumed: bool, is_discarding: bool) -> None:
    folder = job_folder(target)
    if (folder / DESCRIPTION_NAME).exists() and not is_resumed and not is_discarding:
        raise UsageError(
            f"{folder}: found finished work of an earlier run for {target}, needed to know what shall become of it. "
            "Fix: --resume goes on with it, --overwrite discards it"
        )


@dataclass
class Job:
    """What `open_job` gives: the pieces that are finished, and where the result goes.

    Attributes:
        target: the output, an absolute path.
        folder: of this job.
        damaged: names of pieces that were not as written and count as not finished.
    """

    target: Path
    folder: Path
    damaged: list[str] = field(default_factory=list)

    def kept_file(self, name: str) -> Path | None:
        """The finished piece `name`, if there is one whose bytes are those that were written."""
        for path in sorted(self.folder.iterdir()):
            found = _PIECE.fullmatch(path.name)
            if found is not None and found[1] == name:
                if sha256_of(path) == found[2]:
                    return path
                self.damaged.append(name)
                remove(path)
        return None

    def keep_file(self, name: str, write: Callable[[Path], None]) -> Path:
        """Finish a piece that `write` writes to the path it is given; returns where it lies.

        Raises:
            ResourceError, OSError: no space or no permission; then there is no such piece.
        """
        staged = temporary_path(self.folder / name)
        try:
            write(staged)
            flush(staged)
            path = self.folder / f"{name}-{sha256_of(staged)}.safetensors"
            staged.rename(path)
            flush(self.folder)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        return path

    def kept(self, name: str) -> tuple[Any, dict[str, Tensor]] | None:
        """Facts and tensors of the finished piece `name`, or None."""
        path = self.kept_file(name)
        return None if path is None else _unpacked(path)

    def keep(self, name: str, facts: Any, tensors: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
        """Finish a piece of plain JSON values and tensors. Raises as `keep_file`.

        Returns:
            As `kept`: what a run that goes on will see, so that a run that does not sees nothing else.
        """
        text = torch.frombuffer(bytearray(json.dumps(facts).encode("utf-8")), dtype=torch.uint8)
        # Layers may hold one tensor together, which a file cannot.
        packed = {_TENSOR + key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        return _unpacked(self.keep_file(name, lambda path: write_safetensors({_FACTS: text, **packed}, path)))

    @property
    def is_worth_keeping(self) -> bool:
        """Whether anything is finished."""
        return any(path.name == RESULT_NAME or _PIECE.fullmatch(path.name) for path in self.folder.iterdir())

    @property
    def result(self) -> Path:
        """Where the whole output lies before it gets its name."""
        return self.folder / RESULT_NAME

    @property
    def has_result(self) -> bool:
        """Whether the whole output is there and is sound; a damaged one is removed."""
        if not self.result.exists():
            return False
        try:
            require_sound(self.result)
        except (IntegrityError, CheckpointError):
            self.damaged.append(RESULT_NAME)
            remove(self.result)
            return False
        return True

    def publish(self, overwrite: bool) -> None:
        """Give the result its name. Raises as `pipeline.publish.move_into_place`."""
        digest = sha256_of(self.result / MANIFEST_NAME)
        publish_text(self.folder / PUBLISHING_NAME, json.dumps({"manifest": digest}))
        move_into_place(self.result, self.target, overwrite)


def _unpacked(path: Path) -> tuple[Any, dict[str, Tensor]]:
    tensors = read_safetensors(path)
    facts = json.loads(tensors.pop(_FACTS).numpy().tobytes().decode("utf-8"))
    return facts, {name.removeprefix(_TENSOR): tensor for name, tensor in tensors.items()}


@contextmanager
def open_job(
    target: Path, description: Mapping[str, Any], command: str, *, is_resumed: bool, is_discarding: bool
) -> Iterator[Job]:
    """The job of `target`, locked, new or gone on with.

    When the body ends, the job's folder goes; likewise after an error that would come again, which is one of usage or
    of numerics, and where nothing is finished yet. After anything else it stays to be resumed: after signals, after a
    lack of space or memory, and after defects.

    Args:
        target: the output.
        description: plain JSON values that name everything the result depends on.
        command: what is running, for the message to others.
        is_resumed: go on where there is something to go on with.
        is_discarding: else remove it.

    Raises:
        UsageError: a job that has been begun, and neither is asked for; or one whose description differs.
        LockedError: another process works on this output.
    """
    path = target.expanduser().resolve()
    created = make_parents(path.parent)
    try:
        with locked(path, command):
            sweep(path)
            _require_decided(path, is_resumed, is_discarding)
            folder = job_folder(path)
            if not is_resumed or not (folder / DESCRIPTION_NAME).exists():
                _remove(folder)
            plain = json.loads(json.dumps(dict(description)))
            if folder.exists():
                _require_same(folder, plain)
                _sweep_inside(folder)
            job = Job(path, folder)
            try:
                if not folder.exists():
                    folder.mkdir()
                    publish_text(folder / DESCRIPTION_NAME, json.dumps(plain, indent=1, sort_keys=True) + "\n")
                    flush(folder.parent)
                yield job
            except BaseException as error:
                if folder.exists() and (isinstance(error, (UsageError, NumericsError)) or not job.is_worth_keeping):
                    _remove(folder)
                raise
            _remove(folder)
    finally:
        remove_empty([level for level in created if level.exists()])


def _sweep_inside(folder: Path) -> None:
    """Remove what a killed process was still writing: everything whose name is not a final one."""
    for path in sorted(folder.iterdir()):
        if path.name not in (DESCRIPTION_NAME, RESULT_NAME, PUBLISHING_NAME) and not _PIECE.fullmatch(path.name):
            remove(path)


def _remove(folder: Path) -> None:
    """Remove a job's folder; killed in the middle, it leaves a temporary name and no job."""
    if folder.exists():
        # The mark is that of the output, because that is what is swept.
        target = folder.parent / folder.name.removeprefix(".").removesuffix(".hqdit-job")
        removed = temporary_path(target)
        folder.rename(removed)
        remove(removed)


def _require_same(folder: Path, now: dict[str, Any]) -> None:
    """Raise `UsageError` with a table unless the job that was begun is the one that is asked for now."""
    where = folder / DESCRIPTION_NAME
    try:
        require_regular(where)
        then = json.loads(where.read_text(encoding="utf-8"))
        names = sorted(then.keys() | now.keys())
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: found a job that cannot be read ({error}), needed the one that hqdit wrote. Fix: --overwrite "
            "discards it"
        ) from error
    lines = [
        f"  {name}: {_shown(then.get(name))} when the job was begun, {_shown(now.get(name))} now"
        for name in names
        if name not in then or name not in now or then[name] != now[name]
    ]
    if lines:
        raise UsageError(
            f"--resume: found a job in {folder} that differs in {len(lines)} places from this command, needed the "
            "same. Fix: resume with the options, model, code and machine that it was begun with, or --overwrite to "
            "discard it\n" + "\n".join(lines)
        )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."
