"""What the adapter says of a DiT, against what really happens in its forward pass."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from tiny import (
    BLOCKS,
    CLASSES,
    WIDTH,
    calibration,
    inputs_of,
    latent_dit,
    predicted,
    random_calibration,
    require_complete,
    tiny_dit,
)
from torch import Tensor, nn

from hqdit.errors import CheckpointError
from hqdit.kernels.selection import use_backend
from hqdit.layers.linear import HQLinear
from hqdit.models import adapter as adapter_module
from hqdit.models.adapter import LinearSite, ModelAdapter, adapter_for, register_adapter
from hqdit.models.dit import DiTAdapter
from hqdit.models.dit_block import FusedDiTBlock
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize

ROLES = {
    "norm1.linear": ("modulation", "modulation"),
    "attn1.to_q": ("q", "qkv"),
    "attn1.to_k": ("k", "qkv"),
    "attn1.to_v": ("v", "qkv"),
    "attn1.to_out.0": ("attention-out", "out"),
    "ff.net.0.proj": ("fc1", "fc1"),
    "ff.net.2": ("fc2", "fc2"),
}


@pytest.fixture
def model() -> Any:
    return tiny_dit()


def inputs_in_order(model: nn.Module, fields: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """Name -> input of each named layer in one forward pass, in the order of the calls."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def hook(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            seen[name] = args[0].clone()

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    predicted(model, **fields)
    for handle in handles:
        handle.remove()
    return seen


def test_sites(model: Any) -> None:
    sites = adapter_for(model).sites(model)
    assert len(sites) == 7 * BLOCKS
    for position, site in enumerate(sites):
        block, within = divmod(position, 7)
        layer, (role, group) = list(ROLES.items())[within]
        assert site.name == f"transformer_blocks.{block}.{layer}"
        assert (site.role, site.block) == (role, block)
        assert site.input_group == f"transformer_blocks.{block}.{group}"
        assert site.is_modulation == (role == "modulation")
        is_output = role == "attention-out"
        assert site.head_dim == (36 if is_output else None)
        assert site.value_site == (f"transformer_blocks.{block}.attn1.to_v" if is_output else None)
        assert isinstance(model.get_submodule(site.name), nn.Linear)


def test_sites_are_in_the_order_of_the_forward_pass(model: Any) -> None:
    names = [site.name for site in adapter_for(model).sites(model)]
    assert list(inputs_in_order(model, inputs_of(model), names)) == names


def test_groups_share_one_input_and_stages_follow_each_other(model: Any) -> None:
    sites = adapter_for(model).sites(model)
    inputs = inputs_in_order(model, inputs_of(model), [site.name for site in sites])
    for site, other in zip(sites, sites[1:], strict=False):
        same = torch.equal(inputs[site.name], inputs[other.name])
        assert same == (site.input_group == other.input_group)
        if site.block == other.block:
            assert other.stage - site.stage == (0 if same else 1)


def test_every_linear_layer_is_a_site_or_kept(model: Any) -> None:
    adapter = adapter_for(model)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    sites, kept = {site.name for site in adapter.sites(model)}, adapter.kept_layers(model)
    assert sites | kept.keys() == linear
    assert not sites & kept.keys()
    for name, reason in kept.items():
        assert reason == (
            "outside the repeated blocks" if "proj_out" in name else "embedder or unknown layer inside a block"
        )
    assert {name for name in kept if "proj_out" in name} == {"proj_out_1", "proj_out_2"}
    assert sum(".emb." in name for name in kept) == 2 * BLOCKS


def test_modulation_input_is_what_the_layer_receives(model: Any) -> None:
    adapter, fields = adapter_for(model), inputs_of(model, 9)
    names = [f"transformer_blocks.{block}.norm1.linear" for block in range(BLOCKS)]
    received = inputs_in_order(model, fields, names)
    for block, name in enumerate(names):
        with torch.no_grad():
            found = adapter.modulation_input(model, block, fields["timesteps"], fields["classes"])
        assert found.shape == (9, WIDTH)
        assert torch.equal(found, received[name])
    assert not torch.equal(received[names[0]], received[names[1]])


def test_predict_noise() -> None:
    model = tiny_dit()
    fields = inputs_of(model)
    with torch.no_grad():
        assert torch.equal(adapter_for(model).predict_noise(model, **fields), predicted(model, **fields))


