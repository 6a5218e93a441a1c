"""The list of a published folder's files, with size and SHA-256 of each: what `hqdit verify` holds them against."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqdit.errors import CheckpointError, IntegrityError

MANIFEST_NAME = "hqdit_manifest.json"
MANIFEST_VERSION = 1
#: Files that an error names, of each kind.
NAMED_FILES = 10


@dataclass(frozen=True)
class FileFacts:
    """What the manifest says of one file.

    Attributes:
        bytes: its size.
        sha256: of its contents, in hexadecimal digits.
    """

    bytes: int
    sha256: str


@dataclass(frozen=True)
class ManifestDifferences:
    """How a folder differs from its manifest; names are relative to the folder, with slashes, sorted.

    Attributes:
        missing: listed, but not there.
        extra: there, but not listed.
        changed: of another size or with other contents.
    """

    missing: tuple[str, ...]
    extra: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def is_sound(self) -> bool:
        """Whether there are none."""
        return not (self.missing or self.extra or self.changed)


def require_regular(path: Path) -> None:
    """Raise `OSError` for a pipe, a device or a folder: reading one of the first two might never end.

    What does not exist is left to whoever opens it.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_of(folder: Path) -> dict[str, FileFacts]:
    """Every regular file below `folder` but the manifest, by its name relative to it, sorted."""
    return {name: FileFacts((folder / name).stat().st_size, sha256_of(folder / name)) for name in _names(folder)[0]}


def _names(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the regular files below `folder` (links to files count), and of what is neither file nor folder."""
    files: list[str] = []
    others: list[str] = []
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(root) / name).is_symlink()]
        for name in (*names, *links):
            path = Path(root) / name
            (files if path.is_file() else others).append(path.relative_to(folder).as_posix())
    return sorted(set(files) - {MANIFEST_NAME}), sorted(others)


def _canonical(files: dict[str, FileFacts]) -> bytes:
    """The only bytes that stand for these files, so that no byte of a manifest can change unnoticed."""
    described = {name: {"bytes": facts.bytes, "sha256": facts.sha256} for name, facts in files.items()}
    value = {"manifest_version": MANIFEST_VERSION, "files": described}
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode("utf-8")


def write_manifest(folder: Path) -> Path:
    """Write the manifest of `folder` as it is now; returns its path. Equal files give equal bytes."""
    path = folder / MANIFEST_NAME
    path.write_bytes(_canonical(files_of(folder)))
    return path


def read_manifest(folder: Path) -> dict[str, FileFacts]:
    """What the manifest of `folder` lists.

    Raises:
        CheckpointError: no such folder.
        IntegrityError: no manifest, or one that `write_manifest` did not write.
    """
    path = folder / MANIFEST_NAME
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: found no such folder, needed one that hqdit wrote. Fix: check the path")
    try:
        require_regular(path)
        content = path.read_bytes()
    except OSError as error:
        raise IntegrityError(
            f"{path}: found no manifest that can be read ({error.strerror}), needed the one that hqdit writes last. "
            "Fix: make the folder again; folders of hqdit before manifests, or of other programs, have none"
        ) from error
    try:
        value: Any = json.loads(content.decode("utf-8"))
        files = {name: FileFacts(entry["bytes"], entry["sha256"]) for name, entry in value["files"].items()}
        is_ours = content == _canonical(files)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        is_ours = False
    if not is_ours:
        raise IntegrityError(
            f"{path}: found a manifest that was changed or belongs to another version, needed one of version "
            f"{MANIFEST_VERSION} as hqdit wrote it. Fix: get the folder again"
        )
    return files


def compare_with_manifest(folder: Path) -> ManifestDifferences:
    """Read every file of `folder` and compare. Raises as `read_manifest`."""
    listed = read_manifest(folder)
    names, others = _names(folder)
    # Sizes first: a file of another size need not be read.
    changed = [
        name
        for name in names
        if name in listed
        and ((folder / name).stat().st_size != listed[name].bytes or sha256_of(folder / name) != listed[name].sha256)
    ]
    missing = sorted(listed.keys() - set(names))
    extra = sorted({*names, *others} - listed.keys())
    return ManifestDifferences(tuple(missing), tuple(extra), tuple(changed))


def require_sound(folder: Path) -> None:
    """Compare `folder` with its manifest.

    Raises:
        CheckpointError: no such folder.
        IntegrityError: differences, counted and then listed, or a manifest that is missing or was changed.
    """
    report(folder, compare_with_manifest(folder))


def report(folder: Path, found: ManifestDifferences) -> None:
    """Raise `IntegrityError` with the counts, and then the names, unless there are no differences."""
    if found.is_sound:
        return
    kinds = {"missing": found.missing, "extra": found.extra, "changed": found.changed}
    lines = [f"  {kind:<8} {name}" for kind, names in kinds.items() for name in names[:NAMED_FILES]]
    raise IntegrityError(
        f"{folder}: files are not those of its manifest ({len(found.missing)} missing, {len(found.extra)} extra, "
        f"{len(found.changed)} changed), needed exactly those, byte for byte. Fix: copy or make the folder again\n"
        + "\n".join(lines)
    )
