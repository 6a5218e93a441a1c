"""Smoothing before quantization: the folds keep the function, and go where the plan says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import BLOCKS, inputs_of, latent_dit, predicted, random_calibration, require_complete, tiny_dit
from torch import Tensor, nn

from hqdit.calibration.capture import BlockStream
from hqdit.errors import NumericsError
from hqdit.models.adapter import adapter_for
from hqdit.models.outliers import inject_outliers
from hqdit.numerics.error import relative_error, sqnr_db
from hqdit.pipeline import smoothing
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.plan import plan_quantization
from hqdit.pipeline.quantize import quantize
from hqdit.pipeline.smoothing import smooth_model, smoothed_twin
from hqdit.pipeline.survey import survey_inputs

NEAREST: dict[str, Any] = {"gptq": False, "rotation": "none", "weights": "int8"}
PLACES = {
    "norm1.linear": "applied",
    "attn1.to_q": "folded",
    "attn1.to_k": "folded",
    "attn1.to_v": "folded",
    "attn1.to_out.0": "folded",
    "ff.net.0.proj": "folded",
    "ff.net.2": "applied",
}


def inputs_of_layers(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    handles = []
    for name in names:

        def hook(_module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            seen[name] = args[0].reshape(-1, args[0].shape[-1])

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    predicted(model)
    for handle in handles:
        handle.remove()
    return seen


def smoothed(model: Any, alpha: float = 0.5, **values: Any) -> tuple[Any, dict[str, Tensor]]:
    """The plan and the scales of `model`, which is smoothed in place."""
    plan = plan_quantization(model, QuantizationConfig(smoothing=alpha, **{**NEAREST, **values}))
    config = QuantizationConfig(smoothing=alpha, **{**NEAREST, **values})
    data = random_calibration(model, 16)
    return plan, smooth_model(model, plan, data, survey_inputs(model, plan, data, 0), config)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "build",
    [tiny_dit, latent_dit, lambda: tiny_dit(attention_bias=False), lambda: inject_outliers(tiny_dit(), 100.0)],
    ids=["pixels", "learned sigma", "no attention bias", "outliers"],
)
def test_the_float_function_stays(build: Any, alpha: float) -> None:
    model = build()
    exact, before = predicted(model), {name: t.clone() for name, t in model.state_dict().items()}
    smoothed(model, alpha)
    assert 0 < relative_error(exact, predicted(model)) < 1e-5
    changed = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    parts = ("norm1.linear.weight", "attn1.to_q.weight", "attn1.to_v.weight", "attn1.to_out.0.weight")
    parts += ("ff.net.0.proj.weight", "norm1.linear.bias", "attn1.to_k.weight")
    for block in range(BLOCKS):
        assert {f"transformer_blocks.{block}.{part}" for part in parts} <= changed
        assert f"transformer_blocks.{block}.ff.net.2.weight" not in changed


def test_what_is_folded_scales_the_inputs() -> None:
    float_model, model = tiny_dit(), tiny_dit()
    plan, scales = smoothed(model)
    names = [layer.site.name for layer in plan.layers]
    before, after = inputs_of_layers(float_model, names), inputs_of_layers(model, names)
    for layer in plan.layers:
        name, factor = layer.site.name, scales[layer.site.input_group]
        assert layer.smoothing == PLACES[name.partition(".")[2].partition(".")[2]]
        assert factor.dtype == torch.float32 and bool((factor > 0).all())
        expected = before[name] * factor if layer.smoothing == "folded" else before[name]
        assert relative_error(expected, after[name]) < 1e-5
        weight = float_model.get_submodule(name).weight
        # The rows of W_v, and shift and scale of adaLN, change too: compare the columns' proportions only.
        if layer.site.role in ("attention-out", "q", "k", "fc1"):
            torch.testing.assert_close(model.get_submodule(name).weight, weight / factor, rtol=1e-6, atol=0)


def test_scales_are_those_of_the_formula() -> None:
    """sqrt(max|w| / max|x|) per input channel, over all layers that read the input, as they will be quantized."""
    model = tiny_dit()
    data, sites = random_calibration(model, 16), adapter_for(model).sites(model)
    largest = {}
    for site in (sites[0], sites[1]):
        seen: list[Tensor] = []
        BlockStream(model, data, 0).capture(site, seen.append, "test")
        largest[site.input_group] = torch.cat(seen).abs().amax(0)
    norm, attention = model.transformer_blocks[0].norm1.linear, model.transformer_blocks[0].attn1
    to_q, to_k, to_v, modulation = (
        m.weight.detach().clone() for m in (attention.to_q, attention.to_k, attention.to_v, norm)
    )
    _, scales = smoothed(model)
    to_v *= scales["transformer_blocks.0.out"].unsqueeze(1)  # the fold into its rows came first
    columns = torch.stack([weight.abs().amax(0) for weight in (to_q, to_k, to_v)]).amax(0)
    expected = (columns / largest["transformer_blocks.0.qkv"]).sqrt()
    torch.testing.assert_close(scales["transformer_blocks.0.qkv"], expected, rtol=1e-5, atol=0)
    for part, group in ((0, "qkv"), (1, "qkv"), (3, "fc1"), (4, "fc1")):  # shift and scale, of attention and MLP
        modulation[72 * part : 72 * (part + 1)] *= scales[f"transformer_blocks.0.{group}"].unsqueeze(1)
    expected = (modulation.abs().amax(0) / largest["transformer_blocks.0.modulation"]).sqrt()
    torch.testing.assert_close(scales["transformer_blocks.0.modulation"], expected, rtol=1e-5, atol=0)


def test_smoothing_undoes_compensated_outliers() -> None:
    # c (LN (1 + scale) + shift) with columns / c: s absorbs c, so that outliers cost nothing but roundings of float32.
    measured = []
    for factor in (1.0, 32.0):
        model = inject_outliers(tiny_dit(), factor)
        exact = predicted(model)
        config = QuantizationConfig(smoothing=0.5, **{**NEAREST, "weights": "int4"})
        measured.append(sqnr_db(exact, predicted(quantize(model, config, random_calibration(model, 48)))))
    assert abs(measured[0] - measured[1]) < 0.2 and min(measured) > 7.0


@pytest.mark.parametrize(
    ("rotation", "fold_value_rotation"), [("none", False), ("full", False), ("block:36", False), ("full", True)]
)
def test_quantized_model_with_8_bits_is_near(rotation: str, fold_value_rotation: bool) -> None:
    """Scale first, then rotate: a wrong order or basis anywhere gives 0 dB."""
    config = QuantizationConfig(
        smoothing=0.5, **{**NEAREST, "rotation": rotation, "fold_value_rotation": fold_value_rotation}
    )
    model: Any = inject_outliers(tiny_dit(), 30.0)
    exact, fields = inject_outliers(tiny_dit(), 30.0), inputs_of(model)
    quantize(model, config, random_calibration(model, 16))
    assert sqnr_db(predicted(exact, **fields), predicted(model, **fields)) > 30.0
    float_inputs = inputs_of_layers(exact, list(quantized_layers(model)))
    for name, layer in quantized_layers(model).items():
        entry = model.quantization_record.layers[name]
        assert entry["smoothing"] == layer.spec.activation.smoothing == PLACES[name.split(".", 2)[2]]
        # `delivered` turns the float model's input into what this layer expects; v's own output is smoothed too.
        # adaLN's output is smoothed too, each part by its own factors.
        if not name.endswith(("to_v", "norm1.linear")):
            expected = exact.get_submodule(name)(float_inputs[name])
            assert sqnr_db(expected, layer(layer.delivered(float_inputs[name]))) > 28.0
            assert relative_error(exact.get_submodule(name).weight, layer.dequantized_weight()) < 0.05


def test_layers_left_alone_may_absorb_and_be_read() -> None:
    # Only q, fc2 and the attention output are quantized: k, v and adaLN stay float and take part in the folds.
    config = QuantizationConfig(smoothing=0.5, include=("*to_q", "*to_out.0", "*ff.net.2"), **NEAREST)
    model: Any = tiny_dit()
    exact = predicted(model)
    quantize(model, config, random_calibration(model, 16))
    assert len(quantized_layers(model)) == 3 * BLOCKS
    assert sqnr_db(exact, predicted(model)) > 35.0


def test_wrong_fold_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing, "_scale_value_channels", _without_the_readers)
    assert smoothed(tiny_dit(), include=("*ff.net.2",))[1]  # nothing to fold, nothing to go wrong
    with pytest.raises(NumericsError) as info:
        smoothed(tiny_dit())
    require_complete(info.value, "smoothing check", "1e-05")


def _without_the_readers(model: nn.Module, readers: list[Any], factor: Tensor) -> None:
    model.get_submodule(readers[0].value_site).get_parameter("weight").mul_(factor.unsqueeze(1))


def test_calibration_that_overflows_the_model() -> None:
    model: Any = tiny_dit()
    model.transformer_blocks[0].ff.net[0].proj.weight.data[3, 4] = torch.inf
    with pytest.raises(NumericsError) as info:
        smoothed(model)
    require_complete(info.value, "smoothing")


@pytest.mark.parametrize("rotation", ["none", "full"])
def test_branch_takes_the_largest_singular_values_of_the_smoothed_weight(rotation: str) -> None:
    rank, exact = 6, tiny_dit(num_layers=1)
    config = QuantizationConfig(smoothing=0.5, low_rank=rank, **{**NEAREST, "rotation": rotation})
    layers = quantized_layers(quantize(tiny_dit(num_layers=1), config, random_calibration(exact, 16)))
    for name in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.2"):
        layer = layers[name]
        assert layer.input_scale is not None and layer.low_rank_down is not None and layer.low_rank_up is not None
        smooth = exact.get_submodule(name).weight.detach().double() / layer.input_scale.double()
        down = layer.low_rank_down.double()
        if layer.spec.activation.smoothing == "applied":  # the branch reads the plain input
            down = down / layer.input_scale.double()
        rest = (smooth - layer.low_rank_up.double() @ down).norm()
        tail = torch.linalg.svdvals(smooth)[rank:].norm()
        # Storage rounds both factors by at most 2^-9 of each number: that part of the branch is left over as well.
        assert tail * (1 - 1e-6) <= rest <= (tail**2 + (2**-8 * smooth.norm()) ** 2).sqrt() * (1 + 1e-6)


def test_the_twin_has_the_float_function_in_the_basis_of_the_quantized_layers() -> None:
    exact = inject_outliers(tiny_dit(), 10.0)
    config = QuantizationConfig(smoothing=0.5, **{**NEAREST, "activations": "int8"})
    quantized = quantize(copy.deepcopy(exact), config, random_calibration(exact, 16))
    before = {name: tensor.clone() for name, tensor in exact.state_dict().items()}
    twin = smoothed_twin(exact, quantized)
    assert twin is not exact and relative_error(predicted(exact), predicted(twin)) < 1e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in exact.state_dict().items())
    names = list(quantized_layers(quantized))
    inputs = inputs_of_layers(twin, names)
    for name in names:
        # With 8 bits each layer's own error is small; in another basis its output would be another one altogether.
        true = twin.get_submodule(name)(inputs[name])
        assert sqnr_db(true, quantized.get_submodule(name)(inputs[name])) > 25, name


def test_without_folds_the_twin_is_the_model_itself() -> None:
    exact = tiny_dit()
    quantized = quantize(copy.deepcopy(exact), QuantizationConfig(gptq=False))
    assert smoothed_twin(exact, quantized) is exact
