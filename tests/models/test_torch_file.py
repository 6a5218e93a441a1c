"""Reading PyTorch files in a child process: what is read, what is refused, and that nothing in a file ever runs."""

from __future__ import annotations

import argparse
import builtins
import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import require_complete
from torch import Tensor, nn

from hqdit.errors import CheckpointError, EnvironmentUnavailable, HQDiTError, UsageError
from hqdit.models import torch_file
from hqdit.models.torch_file import read_torch_file


def weights(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {
        "a.weight": torch.randn(3, 5, generator=random),
        "a.bias": torch.randn(3, generator=random).half(),
        "b": torch.randn((), generator=random, dtype=torch.float64),
        "c": torch.randn(2, 2, 2, generator=random).bfloat16(),
    }


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def refused(path: Path, *parts: str, error: type[HQDiTError] = CheckpointError, key: str | None = None) -> None:
    workspace = path.parent / "workspace"
    workspace.mkdir(exist_ok=True)
    with pytest.raises(error) as info:
        read_torch_file(path, key, workspace)
    require_complete(info.value, path.name if error is CheckpointError else "", *parts)
    assert len(str(info.value).splitlines()) == 1 and len(str(info.value)) < 1000
    assert list(workspace.iterdir()) == []


READ_ALL = """
import sys
from hqdit.models.torch_file_reader import main
for path in sys.argv[1:]:
    main([path, path + ".safetensors", path + ".json", ""])
"""


def answers(paths: list[Path]) -> list[dict[str, str]]:
    """What the child's program says to each file, all read by one process, since it starts for a second."""
    command = [sys.executable, "-c", READ_ALL, *map(str, paths)]
    subprocess.run(command, capture_output=True, timeout=240, check=True)
    assert not any(Path(f"{path}.safetensors").exists() for path in paths)
    return [json.loads(Path(f"{path}.json").read_text()) for path in paths]


def all_refused(cases: dict[Path, str]) -> None:
    for (path, part), said in zip(cases.items(), answers(list(cases)), strict=True):
        assert said.keys() == {"found", "needed", "fix"} and all(said.values()), path
        line = f"found {said['found']}, needed {said['needed']}. Fix: {said['fix']}"
        assert part in line, (path.name, part, line)


# --- what is read


@pytest.mark.parametrize("wrap", [dict, OrderedDict, lambda state: {k: nn.Parameter(v) for k, v in state.items()}])
def test_a_state_dict(tmp_path: Path, wrap: Callable[[dict[str, Tensor]], object]) -> None:
    found, key = read_torch_file(saved(tmp_path / "x.pt", wrap(weights())), None, tmp_path)
    assert key is None and found.keys() == weights().keys()
    for name, tensor in weights().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


def training_checkpoint(**parts: object) -> dict[str, object]:
    """What a training writes beside the weights: the optimizer's state and the command line."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {**parts, "opt": optimizer.state_dict(), "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4, ema=None)}


@pytest.mark.parametrize(
    ("parts", "wanted", "taken"),
    [
        (("model", "ema"), None, "ema"),
        (("ema", "model"), "model", "model"),
        (("model", "ema"), "ema", "ema"),
        (("model",), None, "model"),
        (("ema",), "ema", "ema"),
    ],
    ids=str,
)
def test_a_training_checkpoint(tmp_path: Path, parts: tuple[str, ...], wanted: str | None, taken: str) -> None:
    states = {part: weights(seed) for seed, part in enumerate(parts)}
    found, key = read_torch_file(saved(tmp_path / "x.pt", training_checkpoint(**states)), wanted, tmp_path)
    assert key == taken and found.keys() == weights().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in states[taken].items())


def test_this_process_never_unpickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "x.pt", weights())

    def never(*_: object, **__: object) -> None:
        raise AssertionError("unpickled here")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, never)
    assert read_torch_file(path, None, tmp_path)[0].keys() == weights().keys()


def test_the_child_gets_no_secrets_and_a_plain_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[list[str], dict[str, Any]]] = []
    monkeypatch.setenv("HF_TOKEN", "secret")

    def record(command: list[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        calls.append((command, options))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(torch_file.subprocess, "run", record)
    refused(saved(tmp_path / "x; touch y.pt", weights()), "status 3")
    ((command, options),) = calls
    assert command[:4] == [sys.executable, "-P", "-m", "hqdit.models.torch_file_reader"]
    assert command[4] == str(tmp_path / "x; touch y.pt")
    assert "shell" not in options and options["timeout"] > 0
    assert "secret" not in options["env"].values() and "HF_TOKEN" not in options["env"]


def test_the_limits_are_set(tmp_path: Path) -> None:
    code = (
        "import json, resource\n"
        "from hqdit.models.torch_file_reader import _limit_resources\n"
        "_limit_resources(10**6)\n"
        "names = ('AS', 'CPU', 'FSIZE', 'CORE')\n"
        "print(json.dumps({n: resource.getrlimit(getattr(resource, 'RLIMIT_' + n)) for n in names}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    limits = json.loads(done.stdout)
    assert limits["CORE"] == [0, 0]
    assert all(soft == hard for soft, hard in limits.values())
    assert 60 <= limits["CPU"][0] <= 180
    assert 10**6 < limits["FSIZE"][0] < 10**8
    assert 10**9 < limits["AS"][0] < 100 * 10**9


# --- what would run


class Payload:
    """Pickled as a call."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


PAYLOADS: dict[str, Callable[[Path], Payload]] = {
    "os.system": lambda canary: Payload(os.system, f"touch '{canary}'"),
    "eval": lambda canary: Payload(eval, f"open({str(canary)!r}, 'w').close()"),
    "exec": lambda canary: Payload(exec, f"open({str(canary)!r}, 'w').close()"),
    "open": lambda canary: Payload(open, str(canary), "w"),
    "subprocess": lambda canary: Payload(subprocess.Popen, ["touch", str(canary)]),
    "getattr": lambda canary: Payload(builtins.getattr, Path, "touch"),
    "import": lambda canary: Payload(__import__, "antigravity"),
    "path": lambda canary: Payload(Path.touch, canary),
    "torch.load": lambda canary: Payload(torch.load, str(canary)),
    "compile": lambda canary: Payload(compile, "1", "x", "eval"),
}


def test_a_pickle_that_calls_something(tmp_path: Path) -> None:
    canary, cases = tmp_path / "canary", {}
    for name, make in PAYLOADS.items():
        payload = make(canary)
        for place, content in {
            "alone": payload,
            "beside tensors": {**weights(), "z": payload},
            "in args": training_checkpoint(ema=weights(), more=argparse.Namespace(x=payload)),
        }.items():
            cases[saved(tmp_path / f"{name} {place}.pt", content)] = "no part of a state dict"
    all_refused(cases)
    assert not canary.exists()
    refused(next(iter(cases)), "no part of a state dict")


def test_the_payloads_would_run(tmp_path: Path) -> None:
    """Else their canary would prove nothing."""
    for name in ("os.system", "eval", "exec", "path"):
        canary = tmp_path / name
        pickle.loads(pickle.dumps(PAYLOADS[name](canary)))
        assert canary.exists()


# --- what is no checkpoint


def archive(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "an empty file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "error page"),
        (pickle.dumps({"a": 1}, protocol=2), "before version 1.6"),
        ((2).to_bytes(8, "little") + b"{}", "a safetensors file"),
        (bytes(range(256)), "no zip archive"),
        (b"PK\x03\x04" + bytes(100), "truncated or damaged"),
    ],
    ids=["empty", "lfs", "html", "pickle", "safetensors", "noise", "zip start"],
)
def test_other_files(tmp_path: Path, content: bytes, part: str) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    refused(tmp_path / "x.pt", part)


