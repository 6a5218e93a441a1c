"""Paired fidelity against straight-line recomputations on tiny models."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import tiny_dit

from hqdit.errors import NumericsError, UsageError
from hqdit.evaluation.fidelity import (
    PAIRS,
    evaluation_inputs,
    layer_fidelity,
    noise_fidelity,
    psnr_db,
    require_same_shape,
)
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize
from hqdit.sampling.noise import CALIBRATION, EVALUATION, SAMPLE, starting_noise
from hqdit.sampling.sampler import SamplingConfig

SAMPLING = SamplingConfig(steps=8, guidance=2.0)
NEAREST = QuantizationConfig(gptq=False)


@pytest.fixture(scope="module")
def exact():
    return tiny_dit()


@pytest.fixture(scope="module")
def quantized(exact):
    return quantize(copy.deepcopy(exact), NEAREST)


@pytest.fixture(scope="module")
def inputs(exact):
    return evaluation_inputs(exact, DDIMScheduler(clip_sample=False), SAMPLING, seed=5)


def sqnr(exact, approximate):
    exact, approximate = exact.double().numpy(), approximate.double().numpy()
    return 10 * math.log10((exact**2).sum() / ((approximate - exact) ** 2).sum())


def test_inputs_are_every_step_of_float_trajectories_from_evaluation_noise(exact, inputs):
    assert inputs.timesteps == (875, 750, 625, 500, 375, 250, 125, 0)
    first = starting_noise(5, EVALUATION, range(PAIRS), (1, 8, 8))
    assert torch.equal(inputs.latents[0], first)
    assert len(inputs.latents) == 8 and all(latents.shape == (PAIRS, 1, 8, 8) for latents in inputs.latents)
    for purpose in (CALIBRATION, SAMPLE):
        other = starting_noise(5, purpose, range(PAIRS), (1, 8, 8))
        assert not torch.equal(first, other) and (first - other).abs().min() > 0


def test_a_model_that_samples_in_few_steps_is_judged_at_eight(exact, inputs):
    few = evaluation_inputs(exact, DDIMScheduler(clip_sample=False), SamplingConfig(steps=3, guidance=2.0), seed=5)
    assert few.timesteps == inputs.timesteps


def test_noise_sqnr_is_the_pooled_ratio_of_each_branch(exact, quantized, inputs):
    found = noise_fidelity(exact, quantized, inputs, 2.0)
    outputs = {}
    with torch.no_grad():
        for which, model in (("exact", exact), ("quantized", quantized)):
            for branch in ("conditional", "unconditional"):
                outputs[which, branch] = torch.cat(
                    [
                        model(
                            latents,
                            timestep=torch.full((PAIRS,), timestep),
                            class_labels=inputs.classes if branch == "conditional" else torch.full((PAIRS,), 5),
                        ).sample
                        for timestep, latents in zip(inputs.timesteps, inputs.latents, strict=True)
                    ]
                )
            conditional, unconditional = outputs[which, "conditional"], outputs[which, "unconditional"]
            outputs[which, "guided"] = unconditional + 2.0 * (conditional - unconditional)
    for branch in ("conditional", "unconditional", "guided"):
        # Batches of another size round float32 products differently, which moves a ratio near 15 dB by far less.
        expected = sqnr(outputs["exact", branch], outputs["quantized", branch])
        assert getattr(found, branch) == pytest.approx(expected, abs=0.05)
    assert [timestep for timestep, _ in found.by_timestep] == list(inputs.timesteps)


def test_a_model_against_itself_is_exact(exact, inputs):
    found = noise_fidelity(exact, exact, inputs, 2.0)
    assert found.conditional == found.unconditional == found.guided == math.inf


def test_a_nan_prediction_is_refused(exact, quantized, inputs):
    broken = copy.deepcopy(quantized)
    next(iter(quantized_layers(broken).values())).weight_scale.fill_(math.nan)
    with pytest.raises(NumericsError, match="time step 875"):
        noise_fidelity(exact, broken, inputs, 2.0)


@pytest.mark.parametrize("config", [NEAREST, NEAREST.replace(fold_value_rotation=True)], ids=["plain", "folded"])
def test_layer_sqnr_judges_each_layer_alone_on_float_inputs(exact, inputs, config):
    quantized = quantize(copy.deepcopy(exact), config)
    found = layer_fidelity(exact, quantized, inputs)
    assert list(found) == list(quantized_layers(quantized))
    # A 4-bit product of well-spread rotated operands has an SQNR in this band; a basis mix-up would give about 0 dB
    # and comparing a layer with itself infinity.
    assert all(8 < value < 30 for value in found.values())

    seen = {}
    name = "transformer_blocks.1.ff.net.0.proj"
    handle = exact.get_submodule(name).register_forward_hook(
        lambda _m, args, output: seen.setdefault("pairs", []).append((args[0], output))
    )
    with torch.no_grad():
        for timestep, latents in zip(inputs.timesteps, inputs.latents, strict=True):
            exact(latents, timestep=torch.full((PAIRS,), timestep), class_labels=inputs.classes)
        handle.remove()
        layer = quantized.get_submodule(name)
        true = torch.cat([output for _, output in seen["pairs"]])
        approximate = torch.cat([layer(x) for x, _ in seen["pairs"]])
    assert found[name] == pytest.approx(sqnr(true, approximate), abs=1e-6)


def test_layer_sqnr_leaves_no_hooks(exact, quantized, inputs):
    layer_fidelity(exact, quantized, inputs)
    assert not any(module._forward_hooks for module in exact.modules())


def test_psnr_by_hand():
    exact = torch.zeros(2, 1, 2, 2)
    approximate = torch.zeros(2, 1, 2, 2)
    approximate[0] += 0.2  # mse 0.04, peak 2: 20 dB
    approximate[1] += 0.02  # 40 dB
    assert psnr_db(exact, approximate) == pytest.approx(30.0, abs=1e-5)
    assert psnr_db(exact, exact) == math.inf


def test_models_of_other_geometry_are_refused(exact):
    require_same_shape(exact, tiny_dit(seed=3))
    with pytest.raises(UsageError, match="--against"):
        require_same_shape(exact, tiny_dit(num_layers=1))
