"""quantize: the block loop, from a float model to packed codes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from hqdit.calibration.capture import BlockStream
from hqdit.calibration.samples import CalibrationSet
from hqdit.errors import CheckpointError, NumericsError, UsageError
from hqdit.formats.catalog import format_from_json
from hqdit.gptq.hessian import HessianAccumulator
from hqdit.gptq.solver import gptq_quantize
from hqdit.kernels.activation import quantize_activation
from hqdit.layers.linear import HQLinear
from hqdit.models.adapter import adapter_for
from hqdit.pipeline.config import SAME_AS_WEIGHTS, QuantizationConfig
from hqdit.pipeline.plan import PlannedLayer, QuantizationPlan, plan_quantization
from hqdit.pipeline.record import QuantizationRecord
from hqdit.pipeline.rotation_check import require_rotation_is_exact, signs_of, weight_to_rotate
from hqdit.progress import track
from hqdit.quantizers.format_selection import range_statistic, select_format
from hqdit.quantizers.quantized_tensor import QuantizedTensor, round_to_nearest, weight_scales
from hqdit.quantizers.scaling import MIN_SCALE
from hqdit.quantizers.spec import STATIC_GRANULARITIES, ActivationSpec, LinearSpec, WeightSpec
from hqdit.transforms.rotation import rotate, rotate_online


@torch.no_grad()
def quantize(
    model: nn.Module, config: QuantizationConfig | None = None, calibration: CalibrationSet | None = None
) -> nn.Module:
    """Replace the model's linear layers by quantized ones, block by block.

    Args:
        model: a float32 model with an adapter, in evaluation mode; changed in place. If an error is raised in the
            middle, the model is left partly quantized: load it again.
        config: the request; None is the preset "hqdit".
        calibration: needed if `config.needs_calibration`, otherwise ignored.

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
    plan = plan_quantization(model, config)
    if model.training:
        raise UsageError(
            "quantize: found a model in training mode, where DiT drops class labels at random, needed evaluation mode. "
            "Fix: call model.eval()"
        )
    if config.needs_calibration and calibration is None:
        raise UsageError(
            "quantize: found no calibration data, needed a CalibrationSet for GPTQ or static scales. "
            "Fix: pass CalibrationSet.from_sampler(model, scheduler), or use gptq=False with dynamic scales"
        )
    record = QuantizationRecord(config, parameters=sum(p.numel() for p in model.parameters()))
    record.dtypes = _storage_dtypes(model, config)
    if any(not layer.rotation.is_identity for layer in plan.layers):
        record.rotation_error = require_rotation_is_exact(model, plan, config.seed)
    stream = None
    if config.needs_calibration and calibration is not None:
        stream = BlockStream(model, calibration, config.seed)
        record.calibration = {
            "origin": calibration.origin,
            "samples": len(calibration),
            "sha256": calibration.fingerprint,
        }
    adapter = adapter_for(model)
    for block, layers in track(_by_block(plan, len(adapter.blocks(model))), "quantizing blocks"):
        for _, group in groupby(layers, key=lambda layer: layer.site.input_group):
            _quantize_group(model, plan, list(group), config, stream, record)
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
            dtypes[name] = asked or of_source.get(name, tensor.dtype)
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


def _quantize_group(
    model: nn.Module,
    plan: QuantizationPlan,
    layers: list[PlannedLayer],
    config: QuantizationConfig,
    stream: BlockStream | None,
    record: QuantizationRecord,
) -> None:
    """Quantize the layers that share one input: one rotation, one activation format, one Hessian."""
    first = layers[0]
    device = model.get_submodule(first.site.name).get_parameter("weight").device
    signs = signs_of(first, config.seed)
    signs = None if signs is None else signs.to(device)

    def rotated_input(x: Tensor) -> Tensor:
        return rotate_online(x.to(torch.float32), first.rotation, signs)

    rotated: list[tuple[PlannedLayer, Tensor, Tensor | None]] = []
    for layer in layers:
        linear = model.get_submodule(layer.site.name)
        assert isinstance(linear, nn.Linear)  # the plan holds nothing else
        weight, bias = weight_to_rotate(layer, plan, linear, config.seed)
        rotated.append((layer, rotate(weight, layer.rotation, signs), bias))

    largest = None
    if config.activation_granularity in STATIC_GRANULARITIES:
        assert stream is not None  # needs_calibration made sure of it
        is_signed = config.activations == SAME_AS_WEIGHTS or format_from_json(config.activations).is_signed
        largest = _channel_absmax(stream, first, rotated_input, is_signed)
    if config.activation_granularity != "tensor" and largest is not None:
        # Folding needs the channels' proportions only; the format's largest level is divided out below.
        rotated = [(layer, weight * largest, bias) for layer, weight, bias in rotated]

    activation = _activation_spec([weight for _, weight, _ in rotated], config)
    channel_scale = static_scale = None
    if largest is not None:
        top = activation.format.max_level
        if activation.has_channel_scale:
            channel_scale = (largest / top).to(torch.float32)
            rotated = [(layer, weight / top, bias) for layer, weight, bias in rotated]
        else:
            static_scale = (largest.max() / top).clamp_min(MIN_SCALE).to(torch.float32).reshape(1)

    hessian = None
    if config.gptq:
        assert stream is not None
        accumulator = HessianAccumulator(first.in_features, device)

        def accumulate(x: Tensor) -> None:
            scaled = rotated_input(x) if channel_scale is None else rotated_input(x) / channel_scale
            accumulator.add(quantize_activation(scaled, activation, static_scale).dequantize())

        stream.capture(first.site, accumulate, f"Hessian of {first.site.input_group}")
        hessian = accumulator.hessian

    for layer, weight, bias in rotated:
        weight_spec, format_index, statistic = _weight_spec(weight, config)
        spec = LinearSpec(
            layer.site.name, layer.in_features, layer.out_features, weight_spec, activation, layer.rotation
        )
        source = model.get_submodule(layer.site.name).get_parameter("weight")
        zeros = {
            "zero_output_channels": int((source == 0).all(dim=1).sum()),
            "zero_input_channels": int((source == 0).all(dim=0).sum()),
        }
        quantized, facts = _quantize_weight(weight, hessian, spec, format_index, config)
        bias32 = None if bias is None else bias.to(torch.float32)
        replacement = HQLinear.from_quantized(spec, quantized, bias32, signs, channel_scale, static_scale).eval()
        model.set_submodule(layer.site.name, replacement)
        record.layers[layer.site.name] = {"role": layer.site.role, **statistic, **zeros, **facts}
        record.layers[layer.site.name]["arithmetic"] = spec.arithmetic


