"""The plan: what will happen to every linear layer, decided before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from hqdit.errors import UsageError
from hqdit.formats.number_format import NumberFormat
from hqdit.layers.linear import HQLinear
from hqdit.layers.matrix_layers import is_matrix_layer, matrix_shape
from hqdit.models.adapter import LinearSite, adapter_for
from hqdit.models.precision import stays_in_float32
from hqdit.pipeline.config import QuantizationConfig
from hqdit.pipeline.config_checks import SELECT_FP4
from hqdit.quantizers.expected_scale import absmax_factor, rms_factor
from hqdit.quantizers.spec import ActivationSpec, LinearSpec, WeightSpec, require_group_size
from hqdit.transforms.rotation import RotationSpec, plan_rotation


@dataclass(frozen=True)
class PlannedLayer:
    """One layer that will be quantized; formats are open until the weights have been looked at.

    Attributes:
        site: name, role and place.
        in_features: width of its input.
        out_features: number of output channels.
        rotation: what its input is rotated by.
        format_policy: for people, as in "fp4 (e3m0, e2m1 or e1m2 per layer)".
        smoothing: where the factors of its input will be applied, one of `quantizers.spec.SMOOTHING_PLACES`.
    """

    site: LinearSite
    in_features: int
    out_features: int
    rotation: RotationSpec
    format_policy: str
    smoothing: str = "none"


@dataclass(frozen=True)
class QuantizationPlan:
    """Planned layers in the order of the forward pass, and name -> reason for every linear layer left alone."""

    layers: tuple[PlannedLayer, ...]
    skipped: dict[str, str]


def _matching(patterns: tuple[str, ...], names: list[str], flag: str) -> set[str]:
    chosen = set()
    for pattern in patterns:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise UsageError(
                f"{flag}: found the pattern {pattern!r}, which matches none of the {len(names)} layers that can be "
                f"quantized, needed one that does. Fix: patterns are fnmatch on names such as {names[0]}"
            )
        chosen |= matched
    return chosen


def _policy(config: QuantizationConfig) -> str:
    if config.weights != SELECT_FP4:
        weights = config.weight_candidates[0].name
    else:
        names = " or ".join(fmt.name for fmt in config.weight_candidates)
        weights = f"fp4 ({names} per {'layer' if config.format_granularity == 'layer' else 'output channel'})"
    parts = [weights, f"input {config.activations}"]
    parts += ["searched"] if config.format_search else []
    parts += [f"smoothed by alpha {config.smoothing:g}"] if config.smoothing is not None else []
    parts += [f"centred ({config.centring})"] if config.centring != "none" else []
    if config.average_bits is not None or config.max_error is not None:
        bits = "" if config.average_bits is None else f" up to {config.average_bits:g} bits on average"
        error = "" if config.max_error is None else f" down to a predicted error of {config.max_error:g}"
        parts.append(f"some inputs int8{bits}{error}")
    parts += [f"at most {config.emphasis} emphasised directions"] if config.emphasis else []
    parts += [f"16-bit branch of rank {config.low_rank}"] if config.low_rank else []
    return "; ".join(parts)


def _smoothing_place(site: LinearSite, modulated: list[str], config: QuantizationConfig) -> str:
    """Folded where a layer before this one can absorb the factors of its input, else applied by the layer itself."""
    if config.smoothing is None:
        return "none"
    return "folded" if site.input_group in modulated or site.value_site is not None else "applied"


def _reason(site: LinearSite, model: nn.Module, config: QuantizationConfig) -> str:
    if stays_in_float32(model, site.name):
        return "its class keeps it in float32"
    is_switched_off = site.is_modulation and not config.modulation
    return "modulation, which stays as it is without --modulation" if is_switched_off else "excluded by name"


def _draft(layer: PlannedLayer, config: QuantizationConfig) -> LinearSpec:
    """The layer's specification with the first candidate formats, which finds every fault that needs no data."""
    return LinearSpec(
        layer.site.name,
        layer.in_features,
        layer.out_features,
        weight_spec(config, config.weight_candidates[:1], layer.in_features),
        activation_spec(config, config.activation_candidates[0], layer),
        layer.rotation,
    )