def test_predict_noise_drops_a_learned_variance() -> None:
    model = latent_dit()
    fields = inputs_of(model)
    raw = predicted(model, **fields)
    assert raw.shape == (6, 8, 8, 8)
    with torch.no_grad():
        noise = adapter_for(model).predict_noise(model, **fields)
    assert noise.shape == fields["latents"].shape
    assert torch.equal(noise, raw[:, :4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_predict_noise_keeps_the_latents_dtype(dtype: torch.dtype) -> None:
    model, fields = tiny_dit().to(dtype), inputs_of(tiny_dit())
    with torch.no_grad():
        noise = adapter_for(model).predict_noise(model, **fields)
    assert noise.dtype == torch.float32
    narrow = {**fields, "latents": fields["latents"].to(dtype)}
    assert torch.equal(noise, predicted(model, **narrow).float())


def test_geometry() -> None:
    model = latent_dit(sample_size=12)
    adapter = adapter_for(model)
    assert adapter.latent_shape(model) == (4, 12, 12)
    assert adapter.num_classes(model) == CLASSES
    assert adapter.null_class(model) == CLASSES


def test_null_class_needs_a_row_in_the_table() -> None:
    model = tiny_dit()
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.embedding_table = nn.Embedding(CLASSES, WIDTH)
    assert adapter_for(model).null_class(model) is None


def test_no_adapter() -> None:
    with pytest.raises(CheckpointError) as info:
        adapter_for(nn.Linear(2, 2))
    require_complete(info.value, "Linear", "repeated blocks")


def test_later_adapters_are_asked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(DiTAdapter):
        pass

    model = tiny_dit()
    monkeypatch.setattr(adapter_module, "_ADAPTERS", list(adapter_module._ADAPTERS))
    assert type(adapter_for(model)) is DiTAdapter
    register_adapter(Other())
    assert type(adapter_for(model)) is Other


def test_interface_is_complete() -> None:
    assert ModelAdapter.__abstractmethods__ <= {name for name in vars(DiTAdapter)}
    assert LinearSite("a", "q", 0, 1, "g") == LinearSite("a", "q", 0, 1, "g", None, None)


# --- q, k and v with one quantized input

CONFIGS = {
    "minmax": QuantizationConfig.preset("minmax"),
    "rotated": QuantizationConfig(gptq=False),
    "folded": QuantizationConfig(gptq=False, fold_value_rotation=True),
    "grouped": QuantizationConfig(
        gptq=False, weight_granularity="group", activation_granularity="group", group_size=12
    ),
    "static": QuantizationConfig(gptq=False, activation_granularity="tensor"),
    "static per channel": QuantizationConfig(gptq=False, activation_granularity="channel"),
    "smoothed": QuantizationConfig(gptq=False, rotation="none", smoothing=0.5),
    "smoothed and rotated": QuantizationConfig(gptq=False, fold_value_rotation=True, smoothing=0.5),
    "float32 arithmetic": QuantizationConfig(gptq=False, weights="e4m3", activations="e5m2"),
}


@pytest.fixture(params=CONFIGS, scope="module")
def shared(request: pytest.FixtureRequest) -> Any:
    """A quantized model whose attention shares its input."""
    config = CONFIGS[request.param]
    return quantize(tiny_dit(), config, calibration() if config.needs_calibration else None)


def shares(model: Any) -> list[bool]:
    """Whether the quantized ones among q, k and v of each block share their input, all of them or none."""
    found = []
    for block in model.transformer_blocks:
        layers = [block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]
        (shared,) = {layer.shared_input for layer in layers if isinstance(layer, HQLinear)}
        found.append(shared is not None)
    return found


def unfused(model: Any) -> Any:
    """A copy whose blocks run diffusers' own code, and whose layers quantize their inputs each by itself."""
    plain = copy.deepcopy(model)
    for block in plain.transformer_blocks:
        block.__class__ = BasicTransformerBlock
    for layer in plain.modules():
        if isinstance(layer, HQLinear):
            layer.shared_input = None
    return plain


def test_fused_blocks_give_the_same_bits_on_a_composed_backend(shared: Any) -> None:
    assert shares(shared) == [True] * BLOCKS
    assert {type(block) for block in shared.transformer_blocks} == {FusedDiTBlock}
    with use_backend("torch"):
        expected = predicted(unfused(shared))
        assert bool(torch.isfinite(expected).all())
        assert torch.equal(predicted(shared), expected)


def test_shared_input_is_quantized_once(shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    original = HQLinear.quantize_input

    def counted(self: HQLinear, *args: Any) -> Any:
        calls[self.spec.name.partition(".attn1.")[2] or "elsewhere"] += 1
        return original(self, *args)

    monkeypatch.setattr(HQLinear, "quantize_input", counted)
    predicted(shared)
    assert calls == {"to_q": BLOCKS, "to_out.0": BLOCKS, "elsewhere": 3 * BLOCKS}


def test_wrapped_layer_takes_diffusers_forward(shared: Any) -> None:
    # peft puts a module of its own in a layer's place; the fused forward would pass it by.
    class Wrapper(torch.nn.Module):
        def __init__(self, layer: torch.nn.Module) -> None:
            super().__init__()
            self.base_layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + 1.0

    plain, wrapped = unfused(shared), copy.deepcopy(shared)
    for model in (plain, wrapped):
        attention = model.transformer_blocks[0].attn1
        attention.to_out[0] = Wrapper(attention.to_out[0])
    with use_backend("torch"):
        assert torch.equal(predicted(wrapped), predicted(plain))
        assert not torch.equal(predicted(wrapped), predicted(shared))


def with_equal_embedders() -> Any:
    model: Any = tiny_dit()
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first)
    return model


def test_equal_embedders_are_held_and_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantize(with_equal_embedders(), CONFIGS["rotated"])
    names = set(quantize(tiny_dit(), CONFIGS["rotated"]).state_dict())
    embedder = model.transformer_blocks[0].norm1.emb
    assert all(block.norm1.emb is embedder for block in model.transformer_blocks)
    assert set(model.state_dict()) == names
    calls: Counter[int] = Counter()
    original = type(embedder).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[id(self)] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(embedder), "forward", counted)
    output = predicted(model)
    assert calls == {id(embedder): 2}  # for all blocks, and for the final layer
    model._forward_pre_hooks.clear()
    model._forward_pre_hooks_with_kwargs.clear()
    assert torch.equal(predicted(model), output)
    assert calls == {id(embedder): 2 + BLOCKS + 1}


def test_different_embedders_stay_apart() -> None:
    model: Any = quantize(tiny_dit(), CONFIGS["rotated"])
    assert model.transformer_blocks[0].norm1.emb is not model.transformer_blocks[1].norm1.emb
    assert not model._forward_pre_hooks


def test_shared_embedding_does_not_reach_diffusers_own_forward() -> None:
    model: Any = quantize(with_equal_embedders(), CONFIGS["rotated"])
    expected = predicted(model)
    for block in model.transformer_blocks:
        block._chunk_size, block._chunk_dim = 2, 1  # takes BasicTransformerBlock.forward
    with use_backend("torch"):
        chunked = predicted(model)
    assert chunked.shape == expected.shape
    assert bool(torch.isfinite(chunked).all())


def test_partly_quantized_block_is_not_fused() -> None:
    model: Any = quantize(tiny_dit(), CONFIGS["minmax"].replace(exclude=("transformer_blocks.1.ff.*",)))
    assert [type(block) for block in model.transformer_blocks] == [FusedDiTBlock, BasicTransformerBlock]
    assert shares(model) == [True] * BLOCKS


@pytest.mark.parametrize("branched", ["attn1.to_k", "attn1.to_out.0", "ff.net.2", "norm1.linear"])
def test_block_with_a_low_rank_branch_is_not_fused(branched: str) -> None:
    # Fused operations see quantized inputs only, and a branch reads the input before that.
    model: Any = quantize(tiny_dit(), CONFIGS["minmax"].replace(exclude=(f"transformer_blocks.0.{branched}",)))
    quantize_rest = CONFIGS["minmax"].replace(include=(f"transformer_blocks.0.{branched}",), low_rank=4)
    plain: Any = quantize(tiny_dit(), quantize_rest)
    layer = plain.transformer_blocks[0].get_submodule(branched)
    model.transformer_blocks[0].set_submodule(branched, layer)
    expected = predicted(model)
    adapter_for(model).fuse(model)
    assert [type(block) for block in model.transformer_blocks] == [BasicTransformerBlock, FusedDiTBlock]
    assert shares(model) == [True, True]  # the branch is beside what is shared
    with use_backend("torch"):
        assert torch.equal(predicted(model), predicted(unfused(model)))
    assert layer.low_rank_down is not None and expected.isfinite().all()


def test_shared_attention_keeps_the_dtype() -> None:
    model = quantize(tiny_dit(), CONFIGS["minmax"]).to(torch.bfloat16)
    fields = inputs_of(model)
    output = predicted(model, **{**fields, "latents": fields["latents"].to(torch.bfloat16)})
    assert output.dtype == torch.bfloat16
    assert bool(torch.isfinite(output).all())


def test_partly_quantized_attention_shares_what_is_quantized() -> None:
    config = CONFIGS["minmax"].replace(exclude=("transformer_blocks.0.attn1.to_k",))
    model = quantize(tiny_dit(), config)
    assert shares(model) == [True, True]
    with use_backend("torch"):
        assert torch.equal(predicted(model), predicted(unfused(model)))
    assert bool(torch.isfinite(predicted(model)).all())


@pytest.mark.parametrize("difference", ["signs", "channel scale", "static scale"])
def test_layers_that_see_their_input_differently_are_not_shared(difference: str) -> None:
    granularity = {"signs": "token", "channel scale": "channel", "static scale": "tensor"}[difference]
    model: Any = quantize(
        tiny_dit(),
        QuantizationConfig(gptq=False, activation_granularity=granularity),
        random_calibration(tiny_dit()),
    )
    assert shares(model) == [True] * BLOCKS
    to_v = model.transformer_blocks[1].attn1.to_v
    buffer = {"signs": "rotation_signs", "channel scale": "channel_scale", "static scale": "static_scale"}[difference]
    value = getattr(to_v, buffer).clone()
    value[0] += 1
    setattr(to_v, buffer, value)
    adapter_for(model).fuse(model)
    assert shares(model) == [True, False]
