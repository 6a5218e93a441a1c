"""Sampling through diffusers' pipeline classes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline
from PIL import Image
from tiny import CLASSES, ddim, latent_dit, predicted, require_complete, save_pipeline, state_hash, tiny_dit, tiny_vae

from hqdit.errors import CheckpointError, NumericsError, UsageError
from hqdit.integrations.diffusers_logging import silence_diffusers
from hqdit.integrations.load_pipeline import load_pipeline
from hqdit.integrations.pixel_pipeline import PixelDiTPipeline, as_pil
from hqdit.pipeline.checkpoint import load, quantized_layers, save
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize
from hqdit.sampling.sampler import SamplingConfig, decode_images, generate_images, sample_latents, to_uint8

LABELS = [0, 4, 2]


@pytest.fixture(params=["float", "quantized"])
def transformer(request: pytest.FixtureRequest) -> Any:
    model = tiny_dit()
    return model if request.param == "float" else quantize(model, QuantizationConfig.preset("minmax"))


def test_pixel_images_are_those_of_the_sampler(transformer: Any) -> None:
    pipeline = PixelDiTPipeline(transformer, ddim())
    images = pipeline(LABELS, guidance_scale=2.0, num_inference_steps=3, seed=5, output_type="pt").images
    expected = to_uint8(generate_images(transformer, ddim(), None, LABELS, SamplingConfig(3, 2.0), 5))
    assert images.dtype == torch.uint8 and images.shape == (3, 8, 8, 1)
    assert torch.equal(images, expected)
    pictures = pipeline(LABELS, guidance_scale=2.0, num_inference_steps=3, seed=5).images
    assert [picture.mode for picture in pictures] == ["L"] * 3
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), expected[..., 0].numpy())
    other = pipeline(LABELS, guidance_scale=2.0, num_inference_steps=3, seed=6, output_type="pt").images
    assert not torch.equal(other, images)


def test_colour_pixels() -> None:
    pipeline = PixelDiTPipeline(tiny_dit(in_channels=3, out_channels=3), ddim())
    pictures = pipeline([1], num_inference_steps=2).images
    assert isinstance(pictures[0], Image.Image)
    assert (pictures[0].mode, pictures[0].size) == ("RGB", (8, 8))


def test_as_pil_keeps_rows_and_columns() -> None:
    images = torch.arange(2 * 3 * 5 * 3, dtype=torch.uint8).reshape(2, 3, 5, 3)
    pictures = as_pil(images)
    assert [picture.size for picture in pictures] == [(5, 3)] * 2
    assert np.array_equal(np.stack([np.asarray(picture) for picture in pictures]), images.numpy())
    grey = as_pil(images[..., :1])
    assert np.array_equal(np.asarray(grey[1]), images[1, ..., 0].numpy())


def test_no_gradients_are_kept(transformer: Any) -> None:
    images = PixelDiTPipeline(transformer, ddim())([0], num_inference_steps=1, output_type="pt").images
    assert not images.requires_grad


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"class_labels": [0, CLASSES]}, "--classes"),
        ({"class_labels": []}, "--classes"),
        ({"num_inference_steps": 0}, "--steps"),
        ({"num_inference_steps": 1001}, "--steps"),
        ({"guidance_scale": float("nan")}, "--guidance"),
        ({"output_type": "np"}, "output_type"),
        ({"output_type": None}, "output_type"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict[str, Any], part: str) -> None:
    pipeline = PixelDiTPipeline(tiny_dit(), ddim())
    with pytest.raises(UsageError) as info:
        pipeline(**{"class_labels": [0], "num_inference_steps": 1, **arguments})
    require_complete(info.value, part)


def test_non_finite_images() -> None:
    model = tiny_dit()
    model.proj_out_2.bias.data[0] = torch.inf
    with pytest.raises(NumericsError):
        PixelDiTPipeline(model, ddim())([0], num_inference_steps=1)


def test_pixel_pipeline_is_a_diffusers_pipeline(tmp_path: Path) -> None:
    pipeline = PixelDiTPipeline(tiny_dit(), ddim(steps_offset=1))
    assert isinstance(pipeline, DiffusionPipeline)
    assert set(pipeline.components) == {"transformer", "scheduler"}
    pipeline.save_pretrained(tmp_path)
    again = PixelDiTPipeline.from_pretrained(tmp_path)
    assert state_hash(again.transformer) == state_hash(pipeline.transformer)
    assert again.scheduler.config.steps_offset == 1
    images = [p([1, 2], num_inference_steps=2, output_type="pt").images for p in (pipeline, again)]
    assert torch.equal(*images)


# --- load_pipeline


def test_load_pixel_pipeline(tmp_path: Path) -> None:
    save_pipeline(tmp_path / "source", tiny_dit(), diffusers.DDIMScheduler(num_train_timesteps=500))
    save(
        quantize(load(tmp_path / "source"), QuantizationConfig.preset("minmax")), tmp_path / "out", tmp_path / "source"
    )
    for name in ("source", "out"):
        pipeline = load_pipeline(tmp_path / name)
        assert type(pipeline) is PixelDiTPipeline
        assert pipeline.scheduler.config.num_train_timesteps == 500
        assert bool(quantized_layers(pipeline.transformer)) == (name == "out")
        assert torch.equal(predicted(pipeline.transformer), predicted(load(tmp_path / name)))
        assert len(pipeline([0, 1], num_inference_steps=2).images) == 2


def test_load_latent_pipeline(tmp_path: Path) -> None:
    # diffusers' DiTPipeline has the null class 1000 built in.
    save_pipeline(tmp_path / "source", latent_dit(num_embeds_ada_norm=1000), ddim(), tiny_vae())
    save(
        quantize(load(tmp_path / "source"), QuantizationConfig.preset("minmax")), tmp_path / "out", tmp_path / "source"
    )
    for name in ("source", "out"):
        pipeline = load_pipeline(tmp_path / name)
        assert type(pipeline) is DiTPipeline
        pipeline.set_progress_bar_config(disable=True)
        arguments = {"guidance_scale": 4.0, "num_inference_steps": 2, "output_type": "np"}
        images = pipeline([3, 999], generator=torch.Generator().manual_seed(1), **arguments).images
        assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all()
        noise = torch.randn((2, 4, 8, 8), generator=torch.Generator().manual_seed(1))
        latents = sample_latents(load(tmp_path / name), ddim(), noise, torch.tensor([3, 999]), SamplingConfig(2, 4.0))
        ours = (decode_images(latents, tiny_vae()) / 2 + 0.5).permute(0, 2, 3, 1).numpy()
        # Division by the scaling factor here, multiplication by its inverse there: an ulp before the decoder.
        np.testing.assert_allclose(images, ours, rtol=0, atol=1e-5)


def test_load_bare_transformer(tmp_path: Path) -> None:
    tiny_dit().save_pretrained(tmp_path)
    pipeline = load_pipeline(tmp_path)
    assert type(pipeline) is PixelDiTPipeline
    assert type(pipeline.scheduler) is diffusers.DDIMScheduler


def test_load_in_another_dtype(tmp_path: Path) -> None:
    save_pipeline(tmp_path, latent_dit(), ddim(), tiny_vae())
    pipeline = load_pipeline(tmp_path, dtype=torch.bfloat16)
    assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.bfloat16


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as info:
        load_pipeline(tmp_path / "nope")
    require_complete(info.value, str(tmp_path / "nope"))


def test_silence() -> None:
    from diffusers.utils import logging as theirs

    verbosity = theirs.get_verbosity()
    try:
        silence_diffusers()
        assert theirs.get_verbosity() == logging.ERROR
    finally:
        theirs.set_verbosity(verbosity)
        theirs.enable_progress_bar()
