"""`hqdit.load_pipeline`: diffusers' own pipeline where there is an autoencoder, ours where there is none."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import DiTPipeline
from tiny import ddim, edit_json, latent_dit, save_pipeline, tiny_dit, tiny_vae

import hqdit
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.quantize import quantize


def test_a_pipeline_with_an_autoencoder_runs_through_diffusers(tmp_path):
    source = save_pipeline(tmp_path / "source", latent_dit(num_embeds_ada_norm=1000), ddim(), tiny_vae())
    edit_json(source / "model_index.json", id2label={"0": "tench", "7": "cock, rooster"})
    model = quantize(hqdit.load(source), QuantizationConfig(gptq=False))
    hqdit.save(model, tmp_path / "quantized", source=source)
    pipe = hqdit.load_pipeline(tmp_path / "quantized")
    assert isinstance(pipe, DiTPipeline)
    assert any(isinstance(module, hqdit.HQLinear) for module in pipe.transformer.modules())
    assert pipe.get_label_ids(["rooster"]) == [7]
    pipe.transformer.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").is_file()
    pipe.set_progress_bar_config(disable=True)
    run = {"class_labels": [7, 0], "num_inference_steps": 2, "output_type": "np"}
    images = pipe(**run, generator=torch.manual_seed(0)).images
    again = pipe(**run, generator=torch.manual_seed(0)).images
    assert images.shape == (2, 16, 16, 3) and np.isfinite(images).all() and np.array_equal(images, again)


def test_a_model_on_pixels_gets_the_pixel_pipeline(tmp_path):
    hqdit.save(quantize(tiny_dit(), QuantizationConfig(gptq=False)), tmp_path / "quantized")
    pipe = hqdit.load_pipeline(tmp_path / "quantized", dtype=torch.bfloat16)
    assert isinstance(pipe, hqdit.PixelDiTPipeline)
    assert pipe.transformer.dtype == torch.bfloat16
    images = pipe(class_labels=[1, 2, 3], num_inference_steps=2).images
    assert [image.size for image in images] == [(8, 8)] * 3
