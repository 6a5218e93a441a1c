"""quantize: what every option makes of a model, against the float model and the definition."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
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
    state_hash,
    tiny_dit,
)
from torch import Tensor, nn

import hqdit
from hqdit.calibration.capture import BlockStream
from hqdit.errors import CheckpointError, NumericsError, UsageError
from hqdit.formats.catalog import E1M2, E2M1, E3M0, FP4_FORMATS
from hqdit.gptq import solver
from hqdit.kernels.selection import use_backend
from hqdit.layers.linear import HQLinear
from hqdit.models.adapter import adapter_for
from hqdit.models.outliers import inject_outliers
from hqdit.numerics.error import relative_error, sqnr_db
from hqdit.pipeline.checkpoint import load, quantized_layers, save
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.plan import plan_quantization
from hqdit.pipeline.quantize import quantize
from hqdit.pipeline.rotation_check import signs_of, weight_to_rotate
from hqdit.transforms.rotation import rotate, rotate_online

TABLE = "table:-100,-70,-48,-32,-20,-11,-5,-1,1,5,11,20,32,48,70,100"
NEAREST = {"gptq": False, "rotation": "none"}  # the fastest, where the option under test is another one

#: Name -> options, and the least SQNR of the predicted noise, in dB.
#:
#: With 4 bits the random model measures 6 dB (E3M0) to 12 dB, and each bit more is worth 6 dB where the other operand
#: follows; the floors lie 1 to 5 dB below, while a wrong scale, sign or basis anywhere gives 0 dB or less.
OPTIONS: dict[str, tuple[dict[str, Any], float]] = {
    "hqdit": ({}, 9.0),
    "minmax": ({"weights": "e2m1", **NEAREST}, 7.0),
    "nearest": ({"gptq": False}, 7.0),
    "gptq without rotation": ({"rotation": "none"}, 7.0),
    "act-order": ({"act_order": True}, 9.0),
    "act-order groups": (
        {"act_order": True, "weight_granularity": "group", "activation_granularity": "group", "group_size": 12},
        9.0,
    ),
    "block:4": ({"rotation": "block:4"}, 8.0),
    "block:36": ({"rotation": "block:36"}, 8.0),
    "folded": ({"fold_value_rotation": True}, 9.0),
    "tensor scales": ({"weight_granularity": "tensor"}, 8.0),
    "groups of 4": ({"weight_granularity": "group", "activation_granularity": "group", "group_size": 4}, 10.0),
    "groups of weights": ({"weight_granularity": "group", "group_size": 36}, 9.0),
    "groups of activations": ({"activation_granularity": "group", "group_size": 24, "gptq": False}, 8.0),
    "static": ({"activation_granularity": "tensor"}, 8.0),
    "static per channel": ({"activation_granularity": "channel"}, 8.0),
    "static per channel, dynamic per token": ({"activation_granularity": "channel-token", "gptq": False}, 8.0),
    "static per channel, unrotated": ({"activation_granularity": "channel", "rotation": "none"}, 7.0),
    "formats of channels": ({"format_granularity": "channel"}, 9.0),
    "formats of channels in groups": (
        {"format_granularity": "channel", "weight_granularity": "group", "group_size": 12, "gptq": False},
        8.0,
    ),
    "mse": ({"scale_rule": "mse"}, 9.0),
    "e3m0": ({"weights": "e3m0"}, 3.0),
    "e1m2": ({"weights": "e1m2"}, 9.0),
    "int4": ({"weights": "int4"}, 9.0),
    "table": ({"weights": TABLE}, 9.0),
    "fp4 with table inputs": ({"activations": TABLE}, 9.0),
    "int6": ({"weights": "int6"}, 20.0),
    "e2m3": ({"weights": "e2m3"}, 18.0),
    "int8": ({"weights": "int8"}, 32.0),
    "int8 static": ({"weights": "int8", "activation_granularity": "tensor", "gptq": False}, 25.0),
    "e4m3": ({"weights": "e4m3"}, 20.0),
    "e5m2 groups": (
        {
            "weights": "e5m2",
            "weight_granularity": "group",
            "activation_granularity": "group",
            "group_size": 36,
            "gptq": False,
        },
        13.0,
    ),
    "w4a8": ({"activations": "int8"}, 12.0),
    "w8a4": ({"weights": "int8", "activations": "e2m1"}, 9.0),
    "w4 with e4m3 inputs": ({"activations": "e4m3"}, 12.0),
}
INT8 = {"e4m3", "e5m2 groups", "w4 with e4m3 inputs"}  # run dequantized in float32


class Made:
    """One configuration applied once: float and quantized model, outputs, plan."""

    def __init__(self, name: str) -> None:
        options, self.floor = OPTIONS[name]
        self.name = name
        self.config = QuantizationConfig(**options)
        self.float_model: Any = tiny_dit()
        self.plan = plan_quantization(self.float_model, self.config)
        model = tiny_dit()
        self.model: Any = quantize(model, self.config, calibration() if self.config.needs_calibration else None)
        assert self.model is model
        self.record = self.model.quantization_record
        self.layers = quantized_layers(self.model)


@pytest.fixture(params=OPTIONS, scope="module")
def made(request: pytest.FixtureRequest) -> Made:
    return Made(request.param)


def test_predictions_stay_close(made: Made) -> None:
    fields = inputs_of(made.float_model, 32, seed=5)
    exact, found = predicted(made.float_model, **fields), predicted(made.model, **fields)
    assert bool(torch.isfinite(found).all())
    measured = sqnr_db(exact, found)
    assert measured >= made.floor
    assert measured < 60  # something was quantized


def test_layers_are_what_was_asked_for(made: Made) -> None:
    config = made.config
    assert list(made.layers) == [layer.site.name for layer in made.plan.layers]
    for planned in made.plan.layers:
        layer = made.layers[planned.site.name]
        assert layer.spec.name == planned.site.name
        assert layer.spec.rotation == planned.rotation
        assert layer.spec.weight.granularity == config.weight_granularity
        assert layer.spec.activation.granularity == config.activation_granularity
        assert layer.spec.weight.group_size == (config.group_size if config.weight_granularity == "group" else None)
        assert layer.spec.arithmetic == ("float32" if made.name in INT8 else "int8")
        if config.weights != "fp4":
            assert layer.spec.weight.formats == config.weight_candidates
        elif config.format_granularity == "channel":
            assert layer.spec.weight.formats == FP4_FORMATS and layer.format_index is not None
        else:
            assert len(layer.spec.weight.formats) == 1 and layer.spec.weight.formats[0] in FP4_FORMATS
        if config.activations == "same" and len(config.weight_candidates) == 1:
            assert layer.spec.activation.format == layer.spec.weight.formats[0]
        elif config.activations != "same":
            assert layer.spec.activation.format.name == config.activations
        assert (layer.channel_scale is not None) == config.activation_granularity.startswith("channel")
        assert (layer.static_scale is not None) == (config.activation_granularity == "tensor")
        assert (layer.rotation_signs is not None) == (config.rotation != "none")
        assert not layer.training
        expected_bits = {4: WIDTH // 2, 6: WIDTH, 8: WIDTH}[layer.spec.weight.formats[0].bits]
        assert layer.qweight.shape[1] == expected_bits * planned.in_features // WIDTH


def test_layers_with_one_input_share_its_treatment(made: Made) -> None:
    groups: dict[str, list[HQLinear]] = {}
    for planned in made.plan.layers:
        groups.setdefault(planned.site.input_group, []).append(made.layers[planned.site.name])
    assert sorted(len(group) for group in groups.values()) == sorted([1, 1, 1, 1, 3] * BLOCKS)
    for group in groups.values():
        assert all(group[0].shares_input_with(layer) for layer in group)


def test_dequantized_weights_are_the_float_ones(made: Made) -> None:
    """In the basis of the unrotated input, so that a wrong sign, order or scale would show."""
    for planned in made.plan.layers:
        linear = made.float_model.get_submodule(planned.site.name)
        weight, bias = weight_to_rotate(planned, made.plan, linear, made.config.seed)
        layer = made.layers[planned.site.name]
        # Steps of 4-bit formats are at most a quarter of the largest number (E3M0 a half); GPTQ moves some weights by a
        # step or two. A wrong basis would give sqrt(2).
        assert relative_error(weight, layer.dequantized_weight()) < (0.5 if made.name == "e3m0" else 0.35)
        assert (bias is None) == (layer.bias is None)
        if bias is not None:
            assert torch.equal(layer.bias, bias.float())


def test_records(made: Made) -> None:
    record = made.record
    assert record.config == made.config
    assert record.layers.keys() == made.layers.keys()
    assert record.parameters == sum(p.numel() for p in made.float_model.parameters())
    assert (record.rotation_error is None) == (made.config.rotation == "none")
    if record.rotation_error is not None:
        assert 0 < record.rotation_error < 1e-5
    if made.config.needs_calibration:
        assert record.calibration == {
            "origin": calibration().origin,
            "samples": len(calibration()),
            "sha256": calibration().fingerprint,
        }
    else:
        assert record.calibration == {}
    sites = {layer.site.name: layer.site for layer in made.plan.layers}
    for name, facts in record.layers.items():
        assert facts["role"] == sites[name].role
        assert facts["method"] == ("gptq" if made.config.gptq else "nearest")
        assert facts["arithmetic"] == made.layers[name].spec.arithmetic
        assert facts["zero_output_channels"] == facts["zero_input_channels"] == 0
        assert facts["statistic"] is None or facts["statistic"] >= 1.0
        if made.config.gptq:
            assert 0 <= facts["error"] <= facts["error_nearest"]
            assert facts["damp_fraction"] in solver.DAMPING_LADDER
            assert facts["dead_channels"] == 0
            assert 0 <= facts["rows_kept_nearest"] <= made.layers[name].out_features


def test_reload_is_exact(made: Made, tmp_path: Path) -> None:
    save(made.model, tmp_path / "out")
    reloaded: Any = load(tmp_path / "out")
    assert state_hash(reloaded) == state_hash(made.model)
    assert {name: layer.spec for name, layer in quantized_layers(reloaded).items()} == {
        name: layer.spec for name, layer in made.layers.items()
    }
    assert torch.equal(predicted(reloaded), predicted(made.model))
    stored = {name: dtype for name, dtype in made.record.dtypes.items() if name in made.model.state_dict()}
    assert reloaded.quantization_record == dataclasses.replace(made.record, dtypes=stored)
    save(reloaded, tmp_path / "again")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_no_hooks_and_no_gradients_are_left(made: Made) -> None:
    for module in made.model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(not layer.bias.requires_grad for layer in made.layers.values() if layer.bias is not None)


# --- against the definition


@pytest.mark.parametrize("weights", ["e2m1", "e1m2", "e3m0", "int4", "int8", TABLE])
@pytest.mark.parametrize("rotation", ["none", "full", "block:36"])
def test_round_to_nearest_with_absmax_scales(weights: str, rotation: str) -> None:
    """scale = max|w| / top level per row; every weight within half a step of its neighbours."""
    model = tiny_dit()
    config = QuantizationConfig(gptq=False, weights=weights, rotation=rotation)
    plan = plan_quantization(model, config)
    layers = quantized_layers(quantize(tiny_dit(), config))
    for planned in plan.layers:
        weight = model.get_submodule(planned.site.name).weight.detach().double()
        rotated = rotate(weight, planned.rotation, signs_of(planned, config.seed)).float()
        layer = layers[planned.site.name]
        fmt = layer.spec.weight.formats[0]
        largest = rotated.abs().amax(dim=1, keepdim=True)
        torch.testing.assert_close(layer.weight_scale, largest / fmt.max_level, rtol=2**-23, atol=0)
        levels = torch.tensor(fmt.levels, dtype=torch.float64)
        distance = (rotated.double() / layer.weight_scale.double()).unsqueeze(-1) - levels
        nearest = levels[distance.abs().argmin(dim=-1)]
        # Where no two levels are equally near, there is one answer. Rotating back and forth costs 1e-5.
        back = rotate(layer.dequantized_weight().double(), planned.rotation, signs_of(planned, config.seed))
        found = back / layer.weight_scale.double()
        two_best = distance.abs().sort(dim=-1).values[..., :2]
        is_clear = two_best[..., 1] - two_best[..., 0] > 1e-3
        assert float(is_clear.double().mean()) > 0.98
        assert float((found - nearest).abs()[is_clear].max()) < 1e-3


def test_static_scales_come_from_the_calibration_data() -> None:
    model = tiny_dit()
    data = random_calibration(model, 20)
    for site in adapter_for(model).sites(model)[:7]:
        config = QuantizationConfig(
            gptq=False, weights="e2m1", activation_granularity="channel", include=(site.name,)
        )  # one layer alone, because the inputs of the next ones come through it
        (planned,) = plan_quantization(model, config).layers
        seen: list[Tensor] = []
        BlockStream(model, data, config.seed).capture(site, seen.append, "test")
        rotated = rotate_online(torch.cat(seen), planned.rotation, signs_of(planned, config.seed))
        largest = rotated.abs().amax(dim=0) / E2M1.max_level
        layer = quantized_layers(quantize(tiny_dit(), config, data))[site.name]
        # The same numbers in one batch instead of several, which may sum in another order.
        torch.testing.assert_close(layer.channel_scale, largest, rtol=1e-5, atol=0)
        config = config.replace(activation_granularity="tensor")
        layer = quantized_layers(quantize(tiny_dit(), config, data))[site.name]
        torch.testing.assert_close(layer.static_scale, largest.max().reshape(1), rtol=1e-5, atol=0)


def test_inputs_of_a_block_come_from_quantized_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second block's Hessians see what the quantized first block puts out."""
    with use_backend("torch"):  # fused blocks give the bits of separate ones on a composed backend only
        model: Any = tiny_dit()
        quantize(model, QuantizationConfig(include=("transformer_blocks.0.*",)), calibration())
        inputs: list[Tensor] = []
        handle = model.transformer_blocks[1].register_forward_pre_hook(lambda _m, args: inputs.append(args[0].clone()))
        fields = calibration()
        predicted(model, latents=fields.latents, timesteps=fields.timesteps, classes=fields.classes)
        handle.remove()
        streams: list[BlockStream] = []
        original = BlockStream.advance

        def advance(self: BlockStream, block: int) -> None:
            original(self, block)
            if block == 0:
                streams.append(self)
                inputs.append(torch.cat([call.entry.args[0] for call in self._trajectories]))  # type: ignore[union-attr]

        monkeypatch.setattr(BlockStream, "advance", advance)
        quantize(tiny_dit(), QuantizationConfig(), calibration())
        assert len(streams) == 1
        # The only difference: blocks are fused afterwards, to the same bits.
        assert torch.equal(inputs[0], inputs[1])


