"""Quantizing while diffusers loads: the same bits as `hqdit.quantize`, and every trap on the way."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel, PipelineQuantizationConfig
from safetensors.torch import load_file, save_file
from small_models import DIT, DTYPE, SMALL_MODELS, WAN, SmallModel
from tiny import edit_json, latent_dit, require_complete, tiny_dit, tiny_vae

import hqdit
from hqdit.errors import CheckpointError, UsageError
from hqdit.integrations.diffusers_config import HQDiTConfig
from hqdit.integrations.quantize_on_load import FloatWeights
from hqdit.models.weights import INDEX_NAME, WEIGHTS_NAME
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.input_group import InputGroup
from hqdit.pipeline.plan import plan_quantization

each_model = pytest.mark.parametrize("small", SMALL_MODELS, ids=lambda small: small.name)
DATA_FREE = QuantizationConfig(gptq=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float DiT that no test changes."""
    return DIT.save(tmp_path_factory.mktemp("float"))


def on_load(folder: Path, dtype: torch.dtype | None = None, **settings: Any) -> Any:
    extra = {} if dtype is None else {DTYPE: dtype}
    return DiTTransformer2DModel.from_pretrained(folder, quantization_config=HQDiTConfig(**settings), **extra)


def require_same_state(found: Any, expected: Any) -> None:
    one, other = found.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


# The same bits


@each_model
@pytest.mark.parametrize("shard", [None, "60KB"])
def test_it_gives_the_bits_of_quantize(small: SmallModel, shard: str | None, tmp_path: Path) -> None:
    small.save(tmp_path, **({} if shard is None else {"max_shard_size": shard}))
    assert (tmp_path / INDEX_NAME).exists() == (shard is not None)
    found = small.model_class.from_pretrained(tmp_path, quantization_config=HQDiTConfig())
    expected: Any = hqdit.quantize(small.build(), DATA_FREE)
    assert len(quantized_layers(found)) == small.layers
    require_same_state(found, expected)
    assert torch.equal(small.output(found), small.output(expected))
    assert found.quantization_record.layers == expected.quantization_record.layers
    assert found.quantization_record.parameters == expected.quantization_record.parameters
    assert not found.training and all(not parameter.is_meta for parameter in found.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"weights": "int4", "rotation": "none"},
        {"weight_granularity": "group", "activation_granularity": "group", "group_size": 12},
        {"format_granularity": "channel", "low_rank": 3},
        {"fold_value_rotation": True, "exclude": ["*.norm1.linear"], "seed": 3},
        {"include": ["*.0.attn1.to_q"]},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_kind_of_request(folder: Path, settings: dict[str, Any]) -> None:
    request = QuantizationConfig.from_json({"gptq": False, **settings})
    require_same_state(on_load(folder, **settings), hqdit.quantize(tiny_dit(), request))


def test_one_config_serves_several_models(folder: Path) -> None:
    config = HQDiTConfig()
    models = [DiTTransformer2DModel.from_pretrained(folder, quantization_config=config) for _ in range(2)]
    assert config.description is None
    first, second = (model.config.quantization_config for model in models)
    assert first is not second and first.to_dict() == second.to_dict()


# Dtypes: weights are quantized from the file's numbers, the rest has what diffusers was asked for


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_are_quantized_as_stored_not_as_cast(folder: Path, dtype: torch.dtype) -> None:
    narrow, exact = on_load(folder, dtype), on_load(folder)
    for name, layer in quantized_layers(exact).items():
        other = quantized_layers(narrow)[name]
        for key, buffer in layer.named_buffers():
            assert torch.equal(buffer, other.get_buffer(key)) and buffer.dtype == other.get_buffer(key).dtype, (
                name,
                key,
            )
        assert other.bias.dtype == dtype
    assert narrow.dtype == dtype and narrow.proj_out_1.weight.dtype == dtype
    assert DIT.output(narrow, dtype).dtype == dtype


def test_narrow_files_are_quantized_from_their_numbers(tmp_path: Path) -> None:
    model = tiny_dit().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    require_same_state(on_load(tmp_path, torch.float32), hqdit.quantize(model.to(torch.float32), DATA_FREE))


def test_keep_dtype_is_the_load_dtype(folder: Path) -> None:
    assert on_load(folder, keep_dtype="bfloat16").dtype == torch.bfloat16
    assert on_load(folder, torch.bfloat16, keep_dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(UsageError) as caught:
        on_load(folder, torch.float16, keep_dtype="bfloat16")
    require_complete(caught.value, "keep_dtype", "bfloat16", "float16")


def test_modules_that_the_class_keeps_in_float32_stay_so(tmp_path: Path) -> None:
    config = HQDiTConfig()
    model = WAN.model_class.from_pretrained(WAN.save(tmp_path), quantization_config=config, **{DTYPE: torch.bfloat16})
    kept = set(WAN.model_class._keep_in_fp32_modules)
    found = {name: tensor.dtype for name, tensor in model.state_dict().items() if kept & set(name.split("."))}
    assert len(found) >= 6 and set(found.values()) == {torch.float32}
    assert model.condition_embedder.text_embedder.linear_1.weight.dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "quantized")
    again = WAN.model_class.from_pretrained(tmp_path / "quantized", **{DTYPE: torch.bfloat16})
    require_same_state(again, model)


