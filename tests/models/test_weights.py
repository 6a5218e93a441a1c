"""Reading weight files: every fault is a CheckpointError whose first line names the file and the fix."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from tiny import require_complete

from hqdit.errors import CheckpointError, ResourceError
from hqdit.models.weights import (
    INDEX_NAME,
    WEIGHTS_NAME,
    locate_weights,
    read_json,
    read_safetensors,
    read_tensor,
    read_weights,
    require_finite,
    require_state,
    weight_files,
    write_safetensors,
)

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b": torch.tensor([1, -2], dtype=torch.int8),
    "half": torch.tensor([0.5, 2.0, -1.0, 4.0, 8.0], dtype=torch.bfloat16),
    "one": torch.tensor(3.0),
}
GOOD = save(TENSORS, metadata={"format": "pt"})
HEADER_BYTES = int.from_bytes(GOOD[:8], "little")


def refused(path: Path, *parts: str, read: Callable[[Path], Any] = read_safetensors) -> str:
    with pytest.raises(CheckpointError) as info:
        read(path)
    assert info.value.exit_code == 3
    require_complete(info.value, str(path), *parts)
    return str(info.value)


def file_of(folder: Path, content: bytes, name: str = WEIGHTS_NAME) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def with_header(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_good_file(tmp_path: Path) -> None:
    found = read_safetensors(file_of(tmp_path, GOOD))
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_truncated_at_every_length(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_NAME
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        refused(path, str(length))


def test_trailing_bytes(tmp_path: Path) -> None:
    for extra in (b"\0", b"PK\x03\x04", b"x" * 4096):
        refused(file_of(tmp_path, GOOD + extra), str(len(GOOD) + len(extra)), str(len(GOOD)), "trailing")


@pytest.mark.parametrize("length", [0, 1, len(GOOD) - 7, 10**8, 10**8 + 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_header_length_lies(tmp_path: Path, length: int) -> None:
    refused(file_of(tmp_path, struct.pack("<Q", length) + GOOD[8:]), str(length))


def test_header_longer_than_the_format_allows(tmp_path: Path) -> None:
    # A sparse file: large enough for its header, of which nothing is read.
    path = file_of(tmp_path, struct.pack("<Q", 10**8 + 1) + b"{}")
    with path.open("r+b") as file:
        file.truncate(8 + 10**8 + 1)
    refused(path, "100000001")


@pytest.mark.parametrize(
    "header",
    [
        b"\0" * 64,
        b"{}\0\0\0\0\0\0",
        b"\xff\xfe{}",
        b"not json",
        b'{"a":',
        b"[]",
        b"7",
        b'"text"',
        b"null",
        b"[" * 100_000,
        b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
        {"a": None},
        {"a": 7},
        {"a": "F32"},
        {"a": []},
        {"a": {}},
        {"a": {"dtype": "F32", "shape": [1]}},
        {"a": {"dtype": "F32", "data_offsets": [0, 4]}},
        {"a": {"shape": [1], "data_offsets": [0, 4]}},
        {"a": entry(offsets=[])},
        {"a": entry(offsets=[0])},
        {"a": entry(offsets=[0, 4, 8])},
        {"a": entry(offsets=4)},
        {"a": entry(offsets=None)},
        {"a": entry(offsets=["0", "4"])},
        {"a": entry(offsets=[0.0, 4.0])},
        {"a": entry(offsets=[0, float("inf")])},
        {"a": entry(offsets=[0, float("nan")])},
        {"a": entry(offsets=[4, 0])},
        {"a": entry(offsets=[-4, 0])},
        {"a": entry(offsets=[0, 8])},
        {"a": entry(offsets=[0, 2**63])},
        {"a": entry(offsets=[1, 5])},
        {"a": entry(shape=None)},
        {"a": entry(shape=1)},
        {"a": entry(shape="1")},
        {"a": entry(shape=[2])},
        {"a": entry(shape=[-1])},
        {"a": entry(shape=[-1, -1])},
        {"a": entry(shape=[0.5, 2])},
        {"a": entry(shape=[2**63, 2])},
        {"a": entry(dtype="F5")},
        {"a": entry(dtype=None)},
        {"a": entry(dtype=["F32"])},
        {"a": entry(offsets=[0, 4]), "b": entry(offsets=[0, 4])},
        {"a": entry(offsets=[0, 4]), "b": entry(offsets=[2, 6])},
        {"a": entry(offsets=[0, 4]), "b": entry(offsets=[8, 12])},
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        {"__metadata__": {"n": 1}, "a": entry()},
        {"__metadata__": [], "a": entry()},
    ],
    ids=lambda header: str(header)[:60],
)
def test_header_that_describes_no_tensors(tmp_path: Path, header: object) -> None:
    # As many data bytes as the header asks for, where it asks for a sensible number: the header alone is at fault.
    raw = with_header(header)
    for data in (b"", b"\0" * 4, b"\0" * 8, b"\0" * 12):
        refused(file_of(tmp_path, raw + data))


def test_every_flipped_header_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_NAME
    data_bytes = len(GOOD) - 8 - HEADER_BYTES
    outcomes = {"refused": 0, "read": 0}
    for position in range(8 + HEADER_BYTES):
        for bit in range(8):
            damaged = bytearray(GOOD)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                found = read_safetensors(path)
            except CheckpointError as error:
                require_complete(error, str(path))
                outcomes["refused"] += 1
            else:  # another letter in a name or another dtype of equal size: all bytes are still accounted for
                assert sum(t.numel() * t.element_size() for t in found.values()) == data_bytes
                outcomes["read"] += 1
    assert outcomes["refused"] > outcomes["read"] > 0


@given(st.integers(0, 64), st.binary(max_size=200))
def test_noise_is_refused(tmp_path_factory: pytest.TempPathFactory, keep: int, noise: bytes) -> None:
    path = tmp_path_factory.mktemp("noise") / WEIGHTS_NAME
    content = GOOD[:keep] + noise
    path.write_bytes(content)
    if not GOOD.startswith(content) and content != with_header(b"{}"):
        refused(path)


@pytest.mark.parametrize("padding", [0x280, 0x380, 0x480, 0x580, 0x3C])
def test_no_header_length_is_taken_for_another_kind_of_file(tmp_path: Path, padding: int) -> None:
    # 0x280 and 0x480 start a file with the bytes of a pickle, 0x3c with a "<".
    header = json.dumps({"a": entry()}, separators=(",", ":")).encode().ljust(padding)
    found = read_safetensors(file_of(tmp_path, with_header(header, struct.pack("<f", 1.5))))
    assert found["a"].tolist() == [1.5]


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickle(tmp_path: Path, protocol: int) -> None:
    refused(file_of(tmp_path, pickle.dumps({"a": [1.0] * 99}, protocol)), "pickle", "save_pretrained")


def test_pickles_are_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (canary,)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        refused(file_of(tmp_path, pickle.dumps(Bomb(), protocol)))
    torch.save({"a": torch.zeros(1)}, tmp_path / WEIGHTS_NAME)
    refused(tmp_path / WEIGHTS_NAME, "zip archive or torch .pt")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "found", "fix"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git-LFS pointer", "git lfs pull"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "HTML", "download"),
        (b"<?xml version='1.0'?><Error/>", "XML", "download"),
        (b"PK\x03\x04" + b"\0" * 60, "zip archive", "safetensors.torch.save_file"),
        (b"", "0 bytes", "download"),
        (b"\0" * 300, "300 bytes", "download"),
    ],
    ids=["lfs", "html", "xml", "zip", "empty", "zeros"],
)
def test_other_kinds_of_files(tmp_path: Path, content: bytes, found: str, fix: str) -> None:
    refused(file_of(tmp_path, content), found, fix)


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    missing, folder, pipe, link = (tmp_path / name for name in ("missing", "folder", "pipe", "link"))
    folder.mkdir()
    os.mkfifo(pipe)
    link.symlink_to(missing)
    for path in (missing, folder, pipe, link):
        refused(path, "regular file")
        refused(path, read=lambda path: read_json(path, "a test"))
    missing.write_bytes(GOOD)
    assert read_safetensors(link).keys() == TENSORS.keys()


@pytest.mark.parametrize(
    "text", [b"", b"{", b"\xff", b"[1]", b"7", b"null", b'{"a": 1,}', b"[" * 100_000, b"\xef\xbb\xbf{}"]
)
def test_json_that_is_no_object(tmp_path: Path, text: bytes) -> None:
    refused(file_of(tmp_path, text, "config.json"), "a test", read=lambda path: read_json(path, "a test"))


def shards(folder: Path, files: dict[str, dict[str, torch.Tensor]], weight_map: object = None) -> Path:
    """Shard files and their index."""
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    places = {tensor: name for name, tensors in files.items() for tensor in tensors}
    index = {"metadata": {}, "weight_map": places if weight_map is None else weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index))
    return folder


def test_shards_are_one_model(tmp_path: Path) -> None:
    shards(tmp_path, {"x-1.safetensors": {"a": torch.ones(2)}, "x-2.safetensors": {"b": torch.zeros(3)}})
    assert [path.name for path in weight_files(tmp_path)] == ["x-1.safetensors", "x-2.safetensors"]
    found = read_weights(tmp_path)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": [1, 1], "b": [0, 0, 0]}


def test_place_of_every_tensor_and_one_tensor_alone(tmp_path: Path) -> None:
    files = {"x-1.safetensors": {"a": torch.ones(2), "c": torch.zeros(4)}, "x-2.safetensors": {"b": torch.arange(3)}}
    places = locate_weights(shards(tmp_path, files))
    assert places == {name: tmp_path / file for file, tensors in files.items() for name in tensors}
    whole = read_weights(tmp_path)
    for name, path in places.items():
        alone = read_tensor(path, name)
        assert torch.equal(alone, whole[name]) and alone.dtype == whole[name].dtype
        assert alone.data_ptr() != whole[name].data_ptr()


def test_single_file_goes_before_an_index(tmp_path: Path) -> None:
    shards(tmp_path, {"x-1.safetensors": {"a": torch.ones(2)}})
    save_file({"b": torch.ones(1)}, tmp_path / WEIGHTS_NAME)
    assert read_weights(tmp_path).keys() == {"b"}


def test_missing_shard(tmp_path: Path) -> None:
    shards(tmp_path, {"x-1.safetensors": {"a": torch.ones(2)}}, {"a": "x-1.safetensors", "b": "x-2.safetensors"})
    with pytest.raises(CheckpointError) as info:
        read_weights(tmp_path)
    require_complete(info.value, str(tmp_path / "x-2.safetensors"))


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    files = {
        "x-1.safetensors": {"a": torch.ones(2), "c": torch.ones(1)},
        "x-2.safetensors": {"a": torch.zeros(2), "b": torch.ones(1)},
    }
    with pytest.raises(CheckpointError) as info:
        read_weights(shards(tmp_path, files))
    require_complete(info.value, str(tmp_path / "x-2.safetensors"), "'a'", "two shards")


@pytest.mark.parametrize(
    "shard",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "sub/x.safetensors",
        "..\\outside.safetensors",
        "C:\\outside.safetensors",
        "C:outside.safetensors",
        "\\\\server\\share.safetensors",
        "x.bin",
        "x.pt",
        "..",
        "",
        7,
        None,
    ],
)
def test_shard_names_stay_in_the_folder(tmp_path: Path, shard: object) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "outside.safetensors")
    shards(folder, {"x.safetensors": {"b": torch.ones(1)}}, {"a": shard, "b": "x.safetensors"})
    with pytest.raises(CheckpointError) as info:
        weight_files(folder)
    require_complete(info.value, str(folder / INDEX_NAME), repr(str(shard)))


@pytest.mark.parametrize("weight_map", [[], ["x.safetensors"], "x.safetensors", 7, {}], ids=str)
def test_index_without_a_map(tmp_path: Path, weight_map: object) -> None:
    with pytest.raises(CheckpointError) as info:
        weight_files(shards(tmp_path, {}, weight_map))
    require_complete(info.value, str(tmp_path))


def test_only_pickled_weights(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.bin")
    refused(tmp_path, "only diffusion_pytorch_model.bin", WEIGHTS_NAME, read=weight_files)


def test_weights_under_another_name(tmp_path: Path) -> None:
    file_of(tmp_path, GOOD, "model.safetensors")
    refused(tmp_path, "only model.safetensors", WEIGHTS_NAME, read=weight_files)


def test_written_files_come_back(tmp_path: Path) -> None:
    path = tmp_path / WEIGHTS_NAME
    write_safetensors(TENSORS, path)
    found = read_safetensors(path)
    assert found.keys() == TENSORS.keys()
    assert all(found[name].dtype == TENSORS[name].dtype and torch.equal(found[name], TENSORS[name]) for name in found)
    assert path.stat().st_mode & 0o777 == 0o644


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ResourceError) as info:
        write_safetensors(TENSORS, tmp_path / "missing" / WEIGHTS_NAME)
    assert info.value.exit_code == 5
    require_complete(info.value, WEIGHTS_NAME)


def test_no_weights_at_all(tmp_path: Path) -> None:
    refused(tmp_path, "no weight file", WEIGHTS_NAME, INDEX_NAME, read=weight_files)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights(dtype: torch.dtype, bad: float) -> None:
    tensors = {"z": torch.full((2,), torch.nan), "a": torch.zeros(3), "m.weight": torch.ones(4, 5, dtype=dtype)}
    tensors["m.weight"][2, 3] = bad
    tensors["m.weight"][3, 0] = bad
    with pytest.raises(CheckpointError) as info:
        require_finite(tensors, Path("some/file"))
    require_complete(info.value, "some/file", "'m.weight'", " 2 ", "(2, 3)")


def test_finite_weights() -> None:
    largest = torch.tensor([torch.finfo(torch.float32).max, -0.0, 1e-45])
    tensors = {"f": largest, "i": torch.tensor([2**62]), "empty": torch.zeros(0), "b": torch.tensor([True])}
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    require_finite(tensors, Path("file"))
    assert all(torch.equal(tensors[name], before[name]) for name in before)


def test_state_that_does_not_fit() -> None:
    needed = {f"layer.{i}": torch.zeros(2, 3) for i in range(9)}
    found = dict(needed)
    for i in range(7):
        del found[f"layer.{i}"]
    found |= {"extra": torch.zeros(1), "layer.8": torch.zeros(3, 2)}
    with pytest.raises(CheckpointError) as info:
        require_state(found, needed, Path("some/folder"))
    require_complete(info.value, "some/folder", "7 missing", "1 unexpected", "1 of another shape")
    table = str(info.value).splitlines()[1:]
    assert [line.split()[:2] for line in table[:5]] == [["missing", f"layer.{i}"] for i in range(5)]
    assert "layer.5" not in str(info.value)  # five of a kind are enough
    assert any("unexpected" in line and "extra" in line for line in table)
    assert any("layer.8" in line and "(3, 2)" in line and "(2, 3)" in line for line in table)
    require_state(dict(needed), needed, Path("some/folder"))
    for changed in ({**needed, "x": needed["layer.0"]}, {n: t for n, t in needed.items() if n != "layer.4"}):
        with pytest.raises(CheckpointError):
            require_state(changed, needed, Path("some/folder"))
