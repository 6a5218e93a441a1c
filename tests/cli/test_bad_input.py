"""The bad-input contract: exit code, one complete first line, nothing left and nothing damaged.

A row is a command line that is wrong, the exit code, and words that the first line of standard error has to hold. All
rows run in one folder whose complete state, down to the bytes of every file, has to be the same afterwards.
"""

from __future__ import annotations

import errno
import json
import pickle
import resource
import shlex
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Hqdit, tree
from contract import require_contract
from safetensors.torch import load_file, save_file

from hqdit.cli.main import run
from hqdit.models.weights import INDEX_NAME, WEIGHTS_NAME
from hqdit.pipeline import publish

#: Two heads of 12: width 24, MLP 96. Small files, because every row hashes all of them twice.
SMALL: dict[str, Any] = {"attention_head_dim": 12, "num_layers": 1}
TABLE = "-8,-7,-6,-5,-4,-3,-2,-1,0,1,2,3,4,5,6"
HUGE = 10**20
CONTROL = "\x1b[2J\u202e"


def save_small(folder: Path, **changes: Any) -> Path:
    tiny.tiny_dit(**{**SMALL, **changes}).save_pretrained(folder)
    return folder


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


def poke(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[1] = value

    return change


def make_models(root: Path) -> None:
    """`model` and `pipe` are fine; those below `bad` are `model` with one fault each."""
    save_small(root / "model")
    tiny.save_pipeline(root / "pipe", tiny.tiny_dit(**SMALL), tiny.ddim())
    assert (
        run(["quantize", str(root / "model"), "--out", str(root / "quantized"), "--preset", "minmax", "--quiet"]) == 0
    )
    save_small(root / "other", num_layers=2)
    save_small(root / "width52", attention_head_dim=26)
    (root / "full").mkdir()
    (root / "full" / "precious").write_text("the only copy")
    (root / "empty").mkdir()
    (root / "file").write_text("text")

    def faulty(name: str, source: str = "model") -> Path:
        return Path(shutil.copytree(root / source, root / "bad" / name))

    good = (root / "model" / WEIGHTS_NAME).read_bytes()
    contents = {
        "truncated": good[: len(good) // 2],
        "no header": good[:20],
        "no bytes": b"",
        "trailing": good + b"more",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n",
        "pickle": pickle.dumps({"weight": [1.0, 2.0]}, protocol=4),
        "html": b"<!DOCTYPE html><html><title>404</title></html>",
        "noise": bytes(range(256)) * 16,
        "twice": (header := b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],'
                  b'"data_offsets":[0,4]}}') and len(header).to_bytes(8, "little") + header + bytes(4),
        "huge header": (10**8 + 1).to_bytes(8, "little") + b"{}",
    }  # fmt: skip
    for name, content in contents.items():
        (faulty(name) / WEIGHTS_NAME).write_bytes(content)
    with zipfile.ZipFile(faulty("zip") / WEIGHTS_NAME, "w") as archive:
        archive.writestr("archive/data.pkl", b"data")
    change_weights(faulty("nan"), poke("transformer_blocks.0.attn1.to_k.weight", float("nan")))
    change_weights(faulty("inf"), poke("proj_out_2.bias", float("inf")))
    change_weights(faulty("missing"), lambda tensors: tensors.pop("proj_out_2.bias"))
    change_weights(faulty("unexpected"), lambda tensors: tensors.update({f"extra{CONTROL}": torch.zeros(1)}))
    change_weights(faulty("shape"), lambda tensors: tensors.update({"proj_out_2.bias": torch.zeros(3)}))
    change_weights(faulty("int weights"), lambda tensors: tensors.update({"proj_out_2.bias": torch.zeros(16).int()}))
    change_weights(faulty("overflow"), lambda tensors: tensors["proj_out_2.weight"].fill_(3e38))
    (faulty("no weights") / WEIGHTS_NAME).unlink()
    (folder := faulty("only bin")).joinpath(WEIGHTS_NAME).rename(folder / "diffusion_pytorch_model.bin")
    (folder := faulty("shard outside")).joinpath(WEIGHTS_NAME).unlink()
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "../../model/" + WEIGHTS_NAME}}))
    (folder := faulty("shard gone")).joinpath(WEIGHTS_NAME).unlink()
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))

    for name, changes in {
        "unknown key": {"hidden_act": "relu", "rope": True},
        "no class": {"_class_name": ...},
        "unet": {"_class_name": "UNet2DModel"},
        f"class {CONTROL}": {"_class_name": f"DiT{CONTROL}"},
        "one more layer": {"num_layers": 2},
        "layers huge": {"num_layers": HUGE},
        "layers 0": {"num_layers": 0},
        "heads text": {"num_attention_heads": "two"},
        "other quantizer": {"quantization_config": {"quant_method": "bitsandbytes"}},
        "odd quantizer": {"quantization_config": None},
    }.items():
        tiny.edit_json(faulty(name) / "config.json", **changes)
    (faulty("not json") / "config.json").write_text("{'single': 'quotes'}")
    (faulty("json list") / "config.json").write_text("[]")
    (faulty("utf16") / "config.json").write_bytes('{"a": 1}'.encode("utf-16"))
    (faulty("no config") / "config.json").unlink()

    description = json.loads((root / "quantized" / "config.json").read_text())["quantization_config"]
    layer = "transformer_blocks.0.attn1.to_q"
    for name, changes in {
        "newer": {"format_version": 2},
        "no version": {"format_version": ...},
        "unknown quantization key": {"sparsity": 0.5},
        "lost quantization key": {"layers": ...},
        "unknown config": {"config": {**description["config"], "smooth": 1}},
        "no layer": {"layers": {**description["layers"], "nowhere": description["layers"][layer]}},
        "parameters 0": {"parameters": 0},
    }.items():
        changed = {key: value for key, value in {**description, **changes}.items() if value is not ...}
        tiny.edit_json(faulty(f"quantized {name}", "quantized") / "config.json", quantization_config=changed)
    description["layers"][layer]["record"]["damp_fraction"] = CONTROL
    tiny.edit_json(faulty("quantized record", "quantized") / "config.json", quantization_config=description)
    (folder := faulty("quantized truncated", "quantized")).joinpath(WEIGHTS_NAME).write_bytes(
        (root / "quantized" / WEIGHTS_NAME).read_bytes()[:-1]
    )
    change_weights(faulty("quantized scale", "quantized"), poke(f"{layer}.weight_scale", -1.0))

    for name, path, text in (
        ("no transformer", "transformer/config.json", None),
        ("bad index", "model_index.json", "{"),
        ("unknown scheduler", "scheduler/scheduler_config.json", '{"_class_name": "NoScheduler"}'),
        ("noisy scheduler", "scheduler/scheduler_config.json", '{"_class_name": "DDPMScheduler"}'),
        ("bad scheduler", "scheduler/scheduler_config.json", '{"_class_name": "DDIMScheduler", "beta_schedule": "x"}'),
    ):
        target = faulty(f"pipe {name}", "pipe") / path
        if text is None:
            target.unlink()
        else:
            target.write_text(text)


