"""Layers that read one tensor quantize it once, and never take one tensor for another."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from tiny import flux_calls, tiny_flux
from torch import Tensor, nn

from hqdit.layers.linear import HQLinear
from hqdit.layers.shared_input import share_input
from hqdit.models.adapter import adapter_for
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize

DATA_FREE = QuantizationConfig(gptq=False)


def alone(model: Any) -> Any:
    """A copy whose layers quantize their inputs each by itself."""
    copied = copy.deepcopy(model)
    for layer in copied.modules():
        if isinstance(layer, HQLinear):
            layer.shared_input = None
    return copied


@pytest.fixture(scope="module")
def model() -> Any:
    return quantize(tiny_flux(), DATA_FREE)


@pytest.fixture
def calls() -> Counter[str]:
    return Counter()


@pytest.fixture(autouse=True)
def _counted(monkeypatch: pytest.MonkeyPatch, calls: Counter[str]) -> None:
    original = HQLinear.quantize_input

    def quantize_input(self: HQLinear, *args: Any) -> Any:
        calls[self.spec.name] += 1
        return original(self, *args)

    monkeypatch.setattr(HQLinear, "quantize_input", quantize_input)


def test_each_input_is_quantized_once(model: Any, calls: Counter[str]) -> None:
    call = flux_calls(1).recorded[0]
    output = call.output(model)
    groups = {site.input_group for site in adapter_for(model).sites(model)}
    assert sum(calls.values()) == len(groups) < len(adapter_for(model).sites(model))
    assert torch.equal(output, call.output(alone(model)))


def test_nothing_is_held_between_forward_passes(model: Any) -> None:
    flux_calls(1).recorded[0].output(model)
    shared = {layer.shared_input for layer in model.modules() if isinstance(layer, HQLinear)} - {None}
    assert shared and all((s._source, s._activation, s._served) == (None, None, ()) for s in shared)


def attention_layers(model: Any) -> list[HQLinear]:
    attention = model.transformer_blocks[0].attn
    return [attention.to_q, attention.to_k, attention.to_v]


def test_another_tensor_is_quantized_anew(model: Any, calls: Counter[str]) -> None:
    q, k, v = attention_layers(model)
    first, second = torch.randn(2, 5, 36).unbind(0)
    outputs = [q(first), k(second), v(first), v(first.clone())]
    assert sum(calls.values()) == 4
    expected = alone(model)
    for found, (layer, x) in zip(outputs, zip((0, 1, 2, 2), (first, second, first, first), strict=True), strict=True):
        assert torch.equal(found, attention_layers(expected)[layer](x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_tensor_that_was_written_to_is_quantized_anew(model: Any, mode: Any) -> None:
    # A static buffer, as a captured graph uses it: the same object, other numbers, and v has not asked in between.
    q, k, _ = attention_layers(model)
    with mode():
        x = torch.randn(5, 36)
        q(x), k(x)
        x.copy_(torch.randn(5, 36))
        found = q(x)
        assert torch.equal(found, attention_layers(alone(model))[0](x))


def test_copies_do_not_share_with_the_original(model: Any) -> None:
    copied = copy.deepcopy(model)
    originals = {id(layer.shared_input) for layer in attention_layers(model)}
    copies = {id(layer.shared_input) for layer in attention_layers(copied)}
    assert len(originals) == len(copies) == 1 and not originals & copies


def test_layers_that_see_it_differently_do_not_share(model: Any) -> None:
    layers = attention_layers(copy.deepcopy(model))
    signs = layers[2].rotation_signs
    assert signs is not None
    layers[2].rotation_signs = signs ^ 1
    share_input(layers)
    assert {layer.shared_input for layer in layers} == {None}
    share_input(layers[:1])
    assert layers[0].shared_input is None


def test_compiled_without_a_break(model: Any) -> None:
    call = flux_calls(1).recorded[0]
    expected = call.output(model)
    torch._dynamo.reset()
    compiled: nn.Module = torch.compile(model, fullgraph=True, backend="eager")
    outputs: list[Tensor] = [call.output(compiled) for _ in range(2)]
    assert all(torch.equal(output, expected) for output in outputs)
