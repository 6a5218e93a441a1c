"""Sampling against diffusers' own pipeline and loops, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from tiny import CLASSES, WIDTH, ddim, inputs_of, latent_dit, require_complete, tiny_dit, tiny_vae
from torch import Tensor, nn

from hqdit.errors import CheckpointError, HQDiTError, NumericsError, UsageError
from hqdit.models.adapter import adapter_for
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize
from hqdit.sampling.noise import CALIBRATION, EVALUATION, SAMPLE, starting_noise
from hqdit.sampling.sampler import (
    SamplingConfig,
    decode_images,
    generate_images,
    guide,
    predict_branches,
    require_classes,
    require_steps,
    sample_latents,
    to_uint8,
)

# diffusers' multistep schedulers under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def refused(call: Callable[[], object], error: type[HQDiTError], code: int, *parts: str) -> None:
    with pytest.raises(error) as info:
        call()
    assert info.value.exit_code == code
    require_complete(info.value, *parts)


def recorded(model: nn.Module) -> list[dict[str, Tensor]]:
    """Filled with the arguments of every later forward pass."""
    calls: list[dict[str, Tensor]] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        calls.append({"latents": args[0], "timesteps": kwargs["timestep"], "classes": kwargs["class_labels"]})

    model.register_forward_pre_hook(hook, with_kwargs=True)
    return calls


# --- options


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_out_of_range(steps: int) -> None:
    refused(lambda: SamplingConfig(steps=steps), UsageError, 2, "--steps", str(steps))


@pytest.mark.parametrize("guidance", [-0.1, float("nan"), float("inf"), -float("inf")])
def test_guidance_out_of_range(guidance: float) -> None:
    refused(lambda: SamplingConfig(guidance=guidance), UsageError, 2, "--guidance", str(guidance))


def test_sampling_config_accepts_its_limits() -> None:
    assert SamplingConfig(1, 0.0) == SamplingConfig(steps=1, guidance=0.0)


@pytest.mark.parametrize("label", [-1, CLASSES, 10**9])
def test_class_out_of_range(label: int) -> None:
    refused(lambda: require_classes([0, label], tiny_dit()), UsageError, 2, str(label), f"0 to {CLASSES - 1}")
    call = lambda: generate_images(tiny_dit(), ddim(), None, [0, label], SamplingConfig(1))  # noqa: E731
    refused(call, UsageError, 2, "--classes", str(label))


def test_every_class_is_accepted() -> None:
    require_classes(list(range(CLASSES)), tiny_dit())


def test_too_many_steps() -> None:
    scheduler = ddim(num_train_timesteps=20)
    require_steps(scheduler, 20)
    refused(lambda: require_steps(scheduler, 21), UsageError, 2, "--steps", "21", "20")
    noise = starting_noise(0, SAMPLE, [0], (1, 8, 8))
    call = lambda: sample_latents(tiny_dit(), scheduler, noise, torch.tensor([0]), SamplingConfig(21))  # noqa: E731
    refused(call, UsageError, 2, "--steps")


@pytest.mark.parametrize("batch_size", [0, -1])
def test_batch_size_out_of_range(batch_size: int) -> None:
    call = lambda: generate_images(tiny_dit(), ddim(), None, [0], SamplingConfig(1), batch_size=batch_size)  # noqa: E731
    refused(call, UsageError, 2, str(batch_size))


def test_no_classes() -> None:
    refused(lambda: generate_images(tiny_dit(), ddim(), None, [], SamplingConfig(1)), UsageError, 2, "--classes")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDPMScheduler", {}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("LCMScheduler", {}),
        ("TCDScheduler", {}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_scheduler_with_noise_of_its_own(name: str, options: dict[str, Any]) -> None:
    scheduler = getattr(diffusers, name)(**options)
    noise = starting_noise(0, SAMPLE, [0], (1, 8, 8))
    call = lambda: sample_latents(tiny_dit(), scheduler, noise, torch.tensor([0]), SamplingConfig(2))  # noqa: E731
    refused(call, CheckpointError, 3, name, "DDIMScheduler")


def test_scheduler_that_nobody_knows() -> None:
    class OwnScheduler(diffusers.DDIMScheduler):
        pass

    noise = starting_noise(0, SAMPLE, [0], (1, 8, 8))
    call = lambda: sample_latents(tiny_dit(), OwnScheduler(), noise, torch.tensor([0]), SamplingConfig(2))  # noqa: E731
    refused(call, CheckpointError, 3, "OwnScheduler", "DDIMScheduler")


def test_fractional_time_steps() -> None:
    # linspace(0, 999, 4) is whole, linspace(0, 999, 5) is not, and the model sees whole time steps.
    scheduler = diffusers.EulerDiscreteScheduler()
    assert generate_images(tiny_dit(), scheduler, None, [0], SamplingConfig(4)).shape == (1, 1, 8, 8)
    call = lambda: generate_images(tiny_dit(), scheduler, None, [0], SamplingConfig(5))  # noqa: E731
    refused(call, CheckpointError, 3, "EulerDiscreteScheduler", "5 steps")


# --- guidance


@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.5, 4.0])
def test_guidance_formula(guidance: float) -> None:
    random = np.random.default_rng(0)
    given_class, without = (random.standard_normal((3, 1, 8, 8)).astype(np.float32) for _ in range(2))
    found = guide(torch.from_numpy(given_class), torch.from_numpy(without), guidance)
    # eps_null + g (eps_class - eps_null), three float32 operations of half an ulp each.
    exact = without.astype(np.float64) + guidance * (given_class.astype(np.float64) - without)
    bound = 3 * 2.0**-24 * (np.abs(without) + guidance * (np.abs(given_class) + np.abs(without)))
    assert np.all(np.abs(found.double().numpy() - exact) <= bound)


def test_guidance_without_a_second_branch() -> None:
    noise = torch.randn(2, 1, 8, 8)
    assert guide(noise, None, 1.0) is noise


def test_guidance_runs_both_branches_in_one_pass() -> None:
    model = tiny_dit()
    fields = inputs_of(model, 4)
    fields["classes"] %= CLASSES
    calls = recorded(model)
    with torch.no_grad():
        conditional, unconditional = predict_branches(model, **fields, guidance=1.5)
    assert len(calls) == 1
    assert torch.equal(calls[0]["latents"], fields["latents"].repeat(2, 1, 1, 1))
    assert torch.equal(calls[0]["timesteps"], fields["timesteps"].repeat(2))
    assert calls[0]["classes"].tolist() == [*fields["classes"].tolist(), *[CLASSES] * 4]
    assert unconditional is not None and conditional.shape == unconditional.shape == fields["latents"].shape
    assert not torch.equal(conditional, unconditional)


def test_guidance_of_one_runs_the_class_alone() -> None:
    model = tiny_dit()
    fields = inputs_of(model, 4)
    calls = recorded(model)
    with torch.no_grad():
        conditional, unconditional = predict_branches(model, **fields, guidance=1.0)
        assert unconditional is None
        assert torch.equal(conditional, adapter_for(model).predict_noise(model, **fields))
    assert [len(call["latents"]) for call in calls] == [4, 4]
    calls.clear()
    generate_images(model, ddim(), None, [0, 1, 2], SamplingConfig(3, 1.0))
    assert [len(call["latents"]) for call in calls] == [3, 3, 3]
    assert all(CLASSES not in call["classes"] for call in calls)


def test_guidance_without_a_null_class() -> None:
    model = tiny_dit()
    for block in model.transformer_blocks:
        block.norm1.emb.class_embedder.embedding_table = nn.Embedding(CLASSES, WIDTH)
    call = lambda: generate_images(model, ddim(), None, [0], SamplingConfig(1, 1.5))  # noqa: E731
    refused(call, UsageError, 2, "--guidance", "1.5")
    assert generate_images(model, ddim(), None, [0], SamplingConfig(1, 1.0)).shape == (1, 1, 8, 8)


# --- trajectories


def plain_loop(model: Any, scheduler: Any, noise: Tensor, classes: Tensor, steps: int, guidance: float) -> Tensor:
    """Sampling as the documentation of diffusers writes it."""
    channels = noise.shape[1]
    scheduler.set_timesteps(steps)
    latents = noise * scheduler.init_noise_sigma
    with torch.no_grad():
        for t in scheduler.timesteps:
            inputs = scheduler.scale_model_input(torch.cat([latents, latents]), t)
            labels = torch.cat([classes, torch.full_like(classes, CLASSES)])
            output = model(inputs, timestep=t.long().expand(len(labels)), class_labels=labels).sample[:, :channels]
            with_class, without = output.chunk(2)
            latents = scheduler.step(without + guidance * (with_class - without), t, latents).prev_sample
    return latents


@pytest.mark.parametrize(
    "scheduler",
    [
        ddim(),
        ddim(timestep_spacing="trailing", rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        diffusers.DPMSolverMultistepScheduler(),
        diffusers.UniPCMultistepScheduler(),
        diffusers.PNDMScheduler(skip_prk_steps=True),
        diffusers.EulerDiscreteScheduler(timestep_spacing="leading"),
    ],
    ids=["ddim", "ddim zero snr", "dpm", "unipc", "pndm", "euler"],
)
@pytest.mark.parametrize("build", [tiny_dit, latent_dit])
def test_trajectory_is_that_of_diffusers(scheduler: Any, build: Callable[[], Any]) -> None:
    model = build()
    noise = starting_noise(3, SAMPLE, range(4), adapter_for(model).latent_shape(model))
    classes = torch.tensor([0, 1, 4, 2])
    expected = plain_loop(model, scheduler, noise, classes, 5, 1.5)
    found = sample_latents(model, scheduler, noise, classes, SamplingConfig(5, 1.5))
    assert torch.equal(found, expected)
    assert not torch.equal(found, sample_latents(model, scheduler, noise, classes, SamplingConfig(5, 1.0)))


def test_images_are_those_of_the_dit_pipeline() -> None:
    # diffusers' pipeline for DiT has the null class 1000 built in, and draws its noise from the generator.
    model, vae, scheduler = latent_dit(num_embeds_ada_norm=1000), tiny_vae(), ddim()
    labels = [3, 999, 0]
    pipeline = DiTPipeline(transformer=model, vae=vae, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        class_labels=labels,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=4,
        output_type="np",
    ).images
    noise = torch.randn((3, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    latents = sample_latents(model, scheduler, noise, torch.tensor(labels), SamplingConfig(4, 4.0))
    images = decode_images(latents, vae)
    ours = (images / 2 + 0.5).permute(0, 2, 3, 1).numpy()
    assert ours.shape == theirs.shape == (3, 16, 16, 3)
    # The pipeline multiplies by 1 / scaling_factor where we divide: an ulp in front of the autoencoder.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    assert float(theirs.std()) > 0.01


def test_observer_sees_every_step_before_it_happens() -> None:
    model, scheduler = tiny_dit(), diffusers.DPMSolverMultistepScheduler()
    noise = starting_noise(0, SAMPLE, range(2), (1, 8, 8))
    seen: list[tuple[int, int, Tensor]] = []
    sample_latents(
        model,
        scheduler,
        noise,
        torch.tensor([0, 1]),
        SamplingConfig(6, 1.0),
        lambda step, timestep, latents: seen.append((step, timestep, latents.clone())),
    )
    assert [step for step, _, _ in seen] == list(range(6))
    assert [timestep for _, timestep, _ in seen] == [int(t) for t in scheduler.timesteps]
    assert torch.equal(seen[0][2], noise * scheduler.init_noise_sigma)
    assert all(not torch.equal(a[2], b[2]) for a, b in zip(seen, seen[1:], strict=False))


def test_observer_sees_the_input_of_the_model() -> None:
    # Euler scales the latents by 1 / sqrt(sigma^2 + 1) in front of the model.
    model, seen = tiny_dit(), []
    calls = recorded(model)
    noise = starting_noise(0, SAMPLE, range(2), (1, 8, 8))
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading")
    observe = lambda _s, t, x: seen.append((t, x.clone()))  # noqa: E731
    sample_latents(model, scheduler, noise, torch.tensor([0, 1]), SamplingConfig(5, 1.0), observe)
    assert len(calls) == len(seen) == 5
    for call, (timestep, latents) in zip(calls, seen, strict=True):
        assert torch.equal(call["latents"], latents)
        assert call["timesteps"].tolist() == [timestep] * 2
    # init_noise_sigma makes the noise as large as sigma, which the scaling takes back.
    torch.testing.assert_close(seen[0][1], noise, rtol=1e-3, atol=0.0)


def test_scheduler_state_does_not_leak_into_the_next_run() -> None:
    model, scheduler = tiny_dit(), diffusers.DPMSolverMultistepScheduler()
    runs = [generate_images(model, scheduler, None, [0, 1], SamplingConfig(4), seed=9) for _ in range(2)]
    assert torch.equal(*runs)


# --- numbers that are no numbers


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 2, 4])
def test_non_finite_latents_name_the_step(bad: float, at: int) -> None:
    model, scheduler = tiny_dit(), ddim()
    calls = recorded(model)

    def poison(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        return torch.full_like(output, bad) if len(calls) == at + 1 else output

    model.proj_out_2.register_forward_hook(poison)
    scheduler.set_timesteps(5)
    timestep = int(scheduler.timesteps[at])
    call = lambda: generate_images(model, scheduler, None, [0, 1], SamplingConfig(5))  # noqa: E731
    refused(call, NumericsError, 4, f"step {at} ", f"time step {timestep}")
    assert len(calls) == at + 1


def test_one_bad_weight_in_a_quantized_model_stops_sampling() -> None:
    model: Any = quantize(tiny_dit(), QuantizationConfig.preset("minmax"))
    model.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight.data[2, 5] = torch.nan
    assert bool(torch.isfinite(generate_images(model, ddim(), None, [0, 1], SamplingConfig(2))).all())
    call = lambda: generate_images(model, ddim(), None, [0, 2], SamplingConfig(2))  # noqa: E731
    refused(call, NumericsError, 4, "step 0 ")


# --- images


def test_images_do_not_depend_on_the_batch() -> None:
    model, labels = tiny_dit(), [0, 1, 2, 3, 4, 0, 1]
    whole = generate_images(model, ddim(), None, labels, SamplingConfig(4), seed=5)
    assert whole.shape == (7, 1, 8, 8) and whole.dtype == torch.float32
    for batch_size in (1, 3, 7, 100):
        split = generate_images(model, ddim(), None, labels, SamplingConfig(4), seed=5, batch_size=batch_size)
        # The noise is the same to the bit; a matrix product may sum in another order for another batch.
        torch.testing.assert_close(split, whole, rtol=0, atol=1e-4)
    first = generate_images(model, ddim(), None, labels[:1], SamplingConfig(4), seed=5)
    torch.testing.assert_close(first, whole[:1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_batches_start_from_the_numbered_noise(batch_size: int) -> None:
    model = tiny_dit()
    calls = recorded(model)
    generate_images(model, ddim(), None, [4, 3, 2, 1, 0], SamplingConfig(1, 1.0), 7, EVALUATION, batch_size=batch_size)
    assert torch.equal(
        torch.cat([call["latents"] for call in calls]), starting_noise(7, EVALUATION, range(5), (1, 8, 8))
    )
    assert torch.cat([call["classes"] for call in calls]).tolist() == [4, 3, 2, 1, 0]


def test_seed_and_purpose_matter() -> None:
    def images(seed: int, purpose: str) -> Tensor:
        return generate_images(tiny_dit(), ddim(), None, [0], SamplingConfig(2), seed, purpose)

    found = [images(0, SAMPLE), images(1, SAMPLE), images(0, CALIBRATION), images(0, EVALUATION)]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    assert torch.equal(found[0], images(0, SAMPLE))


def test_pixels_are_clipped_at_the_end_only() -> None:
    latents = torch.tensor([[[[-7.0, -1.0], [0.25, 3.0]]]])
    assert decode_images(latents, None).tolist() == [[[[-1.0, -1.0], [0.25, 1.0]]]]
    model = tiny_dit()
    noise = starting_noise(0, SAMPLE, range(3), (1, 8, 8))
    free = sample_latents(model, ddim(), noise, torch.tensor([0, 1, 2]), SamplingConfig(3))
    assert float(free.abs().max()) > 1
    assert torch.equal(generate_images(model, ddim(), None, [0, 1, 2], SamplingConfig(3)), free.clamp(-1, 1))


def test_latents_are_decoded() -> None:
    vae, latents = tiny_vae(), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    found = decode_images(latents, vae)
    assert torch.equal(found, expected) and not found.requires_grad
    half = decode_images(latents, tiny_vae().to(torch.bfloat16))
    assert half.dtype == torch.float32
    # bfloat16 keeps 8 bits; the random decoder has a dozen layers of it.
    torch.testing.assert_close(half, expected, rtol=0, atol=12 * 2.0**-8)


def test_generated_through_an_autoencoder() -> None:
    model, vae = latent_dit(), tiny_vae()
    found = generate_images(model, ddim(), vae, [0, 4], SamplingConfig(3), batch_size=2)
    noise = starting_noise(0, SAMPLE, range(2), (4, 8, 8))
    latents = sample_latents(model, ddim(), noise, torch.tensor([0, 4]), SamplingConfig(3))
    assert torch.equal(found, decode_images(latents, vae))
    assert found.shape == (2, 3, 16, 16)


def test_to_uint8_gives_back_every_grey() -> None:
    greys = torch.arange(256)
    images = (greys.double() / 127.5 - 1).float().reshape(1, 1, 16, 16)
    assert torch.equal(to_uint8(images).flatten(), greys.to(torch.uint8))


def test_to_uint8_rounds_to_the_nearest() -> None:
    x = torch.linspace(-1, 1, 200_001)
    exact = (x.double() + 1) * 127.5
    found = to_uint8(x.reshape(1, 1, 1, -1))
    assert found.dtype == torch.uint8
    # Half a grey, and the two float32 roundings of numbers up to 255.
    assert float((found.flatten().double() - exact).abs().max()) <= 0.5 + 255 * 2.0**-23
    assert (int(found.min()), int(found.max())) == (0, 255)
    assert bool((found.flatten().int().diff() >= 0).all())


def test_to_uint8_puts_channels_last() -> None:
    images = torch.zeros(2, 3, 4, 5)
    images[1, 2, 3, 4] = 1.0
    found = to_uint8(images)
    assert found.shape == (2, 4, 5, 3) and found.is_contiguous()
    assert int(found[1, 3, 4, 2]) == 255
    assert int((found == 128).sum()) == found.numel() - 1  # 127.5 goes to the even number
