"""One input of the model, and the layers that read it: from float weights to quantized layers."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hqdit.calibration.capture import BlockStream, InputConsumer, SampleConsumer
from hqdit.formats.catalog import format_from_json
from hqdit.formats.number_format import NumberFormat
from hqdit.gptq.hessian import InputMoments
from hqdit.gptq.solver import gptq_quantize
from hqdit.kernels.activation import quantize_centred
from hqdit.layers.matrix_layers import weight_matrix
from hqdit.layers.pointwise_conv import quantized_class
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.config_checks import SAME_AS_WEIGHTS
from hqdit.pipeline.known_input import KnownInput
from hqdit.pipeline.mixed_precision import WIDE_FORMAT
from hqdit.pipeline.plan import PlannedLayer, QuantizationPlan, activation_spec, weight_spec
from hqdit.pipeline.record import QuantizationRecord
from hqdit.pipeline.rotation_check import signs_of, weight_to_rotate
from hqdit.pipeline.survey import TokenSample
from hqdit.quantizers.emphasis import deemphasise_weight, emphasise
from hqdit.quantizers.exponent_search import channel_shifts, search_exponents
from hqdit.quantizers.format_selection import range_statistic, select_format
from hqdit.quantizers.low_rank import BRANCH_DTYPE, low_rank_factors
from hqdit.quantizers.quantized_tensor import QuantizedTensor, refit_scales, round_to_nearest, weight_scales
from hqdit.quantizers.scaling import MIN_SCALE
from hqdit.quantizers.spec import STATIC_GRANULARITIES, ActivationSpec, LinearSpec, WeightSpec
from hqdit.transforms.rotation import rotate, rotate_online

#: Calibration tokens that the exponent search looks at.
SEARCH_TOKENS = 256


@dataclass
class _Layer:
    """A layer on its way.

    Attributes:
        planned: what was planned for it.
        weight: float64, what is still to be quantized: smoothed, less its branch, rotated, scaled, in this order.
        bias: float64 or None.
        branch: (low_rank_down, low_rank_up) or None.
        scale: float32 (out_features, 1) where a search has found it.
    """

    planned: PlannedLayer
    weight: Tensor
    bias: Tensor | None
    branch: tuple[Tensor, Tensor] | None
    scale: Tensor | None = None


class _Choice(NamedTuple):
    """What was decided for the input, and by a search for the weights too.

    Attributes:
        activation: format and granularity of the input.
        channel_scale: float32 (in_features,) where the granularity has one.
        static_scale: float32 (1,) likewise.
        weight_format: of all weights; None where each layer chooses its own.
        search_error: squared error of the output that the search ended with, relative to the output's power.
    """

    activation: ActivationSpec
    channel_scale: Tensor | None = None
    static_scale: Tensor | None = None
    weight_format: NumberFormat | None = None
    search_error: float | None = None


class InputGroup:
    """The layers that share one input: one smoothing, one rotation, one activation format, one Hessian.

    Args:
        model: changed in place by `quantize`.
        plan: of the whole model, because a later rotation may be folded into a layer of this group.
        layers: the planned layers of this group.
        config: the request.
        stream: calibration inputs, or None if the request needs none.
        known: what was found out about the input beforehand.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: QuantizationPlan,
        layers: list[PlannedLayer],
        config: QuantizationConfig,
        stream: BlockStream | None,
        known: KnownInput,
    ) -> None:
        self._model, self._config, self._stream = model, config, stream
        self._first = layers[0]
        self._device = model.get_submodule(self._first.site.name).get_parameter("weight").device
        signs = signs_of(self._first, config.seed)
        self._signs = None if signs is None else signs.to(self._device)
        self._input_scale = known.scale
        # Where earlier layers have absorbed the factors, inputs and weights are smoothed already.
        self._applied_scale = known.scale if self._first.smoothing == "applied" else None
        self._shift, self._emphasis, self._is_sensitive = known.shift, known.emphasis, known.is_sensitive
        self._error_share, self._centring, self._is_wide = known.error_share, known.centring, known.is_wide
        self._layers = [self._prepared(layer, plan) for layer in layers]

    def quantize(self, record: QuantizationRecord) -> None:
        """Replace the group's layers by quantized ones and note in `record` what happened."""
        choice = self._search() if self._config.format_search else self._choose()
        moments = None
        if self._config.gptq or self._config.bias_correction:
            moments = self._moments(choice)
        for layer in self._layers:
            self._replace(layer, choice, moments, record)

    def _prepared(self, layer: PlannedLayer, plan: QuantizationPlan) -> _Layer:
        float_layer = self._model.get_submodule(layer.site.name)
        weight, bias = weight_to_rotate(layer, plan, float_layer, self._config.seed)
        if self._applied_scale is not None:
            weight = weight / self._applied_scale
        branch = None
        if self._config.low_rank:
            branch, weight = _split_off_branch(weight, self._config.low_rank, self._applied_scale)
        if self._shift is not None:
            shift = self._shift if self._applied_scale is None else self._shift * self._applied_scale
            taken = weight @ shift.to(torch.float64)
            bias = taken if bias is None else bias + taken
        if self._emphasis is not None:
            weight = deemphasise_weight(weight, self._emphasis.directions)
        return _Layer(layer, rotate(weight, layer.rotation, self._signs), bias, branch)

    def _prepared_input(self, x: Tensor) -> Tensor:
        """Centred, smoothed, emphasised and rotated, float32 (tokens, in_features)."""
        x = x.to(torch.float32)
        if self._shift is not None:
            x = x - self._shift
        if self._applied_scale is not None:
            x = x * self._applied_scale
        if self._emphasis is not None:
            x = emphasise(x, self._emphasis.directions)
        return rotate_online(x, self._first.rotation, self._signs)

    def _choose(self) -> _Choice:
        """Format by statistic or request, static scales from the largest magnitudes; weights get the folded scales."""
        config = self._config
        largest = None
        if config.activation_granularity in STATIC_GRANULARITIES:
            is_signed = config.activations == SAME_AS_WEIGHTS or format_from_json(config.activations).is_signed
            largest = self._channel_absmax(is_signed)
            if config.activation_granularity != "tensor":
                # Folding needs the channels' proportions only; the format's largest level is divided out below.
                for layer in self._layers:
                    layer.weight = layer.weight * largest
        activation = self._activation_spec()
        if largest is None:
            return _Choice(activation)
        top = activation.format.max_level
        if activation.has_static_scale:
            static_scale = (largest.max() / top).clamp_min(MIN_SCALE).to(torch.float32).reshape(1)
            return _Choice(activation, static_scale=static_scale)
        for layer in self._layers:
            layer.weight = layer.weight / top
        return _Choice(activation, channel_scale=(largest / top).to(torch.float32))

    def _search(self) -> _Choice:
        """Formats and scales of both sides by the exponent search; weights get the input's scales.

        Layers that read one input are searched as one weight.
        """
        shifts = channel_shifts(self._channel_absmax(is_signed=True))
        stacked = torch.cat([layer.weight for layer in self._layers]) / shifts
        found = search_exponents(
            self._token_sample() * shifts,
            stacked.to(torch.float32),
            self._config.weight_candidates,  # type: ignore[arg-type]
            self._config.activation_candidates,  # type: ignore[arg-type]
        )
        channel_scale = found.activation_scale / shifts
        sizes = [layer.planned.out_features for layer in self._layers]
        for layer, scale in zip(self._layers, torch.split(found.weight_scale, sizes), strict=True):
            layer.weight = layer.weight * channel_scale
            layer.scale = (scale * found.activation_scale).clamp_min(MIN_SCALE).unsqueeze(1)
        activation = self._activation_of(found.activation_format)
        return _Choice(activation, channel_scale, None, found.weight_format, found.error)

    def _capture(self, consume: InputConsumer, what: str) -> None:
        """Hand the prepared inputs to `consume`."""
        self._capture_samples(lambda x, _samples: consume(self._prepared_input(x)), what)

    def _capture_samples(self, consume: SampleConsumer, what: str) -> None:
        """Hand the inputs as they come to `consume`."""
        assert self._stream is not None  # needs_calibration made sure of it
        self._stream.capture_samples(self._first.site, consume, f"{what} of {self._first.site.input_group}")

    def _channel_absmax(self, is_signed: bool) -> Tensor:
        """Largest magnitude of every rotated channel over the calibration data, float64, never zero.

        For a one-sided format only positive numbers count, as in `quantizers.scaling.absmax`.
        """
        largest = torch.zeros(self._first.in_features, dtype=torch.float64, device=self._device)

        def collect(x: Tensor) -> None:
            batch = (x.abs() if is_signed else x.clamp_min(0)).amax(dim=0).to(torch.float64)
            torch.maximum(largest, batch, out=largest)

        self._capture(collect, "scales")
        # A silent channel gets the mean of the others: it may speak at other time steps.
        live = largest > 0
        return torch.where(live, largest, largest[live].mean() if bool(live.any()) else torch.ones_like(largest))

    def _token_sample(self) -> Tensor:
        """`SEARCH_TOKENS` inputs, or all if there are fewer, drawn evenly: float32 (tokens, in_features)."""
        sample = TokenSample(SEARCH_TOKENS, self._config.seed, f"search tokens/{self._first.site.input_group}")
        self._capture(sample.add, "search tokens")
        return sample.tokens(self._first.in_features).to(self._device)

    def _moments(self, choice: _Choice) -> InputMoments:
        moments = InputMoments(self._first.in_features, self._device)

        def accumulate(x: Tensor, samples: int | None) -> None:
            prepared = self._prepared_input(x)
            scaled = prepared if choice.channel_scale is None else prepared / choice.channel_scale
            found = quantize_centred(scaled, choice.activation, choice.static_scale, samples or 1)
            moments.add(scaled, found.dequantize())

        self._capture_samples(accumulate, "Hessian")
        return moments

    def _activation_spec(self) -> ActivationSpec:
        """Format of the shared input: as asked, or the one that all the layers reading it would choose together."""
        config = self._config
        if self._is_wide:
            return self._activation_of(WIDE_FORMAT)
        fmt = config.activation_candidates[0]
        if len(config.activation_candidates) > 1:
            together = torch.cat([layer.weight.reshape(1, -1) for layer in self._layers], dim=1)
            statistic = range_statistic(together, config.alpha)[0]
            fmt = select_format(statistic, config.activation_candidates)  # type: ignore[arg-type]
        return self._activation_of(fmt)

    def _activation_of(self, fmt: NumberFormat) -> ActivationSpec:
        """The specification of the shared input in the format `fmt`."""
        rank = 0 if self._emphasis is None else len(self._emphasis.directions)
        return activation_spec(self._config, fmt, self._first, rank, self._is_sensitive, self._centring)

    def _replace(
        self, layer: _Layer, choice: _Choice, moments: InputMoments | None, record: QuantizationRecord
    ) -> None:
        """Quantize one layer, put it in the place of the float one, and note what happened."""
        site, planned, config = layer.planned.site, layer.planned, self._config
        weight_spec, format_index, facts = _weight_spec(layer.weight, config, choice.weight_format, self._is_sensitive)
        spec = LinearSpec(
            site.name, planned.in_features, planned.out_features, weight_spec, choice.activation, planned.rotation
        )
        float_layer = self._model.get_submodule(site.name)
        source = weight_matrix(float_layer)
        zeros = {
            "zero_output_channels": int((source == 0).all(dim=1).sum()),
            "zero_input_channels": int((source == 0).all(dim=0).sum()),
        }
        hessian = None
        if moments is not None and config.gptq:
            # What the bias takes over needs no codes.
            hessian = moments.centred_hessian if config.bias_correction else moments.hessian
        quantized, outcome = _quantize_weight(layer, hessian, spec, format_index, config)
        if moments is not None and config.bias_correction:
            correction = layer.weight @ moments.mean - quantized.dequantize().double() @ moments.quantized_mean
            layer.bias = correction if layer.bias is None else layer.bias + correction
        replacement = quantized_class(float_layer).from_quantized(
            spec,
            quantized,
            None if layer.bias is None else layer.bias.to(torch.float32),
            self._signs,
            choice.channel_scale,
            choice.static_scale,
            self._input_scale,
            layer.branch,
            self._shift,
            None if self._emphasis is None else self._emphasis.directions,
        )
        self._model.set_submodule(site.name, replacement.eval())
        entry = {"role": site.role, **facts, **zeros, **outcome, "arithmetic": spec.arithmetic}
        if choice.search_error is not None:
            entry["search_error"] = choice.search_error
        if planned.smoothing != "none":
            entry["smoothing"] = planned.smoothing
        if self._error_share is not None:
            entry["error_share"] = self._error_share
        if self._emphasis is not None:
            entry["emphasis"] = {
                "rank": len(self._emphasis.directions),
                "error_share": self._emphasis.share,
                "gain_db": self._emphasis.gain_db,
            }
        record.layers[site.name] = entry


