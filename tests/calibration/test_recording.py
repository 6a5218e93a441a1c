"""Recorded calls: what a real pipeline called its transformer with, kept by seed, written and read without loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file, save_file
from tiny import (
    FLUX_STEPS,
    ddim,
    flux_arguments,
    flux_calls,
    flux_pipeline,
    latent_dit,
    random_calibration,
    require_complete,
    tiny_flux,
    tiny_vae,
)

from hqdit.calibration.recording import RecordedCalls, read_calibration
from hqdit.calibration.samples import CalibrationSet
from hqdit.errors import CheckpointError, NumericsError, UsageError
from hqdit.layers.linear import HQLinear
from hqdit.models.calls import ModelCall, map_tensors
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize


def test_every_call_is_kept_when_there_is_room() -> None:
    model = tiny_flux()
    seen: list[torch.Tensor] = []
    handle = model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    calls = RecordedCalls.from_pipeline(flux_pipeline(model), [flux_arguments(0), flux_arguments(1)], 100)
    handle.remove()
    assert len(calls) == len(seen) == 2 * FLUX_STEPS and calls.model_class == "FluxTransformer2DModel"
    for call, hidden in zip(calls.calls(model), seen, strict=True):
        assert torch.equal(call.kwargs["hidden_states"], hidden)
        assert call(model)[0].shape == hidden.shape  # a call can be made again, with everything it had
    assert not model._forward_pre_hooks
    # Time steps of both trajectories, and a noise of its own for each.
    assert len({float(call.kwargs["timestep"]) for call in calls.recorded}) == FLUX_STEPS
    assert not torch.equal(seen[0], seen[FLUX_STEPS])


def test_choice_and_noise_come_from_the_seed() -> None:
    assert flux_calls(4).fingerprint == flux_calls(4).fingerprint
    assert len({flux_calls(4, seed).fingerprint for seed in range(3)}) == 3
    every, some = flux_calls(100), flux_calls(4)
    positions = [
        next(
            place
            for place, other in enumerate(every.recorded)
            if torch.equal(other.kwargs["hidden_states"], call.kwargs["hidden_states"])
        )
        for call in some.recorded
    ]
    assert len(some) == 4 and positions == sorted(set(positions))


def test_a_given_generator_is_used() -> None:
    run = [
        RecordedCalls.from_pipeline(
            flux_pipeline(tiny_flux()), [flux_arguments(0, generator=torch.Generator().manual_seed(5))], seed=seed
        )
        for seed in (0, 1)
    ]
    first, second = (calls.recorded[0].kwargs["hidden_states"] for calls in run)
    assert torch.equal(first, second)


def test_file_round_trip(tmp_path: Path) -> None:
    calls = flux_calls(5)
    calls.save(tmp_path / "calls.safetensors")
    found = read_calibration(tmp_path / "calls.safetensors")
    assert isinstance(found, RecordedCalls)
    assert (found.fingerprint, found.model_class, found.origin) == (
        calls.fingerprint,
        calls.model_class,
        "calls.safetensors",
    )
    model = tiny_flux()
    for ours, theirs in zip(calls.calls(model), found.calls(model), strict=True):
        assert torch.equal(ours.output(model), theirs.output(model))
    calls.save(tmp_path / "again.safetensors")
    assert (tmp_path / "calls.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_nested_arguments_keep_their_kinds(tmp_path: Path) -> None:
    tensor = torch.arange(3.0)
    call = ModelCall(
        (tensor, [tensor + 1, (tensor + 2, None)]), {"a": {"b": tensor + 3, "c": "text"}, "d": True, "e": 2}
    )
    RecordedCalls((call,), "Model").save(tmp_path / "x.safetensors")
    (found,) = RecordedCalls.from_file(tmp_path / "x.safetensors").recorded
    plain = [map_tensors((c.args, dict(c.kwargs)), lambda t: t.tolist()) for c in (call, found)]  # type: ignore[arg-type,return-value]
    assert plain[0] == plain[1]


def test_both_kinds_of_files_are_told_apart(tmp_path: Path) -> None:
    random_calibration(latent_dit(), 3).save(tmp_path / "set.safetensors")
    assert isinstance(read_calibration(tmp_path / "set.safetensors"), CalibrationSet)


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b'{"calls": []}', b'{"model_class": "M", "calls": [{"args": {"tuple": [{"tensor": "x"}]}}]}']
    + [b'{"model_class": "M", "calls": [{"args": {"tuple": []}, "kwargs": {"dict": 5}}]}']
    + [b'{"model_class": "M", "calls": [{"args": 1, "kwargs": {"dict": {}}}]}', b"\xff", b"[" * 100_000],
)
def test_broken_structure(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "x.safetensors"
    flux_calls(2).save(path)
    tensors = load_file(path)
    tensors["calls.json"] = torch.frombuffer(bytearray(damage or b" "), dtype=torch.uint8)
    save_file(tensors, path)
    with pytest.raises((CheckpointError, NumericsError)) as info:
        RecordedCalls.from_file(path)
    require_complete(info.value, "x.safetensors")


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError) as info:
        RecordedCalls.from_file(tmp_path / "a.safetensors")
    require_complete(info.value, "a.safetensors")


@pytest.mark.parametrize(
    "value", [object(), {1: 2}, torch.Size([1, 2]), torch.device("cpu")], ids=lambda v: type(v).__name__
)
def test_what_cannot_be_written_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(UsageError, match=type(value).__name__):
        RecordedCalls((ModelCall((value,)),), "Model").save(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_names_with_dots_and_repeated_tensors_stay_apart(tmp_path: Path) -> None:
    one, zero = torch.ones(2), torch.zeros(2)
    calls = RecordedCalls((ModelCall((), {"a.b": one, "a": {"b": zero}}), ModelCall((one,), {"c": one})), "Model")
    calls.save(tmp_path / "x.safetensors")
    found = RecordedCalls.from_file(tmp_path / "x.safetensors")
    assert found.fingerprint == calls.fingerprint
    assert torch.equal(found.recorded[0].kwargs["a.b"], one) and torch.equal(found.recorded[0].kwargs["a"]["b"], zero)


def test_complex_numbers_have_to_be_finite() -> None:
    with pytest.raises(NumericsError, match="NaN"):
        RecordedCalls((ModelCall((torch.tensor([complex(0, torch.nan)]),)),), "Model")


def test_bad_calls_are_refused() -> None:
    with pytest.raises(NumericsError, match="no calls"):
        RecordedCalls((), "Model")
    bad = ModelCall((), {"hidden_states": torch.tensor([1.0, torch.nan])})
    with pytest.raises(NumericsError, match=r"kwargs\.hidden_states of call 1"):
        RecordedCalls((ModelCall((torch.ones(1),)), bad), "Model")
    with pytest.raises(NumericsError, match="FluxTransformer2DModel"):
        flux_calls(2).require_fits(latent_dit())
    for inputs, samples, component in (
        ([], 3, "transformer"),
        ([flux_arguments(0)], 0, "transformer"),
        ([flux_arguments(0)], 3, "vae"),
    ):
        with pytest.raises(UsageError) as info:
            RecordedCalls.from_pipeline(flux_pipeline(tiny_flux()), inputs, samples, component=component)
        require_complete(info.value, component)


def test_half_precision_calls_fit_a_float32_model() -> None:
    narrow = {key: flux_arguments(0)[key].to(torch.bfloat16) for key in ("prompt_embeds", "pooled_prompt_embeds")}
    calls = RecordedCalls.from_pipeline(flux_pipeline(tiny_flux().to(torch.bfloat16)), [flux_arguments(0, **narrow)])
    assert calls.recorded[0].kwargs["hidden_states"].dtype == torch.bfloat16
    model = tiny_flux()
    assert {tensor.dtype for call in calls.calls(model) for tensor in _floats(call)} == {torch.float32}


def _floats(call: ModelCall) -> list[torch.Tensor]:
    return [value for value in call.kwargs.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]


@pytest.mark.parametrize("smoothing", [None, 0.5])
def test_a_model_without_classes_is_quantized_with_gptq(smoothing: float | None) -> None:
    config = QuantizationConfig(smoothing=smoothing)
    model, exact, calls = tiny_flux(), tiny_flux(), flux_calls(6)
    quantize(model, config, calls)
    methods = {entry["method"] for entry in model.quantization_record.layers.values()}
    assert methods == {"gptq"}
    assert model.quantization_record.calibration["sha256"] == calls.fingerprint
    assert 0 < model.quantization_record.rotation_error <= 1e-5
    assert sum(isinstance(module, HQLinear) for module in model.modules()) == len(model.quantization_record.layers)
    for call in calls.calls(model):
        wanted, found = call.output(exact), call.output(model)
        assert float((found - wanted).norm() / wanted.norm()) < 0.5


def test_a_pipeline_of_a_class_conditional_model_is_recorded_too() -> None:
    pipeline = DiTPipeline(latent_dit(num_embeds_ada_norm=1000), tiny_vae(), ddim())
    pipeline.set_progress_bar_config(disable=True)
    inputs = [{"class_labels": [1, 2], "num_inference_steps": FLUX_STEPS, "output_type": "np"}]
    calls = RecordedCalls.from_pipeline(pipeline, inputs)
    assert len(calls) == FLUX_STEPS and calls.model_class == "DiTTransformer2DModel"
    model = quantize(latent_dit(num_embeds_ada_norm=1000), QuantizationConfig(), calls)
    assert json.dumps(model.quantization_record.calibration)