def test_gptq_pays_off() -> None:
    fields = inputs_of(tiny_dit(), 48, seed=3)
    exact = predicted(tiny_dit(), **fields)
    nearest = quantize(tiny_dit(), QuantizationConfig(gptq=False))
    gptq: Any = quantize(tiny_dit(), QuantizationConfig(), calibration())
    assert sqnr_db(exact, predicted(gptq, **fields)) > sqnr_db(exact, predicted(nearest, **fields)) + 0.5
    gains = [facts["error"] / facts["error_nearest"] for facts in gptq.quantization_record.layers.values()]
    assert max(gains) <= 1.0
    assert sorted(gains)[len(gains) // 2] < 0.9


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_paper_beats_minmax_on_outliers(seed: int) -> None:
    def sqnr(preset: str) -> float:
        model = inject_outliers(tiny_dit(seed), 30.0)
        fields = inputs_of(model, 48, seed=9)
        exact = predicted(model, **fields)
        config = QuantizationConfig.preset(preset)
        return sqnr_db(exact, predicted(quantize(model, config, random_calibration(model, 48)), **fields))

    assert sqnr("hqdit") > sqnr("minmax") + 0.5  # measured: 0.9 to 2.9 dB


def test_static_channel_scales_undo_compensated_outliers_exactly() -> None:
    config = QuantizationConfig(weights="e2m1", activation_granularity="channel", **NEAREST)
    outputs = []
    for factor in (1.0, 32.0):  # a power of two, so that the scaling costs no rounding but that of c (1 + s) - 1
        model = inject_outliers(tiny_dit(), factor)
        outputs.append(predicted(quantize(model, config, random_calibration(model, 48))))
    exact = predicted(tiny_dit())
    plain, with_outliers = (sqnr_db(exact, output) for output in outputs)
    assert abs(plain - with_outliers) < 0.1


# --- which layers


def test_excluded_layers_are_not_touched() -> None:
    config = QuantizationConfig(include=("*.ff.*", "*.0.attn1.*"), exclude=("*.1.ff.net.2",), gptq=False)
    model: Any = quantize(tiny_dit(), config)
    before = tiny_dit()
    names = {layer.site.name for layer in plan_quantization(before, config).layers}
    assert quantized_layers(model).keys() == names == model.quantization_record.layers.keys()
    assert len(names) == 3 + 4
    for name, module in before.named_modules():
        if isinstance(module, nn.Linear) and name not in names:
            found = model.get_submodule(name)
            assert type(found) is nn.Linear and torch.equal(found.weight, module.weight)


def test_model_without_biases_in_attention() -> None:
    model = tiny_dit(attention_bias=False)
    config = QuantizationConfig(fold_value_rotation=True, gptq=False)
    found = quantized_layers(quantize(tiny_dit(attention_bias=False), config))
    assert found["transformer_blocks.0.attn1.to_v"].bias is None
    assert found["transformer_blocks.0.attn1.to_out.0"].bias is not None
    fields = inputs_of(model, 16)
    quantized = quantize(tiny_dit(attention_bias=False), config)
    assert sqnr_db(predicted(model, **fields), predicted(quantized, **fields)) > 7.0


@pytest.mark.parametrize("changes", [{"patch_size": 2}, {"num_layers": 1}, {"activation_fn": "geglu"}], ids=str)
def test_other_geometries(changes: dict[str, Any]) -> None:
    for build in (tiny_dit, latent_dit):
        model = build(**changes)
        fields = inputs_of(model, 16)
        exact = predicted(model, **fields)
        quantized = quantize(model, QuantizationConfig(), random_calibration(model, 16))
        assert sqnr_db(exact, predicted(quantized, **fields)) > 6.0


# --- zeros


def zeroed() -> Any:
    """Zero output channels, a zero input channel, a zero matrix."""
    model = tiny_dit()
    with torch.no_grad():
        model.transformer_blocks[0].ff.net[2].weight[[3, 5]] = 0
        model.transformer_blocks[0].attn1.to_k.weight[:, 7] = 0
        model.transformer_blocks[1].attn1.to_q.weight.zero_()
        model.transformer_blocks[1].attn1.to_q.bias.zero_()
    return model


@pytest.mark.parametrize(
    "options",
    [
        {"rotation": "none", "gptq": False},
        {"rotation": "none"},
        {},
        {"rotation": "none", "weight_granularity": "group", "group_size": 12},
        {"format_granularity": "channel"},
        {"scale_rule": "mse", "gptq": False},
        {"weight_granularity": "tensor", "gptq": False},
        {"activation_granularity": "channel"},
    ],
    ids=str,
)
def test_zero_channels_are_counted_and_stay_zero(options: dict[str, Any]) -> None:
    config = QuantizationConfig(**options)
    model = quantize(zeroed(), config, random_calibration(tiny_dit(), 16))
    layers, facts = quantized_layers(model), model.quantization_record.layers  # type: ignore[union-attr]
    fc2, to_k, to_q = (f"transformer_blocks.{n}" for n in ("0.ff.net.2", "0.attn1.to_k", "1.attn1.to_q"))
    assert facts[fc2]["zero_output_channels"] == 2
    assert facts[to_q]["zero_output_channels"] == WIDTH
    assert facts[to_q]["zero_input_channels"] == WIDTH
    # Counted in the source: a rotation spreads the other channels over the silent one.
    assert facts[to_k]["zero_input_channels"] == 1
    assert not layers[fc2].dequantized_weight()[[3, 5]].any()
    assert not layers[to_q].dequantized_weight().any()
    assert all(bool((layer.weight_scale > 0).all()) for layer in layers.values())
    assert sqnr_db(predicted(zeroed()), predicted(model)) > 6.0


def test_silent_input_channels_are_dead_in_the_hessian() -> None:
    model = tiny_dit()
    with torch.no_grad():  # two channels of the attention's values never speak
        for tensor in (model.transformer_blocks[0].attn1.to_v.weight, model.transformer_blocks[0].attn1.to_v.bias):
            tensor[[0, 40]] = 0
    exact = predicted(model)
    quantized: Any = quantize(model, QuantizationConfig(rotation="none"), random_calibration(model, 16))
    facts = quantized.quantization_record.layers
    assert facts["transformer_blocks.0.attn1.to_out.0"]["dead_channels"] == 2
    # Not zeroed: the channels may speak at other time steps.
    dequantized = quantized_layers(quantized)["transformer_blocks.0.attn1.to_out.0"].dequantized_weight()
    assert bool(dequantized[:, [0, 40]].any(dim=0).all())
    assert sqnr_db(exact, predicted(quantized)) > 6.0


# --- kept tensors


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_keep_dtype(dtype: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    kind = getattr(torch, dtype)
    config = QuantizationConfig(gptq=False, keep_dtype=dtype)
    model: Any = quantize(tiny_dit(), config)
    exact = tiny_dit().state_dict()
    for name, tensor in model.state_dict().items():
        if name in exact:  # not a quantized weight
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, exact[name].to(kind).float())
    save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    for name, tensor in stored.items():
        owner, _, last = name.rpartition(".")
        if owner not in quantized_layers(model) or last == "bias":
            assert tensor.dtype == kind
        elif last.endswith("scale"):
            assert tensor.dtype == torch.float32
    reloaded = load(tmp_path / "out")
    assert state_hash(reloaded) == state_hash(model)
    assert torch.equal(predicted(reloaded), predicted(model))


def test_keep_dtype_halves_what_is_kept(tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        config = QuantizationConfig(gptq=False, keep_dtype=dtype)
        model = quantize(tiny_dit(), config)
        save(model, tmp_path / dtype)
        sizes[dtype] = (tmp_path / dtype / "diffusion_pytorch_model.safetensors").stat().st_size
    quantized = sum(layer.storage_bytes for layer in quantized_layers(model).values())
    kept = 4 * sum(t.numel() for n, t in model.state_dict().items() if n in tiny_dit().state_dict())
    # Headers have the size of a few names; equal tensors are stored once.
    assert abs((sizes["float32"] - sizes["bfloat16"]) - kept / 2) < 0.02 * kept
    assert sizes["float32"] < kept + quantized + 20_000


def test_numbers_that_the_kept_dtype_cannot_hold() -> None:
    model = tiny_dit()
    model.proj_out_1.weight.data[0, 0] = 1e6  # float16 ends at 65504
    before = state_hash(model)
    with pytest.raises(NumericsError) as info:
        quantize(model, QuantizationConfig(gptq=False, keep_dtype="float16"))
    require_complete(info.value, "proj_out_1.weight", "float16", "--keep-dtype")
    assert state_hash(model) == before
    quantize(model, QuantizationConfig(gptq=False, keep_dtype="bfloat16"))


def test_source_dtypes_are_kept(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tiny_dit().to(torch.float16).save_pretrained(tmp_path / "source")
    model: Any = quantize(hqdit.load(tmp_path / "source"), QuantizationConfig(gptq=False, fold_value_rotation=True))
    save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")
    assert stored["proj_out_1.weight"].dtype == torch.float16
    assert stored["transformer_blocks.0.attn1.to_v.bias"].dtype == torch.float16
    assert state_hash(load(tmp_path / "out")) == state_hash(model)
    assert torch.equal(predicted(load(tmp_path / "out")), predicted(model))


# --- determinism


def test_two_runs_are_byte_identical(tmp_path: Path) -> None:
    for name in ("a", "b"):
        torch.manual_seed(ord(name))  # the global state must not matter
        config = QuantizationConfig(fold_value_rotation=True, act_order=True)
        save(quantize(tiny_dit(), config, calibration()), tmp_path / name)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    other = quantize(tiny_dit(), QuantizationConfig(fold_value_rotation=True, act_order=True, seed=1), calibration())
    assert state_hash(other) != state_hash(load(tmp_path / "a"))


# --- what is refused


def test_missing_calibration() -> None:
    for config in (QuantizationConfig(), QuantizationConfig(gptq=False, activation_granularity="tensor")):
        model = tiny_dit()
        with pytest.raises(UsageError) as info:
            quantize(model, config)
        require_complete(info.value, "calibration")
        assert state_hash(model) == state_hash(tiny_dit())
    with pytest.raises(UsageError):
        quantize(tiny_dit())  # the default is the preset hqdit


def test_unneeded_calibration_is_ignored() -> None:
    config = QuantizationConfig.preset("minmax")
    with_data, without = quantize(tiny_dit(), config, calibration()), quantize(tiny_dit(), config)
    assert state_hash(with_data) == state_hash(without)
    assert with_data.quantization_record.calibration == {}  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UsageError) as info:
        quantize(tiny_dit().to(dtype), QuantizationConfig.preset("minmax"))
    require_complete(info.value, str(dtype), "float32", "pos_embed.proj.weight")


def test_quantizing_twice() -> None:
    config = QuantizationConfig.preset("minmax").replace(include=("*.1.ff.net.2",))
    model = quantize(tiny_dit(), config)
    before = state_hash(model)
    for again in (QuantizationConfig.preset("minmax"), config.replace(include=("*to_q",))):
        with pytest.raises(CheckpointError) as info:
            quantize(model, again)
        assert info.value.exit_code == 3
        require_complete(info.value, "transformer_blocks.1.ff.net.2", "already quantized")
    assert state_hash(model) == before


def test_models_in_training_mode_are_refused() -> None:
    # Training mode drops class labels and would calibrate on noise.
    model = tiny_dit().train()
    before = state_hash(model)
    with pytest.raises(UsageError) as info:
        quantize(model, QuantizationConfig.preset("minmax"))
    require_complete(info.value, "model.eval()")
    assert state_hash(model) == before


def test_unknown_architectures() -> None:
    with pytest.raises(CheckpointError) as info:
        quantize(nn.Sequential(nn.Linear(8, 8)), QuantizationConfig.preset("minmax"))
    require_complete(info.value, "Sequential")


def test_calibration_of_another_model() -> None:
    model = tiny_dit()
    with pytest.raises(NumericsError) as info:
        quantize(model, QuantizationConfig(), random_calibration(latent_dit(), 4))
    require_complete(info.value, "latents")
    assert state_hash(model) == state_hash(tiny_dit())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "options", [{}, {"gptq": False}, {"rotation": "none", "gptq": False}, {"rotation": "none"}], ids=str
)
def test_non_finite_weights(bad: float, options: dict[str, Any]) -> None:
    model = tiny_dit()
    model.transformer_blocks[1].attn1.to_v.weight.data[5, 6] = bad
    with pytest.raises(NumericsError) as info:
        quantize(model, QuantizationConfig(**options), random_calibration(model, 8))
    assert info.value.exit_code == 4
    require_complete(info.value)


def test_calibration_that_overflows_the_model() -> None:
    # Finite latents, but what they become is not: caught in the Hessian, not rounded to something.
    data = inputs_of(tiny_dit(), 8)
    data["latents"] *= 1e38
    model: Any = tiny_dit()
    model.pos_embed.proj.weight.data *= 1e3
    with pytest.raises(NumericsError) as info:
        quantize(model, QuantizationConfig(), hqdit.CalibrationSet(**data))
    assert info.value.exit_code == 4
    require_complete(info.value, "layer transformer_blocks.0.attn1.to_q")


def test_one_calibration_sample_is_enough() -> None:
    model: Any = tiny_dit()
    exact = predicted(model)
    quantize(model, QuantizationConfig(), random_calibration(model, 1))
    facts = model.quantization_record.layers
    assert model.quantization_record.calibration["samples"] == 1
    assert all(entry["error"] <= entry["error_nearest"] for entry in facts.values())
    assert sqnr_db(exact, predicted(model)) > 4.0


def test_format_choice_and_statistic_are_recorded() -> None:
    model = tiny_dit()
    with torch.no_grad():  # three shapes of distributions in the three layers of one group's block
        flat = model.transformer_blocks[0].ff.net[0].proj.weight
        flat.copy_(
            torch.sign(flat) * (0.75 + 0.25 * torch.rand(flat.shape, generator=torch.Generator().manual_seed(0)))
        )
        heavy = model.transformer_blocks[0].ff.net[2].weight
        heavy.copy_(heavy.double().mul(3 / heavy.abs().max()).pow(9).float())
    quantized: Any = quantize(model, QuantizationConfig(gptq=False, rotation="none"))
    facts, layers = quantized.quantization_record.layers, quantized_layers(quantized)
    fc1, fc2, to_q = (f"transformer_blocks.0.{name}" for name in ("ff.net.0.proj", "ff.net.2", "attn1.to_q"))
    assert layers[fc1].spec.weight.formats == (E1M2,) and facts[fc1]["statistic"] < 7
    assert layers[fc2].spec.weight.formats == (E3M0,) and facts[fc2]["statistic"] > 64
    assert layers[to_q].spec.weight.formats[0] in (E1M2, E2M1) and 3 < facts[to_q]["statistic"] < 12
    assert adapter_for(model).num_classes(model) == CLASSES
