"""What a request may say: the choices, and what does not go together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from hqdit.errors import UsageError
from hqdit.formats.catalog import FORMAT_NAMES, format_from_json
from hqdit.formats.number_format import FloatFormat
from hqdit.quantizers.scaling import SCALE_RULES
from hqdit.quantizers.spec import (
    ACTIVATION_GRANULARITIES,
    CENTRINGS,
    SCALE_FORMATS,
    STATIC_GRANULARITIES,
    WEIGHT_GRANULARITIES,
)
from hqdit.transforms.rotation import parse_block

if TYPE_CHECKING:
    from hqdit.pipeline.config import QuantizationConfig

#: Let data choose among E3M0, E2M1 and E1M2.
SELECT_FP4 = "fp4"
#: Activations take the format that was chosen for the weights of the layers that read them.
SAME_AS_WEIGHTS = "same"

GROUP_FITS = ("exact", "at-most")
#: Of dynamic scales; clipped is absmax with a factor below 1.
DYNAMIC_SCALE_RULES = ("absmax", "clipped", "rms")
#: Of weights: those of `quantizers.scaling`, and mse with scales that are fitted to the codes afterwards.
WEIGHT_SCALE_RULES = (*SCALE_RULES, "mse-refit")
SMOOTHING_STATISTICS = ("absmax", "rms")

KEEP_DTYPES = ("float32", "bfloat16", "float16")


def require_valid(config: QuantizationConfig, field_types: Mapping[str, tuple[type, ...]]) -> None:
    """Raise `UsageError`, which names the command line's flag, unless all fields of `config` make sense together.

    Args:
        config: any.
        field_types: field -> what its value may be.
    """
    _require_types(config, field_types)
    for flag, value, choices in (
        ("--weight-granularity", config.weight_granularity, WEIGHT_GRANULARITIES),
        ("--activation-granularity", config.activation_granularity, ACTIVATION_GRANULARITIES),
        ("--format-granularity", config.format_granularity, ("layer", "channel")),
        ("--group-fit", config.group_fit, GROUP_FITS),
        ("--activation-scale-rule", config.activation_scale_rule, DYNAMIC_SCALE_RULES),
        ("--scale-format", config.scale_format, SCALE_FORMATS),
        ("--scale-rule", config.scale_rule, WEIGHT_SCALE_RULES),
        ("--smoothing-statistic", config.smoothing_statistic, SMOOTHING_STATISTICS),
        ("--centring", config.centring, CENTRINGS),
        ("--keep-dtype", config.keep_dtype, (None, *KEEP_DTYPES)),
    ):
        if value not in choices:
            raise UsageError(
                f"{flag}: found {value!r}, needed one of {', '.join(str(c) for c in choices if c)}. Fix: pick one"
            )
    for flag, value, word in (
        ("--weights", config.weights, SELECT_FP4),
        ("--activations", config.activations, SELECT_FP4 if config.format_search else SAME_AS_WEIGHTS),
    ):
        if value != word:
            _parse_format(flag, value, word)
    if not 0 < config.alpha < 1:  # a NaN fails as well
        raise UsageError(
            f"--alpha: found {config.alpha}, needed a number strictly between 0 and 1. Fix: 0.25 is the default"
        )
    if config.rotation not in ("full", "none"):
        parse_block(config.rotation)
    uses_groups = "group" in (config.weight_granularity, config.activation_granularity)
    if uses_groups and (config.group_size is None or config.group_size < 4 or config.group_size % 4):
        raise UsageError(
            f"--group-size: found {config.group_size}, needed a positive multiple of 4 for the granularity group. "
            "Fix: for example --group-size 36"
        )
    if not uses_groups and config.group_size is not None:
        raise UsageError(
            f"--group-size: found {config.group_size} without a granularity that uses it, needed "
            "--weight-granularity group or --activation-granularity group. Fix: add one of them"
        )
    if config.format_granularity == "channel" and (
        config.weights != SELECT_FP4 or config.weight_granularity == "tensor"
    ):
        raise UsageError(
            "--format-granularity: found channel, needed --weights fp4 and scales per channel or group. "
            "Fix: use --format-granularity layer"
        )
    if config.fold_value_rotation and config.rotation != "full":
        raise UsageError(
            f"--fold-value-rotation: found rotation {config.rotation}, needed full. Fix: add --rotation full"
        )
    _require_methods(config)
    if config.seed < 0:
        raise UsageError(f"--seed: found {config.seed!r}, needed an integer of at least 0. Fix: 0 is the default")


def _require_methods(config: QuantizationConfig) -> None:
    """Smoothing, the low-rank branch and the search: values, and what does not go together."""
    if config.smoothing is not None and not 0 <= config.smoothing <= 1:  # a NaN fails as well
        raise UsageError(f"--smoothing: found {config.smoothing}, needed a number from 0 to 1. Fix: for example 0.5")
    if config.low_rank < 0:
        raise UsageError(f"--low-rank: found {config.low_rank}, needed a rank of at least 0. Fix: for example 32")
    if config.low_rank and config.fold_value_rotation:
        raise UsageError(
            f"--low-rank: found {config.low_rank} with --fold-value-rotation, needed the unrotated input that the "
            "branch reads. Fix: use --no-fold-value-rotation"
        )
    if config.emphasis < 0:
        raise UsageError(f"--emphasis: found {config.emphasis}, needed a rank of at least 0. Fix: for example 4")
    for flag, value, off in (("--emphasis", config.emphasis, 0), ("--centring", config.centring, "none")):
        if value != off and config.fold_value_rotation:
            raise UsageError(
                f"{flag}: found {value} with --fold-value-rotation, needed the unrotated input. "
                "Fix: use --no-fold-value-rotation"
            )
    if config.centring == "sample" and config.activation_granularity in STATIC_GRANULARITIES:
        raise UsageError(
            f"--centring: found sample with --activation-granularity {config.activation_granularity}, needed scales "
            "that are found for each token. Fix: use granularity token or group, or --centring static"
        )
    _require_scales(config)
    _require_budget(config)
    if not config.format_search:
        return
    settings = (config.weight_granularity, config.activation_granularity, config.format_granularity, config.scale_rule)
    if settings != ("channel", "channel", "layer", "absmax"):
        raise UsageError(
            f"--format-search: found granularities {', '.join(settings[:3])} and scale rule {settings[3]}, needed "
            "channel for weights and activations, layer for formats and absmax, because the search finds the "
            "scales. Fix: add --activation-granularity channel"
        )
    for flag, formats in (("--weights", config.weight_candidates), ("--activations", config.activation_candidates)):
        if not all(isinstance(fmt, FloatFormat) for fmt in formats):
            raise UsageError(
                f"{flag}: found {formats[0]} with --format-search, needed fp4 or a floating point format, which "
                "has an exponent bias. Fix: use fp4, or --no-format-search"
            )


def _require_scales(config: QuantizationConfig) -> None:
    """Rules of activation scales, formats of scales and fits of groups: what does not go together."""
    if config.activation_scale_rule != "absmax" and config.activation_granularity in ("tensor", "channel"):
        raise UsageError(
            f"--activation-scale-rule: found {config.activation_scale_rule} with static scales, needed dynamic ones. "
            "Fix: use --activation-granularity token, group or channel-token, or the rule absmax"
        )
    if config.scale_format != "float32" and "group" not in (config.weight_granularity, config.activation_granularity):
        raise UsageError(
            f"--scale-format: found {config.scale_format} without groups, needed scales of groups. "
            "Fix: add --weight-granularity group or --activation-granularity group"
        )
    sensitive = config.sensitive_group_size
    if sensitive is not None and (config.group_size is None or sensitive < 4 or sensitive % 4):
        raise UsageError(
            f"--sensitive-group-size: found {sensitive} with group size {config.group_size}, needed a positive "
            "multiple of 4 beside --group-size. Fix: for example --sensitive-group-size 16"
        )
    if config.group_fit != "exact" and config.group_size is None:
        raise UsageError(
            f"--group-fit: found {config.group_fit} without groups, needed a group size. Fix: add --group-size 36"
        )
    if config.smoothing_statistic != "absmax" and config.smoothing is None:
        raise UsageError(
            f"--smoothing-statistic: found {config.smoothing_statistic} without smoothing, needed its strength. "
            "Fix: add --smoothing 0.5"
        )


def _require_budget(config: QuantizationConfig) -> None:
    """Bits and errors that inputs with 8 bits are chosen for."""
    for flag, value in (("--average-bits", config.average_bits), ("--max-error", config.max_error)):
        if value is None:
            continue
        if not 0 < value < math.inf:  # a NaN fails as well
            raise UsageError(
                f"{flag}: found {value}, needed a positive number. Fix: for example "
                f"{'4.5 bits' if flag == '--average-bits' else '0.01, an output SQNR of 20 dB'}"
            )
        is_static = config.activation_granularity in STATIC_GRANULARITIES or config.format_search
        if is_static or any(not fmt.is_int8 or fmt.bits > 4 for fmt in config.activation_candidates):
            raise UsageError(
                f"{flag}: found activations in {config.activation_candidates[0]} per {config.activation_granularity}, "
                "needed 4-bit ones with dynamic scales, of which some get 8 bits. Fix: use --activations lloyd-max and "
                "--activation-granularity token or group"
            )


def _require_types(config: QuantizationConfig, field_types: Mapping[str, tuple[type, ...]]) -> None:
    for name, kinds in field_types.items():
        value = getattr(config, name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            needed = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise UsageError(
                f"QuantizationConfig.{name}: found {value!r}, needed {needed}. Fix: give it a value of that type"
            )
    for name in ("include", "exclude"):
        if not all(isinstance(pattern, str) for pattern in getattr(config, name)):
            raise UsageError(
                f"QuantizationConfig.{name}: found {getattr(config, name)!r}, needed name patterns. Fix: pass strings"
            )


def _parse_format(flag: str, value: object, word: str) -> None:
    try:
        format_from_json(value)
    except UsageError as error:
        raise UsageError(
            f"{flag}: found {value!r}, needed {word}, {', '.join(FORMAT_NAMES)} or table:n,...,n (16 ascending "
            "integers from -128 to 127). Fix: pick one of them"
        ) from error
