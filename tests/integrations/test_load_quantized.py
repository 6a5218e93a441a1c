"""`from_pretrained` of quantized checkpoints: exact, each tensor once, and as strict as `hqdit.load`."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from small_models import DIT, DTYPE, SMALL_MODELS, SmallModel
from tiny import calibration, predicted, random_calibration, require_complete, tiny_dit

import hqdit
from hqdit.errors import CheckpointError, UsageError
from hqdit.integrations.diffusers_config import HQDiTConfig
from hqdit.kernels.linear import packed_level_tables
from hqdit.models.weights import INDEX_NAME, WEIGHTS_NAME
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig

each_model = pytest.mark.parametrize("small", SMALL_MODELS, ids=lambda small: small.name)
#: Between them every kind of tensor that a quantized layer can have.
CHANNELS = QuantizationConfig(
    gptq=False, format_granularity="channel", activation_granularity="channel-token", smoothing=0.5, low_rank=3
)
GROUPS = QuantizationConfig(
    gptq=False, weights="e4m3", weight_granularity="group", group_size=12, activation_granularity="tensor"
)
PAPER = QuantizationConfig(fold_value_rotation=True)


def quantized(config: QuantizationConfig) -> Any:
    """One block keeps loading fast."""
    return hqdit.quantize(tiny_dit(num_layers=1), config, random_calibration(tiny_dit(num_layers=1), 16))


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What `hqdit.save` writes; no test changes it."""
    folder = tmp_path_factory.mktemp("originals")
    for name, config in (("channels", CHANNELS), ("groups", GROUPS), ("paper", PAPER)):
        hqdit.save(quantized(config), folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(params=["channels", "groups", "paper"])
def original(request: pytest.FixtureRequest, originals: dict[str, Path]) -> Path:
    return originals[request.param]


def from_pretrained(folder: Path, **kwargs: Any) -> Any:
    return DiTTransformer2DModel.from_pretrained(folder, **kwargs)


def require_same_state(found: Any, expected: Any) -> None:
    one, other = found.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


def data_bytes(folder: Path) -> int:
    """Bytes of the weight files without their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            total += path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")
    return total


def footprint(model: Any) -> int:
    """`get_memory_footprint` without what no file holds: tables that a model computes from its configuration."""
    kept = set(model.state_dict())
    outside = {name: buffer for name, buffer in model.named_buffers() if name not in kept}
    return int(model.get_memory_footprint()) - sum(b.numel() * b.element_size() for b in outside.values())


# Exact, by both ways of saving and of loading


def test_plain_from_pretrained_is_what_load_gives(original: Path) -> None:
    model, info = from_pretrained(original, output_loading_info=True)
    assert not any(info.values())
    expected: Any = hqdit.load(original)
    require_same_state(model, expected)
    assert torch.equal(DIT.output(model), DIT.output(expected))
    for name in ("config", "calibration", "rotation_error", "layers", "parameters"):
        assert getattr(model.quantization_record, name) == getattr(expected.quantization_record, name)


def test_the_model_says_that_it_is_quantized(original: Path) -> None:
    for model in (from_pretrained(original), hqdit.load(original)):
        found: Any = model
        stored = json.loads((original / "config.json").read_text())["quantization_config"]
        assert found.config.quantization_config.to_dict() == stored
        assert found.is_quantized and found.quantization_method.value == "hqdit"
        assert found.hf_quantizer.pre_quantized


@each_model
@pytest.mark.parametrize("shard", [None, "30KB"])
def test_save_pretrained_round_trips(small: SmallModel, shard: str | None, tmp_path: Path) -> None:
    model: Any = hqdit.quantize(small.build(), QuantizationConfig(gptq=False))
    sizes = {} if shard is None else {"max_shard_size": shard}
    model.save_pretrained(tmp_path / "first", **sizes)
    assert (tmp_path / "first" / INDEX_NAME).exists() == (shard is not None)
    again = small.model_class.from_pretrained(tmp_path / "first")
    require_same_state(again, model)
    assert torch.equal(small.output(again), small.output(model))
    again.save_pretrained(tmp_path / "second", **sizes)
    for path in (tmp_path / "first").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()


@pytest.mark.parametrize("shard", ["30KB", "1GB"])
def test_load_reads_what_save_pretrained_writes(original: Path, tmp_path: Path, shard: str) -> None:
    model = from_pretrained(original)
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    again: Any = hqdit.load(tmp_path / "saved")
    require_same_state(again, model)
    hqdit.save(again, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS_NAME).read_bytes() == (original / WEIGHTS_NAME).read_bytes()


def test_saving_again_gives_the_same_config(original: Path, tmp_path: Path) -> None:
    configs = []
    for name in ("one", "two"):
        from_pretrained(original).save_pretrained(tmp_path / name)
        configs.append(json.loads((tmp_path / name / "config.json").read_text()))
    assert configs[0] == configs[1]
    stored = json.loads((original / "config.json").read_text())["quantization_config"]
    assert configs[0]["quantization_config"] == stored


def test_a_calibrated_model_goes_the_same_way(tmp_path: Path) -> None:
    model: Any = hqdit.quantize(tiny_dit(), None, calibration())
    assert model.quantization_record.config == QuantizationConfig()
    model.save_pretrained(tmp_path)
    require_same_state(from_pretrained(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_keep_their_dtype(original: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    model = from_pretrained(original, **{DTYPE: dtype})
    require_same_state(model, hqdit.load(original, dtype))
    assert model.dtype == dtype  # the first parameter's; scales are buffers
    model.save_pretrained(tmp_path)
    require_same_state(from_pretrained(tmp_path, **{DTYPE: dtype}), model)


def test_a_config_beside_a_quantized_checkpoint_is_not_used(original: Path) -> None:
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = from_pretrained(original, quantization_config=HQDiTConfig(weights="int8"))
    require_same_state(model, hqdit.load(original))


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_device_maps(original: Path, device_map: Any) -> None:
    model = from_pretrained(original, device_map=device_map)
    assert {str(device) for device in model.hf_device_map.values()} == {"cpu"}
    require_same_state(model, hqdit.load(original))


# Memory


@each_model
def test_the_footprint_is_the_files(small: SmallModel, tmp_path: Path) -> None:
    model: Any = hqdit.quantize(small.build(), QuantizationConfig(gptq=False))
    model.save_pretrained(tmp_path / "pretrained")
    hqdit.save(model, tmp_path / "saved")
    expected = data_bytes(tmp_path / "saved")
    assert expected == data_bytes(tmp_path / "pretrained")
    for again in (model, *(small.model_class.from_pretrained(tmp_path / name) for name in ("pretrained", "saved"))):
        assert footprint(again) == expected
    assert footprint(hqdit.load(tmp_path / "saved")) == expected
    assert expected < 0.8 * footprint(small.build())


@each_model
def test_every_tensor_moves(small: SmallModel, tmp_path: Path) -> None:
    model = small.model_class.from_pretrained(small.save(tmp_path), quantization_config=HQDiTConfig())
    registered = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    # Tables that all layers of one format share, for the kernels of the CPU.
    registered |= {id(packed_level_tables(layer.spec.weight.formats)) for layer in quantized_layers(model).values()}
    for module in model.modules():
        loose = [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
        assert all(id(tensor) in registered for tensor in loose), type(module)
    model.to("meta")
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


# What diffusers refuses of a quantized model, and what it would let pass


@pytest.mark.parametrize("how", ["from_pretrained", "load", "quantize"])
def test_other_dtypes_are_refused(originals: dict[str, Path], how: str) -> None:
    model: Any = {
        "from_pretrained": lambda: from_pretrained(originals["groups"]),
        "load": lambda: hqdit.load(originals["groups"]),
        "quantize": lambda: quantized(QuantizationConfig(gptq=False)),
    }[how]()
    for change in (lambda: model.to(torch.float16), model.half, model.float):
        with pytest.raises(ValueError, match="quantized"):
            change()
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        from_pretrained(originals["groups"], low_cpu_mem_usage=False)


def test_layerwise_casting_is_refused(original: Path) -> None:
    from diffusers.hooks import apply_layerwise_casting

    model = from_pretrained(original)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError) as caught:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    require_complete(caught.value, "enable_layerwise_casting")
    with pytest.raises(UsageError) as caught:
        apply_layerwise_casting(model, torch.float8_e4m3fn, torch.float32)
    require_complete(caught.value, "float8_e4m3fn", "transformer_blocks.0")
    for name, tensor in model.state_dict().items():
        if name.rpartition(".")[0] in quantized_layers(model):
            assert torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype


def test_pickles_are_refused(original: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        from_pretrained(original).save_pretrained(tmp_path, safe_serialization=False)
    require_complete(caught.value, "safe_serialization=False")


def test_tensors_that_were_equal_and_are_not_any_more(original: Path, tmp_path: Path) -> None:
    model = from_pretrained(original)
    alias, stored = next(iter(model.quantization_record.shared.items()))
    owner, _, leaf = alias.rpartition(".")
    changed = model.get_submodule(owner)
    other = ~getattr(changed, leaf).detach() if leaf == "rotation_signs" else getattr(changed, leaf).detach() + 1
    setattr(changed, leaf, other if leaf in changed._buffers else torch.nn.Parameter(other))
    with pytest.raises(UsageError) as caught:
        model.save_pretrained(tmp_path)
    require_complete(caught.value, alias, stored)


# Broken checkpoints: the errors of `hqdit.load`, for every tensor


def broken(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object]) -> Path:
    tensors = load_file(source / WEIGHTS_NAME)
    config = json.loads((source / "config.json").read_text())
    change(tensors, config["quantization_config"])
    target.mkdir()
    save_file(tensors, target / WEIGHTS_NAME)
    (target / "config.json").write_text(json.dumps(config))
    return target


def require_refused(folder: Path, *parts: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        from_pretrained(folder)
    require_complete(caught.value, *parts)


LAYER = "transformer_blocks.0.attn1.to_q"


def test_every_missing_tensor(original: Path, tmp_path: Path) -> None:
    for number, name in enumerate(load_file(original / WEIGHTS_NAME)):
        require_refused(broken(original, tmp_path / str(number), lambda t, _: t.pop(name)), "missing")  # noqa: B023


def test_every_tensor_of_another_dtype(original: Path, tmp_path: Path) -> None:
    for number, (name, tensor) in enumerate(load_file(original / WEIGHTS_NAME).items()):
        other = tensor.to(torch.float64 if tensor.dtype == torch.uint8 else torch.int32)
        folder = broken(original, tmp_path / str(number), lambda t, _: t.update({name: other}))  # noqa: B023
        require_refused(folder, name, str(other.dtype))


def test_every_tensor_of_another_shape(original: Path, tmp_path: Path) -> None:
    for number, (name, tensor) in enumerate(load_file(original / WEIGHTS_NAME).items()):
        longer = torch.cat([tensor, tensor])
        folder = broken(original, tmp_path / str(number), lambda t, _: t.update({name: longer}))  # noqa: B023
        require_refused(folder, name, str(tuple(longer.shape)))


def test_every_float_tensor_with_a_nan(original: Path, tmp_path: Path) -> None:
    for number, (name, tensor) in enumerate(load_file(original / WEIGHTS_NAME).items()):
        if tensor.is_floating_point():
            folder = broken(original, tmp_path / str(number), lambda t, _: t[name].flatten()[-1:].fill_(torch.nan))  # noqa: B023
            require_refused(folder, name)


def test_scales_that_are_not_positive(original: Path, tmp_path: Path) -> None:
    require_refused(
        broken(original, tmp_path / "x", lambda t, _: t[f"{LAYER}.weight_scale"].mul_(-1)), f"{LAYER}.weight_scale"
    )


def test_unknown_tensors(original: Path, tmp_path: Path) -> None:
    require_refused(broken(original, tmp_path / "x", lambda t, _: t.update(other=torch.zeros(1))), "other")


@pytest.mark.parametrize(
    ("alias", "stored"),
    [("other", f"{LAYER}.qweight"), (f"{LAYER}.qweight", "other"), (f"{LAYER}.qweight", "proj_out_1.weight")],
)
def test_aliases_that_fit_nothing(original: Path, tmp_path: Path, alias: str, stored: str) -> None:
    def change(tensors: dict[str, torch.Tensor], description: dict[str, Any]) -> None:
        tensors.pop(alias, None)
        description["shared_tensors"][alias] = stored

    require_refused(broken(original, tmp_path / "x", change), alias, "shared_tensors")


def test_an_alias_that_is_stored_too(original: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor], description: dict[str, Any]) -> None:
        alias, stored = next(iter(description["shared_tensors"].items()))
        tensors[alias] = tensors[stored].clone()

    require_refused(broken(original, tmp_path / "x", change), "shared_tensors")


@pytest.mark.parametrize("key", ["format_version", "layers", "config", "hqdit_version"])
def test_descriptions_that_cannot_be_read(original: Path, tmp_path: Path, key: str) -> None:
    require_refused(broken(original, tmp_path / "less", lambda _, d: d.pop(key)))
    require_refused(broken(original, tmp_path / "more", lambda _, d: d.update(other=1)), "other")


def test_layers_that_the_model_does_not_have(original: Path, tmp_path: Path) -> None:
    def rename(_: object, description: dict[str, Any]) -> None:
        description["layers"]["nowhere"] = description["layers"].pop(LAYER)

    require_refused(broken(original, tmp_path / "x", rename), "nowhere")


def test_time_frequencies_of_a_converted_model_that_diffusers_loaded_alone(tmp_path: Path) -> None:
    model = tiny_dit()
    model.register_to_config(_downscale_freq_shift=0)
    hqdit.save(model, tmp_path / "float")
    found = hqdit.quantize(from_pretrained(tmp_path / "float"), QuantizationConfig(gptq=False))
    expected = hqdit.quantize(hqdit.load(tmp_path / "float"), QuantizationConfig(gptq=False))
    assert torch.equal(predicted(found), predicted(expected))


@pytest.mark.parametrize("is_quantized", [False, True])
def test_time_frequencies_of_converted_models(tmp_path: Path, is_quantized: bool) -> None:
    # diffusers passes over the key; without it the model would embed its time steps in another way.
    model = tiny_dit()
    model.register_to_config(_downscale_freq_shift=0)
    hqdit.save(model, tmp_path / "float")
    exact = hqdit.load(tmp_path / "float")
    assert not torch.equal(predicted(exact), predicted(tiny_dit()))
    expected = hqdit.quantize(exact, QuantizationConfig(gptq=False))
    hqdit.save(expected, tmp_path / "quantized")
    if is_quantized:
        found = from_pretrained(tmp_path / "quantized")
    else:
        found = from_pretrained(tmp_path / "float", quantization_config=HQDiTConfig())
    assert torch.equal(predicted(found), predicted(expected))
    found.save_pretrained(tmp_path / "again")
    assert torch.equal(predicted(from_pretrained(tmp_path / "again")), predicted(expected))