def test_no_layer_inside_such_modules_is_quantized(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(DiTTransformer2DModel, "_keep_in_fp32_modules", ["ff"])
    model = on_load(folder, torch.bfloat16)
    assert model.transformer_blocks[0].ff.net[2].weight.dtype == torch.float32
    names = list(quantized_layers(model))
    assert names and not any(".ff." in name for name in names)
    require_same_state(on_load(folder), hqdit.quantize(tiny_dit(), DATA_FREE))
    assert plan_quantization(tiny_dit(), DATA_FREE).skipped["transformer_blocks.0.ff.net.2"].endswith("in float32")


# Memory: an input group is quantized as soon as it is complete


def test_groups_are_quantized_one_by_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a group is quantized no other float weight of a planned layer is there in float32."""
    seen = []
    plain = InputGroup.quantize

    def watching(self: InputGroup, record: Any) -> None:
        model, planned = self._model, {layer.planned.site.name for layer in self._layers}
        there = {
            name
            for name, module in model.named_modules()
            if type(module) is torch.nn.Linear and ".emb." not in name and "proj_out" not in name
            if not module.weight.is_meta
        }
        assert there == planned
        seen.append(planned)
        plain(self, record)

    monkeypatch.setattr(InputGroup, "quantize", watching)
    on_load(folder)
    assert len(seen) == 2 * 5 and sum(map(len, seen)) == DIT.layers


# What cannot work is an error, of which diffusers would only warn


def rewritten(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    tensors = load_file(source / WEIGHTS_NAME)
    change(tensors)
    target.mkdir()
    save_file(tensors, target / WEIGHTS_NAME)
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


WEIGHT = "transformer_blocks.1.attn1.to_k.weight"


@pytest.mark.parametrize("name", [WEIGHT, "transformer_blocks.0.ff.net.2.bias", "proj_out_1.weight"])
def test_missing_tensors(folder: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        on_load(rewritten(folder, tmp_path / "x", lambda tensors: tensors.pop(name)))
    require_complete(caught.value, name, "1 missing")


def test_unknown_tensors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        on_load(rewritten(folder, tmp_path / "x", lambda tensors: tensors.update(other=torch.zeros(1))))
    require_complete(caught.value, "other")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [WEIGHT, "proj_out_1.weight"])
def test_numbers_that_are_none(folder: Path, tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(CheckpointError) as caught:
        on_load(rewritten(folder, tmp_path / "x", lambda tensors: tensors[name][0].fill_(value)))
    require_complete(caught.value, name)


def test_weights_that_are_no_float_numbers(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        on_load(
            rewritten(folder, tmp_path / "x", lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(torch.int8)}))
        )
    require_complete(caught.value, WEIGHT, "int8")


def test_weights_past_the_quantizer(folder: Path) -> None:
    model = tiny_dit()
    with torch.device("meta"):
        empty = DiTTransformer2DModel.from_config(model.config)
    weights = FloatWeights(empty, DATA_FREE, [])
    with pytest.raises(CheckpointError) as caught:
        weights.require_complete()
    require_complete(caught.value, "tensors missing", "offload_state_dict")
    with pytest.raises(UsageError) as usage:
        DiTTransformer2DModel.from_pretrained(
            folder, quantization_config=HQDiTConfig(), device_map={"": "disk"}, offload_folder=str(folder)
        )
    require_complete(usage.value, "device_map", "disk")


def test_requests_that_do_not_fit_the_model(folder: Path) -> None:
    with pytest.raises(UsageError, match="--exclude"):
        on_load(folder, exclude=["nothing.like.this"])
    with pytest.raises(UsageError, match="--group-size"):
        on_load(folder, weight_granularity="group", group_size=20)
    with pytest.raises(UsageError, match="5"):
        on_load(folder, rotation="block:5")


def test_the_other_shape_is_an_error(folder: Path, tmp_path: Path) -> None:
    changed = rewritten(folder, tmp_path / "x", lambda tensors: None)
    edit_json(changed / "config.json", attention_head_dim=18)
    with pytest.raises((CheckpointError, ValueError), match="shape"):
        on_load(changed)


# Pipelines


def test_a_pipeline_config_maps_the_transformer(tmp_path: Path) -> None:
    model = latent_dit(num_embeds_ada_norm=1000)
    scheduler = DDIMScheduler(clip_sample=False)
    DiTPipeline(model, tiny_vae(), scheduler).save_pretrained(tmp_path / "float")
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": HQDiTConfig()})
    pipeline = DiTPipeline.from_pretrained(tmp_path / "float", quantization_config=mapping)
    require_same_state(pipeline.transformer, hqdit.quantize(latent_dit(num_embeds_ada_norm=1000), DATA_FREE))
    pipeline.save_pretrained(tmp_path / "quantized")
    again = DiTPipeline.from_pretrained(tmp_path / "quantized")
    first, second = (
        pipe(class_labels=[1, 2], generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np")
        for pipe in (pipeline, again)
    )
    assert (first.images == second.images).all() and first.images.shape == (2, 16, 16, 3)


def test_diffusers_still_calls_the_hooks_by_these_names() -> None:
    """The arguments that the quantizer relies on; a diffusers that renames them fails here first."""
    from diffusers.models import model_loading_utils, modeling_utils

    loading = inspect.getsource(model_loading_utils.load_model_dict_into_meta)
    assert "model, param, param_name, param_device, state_dict, unexpected_keys, dtype=dtype" in loading
    saving = inspect.getsource(modeling_utils.ModelMixin.save_pretrained)
    assert "get_state_dict_and_metadata" in saving
