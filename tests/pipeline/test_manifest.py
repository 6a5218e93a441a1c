"""The manifest of a published folder: every change of any file, its own included, is found and named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import require_complete, tiny_dit

from hqdit.errors import CheckpointError, IntegrityError
from hqdit.pipeline.checkpoint import load, save
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.manifest import MANIFEST_NAME, ManifestDifferences, compare_with_manifest, require_sound
from hqdit.pipeline.publish import publish_folder
from hqdit.pipeline.quantize import quantize

FLIPS, TRUNCATIONS = 4000, 1000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model in a few dozen KiB."""
    out = tmp_path_factory.mktemp("checkpoint") / "q"
    model = tiny_dit(attention_head_dim=12, num_layers=1)
    save(quantize(model, QuantizationConfig.preset("minmax")), out)
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with publish_folder(tmp_path / "out") as staged:
        (staged / "deep").mkdir()
        (staged / "deep" / "a").write_bytes(b"a")
        (staged / "b").write_bytes(b"")
        (staged / "empty").mkdir()
    return tmp_path / "out"


def test_what_it_lists(folder: Path) -> None:
    found = json.loads((folder / MANIFEST_NAME).read_text())
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of no bytes, FIPS 180-4
    assert found["manifest_version"] == 1 and sorted(found["files"]) == ["b", "deep/a"]
    assert found["files"]["b"] == {"bytes": 0, "sha256": empty} and found["files"]["deep/a"]["bytes"] == 1
    require_sound(folder)


def test_equal_folders_have_equal_manifests(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    with publish_folder(tmp_path / "again") as staged:
        for path in (copy / "deep", copy / "b"):
            (shutil.copytree if path.is_dir() else shutil.copyfile)(path, staged / path.name)
    assert (tmp_path / "again" / MANIFEST_NAME).read_bytes() == (folder / MANIFEST_NAME).read_bytes()
    require_sound(copy)


def test_every_kind_of_difference_is_named(folder: Path) -> None:
    (folder / "deep" / "a").write_bytes(b"x")
    (folder / "b").rename(folder / "c")
    (folder / "dangling").symlink_to("nowhere")
    assert compare_with_manifest(folder) == ManifestDifferences(("b",), ("c", "dangling"), ("deep/a",))
    with pytest.raises(IntegrityError) as info:
        require_sound(folder)
    assert info.value.exit_code == 7
    require_complete(info.value, str(folder), "1 missing", "2 extra", "1 changed")
    assert str(info.value).splitlines()[1:] == [
        "  missing  b",
        "  extra    c",
        "  extra    dangling",
        "  changed  deep/a",
    ]


def test_links_to_files_count_as_files(folder: Path, tmp_path: Path) -> None:
    (folder / "deep" / "a").rename(tmp_path / "blob")  # as a hub's cache lays files out
    (folder / "deep" / "a").symlink_to(tmp_path / "blob")
    require_sound(folder)


def test_no_manifest_and_no_folder(folder: Path, tmp_path: Path) -> None:
    (folder / MANIFEST_NAME).unlink()
    with pytest.raises(IntegrityError, match="no manifest"):
        require_sound(folder)
    for missing in (tmp_path / "nowhere", folder / "b"):
        with pytest.raises(CheckpointError, match="no such folder"):
            require_sound(missing)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b"\xff", b'{"files": []}', b'{"files": {"a": 1}}', b"[" * 100_000, b'{"files": {}}'],
    ids=repr,
)
def test_something_else_under_its_name(folder: Path, content: bytes) -> None:
    (folder / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(IntegrityError, match="changed or belongs"):
        require_sound(folder)


def test_every_changed_spelling_of_the_manifest_is_found(folder: Path) -> None:
    text = (folder / MANIFEST_NAME).read_text()
    for other in (text.upper(), text + " ", text.replace("\n", "\r\n"), json.dumps(json.loads(text))):
        (folder / MANIFEST_NAME).write_text(other, newline="")
        with pytest.raises(IntegrityError):
            require_sound(folder)


def test_the_manifest_changes_nothing_for_a_loader(checkpoint: Path, tmp_path: Path) -> None:
    load(checkpoint)
    copy = Path(shutil.copytree(checkpoint, tmp_path / "q"))
    (copy / MANIFEST_NAME).unlink()
    load(copy)


def test_flipped_bits_and_truncations_of_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """A seeded choice over all bits of all files, and over all shorter lengths of them."""
    folder = Path(shutil.copytree(checkpoint, tmp_path / "q"))
    contents = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    sizes = [len(content) for content in contents.values()]
    draw = random.Random(0)
    for number in range(FLIPS + TRUNCATIONS):
        (path,) = draw.choices(list(contents), sizes)
        content = bytearray(contents[path])
        if number < FLIPS:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        else:
            del content[draw.randrange(len(content)) :]
        path.write_bytes(content)
        with pytest.raises(IntegrityError):
            require_sound(folder)
        path.write_bytes(contents[path])
    require_sound(folder)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_flipped_bit_and_every_truncation(
    checkpoint: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "q"))
    files = sorted(folder.iterdir())
    record_property("files", len(files))
    record_property("bytes", sum(path.stat().st_size for path in files))
    for path in files:
        whole = path.read_bytes()
        for bit in range(8 * len(whole)):
            content = bytearray(whole)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            with pytest.raises(IntegrityError):
                require_sound(folder)
        for length in range(len(whole)):
            path.write_bytes(whole[:length])
            with pytest.raises(IntegrityError):
                require_sound(folder)
        path.write_bytes(whole)
