"""Every fault of a file, with every command that reads it: exit code, a complete line, and nothing damaged.

The table is the product of faults and commands in `SUBJECTS`. All rows run in one folder in which nothing may change.
"""

from __future__ import annotations

import io
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import Hqdit
from contract import marks, require_contract
from faults import (
    BYTES,
    HEADERS,
    HUGE,
    JSON,
    PLACES,
    Command,
    Row,
    Subject,
    changed,
    content,
    keys,
    number,
    subjects_of,
    table,
    tensors,
    zip_field,
    zipped,
)
from original_dit import original_state, save_original
from PIL import Image
from safetensors.torch import save_file

from hqdit.cli.main import run
from hqdit.jobs.stores import JobBlocks
from hqdit.models.weights import WEIGHTS_NAME
from hqdit.pipeline.manifest import MANIFEST_NAME
from hqdit.records.run_record import RECORD_NAME, Column, RunRecord, Table

SMALL: dict[str, Any] = {"attention_head_dim": 12, "num_layers": 1}
LAYER = "transformer_blocks.0.attn1.to_q"
QUANTIZE = Command("quantize {x} --out out --preset minmax")
REPLACE = Command("quantize {x} --out full --overwrite --preset minmax")
SAMPLE = Command("sample {x} --out out --num 1 --steps 1")
AGAINST = Command("evaluate quantized --against {x} --num 1 --steps 1")
INSPECT, DEQUANTIZE = Command("inspect {x}"), Command("dequantize {x} --out out")
VERIFY = Command("verify {x}", 7)
CALIBRATE = Command("quantize model --out out --preset gptq --calibration {x}")
CONVERT = "convert {x} --out out --heads 4"
#: Of files that lie in the workspace itself, which holds the output as well.
LONE_PLACES = {name: fault for name, fault in PLACES.items() if name != "link to its folder"}
#: Of files that may be absent.
ABSENT = ("missing", "dangling link", "link to itself", "links in a circle")


