"""The on-disk contract: what is written, that it comes back to the bit, and that everything else is refused."""

from __future__ import annotations

import copy
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    ddim,
    edit_json,
    file_hashes,
    inputs_of,
    latent_dit,
    predicted,
    random_calibration,
    require_complete,
    save_pipeline,
    state_hash,
    tiny_dit,
    tiny_vae,
)
from torch import Tensor

import hqdit
from hqdit.errors import CheckpointError, HQDiTError, UsageError
from hqdit.models import weights
from hqdit.models.source import find_model, load_scheduler
from hqdit.models.weights import WEIGHTS_NAME
from hqdit.pipeline.checkpoint import load, quantized_layers, save
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.manifest import MANIFEST_NAME
from hqdit.pipeline.publish import TEMPORARY_PREFIX
from hqdit.pipeline.quantize import quantize

#: One block keeps loading fast; the options bring every kind of buffer into one file or the other.
SMALL: dict[str, Any] = {"num_layers": 1}
CHANNELS = QuantizationConfig(
    gptq=False,
    format_granularity="channel",
    activation_granularity="channel-token",
    smoothing=0.5,
    low_rank=3,
)
GROUPS = QuantizationConfig(
    gptq=False, weights="e4m3", weight_granularity="group", group_size=12, activation_granularity="tensor"
)