def weight_spec(
    config: QuantizationConfig, formats: tuple[NumberFormat, ...], width: int, is_sensitive: bool = False
) -> WeightSpec:
    """The specification of a weight of `width` input channels in `formats`, as `config` asks for it."""
    group_size = config.group_size_for(width, is_sensitive) if config.weight_granularity == "group" else None
    scale_format = config.scale_format if group_size is not None else "float32"
    return WeightSpec(formats, config.weight_granularity, group_size, config.low_rank, scale_format)


def activation_spec(
    config: QuantizationConfig,
    fmt: NumberFormat,
    layer: PlannedLayer,
    emphasis: int = 0,
    is_sensitive: bool = False,
    centring: str | None = None,
) -> ActivationSpec:
    """The specification of a layer's input in the format `fmt`, as `config` asks for it.

    Args:
        config: the request.
        fmt: of the codes.
        layer: its width and the place of its smoothing.
        emphasis: rank of the emphasis that was chosen.
        is_sensitive: whether much of the model's error comes through the input.
        centring: that was chosen; None for the one that needs no data.
    """
    group_size = None
    if config.activation_granularity == "group":
        group_size = config.group_size_for(layer.in_features, is_sensitive)
    factor = 1.0
    if config.activation_scale_rule != "absmax":
        of_rule = rms_factor if config.activation_scale_rule == "rms" else absmax_factor
        factor = of_rule(fmt, group_size or layer.in_features)
    return ActivationSpec(
        fmt,
        config.activation_granularity,
        group_size,
        layer.smoothing,
        "rms" if config.activation_scale_rule == "rms" else "absmax",
        factor,
        config.scale_format if group_size is not None else "float32",
        centring or ("none" if config.centring == "none" else "static"),
        emphasis,
    )


def plan_quantization(model: nn.Module, config: QuantizationConfig) -> QuantizationPlan:
    """Decide layer by layer; changes nothing.

    Raises:
        UsageError: a pattern that matches nothing, nothing left to quantize, a layer that is quantized already, or a
            block or group size that does not divide a width, or a rank that a layer cannot have.
        NumericsError: a width without a Hadamard matrix; the message names the layer and the blocks that would work.
    """
    adapter = adapter_for(model)
    sites = adapter.sites(model)
    names = [site.name for site in sites]
    chosen = _matching(config.include, names, "--include")
    if config.exclude:
        chosen -= _matching(config.exclude, names, "--exclude")
    chosen -= {site.name for site in sites if stays_in_float32(model, site.name)}
    if not config.modulation:
        chosen -= {site.name for site in sites if site.is_modulation}
    if not chosen:
        raise UsageError(
            "--include, --exclude, --no-modulation: found that they leave no layer that is not kept in float32, needed "
            "at least one. Fix: exclude fewer layers"
        )
    layers = []
    modulated = adapter.modulated_groups(model)
    for site in sites:
        if site.name not in chosen:
            continue
        layer = model.get_submodule(site.name)
        if not is_matrix_layer(layer) or isinstance(layer, HQLinear):
            raise UsageError(
                f"{site.name}: found {type(layer).__name__}, needed a float linear layer. Fix: start from a float model"
            )
        in_features, out_features = matrix_shape(layer)
        folds = config.fold_value_rotation and site.head_dim is not None and site.value_site in chosen
        rotation = plan_rotation(config.rotation, in_features, site.name, site.head_dim if folds else None)
        if config.group_size is not None:
            require_group_size(config.group_size_for(in_features), in_features, f"--group-size for {site.name}")
        if config.sensitive_group_size is not None:
            sensitive = config.group_size_for(in_features, is_sensitive=True)
            require_group_size(sensitive, in_features, f"--sensitive-group-size for {site.name}")
        smoothing = _smoothing_place(site, modulated, config)
        planned = PlannedLayer(site, in_features, out_features, rotation, _policy(config), smoothing)
        _draft(planned, config)
        layers.append(planned)
    skipped = {site.name: _reason(site, model, config) for site in sites if site.name not in chosen}
    return QuantizationPlan(tuple(layers), skipped | adapter.kept_layers(model))
