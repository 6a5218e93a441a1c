"""`hqdit convert`: from a .pt file to a folder that every other command takes."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from conftest import Hqdit, Outcome, tree
from original_dit import original_forward, original_state, save_original
from PIL import Image
from safetensors.torch import load_file, save_file

from hqdit.cli import convert as convert_command
from hqdit.integrations.load_pipeline import load_pipeline
from hqdit.models.source import TIME_FREQUENCY_SHIFT, find_model, load_float_transformer
from hqdit.models.weights import WEIGHTS_NAME
from hqdit.pipeline import original_checkpoint

NAMES = ["tench, Tinca tinca", "golden retriever", "crane", "Crane, machine", "volcano"]
HEADS = ("--heads", 4)
#: A checkpoint of width 48 with 5 classes.
STATE = original_state()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sources")
    save_original(root / "dit.pt", STATE)
    averaged = {name: tensor + 0.01 if name != "pos_embed" else tensor for name, tensor in STATE.items()}
    torch.save({"model": STATE, "ema": averaged, "opt": {}}, root / "training.pt")
    tiny.tiny_vae().save_pretrained(root / "vae")
    (root / "names.txt").write_text("\n".join(NAMES))
    return root


@pytest.fixture(scope="module")
def pipeline(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hqdit.cli.main import run

    out = tmp_path_factory.mktemp("converted") / "pipe"
    options = ["--vae", str(sources / "vae"), "--class-names", str(sources / "names.txt"), "--heads", "4", "--quiet"]
    assert run(["convert", str(sources / "dit.pt"), "--out", str(out), *options]) == 0
    return out


def read(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    assert isinstance(found, dict)
    return found


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def require_error(outcome: Outcome, code: int, *parts: str) -> None:
    assert outcome.code == code, outcome.err
    assert outcome.first_line.startswith("hqdit: error: ") and "Fix: " in outcome.first_line
    for part in parts:
        assert part in outcome.err, f"{part!r} is missing in: {outcome.err}"
    assert "Traceback" not in outcome.err


# --- what comes out


def test_a_whole_pipeline(hqdit: Hqdit, sources: Path, tmp_path: Path) -> None:
    before = tree(sources)
    outcome = hqdit(
        *("convert", sources / "dit.pt", "--out", tmp_path / "pipe", *HEADS, "--vae", sources / "vae"),
        *("--class-names", sources / "names.txt", "--json", tmp_path / "result.json"),
    )
    assert (outcome.code, outcome.err) == (0, "")
    assert "64 x 64 pixels" in outcome.out and "5 classes" in outcome.out and len(outcome.out.splitlines()) == 2
    assert sorted(path for path, kind in tree(tmp_path / "pipe").items() if kind != "folder") == [
        "hqdit_manifest.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        f"transformer/{WEIGHTS_NAME}",
        "vae/config.json",
        f"vae/{WEIGHTS_NAME}",
    ]
    assert tree(sources) == before
    assert read(tmp_path / "pipe" / "model_index.json")["id2label"] == {str(i): name for i, name in enumerate(NAMES)}
    result = read(tmp_path / "result.json")
    assert result.pop("source") == str(sources / "dit.pt")
    assert result.pop("model") == "DiT (2 blocks of width 48, 4 heads)/2"
    assert result.pop("parameters") == sum(t.numel() for name, t in STATE.items() if name != "pos_embed")
    assert result == {
        "weights": None,
        "blocks": 2,
        "width": 48,
        "heads": 4,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": 8,
        "classes": 5,
        "vae": True,
        "class_names": True,
    }


def test_the_function_is_that_of_the_original(pipeline: Path) -> None:
    fields = tiny.inputs_of(load_float_transformer(find_model(pipeline)))
    found = tiny.predicted(load_float_transformer(find_model(pipeline)), **fields)
    state = {name: tensor.double() for name, tensor in STATE.items()}
    expected = original_forward(state, fields["latents"].double(), fields["timesteps"], fields["classes"], 4)
    assert float((found - expected).abs().max() / expected.std()) < 2e-4  # see tests/models/test_original_dit.py


def test_diffusers_and_hqdit_load_it(pipeline: Path) -> None:
    theirs = diffusers.DiTPipeline.from_pretrained(pipeline)
    assert theirs.get_label_ids(["golden retriever", "Tinca tinca"]) == [1, 0]
    assert type(theirs.scheduler).__name__ == "DDIMScheduler" and theirs.vae is not None
    assert theirs.transformer.config.norm_eps == 1e-6
    ours = load_pipeline(pipeline)
    assert ours.labels == theirs.labels
    for name, tensor in ours.transformer.state_dict().items():
        assert torch.equal(tensor, theirs.transformer.state_dict()[name])


def test_weights_of_a_training(hqdit: Hqdit, sources: Path, tmp_path: Path) -> None:
    tensors = {}
    for chosen, options in {"ema": (), "model": ("--weights", "model")}.items():
        out = tmp_path / chosen
        outcome = hqdit("convert", sources / "training.pt", "--out", out, *HEADS, *options)
        assert outcome.code == 0 and f"weights: {chosen}" in outcome.out and "--vae" in outcome.out
        tensors[chosen] = load_file(out / "transformer" / WEIGHTS_NAME)
    assert torch.equal(tensors["model"]["pos_embed.proj.weight"], STATE["x_embedder.proj.weight"])
    assert torch.equal(tensors["ema"]["pos_embed.proj.weight"], STATE["x_embedder.proj.weight"] + 0.01)


def test_half_precision_stays(hqdit: Hqdit, tmp_path: Path) -> None:
    save_original(tmp_path / "dit.pt", {name: tensor.half() for name, tensor in STATE.items()})
    assert hqdit("convert", tmp_path / "dit.pt", "--out", tmp_path / "out", *HEADS, "--quiet").out == ""
    tensors = load_file(tmp_path / "out" / "transformer" / WEIGHTS_NAME)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}


def test_a_sharded_autoencoder(hqdit: Hqdit, sources: Path, tmp_path: Path) -> None:
    tiny.tiny_vae().save_pretrained(tmp_path / "vae", max_shard_size="20KB")
    assert len(list((tmp_path / "vae").glob("*.safetensors"))) > 1
    options = ("--vae", tmp_path / "vae")
    assert hqdit("convert", sources / "dit.pt", "--out", tmp_path / "out", *HEADS, *options).code == 0
    assert tree(tmp_path / "out" / "vae") == tree(tmp_path / "vae")


def test_overwriting(hqdit: Hqdit, sources: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("x")
    require_error(hqdit("convert", sources / "dit.pt", "--out", tmp_path / "out", *HEADS), 2, "--overwrite")
    assert hqdit("convert", sources / "dit.pt", "--out", tmp_path / "out", *HEADS, "--overwrite").code == 0
    assert not (tmp_path / "out" / "old").exists() and (tmp_path / "out" / "model_index.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_twice_gives_the_same_bytes(hqdit: Hqdit, sources: Path, pipeline: Path, tmp_path: Path) -> None:
    options = ("--vae", sources / "vae", "--class-names", sources / "names.txt")
    assert hqdit("convert", sources / "dit.pt", "--out", tmp_path / "out", *HEADS, *options).code == 0
    assert tree(tmp_path / "out") == tree(pipeline)


# --- what it is good for


def test_quantized_and_sampled_by_name(hqdit: Hqdit, pipeline: Path, tmp_path: Path) -> None:
    assert hqdit("quantize", pipeline, "--out", tmp_path / "q", "--preset", "minmax", "--quiet").code == 0
    assert read(tmp_path / "q" / "transformer" / "config.json")[TIME_FREQUENCY_SHIFT] == 0
    images = {}
    for sampler in ("scheduler", "ddpm-original"):
        out = tmp_path / sampler
        outcome = hqdit(
            *("sample", tmp_path / "q", "--out", out, "--classes", "golden retriever, 3,Tinca tinca", "--num", 4),
            *("--steps", 3, "--sampler", sampler, "--json", tmp_path / "s.json"),
        )
        assert (outcome.code, outcome.err) == (0, "")
        result = read(tmp_path / "s.json")
        assert result["classes"] == [1, 3, 0, 1] and result["sampler"] == sampler
        images[sampler] = [pixels_of(out / name) for name in result["files"]]
        assert images[sampler][0].shape == (16, 16, 3)
    assert not np.array_equal(images["scheduler"], images["ddpm-original"])


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--classes", "3,golden retreiver"), ("'golden retreiver'", "is it 'golden retriever'")),
        (("--classes", "crane"), ("2, 3", "number")),
        (("--classes", "5"), ("found 5", "0 to 4")),
        (("--sampler", "ddpm"), ("'ddpm'", "ddpm-original")),
        (("--sampler", "ddpm-original", "--steps", "1"), ("--steps", "2 to 1000")),
    ],
    ids=str,
)
def test_samples_that_nobody_can_take(
    hqdit: Hqdit, pipeline: Path, tmp_path: Path, options: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    require_error(hqdit("sample", pipeline, "--out", tmp_path / "out", "--steps", 2, *options), 2, *parts)
    assert list(tmp_path.iterdir()) == []


def test_the_original_sampler_needs_a_learned_variance(hqdit: Hqdit, tmp_path: Path) -> None:
    outcome = hqdit("sample", "digits", "--out", tmp_path / "out", "--sampler", "ddpm-original", "--steps", 2)
    require_error(outcome, 2, "learned variance", "--sampler scheduler")


def test_images_need_an_autoencoder(hqdit: Hqdit, sources: Path, tmp_path: Path) -> None:
    assert hqdit("convert", sources / "dit.pt", "--out", tmp_path / "bare", *HEADS).code == 0
    for model in ("bare", "bare/transformer"):
        outcome = hqdit("sample", tmp_path / model, "--out", tmp_path / "images", "--num", 1, "--steps", 2)
        require_error(outcome, 3, "no autoencoder", "4 channels", "vae/")
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize("pixels", [256, 512])
def test_images_of_both_sizes(hqdit: Hqdit, tmp_path: Path, pixels: int) -> None:
    """Latents of 32 and 64, and an autoencoder that makes them eight times larger, as DiT's."""
    save_original(tmp_path / "dit.pt", original_state(patch=8, size=pixels // 8, blocks=1))
    widths = (4, 4, 4, 4)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = diffusers.AutoencoderKL(block_out_channels=widths, norm_num_groups=2, latent_channels=4, **kinds)
    vae.save_pretrained(tmp_path / "vae")
    options = (*HEADS, "--vae", tmp_path / "vae")
    outcome = hqdit("convert", tmp_path / "dit.pt", "--out", tmp_path / "pipe", *options)
    assert outcome.code == 0 and f"{pixels} x {pixels} pixels" in outcome.out
    options = ("--num", 1, "--steps", 2, "--sampler", "ddpm-original", "--threads", 1)
    assert hqdit("sample", tmp_path / "pipe", "--out", tmp_path / "images", *options).code == 0
    assert pixels_of(tmp_path / "images" / "000000_class0.png").shape == (pixels, pixels, 3)


# --- what is refused, and leaves nothing


def change(name: str, edit: Callable[[torch.Tensor], torch.Tensor] | None) -> dict[str, torch.Tensor]:
    state = dict(STATE)
    if edit is None:
        del state[name]
    else:
        state[name] = edit(state[name]) if name in state else edit(torch.zeros(1))
    return state


@pytest.mark.parametrize(
    ("state", "parts"),
    [
        (change("blocks.1.attn.proj.bias", None), ("1 missing", "blocks.1.attn.proj.bias")),
        (change("blocks.0.attn.qkv.weight", None), ("1 missing", "blocks.0.attn.qkv.weight")),
        (change("blocks.0.norm1.weight", lambda x: x), ("1 unexpected", "blocks.0.norm1.weight")),
        (change("blocks.7.attn.proj.bias", lambda x: x), ("unexpected", "blocks.7.attn.proj.bias", "missing")),
        (change("blocks.999999999999.mlp.fc1.bias", lambda x: x), ("unexpected", "999999999999")),
        (change("blocks.0.mlp.fc1.bias", lambda x: x[:96]), ("1 of another shape", "(96,)", "(192,)")),
        (change("final_layer.linear.bias", lambda x: x * float("nan")), ("final_layer.linear.bias", "NaN")),
        (change("pos_embed", lambda x: x.flip(1)), ("pos_embed", "sines")),
        (change("x_embedder.proj.weight", None), ("x_embedder.proj.weight",)),
        ({f"module.{name}": tensor for name, tensor in STATE.items()}, ("x_embedder.proj.weight", "module.")),
        (change("blocks.0.\x1b[2J", lambda x: x), ("\\x1b[2J",)),
    ],
    ids=["missing", "no qkv", "unexpected", "gap", "huge", "shape", "nan", "positions", "no dit", "prefix", "control"],
)
def test_weights_that_do_not_fit(
    hqdit: Hqdit, tmp_path: Path, state: dict[str, torch.Tensor], parts: tuple[str, ...]
) -> None:
    save_original(tmp_path / "dit.pt", state)
    require_error(hqdit("convert", tmp_path / "dit.pt", "--out", tmp_path / "a" / "out", *HEADS), 3, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["dit.pt"]


def test_bad_arguments(hqdit: Hqdit, sources: Path, tmp_path: Path) -> None:
    good, out = sources / "dit.pt", ("--out", tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"_class_name": "VQModel"}')
    narrow = shutil.copytree(sources / "vae", tmp_path / "narrow")
    diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=3).save_pretrained(narrow)
    broken = shutil.copytree(sources / "vae", tmp_path / "broken")
    save_file({"a": torch.zeros(1)}, broken / WEIGHTS_NAME)
    pickled = shutil.copytree(sources / "vae", tmp_path / "pickled")
    (pickled / WEIGHTS_NAME).rename(pickled / "diffusion_pytorch_model.bin")
    (tmp_path / "few.txt").write_text("one\ntwo")
    before = tree(tmp_path)
    for code, arguments, parts in (
        (3, (tmp_path / "gone.pt", *out), ("gone.pt", "no such file")),
        (3, (good, *out), ("width 48", "--heads")),
        (3, (good, *out, "--heads", 7), ("7 heads", "--heads")),
        (2, (good, *out, "--heads", 0), ("--heads", "found 0")),
        (2, (good, *out, *HEADS, "--weights", "best"), ("--weights", "'best'", "ema, model")),
        (3, (good, *out, *HEADS, "--weights", "ema"), ("'ema'", "--weights")),
        (3, (good, *out, *HEADS, "--vae", tmp_path / "gone"), ("gone", "--vae")),
        (3, (good, *out, *HEADS, "--vae", other), ("VQModel", "AutoencoderKL")),
        (3, (good, *out, *HEADS, "--vae", narrow), ("3 latent channels", "4")),
        (3, (good, *out, *HEADS, "--vae", broken), ("autoencoder", "cannot be loaded")),
        (3, (good, *out, *HEADS, "--vae", pickled), ("diffusion_pytorch_model.bin",)),
        (3, (good, *out, *HEADS, "--class-names", tmp_path / "few.txt"), ("2 classes", "5")),
        (3, (good, *out, *HEADS, "--class-names", tmp_path / "none.txt"), ("none.txt", "--class-names")),
        (2, (good, "--out", sources, *HEADS, "--overwrite"), ("source",)),
        (2, (good, "--out", narrow / "out", *HEADS, "--vae", narrow), ("source",)),
        (2, (good, *out, *HEADS, "--json", good), ("--json",)),
        (2, (good, *out, *HEADS, "--json", tmp_path / "out"), ("--json", "--out")),
        (2, (good,), ("--out",)),
    ):
        require_error(hqdit("convert", *arguments), code, *parts)
        assert tree(tmp_path) == before, arguments


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
def test_an_end_in_the_middle_leaves_nothing(
    hqdit: Hqdit, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(original_checkpoint, "write_safetensors", fail)
    outcome = hqdit("convert", sources / "dit.pt", "--out", tmp_path / "out", *HEADS)
    assert outcome.code == (130 if isinstance(error, KeyboardInterrupt) else 5)
    assert list(tmp_path.iterdir()) == []


def test_an_error_after_publishing_takes_the_folder_back(
    hqdit: Hqdit, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert_command, "write_json", fail)
    assert hqdit("convert", sources / "dit.pt", "--out", tmp_path / "out", *HEADS).code == 5
    assert list(tmp_path.iterdir()) == []


def test_signals_of_the_child_are_named(
    hqdit: Hqdit, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hqdit.models.torch_file._run_child", lambda *_: -signal.SIGXCPU)
    outcome = hqdit("convert", sources / "dit.pt", "--out", tmp_path / "out", *HEADS)
    require_error(outcome, 3, "dit.pt", f"signal {int(signal.SIGXCPU)}")
    assert list(tmp_path.iterdir()) == []