def small(config: QuantizationConfig) -> Any:
    return quantize(tiny_dit(**SMALL), config, random_calibration(tiny_dit(**SMALL), 16))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved checkpoints that no test changes."""
    folder = tmp_path_factory.mktemp("originals")
    for name, config in (("channels", CHANNELS), ("groups", GROUPS)):
        save(small(config), folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(params=["channels", "groups"])
def original(request: pytest.FixtureRequest, originals: dict[str, Path]) -> Path:
    return originals[request.param]


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(original, tmp_path / "model")


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as info:
        load(path)
    assert info.value.exit_code == 3
    require_complete(info.value, *parts)


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / WEIGHTS_NAME)


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS_NAME)


def description(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


# --- what is written


def test_files_and_their_contents(original: Path) -> None:
    assert {path.name for path in original.iterdir()} == {"config.json", WEIGHTS_NAME, MANIFEST_NAME}
    config = json.loads((original / "config.json").read_text())
    assert config["_class_name"] == "DiTTransformer2DModel"
    assert config["num_layers"] == 1 and config["patch_size"] == 4
    found = config["quantization_config"]
    assert found["quant_method"] == "hqdit" and found["format_version"] == 1
    assert found["hqdit_version"] == hqdit.__version__
    assert QuantizationConfig.from_json(found["config"]) in (CHANNELS, GROUPS)
    assert len(found["layers"]) == 7
    layer = found["layers"]["transformer_blocks.0.ff.net.2"]
    assert (layer["in_features"], layer["out_features"], layer["bias"]) == (288, 72, True)
    assert layer["rotation"]["kind"] == "full" and "paley" in layer["rotation"]["factors"]


def test_tensors_of_the_file(originals: dict[str, Path]) -> None:
    found = stored(originals["channels"])
    name = "transformer_blocks.0.ff.net.2"
    kinds = {suffix: found[f"{name}.{suffix}"] for suffix in ("qweight", "weight_scale", "bias", "format_index")}
    assert {suffix: (t.dtype, tuple(t.shape)) for suffix, t in kinds.items()} == {
        "qweight": (torch.uint8, (72, 144)),
        "weight_scale": (torch.float32, (72, 1)),
        "bias": (torch.float32, (72,)),
        "format_index": (torch.uint8, (72,)),
    }
    assert (found[f"{name}.rotation_signs"].dtype, found[f"{name}.rotation_signs"].shape) == (torch.uint8, (36,))
    assert found[f"{name}.channel_scale"].shape == found[f"{name}.input_scale"].shape == (288,)
    assert found[f"{name}.low_rank_down"].dtype == found[f"{name}.low_rank_up"].dtype == torch.bfloat16
    assert (found[f"{name}.low_rank_down"].shape, found[f"{name}.low_rank_up"].shape) == ((3, 288), (72, 3))
    assert f"{name}.weight" not in found
    groups = stored(originals["groups"])
    assert groups[f"{name}.qweight"].shape == (72, 288)
    assert groups[f"{name}.weight_scale"].shape == (72, 24)
    assert groups[f"{name}.static_scale"].shape == (1,)


def test_kept_tensors_are_those_of_the_source(original: Path) -> None:
    source, found = tiny_dit(**SMALL).state_dict(), stored(original)
    layers = description(original)["layers"]
    kept = {name for name in source if name.rpartition(".")[0] not in layers}
    assert kept <= found.keys() and len(kept) == 11
    assert all(torch.equal(found[name], source[name]) for name in kept)


def test_identical_tensors_are_stored_once(original: Path) -> None:
    shared = description(original)["shared_tensors"]
    q, k, v = (f"transformer_blocks.0.attn1.to_{letter}" for letter in "qkv")
    buffers = [name for name in ("rotation_signs", "channel_scale", "static_scale") if hasattr_in(original, k, name)]
    assert "rotation_signs" in buffers and len(buffers) == 2
    for buffer in buffers:  # k comes first by name
        assert shared[f"{q}.{buffer}"] == shared[f"{v}.{buffer}"] == f"{k}.{buffer}"
    found = stored(original)
    assert not shared.keys() & found.keys()
    assert set(shared.values()) <= found.keys()
    contents = {(t.dtype, tuple(t.shape), t.reshape(-1).view(torch.uint8).numpy().tobytes()) for t in found.values()}
    assert len(contents) == len(found)
    in_memory = load(original).state_dict()
    saved_bytes = sum(in_memory[name].numel() * in_memory[name].element_size() for name in shared)
    size = (original / WEIGHTS_NAME).stat().st_size
    whole = sum(t.numel() * t.element_size() for t in in_memory.values())
    header = struct.unpack("<Q", (original / WEIGHTS_NAME).read_bytes()[:8])[0]
    assert saved_bytes > 0 and size == 8 + header + whole - saved_bytes


def hasattr_in(folder: Path, layer: str, buffer: str) -> bool:
    return getattr(quantized_layers(load(folder))[layer], buffer) is not None


def test_tensors_that_are_stored_once_are_held_once(original: Path) -> None:
    # Converted DiT checkpoints repeat their embedders in every block: a tenth of the float model.
    layers = quantized_layers(load(original))
    q, k = (layers[f"transformer_blocks.0.attn1.to_{letter}"].rotation_signs for letter in "qk")
    assert q is not None and k is not None and q.data_ptr() == k.data_ptr()


def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from tiny import tiny_dit, random_calibration\n"
        "from hqdit import QuantizationConfig, quantize, save\n"
        "model = tiny_dit(num_layers=1)\n"
        "save(quantize(model, QuantizationConfig(), random_calibration(model, 16)), sys.argv[1])\n"
    )
    save(small(QuantizationConfig()), tmp_path / "here")
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program, tmp_path / "there"], env=environment, check=True)
    assert file_hashes(tmp_path / "here") == file_hashes(tmp_path / "there")


def test_files_can_be_read_by_others(original: Path) -> None:
    for path in original.iterdir():
        assert path.stat().st_mode & 0o444 == 0o444


# --- loading


def test_load(original: Path) -> None:
    model = load(original)
    again = load(str(original))
    assert not model.training
    assert state_hash(model) == state_hash(again)
    assert torch.equal(predicted(model), predicted(again))


def test_loaded_attention_quantizes_its_input_once(originals: dict[str, Path]) -> None:
    model: Any = load(originals["groups"])  # the other has low-rank branches, which read the input by themselves
    assert all(block.attn1.to_q.shared_input is not None for block in model.transformer_blocks)


def test_load_in_another_dtype(original: Path) -> None:
    plain, model = load(original), load(original, dtype=torch.bfloat16)
    for name, tensor in plain.state_dict().items():
        found = model.state_dict()[name]
        is_scale = name.endswith(("_scale", "qweight", "signs", "index"))
        assert found.dtype == (tensor.dtype if is_scale else torch.bfloat16)
        assert torch.equal(found, tensor.to(found.dtype))
    fields = inputs_of(plain)
    output = predicted(model, **{**fields, "latents": fields["latents"].bfloat16()})
    assert output.dtype == torch.bfloat16 and bool(torch.isfinite(output).all())


def test_load_a_float_model(tmp_path: Path) -> None:
    tiny_dit().to(torch.float16).save_pretrained(tmp_path / "half")
    model: Any = load(tmp_path / "half")
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    assert not quantized_layers(model)


def test_float_models_are_saved_in_their_own_dtype(tmp_path: Path) -> None:
    tiny_dit().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    save(load(tmp_path / "source"), tmp_path / "out")
    before, after = stored(tmp_path / "source"), stored(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert state_hash(load(tmp_path / "out")) == state_hash(load(tmp_path / "source"))


# --- damaged tensors


def every_tensor(folder: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, a fresh dictionary of all tensors) for each tensor of the file."""
    tensors = stored(folder)
    for name in sorted(tensors):
        yield name, dict(tensors)


