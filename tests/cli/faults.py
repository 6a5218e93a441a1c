"""Faults of files, each a change of one file in place, and where they are to be found out.

`FAULTS` names them; `SUBJECTS` says which files there are, which faults make sense for each, and which commands read
it. The product of the three is the table that `test_generated_faults.py` runs.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

#: Changes the file that it is given, which is sound.
Fault = Callable[[Path], None]
HUGE = 10**30


def content(replacement: bytes) -> Fault:
    return lambda path: path.write_bytes(replacement) and None


def changed(change: Callable[[bytes], bytes]) -> Fault:
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def instead(make: Callable[[Path], object]) -> Fault:
    """Something else than a regular file under its name."""

    def fault(path: Path) -> None:
        path.unlink()
        make(path)

    return fault


def zipped(name: str, data: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr(name, data)
    return stream.getvalue()


def zip_field(offset_in_directory: int, offset_in_entry: int, value: int) -> Fault:
    """Another 16-bit number in an archive's first entry and in its directory (APPNOTE.TXT, 4.3.7 and 4.3.12)."""

    def change(data: bytes) -> bytes:
        directory = data.index(b"PK\x01\x02")
        for place in (directory + offset_in_directory, offset_in_entry):
            data = data[:place] + value.to_bytes(2, "little") + data[place + 2 :]
        return data

    return changed(change)


