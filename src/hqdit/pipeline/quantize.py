"""quantize: the block loop, from a float model to packed codes."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import nn

from hqdit.calibration.capture import BlockStream, CalibrationData
from hqdit.errors import CheckpointError, NumericsError, UsageError
from hqdit.layers.linear import HQLinear
from hqdit.models.adapter import adapter_for
from hqdit.models.precision import stays_in_float32
from hqdit.models.source import set_time_frequencies
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.finished_block import BlockStore, FinishedBlock
from hqdit.pipeline.input_group import InputGroup
from hqdit.pipeline.known_input import KnownInput, known_inputs
from hqdit.pipeline.plan import PlannedLayer, QuantizationPlan, plan_quantization
from hqdit.pipeline.record import QuantizationRecord
from hqdit.pipeline.rotation_check import require_rotation_is_exact
from hqdit.progress import track


@torch.no_grad()
def quantize(
    model: nn.Module,
    config: QuantizationConfig | None = None,
    calibration: CalibrationData | None = None,
    blocks: BlockStore | None = None,
) -> nn.Module:
    """Replace the model's linear layers by quantized ones, block by block.

    Args:
        model: a float32 model with an adapter, in evaluation mode; changed in place. If an error is raised in the
            middle, the model is left partly quantized: load it again.
        config: the request; None is the preset "hqdit".
        calibration: needed if `config.needs_calibration`, otherwise ignored: a `CalibrationSet` for models on latents,
            time step and class, or `RecordedCalls` for any model.
        blocks: keeps finished blocks, and has those of an earlier run of the same request on the same model, which are
            then not quantized again; the result is the same, bit for bit.

    Returns:
        `model`, with a `QuantizationRecord` as its attribute `quantization_record`.

    Raises:
        UsageError: not float32, in training mode, calibration missing, or options that do not fit the model.
        CheckpointError: no adapter for this class, or quantized already.
        NumericsError: bad calibration data, a width without a matrix, or a Hessian that cannot be factored.

    Source: HQ-DiT (arXiv 2405.19751), section 3; docs/method.md maps each formula to its function.
    """
    config = config or QuantizationConfig()
    _require_float32(model)
    # A model that diffusers' own loader made has passed over this key of its configuration.
    set_time_frequencies(model, getattr(model, "config", {}), type(model).__name__)
    plan = plan_quantization(model, config)
    if model.training:
        raise UsageError(
            "quantize: found a model in training mode, where DiT drops class labels at random, needed evaluation mode. "
            "Fix: call model.eval()"
        )
    if config.needs_calibration and calibration is None:
        raise UsageError(
            "quantize: found no calibration data, needed some for GPTQ, smoothing or static scales. Fix: pass "
            "CalibrationSet.from_sampler(model, scheduler), or RecordedCalls.from_pipeline(pipeline, inputs) for a "
            "model with prompts, or use gptq=False with dynamic scales"
        )
    record = QuantizationRecord(config, parameters=sum(p.numel() for p in model.parameters()))
    known: dict[str, KnownInput] = {}
    if config.needs_survey and calibration is not None:
        known = known_inputs(model, plan, calibration, config)
    record.dtypes = _storage_dtypes(model, config)
    if any(not layer.rotation.is_identity for layer in plan.layers):
        record.rotation_error = require_rotation_is_exact(model, plan, config.seed, calibration)
    stream = None
    if config.needs_calibration and calibration is not None:
        stream = BlockStream(model, calibration, config.seed)
        record.calibration = {
            "origin": calibration.origin,
            "samples": len(calibration),
            "sha256": calibration.fingerprint,
        }
    adapter = adapter_for(model)
    if config.smoothing is not None:
        # A fold turns the modulation's bias b into c (1 + b) - 1, of which 16 bits would keep little of c (1 + b).
        record.dtypes |= {f"{site.name}.bias": torch.float32 for site in adapter.sites(model) if site.is_modulation}
    for block, layers in track(_by_block(plan, len(adapter.blocks(model))), "quantizing blocks"):
        finished = None if blocks is None else blocks.finished(block)
        if finished is not None:
            finished.put_into(model, record)
        else:
            for name, group in groupby(layers, key=lambda layer: layer.site.input_group):
                InputGroup(model, plan, list(group), config, stream, known.get(name, KnownInput())).quantize(record)
            if blocks is not None:
                blocks.keep(block, FinishedBlock.of(model, [layer.site.name for layer in layers], record))
        if stream is not None:
            stream.advance(block)
    adapter.fuse(model)
    _round_kept_tensors(model, record.dtypes)
    model.quantization_record = record  # type: ignore[assignment]
    return model


def _require_float32(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, HQLinear):
            raise CheckpointError(
                f"{name}: found a layer that is already quantized, needed a float model. Fix: load the original model"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise UsageError(
                f"{name}: found {parameter.dtype}, needed float32 weights to quantize from. "
                "Fix: call model.float(); keep_dtype sets how unquantized tensors are stored"
            )


def _by_block(plan: QuantizationPlan, blocks: int) -> list[tuple[int, list[PlannedLayer]]]:
    """(block, its planned layers by stage) for every block, also for those where nothing is planned."""
    members: dict[int, list[PlannedLayer]] = {index: [] for index in range(blocks)}
    for layer in plan.layers:
        members[layer.site.block].append(layer)
    return [(index, sorted(layers, key=lambda layer: layer.site.stage)) for index, layers in members.items()]


def _storage_dtypes(model: nn.Module, config: QuantizationConfig) -> dict[str, torch.dtype]:
    """How each float tensor of the unquantized rest will be stored: as asked, or as in the source's file."""
    asked: torch.dtype | None = getattr(torch, config.keep_dtype) if config.keep_dtype else None
    of_source: dict[str, torch.dtype] = getattr(model, "source_dtypes", {})
    dtypes = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            keep = None if stays_in_float32(model, name) else asked
            dtypes[name] = keep or of_source.get(name, tensor.dtype)
            if not bool(torch.isfinite(tensor.to(dtypes[name])).all()):
                raise NumericsError(
                    f"{name}: found numbers up to {float(tensor.abs().max()):.3g}, which {dtypes[name]} cannot hold, "
                    "needed a wider dtype. Fix: --keep-dtype bfloat16 or float32"
                )
    return dtypes


def _round_kept_tensors(model: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Give the unquantized tensors the values that storage will give them, so that a reload is bit-exact."""
    for name, tensor in model.state_dict().items():
        dtype = dtypes.get(name)
        if dtype is not None:
            tensor.copy_(tensor.to(dtype))