def test_deleted_tensors(folder: Path) -> None:
    shared = set(description(folder)["shared_tensors"].values())
    for name, tensors in every_tensor(folder):
        del tensors[name]
        rewrite(folder, tensors)
        refused(folder, str(folder), *([name] if name in shared else ["1 missing", "0 unexpected"]))


def test_renamed_tensors(folder: Path) -> None:
    shared = set(description(folder)["shared_tensors"].values())
    for name, tensors in every_tensor(folder):
        tensors[name + "_"] = tensors.pop(name)
        rewrite(folder, tensors)
        refused(folder, str(folder), *([name] if name in shared else ["1 missing", "1 unexpected"]))


def test_additional_tensors(folder: Path) -> None:
    rewrite(folder, {**stored(folder), "transformer_blocks.0.ff.net.2.weight": torch.zeros(72, 288)})
    refused(folder, str(folder), "0 missing", "1 unexpected")


@pytest.mark.parametrize("change", ["longer", "shorter", "flat", "transposed"])
def test_resized_tensors(folder: Path, change: str) -> None:
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "longer": lambda t: torch.cat([t, t[:1]]),
        "shorter": lambda t: t[:-1],
        "flat": lambda t: t.reshape(-1, 1) if t.ndim == 1 else t.flatten(),
        "transposed": lambda t: t.transpose(0, -1) if t.shape[0] != t.shape[-1] else t[:, :-1],
    }
    for name, tensors in every_tensor(folder):
        if tensors[name].ndim == 1 and change == "transposed":
            continue
        tensors[name] = changes[change](tensors[name])
        rewrite(folder, tensors)
        refused(folder, str(folder), "of another shape")


def test_retyped_tensors(folder: Path) -> None:
    layers = description(folder)["layers"]
    for name, tensors in every_tensor(folder):
        owner, _, last = name.rpartition(".")
        is_exact = owner in layers and last != "bias"
        original = tensors[name]
        kinds = {torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn} - {original.dtype}
        if is_exact:
            kinds |= {torch.float64, torch.float16, torch.bfloat16, torch.uint8} - {original.dtype}
        for dtype in kinds:
            tensors[name] = original.to(dtype)
            rewrite(folder, tensors)
            refused(folder, str(folder), name, str(dtype))


def test_kept_tensors_may_be_narrower(folder: Path) -> None:
    tensors = stored(folder)
    narrow = {name: t.bfloat16() if name.startswith("proj_out") else t for name, t in tensors.items()}
    rewrite(folder, narrow)
    model: Any = load(folder)
    assert torch.equal(model.state_dict()["proj_out_1.weight"], narrow["proj_out_1.weight"].float())
    assert model.quantization_record.dtypes["proj_out_1.weight"] == torch.bfloat16


def test_non_finite_tensors(folder: Path) -> None:
    for name, tensors in every_tensor(folder):
        if tensors[name].is_floating_point():
            for bad in (torch.nan, torch.inf):
                tensors[name] = tensors[name].clone()
                tensors[name].view(-1)[-1] = bad
                rewrite(folder, tensors)
                refused(folder, str(folder), repr(name))


