"""`hqdit quantize` on a pipeline with text conditioning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Hqdit
from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from tiny import file_hashes, require_complete, tiny_vae

import hqdit as package
from hqdit.calibration.recording import RecordedCalls
from hqdit.pipeline.checkpoint import quantized_layers


@pytest.fixture(scope="module")
def pixart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny PixArt pipeline with a real tokenizer and text encoder, both with random weights."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer(
        vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -1.0) for letter in "▁abcdefghijklmnopqrs")],
        extra_ids=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = T5EncoderModel(T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4)).eval()
        transformer = PixArtTransformer2DModel(
            num_attention_heads=3,
            attention_head_dim=12,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=36,
            caption_channels=32,
            sample_size=32,
            patch_size=8,
        )
    folder = tmp_path_factory.mktemp("pixart") / "pipeline"
    scheduler = DPMSolverMultistepScheduler()
    PixArtAlphaPipeline(tokenizer, encoder, tiny_vae(), transformer, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red fox\n\n  the sea  \n", encoding="utf-8")
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_prompts_calibrate_through_the_pipeline(hqdit: Hqdit, pixart: Path, prompts: Path, tmp_path: Path) -> None:
    before = file_hashes(pixart)
    flags = ("--prompts", prompts, "--steps", 2, "--guidance", 3)
    done = hqdit("quantize", pixart, "--out", tmp_path / "q", *flags, "--calibration-samples", 3)
    assert done.code == 0, done.err
    described = json.loads((tmp_path / "q" / "transformer" / "config.json").read_text())["quantization_config"]
    assert described["calibration"]["samples"] == 3
    assert described["calibration"]["origin"] == "PixArtAlphaPipeline: 2 calls, 4 of its transformer, seed 0"
    assert {entry["record"]["method"] for entry in described["layers"].values()} == {"gptq"}
    # Everything but the transformer is there as it was, and the source as well.
    assert file_hashes(pixart) == before
    kept = {name: value for name, value in before.items() if not name.startswith("transformer/")}
    assert kept.items() <= file_hashes(tmp_path / "q").items()
    pipeline = package.load_pipeline(tmp_path / "q")
    assert isinstance(pipeline, PixArtAlphaPipeline)
    assert set(quantized_layers(pipeline.transformer)) == set(described["layers"])
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("the sea", num_inference_steps=2, output_type="latent").images
    assert bool(torch.isfinite(images).all())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_recorded_calls_from_a_file(hqdit: Hqdit, pixart: Path, tmp_path: Path) -> None:
    pipeline = PixArtAlphaPipeline.from_pretrained(pixart)
    pipeline.set_progress_bar_config(disable=True)
    inputs = [{"prompt": "the sea", "num_inference_steps": 2, "output_type": "latent"}]
    RecordedCalls.from_pipeline(pipeline, inputs).save(tmp_path / "calls.safetensors")
    done = hqdit("quantize", pixart, "--out", tmp_path / "q", "--calibration", tmp_path / "calls.safetensors")
    assert done.code == 0, done.err
    wrong = hqdit("quantize", "digits", "--out", tmp_path / "d", "--calibration", tmp_path / "calls.safetensors")
    assert wrong.code == 4 and not (tmp_path / "d").exists()
    require_complete(wrong.first_line, "PixArtTransformer2DModel", "DiTTransformer2DModel")


def test_data_free_needs_no_prompts(hqdit: Hqdit, pixart: Path, tmp_path: Path) -> None:
    done = hqdit("quantize", pixart, "--out", tmp_path / "q", "--no-gptq")
    assert done.code == 0, done.err
    planned = hqdit("quantize", pixart, "--dry-run", "--no-gptq")
    assert planned.code == 0 and "20 layers to quantize" in planned.out


CASES = ("none", "missing", "empty", "no text", "transformer alone", "classes", "bad guidance")


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_go_together(hqdit: Hqdit, pixart: Path, prompts: Path, tmp_path: Path, case: str) -> None:
    source: object = pixart
    flags: tuple[object, ...] = ("--prompts", prompts)
    if case == "none":
        flags = ()
    elif case == "missing":
        flags = ("--prompts", tmp_path / "nowhere.txt")
    elif case == "empty":
        prompts.write_text("\n \n")
    elif case == "no text":
        prompts.write_bytes(b"\xff\xfe\x00")
    elif case == "transformer alone":
        source = pixart / "transformer"
    elif case == "classes":
        source = "digits"
    else:
        flags += ("--guidance", "-inf")
    done = hqdit("quantize", source, "--out", tmp_path / "q", *flags)
    assert done.code == 2 and not (tmp_path / "q").exists()
    require_complete(done.first_line, "--guidance" if case == "bad guidance" else "--prompts")


def test_commands_that_sample_by_themselves_say_so(hqdit: Hqdit, pixart: Path, tmp_path: Path) -> None:
    for command in (("sample", pixart, "--out", tmp_path / "o"), ("evaluate", pixart, "--against", pixart)):
        done = hqdit(*command)
        assert done.code == 3 and not (tmp_path / "o").exists()
        require_complete(done.first_line, "PixArtTransformer2DModel", "pipeline")
