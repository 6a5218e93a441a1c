"""Finding models and loading them in float32."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    CLASSES,
    ddim,
    edit_json,
    inputs_of,
    latent_dit,
    predicted,
    require_complete,
    save_pipeline,
    state_hash,
    tiny_dit,
    tiny_vae,
)

from hqdit.errors import CheckpointError, EnvironmentUnavailable, HQDiTError, UsageError
from hqdit.models.source import (
    DEFAULT_SCHEDULER,
    build_skeleton,
    find_model,
    load_float_transformer,
    load_scheduler,
    load_vae,
)
from hqdit.models.weights import INDEX_NAME, WEIGHTS_NAME


def refused(call: Callable[[], object], *parts: str, error: type[HQDiTError] = CheckpointError) -> None:
    with pytest.raises(error) as info:
        call()
    require_complete(info.value, *parts)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A bare transformer folder."""
    tiny_dit().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def replace_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS_NAME)
    change(tensors)
    save_file(tensors, folder / WEIGHTS_NAME)


# --- what a name stands for


def test_bundled_model() -> None:
    found = find_model("digits")
    assert found.transformer == found.root / "transformer"
    assert found.is_pipeline and not found.is_quantized
    assert found.config["_class_name"] == "DiTTransformer2DModel"
    model = load_float_transformer(found)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_bundled_name_goes_before_a_folder_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_dit().save_pretrained(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert find_model("digits").root != Path("digits") and find_model("digits").config["sample_size"] == 8
    for folder in ("./digits", Path("digits")):
        assert find_model(folder).root.resolve() == tmp_path / "digits"


@pytest.mark.parametrize(
    "source",
    ["./x", "../x", "./owner/name", "/x", "/owner/name", "~/x", "nope", "digit", "x.safetensors", "a/b/c", "a/b/", "a/"]
    + ["C:\\models\\x", "models\\x", Path("owner/name"), Path("nope")],
    ids=str,
)
def test_what_looks_like_a_path_is_a_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str | Path
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: find_model(source), str(source), "digits", "no such file")


@pytest.mark.parametrize("source", ["", "  ", "\n"])
def test_empty_name(source: str) -> None:
    refused(lambda: find_model(source), error=UsageError)


def test_hub_id_without_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # read from the environment at import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EnvironmentUnavailable) as info:
        find_model("owner/name")
    assert info.value.exit_code == 6
    require_complete(info.value, "owner/name")
    refused(lambda: find_model("no good/name"), "no good/name")  # cannot be a repository, so that the name is wrong


def test_a_folder_goes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_dit().save_pretrained(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    assert find_model("owner/name").transformer == Path("owner/name")


def test_a_name_beside_an_existing_folder_is_a_mistyped_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    refused(lambda: find_model("out/w4a4"), "out/w4a4", "no such file")


def test_transformer_folder(folder: Path) -> None:
    found = find_model(folder)
    assert (found.root, found.transformer) == (folder, folder)
    assert not found.is_pipeline and not found.is_quantized
    assert found.config["num_embeds_ada_norm"] == CLASSES


def test_pipeline_folder(tmp_path: Path) -> None:
    found = find_model(str(save_pipeline(tmp_path, tiny_dit(), ddim())))
    assert (found.root, found.transformer) == (tmp_path, tmp_path / "transformer")
    assert found.is_pipeline


def test_pipeline_folder_without_an_index(tmp_path: Path) -> None:
    (save_pipeline(tmp_path, tiny_dit()) / "model_index.json").unlink()
    assert find_model(tmp_path).transformer == tmp_path / "transformer"


def test_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    refused(lambda: find_model(tmp_path / "file"), str(tmp_path / "file"), "found a file")
    refused(lambda: find_model(tmp_path), str(tmp_path), "config.json")
    (tmp_path / "model_index.json").write_text('{"_class_name": "DiTPipeline"}')
    refused(lambda: find_model(tmp_path), str(tmp_path), "transformer")
    (tmp_path / "model_index.json").write_text("[]")
    refused(lambda: find_model(tmp_path), str(tmp_path / "model_index.json"))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"x"', "[" * 100_000])
def test_config_that_is_no_object(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refused(lambda: find_model(folder), str(folder / "config.json"))


# --- config.json


@pytest.mark.parametrize(
    "name", ["UNet2DConditionModel", "Transformer2DModel", "DiTPipeline", "logging", "", "a.b", None, 7, ["DiT"]]
)
def test_unknown_model_class(folder: Path, name: object) -> None:
    edit_json(folder / "config.json", _class_name=name, norm_type="layer_norm")
    refused(
        lambda: build_skeleton(find_model(folder)), str(folder / "config.json"), repr(name), "DiTTransformer2DModel"
    )


def test_unknown_config_keys(folder: Path) -> None:
    edit_json(folder / "config.json", num_layer=3, attention_heads=2)
    refused(
        lambda: build_skeleton(find_model(folder)), str(folder / "config.json"), "attention_heads, num_layer", "unknown"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("norm_type", "layer_norm"),
        ("num_embeds_ada_norm", None),
        ("num_embeds_ada_norm", "many"),
        ("num_embeds_ada_norm", -9),
        ("num_attention_heads", "two"),
        ("num_attention_heads", None),
        ("num_attention_heads", -2),
        ("num_attention_heads", 10**9),
        ("attention_head_dim", 1.5),
        ("attention_head_dim", -36),
        ("num_layers", None),
        ("num_layers", 0),
        ("num_layers", -1),
        ("num_layers", 10**9),
        ("num_layers", 1.5),
        ("patch_size", 0),
        ("patch_size", "4"),
        ("patch_size", -4),
        ("sample_size", None),
        ("sample_size", 0),
        ("sample_size", []),
        ("in_channels", None),
        ("in_channels", {}),
        ("out_channels", -1),
        ("activation_fn", "nope"),
        ("dropout", "some"),
        ("dropout", 2.0),
    ],
)
def test_config_values_that_build_no_model(folder: Path, key: str, value: object) -> None:
    edit_json(folder / "config.json", **{key: value})
    refused(lambda: load_float_transformer(find_model(folder)), str(folder))


def test_config_of_another_class(folder: Path) -> None:
    edit_json(folder / "config.json", _class_name="FluxTransformer2DModel")
    refused(lambda: build_skeleton(find_model(folder)), "FluxTransformer2DModel", "num_embeds_ada_norm", "unknown")


@pytest.mark.parametrize("is_empty", [False, True])
def test_skeleton_of_any_transformer(tmp_path: Path, is_empty: bool) -> None:
    flux = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 4),
    )
    flux.save_pretrained(tmp_path)
    found = build_skeleton(find_model(tmp_path), is_empty)
    assert isinstance(found, diffusers.FluxTransformer2DModel)
    assert {parameter.is_meta for parameter in found.parameters()} == {is_empty}
    assert state_hash(load_float_transformer(find_model(tmp_path))) == state_hash(flux)


