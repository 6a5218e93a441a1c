"""The plan: which layers, which rotations, and which requests cannot be planned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import BLOCKS, calibration, require_complete, state_hash, tiny_dit
from torch import nn

from hqdit.errors import HQDiTError, NumericsError, UsageError
from hqdit.models.adapter import adapter_for
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.plan import plan_quantization
from hqdit.pipeline.quantize import quantize


def plan(model: nn.Module | None = None, **values: Any) -> Any:
    return plan_quantization(model or tiny_dit(), QuantizationConfig(**values))


def refused(error: type[HQDiTError], parts: tuple[str, ...], model: Any = None, **values: Any) -> None:
    """Neither planned nor quantized, and nothing is changed by trying."""
    model = model or tiny_dit()
    config = QuantizationConfig(**{"gptq": False, **values})
    before = state_hash(model)
    for attempt in (plan_quantization, quantize):
        with pytest.raises(error) as info:
            attempt(model, config)
        require_complete(info.value, *parts)
    assert state_hash(model) == before
    assert not hasattr(model, "quantization_record")


def test_default_plan_is_every_site_in_order() -> None:
    model = tiny_dit()
    found = plan(model)
    sites = adapter_for(model).sites(model)
    assert [layer.site for layer in found.layers] == sites
    for layer in found.layers:
        linear = model.get_submodule(layer.site.name)
        assert (layer.in_features, layer.out_features) == (linear.in_features, linear.out_features)
        assert layer.rotation.kind == "full" and layer.rotation.width == layer.in_features
    assert found.skipped == adapter_for(model).kept_layers(model)


def test_planning_changes_nothing() -> None:
    model = tiny_dit()
    before, hooks = state_hash(model), [len(m._forward_hooks) for m in model.modules()]
    types = [type(module) for module in model.modules()]
    plan(model, fold_value_rotation=True, format_granularity="channel", exclude=("*fc*", "*attn1*")[1:])
    assert state_hash(model) == before
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert [type(module) for module in model.modules()] == types


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        (("*.ff.*",), (), ("ff.net.0.proj", "ff.net.2")),
        (("*to_q", "*to_k"), (), ("attn1.to_q", "attn1.to_k")),
        (("*",), ("*norm1*", "*attn1*"), ("ff.net.0.proj", "ff.net.2")),
        (("*attn1*",), ("*.to_[qkv]",), ("attn1.to_out.0",)),
        (("*.ff.*",), ("*to_q", "*.ff.net.2"), ("ff.net.0.proj",)),
    ],
)
def test_patterns(include: tuple[str, ...], exclude: tuple[str, ...], chosen: tuple[str, ...]) -> None:
    model = tiny_dit()
    found = plan(model, include=include, exclude=exclude)
    names = [layer.site.name for layer in found.layers]
    assert names == [f"transformer_blocks.{block}.{name}" for block in range(BLOCKS) for name in chosen]
    excluded = {name for name, reason in found.skipped.items() if reason == "excluded by name"}
    assert excluded == {site.name for site in adapter_for(model).sites(model)} - set(names)
    assert adapter_for(model).kept_layers(model).items() <= found.skipped.items()


@pytest.mark.parametrize(
    ("flag", "patterns"),
    [
        ("include", ("*.nope",)),
        ("include", ("*attn1*", "*.nope")),
        ("include", ("transformer_blocks.0.attn1",)),
        ("include", ("proj_out_1",)),
        ("include", ("*TO_Q",)),
        ("include", ("",)),
        ("exclude", ("*.nope",)),
        ("exclude", ("*attn1*", "transformer_blocks.2.*")),
    ],
)
def test_pattern_that_matches_nothing(flag: str, patterns: tuple[str, ...]) -> None:
    refused(UsageError, (f"--{flag}", repr(patterns[-1]), "transformer_blocks.0"), **{flag: patterns})


@pytest.mark.parametrize(
    "values", [{"exclude": ("*",)}, {"include": ()}, {"include": ("*to_q",), "exclude": ("*to_*",)}]
)
def test_nothing_left(values: dict[str, Any]) -> None:
    refused(UsageError, ("--exclude",), **values)


@pytest.mark.parametrize(
    "rotation", ["none", "full", "block:4", "block:8", "block:12", "block:24", "block:36", "block:72"]
)
def test_rotations(rotation: str) -> None:
    for layer in plan(rotation=rotation).layers:
        kind, _, size = rotation.partition(":")
        assert layer.rotation.kind == kind
        assert layer.rotation.block == (int(size) if size else layer.in_features)


def test_folded_rotation_of_the_attention_output() -> None:
    for layer in plan(fold_value_rotation=True).layers:
        is_output = layer.site.role == "attention-out"
        assert layer.rotation.kind == ("heads" if is_output else "full")
        assert layer.rotation.block == (36 if is_output else layer.in_features)


@pytest.mark.parametrize("missing", ["to_v", "to_out.0"])
def test_no_fold_without_both_ends(missing: str) -> None:
    found = plan(fold_value_rotation=True, exclude=(f"*{missing}",))
    assert {layer.rotation.kind for layer in found.layers} == {"full"}


def test_width_without_a_matrix_names_the_layer_and_the_blocks() -> None:
    model = tiny_dit(attention_head_dim=26)  # 52 wide: no matrix; its MLP is 208 = 4 x 52 wide
    refused(NumericsError, ("transformer_blocks.0.norm1.linear", "52", "block:B", "[4]"), model)
    assert len(plan(model, rotation="block:4").layers) == 7 * BLOCKS
    assert len(plan(model, rotation="none").layers) == 7 * BLOCKS


@pytest.mark.parametrize("rank", [73, 1000])
def test_rank_that_a_layer_cannot_have(rank: int) -> None:
    refused(UsageError, ("transformer_blocks.0.norm1.linear", str(rank), "72", "--low-rank"), low_rank=rank)
    assert len(plan(low_rank=72).layers) == 7 * BLOCKS


@pytest.mark.parametrize("alpha", [None, 0.0, 0.5])
def test_places_of_smoothing(alpha: float | None) -> None:
    for layer in plan(smoothing=alpha).layers:
        is_behind_a_function = layer.site.role in ("fc2", "modulation")
        assert layer.smoothing == ("none" if alpha is None else "applied" if is_behind_a_function else "folded")


def test_policy_says_what_will_happen() -> None:
    (policy,) = {layer.format_policy for layer in plan(smoothing=0.5, low_rank=4, weights="int4").layers}
    assert policy == "int4; input same; smoothed by alpha 0.5; 16-bit branch of rank 4"
    (policy,) = {
        layer.format_policy for layer in plan_quantization(tiny_dit(), QuantizationConfig.preset("fpq")).layers
    }
    assert policy == "fp4 (e3m0 or e2m1 or e1m2 per layer); input fp4; searched"


def test_heads_without_a_matrix_cannot_be_folded() -> None:
    # 3 heads of 24: 72 has a matrix, 24 has one, 3 has none.
    model = tiny_dit(num_attention_heads=3, attention_head_dim=24)
    refused(NumericsError, ("transformer_blocks.0.attn1.to_out.0", "3"), model, fold_value_rotation=True)
    assert len(plan(model).layers) == 7 * BLOCKS


@pytest.mark.parametrize("block", [16, 48])
def test_block_that_does_not_divide_the_width(block: int) -> None:
    refused(
        UsageError,
        ("transformer_blocks.0.norm1.linear", f"block:{block}", "[4, 8, 12, 24, 36, 72]"),
        rotation=f"block:{block}",
    )


def test_block_that_divides_some_widths_only() -> None:
    refused(UsageError, ("transformer_blocks.0.norm1.linear", "block:144"), rotation="block:144")
    assert len(plan(rotation="block:144", include=("*.ff.net.2",)).layers) == BLOCKS


@pytest.mark.parametrize("side", ["weight_granularity", "activation_granularity"])
@pytest.mark.parametrize("size", [16, 32, 144])
def test_group_size_that_does_not_divide(side: str, size: int) -> None:
    parts = ("--group-size", "transformer_blocks.0.norm1.linear", str(size), "72", "[4, 8, 12, 24, 36, 72]")
    refused(UsageError, parts, **{side: "group", "group_size": size})


def test_format_policy_is_readable() -> None:
    assert plan().layers[0].format_policy == "fp4 (e3m0 or e2m1 or e1m2 per layer); input same"
    assert "per output channel" in plan(format_granularity="channel").layers[0].format_policy
    assert plan(weights="int4", activations="int8").layers[0].format_policy == "int4; input int8"


def test_quantized_models_are_not_planned_again() -> None:
    model = quantize(tiny_dit(), QuantizationConfig(), calibration())
    before = state_hash(model)
    # HQLinear is an nn.Linear for the sake of other libraries, so that the class alone does not say it.
    with pytest.raises(HQDiTError) as info:
        plan(model)
    require_complete(info.value, "transformer_blocks.0.norm1.linear")
    assert state_hash(model) == before


def test_layers_of_another_class_are_refused() -> None:
    model: Any = tiny_dit()
    model.transformer_blocks[1].attn1.to_k = nn.Identity()
    with pytest.raises(UsageError) as info:
        plan(model)
    require_complete(info.value, "transformer_blocks.1.attn1.to_k", "Identity")
    assert torch.is_grad_enabled()