def _split_off_branch(weight: Tensor, rank: int, applied_scale: Tensor | None) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The stored branch of a smoothed weight, and what it leaves, float64.

    Factors that the layer applies itself come after the branch, which reads the plain input: down holds them.
    """
    down, up = low_rank_factors(weight, rank)
    factors = torch.ones(weight.shape[1], device=weight.device) if applied_scale is None else applied_scale
    branch = (down * factors).to(BRANCH_DTYPE).contiguous(), up.to(BRANCH_DTYPE).contiguous()
    # What storage rounds off is left to the codes.
    return branch, weight - branch[1].to(torch.float64) @ (branch[0].to(torch.float64) / factors)


def _weight_spec(
    weight: Tensor, config: QuantizationConfig, found: NumberFormat | None, is_sensitive: bool
) -> tuple[WeightSpec, Tensor | None, dict[str, Any]]:
    """Format(s), index per output channel, and the statistic for the record.

    Args:
        weight: (out_features, in_features), rotated and scaled.
        config: the request.
        found: the format that a search has found, or None.
        is_sensitive: whether much of the model's error comes through the input.
    """
    candidates = config.weight_candidates
    width = weight.shape[1]
    if config.format_granularity == "channel":
        statistics = range_statistic(weight, config.alpha)
        chosen = [candidates.index(select_format(s, candidates)) for s in statistics]  # type: ignore[arg-type]
        index = torch.tensor(chosen, dtype=torch.uint8, device=weight.device)
        counts = {fmt.name: chosen.count(position) for position, fmt in enumerate(candidates)}
        facts = {"statistic": _finite(sorted(statistics)[len(statistics) // 2]), "formats_of_channels": counts}
        return weight_spec(config, candidates, width, is_sensitive), index, facts
    statistic = range_statistic(weight.reshape(1, -1), config.alpha)[0]
    fmt = found or (
        candidates[0] if len(candidates) == 1 else select_format(statistic, candidates)  # type: ignore[arg-type]
    )
    return weight_spec(config, (fmt,), width, is_sensitive), None, {"statistic": _finite(statistic)}


def _finite(value: float) -> float | None:
    """JSON has no infinity: a statistic over a zero quantile is recorded as null."""
    return value if math.isfinite(value) else None


def _quantize_weight(
    layer: _Layer, hessian: Tensor | None, spec: LinearSpec, format_index: Tensor | None, config: QuantizationConfig
) -> tuple[QuantizedTensor, dict[str, Any]]:
    """Scales, then GPTQ or round-to-nearest."""
    weight = layer.weight.to(torch.float32)
    scale = layer.scale
    if scale is None:
        rule = "mse" if config.scale_rule == "mse-refit" else config.scale_rule
        scale = weight_scales(weight, spec.weight, format_index, rule)
        if config.scale_rule == "mse-refit":
            scale = refit_scales(weight, round_to_nearest(weight, scale, spec.weight, format_index))
    if hessian is None:
        return round_to_nearest(weight, scale, spec.weight, format_index), {"method": "nearest"}
    quantized, outcome = gptq_quantize(weight, hessian, scale, spec.weight, format_index, config.act_order, spec.name)
    return quantized, {"method": "gptq", **asdict(outcome)}
