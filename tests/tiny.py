"""Tiny random DiT models and what goes with them: built in milliseconds, of the same parts as the real ones."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, FluxTransformer2DModel

from hqdit.calibration.recording import RecordedCalls
from hqdit.calibration.samples import CalibrationSet
from hqdit.kernels.selection import BACKENDS
from hqdit.models.adapter import adapter_for
from hqdit.numerics.codes import unpack_codes
from hqdit.pipeline.checkpoint import quantized_layers
from hqdit.quantizers.quantized_tensor import QuantizedTensor, storable_scales
from hqdit.sampling.sampler import SamplingConfig

CLASSES = 5
WIDTH, BLOCKS = 72, 2  # 2 heads of 36, so that the 36-order transform and its halves are exercised

#: Backends that run CPU tensors on this machine; the native one does wherever a compiler was found. Triton's would take
#: minutes in its interpreter and has tests of its own.
RUNNABLE = {
    name: backend for name, backend in BACKENDS.items() if name != "triton" and backend.unavailable_reason() is None
}

#: Geometry of the model that most tests use.
CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 36,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": BLOCKS,
    "sample_size": 8,
    "patch_size": 4,
    "num_embeds_ada_norm": CLASSES,
}


def tiny_dit(seed: int = 0, **changes: Any) -> DiTTransformer2DModel:
    """A random float32 model in evaluation mode whose modulation is strong, so that every block matters."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = DiTTransformer2DModel(**{**CONFIG, **changes})
        for block in model.transformer_blocks:
            block.norm1.linear.weight.mul_(4.0)
            block.norm1.linear.bias.uniform_(-1.0, 1.0)
    return model.eval()


def peculiar_dit() -> DiTTransformer2DModel:
    """A tiny model with one direction of one input that its output depends on far more than on others."""
    model = tiny_dit()
    random = torch.Generator().manual_seed(5)
    with torch.no_grad():
        weight = model.transformer_blocks[1].ff.net[0].proj.weight
        column, row = (torch.randn(size, generator=random) for size in weight.shape)
        weight += 2 * torch.outer(column, row / row.norm())
    return model


def latent_dit(seed: int = 0, **changes: Any) -> DiTTransformer2DModel:
    """As `tiny_dit`, on 4 latent channels with a learned variance: 8 output channels."""
    return tiny_dit(seed, **{"in_channels": 4, "out_channels": 8, **changes})


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """A random autoencoder from 8x8 latents of 4 channels to 16x16 images of 3."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
    return vae.eval()


def ddim(**changes: Any) -> DDIMScheduler:
    """DDIM on DiT's linear betas."""
    return DDIMScheduler(**{"beta_start": 1e-4, "beta_end": 0.02, "clip_sample": False, **changes})


def inputs_of(model: Any, samples: int = 6, seed: int = 1) -> dict[str, torch.Tensor]:
    """Arguments of an adapter's methods: latents, time steps over the whole range, and classes with the null class."""
    random = torch.Generator().manual_seed(seed)
    shape = (samples, model.config.in_channels, model.config.sample_size, model.config.sample_size)
    return {
        "latents": torch.randn(shape, generator=random),
        "timesteps": torch.randint(0, 1000, (samples,), generator=random),
        "classes": torch.arange(samples) % (CLASSES + 1),
    }


def predicted(model: Any, **fields: torch.Tensor) -> torch.Tensor:
    """The model's raw output on `inputs_of`, the learned variance included."""
    fields = fields or inputs_of(model)
    with torch.no_grad():
        output = model(fields["latents"], timestep=fields["timesteps"], class_labels=fields["classes"]).sample
    assert isinstance(output, torch.Tensor)
    return output


@functools.cache
def calibration(samples: int = 48, seed: int = 0) -> CalibrationSet:
    """Calibration tuples of `tiny_dit()` at 4 steps."""
    return CalibrationSet.from_sampler(tiny_dit(), ddim(), samples, SamplingConfig(4, 1.5), seed)


