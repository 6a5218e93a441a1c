"""DiT's own sampler against the formulas in exact or float64 arithmetic, and against a case with a closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import CLASSES, ddim, latent_dit, require_complete, tiny_dit, tiny_vae
from torch import Tensor, nn

import hqdit.sampling.sampler as sampler
from hqdit.errors import CheckpointError, HQDiTError, NumericsError, UsageError
from hqdit.models.adapter import adapter_for
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize
from hqdit.sampling.ddpm_original import AncestralSchedule, respaced_timesteps, training_betas
from hqdit.sampling.noise import EVALUATION, SAMPLE, starting_noise, step_noise
from hqdit.sampling.sampler import (
    DDPM_ORIGINAL,
    SamplingConfig,
    decode_images,
    generate_images,
    sample_ancestral,
    sample_latents,
)

BETAS = training_betas(ddim())
LATENT = (4, 8, 8)


def refused(call: Callable[[], object], error: type[HQDiTError], *parts: str) -> None:
    with pytest.raises(error) as info:
        call()
    require_complete(info.value, *parts)


# --- which steps, and their variances


def test_the_training_variances_are_those_of_the_paper() -> None:
    exact = [Fraction(1, 10_000) + Fraction(199, 10_000) * k / 999 for k in range(1000)]
    # linspace rounds a product and a sum: two halves of an ulp.
    np.testing.assert_allclose(BETAS, [float(beta) for beta in exact], rtol=2.0**-52, atol=0)
    # diffusers holds the same numbers in float32.
    np.testing.assert_allclose(BETAS, ddim().betas.double().numpy(), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"beta_schedule": "scaled_linear"}, "scaled_linear"),
        ({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"),
        ({"trained_betas": [0.1, 0.2]}, "variances"),
        ({"prediction_type": "v_prediction"}, "v_prediction"),
        ({"rescale_betas_zero_snr": True}, "rescaled"),
    ],
)
def test_other_diffusion_processes_are_refused(options: dict[str, Any], found: str) -> None:
    refused(lambda: training_betas(ddim(**options)), CheckpointError, found, "--sampler scheduler")


def test_250_of_1000_steps() -> None:
    steps = respaced_timesteps(1000, 250)
    assert len(steps) == 250 and (steps[0], steps[-1]) == (0, 999)
    # 999 / 249 = 4 + 3/249: every 83rd gap is a step wider, and the first eight follow from 4.012 k.
    assert steps[:8] == [0, 4, 8, 12, 16, 20, 24, 28]
    gaps = np.diff(steps)
    assert gaps.min() == 4 and gaps.max() == 5 and int((gaps == 5).sum()) == 999 - 4 * 249
    # An even spacing is nowhere more than half a step away.
    assert max(abs(step - 999 * k / 249) for k, step in enumerate(steps)) <= 0.5


def test_every_step_is_no_respacing() -> None:
    assert respaced_timesteps(1000, 1000) == list(range(1000))
    schedule = AncestralSchedule.respaced(BETAS, 1000)
    # 1 - abar_k / abar_(k-1) is beta_k again, up to what the division of numbers near 1 cancels.
    np.testing.assert_allclose(schedule.betas, BETAS, rtol=0, atol=4 * 2.0**-53)


@given(train=st.integers(2, 1200), data=st.data())
def test_steps_are_ascending_and_evenly_spaced(train: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, train))
    steps = respaced_timesteps(train, count)
    assert len(set(steps)) == count and steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, train - 1)
    for k, step in enumerate(steps):
        assert abs(Fraction(step) - Fraction((train - 1) * k, count - 1)) <= Fraction(1, 2)


def test_halves_go_to_the_even_step() -> None:
    assert respaced_timesteps(1000, 3) == [0, 500, 999]  # 499.5
    assert respaced_timesteps(4, 3) == [0, 2, 3]  # 1.5


@pytest.mark.parametrize("steps", [0, 1, 1001])
def test_steps_out_of_range(steps: int) -> None:
    refused(lambda: respaced_timesteps(1000, steps), UsageError, "--steps", str(steps), "2 to 1000")


@pytest.mark.parametrize("steps", [2, 10, 250, 1000])
def test_respaced_variances(steps: int) -> None:
    """From the definition of the process: what is left between two visited steps."""
    schedule = AncestralSchedule.respaced(BETAS, steps)
    visited = respaced_timesteps(1000, steps)
    assert list(schedule.timesteps) == visited
    before, start = 1.0, 0
    for k, step in enumerate(visited):
        # The signal's share between two visited steps is the product of the alphas between them.
        alpha = math.prod(1.0 - beta for beta in BETAS[start : step + 1].tolist())
        kept = before * alpha
        # A thousand factors, each rounded once.
        assert schedule.alphas_cumprod[k] == pytest.approx(kept, rel=1e-9)
        assert schedule.betas[k] == pytest.approx(1 - alpha, rel=1e-9, abs=1e-12)
        posterior = (1 - alpha) * (1 - before) / (1 - kept)
        assert schedule.posterior_variances[k] == pytest.approx(posterior, rel=1e-9, abs=1e-12)
        before, start = kept, step + 1
    assert schedule.posterior_variances[0] == 0


# --- one step


def posterior(kept: float, before: float, noisy: np.ndarray, image: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean and variance of the earlier latents given the later ones and the image, by Bayes' rule on Gaussians.

    A priori x_(k-1) ~ N(sqrt(before) image, 1 - before), and x_k given it ~ N(sqrt(alpha) x_(k-1), 1 - alpha).
    """
    alpha = kept / before
    precision = 1 / (1 - before) + alpha / (1 - alpha)
    weighted = math.sqrt(before) * image / (1 - before) + math.sqrt(alpha) * noisy / (1 - alpha)
    return weighted / precision, 1 / precision


