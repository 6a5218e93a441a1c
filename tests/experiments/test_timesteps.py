"""`timesteps`: the arithmetic of guidance and accumulation by other means, and the record."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from tiny import ddim, require_complete, tiny_dit

from hqdit.errors import CheckpointError
from hqdit.experiments import timesteps
from hqdit.experiments.timesteps import amplification, correlation
from hqdit.experiments.trajectory_errors import (
    branch_powers,
    error_powers,
    sampler_powers,
    step_coefficients,
    trajectory_powers,
)
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize
from hqdit.sampling.sampler import SamplingConfig, sample_latents


@pytest.fixture(scope="module")
def exact():
    return tiny_dit()


@pytest.fixture(scope="module")
def quantized(exact):
    return quantize(copy.deepcopy(exact), QuantizationConfig(gptq=False))


@pytest.fixture(scope="module")
def start():
    return torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(4)


@given(st.floats(1.0, 8.0), st.floats(-1.0, 1.0))
def test_amplification_is_the_variance_of_the_guided_error(guidance, rho):
    weights = np.array([guidance, 1 - guidance])
    covariance = np.array([[1.0, rho], [rho, 1.0]])
    assert amplification(guidance, rho) == pytest.approx(weights @ covariance @ weights, abs=1e-9)


def test_amplification_by_hand():
    assert amplification(1.0, 0.3) == 1.0  # guidance 1 is the conditional branch
    assert amplification(4.0, 1.0) == 1.0  # equal errors pass unchanged
    assert 10 * math.log10(amplification(4.0, 0.0)) == pytest.approx(13.98, abs=0.01)


def test_correlation_is_that_of_the_centred_second_moments():
    stream = np.random.default_rng(0)
    a = stream.standard_normal(1000)
    b = 0.6 * a + 0.8 * stream.standard_normal(1000)
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert correlation(a**2, b**2, a * b) == pytest.approx(expected, rel=1e-12)


def test_coefficients_are_those_of_ddim():
    scheduler = ddim()
    found = step_coefficients(scheduler, 4)
    cumulative = scheduler.alphas_cumprod.double()
    times = [750, 500, 250, 0]
    for (a, b), now, then in zip(found, times, [500, 250, 0, None], strict=True):
        alpha, following = float(cumulative[now]), 1.0 if then is None else float(cumulative[then])
        root = math.sqrt(following / alpha)
        assert a == pytest.approx(root, rel=1e-5)
        assert b == pytest.approx(math.sqrt(1 - following) - root * math.sqrt(1 - alpha), abs=1e-5 * root)


def test_a_scheduler_that_clips_is_refused():
    with pytest.raises(CheckpointError) as caught:
        step_coefficients(DDIMScheduler(clip_sample=True), 4)
    require_complete(caught.value, "DDIMScheduler")


def test_sampler_powers_add_the_powers_of_separate_errors():
    coefficients = [(1.5, -0.5), (2.0, 0.25), (0.5, 3.0)]
    local = np.array([[1.0, 4.0], [9.0, 0.0], [0.25, 1.0]])
    expected = np.zeros((4, 2))
    for source, power in enumerate(local):
        gain = 1.0
        for step in range(source, 3):
            gain *= coefficients[step][1] ** 2 if step == source else coefficients[step][0] ** 2
            expected[step + 1] += gain * power
    assert sampler_powers(coefficients, local) == pytest.approx(expected, rel=1e-12)


def test_trajectories_are_those_of_the_sampler(exact, quantized, start):
    noise, classes = start
    powers = trajectory_powers(exact, quantized, ddim(), noise, classes, 3, 1.5)
    finals = [sample_latents(m, ddim(), noise, classes, SamplingConfig(3, 1.5)) for m in (exact, quantized)]
    assert powers["signal"][-1] == pytest.approx(error_powers(finals[0]), rel=1e-12)
    assert powers["error"][-1] == pytest.approx(error_powers(finals[1], finals[0]), rel=1e-12)
    assert np.all(powers["error"][0] == 0)


def test_a_single_step_is_its_own_error(exact, quantized, start):
    powers = trajectory_powers(exact, quantized, ddim(), *start, 1, 1.5)
    # One error and nobody to react to it: measured, added and carried by the sampler are the same number.
    assert powers["independent"][1] == pytest.approx(powers["error"][1], rel=1e-12)
    assert powers["sampler"][1] == pytest.approx(powers["error"][1], rel=1e-3)


def test_each_term_is_the_error_of_one_quantized_step(exact, quantized, start):
    noise, classes = start
    powers = trajectory_powers(exact, quantized, ddim(), noise, classes, 3, 4.0)
    assert powers["final_by_step"].sum(axis=0) == pytest.approx(powers["independent"][-1], rel=1e-12)

    calls = []

    def switching(step):
        """A model that predicts with the quantized one at `step` only."""

        def forward(latents, timestep, class_labels):
            calls.append(int(timestep[0]))
            chosen = quantized if int(timestep[0]) == [666, 333, 0][step] else exact
            return chosen(latents, timestep=timestep, class_labels=class_labels)

        model = copy.deepcopy(exact)
        model.forward = forward
        return model

    reference = sample_latents(exact, ddim(), noise, classes, SamplingConfig(3, 4.0))
    for step in range(3):
        found = sample_latents(switching(step), ddim(), noise, classes, SamplingConfig(3, 4.0))
        # Batches of another size round float32 products differently.
        assert powers["final_by_step"][step] == pytest.approx(error_powers(found, reference), rel=1e-2)
    assert set(calls) == {666, 333, 0}


def test_a_model_without_error_has_none(exact, start):
    powers = trajectory_powers(exact, exact, ddim(), *start, 2, 1.5)
    assert np.all(powers["error"] == 0) and np.all(powers["sampler"] == 0)


def test_guided_errors_follow_from_the_branches(exact, quantized, start):
    noise, classes = start
    inputs = SimpleNamespace(timesteps=(400,), latents=(noise,), classes=classes)
    powers = branch_powers(exact, quantized, inputs, (4.0,))
    s = 4.0
    expected = (
        s**2 * powers["conditional"] + (s - 1) ** 2 * powers["unconditional"] - 2 * s * (s - 1) * powers["product"]
    )
    assert powers["guided 4"] == pytest.approx(expected, rel=1e-3)  # float32 predictions of which one is subtracted


def test_the_record(lab, tiny_subject, monkeypatch, require_whole):
    monkeypatch.setattr(timesteps, "SUBJECTS", (tiny_subject,))
    monkeypatch.setattr(timesteps, "TRAJECTORIES", 4)
    record = timesteps.run(lab)
    require_whole(record, "timesteps")
    final, guidance = record.tables
    assert len(final.rows) == len(guidance.rows) == 2
    for row in guidance.rows:
        _, s, rho, measured, formula, plain, before, after = row
        assert formula == pytest.approx(10 * math.log10(amplification(s, rho.value)))
        assert plain == pytest.approx(10 * math.log10(s**2 + (s - 1) ** 2))
        assert measured.low <= measured.value <= measured.high and before.value > 0 and after.value > -20
    assert any("Accumulation" in answer for answer in record.answers)
    heatmap = record.figures[0]
    assert (heatmap.x_label, heatmap.y_label) == ("time step, in the order of sampling", "block")
    again = timesteps.run(lab)
    assert again.to_json() == record.to_json()
