"""What the long commands will need, from the sizes that headers and configurations state: no tensor is read.

Each sum names what is in memory together at the moment that needs most. The factors count the copies that torch and
safetensors make; docs/jobs.md compares the sums with measured peaks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hqdit.calibration.samples import CALL_SIZE
from hqdit.models.adapter import ClassConditionalAdapter, adapter_for
from hqdit.models.source import CONFIG_NAME, ModelFolder, build_skeleton
from hqdit.models.weights import TensorFacts, read_json, stored_tensor_facts
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.plan import PlannedLayer, QuantizationPlan, plan_quantization
from hqdit.pipeline.resources import Estimate

_FLOAT32, _FLOAT64 = 4, 8
#: What libraries take at their first use, and what the allocator does not give back.
_RUNNING_BYTES = 50_000_000
#: Of a process that has loaded torch and nothing else.
_CHILD_BYTES = 200_000_000
#: That a file takes at least.
_SMALLEST_FILE = 4096
#: float64 numbers per weight of an input group while it is rotated, judged and rounded.
_GROUP_COPIES = 4
#: float64 matrices of width x width while GPTQ factors a Hessian.
_HESSIAN_COPIES = 6
#: float64 numbers per weight of one layer in GPTQ's column loop.
_COLUMN_LOOP_COPIES = 6
#: float32 numbers per token: of a block's width, and of its widest layer.
_WIDTH_COPIES, _WIDEST_COPIES = 10, 3
#: Bytes per token and channel of an input on its way into a Hessian: rotated, rounded, and in float64.
_CAPTURED_BYTES = 4 + 4 + 8 + 8
#: float32 images of an autoencoder's first channels that its last layers hold.
_DECODER_COPIES = 4
#: Bytes per number of an image: in its batch, in all of them together, and while it becomes a uint8.
_IMAGE_BYTES = 4 + 4 + 4 + 4 + 1


@dataclass(frozen=True)
class _Sizes:
    """What a model's headers and configuration state.

    Attributes:
        facts: every stored tensor.
        latent: (channels, height, width) of one sample, zeros for models not on classes.
        tokens: of one sample, likewise.
        width: of a token.
        widest: inputs or outputs of the widest layer that has one vector per token.
    """

    facts: Mapping[str, TensorFacts]
    latent: tuple[int, int, int]
    tokens: int
    width: int
    widest: int

    @property
    def stored_bytes(self) -> int:
        """Of the weight files."""
        return sum(facts.bytes for facts in self.facts.values())

    @property
    def widened_bytes(self) -> int:
        """Of float32 copies of what is stored in fewer bits; float32 tensors stay mapped files."""
        return sum(_FLOAT32 * facts.numbers for facts in self.facts.values() if facts.dtype in ("F16", "BF16"))

    def activation_bytes(self, rows: int) -> int:
        """Of a forward pass over `rows` samples."""
        return rows * self.tokens * _FLOAT32 * (_WIDTH_COPIES * self.width + _WIDEST_COPIES * self.widest)


def _sizes(folder: ModelFolder, model: nn.Module) -> _Sizes:
    adapter = adapter_for(model)
    facts = stored_tensor_facts(folder.transformer)
    sites = [site for site in adapter.sites(model) if not site.is_modulation]
    shapes = [tuple(model.get_submodule(site.name).get_parameter("weight").shape[:2]) for site in sites]
    widest = max((max(shape) for shape in shapes), default=0)
    width = min((min(shape) for shape in shapes), default=0)
    if not isinstance(adapter, ClassConditionalAdapter):
        return _Sizes(facts, (0, 0, 0), 0, width, widest)
    latent = adapter.latent_shape(model)
    patch = int(cast(Any, model).config.patch_size)
    return _Sizes(facts, latent, latent[1] * latent[2] // patch**2, width, widest)


def quantize_estimate(folder: ModelFolder, config: QuantizationConfig, calibration_samples: int) -> Estimate:
    """Of quantizing the float model in `folder`.

    The disk holds the finished blocks of the job and the result; tensors that are equal count each, because that shows
    in no header.

    Args:
        folder: of a float model.
        config: the request.
        calibration_samples: on which it will be calibrated; 0 for none.

    Raises:
        CheckpointError: a broken header, or a configuration that builds no model.
        UsageError, NumericsError: as `pipeline.plan.plan_quantization`.
    """
    model = build_skeleton(folder, is_empty=True)
    plan = plan_quantization(model, config)
    sizes = _sizes(folder, model)
    packed = sum(_packed_bytes(layer, config) for layer in plan.layers)
    quantized = {f"{layer.site.name}.weight" for layer in plan.layers}
    kept = {name: facts for name, facts in sizes.facts.items() if name not in quantized}
    result = packed + _kept_bytes(kept, config.keep_dtype)
    calibration = _FLOAT32 * calibration_samples * math.prod(sizes.latent)

    working = _group_bytes(plan, config)
    if calibration_samples:
        # Inputs and outputs of the current block for all samples, and one batch on its way through it.
        working += calibration + 2 * _FLOAT32 * calibration_samples * sizes.tokens * sizes.width
        rows = min(calibration_samples, CALL_SIZE)
        working += sizes.activation_bytes(rows) + rows * sizes.tokens * sizes.widest * _CAPTURED_BYTES
    saving = result  # the tensors as stored, beside the model
    memory = _RUNNING_BYTES + sizes.widened_bytes + packed + max(working, saving)
    return Estimate(memory, sizes.stored_bytes + result, packed + result + calibration)


def _packed_bytes(layer: PlannedLayer, config: QuantizationConfig) -> int:
    """Codes, scales, indices, signs, factors and branch of one layer, as in docs/checkpoint.md."""
    inputs, outputs = layer.in_features, layer.out_features
    bits = max(fmt.bits for fmt in config.weight_candidates)
    groups = inputs // config.group_size if config.group_size and config.weight_granularity == "group" else 1
    count = inputs * outputs // (2 if bits <= 4 else 1)
    count += _FLOAT32 * outputs * groups + inputs // 8
    count += outputs if config.format_granularity == "channel" else 0
    count += _FLOAT32 * inputs if config.smoothing is not None else 0
    count += _FLOAT32 * inputs if config.activation_granularity in ("channel", "channel-token") else 0
    return count + 2 * config.low_rank * (inputs + outputs)


def _kept_bytes(kept: Mapping[str, TensorFacts], keep_dtype: str | None) -> int:
    if keep_dtype is None:
        return sum(facts.bytes for facts in kept.values())
    return sum(facts.numbers for facts in kept.values()) * cast(torch.dtype, getattr(torch, keep_dtype)).itemsize


def _group_bytes(plan: QuantizationPlan, config: QuantizationConfig) -> int:
    """Of the input group that needs most while it is quantized."""
    largest = 0
    for _, group in groupby(plan.layers, key=lambda layer: layer.site.input_group):
        layers = list(group)
        weights = [layer.in_features * layer.out_features for layer in layers]
        count = _FLOAT64 * _GROUP_COPIES * sum(weights)
        if config.gptq:
            count += _FLOAT64 * (_HESSIAN_COPIES * layers[0].in_features ** 2 + _COLUMN_LOOP_COPIES * max(weights))
        largest = max(largest, count)
    return largest


def sample_estimate(
    folder: ModelFolder, dtype: torch.dtype, images: int, batch_size: int, guidance: float, has_npz: bool
) -> Estimate:
    """Of sampling `images` images with the float or quantized model in `folder`.

    Raises:
        CheckpointError: a broken header, or a configuration that builds no model.
    """
    sizes = _sizes(folder, build_skeleton(folder, is_empty=True))
    memory = _loaded_bytes(sizes, dtype) + _sampling_bytes(folder, sizes, images, batch_size, guidance)
    numbers = images * math.prod(_image_shape(folder, sizes))
    # The job's float32 batches, and PNG files, which noise does not make smaller than uint8 pixels.
    disk = numbers * (_FLOAT32 + 1 + has_npz) + _SMALLEST_FILE * images
    return Estimate(memory, sizes.stored_bytes, disk)


def evaluate_estimate(
    folder: ModelFolder,
    original: ModelFolder,
    dtype: torch.dtype,
    images: int,
    batch_size: int,
    guidance: float,
    is_kept: bool,
) -> Estimate:
    """Of comparing the quantized model in `folder` with its float original, whose images a job keeps or not.

    Raises as `sample_estimate`.
    """
    model = build_skeleton(original, is_empty=True)
    sizes, quantized = _sizes(original, model), _sizes(folder, model)
    memory = _loaded_bytes(quantized, dtype) + _loaded_bytes(sizes, torch.float32)
    memory += _sampling_bytes(original, sizes, images, batch_size, guidance)
    numbers = images * math.prod(_image_shape(original, sizes))
    memory += _FLOAT32 * numbers  # those of the other model
    batches = -(-images // batch_size)
    disk = 2 * (_FLOAT32 * numbers + _SMALLEST_FILE * batches)
    return Estimate(memory, sizes.stored_bytes + quantized.stored_bytes, disk * is_kept)


def convert_estimate(checkpoint: Path, vae: Path | None) -> Estimate:
    """Of converting an original checkpoint, whose size is all that is known of it; one of a training counts whole.

    The child that reads it maps the file and writes its tensors once; the result repeats the embedders in each block,
    at most a fifth of a published model.
    """
    size = checkpoint.stat().st_size if checkpoint.is_file() else 0
    repeated = size // 5
    copied = sum(path.stat().st_size for path in vae.iterdir() if path.is_file()) if vae and vae.is_dir() else 0
    return Estimate(_RUNNING_BYTES + _CHILD_BYTES + repeated, size, 2 * size + repeated + copied)


def _loaded_bytes(sizes: _Sizes, dtype: torch.dtype) -> int:
    """Of a loaded model: float32 copies of what is narrower, and what `dtype` makes of the rest."""
    floats = sum(facts.numbers for facts in sizes.facts.values() if facts.dtype in ("F64", "F32", "F16", "BF16"))
    return _RUNNING_BYTES + sizes.widened_bytes + (0 if dtype == torch.float32 else floats * dtype.itemsize)


def _sampling_bytes(folder: ModelFolder, sizes: _Sizes, images: int, batch_size: int, guidance: float) -> int:
    """Of the denoising loop, the autoencoder and the images themselves."""
    batch = min(images, batch_size)
    shape = _image_shape(folder, sizes)
    rows = batch if guidance == 1.0 else 2 * batch
    decoding = _DECODER_COPIES * _FLOAT32 * batch * _decoder_channels(folder) * shape[1] * shape[2]
    return max(sizes.activation_bytes(rows), decoding) + _IMAGE_BYTES * images * math.prod(shape)


def _autoencoder(folder: ModelFolder) -> list[int]:
    """Channels of its levels, outermost first; empty without one, or where they are no sizes (loading refuses that)."""
    path = folder.root / "vae" / CONFIG_NAME
    if not folder.is_pipeline or not path.is_file():
        return []
    channels = read_json(path, "an autoencoder's config.json").get("block_out_channels")
    is_sound = isinstance(channels, list) and all(isinstance(count, int) for count in channels)
    return list(channels) if is_sound and channels is not None else []


def _decoder_channels(folder: ModelFolder) -> int:
    return next(iter(_autoencoder(folder)), 0)


def _image_shape(folder: ModelFolder, sizes: _Sizes) -> tuple[int, int, int]:
    """(channels, height, width) of an image."""
    channels, height, width = sizes.latent
    levels = len(_autoencoder(folder))
    if not levels:
        return channels, height, width
    factor = 2 ** (levels - 1)
    return 3, factor * height, factor * width