def make_calibration(root: Path) -> None:
    """Files below `cal`, each with one fault but `good`."""
    root.mkdir()
    good = {
        "latents": torch.randn(4, 1, 8, 8),
        "timesteps": torch.tensor([9, 99, 400, 999]),
        "classes": torch.arange(4),
    }

    def write(name: str, **fields: torch.Tensor | None) -> None:
        found = {key: value for key, value in {**good, **fields}.items() if value is not None}
        save_file(found, root / f"{name}.safetensors")

    write("good")
    write("no classes", classes=None)
    write("nothing else", latents=None, timesteps=None)
    write("empty", latents=torch.zeros(0, 1, 8, 8), timesteps=torch.zeros(0).int(), classes=torch.zeros(0).int())
    latents = good["latents"].clone()
    latents[2, 0, 3, 3] = float("nan")
    write("nan", latents=latents)
    write("class", classes=torch.tensor([0, 1, tiny.CLASSES + 1, 0]))
    write("negative class", classes=torch.tensor([0, -1, 1, 0]))
    write("time", timesteps=torch.tensor([0, 1, -1, 0]))
    write("shape", latents=torch.randn(4, 3, 8, 8))
    write("flat", latents=torch.randn(4, 64))
    write("lengths", classes=torch.arange(3))
    write("float classes", classes=torch.rand(4))
    write("int latents", latents=torch.zeros(4, 1, 8, 8).int())
    (root / "pickle.safetensors").write_bytes(pickle.dumps(good["classes"].tolist(), protocol=4))
    (root / "truncated.safetensors").write_bytes((root / "good.safetensors").read_bytes()[:-3])


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad input") / "work"
    root.mkdir()
    make_models(root)
    make_calibration(root / "cal")
    return root