#: Of any file whatever.
PLACES: dict[str, Fault] = {
    "missing": Path.unlink,
    "folder": instead(Path.mkdir),
    "fifo": instead(os.mkfifo),
    "link to itself": instead(lambda path: path.symlink_to(path.name)),
    "links in a circle": instead(
        lambda path: (path.symlink_to(f"{path.name}.2"), path.with_name(f"{path.name}.2").symlink_to(path.name))
    ),
    "dangling link": instead(lambda path: path.symlink_to("nowhere")),
    "link to a device": instead(lambda path: path.symlink_to("/dev/zero")),
    "link to its folder": instead(lambda path: path.symlink_to(".")),
}
BYTES: dict[str, Fault] = {
    "zero bytes": content(b""),
    "one byte": content(b"{"),
    "half": changed(lambda data: data[: len(data) // 2]),
    "noise": content(bytes(range(256)) * 8),
    "zeros": changed(lambda data: bytes(len(data))),
    "html": content(b"<!DOCTYPE html><html><title>404</title></html>"),
    "git-lfs": content(b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"),
    "pickle 2": content(pickle.dumps({"a": [1.0] * 9}, 2)),
    "pickle 5": content(pickle.dumps({"a": [1.0] * 9}, 5)),
    "zip": content(zipped("archive/data.pkl", b"data")),
    "gzip": changed(lambda data: gzip.compress(data, mtime=0)),
    "utf-16": changed(lambda data: data.decode("latin-1").encode("utf-16")),
    "nul in front": changed(lambda data: b"\0" + data),
}
#: Of JSON files.
JSON: dict[str, Fault] = {
    "last byte lost": changed(lambda data: data.rstrip()[:-1]),
    "more behind": changed(lambda data: data + b"}"),
    "a list": content(b"[]"),
    "a number": content(b"7"),
    "a text": content(b'"text"'),
    "null": content(b"null"),
    "not a number": content(b"NaN"),
    "single quotes": content(b"{'a': 1}"),
    "trailing comma": content(b'{"a": 1,}'),
    "100,000 lists": content(b"[" * 100_000),
    "50,000 objects": content(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "a number of 5,000 digits": content(b'{"a": ' + b"9" * 5000 + b"}"),
    "no utf-8 inside": content(b'{"a": "\xff\xfe"}'),
    "byte order mark": changed(lambda data: b"\xef\xbb\xbf" + data),
    "empty object": content(b"{}"),
}


def keys(**changes: Any) -> Fault:
    """Set keys of a JSON object; the value `...` removes one. A dot in a key leads into an object."""

    def fault(path: Path) -> None:
        whole = json.loads(path.read_text())
        for name, value in changes.items():
            *outer, last = name.split("/")
            inner = whole
            for key in outer:
                inner = inner[key]
            inner.pop(last, None) if value is ... else inner.__setitem__(last, value)
        path.write_text(json.dumps(whole))

    return fault


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Fault:
    def fault(path: Path) -> None:
        found = load(path.read_bytes())
        change(found)
        path.write_bytes(save({name: tensor.contiguous() for name, tensor in found.items()}))

    return fault


def number(name: str, value: float) -> Fault:
    return tensors(lambda found: found[name].view(-1).__setitem__(0, value))


def header(change: Callable[[dict[str, Any]], object], fill: int = 0) -> Fault:
    """Rewrite the header of a safetensors file, and `fill` more bytes behind its numbers."""

    def fault(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        raw = json.dumps(entries).encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :] + bytes(fill))

    return fault


def entry(key: str, value: Any) -> Fault:
    """One key of the header's first tensor."""
    return header(lambda entries: first(entries).__setitem__(key, value))


def first(entries: dict[str, Any]) -> dict[str, Any]:
    names = sorted((name for name in entries if name != "__metadata__"), key=lambda name: entries[name]["data_offsets"])
    found: dict[str, Any] = entries[names[0]]
    return found


def second(entries: dict[str, Any]) -> dict[str, Any]:
    return first({name: value for name, value in entries.items() if value is not first(entries)})


def overlap(entries: dict[str, Any]) -> None:
    """The second tensor begins where the first one does, and the last one fills the bytes that this frees."""
    begin, stop = second(entries)["data_offsets"]
    second(entries)["data_offsets"] = [0, stop - begin]


#: Of safetensors files.
HEADERS: dict[str, Fault] = {
    "last number lost": changed(lambda data: data[:-4]),
    "bytes behind": changed(lambda data: data + bytes(8)),
    "an archive behind": changed(lambda data: data + zipped("a", b"b")),
    "header of 0 bytes": changed(lambda data: bytes(8) + data[8:]),
    "header of 2^63 bytes": changed(lambda data: (2**63).to_bytes(8, "little") + data[8:]),
    "header of 2^64 - 1 bytes": changed(lambda data: (2**64 - 1).to_bytes(8, "little") + data[8:]),
    "header as long as the file": changed(lambda data: len(data).to_bytes(8, "little") + data[8:]),
    "header one byte short": changed(
        lambda data: (int.from_bytes(data[:8], "little") - 1).to_bytes(8, "little") + data[8:]
    ),
    "unknown dtype": entry("dtype", "F5"),
    "no dtype": header(lambda entries: first(entries).pop("dtype")),
    "other dtype": entry("dtype", "F64"),
    "shape of one more": header(lambda entries: first(entries)["shape"].__setitem__(0, first(entries)["shape"][0] + 1)),
    "negative shape": entry("shape", [-1, -1]),
    "shape of 2^63": entry("shape", [2**63, 2]),
    "shape of 100,000 dimensions": entry("shape", [2] * 100_000),
    "shape as text": entry("shape", "8"),
    "shape of halves": entry("shape", [0.5]),
    "offsets overlap": header(overlap),
    "offsets reversed": header(lambda entries: first(entries)["data_offsets"].reverse()),
    "offsets negative": entry("data_offsets", [-4, 0]),
    "offsets far away": entry("data_offsets", [2**62, 2**62 + 4]),
    "offsets of three": entry("data_offsets", [0, 4, 8]),
    "offsets as text": entry("data_offsets", ["0", "4"]),
    "a hole": header(
        lambda entries: entries.update(more={"dtype": "U8", "shape": [4], "data_offsets": [HUGE, HUGE + 4]})
    ),
    "metadata of numbers": header(lambda entries: entries.update(__metadata__={"format": 7})),
    "entry is null": header(lambda entries: entries.update(more=None)),
}


def subjects_of(*groups: dict[str, Fault], without: tuple[str, ...] = (), **more: Fault) -> dict[str, Fault]:
    """Several groups of faults as one, but for some that are none of this file."""
    merged = {name: fault for group in (*groups, more) for name, fault in group.items()}
    return {name: fault for name, fault in merged.items() if name not in without}


@dataclass(frozen=True)
class Command:
    """A command line that reads a faulty file: `{x}` stands for the faulty subject, below the current folder.

    Attributes:
        line: of the command.
        code: that it has to exit with.
        codes: those of single faults that are found out as something else.
        sound: faults that are none for this command.
    """

    line: str
    code: int = 3
    codes: tuple[tuple[str, int], ...] = ()
    sound: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """A kind of file.

    Attributes:
        source: folder or file in the workspace that is copied to `x`.
        file: the file below the copy that is damaged; "" for the copy itself.
        faults: name -> fault.
        commands: that read it.
        words: of the message, which say where.
        is_whole: whether all rows of it are chosen.
    """

    source: str
    file: str
    faults: dict[str, Fault]
    commands: tuple[Command, ...]
    words: tuple[str, ...] = ()
    is_whole: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    subject: str
    fault: str
    command: Command

    @property
    def code(self) -> int:
        return dict(self.command.codes).get(self.fault, self.command.code)

    def __str__(self) -> str:
        return f"{self.subject}: {self.fault}: {self.command.line}"


def table(subjects: dict[str, Subject]) -> Iterator[tuple[Row, bool]]:
    """Every row, and whether it is one of the choice: each fault with one command of the first kind, in turn.

    Commands with another exit code than the first one's are of other kinds, and are with every fault.
    """
    for name, subject in subjects.items():
        alike = [command for command in subject.commands if command.code == subject.commands[0].code]
        for turn, fault in enumerate(subject.faults):
            for command in subject.commands:
                if fault not in command.sound:
                    is_in_turn = command not in alike or command is alike[turn % len(alike)]
                    yield Row(name, fault, command), subject.is_whole or is_in_turn
