"""The estimate of the long commands: printed before the work, refused early, and what it is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Hqdit, Models, tree
from contract import require_contract
from original_dit import original_state, save_original

from hqdit.models.source import find_model
from hqdit.models.weights import WEIGHTS_NAME
from hqdit.pipeline import estimate, resources
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.estimate import convert_estimate, evaluate_estimate, quantize_estimate, sample_estimate
from hqdit.pipeline.resources import Available

SHORT = "--num 2 --steps 1"
LINES = {
    "quantize": "quantize {models.pipeline} --out {out} --preset minmax",
    "sample": f"sample {{models.quantized}} --out {{out}} {SHORT}",
    "evaluate": f"evaluate {{models.quantized}} --against {{models.transformer}} --json {{out}} {SHORT}",
    "convert": "convert {out.parent}/dit.pt --out {out} --heads 4",
}


def words(name: str, models: Models, out: Path) -> list[str]:
    save_original(out.parent / "dit.pt", original_state())
    return [word.format(models=models, out=out) for word in LINES[name].split()]


def have(monkeypatch: pytest.MonkeyPatch, memory: int | None, disk: int | None) -> None:
    monkeypatch.setattr(resources, "available", lambda place: Available(memory, disk))


@pytest.mark.usefixtures("reads_here")
@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize(("memory", "disk", "what"), [(1000, 10**12, "memory"), (10**12, 1000, "disk of")])
def test_refused_before_the_work(
    hqdit: Hqdit,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    memory: int,
    disk: int,
    what: str,
) -> None:
    given = words(name, models, tmp_path / "out")
    before = tree(tmp_path)
    have(monkeypatch, memory, disk)
    outcome = hqdit(*given)
    require_contract(outcome, 5, f"error: {what}", "found 0.0 MB", "needed about ", "--ignore-estimate")
    assert tree(tmp_path) == before
    assert outcome.out.startswith("estimate: about ") and len(outcome.out.splitlines()) == 1
    outcome = hqdit(*given, "--ignore-estimate")
    assert (outcome.code, outcome.err) == (0, "") and outcome.out.startswith("estimate: about ")


@pytest.mark.usefixtures("reads_here")
@pytest.mark.parametrize("name", LINES)
def test_printed_before_the_work_unless_quiet(hqdit: Hqdit, models: Models, tmp_path: Path, name: str) -> None:
    given = words(name, models, tmp_path / "out")
    outcome = hqdit(*given, "--quiet")
    assert (outcome.code, outcome.out) == (0, "")


def test_the_plan_shows_it_and_refuses_nothing(
    hqdit: Hqdit, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, 1, 1)
    outcome = hqdit("quantize", models.transformer, "--dry-run", "--json", tmp_path / "plan.json")
    assert outcome.code == 0 and "estimate: about " in outcome.out
    found = json.loads((tmp_path / "plan.json").read_text())["estimate"]
    assert found.keys() == {"memory_bytes", "mapped_bytes", "disk_bytes"} and min(found.values()) > 0


def test_what_a_job_has_finished_is_not_needed_again(
    hqdit: Hqdit, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = words("quantize", models, tmp_path / "out")
    (tmp_path / ".out.hqdit-job").mkdir()
    (tmp_path / ".out.hqdit-job" / "piece").write_bytes(bytes(10**7))
    have(monkeypatch, None, 0)
    assert hqdit(*given).code == 0


def test_no_tensor_is_read(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("read a tensor")

    for name in ("load_file", "safe_open"):
        monkeypatch.setattr(f"hqdit.models.weights.{name}", refuse)
    quantize_estimate(find_model(models.transformer), QuantizationConfig(), 512)
    sample_estimate(find_model(models.quantized), torch.float32, 4, 4, 1.5, False)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weight_granularity": "group", "group_size": 4},
        {"weights": "fp4", "format_granularity": "channel"},
        {"weights": "e4m3", "rotation": "none"},
        {"keep_dtype": "bfloat16"},
        {"exclude": ("*.ff.*",)},
    ],
    ids=str,
)
def test_the_size_of_a_result(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Packed layers and kept tensors are those of the file that is then written, but for equal tensors stored once."""
    from safetensors.torch import load_file

    from hqdit.pipeline.checkpoint import save
    from hqdit.pipeline.quantize import quantize

    model = tiny.tiny_dit()
    model.save_pretrained(tmp_path / "model")
    config = QuantizationConfig.preset("minmax").replace(rotation="full").replace(**changes)
    found = quantize_estimate(find_model(tmp_path / "model"), config, 0)
    save(quantize(tiny.tiny_dit(), config), tmp_path / "q")
    stored = load_file(tmp_path / "q" / WEIGHTS_NAME)
    whole = sum(tensor.nbytes for tensor in stored.values())
    packed = sum(tensor.nbytes for name, tensor in stored.items() if name.rpartition(".")[2] not in ("weight", "bias"))
    assert found.disk_bytes == pytest.approx(packed + whole, rel=0.02)


def test_it_grows_with_what_is_asked(models: Models, tmp_path: Path) -> None:
    folder, config = find_model(models.transformer), QuantizationConfig()
    few, many = (quantize_estimate(folder, config, samples) for samples in (16, 512))
    without = quantize_estimate(folder, config.replace(gptq=False), 0)
    assert without.memory_bytes < few.memory_bytes < many.memory_bytes  # type: ignore[operator]
    assert without.disk_bytes < few.disk_bytes < many.disk_bytes
    narrow = sample_estimate(folder, torch.float32, 4, 1, 1.5, False)
    wide = sample_estimate(folder, torch.float32, 4, 4, 1.5, True)
    assert narrow.memory_bytes < wide.memory_bytes and narrow.disk_bytes < wide.disk_bytes  # type: ignore[operator]
    quantized = find_model(models.quantized)
    kept, thrown = (
        evaluate_estimate(quantized, folder, torch.float32, 4, 4, 1.5, is_kept) for is_kept in (True, False)
    )
    assert thrown.disk_bytes == 0 < kept.disk_bytes
    save_original(tmp_path / "dit.pt", original_state())
    tiny.tiny_vae().save_pretrained(tmp_path / "vae")
    bare, whole = convert_estimate(tmp_path / "dit.pt", None), convert_estimate(tmp_path / "dit.pt", tmp_path / "vae")
    assert bare.disk_bytes < whole.disk_bytes and bare.memory_bytes == whole.memory_bytes


def test_images_of_an_autoencoder_are_larger_than_latents(tmp_path: Path) -> None:
    tiny.save_pipeline(tmp_path / "pipe", tiny.latent_dit(), tiny.ddim(), tiny.tiny_vae())
    folder = find_model(tmp_path / "pipe")
    sizes = estimate._sizes(folder, tiny.latent_dit())
    assert sizes.latent == (4, 8, 8) and sizes.tokens == 4 and sizes.width == 72 and sizes.widest == 288
    assert estimate._image_shape(folder, sizes) == (3, 16, 16)
    for content in ("[]", '{"block_out_channels": "x"}', "{}"):
        (tmp_path / "pipe" / "vae" / "config.json").write_text(content)
        if content != "[]":
            assert estimate._image_shape(folder, sizes) == (4, 8, 8)