def test_no_regular_file(tmp_path: Path) -> None:
    refused(tmp_path / "gone.pt", "no such file")
    (tmp_path / "folder.pt").mkdir()
    refused(tmp_path / "folder.pt", "no regular file")
    os.mkfifo(tmp_path / "fifo.pt")
    refused(tmp_path / "fifo.pt", "no regular file")


def test_a_file_in_the_format_of_old_versions(tmp_path: Path) -> None:
    torch.save(weights(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt", "before version 1.6")


def test_truncated(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.pt", weights()).read_bytes()
    cases = {}
    for length in range(64, len(whole), 97):
        (path := tmp_path / f"{length}.pt").write_bytes(whole[:length])
        cases[path] = "truncated or damaged"
    all_refused(cases)
    refused(path, "truncated or damaged", "download or copy")


def test_a_damaged_pickle(tmp_path: Path) -> None:
    contents = (b"", b"\x80\x02", b"\x80\x02}q\x00.", b"not a pickle", b"\x80\x02K\x01.", b"\x80\x02(lp0\n")
    all_refused(
        {
            archive(
                tmp_path / f"{number}.pt",
                {"archive/data.pkl": content, "archive/version": b"3\n", "archive/byteorder": b"little"},
            ): "Fix"
            for number, content in enumerate(contents)
        }
    )


def test_flipped_bits_are_refused_or_change_no_more_than_numbers(tmp_path: Path) -> None:
    """One bit at a time over the directory, the pickle and everything between the tensors."""
    whole = saved(tmp_path / "whole.pt", {"a": torch.ones(4)}).read_bytes()
    paths = []
    for place in range(0, len(whole), 13):
        (path := tmp_path / f"{place}.pt").write_bytes(
            whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :]
        )
        paths.append(path)
    subprocess.run([sys.executable, "-c", READ_ALL, *map(str, paths)], capture_output=True, timeout=240, check=True)
    for path in paths:
        said = json.loads(Path(f"{path}.json").read_text())
        if said.keys() == {"weights"}:
            (name, tensor), *more = load_file(f"{path}.safetensors").items()
            assert len(name) == 1 and not more and tensor.nbytes <= 32
        else:
            assert said.keys() == {"found", "needed", "fix"}


def test_a_zip_bomb(tmp_path: Path) -> None:
    entries = {"archive/data.pkl": b"\x80\x02}.", "archive/data/0": bytes(10**7), "archive/version": b"3\n"}
    bomb = archive(tmp_path / "x.pt", entries, zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 10**5
    refused(bomb, "compressed")


def test_entries_that_lie_on_each_other(tmp_path: Path) -> None:
    """A directory that names the same bytes many times, so that they would be read many times."""
    path = archive(tmp_path / "x.pt", {"archive/data.pkl": b"\x80\x02}.", "archive/data/0": bytes(100_000)})
    with zipfile.ZipFile(path) as file:
        first = file.infolist()[1]
    stream = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(stream, "a") as file:
        for number in range(1, 50):
            again = zipfile.ZipInfo(f"archive/data/{number}")
            again.header_offset, again.file_size = first.header_offset, first.file_size
            again.compress_size, again.CRC = first.compress_size, first.CRC
            file.filelist.append(again)
            file.NameToInfo[again.filename] = again
        file._didModify = True  # type: ignore[attr-defined]
    path.write_bytes(stream.getvalue())
    refused(path, "claims")


def test_other_archives(tmp_path: Path) -> None:
    empty = b"\x80\x02}."
    all_refused(
        {
            archive(tmp_path / "docx.pt", {"word/document.xml": b"<x/>"}): "0 pickles",
            archive(tmp_path / "two.pt", {"a/data.pkl": b"x", "b/data.pkl": b"y"}): "2 pickles",
            archive(tmp_path / "script.pt", {"a/data.pkl": empty, "a/constants.pkl": empty}): "TorchScript",
            archive(tmp_path / "large.pt", {"a/data.pkl": bytes(2**26 + 1)}): "pickle of 67,108,865 bytes",
        }
    )


def test_memory_that_the_size_does_not_explain(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", {"a": Payload(bytearray, 3 * 10**9)})
    refused(path, "more data than a file of its size explains")


# --- what is in it


def test_other_contents(tmp_path: Path) -> None:
    contents: list[tuple[object, str]] = [
        ([torch.zeros(1)], "a list"),
        (torch.zeros(1), "a Tensor"),
        (3, "a int"),
        ({}, "0 names"),
        ({"ema": {}}, "0 names"),
        ({"a": 1}, "'a', a int"),
        ({"a": torch.zeros(1), "b": [torch.zeros(1)]}, "'b', a list"),
        ({"a": {"b": torch.zeros(1)}}, "'a', a dict"),
        ({1: torch.zeros(1)}, "the name 1"),
        ({"a": torch.zeros(2).int()}, "torch.int32"),
        ({"a": torch.zeros(2).bool()}, "torch.bool"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "torch.complex64"),
        ({"a": torch.eye(3).to_sparse()}, "torch.sparse_coo"),
        ({"a": torch.zeros(3, 2, device="meta")}, "meta"),
        ({"a": torch.zeros(1).expand(10**9)}, "side by side"),
        ({"a": torch.zeros(3, 2).t()}, "side by side"),
        ({f"a{i}": weight for weight in [torch.zeros(1000)] for i in range(100)}, "in a file of"),
    ]
    all_refused({saved(tmp_path / f"{n}.pt", content): part for n, (content, part) in enumerate(contents)})


def test_a_name_that_drives_a_terminal(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as info:
        read_torch_file(saved(tmp_path / "x.pt", {"\x1b[2J\n": 1}), None, tmp_path)
    assert str(info.value).isprintable()


@pytest.mark.parametrize(
    ("content", "key", "parts"),
    [
        (weights(), "ema", ("'ema'", "a.weight", "leave out --weights")),
        ({"model": weights()}, "ema", ("'ema'", "model", "--weights model")),
        ({"ema": weights()}, "model", ("'model'", "--weights ema")),
    ],
    ids=["plain", "no ema", "no model"],
)
def test_weights_that_are_not_there(tmp_path: Path, content: object, key: str, parts: tuple[str, ...]) -> None:
    refused(saved(tmp_path / "x.pt", content), *parts, key=key)


def test_another_key(tmp_path: Path) -> None:
    refused(saved(tmp_path / "x.pt", weights()), "--weights", "'opt'", error=UsageError, key="opt")


# --- a child that fails


@pytest.mark.parametrize(
    ("status", "answer", "part"),
    [
        (None, None, "took too long"),
        (-9, None, "signal 9"),
        (-11, '{"weights": null}', "signal 11"),
        (1, None, "status 1"),
        (1, '{"found": "x"}', "status 1"),
        (1, "{", "status 1"),
        (1, "[]", "status 1"),
        (0, None, "status 0"),
        (0, "{}", "status 0"),
        (0, '{"weights": "opt"}', "status 0"),
        (1, '{"found": "a\\u001bb\\nc", "needed": "d", "fix": "e"}', "needed d. Fix: e"),
        (1, json.dumps({"found": "f" * 100_000, "needed": "d", "fix": "e"}), "status 1"),
        (1, json.dumps({"found": "f" * 10_000, "needed": "d", "fix": "e"}), "f" * 400),
    ],
)
def test_what_the_child_says_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int | None, answer: str | None, part: str
) -> None:
    def child(_path: Path, _handed: Path, said: Path, _weights: str | None) -> int | None:
        if answer is not None:
            said.write_text(answer)
        return status

    monkeypatch.setattr(torch_file, "_run_child", child)
    refused(saved(tmp_path / "x.pt", weights()), part)


def test_what_the_child_hands_over_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def child(_path: Path, handed: Path, said: Path, _weights: str | None) -> int:
        handed.write_bytes(pickle.dumps(1))
        said.write_text('{"weights": null}')
        return 0

    monkeypatch.setattr(torch_file, "_run_child", child)
    path = saved(tmp_path / "x.pt", weights())
    with pytest.raises(CheckpointError) as info:
        read_torch_file(path, None, tmp_path)
    require_complete(info.value, "weights.safetensors")


def test_a_system_without_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_file.importlib.util, "find_spec", lambda _name: None)
    refused(saved(tmp_path / "x.pt", weights()), "limits", error=EnvironmentUnavailable)