def random_calibration(model: Any, samples: int = 32) -> CalibrationSet:
    """Calibration tuples for any geometry, without sampling."""
    return CalibrationSet(**inputs_of(model, samples))


def with_short_scales(model: Any, **activation: Any) -> Any:
    """A model quantized with groups on both sides, changed in place: its scales are kept in 8 bits.

    Args:
        model: as `hqdit.pipeline.quantize.quantize` returned it.
        activation: more changes of every layer's `ActivationSpec`.
    """
    for name, layer in quantized_layers(model).items():
        spec = dataclasses.replace(
            layer.spec,
            weight=dataclasses.replace(layer.spec.weight, scale_format="e4m3"),
            activation=dataclasses.replace(layer.spec.activation, scale_format="e4m3", **activation),
        )
        codes = unpack_codes(layer.qweight, spec.weight.formats[0])
        scale = storable_scales(layer.weight_scale, spec.weight)
        weight = QuantizedTensor(codes, scale, layer.format_index, spec.weight)
        short = type(layer).from_quantized(spec, weight, layer.bias, layer.signs, input_scale=layer.input_scale)
        model.set_submodule(name, short.eval())
    adapter_for(model).fuse(model)
    return model


def save_pipeline(folder: Path, model: Any, scheduler: Any | None = None, vae: Any | None = None) -> Path:
    """A pipeline folder as diffusers lays it out, with a file and a folder that hqdit knows nothing of."""
    model.save_pretrained(folder / "transformer")
    index: dict[str, Any] = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
    if scheduler is not None:
        scheduler.save_pretrained(folder / "scheduler")
        index["scheduler"] = ["diffusers", type(scheduler).__name__]
    if vae is not None:
        vae.save_pretrained(folder / "vae")
        index["vae"] = ["diffusers", "AutoencoderKL"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "README.md").write_bytes(b"# caf\xc3\xa9\r\n")
    (folder / "assets" / "deep").mkdir(parents=True)
    (folder / "assets" / "deep" / "blob.bin").write_bytes(bytes(range(256)))
    return folder


def edit_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; the value `...` removes a key."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))


def file_hashes(folder: Path) -> dict[str, str]:
    """Relative path -> SHA-256 of every file below `folder`."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def state_hash(model: Any) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of a model's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_complete(error: Any, *parts: str) -> None:
    """The first line of an error says what was needed and how to fix it, names `parts`, and ends."""
    line = str(error).splitlines()[0]
    for part in ("needed", "Fix: ", *parts):
        assert part in line, f"{part!r} is missing in: {line}"
    assert "Traceback" not in str(error)


def tiny_flux(seed: int = 0, **changes: Any) -> FluxTransformer2DModel:
    """A random float32 model of another kind: joint and single blocks, text beside image tokens."""
    settings: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 3,
        "joint_attention_dim": 8,
        "pooled_projection_dim": 8,
        "axes_dims_rope": (4, 4, 4),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FluxTransformer2DModel(**{**settings, **changes})
    return model.eval()


FLUX_STEPS = 3


def flux_pipeline(model: Any) -> Any:
    """diffusers' pipeline around `model`, without text encoders and autoencoder."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline  # slow: brings in transformers

    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flux_arguments(seed: int, **changes: Any) -> dict[str, Any]:
    """Arguments of one call of the pipeline whose text has been encoded already."""
    random = torch.Generator().manual_seed(seed)
    return {
        "prompt_embeds": torch.randn(1, 5, 8, generator=random),
        "pooled_prompt_embeds": torch.randn(1, 8, generator=random),
        "num_inference_steps": FLUX_STEPS,
        "height": 64,
        "width": 64,
        "output_type": "latent",
        **changes,
    }


def flux_calls(samples: int = 100, seed: int = 0, prompts: int = 2) -> RecordedCalls:
    """Calls of `tiny_flux()` while its pipeline samples."""
    inputs = [flux_arguments(number) for number in range(prompts)]
    return RecordedCalls.from_pipeline(flux_pipeline(tiny_flux()), inputs, samples, seed)
