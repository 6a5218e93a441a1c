"""What goes beyond the paper, part by part: it keeps the float function, and it is all in the checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import RUNNABLE, calibration, inputs_of, peculiar_dit, predicted

from hqdit.calibration.capture import BlockStream
from hqdit.errors import UsageError
from hqdit.kernels.selection import use_backend
from hqdit.layers.linear import HQLinear
from hqdit.models.adapter import adapter_for
from hqdit.numerics.error import relative_error, sqnr_db
from hqdit.pipeline.checkpoint import load, quantized_layers, save
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.dequantize import dequantize
from hqdit.pipeline.known_input import SENSITIVE_SHARE
from hqdit.pipeline.quantize import quantize
from hqdit.quantizers.spec import require_group_size

PLUS = QuantizationConfig.preset("hqdit-plus")
TOKEN = QuantizationConfig.preset("hqdit-plus-token")
#: Operands so fine that only a wrong transformation could be seen.
FINE: dict[str, Any] = {
    "weights": "int8",
    "activations": "int8",
    "activation_scale_rule": "absmax",
    "scale_rule": "mse",
}
PARTS = {
    "smoothing": {"smoothing": 0.5, "smoothing_statistic": "rms"},
    "static means": {"centring": "static"},
    "means of samples": {"centring": "sample"},
    "emphasis": {"emphasis": 4},
    "bias": {"bias_correction": True},
}


def quantized(config: QuantizationConfig, model: Any = None) -> Any:
    return quantize(peculiar_dit() if model is None else model, config, calibration())


@pytest.fixture(scope="module")
def plus() -> Any:
    return quantized(PLUS)


@pytest.mark.parametrize("part", [*PARTS, "all"])
def test_no_part_changes_the_function(part: str) -> None:
    changes = {k: v for values in PARTS.values() for k, v in values.items()} if part == "all" else PARTS[part]
    plain, found = (
        quantized(QuantizationConfig(**{k: FINE[k] for k in ("weights", "activations")}, **c)) for c in ({}, changes)
    )
    exact = predicted(peculiar_dit())
    # INT8 on both sides leaves about 40 dB; a shift, a factor or a direction that is not undone leaves a few.
    assert sqnr_db(exact, predicted(found)) > sqnr_db(exact, predicted(plain)) - 3 > 30
    assert torch.equal(predicted(plain), predicted(plain))


@pytest.mark.parametrize("preset", ["hqdit-plus", "hqdit-plus-token"])
def test_it_is_better_than_the_paper_at_the_same_bits(preset: str) -> None:
    exact = predicted(peculiar_dit())
    paper, found = (predicted(quantized(QuantizationConfig.preset(name))) for name in ("hqdit", preset))
    assert sqnr_db(exact, found) > sqnr_db(exact, paper)


def test_buffers_say_what_was_done(plus: Any) -> None:
    ranks = {name: layer.spec.activation.emphasis for name, layer in quantized_layers(plus).items()}
    assert any(ranks.values()) and all(rank <= PLUS.emphasis for rank in ranks.values())
    assert {layer.spec.activation.centring for layer in quantized_layers(plus).values()} == {"static", "sample"}
    for name, layer in quantized_layers(plus).items():
        assert layer.input_shift is not None and layer.input_shift.dtype == torch.bfloat16
        # Means of samples are not split off beside emphasised directions, nor where there is one vector per sample.
        assert layer.spec.activation.centring == "static" or (ranks[name] == 0 and "norm1" not in name)
        assert (layer.emphasis is None) == (ranks[name] == 0)
        assert layer.bias is not None
        entry = plus.quantization_record.layers[name]
        assert ("emphasis" in entry) == (ranks[name] > 0)
        is_sensitive = entry["error_share"] >= SENSITIVE_SHARE
        assert layer.spec.activation.group_size == PLUS.group_size_for(layer.in_features, is_sensitive)
        assert layer.spec.weight.group_size == layer.spec.activation.group_size
    shares = {
        layer.input_group: plus.quantization_record.layers[layer.name]["error_share"]
        for layer in adapter_for(plus).sites(plus)
    }
    assert sum(shares.values()) == pytest.approx(1.0)


@pytest.mark.parametrize("name", sorted(RUNNABLE))
def test_every_backend_gives_the_same_levels(plus: Any, name: str) -> None:
    layers = [layer for layer in quantized_layers(plus).values() if layer.emphasis is not None]
    x = torch.randn(33, layers[0].in_features, generator=torch.Generator().manual_seed(3))
    with use_backend("reference"):
        expected = layers[0].quantize_input(x)
    with use_backend(name):
        found = layers[0].quantize_input(x)
    differ = (found.levels != expected.levels).sum()
    assert int(differ) <= 1 + expected.levels.numel() // 1000  # sums of emphasis may round the other way
    assert torch.allclose(found.scale, expected.scale, rtol=0.15)


def test_a_layer_is_its_dequantized_weight_and_bias(plus: Any) -> None:
    for layer in quantized_layers(plus).values():
        fine = copy.deepcopy(layer)
        x = torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(1))
        weight, bias = fine.delivered_weight(), fine.delivered_bias()
        assert bias is not None
        expected = torch.nn.functional.linear(x, weight, bias)
        assert 10 < sqnr_db(expected, layer(x)) < 60  # the rounding of x is all that lies between
        # The same numbers without rounding: centred, scaled, emphasised, rotated, times the codes.
        scale = layer.input_scale if layer.spec.activation.smoothing == "applied" else torch.ones(layer.in_features)
        assert scale is not None and layer.input_shift is not None
        y = (x - layer.input_shift.float()) * scale
        if layer.emphasis is not None:
            b = layer.emphasis.double()
            y = (y.double() + (y.double() @ b.T) @ b).float()
        from hqdit.transforms.rotation import rotate

        codes = rotated_weight(layer)
        by_hand = rotate(y, layer.spec.rotation, layer.signs).double() @ codes.double().T + layer.bias.double()
        assert relative_error(by_hand.float(), expected) < 1e-4


def test_a_branch_beside_a_centred_input_is_dequantized_right() -> None:
    config = QuantizationConfig(
        weights="int8",
        activations="int8",
        gptq=False,
        smoothing=0.5,
        low_rank=4,
        centring="static",
        bias_correction=True,
    )
    for layer in quantized_layers(quantized(config)).values():
        weight, bias = layer.delivered_weight(), layer.delivered_bias()
        # Far from 0, where the mean that is subtracted counts.
        x = 3 + torch.randn(64, layer.in_features, generator=torch.Generator().manual_seed(1))
        assert sqnr_db(torch.nn.functional.linear(x, weight, bias), layer(x)) > 30


def rotated_weight(layer: HQLinear) -> torch.Tensor:
    from hqdit.numerics.codes import unpack_codes
    from hqdit.quantizers.quantized_tensor import QuantizedTensor

    codes = unpack_codes(layer.qweight, layer.spec.weight.formats[0])
    return QuantizedTensor(codes, layer.effective_scale, None, layer.spec.weight).dequantize()


def test_dequantized_models_compute_nearly_the_same(plus: Any) -> None:
    exact = predicted(peculiar_dit())
    found = dequantize(copy.deepcopy(plus))
    assert not quantized_layers(found)
    assert sqnr_db(exact, predicted(found)) > sqnr_db(exact, predicted(plus))


def test_save_and_load_are_bit_exact(plus: Any, tmp_path: Path) -> None:
    save(plus, tmp_path / "model")
    again = load(tmp_path / "model")
    assert torch.equal(predicted(again), predicted(plus))
    for name, layer in quantized_layers(again).items():
        twin = plus.get_submodule(name)
        assert layer.spec == twin.spec
        for (key, one), (_, other) in zip(layer.named_buffers(), twin.named_buffers(), strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)), key
    assert again.quantization_record.config == PLUS


@torch.no_grad()
def test_the_bias_takes_over_the_mean_of_the_error() -> None:
    config = TOKEN.replace(smoothing=None, smoothing_statistic="absmax", emphasis=0)
    means = {}
    for name, changes in (("with", {}), ("without", {"bias_correction": False})):
        exact, found = peculiar_dit(), quantized(config.replace(**changes))
        # The only layer that reads the same in both models: all others read what quantized ones have computed.
        site = adapter_for(exact).sites(exact)[0]
        stream, errors = BlockStream(exact, calibration(), 0), []
        float_layer, layer = exact.get_submodule(site.name), found.get_submodule(site.name)
        layer.shared_input = None

        def difference(x: torch.Tensor, a: Any = float_layer, b: Any = layer, e: list[torch.Tensor] = errors) -> None:
            e.append(b(x) - torch.nn.functional.linear(x, a.weight, a.bias))

        stream.capture(site, difference, "test")
        error = torch.cat(errors).double()
        means[name] = float(error.mean(dim=0).square().sum() / error.square().sum(dim=1).mean())
    assert means["with"] < means["without"] / 3


@pytest.mark.parametrize(
    "changes",
    [
        {"emphasis": -1},
        {"emphasis": 4, "fold_value_rotation": True},
        {"centring": "static", "fold_value_rotation": True},
        {"centring": "mean"},
        {"centring": "sample", "activation_granularity": "channel-token"},
        {"sensitive_group_size": 16},
        {"group_fit": "at-most"},
        {"scale_format": "e4m3"},
        {"smoothing_statistic": "rms"},
        {"activation_scale_rule": "rms", "activation_granularity": "tensor"},
        {"activation_scale_rule": "median"},
    ],
    ids=str,
)
def test_what_does_not_go_together_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--") as error:
        QuantizationConfig(**changes)
    assert "Fix:" in str(error.value)


def test_group_sizes_fit_the_width() -> None:
    sizes = {
        width: (PLUS.group_size_for(width), PLUS.group_size_for(width, is_sensitive=True))
        for width in (72, 144, 128, 1152, 4608, 3072)
    }
    assert sizes == {72: (72, 12), 144: (72, 16), 128: (64, 16), 1152: (72, 16), 4608: (72, 16), 3072: (64, 16)}


def test_a_width_without_a_group_is_refused() -> None:
    with pytest.raises(UsageError, match="needed a multiple of 4 that divides it"):
        require_group_size(PLUS.group_size_for(70), 70, "--group-size for a layer")


def test_it_needs_calibration_data() -> None:
    for changes in PARTS.values():
        config = QuantizationConfig(gptq=False, **changes)
        assert config.needs_calibration
        with pytest.raises(UsageError, match="calibration"):
            quantize(peculiar_dit(), config)


def test_settings_at_their_defaults_leave_no_trace_in_files() -> None:
    assert set(QuantizationConfig().to_json()) == set(QuantizationConfig.from_json({}).to_json())
    for key in ("emphasis", "centring", "group_fit", "sensitive_group_size", "scale_format", "bias_correction"):
        assert key not in QuantizationConfig().to_json() and key in PLUS.to_json()
    assert QuantizationConfig.from_json(PLUS.to_json()) == PLUS


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_compiled_layers_are_one_graph_with_the_same_bits(plus: Any) -> None:
    layers = list(quantized_layers(plus).values())
    some = [next(layer for layer in layers if layer.emphasis is not None)]
    some.append(next(layer for layer in layers if layer.spec.activation.centring == "sample"))
    torch._dynamo.reset()
    for layer in some:
        x = torch.randn(2, 4, layer.in_features, generator=torch.Generator().manual_seed(8))
        with torch.no_grad():
            alone = copy.deepcopy(layer)
            alone.shared_input = None
            assert torch.equal(torch.compile(alone, backend="eager", fullgraph=True)(x), alone(x))


def test_other_inputs_than_those_of_calibration_work(plus: Any) -> None:
    model = copy.deepcopy(plus)
    fields = inputs_of(model, 3, seed=77)
    assert torch.isfinite(predicted(model, **fields)).all()