def test_scales_that_are_not_positive(folder: Path) -> None:
    checked = 0
    for name, tensors in every_tensor(folder):
        if name.endswith("_scale"):
            for bad in (0.0, -0.0, -1e-3):
                tensors[name] = tensors[name].clone()
                tensors[name].view(-1)[0] = bad
                rewrite(folder, tensors)
                refused(folder, str(folder), "1 scales" if name not in shared_names(folder) else "scales")
                checked += 1
    assert checked >= 3 * 8


def shared_names(folder: Path) -> set[str]:
    return set(description(folder)["shared_tensors"].values())


def test_format_index_out_of_range(originals: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(originals["channels"], tmp_path / "model")
    for name, tensors in every_tensor(folder):
        if name.endswith("format_index"):
            for bad in (3, 255):
                tensors[name] = tensors[name].clone()
                tensors[name][-1] = bad
                rewrite(folder, tensors)
                refused(folder, str(folder), name, str(bad), "below 3")


def test_codes_that_stand_for_no_number(originals: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(originals["groups"], tmp_path / "model")  # e4m3: 0x7f and 0xff are NaN
    for name, tensors in every_tensor(folder):
        if name.endswith("qweight"):
            for bad in (0x7F, 0xFF):
                tensors[name] = tensors[name].clone()
                tensors[name][-1, -1] = bad
                rewrite(folder, tensors)
                refused(folder, str(folder), name, "e4m3")
                tensors[name][-1, -1] = bad - 1  # the largest number
            rewrite(folder, tensors)
            load(folder)


def test_codes_of_six_bits(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save(small(QuantizationConfig(gptq=False, weights="int6")), folder)
    name = "transformer_blocks.0.ff.net.2.qweight"
    tensors = stored(folder)
    tensors[name][0, 0] = 64
    rewrite(folder, tensors)
    refused(folder, str(folder), name, "int6")


def test_damaged_files(folder: Path) -> None:
    weights = folder / WEIGHTS_NAME
    content = weights.read_bytes()
    for length in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        weights.write_bytes(content[:length])
        refused(folder, str(weights))
    weights.unlink()
    refused(folder, str(folder), WEIGHTS_NAME)


# --- damaged descriptions


def describe(folder: Path, **changes: Any) -> None:
    edit_json(folder / "config.json", quantization_config={**description(folder), **changes})


@pytest.mark.parametrize("method", ["bitsandbytes", "HQDIT", None, 7])
def test_other_methods(folder: Path, method: object) -> None:
    describe(folder, quant_method=method)
    refused(folder, str(folder / "config.json"), repr(method), "'hqdit'")


@pytest.mark.parametrize("value", [None, [], "hqdit", 7, {}], ids=str)
def test_description_that_is_no_object(folder: Path, value: object) -> None:
    edit_json(folder / "config.json", quantization_config=value)
    refused(folder, str(folder / "config.json"))


@pytest.mark.parametrize("version", [2, 0, -1, "1", None, 1.5, [1]], ids=repr)
def test_other_format_versions(folder: Path, version: object) -> None:
    describe(folder, format_version=version)
    refused(folder, str(folder / "config.json"), repr(version), "upgrade hqdit")


def test_unknown_and_missing_keys(folder: Path) -> None:
    whole = description(folder)
    describe(folder, compression="zip")
    refused(folder, str(folder / "config.json"), "'compression'")
    for key in whole:
        edit_json(folder / "config.json", quantization_config={k: v for k, v in whole.items() if k != key})
        refused(folder, str(folder / "config.json"))


def test_shared_tensors_that_lie(folder: Path) -> None:
    shared = description(folder)["shared_tensors"]
    alias, name = next(iter(shared.items()))
    others = {
        "to nowhere": {**shared, alias: "nowhere"},
        "of a stored tensor": {**shared, name: alias},
        "of a stored tensor itself": {**shared, name: name},
        "of another shape": {**shared, alias: "proj_out_2.bias"},
        "unknown": {**shared, "unknown": name},
        "missing": {k: v for k, v in shared.items() if k != alias},
        "none": {},
        "no name": {**shared, alias: None},
        "a list": {**shared, alias: [name]},
    }
    for found in others.values():
        describe(folder, shared_tensors=found)
        refused(folder, str(folder))


@pytest.mark.parametrize(
    "name", ["transformer_blocks.0", "transformer_blocks.9.ff.net.2", "norm_out", "", "pos_embed.proj"]
)
def test_layers_that_are_none(folder: Path, name: str) -> None:
    layers = description(folder)["layers"]
    describe(folder, layers={**layers, name: layers["transformer_blocks.0.ff.net.2"]})
    refused(folder, str(folder / "config.json"), repr(name))


def test_layers_that_were_not_quantized(folder: Path) -> None:
    layers = description(folder)["layers"]
    describe(folder, layers={**layers, "proj_out_1": layers["transformer_blocks.0.norm1.linear"]})
    refused(folder, str(folder / "config.json"), "proj_out_1", "72 -> 144", "72 -> 432")
    removed = dict(layers)
    del removed["transformer_blocks.0.ff.net.2"]
    describe(folder, layers=removed)
    refused(folder, str(folder), "missing", "unexpected")


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*at, key))


def test_every_value_replaced_by_another_type(folder: Path) -> None:
    """Either refused with a complete message, or (free facts, spare spellings) the very same model."""
    whole = description(folder)
    one = "transformer_blocks.0.attn1.to_k"
    focus = {**whole, "layers": {one: whole["layers"][one]}}
    expected = state_hash(load(folder))
    structural = {
        "in_features",
        "out_features",
        "formats",
        "format",
        "granularity",
        "kind",
        "block",
        "factors",
        "width",
    }
    count = 0
    for path in paths_of(focus):
        if not path:
            continue
        for wrong in (None, "x", -1, 1.5, 12.0, [], {}, [[]], 10**30, True):
            changed = copy.deepcopy(whole)
            target = changed
            for key in path[:-1]:
                target = target[key]
            if type(target[path[-1]]) is type(wrong):
                continue
            target[path[-1]] = wrong
            edit_json(folder / "config.json", quantization_config=changed)
            try:
                model = load(folder)
            except CheckpointError as error:
                require_complete(error)
            else:
                assert state_hash(model) == expected
                assert not (path[0] == "layers" and path[-1] in structural), path
            count += 1
    assert count > 300


# --- where it may be written


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return save_pipeline(tmp_path / "pipeline", latent_dit(**SMALL), ddim(steps_offset=1), tiny_vae())


@pytest.mark.parametrize("how", ["path", "text", "folder"])
def test_pipeline_is_mirrored(pipeline: Path, tmp_path: Path, how: str) -> None:
    before = file_hashes(pipeline)
    source: Any = {"path": pipeline, "text": str(pipeline), "folder": find_model(pipeline)}[how]
    model = quantize(load(pipeline), QuantizationConfig.preset("minmax"))
    save(model, tmp_path / "out", source)
    assert file_hashes(pipeline) == before
    after = file_hashes(tmp_path / "out")
    assert after.keys() == before.keys() | {MANIFEST_NAME}
    assert {name for name in before if before[name] != after[name]} == {
        "transformer/config.json",
        f"transformer/{WEIGHTS_NAME}",
    }
    found = find_model(tmp_path / "out")
    assert found.is_pipeline and found.is_quantized
    assert load_scheduler(found).config.steps_offset == 1
    assert state_hash(load(tmp_path / "out")) == state_hash(model)


def test_shards_and_other_files_of_the_transformer_are_not_copied(tmp_path: Path) -> None:
    source = tmp_path / "source"
    latent_dit(**SMALL).save_pretrained(source / "transformer", max_shard_size="100KB")
    (source / "transformer" / "notes.txt").touch()
    (source / "model_index.json").write_text("{}")
    save(quantize(load(source), QuantizationConfig.preset("minmax")), tmp_path / "out", source)
    assert {path.name for path in (tmp_path / "out" / "transformer").iterdir()} == {"config.json", WEIGHTS_NAME}


def test_links_in_a_pipeline_are_followed(pipeline: Path, tmp_path: Path) -> None:
    # The hub's cache keeps links to blobs.
    (tmp_path / "blob").write_bytes(b"blob")
    (pipeline / "linked.json").symlink_to(tmp_path / "blob")
    save(quantize(load(pipeline), QuantizationConfig.preset("minmax")), tmp_path / "out", pipeline)
    assert not (tmp_path / "out" / "linked.json").is_symlink()
    assert (tmp_path / "out" / "linked.json").read_bytes() == b"blob"


def test_bare_transformer_stays_bare(tmp_path: Path) -> None:
    tiny_dit(**SMALL).save_pretrained(tmp_path / "source")
    model = quantize(load(tmp_path / "source"), QuantizationConfig.preset("minmax"))
    save(model, tmp_path / "with", tmp_path / "source")
    save(model, tmp_path / "without")
    assert file_hashes(tmp_path / "with") == file_hashes(tmp_path / "without")
    assert not find_model(tmp_path / "with").is_pipeline


@pytest.mark.parametrize("place", ["itself", "inside", "around", "transformer"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_source_is_never_written_to(pipeline: Path, place: str, overwrite: bool) -> None:
    before = file_hashes(pipeline.parent)
    out = {
        "itself": pipeline,
        "inside": pipeline / "new" / "out",
        "around": pipeline.parent,
        "transformer": pipeline / "transformer",
    }[place]
    model = quantize(load(pipeline), QuantizationConfig.preset("minmax"))
    with pytest.raises(UsageError) as info:
        save(model, out, pipeline, overwrite)
    require_complete(info.value, "--out", str(out))
    assert file_hashes(pipeline.parent) == before


def test_existing_output(original: Path, tmp_path: Path) -> None:
    save(load(original), tmp_path / "out")
    before = file_hashes(tmp_path / "out")
    with pytest.raises(UsageError) as info:
        save(small(QuantizationConfig.preset("minmax")), tmp_path / "out")
    require_complete(info.value, "--out", str(tmp_path / "out"), "--overwrite")
    assert file_hashes(tmp_path / "out") == before
    save(small(QuantizationConfig.preset("minmax")), tmp_path / "out", overwrite=True)
    after = file_hashes(tmp_path / "out")
    assert after.keys() == before.keys() and after != before


@pytest.mark.parametrize("at", ["weights", "half the weights", "config", "copy"])
@pytest.mark.parametrize("existed", [False, True])
def test_failure_in_the_middle(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, existed: bool
) -> None:
    model = quantize(load(pipeline), QuantizationConfig.preset("minmax"))
    out = tmp_path / "results" / "out"
    if existed:
        save(model, out, pipeline)
    before = file_hashes(tmp_path)

    def broken(*args: Any, **_: Any) -> None:
        if at == "half the weights":
            Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    if at == "config":
        monkeypatch.setattr(Path, "write_text", broken)
    elif at == "copy":
        monkeypatch.setattr(shutil, "copyfile", broken)
    else:
        monkeypatch.setattr(weights, "save_file", broken)
    with pytest.raises((OSError, HQDiTError)):
        save(model, out, pipeline, overwrite=existed)
    monkeypatch.undo()
    assert file_hashes(tmp_path) == before
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(TEMPORARY_PREFIX)]
    assert (tmp_path / "results").exists() == existed


def test_a_sixteen_entry_table_survives(tmp_path: Path) -> None:
    table = "table:-100,-70,-48,-32,-20,-11,-5,-1,1,5,11,20,32,48,70,100"
    model = small(QuantizationConfig(gptq=False, weights=table, weight_granularity="group", group_size=36))
    save(model, tmp_path / "out")
    spec = description(tmp_path / "out")["layers"]["transformer_blocks.0.ff.net.2"]
    assert spec["weight"] == {
        "formats": [[-100, -70, -48, -32, -20, -11, -5, -1, 1, 5, 11, 20, 32, 48, 70, 100]],
        "granularity": "group",
        "group_size": 36,
    }
    assert torch.equal(predicted(load(tmp_path / "out")), predicted(model))