@pytest.mark.parametrize("steps", [3, 50, 250, 1000])
def test_a_step_is_bayes_rule(steps: int) -> None:
    schedule = AncestralSchedule.respaced(BETAS, steps)
    random = np.random.default_rng(steps)
    for index in sorted({1, 2, steps // 2, steps - 1}):
        kept, before = schedule.alphas_cumprod[index], schedule.alphas_cumprod[index - 1]
        image, noise, fresh = random.standard_normal((3, 64))
        noisy = math.sqrt(kept) * image + math.sqrt(1 - kept) * noise
        mean, least = posterior(kept, before, noisy, image)
        for place, variance in ((-1.0, least), (1.0, 1 - kept / before), (0.0, math.sqrt(least * (1 - kept / before)))):
            found = schedule.step(
                index,
                *(torch.from_numpy(part) for part in (noisy, noise)),
                torch.full((64,), place, dtype=torch.float64),
                torch.from_numpy(fresh),
            )
            np.testing.assert_allclose(found.numpy(), mean + math.sqrt(variance) * fresh, rtol=0, atol=1e-9)


def test_the_variance_goes_on_beyond_its_bounds() -> None:
    schedule = AncestralSchedule.respaced(BETAS, 250)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    log_ratio = math.log(schedule.betas[100] / schedule.posterior_variances[100])
    deviation = {place: float(schedule.step(100, zero, zero, place * one, one)) for place in (-3.0, -1.0, 3.0)}
    assert math.log(deviation[-3.0] / deviation[-1.0]) == pytest.approx(-0.5 * log_ratio, rel=1e-9)
    assert math.log(deviation[3.0] / deviation[-1.0]) == pytest.approx(0.5 * 2 * log_ratio, rel=1e-9)


def test_the_last_step_is_the_predicted_image() -> None:
    schedule = AncestralSchedule.respaced(BETAS, 250)
    image, noise = torch.randn(2, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = schedule.alphas_cumprod[0]
    noisy = math.sqrt(kept) * image + math.sqrt(1 - kept) * noise
    found = schedule.step(0, noisy, noise, torch.full_like(noise, torch.nan), None)
    torch.testing.assert_close(found, image, rtol=0, atol=1e-12)


def test_diffusers_takes_the_same_step_on_consecutive_time_steps() -> None:
    """Its DDPMScheduler with a learned range, where no steps are left out and float32 is not the limit."""
    theirs = diffusers.DDPMScheduler(
        beta_start=1e-4, beta_end=0.02, variance_type="learned_range", clip_sample=False, timestep_spacing="leading"
    )
    theirs.set_timesteps(1000)
    schedule = AncestralSchedule.respaced(BETAS, 1000)
    random = torch.Generator().manual_seed(1)
    latents, noise, fresh = torch.randn(3, 2, 4, 8, 8, generator=random)
    place = 2 * torch.rand(2, 4, 8, 8, generator=random) - 1
    for index in (1, 400, 999):
        seeded = torch.Generator().manual_seed(index)
        fresh = torch.randn(latents.shape, generator=torch.Generator().manual_seed(index))
        expected = theirs.step(torch.cat([noise, place], 1), index, latents, generator=seeded).prev_sample
        found = schedule.step(index, latents, noise, place, fresh)
        # Their products of up to a thousand float32 alphas are off by that many ulps at most.
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=1000 * 2.0**-24 * scale)


# --- the loop


class GaussianModel(nn.Module):
    """The exact noise prediction for data ~ N(mean, variance) in each channel, in the place of a network.

    E[eps | x_t] = sqrt(1 - abar) (x_t - sqrt(abar) mean) / (abar variance + 1 - abar).
    """

    def __init__(self, mean: Tensor, variance: Tensor, place: float) -> None:
        super().__init__()
        self.mean, self.variance = mean.view(1, -1, 1, 1), variance.view(1, -1, 1, 1)
        self.place = place
        self.kept = torch.from_numpy(np.cumprod(1.0 - BETAS))
        self.anchor = nn.Parameter(torch.zeros(1))


class GaussianAdapter:
    """What the sampler asks of an adapter, for `GaussianModel`."""

    def predict_noise_and_variance(
        self, model: Any, latents: Tensor, timesteps: Tensor, classes: Tensor
    ) -> tuple[Tensor, Tensor]:
        kept = model.kept[timesteps].view(-1, 1, 1, 1)
        noise = (1 - kept).sqrt() * (latents - kept.sqrt() * model.mean) / (kept * model.variance + 1 - kept)
        return noise.to(latents.dtype), torch.full_like(latents, model.place)


def closed_form(steps: int, mean: float, variance: float, place: float) -> tuple[float, float]:
    """Mean and variance of what comes out, by following both through the linear steps in float64."""
    schedule = AncestralSchedule.respaced(BETAS, steps)
    m, v = 0.0, 1.0  # the starting noise
    for index in range(steps - 1, -1, -1):
        kept = float(schedule.alphas_cumprod[index])
        before = float(schedule.alphas_cumprod[index - 1]) if index else 1.0
        beta = 1 - kept / before
        total = kept * variance + 1 - kept
        # Expected image: mean + sqrt(kept) variance / total (x - sqrt(kept) mean); then the posterior's mean.
        of_image, of_x = beta * math.sqrt(before) / (1 - kept), math.sqrt(kept / before) * (1 - before) / (1 - kept)
        slope = of_image * math.sqrt(kept) * variance / total + of_x
        offset = of_image * mean * (1 - kept * variance / total)
        added = 0.0
        if index:
            least = beta * (1 - before) / (1 - kept)
            added = math.exp((1 + place) / 2 * math.log(beta) + (1 - place) / 2 * math.log(least))
        m, v = slope * m + offset, slope**2 * v + added
    return m, v


@pytest.mark.parametrize("place", [-1.0, 0.5, 1.0])
def test_moments_for_gaussian_data(monkeypatch: pytest.MonkeyPatch, place: float) -> None:
    mean, variance = torch.tensor([0.0, 1.5, -0.7]), torch.tensor([1.0, 0.25, 2.0])
    model = GaussianModel(mean, variance, place)
    monkeypatch.setattr(sampler, "class_conditional_adapter", lambda _: GaussianAdapter())
    shape, samples = (3, 64, 64), 4
    noise = starting_noise(0, SAMPLE, range(samples), shape)
    found = sample_ancestral(
        model,
        ddim(),
        noise,
        torch.zeros(samples).long(),
        SamplingConfig(50, 1.0, DDPM_ORIGINAL),
        lambda step: step_noise(0, SAMPLE, range(samples), step, shape),
    ).double()
    n = samples * 64 * 64
    for channel in range(3):
        m, v = closed_form(50, float(mean[channel]), float(variance[channel]), place)
        values = found[:, channel]
        # Five standard errors of the mean and of the variance of n Gaussian numbers, a chance of 6e-7 each.
        assert abs(float(values.mean()) - m) < 5 * math.sqrt(v / n)
        assert abs(float((values - m).square().mean()) / v - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("variance", [0.25, 1.0, 2.0])
def test_many_steps_give_the_data_back(variance: float) -> None:
    """The closed form itself: with the exact prediction, 1000 steps end at the data's mean and variance."""
    m, v = closed_form(1000, 1.5, variance, 1.0)
    assert (m, v) == (pytest.approx(1.5, rel=1e-2), pytest.approx(variance, rel=2e-2))


def test_guidance_covers_three_channels() -> None:
    model, guidance = latent_dit(), 4.0
    latents = starting_noise(0, SAMPLE, range(2), LATENT)
    times, classes = torch.tensor([700, 30]), torch.tensor([1, 4])
    with torch.no_grad():
        found = sampler._predict_as_original(model, latents, times, classes, guidance)
        null = torch.full_like(classes, CLASSES)
        with_class, without = (model(latents, timestep=times, class_labels=c).sample for c in (classes, null))
    expected = with_class[:, :4].clone()
    expected[:, :3] = without[:, :3] + guidance * (with_class[:, :3] - without[:, :3])
    for part, whole in ((found[0], expected), (found[1], with_class[:, 4:])):
        # One batch of four against two of two: the products may add in another order.
        torch.testing.assert_close(part, whole, rtol=0, atol=1e-4)
    assert float((with_class[:, 3] - without[:, 3]).abs().max()) > 1e-2


def test_without_guidance_the_model_runs_once_per_step() -> None:
    model = latent_dit()
    batches: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda _m, args, kwargs: batches.append((len(args[0]), int(kwargs["timestep"][0]))), with_kwargs=True
    )
    generate_images(model, ddim(), None, [0, 1, 2], SamplingConfig(4, 1.0, DDPM_ORIGINAL))
    assert batches == [(3, 999), (3, 666), (3, 333), (3, 0)]
    batches.clear()
    generate_images(model, ddim(), None, [0, 1, 2], SamplingConfig(4, 1.5, DDPM_ORIGINAL))
    assert [count for count, _ in batches] == [6] * 4


def test_images_follow_a_loop_written_out() -> None:
    """The whole thing in float64 from the formulas, with the same model, starting noise and step noise."""
    model, guidance, steps = latent_dit(), 1.5, 6
    classes = torch.tensor([0, 3])
    x = starting_noise(5, EVALUATION, range(2), LATENT).double()
    visited = respaced_timesteps(1000, steps)
    kept = np.cumprod(1 - BETAS)[visited]
    for step, k in enumerate(reversed(range(steps))):
        before = kept[k - 1] if k else 1.0
        beta = 1 - kept[k] / before
        times = torch.full((2,), visited[k])
        with torch.no_grad():
            c, u = (
                model(x.float(), timestep=times, class_labels=labels).sample.double()
                for labels in (classes, torch.full_like(classes, CLASSES))
            )
        eps = c[:, :4].clone()
        eps[:, :3] = u[:, :3] + guidance * (c[:, :3] - u[:, :3])
        image = (x - math.sqrt(1 - kept[k]) * eps) / math.sqrt(kept[k])
        x = (beta * math.sqrt(before) * image + (1 - before) * math.sqrt(1 - beta) * x) / (1 - kept[k])
        if k:
            share = (c[:, 4:] + 1) / 2
            log_variance = share * math.log(beta) + (1 - share) * math.log(beta * (1 - before) / (1 - kept[k]))
            x = x + torch.exp(log_variance / 2) * step_noise(5, EVALUATION, range(2), step, LATENT).double()
    found = generate_images(
        model, ddim(), tiny_vae(), [0, 3], SamplingConfig(steps, guidance, DDPM_ORIGINAL), 5, EVALUATION
    )
    # Six float32 steps; the first multiplies what it rounds by 1 / sqrt(4e-5).
    torch.testing.assert_close(found, decode_images(x.float(), tiny_vae()), rtol=0, atol=1e-3)


# --- noise


def test_images_do_not_depend_on_the_batch() -> None:
    model, labels = latent_dit(), [0, 1, 2, 3, 4]
    config = SamplingConfig(4, 1.5, DDPM_ORIGINAL)
    whole = generate_images(model, ddim(), tiny_vae(), labels, config, seed=5)
    for batch_size in (1, 2, 5):
        split = generate_images(model, ddim(), tiny_vae(), labels, config, seed=5, batch_size=batch_size)
        torch.testing.assert_close(split, whole, rtol=0, atol=1e-3)  # products may add in another order
    assert torch.equal(generate_images(model, ddim(), tiny_vae(), labels, config, seed=5), whole)
    for other in (
        generate_images(model, ddim(), tiny_vae(), labels, config, seed=6),
        generate_images(model, ddim(), tiny_vae(), labels, config, 5, EVALUATION),
    ):
        assert float((other - whole).abs().max()) > 0.01


def test_step_noise_is_a_function_of_seed_purpose_number_and_step() -> None:
    whole = step_noise(3, SAMPLE, range(6), 7, LATENT)
    assert whole.dtype == torch.float32 and whole.shape == (6, *LATENT)
    assert torch.equal(torch.cat([step_noise(3, SAMPLE, [i], 7, LATENT) for i in range(6)]), whole)
    others = [
        step_noise(3, SAMPLE, range(6), 8, LATENT),
        step_noise(4, SAMPLE, range(6), 7, LATENT),
        step_noise(3, EVALUATION, range(6), 7, LATENT),
        starting_noise(3, SAMPLE, range(6), LATENT),
    ]
    for other in others:
        # Uncorrelated: 1536 products of standard normal numbers.
        assert abs(float((other * whole).mean())) < 5 / math.sqrt(whole.numel())


# --- what is refused


def test_another_sampler_is_refused() -> None:
    refused(lambda: SamplingConfig(sampler="ddpm"), UsageError, "--sampler", "'ddpm'", "ddpm-original")


def test_a_model_without_a_learned_variance_is_refused() -> None:
    config = SamplingConfig(4, 1.5, DDPM_ORIGINAL)
    call = lambda: generate_images(tiny_dit(), ddim(), None, [0], config)  # noqa: E731
    refused(call, UsageError, "learned variance", "--sampler scheduler")


def test_an_adapter_that_knows_of_no_variance_refuses() -> None:
    adapter = adapter_for(tiny_dit())
    call = lambda: super(type(adapter), adapter).predict_noise_and_variance(  # noqa: E731
        nn.Identity(), torch.zeros(1, *LATENT), torch.zeros(1).long(), torch.zeros(1).long()
    )
    refused(call, UsageError, "learned variance", "Identity")


def test_trajectories_of_the_scheduler_stay_those_of_the_scheduler() -> None:
    noise = starting_noise(0, SAMPLE, [0], LATENT)
    config = SamplingConfig(4, 1.5, DDPM_ORIGINAL)
    call = lambda: sample_latents(latent_dit(), ddim(), noise, torch.tensor([0]), config)  # noqa: E731
    refused(call, UsageError, "--sampler", "ddpm-original")


def test_a_scheduler_that_draws_noise_is_fine() -> None:
    config = SamplingConfig(3, 1.0, DDPM_ORIGINAL)
    noisy = diffusers.DDPMScheduler(beta_start=1e-4, beta_end=0.02)
    images = [generate_images(latent_dit(), which, None, [0], config) for which in (noisy, ddim())]
    assert torch.equal(*images)


def test_non_finite_latents_name_the_step() -> None:
    model, calls = latent_dit(), []

    def poison(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        calls.append(None)
        return torch.full_like(output, torch.nan) if len(calls) == 3 else output

    model.proj_out_2.register_forward_hook(poison)
    call = lambda: generate_images(model, ddim(), None, [0], SamplingConfig(4, 1.5, DDPM_ORIGINAL))  # noqa: E731
    refused(call, NumericsError, "step 2 ", "time step 333")
    assert len(calls) == 3


def test_a_quantized_model_keeps_its_variance() -> None:
    model = quantize(latent_dit(), QuantizationConfig.preset("minmax"))
    found = generate_images(model, ddim(), tiny_vae(), [0, 4], SamplingConfig(4, 1.5, DDPM_ORIGINAL))
    assert found.shape == (2, 3, 16, 16) and bool(torch.isfinite(found).all())
    assert float(found.std()) > 0