@pytest.fixture
def unchanged(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The workspace as current folder; after the test it has to be what it was, and nothing may lie beside it."""
    monkeypatch.chdir(workspace)
    before = tree(workspace.parent)
    yield workspace
    for job in workspace.rglob(".*.hqdit-job"):  # finished work of a run that can be resumed; tests/jobs look into it
        shutil.rmtree(job)
    for parent in (workspace / "deep" / "er", workspace / "deep", workspace / "result"):
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()
    after = tree(workspace.parent)
    for path in sorted(after.keys() - before.keys(), reverse=True):  # so that later rows start clean
        left = workspace.parent / path
        left.rmdir() if left.is_dir() else left.unlink()
    assert after == before


@dataclass(frozen=True)
class Row:
    command: str
    code: int
    fragments: tuple[str, ...]

    def __str__(self) -> str:
        return self.command.replace(str(HUGE), "HUGE")


def rows(code: int, *entries: tuple[str, ...]) -> list[Row]:
    return [Row(command, code, fragments) for command, *fragments_ in entries for fragments in [tuple(fragments_)]]


QUANTIZE = "quantize model --out out "
SAMPLE = "sample model --out out --num 2 --steps 2 "
EVALUATE = "evaluate quantized --against model --num 2 --steps 2 "

FLAGS = [
    # what the parser sees
    ("", "command", "quantize"),
    ("quantise model --out out", "quantise", "Did you mean 'quantize', 'dequantize'? Fix"),
    ("--nope", "--nope"),
    (QUANTIZE + "--nope", "--nope"),
    (QUANTIZE + "-x", "-x"),
    (QUANTIZE + "extra", "extra"),
    ("quantize --out out", "SRC"),
    ("quantize model --out", "--out"),
    ("quantize model", "--out", "--dry-run"),
    ("quantize model --preset minmax", "--out"),
    ("sample model", "--out"),
    ("evaluate quantized", "--against"),
    ("inspect", "DST"),
    ("inject-outliers model", "--out"),
    ("dequantize quantized", "--out"),
    ("doctor now", "now"),
    # quantize
    (QUANTIZE + "--preset best", "--preset", "'best'", "hqdit, minmax"),
    (QUANTIZE + "--preset ''", "--preset"),
    (QUANTIZE + "--bits W2A2", "--bits", "'W2A2'", "W8A8, W4A8, W4A6, W4A4"),
    (QUANTIZE + "--smoothing 1.5", "--smoothing", "1.5"),
    (QUANTIZE + "--low-rank -1", "--low-rank", "-1"),
    (QUANTIZE + "--preset svdquant --low-rank 73", "--low-rank", "73", "norm1.linear"),
    (QUANTIZE + "--preset svdquant --fold-value-rotation --rotation full", "--low-rank", "--no-fold-value-rotation"),
    (QUANTIZE + "--format-search --activations fp4", "--format-search", "--activation-granularity channel"),
    (QUANTIZE + "--activations fp4", "--activations", "'fp4'"),
    (QUANTIZE + "--alpha 0", "--alpha", "0.0"),
    (QUANTIZE + "--alpha 1", "--alpha", "1.0"),
    (QUANTIZE + "--alpha nan", "--alpha", "nan"),
    (QUANTIZE + "--alpha abc", "--alpha", "'abc'"),
    (QUANTIZE + "--alpha=abc", "--alpha", "'abc'"),
    (QUANTIZE + "--alpha -1", "--alpha", "-1"),
    (QUANTIZE + "--alpha inf", "--alpha", "inf"),
    (QUANTIZE + "--alpha 0.2 --alpha 2", "--alpha", "2.0"),
    (QUANTIZE + "--preset minmax --alpha 7", "--alpha", "7.0"),
    (QUANTIZE + "--steps 0", "--steps", "found 0"),
    (QUANTIZE + "--steps -1", "--steps", "-1"),
    (QUANTIZE + "--steps 1001", "--steps", "1001", "1000"),
    ("quantize model --dry-run --steps 1001", "--steps", "1001", "1000"),
    (QUANTIZE + "--steps abc", "--steps", "'abc'"),
    (QUANTIZE + "--steps 2.5", "--steps", "'2.5'"),
    (QUANTIZE + "--steps 4 --steps five", "--steps", "'five'"),
    (QUANTIZE + f"--steps {HUGE}", "--steps", str(HUGE)),
    (QUANTIZE + "--guidance nan", "--guidance", "nan"),
    (QUANTIZE + "--guidance inf", "--guidance", "inf"),
    (QUANTIZE + "--guidance -1", "--guidance", "-1"),
    (QUANTIZE + "--guidance x", "--guidance", "'x'"),
    (QUANTIZE + "--rotation block:7", "--rotation", "block:7"),
    (QUANTIZE + "--rotation block:52", "--rotation", "block:52", "no Hadamard matrix"),
    (QUANTIZE + "--rotation block:92", "--rotation", "block:92", "no Hadamard matrix"),
    (QUANTIZE + "--rotation block:abc", "--rotation", "block:abc"),
    (QUANTIZE + "--rotation block:0", "--rotation", "block:0"),
    (QUANTIZE + "--rotation block:-4", "--rotation", "block:-4"),
    (QUANTIZE + "--rotation block:", "--rotation", "block:"),
    (QUANTIZE + f"--rotation block:{HUGE}", "--rotation", str(HUGE)),
    (QUANTIZE + "--rotation block:16", "transformer_blocks.0.norm1.linear", "block:16", "24", "[4, 8, 12, 24]"),
    (QUANTIZE + "--rotation half", "--rotation", "'half'"),
    (QUANTIZE + "--fold-value-rotation --rotation none", "--fold-value-rotation", "none"),
    (QUANTIZE + "--weight-granularity group", "--group-size"),
    (QUANTIZE + "--weight-granularity group --group-size 0", "--group-size", "found 0"),
    (QUANTIZE + "--weight-granularity group --group-size -4", "--group-size", "-4"),
    (QUANTIZE + "--weight-granularity group --group-size 6", "--group-size", "found 6"),
    (QUANTIZE + "--weight-granularity group --group-size 16", "--group-size", "16", "[4, 8, 12, 24]"),
    (QUANTIZE + "--group-size 4", "--group-size", "--weight-granularity group"),
    (QUANTIZE + "--weight-granularity row", "--weight-granularity", "'row'"),
    (QUANTIZE + "--activation-granularity row", "--activation-granularity", "'row'"),
    (QUANTIZE + "--format-granularity row", "--format-granularity", "'row'"),
    (QUANTIZE + "--format-granularity channel --weights e2m1", "--format-granularity"),
    (QUANTIZE + "--scale-rule best", "--scale-rule", "'best'"),
    (QUANTIZE + "--keep-dtype int8", "--keep-dtype", "'int8'"),
    (QUANTIZE + "--weights foo", "--weights", "'foo'", "e2m1"),
    (QUANTIZE + "--activations fp4", "--activations", "'fp4'"),
    (QUANTIZE + f"--weights table:{TABLE}", "--weights", TABLE, "16"),
    (QUANTIZE + f"--weights table:{TABLE},6", "--weights", "ascending"),
    (QUANTIZE + f"--weights table:{TABLE},200", "--weights", "127"),
    (QUANTIZE + f"--weights table:{TABLE},x", "--weights", "16"),
    (QUANTIZE + "--weights table:0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15", "one-sided", "weights"),
    (QUANTIZE + "--include nothing", "--include", "'nothing'"),
    (QUANTIZE + "--exclude nothing", "--exclude", "'nothing'"),
    (QUANTIZE + "--include ''", "--include", "''"),
    (QUANTIZE + "--exclude '*'", "--exclude"),
    (QUANTIZE + "--include proj_out_1", "--include", "'proj_out_1'"),
    (QUANTIZE + "--calibration-samples 0", "--calibration-samples", "found 0"),
    (QUANTIZE + "--calibration-samples -5", "--calibration-samples", "-5"),
    (QUANTIZE + f"--calibration-samples {HUGE}", "--calibration-samples", str(HUGE)),
    # options of all commands
    (QUANTIZE + "--threads 0", "--threads", "found 0"),
    (QUANTIZE + "--threads -2", "--threads", "-2"),
    (QUANTIZE + f"--threads {HUGE}", "--threads", str(HUGE)),
    (QUANTIZE + "--seed -1", "--seed", "-1"),
    (QUANTIZE + "--seed x", "--seed", "'x'"),
    (QUANTIZE + "--device xyz", "--device", "'xyz'"),
    (QUANTIZE + "--device meta", "--device", "'meta'"),
    (QUANTIZE + "--device ''", "--device"),
    (SAMPLE + "--dtype float8", "--dtype", "'float8'"),
    (SAMPLE + "--backend xyz", "--backend", "'xyz'", "torch, reference"),
    (SAMPLE + "--seed -1", "--seed", "-1"),
    (EVALUATE + "--threads 0", "--threads"),
    (EVALUATE + "--dtype int8", "--dtype", "'int8'"),
    # --out and --json
    ("quantize model --out model", "--out", "model"),
    ("quantize model --out model --overwrite", "--out", "source"),
    ("quantize model --out ./empty/../model --overwrite", "--out", "source"),
    ("quantize model --out model/inside", "--out", "source"),
    ("quantize model --out model/config.json --overwrite", "--out", "source"),
    ("quantize bad/nan --out bad --overwrite", "--out", "source"),
    ("quantize model --out . --overwrite", "--out", "source"),
    ("quantize digits --out . --overwrite", "--out", "current folder"),
    ("quantize digits --out .. --overwrite", "--out", "current folder"),
    ("quantize digits --out '' --overwrite", "--out", "current folder"),
    ("quantize model --out full", "--out", "full", "--overwrite"),
    ("quantize model --out empty", "--out", "empty", "--overwrite"),
    ("quantize model --out file", "--out", "file"),
    ("quantize model --out file/below", "--out", "below the file"),
    ("quantize model --out file/below --overwrite", "--out", "below the file"),
    ("quantize model --calibration cal/good.safetensors --out cal --overwrite", "--out", "cal/good.safetensors"),
    ("quantize model --dry-run --out full", "--out", "full"),
    (f"quantize model --out {'long' * 99}", "too long"),
    ("quantize model --out ~nobody-of-this-name/out", "home"),
    (QUANTIZE + "--json empty", "--json", "empty"),
    (QUANTIZE + "--json ''", "--json"),
    (QUANTIZE + "--json out", "--json", "--out"),
    (QUANTIZE + "--json file/below", "--json", "below the file"),
    (QUANTIZE + "--json /dev/null", "--json", "/dev/null"),
    (QUANTIZE + "--json model/config.json", "--json", "model/config.json"),
    (QUANTIZE + "--calibration cal/good.safetensors --json cal/good.safetensors", "--json"),
    (EVALUATE + f"--json quantized/{WEIGHTS_NAME}", "--json"),
    ("inspect quantized --json quantized/config.json", "--json"),
    ("doctor --json empty", "--json"),
    ("sample model --out model/images", "--out", "source"),
    ("sample model --out full", "--out", "full", "--overwrite"),
    ("inject-outliers model --out model", "--out", "source"),
    ("dequantize quantized --out quantized", "--out", "source"),
    ("dequantize model --out out", "no quantized layer"),
    ("dequantize quantized --out out --dtype int8", "--dtype", "int8"),
    ("demo --out full", "--out", "full", "--overwrite"),
    # sample, evaluate, inject-outliers, demo
    (SAMPLE + "--classes 99", "--classes", "99", "0 to 4"),
    (SAMPLE + "--classes 5", "--classes", "found 5"),
    (SAMPLE + "--classes 0,1,-1", "--classes", "-1"),
    (SAMPLE + "--classes a", "--classes", "'a'"),
    (SAMPLE + "--classes ''", "--classes", "''"),
    (SAMPLE + "--classes 0,,1", "--classes", "'0,,1'"),
    (SAMPLE + "--classes 1.5", "--classes", "'1.5'"),
    (SAMPLE + f"--classes {HUGE}", "--classes", str(HUGE)),
    (SAMPLE + "--num 0", "--num", "found 0"),
    (SAMPLE + "--num -1", "--num", "-1"),
    (SAMPLE + f"--num {HUGE}", "--num", str(HUGE)),
    (SAMPLE + "--batch-size 0", "--batch-size", "found 0"),
    (SAMPLE + "--steps 0", "--steps", "found 0"),
    (SAMPLE + "--steps 1001", "--steps", "1001"),
    (SAMPLE + "--guidance nan", "--guidance", "nan"),
    (EVALUATE + "--num 0", "--num", "found 0"),
    (EVALUATE + "--steps 0", "--steps", "found 0"),
    (EVALUATE + "--guidance -inf", "--guidance", "-inf"),
    (EVALUATE + "--batch-size -1", "--batch-size", "-1"),
    ("evaluate quantized --against other", "--against", "1)", "2)"),
    ("evaluate quantized --against digits", "--against"),
    ("inject-outliers model --out out --factor 0", "factor 0.0"),
    ("inject-outliers model --out out --factor nan", "factor nan"),
    ("inject-outliers model --out out --factor inf", "factor inf"),
    ("inject-outliers model --out out --share 0", "share 0.0"),
    ("inject-outliers model --out out --share 1.5", "share 1.5"),
    ("inject-outliers model --out out --seed -1", "--seed"),
    ("demo --out out --num 0", "--num", "found 0"),
    ("demo --out out --num 1", "--num", "found 1", "2"),
    ("demo --out out --steps 1001", "--steps", "1001"),
    ("demo --out out --calibration-samples 0", "--calibration-samples"),
    ("demo --out out --guidance nan", "--guidance"),
    ("demo --out out --backend xyz", "--backend"),
    ("quantize '' --out out", "empty name"),
]

FILES = [
    ("quantize nope --out out", "nope", "no such file"),
    ("quantize full/nope --out out", "full/nope", "no such file"),
    ("quantize ./digits --out out", "./digits", "no such file"),
    ("quantize ./nope --out out", "./nope", "no such file"),
    ("quantize a/b/c --out out", "a/b/c", "no such file"),
    ("quantize /no/pe --out out", "/no/pe", "no such file"),
    ("quantize no/pe/ --out out", "no/pe/", "no such file"),
    ("quantize '../no pe' --out out", "no such file"),
    ("quantize 'two words/model' --out out", "hub id"),
    ("quantize file --out out", "file", "folder"),
    ("quantize model/config.json --out out", "config.json", "folder"),
    ("quantize empty --out out", "empty", "config.json"),
    ("quantize full --out out", "full", "config.json"),
    ("quantize quantized --out out", "already quantized", "hqdit"),
    ("inject-outliers quantized --out out", "already quantized"),
    ("dequantize nope --out out", "nope"),
    ("inspect model", "float model", "hqdit quantize"),
    ("inspect nope", "nope"),
    ("sample nope --out out", "nope"),
    ("evaluate nope --against model", "nope"),
    ("evaluate quantized --against nope", "nope"),
    (QUANTIZE + "--calibration nope.safetensors", "nope.safetensors"),
    (QUANTIZE + "--calibration cal", "cal", "regular file"),
    (QUANTIZE + "--calibration file", "file", "header"),
    (QUANTIZE + "--calibration cal/pickle.safetensors", "Python pickle"),
    (QUANTIZE + "--calibration cal/truncated.safetensors", "is truncated"),
    (QUANTIZE + f"--calibration model/{WEIGHTS_NAME}", "latents, timesteps, classes"),
    (QUANTIZE + "--calibration 'cal/no classes.safetensors'", "missing: classes"),
    (QUANTIZE + "--calibration 'cal/nothing else.safetensors'", "missing: latents, timesteps"),
    (QUANTIZE + "--preset minmax --calibration 'cal/no classes.safetensors'", "missing: classes"),
]

#: Folder below `bad` -> words of the message. Each is tried with quantize, sample and evaluate.
BROKEN = {
    "truncated": (WEIGHTS_NAME, "truncated"),
    "no header": (WEIGHTS_NAME, "20 bytes"),
    "no bytes": (WEIGHTS_NAME, "0 bytes"),
    "trailing": (WEIGHTS_NAME, "trailing"),
    "lfs": (WEIGHTS_NAME, "Git-LFS pointer", "git lfs pull"),
    "pickle": (WEIGHTS_NAME, "Python pickle"),
    "zip": (WEIGHTS_NAME, "zip"),
    "html": (WEIGHTS_NAME, "HTML"),
    "noise": (WEIGHTS_NAME, "header"),
    "twice": (WEIGHTS_NAME, "twice"),
    "huge header": (WEIGHTS_NAME, "header"),
    "nan": ("transformer_blocks.0.attn1.to_k.weight", "1 NaN", "(0, 1)"),
    "inf": ("proj_out_2.bias", "1 NaN or infinite", "(1,)"),
    "missing": ("1 missing", "config.json"),
    "unexpected": ("1 unexpected",),
    "shape": ("1 of another shape",),
    "int weights": ("proj_out_2.bias", "torch.int32"),
    "no weights": (WEIGHTS_NAME,),
    "only bin": ("diffusion_pytorch_model.bin", "safe_serialization"),
    "shard outside": (INDEX_NAME, ".."),
    "shard gone": ("one.safetensors",),
    "unknown key": ("config.json", "hidden_act", "rope"),
    "no class": ("config.json", "None"),
    "unet": ("config.json", "UNet2DModel"),
    f"class {CONTROL}": ("config.json", "DiT\\x1b[2J\\u202e"),
    "one more layer": ("missing", "config.json"),
    "layers huge": ("num_layers", str(HUGE)),
    "layers 0": ("num_layers 0",),
    "heads text": ("config.json",),
    "other quantizer": ("bitsandbytes",),
    "odd quantizer": ("None",),
    "not json": ("config.json", "JSON"),
    "json list": ("config.json", "list"),
    "utf16": ("config.json",),
    "no config": ("config.json",),
    "pipe no transformer": ("transformer",),
    "pipe bad index": ("model_index.json",),
    "pipe unknown scheduler": ("scheduler_config.json", "NoScheduler"),
    "pipe noisy scheduler": ("DDPMScheduler",),
    "pipe bad scheduler": ("scheduler_config.json",),
    "quantized newer": ("format version 2", "needed 1"),
    "quantized no version": ("format version",),
    "quantized unknown quantization key": ("sparsity",),
    "quantized lost quantization key": ("layers",),
    "quantized unknown config": ("smooth",),
    "quantized no layer": ("nowhere",),
    "quantized parameters 0": ("parameters",),
    "quantized record": ("damp_fraction", "\\x1b[2J"),
    "quantized truncated": ("truncated",),
    "quantized scale": ("transformer_blocks.0.attn1.to_q.weight_scale", "positive"),
}

NUMERICS = [
    (QUANTIZE + "--calibration cal/empty.safetensors", "no samples"),
    (QUANTIZE + "--calibration cal/nan.safetensors", "latents", "sample 2"),
    (QUANTIZE + "--calibration cal/class.safetensors", "classes of sample 2 is 6", "0 to 5"),
    (QUANTIZE + "--calibration 'cal/negative class.safetensors'", "classes of sample 1 is -1"),
    (QUANTIZE + "--calibration cal/time.safetensors", "timesteps of sample 2 is -1"),
    (QUANTIZE + "--calibration cal/shape.safetensors", "(3, 8, 8)", "(1, 8, 8)"),
    (QUANTIZE + "--calibration cal/flat.safetensors", "(4, 64)"),
    (QUANTIZE + "--calibration cal/lengths.safetensors", "classes"),
    (QUANTIZE + "--calibration 'cal/float classes.safetensors'", "float32", "integer"),
    (QUANTIZE + "--calibration 'cal/int latents.safetensors'", "int32"),
    ("quantize width52 --out out", "transformer_blocks.0.norm1.linear", "52", "[4]"),
    ("quantize width52 --out out --exclude '*norm1*'", "transformer_blocks.0.attn1.to_q", "52", "[4]"),
    ("quantize width52 --dry-run --preset minmax --rotation full", "52", "block:B"),
    ("quantize width52 --out out --fold-value-rotation", "52", "[4]"),
    ("quantize bad/overflow --out out", "infinite"),
    ("sample bad/overflow --out out --num 2", "infinite"),
    ("evaluate bad/overflow --against model", "NaN or infinity"),
    ("evaluate model --against bad/overflow", "infinite"),
]

ENVIRONMENT = [
    ("quantize owner/name --out out", "owner/name", "hub"),
    ("sample owner/name --out out", "owner/name", "hub"),
    ("inspect owner/name", "owner/name", "hub"),
    ("evaluate model --against owner/name", "owner/name", "hub"),
    (QUANTIZE + "--device cuda", "'cuda'", "--device cpu"),
    (SAMPLE + "--device cuda:0", "'cuda:0'"),
]


@pytest.mark.parametrize(
    "row",
    [
        *rows(2, *FLAGS),
        *rows(3, *FILES),
        *rows(4, *NUMERICS),
        *rows(6, *ENVIRONMENT),
    ],
    ids=str,
)
def test_the_contract(hqdit: Hqdit, unchanged: Path, row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    require_contract(hqdit(*shlex.split(row.command)), row.code, *row.fragments)


@pytest.mark.parametrize("name", BROKEN, ids=lambda name: name.replace(CONTROL, "control"))
def test_broken_models(hqdit: Hqdit, unchanged: Path, name: str) -> None:
    source = f"bad/{name}"

    def require_refusal(*arguments: object) -> None:
        outcome = hqdit(*arguments)
        # The folders are called after their faults: those words do not count.
        require_contract(replace(outcome, err=outcome.err.replace(source, "SOURCE")), 3, *BROKEN[name])

    if name.startswith("quantized "):
        assert hqdit("quantize", source, "--out", "out").code == 3  # for the one reason or the other
        require_refusal("inspect", source)
    else:
        options = ("--calibration", "cal/good.safetensors") if name != "pipe noisy scheduler" else ()
        require_refusal("quantize", source, "--out", "out", *options)
        if "scheduler" not in name and "quantizer" not in name:
            require_refusal("quantize", source, "--out", "full", "--overwrite")
            require_refusal("inject-outliers", source, "--out", "out")
    require_refusal("sample", source, "--out", "out", "--num", 1, "--steps", 1)
    if "scheduler" in name:
        require_refusal("evaluate", "quantized", "--against", source, "--steps", 1)
    else:
        require_refusal("evaluate", source, "--against", "model", "--steps", 1)


@pytest.mark.parametrize("value", [..., None, "x", -1, 10**30, 1.5, [], {}], ids=str)
def test_inspect_shows_or_refuses_any_record(hqdit: Hqdit, workspace: Path, tmp_path: Path, value: object) -> None:
    folder = Path(shutil.copytree(workspace / "quantized", tmp_path / "q"))
    config = json.loads((folder / "config.json").read_text())
    record = config["quantization_config"]["layers"]["transformer_blocks.0.attn1.to_q"]["record"]
    for key, original in list(record.items()):
        record[key] = value
        if value is ...:
            del record[key]
        (folder / "config.json").write_text(json.dumps(config))
        outcome = hqdit("inspect", folder)
        if outcome.code:
            require_contract(outcome, 3, key)
        record[key] = original


def test_the_table_of_a_misfit_is_short_and_escaped(hqdit: Hqdit, unchanged: Path) -> None:
    outcome = hqdit("quantize", "bad/unexpected", "--out", "out")
    assert outcome.err.splitlines()[1:] == ["  unexpected  extra\\x1b[2J\\u202e"]


@pytest.mark.parametrize("given", [f"no{CONTROL}pe", "./a\rb", "a\x07", "tab\there", "\x9b2J"])
def test_control_characters_of_the_command_line_are_escaped(hqdit: Hqdit, unchanged: Path, given: str) -> None:
    require_contract(hqdit("quantize", given, "--out", "out"), 3)
    require_contract(hqdit("quantize", "model", "--out", "out", "--preset", given), 2)
    require_contract(hqdit(given), 2)
    require_contract(hqdit("quantize", "model", "--out", "out", "--alpha", given), 2)


def test_control_characters_are_escaped_in_results(hqdit: Hqdit, workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / f"a{CONTROL}b"
    outcome = hqdit("quantize", workspace / "model", "--out", out, "--preset", "minmax")
    assert outcome.code == 0 and "a\\x1b[2J\\u202eb" in outcome.out and "\x1b" not in outcome.out
    config = json.loads((out / "config.json").read_text())
    for layer in config["quantization_config"]["layers"].values():
        layer["record"]["method"] = CONTROL
    (out / "config.json").write_text(json.dumps(config))
    outcome = hqdit("inspect", out)
    assert outcome.code == 0 and "\\x1b[2J\\u202e" in outcome.out and "\x1b" not in outcome.out


def test_arguments_that_are_no_text(hqdit: Hqdit, unchanged: Path) -> None:
    require_contract(hqdit("quantize", "model", "--out", "out\udcff"), 2, "out\\udcff", "UTF-8")


def test_guidance_is_fine_where_there_is_a_null_class(hqdit: Hqdit, workspace: Path) -> None:
    for guidance in (0, 1, 1.0, 4.5, 1e3):
        assert hqdit("quantize", workspace / "model", "--dry-run", "--guidance", guidance).code == 0


# resources, defects, interruptions


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


FULL = OSError(errno.ENOSPC, "No space left on device", "somewhere/file")
#: command -> where its output is written, as a module's attribute.
WRITERS = [
    ("quantize model --out out --preset minmax", "hqdit.models.weights.save_file"),
    ("quantize model --out deep/er/out --preset minmax", "hqdit.pipeline.publish._flush_tree"),
    ("quantize pipe --out out --preset minmax", "shutil.copyfile"),
    ("quantize pipe --out full --overwrite --preset minmax", "hqdit.pipeline.checkpoint.copy_tree"),
    ("quantize model --out full --overwrite --preset minmax", "hqdit.pipeline.publish.flush"),
    ("quantize model --out out --preset minmax --json result/q.json", "hqdit.pipeline.publish.publish_text"),
    ("quantize model --out out --preset minmax --json result/q.json", "hqdit.analysis.inspection.inspect_checkpoint"),
    ("sample model --out out --num 2 --steps 1", "PIL.Image.Image.save"),
    ("sample model --out out --num 2 --steps 1 --json s.json", "hqdit.pipeline.publish.publish_text"),
    ("evaluate quantized --against model --num 1 --steps 1 --json e.json", "hqdit.pipeline.publish.flush"),
    ("inject-outliers model --out out", "hqdit.models.weights.save_file"),
    ("dequantize quantized --out out", "hqdit.models.weights.save_file"),
    ("demo --out out --num 2 --steps 1", "hqdit.evaluation.demo.compare_presets"),
]


@pytest.mark.parametrize(("command", "writer"), WRITERS)
@pytest.mark.parametrize(
    ("error", "code", "fragment"),
    [
        (FULL, 5, "somewhere/file"),
        (PermissionError(errno.EACCES, "Permission denied", "somewhere/file"), 5, "Permission denied"),
        (MemoryError(), 5, "memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nframe #0"),
            5,
            "allocator",
        ),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 5, "--device cpu"),
        (ModuleNotFoundError("No module named 'extra'", name="extra"), 6, "pip install extra"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_resources(
    hqdit: Hqdit,
    unchanged: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    writer: str,
    error: Exception,
    code: int,
    fragment: str,
) -> None:
    monkeypatch.setattr(writer, raising(error))
    outcome = hqdit(*shlex.split(command))
    require_contract(outcome, code)
    assert fragment.lower() in outcome.first_line.lower()


@pytest.mark.parametrize("out", ["out", "full"])
def test_a_fault_after_the_new_folder_is_in_place(
    hqdit: Hqdit, unchanged: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    flush = publish.flush

    def fail_at_last(path: Path) -> None:
        if path == unchanged:  # the folder that holds --out, flushed after both renames
            assert (unchanged / out / "config.json").is_file()
            raise FULL
        flush(path)

    monkeypatch.setattr(publish, "flush", fail_at_last)
    require_contract(hqdit("quantize", "model", "--out", out, "--overwrite", "--preset", "minmax"), 5)


@pytest.mark.parametrize(("command", "writer"), WRITERS)
def test_interruption(
    hqdit: Hqdit, unchanged: Path, monkeypatch: pytest.MonkeyPatch, command: str, writer: str
) -> None:
    monkeypatch.setattr(writer, raising(KeyboardInterrupt()))
    outcome = hqdit(*shlex.split(command))
    assert outcome.code == 130
    assert outcome.err.strip().startswith("hqdit: interrupted") and "Fix: " in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert ("--resume" in outcome.err) == any(unchanged.rglob(".*.hqdit-job"))


@pytest.mark.parametrize(("command", "writer"), WRITERS)
def test_a_defect_shows_its_traceback(
    hqdit: Hqdit, unchanged: Path, monkeypatch: pytest.MonkeyPatch, command: str, writer: str
) -> None:
    monkeypatch.setattr(writer, raising(ZeroDivisionError("by design")))
    outcome = hqdit(*shlex.split(command))
    assert outcome.code == 1 and outcome.err.startswith("Traceback (most recent call last):")
    lines = [
        line for line in outcome.err.splitlines() if not line.startswith("hqdit: finished work is kept; to go on: ")
    ]
    assert lines[-1].startswith("hqdit: defect: ZeroDivisionError: by design. Fix: ")


def test_debug_shows_the_traceback_of_an_error(hqdit: Hqdit, unchanged: Path) -> None:
    outcome = hqdit("quantize", "nope", "--out", "out", "--debug")
    assert outcome.code == 3 and outcome.err.startswith("Traceback (most recent call last):")
    assert outcome.err.splitlines()[-1].startswith("hqdit: error: nope: ")


@pytest.mark.parametrize(
    "command",
    [
        "quantize model --out out --preset minmax",
        "quantize pipe --out full --overwrite --preset minmax --json q.json",
        "sample model --out out --num 400 --steps 1",
        "inspect quantized --json i.json",
    ],
)
def test_a_disk_that_is_full(hqdit: Hqdit, unchanged: Path, command: str) -> None:
    # No process may write a file of more than this many bytes, by order of the kernel.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        outcome = hqdit(*shlex.split(command))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    require_contract(outcome, 5, "File too large")


def test_a_place_where_nothing_can_be_created(hqdit: Hqdit, unchanged: Path) -> None:
    require_contract(hqdit("quantize", "model", "--out", "/proc/out", "--preset", "minmax"), 5, "/proc/")
    require_contract(hqdit("quantize", "model", "--out", "/proc/deep/out", "--preset", "minmax"), 5, "/proc/deep")


def test_the_tables_are_long_enough() -> None:
    assert len(FLAGS) + len(FILES) + len(NUMERICS) + len(ENVIRONMENT) + len(BROKEN) >= 200
