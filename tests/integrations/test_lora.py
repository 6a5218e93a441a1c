"""LoRA adapters of peft around quantized layers: inference, training, saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from small_models import DIT, DTYPE, FLUX, SD3, WAN, SmallModel
from tiny import require_complete

from hqdit.errors import UsageError
from hqdit.integrations.diffusers_config import HQDiTConfig
from hqdit.layers.linear import HQLinear
from hqdit.pipeline.checkpoint import quantized_layers

peft = pytest.importorskip("peft", reason="LoRA needs peft, which is not installed")

#: The classes with diffusers' adapter mixin; DiT has none, but peft can be put into it.
WITH_ADAPTERS = (SD3, FLUX, WAN)
each_model = pytest.mark.parametrize("small", WITH_ADAPTERS, ids=lambda small: small.name)
LORA = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "init_lora_weights": False}


@pytest.fixture
def load(tmp_path: Path) -> Callable[[SmallModel], Any]:
    def loaded(small: SmallModel, **kwargs: Any) -> Any:
        folder = small.save(tmp_path / "float")
        return small.model_class.from_pretrained(folder, quantization_config=HQDiTConfig(), **kwargs)

    return loaded


def add_lora(model: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model.add_adapter(peft.LoraConfig(**LORA))
    return model


@each_model
def test_an_adapter_adds_its_product(small: SmallModel, load: Callable[..., Any]) -> None:
    model = load(small)
    before = small.output(model)
    name = next(name for name in quantized_layers(model) if name.endswith("to_q"))
    plain = model.get_submodule(name)
    add_lora(model)
    wrapped = model.get_submodule(name)
    assert wrapped.base_layer is plain
    x = torch.randn(3, plain.in_features)
    update = wrapped.lora_B["default"].weight @ wrapped.lora_A["default"].weight
    assert torch.allclose(wrapped(x), plain(x) + x @ update.T, rtol=1e-5, atol=1e-5)
    assert not torch.equal(small.output(model), before)
    model.disable_adapters()
    assert torch.equal(small.output(model), before)
    model.enable_adapters()
    model.delete_adapters("default")
    assert torch.equal(small.output(model), before)


@each_model
def test_adapters_are_trained_through_quantized_layers(small: SmallModel, load: Callable[..., Any]) -> None:
    model = load(small)
    model.requires_grad_(False)
    add_lora(model)
    codes = {name: layer.qweight.clone() for name, layer in quantized_layers(model).items()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(**small.inputs(), return_dict=False)[0].square().mean()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert len(trained) >= 16 and losses[-1] < losses[0]
    # The first block's adapters learn only through the layers after them.
    assert any(float(p.grad.abs().max()) > 0 for p in trained[:2])
    assert all(torch.equal(layer.qweight, codes[name]) for name, layer in quantized_layers(model).items())


@each_model
def test_gradients_are_those_of_the_dequantized_model(small: SmallModel, tmp_path: Path) -> None:
    """Eight-bit inputs, so that both models compute nearly the same."""
    gradients = []
    folder = small.save(tmp_path)
    for is_float in (False, True):
        config = HQDiTConfig(weights="e2m1", activations="int8")
        model = small.model_class.from_pretrained(folder, quantization_config=config)
        if is_float:
            model.dequantize()
        model.requires_grad_(False)
        add_lora(model)
        model(**small.inputs(), return_dict=False)[0].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    quantized, exact = gradients
    assert float((quantized - exact).norm() / exact.norm()) < 0.05


def test_adapters_in_16_bits(load: Callable[..., Any]) -> None:
    model = add_lora(load(FLUX, **{DTYPE: torch.bfloat16}))
    assert FLUX.output(model.to("cpu"), torch.bfloat16).dtype == torch.bfloat16


def test_an_adapter_is_saved_and_loaded(load: Callable[..., Any], tmp_path: Path) -> None:
    model = add_lora(load(FLUX))
    expected = FLUX.output(model)
    layers = peft.get_peft_model_state_dict(model)
    FluxPipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    again = load(FLUX)
    again.load_lora_adapter(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors", use_safetensors=True)
    assert torch.equal(FLUX.output(again), expected)


def test_a_model_is_saved_without_its_adapters(load: Callable[..., Any], tmp_path: Path) -> None:
    model = load(FLUX)
    before = FLUX.output(model)
    add_lora(model)
    with pytest.raises(UsageError) as caught:
        model.save_pretrained(tmp_path / "whole")
    require_complete(caught.value, "save_lora_weights", "unload_lora", "base_layer")
    model.unload_lora()
    model.save_pretrained(tmp_path / "whole")
    assert torch.equal(FLUX.output(FLUX.model_class.from_pretrained(tmp_path / "whole")), before)


def test_adapters_cannot_be_fused_into_codes(load: Callable[..., Any]) -> None:
    model = add_lora(load(FLUX))
    codes = {name: layer.qweight.clone() for name, layer in quantized_layers(model).items()}
    with pytest.raises((RuntimeError, TypeError, UsageError)):
        model.fuse_lora()
    assert all(torch.equal(layer.qweight, codes[name]) for name, layer in quantized_layers(model).items())


def test_dit_takes_adapters_of_peft_itself(load: Callable[..., Any]) -> None:
    model = load(DIT)
    model.requires_grad_(False)
    before = DIT.output(model)
    wrapped = peft.inject_adapter_in_model(peft.LoraConfig(**{**LORA, "init_lora_weights": True}), model)
    assert torch.allclose(DIT.output(wrapped), before, rtol=1e-4, atol=1e-4)
    wrapped(**DIT.inputs(), return_dict=False)[0].square().mean().backward()
    trained = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in trained.values())
    assert isinstance(wrapped.transformer_blocks[0].attn1.to_q.base_layer, HQLinear)


def test_inputs_of_fused_blocks_get_gradients(load: Callable[..., Any]) -> None:
    model = load(DIT)
    model.requires_grad_(False)
    inputs = DIT.inputs()
    inputs["hidden_states"].requires_grad_()
    output = model(**inputs, return_dict=False)[0]
    assert torch.allclose(output, DIT.output(model), rtol=1e-3, atol=1e-3)
    output.square().mean().backward()
    assert float(inputs["hidden_states"].grad.abs().max()) > 0