def archive_of(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


SUBJECTS = {
    "weights": Subject(
        "model",
        WEIGHTS_NAME,
        subjects_of(
            PLACES,
            BYTES,
            HEADERS,
            **{
                "a NaN": number(f"{LAYER}.weight", float("nan")),
                "an infinity": number("proj_out_2.bias", float("inf")),
                "a tensor lost": tensors(lambda found: found.pop("proj_out_2.bias")),
                "a tensor more": tensors(lambda found: found.update(more=torch.zeros(1))),
                "a name of control characters": tensors(lambda found: found.update({"\x1b[2J\u202e": torch.zeros(1)})),
                "another shape": tensors(lambda found: found.update({"proj_out_2.bias": torch.zeros(3)})),
                "integers": tensors(lambda found: found.update({"proj_out_2.bias": torch.zeros(16).int()})),
                "no numbers": tensors(lambda found: found.update({"proj_out_2.bias": torch.zeros(0)})),
            },
        ),
        (QUANTIZE, REPLACE, SAMPLE, AGAINST),
        ("SOURCE",),
    ),
    "config": Subject(
        "model",
        "config.json",
        subjects_of(
            PLACES,
            BYTES,
            JSON,
            **{
                "unknown key": keys(rope=True),
                "no class": keys(_class_name=...),
                "another class": keys(_class_name="UNet2DModel"),
                "a class of control characters": keys(_class_name="DiT\x1b[2J"),
                "a class that is a list": keys(_class_name=["DiTTransformer2DModel"]),
                "no layers": keys(num_layers=0),
                "more layers": keys(num_layers=2),
                "huge layers": keys(num_layers=HUGE),
                "negative heads": keys(num_attention_heads=-1),
                "heads as text": keys(num_attention_heads="two"),
                "huge sample size": keys(sample_size=10_000, patch_size=1),
                "half a sample": keys(sample_size=7.5),
                "no sample size": keys(sample_size=None),
                "huge classes": keys(num_embeds_ada_norm=10**12),
                "huge width": keys(attention_head_dim=10_000, num_attention_heads=10_000),
                "patch of 0": keys(patch_size=0),
                "another quantizer": keys(quantization_config={"quant_method": "bitsandbytes"}),
                "quantizer is null": keys(quantization_config=None),
            },
        ),
        (QUANTIZE, SAMPLE, AGAINST),
        ("SOURCE",),
    ),
    "quantized weights": Subject(
        "quantized",
        WEIGHTS_NAME,
        subjects_of(
            PLACES,
            BYTES,
            HEADERS,
            **{
                "a scale of 0": number(f"{LAYER}.weight_scale", 0.0),
                "a negative scale": number(f"{LAYER}.weight_scale", -1.0),
                "a scale that is NaN": number(f"{LAYER}.weight_scale", float("nan")),
                "an infinite scale": number(f"{LAYER}.weight_scale", float("inf")),
                "codes lost": tensors(lambda found: found.pop(f"{LAYER}.qweight")),
                "codes of another shape": tensors(
                    lambda found: found.update({f"{LAYER}.qweight": found[f"{LAYER}.qweight"][:-1]})
                ),
                "codes as numbers": tensors(
                    lambda found: found.update({f"{LAYER}.qweight": found[f"{LAYER}.qweight"].float()})
                ),
                "scales in 16 bits": tensors(
                    lambda found: found.update({f"{LAYER}.weight_scale": found[f"{LAYER}.weight_scale"].half()})
                ),
            },
        ),
        (INSPECT, SAMPLE, DEQUANTIZE, VERIFY),
        ("SOURCE",),
    ),
    "quantized config": Subject(
        "quantized",
        "config.json",
        subjects_of(
            PLACES,
            BYTES,
            JSON,
            **{
                f"quantization_config: {name}": keys(**changes)
                for name, changes in {
                    "newer": {"quantization_config/format_version": 2},
                    "version as text": {"quantization_config/format_version": "1"},
                    "version true": {"quantization_config/format_version": True},
                    "no version": {"quantization_config/format_version": ...},
                    "unknown key": {"quantization_config/sparsity": 0.5},
                    "key lost": {"quantization_config/layers": ...},
                    "layers a list": {"quantization_config/layers": []},
                    "no layers": {"quantization_config/layers": {}},
                    "a layer null": {f"quantization_config/layers/{LAYER}": None},
                    "a layer that is none": {"quantization_config/layers/nowhere": {}},
                    "huge width": {f"quantization_config/layers/{LAYER}/in_features": HUGE},
                    "negative width": {f"quantization_config/layers/{LAYER}/in_features": -24},
                    "width as text": {f"quantization_config/layers/{LAYER}/in_features": "24"},
                    "unknown format": {f"quantization_config/layers/{LAYER}/weight/formats": ["e9m9"]},
                    "no formats": {f"quantization_config/layers/{LAYER}/weight/formats": []},
                    "formats null": {f"quantization_config/layers/{LAYER}/weight/formats": None},
                    "unknown granularity": {f"quantization_config/layers/{LAYER}/weight/granularity": "row"},
                    "unknown rotation": {f"quantization_config/layers/{LAYER}/rotation/kind": "half"},
                    "arithmetic": {f"quantization_config/layers/{LAYER}/arithmetic": "int4"},
                    "bias as text": {f"quantization_config/layers/{LAYER}/bias": "yes"},
                    "config null": {"quantization_config/config": None},
                    "config list": {"quantization_config/config": []},
                    "alpha of 7": {"quantization_config/config/alpha": 7},
                    "alpha null": {"quantization_config/config/alpha": None},
                    "unknown setting": {"quantization_config/config/smooth": 1},
                    "parameters 0": {"quantization_config/parameters": 0},
                    "parameters huge": {"quantization_config/parameters": "9" * 5000},
                    "parameters null": {"quantization_config/parameters": None},
                    "shared a list": {"quantization_config/shared_tensors": ["a"]},
                    "shared nowhere": {"quantization_config/shared_tensors": {"a": "b"}},
                    "calibration null": {"quantization_config/calibration": None},
                    "rotation error as text": {"quantization_config/rotation_error": "small"},
                }.items()
            },
        ),
        (INSPECT, SAMPLE, VERIFY),
        ("SOURCE",),
    ),
    "index": Subject(
        "pipe",
        "model_index.json",
        subjects_of(PLACES, BYTES, JSON, without=(*ABSENT, "empty object")),
        (QUANTIZE, SAMPLE),
        ("model_index.json",),
    ),
    "something in a pipeline": Subject(
        "pipe",
        "README.md",
        subjects_of(PLACES, without=("missing", "folder")),
        (QUANTIZE, REPLACE),
        ("README.md",),
    ),
    "scheduler": Subject(
        "pipe",
        "scheduler/scheduler_config.json",
        subjects_of(
            PLACES,
            BYTES,
            JSON,
            without=ABSENT,
            **{
                "unknown class": keys(_class_name="NoScheduler"),
                "a class that is no scheduler": keys(_class_name="DiTTransformer2DModel"),
                "no class": keys(_class_name=...),
                "unknown betas": keys(beta_schedule="x"),
                "betas as text": keys(beta_start="small"),
                "negative steps": keys(num_train_timesteps=-5),
                "huge steps": keys(num_train_timesteps=10**12),
            },
        ),
        (QUANTIZE, SAMPLE),
        ("scheduler_config.json",),
    ),
    "manifest": Subject(
        "quantized",
        MANIFEST_NAME,
        subjects_of(
            PLACES,
            BYTES,
            JSON,
            **{
                "newer version": keys(manifest_version=2),
                "no files": keys(files={}),
                "files a list": keys(files=[]),
                "another size": keys(**{"files/config.json/bytes": 1}),
                "negative size": keys(**{"files/config.json/bytes": -1}),
                "size as text": keys(**{"files/config.json/bytes": "1"}),
                "digest null": keys(**{"files/config.json/sha256": None}),
                "a file outside": keys(**{"files/..\\model\\config.json": {"bytes": 1, "sha256": "0" * 64}}),
            },
        ),
        (VERIFY,),
        ("SOURCE",),
    ),
    "record": Subject(
        "run",
        RECORD_NAME,
        subjects_of(
            PLACES,
            BYTES,
            JSON,
            **{
                "newer version": keys(record_version=99),
                "unknown key": keys(more=1),
                "key lost": keys(title=...),
                "title of numbers": keys(title=7),
                "title null": keys(title=None),
                "tables of text": keys(tables="x"),
                "unknown figure": keys(figures=[{"kind": "pie"}]),
                "a figure that is null": keys(figures=[None]),
                "an image outside": keys(images=[{"file": "../file", "title": "t", "caption": "c"}]),
                "an image of control characters": keys(images=[{"file": "\x1b[2J", "title": "t", "caption": "c"}]),
                "seconds as text": keys(seconds="long"),
                "seconds of 1e400": keys(seconds=float("inf")),
                "answers nested": keys(answers=[["a"]]),
            },
        ),
        (Command("report {x} --out out.html"),),
        ("SOURCE",),
    ),
    "calibration": Subject(
        "cal.safetensors",
        "",
        subjects_of(
            LONE_PLACES,
            BYTES,
            HEADERS,
            **{
                "a field lost": tensors(lambda found: found.pop("classes")),
                "no samples": tensors(lambda found: found.update({key: value[:0] for key, value in found.items()})),
                "a NaN": number("latents", float("nan")),
                "a class too high": number("classes", 99),
                "a negative class": number("classes", -1),
                "a time too late": number("timesteps", 1000),
                "another shape": tensors(lambda found: found.update(latents=torch.zeros(4, 3, 8, 8))),
                "flat": tensors(lambda found: found.update(latents=torch.zeros(4, 64))),
                "lengths": tensors(lambda found: found.update(classes=torch.arange(3))),
                "float classes": tensors(lambda found: found.update(classes=torch.rand(4))),
                "integer latents": tensors(lambda found: found.update(latents=torch.zeros(4, 1, 8, 8).int())),
                "calls that are none": tensors(lambda found: found.update({"calls.json": torch.zeros(4).byte()})),
                "calls nested": tensors(
                    lambda found: found.update({"calls.json": torch.full((90_000,), ord("["), dtype=torch.uint8)})
                ),
            },
        ),
        (
            Command(
                CALIBRATE.line,
                codes=tuple(
                    (name, 4)
                    for name in (
                        "no samples", "a NaN", "a class too high", "a negative class", "a time too late",
                        "another shape", "flat", "lengths", "float classes", "integer latents", "other dtype",
                    )
                ),
            ),
        ),
        ("SOURCE",),
    ),
    "prompts": Subject(
        "prompts.txt",
        "",
        {
            **LONE_PLACES,
            **{name: BYTES[name] for name in ("zero bytes", "noise", "pickle 2", "pickle 5", "gzip", "utf-16")},
            "blank lines": content(b"\n \n\t\n"),
        },
        (Command("quantize text --out out --prompts {x}", 2),),
        ("--prompts",),
    ),
    "class names": Subject(
        "names.txt",
        "",
        subjects_of(
            LONE_PLACES,
            BYTES,
            without=("nul in front",),
            **{
                "one too few": content(b"a\nb\nc\nd"),
                "a list too long": content(b'["a", "b", "c", "d", "e", "f"]'),
                "a list of numbers": content(b"[1, 2, 3, 4, 5]"),
                "keys that are no numbers": content(b'{"a": "b"}'),
                "id2label a list": content(b'{"id2label": 5}'),
                "100,000 lists": content(b"[" * 100_000),
                "blank names": content(b'["a", "b", " ", "d", "e"]'),
            },
        ),
        (Command("convert dit.pt --out out --heads 4 --class-names {x}"),),
        ("SOURCE",),
    ),
    "original checkpoint": Subject(
        "dit.pt",
        "",
        subjects_of(
            LONE_PLACES,
            BYTES,
            **{
                name: (lambda path, change=change: torch.save(change(original_state()), path))
                for name, change in {
                    "a NaN": lambda state: state | {"final_layer.linear.bias": torch.full((32,), torch.nan)},
                    "a tensor lost": lambda state: {k: v for k, v in state.items() if k != "x_embedder.proj.bias"},
                    "a tensor more": lambda state: state | {"more": torch.zeros(1)},
                    "other positions": lambda state: state | {"pos_embed": state["pos_embed"] + 1},
                    "a flat table": lambda state: state | {"pos_embed": torch.zeros(9)},
                    "no widths": lambda state: state | {"x_embedder.proj.weight": torch.zeros(0, 4, 2, 2)},
                    "integers": lambda state: state | {"pos_embed": state["pos_embed"].int()},
                    "a list": list,
                    "a number": lambda state: 7,
                    "nothing": lambda state: {},
                    "names that are numbers": lambda state: {1: torch.zeros(1)},
                    "ema of nothing": lambda state: {"ema": {}, "model": state},
                }.items()
            },
        ),
        (Command(CONVERT),),
        ("SOURCE",),
    ),
    "images in a file": Subject(
        "images.npz",
        "",
        subjects_of(
            LONE_PLACES,
            BYTES,
            without=("nul in front",),
            **{
                name: (lambda path, arrays=arrays: path.write_bytes(archive_of(**arrays)))
                for name, arrays in {
                    "another array": {"a": np.zeros((2, 8, 8, 3), np.uint8)},
                    "floats": {"arr_0": np.zeros((2, 8, 8, 3))},
                    "grey": {"arr_0": np.zeros((2, 8, 8), np.uint8)},
                    "no images": {"arr_0": np.zeros((0, 8, 8, 3), np.uint8)},
                    "objects": {"arr_0": np.array([{"a": 1}], dtype=object)},
                }.items()
            },
            **{
                "a huge shape": changed(lambda data: data.replace(b"(9, 8, 8, 3), }    ", b"(9999999999999,), }")),
                "damaged compression": content(zipped("arr_0.npy", bytes(999), 8).replace(b"c`", b"\xff\xff")),
                "unknown compression": zip_field(10, 8, 77),
                "an encrypted entry": zip_field(8, 6, 1),
            },
        ),
        (Command("score {x} --reference digits"), ),
        ("SOURCE",),
    ),
    "an image of a folder": Subject(
        "images",
        "0.png",
        subjects_of(
            PLACES,
            BYTES,
            without=("missing",),
            **{
                "another size": lambda path: Image.new("RGB", (9, 8)).save(path),
                "with transparency": lambda path: Image.new("RGBA", (8, 8)).save(path),
                "a jpeg": lambda path: Image.new("RGB", (8, 8)).save(path, "JPEG"),
            },
        ),
        (Command("score {x} --reference digits"),),
        ("SOURCE",),
    ),
    "begun job": Subject(
        "stopped",
        ".out.hqdit-job/job.json",
        subjects_of(
            PLACES,
            BYTES,
            JSON,
            without=(*ABSENT, "empty object"),
            **{
                "another code": keys(code="0" * 64),
                "another model": keys(model="0" * 64),
                "key lost": keys(torch=...),
                "key more": keys(more=1),
                "threads as text": keys(threads="1"),
            },
        ),
        (
            Command(
                "quantize model --out {x}/out --preset minmax --resume",
                codes=tuple(
                    (name, 2)
                    for name in (
                        "another code", "another model", "key lost", "key more", "threads as text", "empty object",
                    )
                ),
            ),
        ),
        (".out.hqdit-job",),
    ),
    "output": Subject(
        "file",
        "",
        {
            "folder": PLACES["folder"],
            "fifo": PLACES["fifo"],
            "link to a device": PLACES["link to a device"],
            "file": lambda path: None,
        },
        (
            Command("quantize model --out {x} --preset minmax", 2),
            Command("sample model --out {x} --num 1 --steps 1", 2),
            Command("dequantize quantized --out {x}", 2),
            Command("quantize model --out {x}/below --preset minmax", 2, sound=("folder",)),
            Command("inspect quantized --json {x}", 2, sound=("file",)),
            Command("sample model --out out --num 1 --steps 1 --npz {x}", 2, sound=("file",)),
            Command("report run --out {x}", 2),
        ),
        ("SOURCE",),
        True,
    ),
}  # fmt: skip
ROWS = list(table(SUBJECTS))
CHOSEN = [row for row, is_chosen in ROWS if is_chosen]


def make_workspace(root: Path) -> None:
    """Everything that `SUBJECTS` damages copies of, and what the commands read beside it."""
    tiny.tiny_dit(**SMALL).save_pretrained(root / "model")
    tiny.save_pipeline(root / "pipe", tiny.tiny_dit(**SMALL), tiny.ddim())
    minmax = ["--preset", "minmax", "--quiet"]
    assert run(["quantize", str(root / "model"), "--out", str(root / "quantized"), *minmax]) == 0
    tiny.tiny_flux(num_layers=1, num_single_layers=1).save_pretrained(root / "text" / "transformer")
    (root / "text" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (root / "full").mkdir()
    (root / "full" / "precious").write_text("the only copy")
    (root / "file").write_text("text")
    (root / "prompts.txt").write_text("a cat\na dog\n")
    (root / "names.txt").write_text("a\nb\nc\nd\ne\n")
    save_file(
        {"latents": torch.randn(4, 1, 8, 8), "timesteps": torch.arange(4) * 99, "classes": torch.arange(4)},
        root / "cal.safetensors",
    )
    save_original(root / "dit.pt", original_state())
    (root / "images.npz").write_bytes(archive_of(arr_0=np.zeros((9, 8, 8, 3), np.uint8)))
    (root / "images").mkdir()
    for number_ in range(9):
        Image.new("RGB", (8, 8)).save(root / "images" / f"{number_}.png")
    (root / "run").mkdir()
    record = RunRecord("name", "title", "question", ("answer",), (Table("t", (Column("a"),), ((1.5,),)),))
    (root / "run" / RECORD_NAME).write_text(record.to_text())


class Stopped(BaseException):
    """As a signal would stop a command."""


def stop_a_job(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a job with one finished block below `stopped`."""
    keep = JobBlocks.keep

    def kept(self: JobBlocks, *arguments: Any) -> None:
        keep(self, *arguments)
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(JobBlocks, "keep", kept)
        with pytest.raises(Stopped):
            run(
                [
                    "quantize",
                    str(root / "model"),
                    "--out",
                    str(root / "stopped" / "out"),
                    "--preset",
                    "minmax",
                    "--quiet",
                ]
            )


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("faults") / "work"
    root.mkdir()
    make_workspace(root)
    with pytest.MonkeyPatch.context() as patch:
        stop_a_job(root, patch)
    yield root


@pytest.fixture
def undisturbed(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The workspace as current folder, in which nothing may change but `x`, the damaged copy."""
    monkeypatch.chdir(workspace)
    before = marks(workspace.parent)
    yield workspace
    remove(workspace / "x")
    (workspace / "x.2").unlink(missing_ok=True)
    after = marks(workspace.parent)
    for path in sorted(after.keys() - before.keys(), reverse=True):  # so that later rows start clean
        left = workspace.parent / path
        shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink(missing_ok=True)
    assert after == before


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def damaged_copy(row: Row, workspace: Path) -> Path:
    """`x`, a copy of the row's subject with its fault."""
    subject = SUBJECTS[row.subject]
    source, copy = workspace / subject.source, workspace / "x"
    shutil.copytree(source, copy, symlinks=True) if source.is_dir() else shutil.copyfile(source, copy)
    subject.faults[row.fault](copy / subject.file if subject.file else copy)
    return copy


@pytest.mark.usefixtures("reads_here")
@pytest.mark.parametrize(
    "row", [pytest.param(row, id=str(row), marks=() if is_chosen else pytest.mark.soak) for row, is_chosen in ROWS]
)
def test_a_fault(hqdit: Hqdit, undisturbed: Path, row: Row) -> None:
    copy = damaged_copy(row, undisturbed)
    before = marks(copy) if copy.is_dir() else {}
    outcome = hqdit(*shlex.split(row.command.line.format(x="x")))
    where = {".out.hqdit-job": "x"}  # a job's folder is named by its absolute path
    words = [str(where.get(word, word)).replace("SOURCE", "x") for word in SUBJECTS[row.subject].words]
    code = row.code
    if row.subject == "prompts" and ("circle" in row.fault or "itself" in row.fault):
        code, words = 3, ["x"]  # followed before anybody knows what the path is for: a bad file
    require_contract(outcome, code, "needed", *words)
    assert (marks(copy) if copy.is_dir() else {}) == before


def test_the_sound_files_pass(hqdit: Hqdit, undisturbed: Path, reads_here: None, tmp_path: Path) -> None:
    """Else the faults would prove nothing."""
    done = set()
    for subject in SUBJECTS.values():
        for command in subject.commands:
            if subject.source in ("file",) or (subject.source, command.line) in done:
                continue
            done.add((subject.source, command.line))
            source = undisturbed / subject.source
            x = tmp_path / str(len(done))
            shutil.copytree(source, x) if source.is_dir() else shutil.copyfile(source, x)
            line = command.line.replace("--out out", f"--out {tmp_path}/out{len(done)}")
            line = line.replace("--out full", f"--out {tmp_path}/full{len(done)}")
            outcome = hqdit(*shlex.split(line.format(x=x)))
            assert outcome.code == 0 or subject.source == "prompts.txt", (command.line, outcome.err)


@pytest.mark.parametrize("name", ["a b", "ä", "-out", "new\nline", "\x1b[2J", "\u202e", "a'b\"c", "%s{x}", "x" * 200])
def test_names_with_odd_characters(hqdit: Hqdit, undisturbed: Path, name: str) -> None:
    out = f"./{name}"
    for command in ("quantize model --preset minmax --out", "sample model --num 1 --steps 1 --out"):
        outcome = hqdit(*shlex.split(command), out, "--quiet")
        assert (outcome.code, outcome.err) == (0, "")
        outcome = hqdit("verify", out)
        assert outcome.code == 0 and all(c.isprintable() or c == "\n" for c in outcome.out)
        require_contract(hqdit(*shlex.split(command), out), 2, "--out", "needed")
        shutil.rmtree(undisturbed / name)


ANY_VALUE = (None, True, "x", "\ud800", -1, HUGE, 1.5, float("inf"), float("nan"), [], [[]], {}, {"a": 1})


def nested_keys(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The way to every value inside JSON objects."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from nested_keys(inner, (*path, key))


@pytest.mark.parametrize("turns", [1, pytest.param(len(ANY_VALUE), marks=pytest.mark.soak)])
def test_any_value_at_any_place_of_a_config(hqdit: Hqdit, workspace: Path, tmp_path: Path, turns: int) -> None:
    """Refused or shown: whatever stands in a quantized model's config.json, outside of its layers and in one of them.

    Every place gets `turns` of the values, in turn.
    """
    folder = Path(shutil.copytree(workspace / "quantized", tmp_path / "q"))
    config = json.loads((folder / "config.json").read_text())
    places = [place for place in nested_keys(config) if place[1:2] != ("layers",) or place[2:3] in ((), (LAYER,))]
    refused = 0
    for number_, place in enumerate(places):
        inner = config
        for key in place[:-1]:
            inner = inner[key]
        original = inner[place[-1]]
        for turn in range(turns):
            inner[place[-1]] = ANY_VALUE[(number_ + turn) % len(ANY_VALUE)]
            (folder / "config.json").write_text(json.dumps(config))
            outcome = hqdit("inspect", folder)
            if outcome.code:
                require_contract(outcome, 3, "needed", "q")
                refused += 1
        inner[place[-1]] = original
    assert refused > turns * len(places) // 3


def test_the_table_is_long_enough() -> None:
    assert len(CHOSEN) >= 200 and len({str(row) for row, _ in ROWS}) == len(ROWS)
    assert {row.code for row in CHOSEN} >= {2, 3, 4, 7}