def test_skeleton_has_the_configuration(folder: Path) -> None:
    model: Any = build_skeleton(find_model(folder))
    assert not model.training
    assert model.config.num_layers == 2 and model.config.patch_size == 4
    assert model.state_dict().keys() == tiny_dit().state_dict().keys()


# --- weights


def test_loaded_as_diffusers_loads_it(folder: Path) -> None:
    model = load_float_transformer(find_model(folder))
    theirs = diffusers.DiTTransformer2DModel.from_pretrained(folder)
    assert state_hash(model) == state_hash(theirs) == state_hash(tiny_dit())
    assert torch.equal(predicted(model), predicted(theirs))


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_legacy_transformer_2d_model(tmp_path: Path) -> None:
    # What facebook/DiT-XL-2-256 and other old checkpoints say they are.
    settings = {"num_attention_heads": 2, "attention_head_dim": 36, "in_channels": 4, "out_channels": 8}
    shape = {"num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": CLASSES}
    fixed = {"norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "attention_bias": True}
    torch.manual_seed(0)
    legacy = diffusers.models.Transformer2DModel(**settings, **shape, **fixed, activation_fn="gelu-approximate").eval()
    legacy.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "Transformer2DModel"
    model = load_float_transformer(find_model(tmp_path))
    assert isinstance(model, diffusers.DiTTransformer2DModel)
    fields = inputs_of(model)
    with torch.no_grad():
        theirs = legacy(fields["latents"], timestep=fields["timesteps"], class_labels=fields["classes"]).sample
    assert torch.equal(predicted(model), theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_widened_and_remembered(folder: Path, dtype: torch.dtype) -> None:
    tiny_dit().to(dtype).save_pretrained(folder)
    edited = {"proj_out_2.bias", "pos_embed.proj.weight"}
    replace_weights(folder, lambda tensors: tensors.update({n: tensors[n].float() for n in edited}))
    model: Any = load_float_transformer(find_model(folder))
    stored = load_file(folder / WEIGHTS_NAME)
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    assert model.source_dtypes == {n: torch.float32 if n in edited else dtype for n in stored}
    assert all(torch.equal(tensor, stored[name].float()) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_weights_that_are_no_floats(folder: Path, dtype: torch.dtype) -> None:
    name = "transformer_blocks.1.ff.net.2.weight"
    replace_weights(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    refused(lambda: load_float_transformer(find_model(folder)), str(folder), name, str(dtype))


def test_sharded_checkpoint(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()
    tiny_dit().save_pretrained(folder, max_shard_size="200KB")
    assert (folder / INDEX_NAME).exists()
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert state_hash(load_float_transformer(find_model(folder))) == state_hash(tiny_dit())


def test_a_lost_shard(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()
    tiny_dit().save_pretrained(folder, max_shard_size="200KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    refused(lambda: load_float_transformer(find_model(folder)), str(shard))


def test_weights_of_another_model(folder: Path) -> None:
    tiny_dit(num_layers=3).save_pretrained(folder.parent / "other")
    (folder / "config.json").write_bytes((folder.parent / "other" / "config.json").read_bytes())
    refused(lambda: load_float_transformer(find_model(folder)), str(folder), "missing", "0 unexpected")
    edit_json(folder / "config.json", num_layers=2, num_embeds_ada_norm=CLASSES + 1)
    refused(lambda: load_float_transformer(find_model(folder)), str(folder), "2 of another shape")


def test_not_a_number(folder: Path) -> None:
    replace_weights(folder, lambda tensors: tensors["proj_out_1.weight"][5, 6].fill_(torch.nan))
    refused(lambda: load_float_transformer(find_model(folder)), str(folder), "proj_out_1.weight", "(5, 6)")


@pytest.mark.parametrize("method", ["bitsandbytes", "hqdit"])
def test_already_quantized(folder: Path, method: str) -> None:
    edit_json(folder / "config.json", quantization_config={"quant_method": method, "load_in_4bit": True})
    found = find_model(folder)
    assert found.is_quantized
    refused(lambda: load_float_transformer(found), str(folder), "already quantized", method)


# --- scheduler and autoencoder


def test_scheduler_of_a_bare_transformer(folder: Path) -> None:
    scheduler = load_scheduler(find_model(folder))
    assert type(scheduler) is diffusers.DDIMScheduler
    assert DEFAULT_SCHEDULER.items() <= dict(scheduler.config).items()
    assert not scheduler.config.clip_sample and not scheduler.config.thresholding
    assert scheduler.config.prediction_type == "epsilon"
    linear = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    # Each float32 number is off by half an ulp, and the product of 1000 factors by 1000 times that.
    torch.testing.assert_close(scheduler.betas.double(), linear, rtol=2**-22, atol=0.0)
    cumulative = torch.cumprod(1 - linear, dim=0)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), cumulative, rtol=1000 * 2**-23, atol=0.0)


def test_scheduler_of_a_pipeline(tmp_path: Path) -> None:
    save_pipeline(tmp_path, tiny_dit(), diffusers.DPMSolverMultistepScheduler(num_train_timesteps=77))
    scheduler = load_scheduler(find_model(tmp_path))
    assert type(scheduler) is diffusers.DPMSolverMultistepScheduler
    assert scheduler.config.num_train_timesteps == 77


def test_pipeline_without_a_scheduler(tmp_path: Path) -> None:
    assert type(load_scheduler(find_model(save_pipeline(tmp_path, tiny_dit())))) is diffusers.DDIMScheduler


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": "NoSuchScheduler"},
        {"_class_name": None},
        {"_class_name": "AutoencoderKL"},
        {"_class_name": "DiffusionPipeline"},
        {"_class_name": "logging"},
        {"beta_schedule": "no such schedule"},
        {"beta_schedule": None},
        {"num_train_timesteps": "many"},
        {"num_train_timesteps": -1},
        {"beta_start": None},
    ],
    ids=str,
)
def test_unknown_scheduler(tmp_path: Path, changes: dict[str, object]) -> None:
    save_pipeline(tmp_path, tiny_dit(), ddim())
    edit_json(tmp_path / "scheduler" / "scheduler_config.json", **changes)
    refused(lambda: load_scheduler(find_model(tmp_path)), str(tmp_path / "scheduler"))


def test_broken_scheduler_file(tmp_path: Path) -> None:
    save_pipeline(tmp_path, tiny_dit(), ddim())
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{")
    refused(lambda: load_scheduler(find_model(tmp_path)), "scheduler_config.json")


def test_autoencoder(tmp_path: Path) -> None:
    save_pipeline(tmp_path, latent_dit(), ddim(), tiny_vae())
    vae = load_vae(find_model(tmp_path))
    assert vae is not None and not vae.training
    assert state_hash(vae) == state_hash(tiny_vae())


def test_no_autoencoder(tmp_path: Path, folder: Path) -> None:
    assert load_vae(find_model(folder)) is None
    assert load_vae(find_model(save_pipeline(tmp_path / "pipeline", tiny_dit()))) is None


@pytest.mark.parametrize("damage", ["no config", "no weights", "half the weights", "other class"])
def test_broken_autoencoder(tmp_path: Path, damage: str) -> None:
    save_pipeline(tmp_path, latent_dit(), ddim(), tiny_vae())
    weights = tmp_path / "vae" / WEIGHTS_NAME
    if damage == "no config":
        (tmp_path / "vae" / "config.json").unlink()
    elif damage == "no weights":
        weights.unlink()
    elif damage == "half the weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        edit_json(tmp_path / "vae" / "config.json", _class_name="UNet2DModel", latent_channels=7)
    refused(lambda: load_vae(find_model(tmp_path)), str(tmp_path / "vae"))