def _channel_absmax(
    stream: BlockStream, layer: PlannedLayer, rotated_input: Callable[[Tensor], Tensor], is_signed: bool
) -> Tensor:
    """Largest magnitude of every rotated channel over the calibration data, float64, never zero.

    For a one-sided format only positive numbers count, as in `quantizers.scaling.absmax`.
    """
    largest: Tensor | None = None

    def collect(x: Tensor) -> None:
        nonlocal largest
        rotated = rotated_input(x)
        batch = (rotated.abs() if is_signed else rotated.clamp_min(0)).amax(dim=0).to(torch.float64)
        largest = batch if largest is None else torch.maximum(largest, batch)

    stream.capture(layer.site, collect, f"scales of {layer.site.input_group}")
    assert largest is not None  # a calibration set is never empty
    # A silent channel gets the mean of the others: it may speak at other time steps.
    live = largest > 0
    return torch.where(live, largest, largest[live].mean() if bool(live.any()) else torch.ones_like(largest))


def _activation_spec(weights: list[Tensor], config: QuantizationConfig) -> ActivationSpec:
    """Format of the shared input: as asked, or the one that all the layers reading it would choose together."""
    if config.activations != SAME_AS_WEIGHTS:
        fmt = format_from_json(config.activations)
    elif len(config.weight_candidates) == 1:
        fmt = config.weight_candidates[0]
    else:
        together = torch.cat([weight.reshape(1, -1) for weight in weights], dim=1)
        fmt = select_format(range_statistic(together, config.alpha)[0], config.weight_candidates)  # type: ignore[arg-type]
    grouped = config.activation_granularity == "group"
    return ActivationSpec(fmt, config.activation_granularity, config.group_size if grouped else None)


def _weight_spec(weight: Tensor, config: QuantizationConfig) -> tuple[WeightSpec, Tensor | None, dict[str, Any]]:
    """Format(s), index per output channel, and the statistic for the record."""
    candidates = config.weight_candidates
    group_size = config.group_size if config.weight_granularity == "group" else None
    if config.format_granularity == "channel":
        statistics = range_statistic(weight, config.alpha)
        chosen = [candidates.index(select_format(s, candidates)) for s in statistics]  # type: ignore[arg-type]
        index = torch.tensor(chosen, dtype=torch.uint8, device=weight.device)
        counts = {fmt.name: chosen.count(position) for position, fmt in enumerate(candidates)}
        facts = {"statistic": _finite(sorted(statistics)[len(statistics) // 2]), "formats_of_channels": counts}
        return WeightSpec(candidates, config.weight_granularity, group_size), index, facts
    statistic = range_statistic(weight.reshape(1, -1), config.alpha)[0]
    fmt = candidates[0] if len(candidates) == 1 else select_format(statistic, candidates)  # type: ignore[arg-type]
    return WeightSpec((fmt,), config.weight_granularity, group_size), None, {"statistic": _finite(statistic)}


def _finite(value: float) -> float | None:
    """JSON has no infinity: a statistic over a zero quantile is recorded as null."""
    return value if math.isfinite(value) else None


def _quantize_weight(
    weight: Tensor,
    hessian: Tensor | None,
    spec: LinearSpec,
    format_index: Tensor | None,
    config: QuantizationConfig,
) -> tuple[QuantizedTensor, dict[str, Any]]:
    """Scales, then GPTQ or round-to-nearest."""
    weight = weight.to(torch.float32)
    scale = weight_scales(weight, spec.weight, format_index, config.scale_rule)
    facts: dict[str, Any] = {
        "method": "nearest" if hessian is None else "gptq",
    }
    if hessian is None:
        return round_to_nearest(weight, scale, spec.weight, format_index), facts
    quantized, outcome = gptq_quantize(weight, hessian, scale, spec.weight, format_index, config.act_order, spec.name)
    return quantized, facts | asdict(outcome)
