"""What the user asks for."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from hqdit.errors import UsageError
from hqdit.formats.catalog import FORMAT_NAMES, FP4_FORMATS, format_from_json
from hqdit.formats.number_format import FloatFormat, IntegerFormat, NumberFormat
from hqdit.quantizers.scaling import SCALE_RULES
from hqdit.quantizers.spec import (
    ACTIVATION_GRANULARITIES,
    SCALE_FORMATS,
    STATIC_GRANULARITIES,
    WEIGHT_GRANULARITIES,
)
from hqdit.transforms.rotation import parse_block

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


@dataclass(frozen=True)
class QuantizationConfig:
    """A request; every field has the paper's value as its default.

    Attributes:
        weights: "fp4" (format selection among E3M0, E2M1 and E1M2), a format's name, or "table:" and 16 integers.
        activations: "same" (the layer's format), a format's name, or a table; with `format_search` "fp4" or a floating
            point format.
        weight_granularity: tensor, channel (per output channel) or group.
        activation_granularity: token (dynamic), group (dynamic), tensor (static), channel (static per channel, folded
            into the weight) or channel-token (both).
        group_size: channels per group for the granularity group; a multiple of 4 that divides every width.
        format_granularity: "layer" or "channel": one choice for a layer, or one per output channel.
        alpha: quantile of the format statistic, strictly between 0 and 1.
        rotation: "full", "block:B" or "none".
        fold_value_rotation: fold the within-head part of the attention output's rotation into the value projection.
        group_fit: "exact": every group has `group_size` channels; "at-most": the largest multiple of 4 that divides the
            layer's width and is not above `group_size`.
        activation_scale_rule: "absmax"; "clipped": the share of it that suits normal numbers best; "rms": a multiple of
            the root mean square, likewise.
        scale_format: "float32", or "e4m3" for scales of groups in 8 bits.
        scale_rule: absmax, mse, or mse-refit (mse, then least squares against the codes), for weights.
        gptq: round weights by GPTQ; otherwise to nearest.
        act_order: GPTQ visits columns by descending Hessian diagonal.
        smoothing: alpha of SmoothQuant, from 0 to 1, or None for no smoothing; it comes before the rotation.
        smoothing_statistic: "absmax" or "rms": what the factors of smoothing are made of.
        centring: subtract every channel's mean over calibration data from the input; the bias takes it over.
        emphasis: the most directions in which an input is stretched because the model's output is sensitive to them
            (`quantizers.emphasis`); 0 for none.
        bias_correction: let the bias take over the mean of a layer's rounding error over calibration data.
        low_rank: rank of SVDQuant's 16-bit branch beside every quantized weight; 0 for none.
        format_search: formats and scales by LLM-FP4's search on the layer's output, instead of the statistic and the
            scale rule; the search finds scales per output channel, and static ones per input channel.
        modulation: quantize the layers that compute shifts, scales and gates from the conditioning, too.
        include: name patterns (fnmatch) of the layers to quantize, among the linear layers of the blocks.
        exclude: name patterns of the layers to leave alone.
        keep_dtype: dtype that unquantized tensors are stored in; None keeps the source's.
        seed: of signs, modulation pairs and calibration.

    Raises:
        UsageError: a value out of range; the message names the command line's flag.
    """

    weights: str = SELECT_FP4
    activations: str = SAME_AS_WEIGHTS
    weight_granularity: str = "channel"
    activation_granularity: str = "token"
    group_size: int | None = None
    format_granularity: str = "layer"
    alpha: float = 0.25
    rotation: str = "full"
    fold_value_rotation: bool = False
    group_fit: str = "exact"
    activation_scale_rule: str = "absmax"
    scale_format: str = "float32"
    scale_rule: str = "absmax"
    gptq: bool = True
    act_order: bool = False
    smoothing: float | None = None
    smoothing_statistic: str = "absmax"
    centring: bool = False
    emphasis: int = 0
    bias_correction: bool = False
    low_rank: int = 0
    format_search: bool = False
    modulation: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    keep_dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self._require_types()
        for flag, value, choices in (
            ("--weight-granularity", self.weight_granularity, WEIGHT_GRANULARITIES),
            ("--activation-granularity", self.activation_granularity, ACTIVATION_GRANULARITIES),
            ("--format-granularity", self.format_granularity, ("layer", "channel")),
            ("--group-fit", self.group_fit, GROUP_FITS),
            ("--activation-scale-rule", self.activation_scale_rule, DYNAMIC_SCALE_RULES),
            ("--scale-format", self.scale_format, SCALE_FORMATS),
            ("--scale-rule", self.scale_rule, WEIGHT_SCALE_RULES),
            ("--smoothing-statistic", self.smoothing_statistic, SMOOTHING_STATISTICS),
            ("--keep-dtype", self.keep_dtype, (None, *KEEP_DTYPES)),
        ):
            if value not in choices:
                raise UsageError(
                    f"{flag}: found {value!r}, needed one of {', '.join(str(c) for c in choices if c)}. Fix: pick one"
                )
        for flag, value, word in (
            ("--weights", self.weights, SELECT_FP4),
            ("--activations", self.activations, SELECT_FP4 if self.format_search else SAME_AS_WEIGHTS),
        ):
            if value != word:
                _parse_format(flag, value, word)
        if not 0 < self.alpha < 1:  # a NaN fails as well
            raise UsageError(
                f"--alpha: found {self.alpha}, needed a number strictly between 0 and 1. Fix: 0.25 is the default"
            )
        if self.rotation not in ("full", "none"):
            parse_block(self.rotation)
        uses_groups = "group" in (self.weight_granularity, self.activation_granularity)
        if uses_groups and (self.group_size is None or self.group_size < 4 or self.group_size % 4):
            raise UsageError(
                f"--group-size: found {self.group_size}, needed a positive multiple of 4 for the granularity group. "
                "Fix: for example --group-size 36"
            )
        if not uses_groups and self.group_size is not None:
            raise UsageError(
                f"--group-size: found {self.group_size} without a granularity that uses it, needed "
                "--weight-granularity group or --activation-granularity group. Fix: add one of them"
            )
        if self.format_granularity == "channel" and (self.weights != SELECT_FP4 or self.weight_granularity == "tensor"):
            raise UsageError(
                "--format-granularity: found channel, needed --weights fp4 and scales per channel or group. "
                "Fix: use --format-granularity layer"
            )
        if self.fold_value_rotation and self.rotation != "full":
            raise UsageError(
                f"--fold-value-rotation: found rotation {self.rotation}, needed full. Fix: add --rotation full"
            )
        self._require_methods()
        if self.seed < 0:
            raise UsageError(f"--seed: found {self.seed!r}, needed an integer of at least 0. Fix: 0 is the default")

    def _require_methods(self) -> None:
        """Smoothing, the low-rank branch and the search: values, and what does not go together."""
        if self.smoothing is not None and not 0 <= self.smoothing <= 1:  # a NaN fails as well
            raise UsageError(f"--smoothing: found {self.smoothing}, needed a number from 0 to 1. Fix: for example 0.5")
        if self.low_rank < 0:
            raise UsageError(f"--low-rank: found {self.low_rank}, needed a rank of at least 0. Fix: for example 32")
        if self.low_rank and self.fold_value_rotation:
            raise UsageError(
                f"--low-rank: found {self.low_rank} with --fold-value-rotation, needed the unrotated input that the "
                "branch reads. Fix: use --no-fold-value-rotation"
            )
        if self.emphasis < 0:
            raise UsageError(f"--emphasis: found {self.emphasis}, needed a rank of at least 0. Fix: for example 4")
        for flag, value in (("--emphasis", self.emphasis), ("--centring", self.centring)):
            if value and self.fold_value_rotation:
                raise UsageError(
                    f"{flag}: found {value} with --fold-value-rotation, needed the unrotated input. "
                    "Fix: use --no-fold-value-rotation"
                )
        self._require_scales()
        if not self.format_search:
            return
        settings = (self.weight_granularity, self.activation_granularity, self.format_granularity, self.scale_rule)
        if settings != ("channel", "channel", "layer", "absmax"):
            raise UsageError(
                f"--format-search: found granularities {', '.join(settings[:3])} and scale rule {settings[3]}, needed "
                "channel for weights and activations, layer for formats and absmax, because the search finds the "
                "scales. Fix: add --activation-granularity channel"
            )
        for flag, formats in (("--weights", self.weight_candidates), ("--activations", self.activation_candidates)):
            if not all(isinstance(fmt, FloatFormat) for fmt in formats):
                raise UsageError(
                    f"{flag}: found {formats[0]} with --format-search, needed fp4 or a floating point format, which "
                    "has an exponent bias. Fix: use fp4, or --no-format-search"
                )

    def _require_scales(self) -> None:
        """Rules of activation scales, formats of scales and fits of groups: what does not go together."""
        if self.activation_scale_rule != "absmax" and self.activation_granularity in ("tensor", "channel"):
            raise UsageError(
                f"--activation-scale-rule: found {self.activation_scale_rule} with static scales, needed dynamic ones. "
                "Fix: use --activation-granularity token, group or channel-token, or the rule absmax"
            )
        if self.scale_format != "float32" and "group" not in (self.weight_granularity, self.activation_granularity):
            raise UsageError(
                f"--scale-format: found {self.scale_format} without groups, needed scales of groups. "
                "Fix: add --weight-granularity group or --activation-granularity group"
            )
        if self.group_fit != "exact" and self.group_size is None:
            raise UsageError(
                f"--group-fit: found {self.group_fit} without groups, needed a group size. Fix: add --group-size 36"
            )
        if self.smoothing_statistic != "absmax" and self.smoothing is None:
            raise UsageError(
                f"--smoothing-statistic: found {self.smoothing_statistic} without smoothing, needed its strength. "
                "Fix: add --smoothing 0.5"
            )

    def _require_types(self) -> None:
        for name, kinds in _FIELD_TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                needed = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
                raise UsageError(
                    f"QuantizationConfig.{name}: found {value!r}, needed {needed}. Fix: give it a value of that type"
                )
        for name in ("include", "exclude"):
            if not all(isinstance(pattern, str) for pattern in getattr(self, name)):
                raise UsageError(
                    f"QuantizationConfig.{name}: found {getattr(self, name)!r}, needed name patterns. Fix: pass strings"
                )

    @property
    def weight_candidates(self) -> tuple[NumberFormat, ...]:
        """The formats that a weight may get."""
        return FP4_FORMATS if self.weights == SELECT_FP4 else (format_from_json(self.weights),)

    @property
    def activation_candidates(self) -> tuple[NumberFormat, ...]:
        """The formats that an input may get; with "same" they are those of the weights."""
        if self.activations in (SELECT_FP4, SAME_AS_WEIGHTS):
            return FP4_FORMATS if self.activations == SELECT_FP4 else self.weight_candidates
        return (format_from_json(self.activations),)

    @property
    def needs_calibration(self) -> bool:
        """Whether `quantize` needs a `CalibrationSet`; a search does through its static scales."""
        return (
            self.gptq
            or self.needs_survey
            or self.bias_correction
            or self.activation_granularity in STATIC_GRANULARITIES
        )

    @property
    def needs_survey(self) -> bool:
        """Whether the float model's inputs have to be known before anything is quantized."""
        return self.smoothing is not None or self.centring or self.emphasis > 0

    def group_size_for(self, width: int) -> int | None:
        """Channels per group of a layer with `width` input channels; None without groups, `group_size` if none fits."""
        if self.group_size is None or self.group_fit == "exact":
            return self.group_size
        fitting = [size for size in range(4, self.group_size + 1, 4) if width % size == 0]
        return max(fitting, default=self.group_size)

    def replace(self, **changes: Any) -> QuantizationConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain values, without added settings at their defaults; `from_json` is the inverse."""
        values = dataclasses.asdict(self)
        for key, default in _ADDED.items():
            if values[key] == default:
                del values[key]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    @classmethod
    def from_json(cls, values: str | dict[str, Any]) -> QuantizationConfig:
        """From a dictionary or a JSON text.

        Raises:
            UsageError: no JSON object, an unknown key, or a value out of range.
        """
        try:
            found = json.loads(values) if isinstance(values, str) else values
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"QuantizationConfig: found no valid JSON ({error}), needed an object. Fix: write it with to_json"
            ) from error
        if not isinstance(found, dict):
            raise UsageError(
                f"QuantizationConfig: found {type(found).__name__}, needed a dictionary or the JSON text of an object. "
                "Fix: write it with to_json"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(found.keys() - known)
        if unknown:
            raise UsageError(
                f"QuantizationConfig: found the unknown keys {', '.join(unknown)}, needed some of "
                f"{', '.join(sorted(known))}. Fix: correct or remove them"
            )
        settings: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) and key in ("include", "exclude") else value
            for key, value in found.items()
        }
        return cls(**settings)

    @classmethod
    def preset(cls, name: str, bits: str = "W4A4") -> QuantizationConfig:
        """The configuration called `name`, one of `PRESETS`, at a bit width of `BIT_WIDTHS`.

        With 8 or 6 bits formats are not chosen: methods on floating point take E4M3 and E2M3, those on integers INT8
        and INT6. 4-bit weights stay those of the preset.

        Raises:
            UsageError: no such preset or bit width.
        """
        for flag, value, choices in (("--preset", name, PRESETS), ("--bits", bits, BIT_WIDTHS)):
            if value not in choices:
                raise UsageError(f"{flag}: found {value!r}, needed one of {', '.join(choices)}. Fix: pick one of them")
        config = PRESETS[name]
        weight_bits, activation_bits = BIT_WIDTHS[bits]
        is_integer = all(isinstance(fmt, IntegerFormat) for fmt in config.weight_candidates)
        of_bits = {8: "int8", 6: "int6"} if is_integer else {8: "e4m3", 6: "e2m3"}
        return config.replace(
            weights=of_bits.get(weight_bits, config.weights),
            activations=of_bits.get(activation_bits, config.activations),
        )


#: Settings that came after format version 1: files that do not use them are what an older release reads.
_ADDED: dict[str, Any] = {
    "smoothing": None,
    "low_rank": 0,
    "format_search": False,
    "modulation": True,
    "group_fit": "exact",
    "activation_scale_rule": "absmax",
    "scale_format": "float32",
    "smoothing_statistic": "absmax",
    "centring": False,
    "emphasis": 0,
    "bias_correction": False,
}

_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("weights", "activations", "weight_granularity", "activation_granularity", "rotation"), (str,)),
    **dict.fromkeys(("format_granularity", "scale_rule", "group_fit", "activation_scale_rule"), (str,)),
    **dict.fromkeys(("scale_format", "smoothing_statistic"), (str,)),
    **dict.fromkeys(("fold_value_rotation", "gptq", "act_order", "format_search", "modulation"), (bool,)),
    **dict.fromkeys(("centring", "bias_correction"), (bool,)),
    **dict.fromkeys(("include", "exclude"), (tuple,)),
    "group_size": (int, type(None)),
    "keep_dtype": (str, type(None)),
    "alpha": (float, int),
    "smoothing": (float, int, type(None)),
    **dict.fromkeys(("low_rank", "emphasis", "seed"), (int,)),
}


def _parse_format(flag: str, value: object, word: str) -> None:
    try:
        format_from_json(value)
    except UsageError as error:
        raise UsageError(
            f"{flag}: found {value!r}, needed {word}, {', '.join(FORMAT_NAMES)} or table:n,...,n (16 ascending "
            "integers from -128 to 127). Fix: pick one of them"
        ) from error


#: (weight bits, activation bits) of each bit width that a preset comes in.
BIT_WIDTHS: dict[str, tuple[int, int]] = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A6": (4, 6), "W4A4": (4, 4)}

_PAPER = QuantizationConfig()
_NEAREST = QuantizationConfig(weights="int4", rotation="none", gptq=False)
#: Beyond the paper, at its granularity: what follows from both operands being nearly normal after the rotation, and from
#: some directions of an input mattering more than others.
_PLUS = _PAPER.replace(
    weights="lloyd-max",
    scale_rule="mse-refit",
    act_order=True,
    smoothing=0.5,
    smoothing_statistic="rms",
    centring=True,
    emphasis=8,
    bias_correction=True,
)

#: The methods, at W4A4. hqdit is the paper: full rotation, format selection, GPTQ; those named after it lack one part
#: or differ in one. The others are what it is compared with; docs/method.md has the source of each.
PRESETS: dict[str, QuantizationConfig] = {
    "hqdit": _PAPER,
    "minmax": _NEAREST.replace(weights="e2m1"),
    "minmax-int4": _NEAREST,
    "smoothquant": _NEAREST.replace(smoothing=0.5),
    "fpq": _NEAREST.replace(weights="fp4", activations="fp4", activation_granularity="channel", format_search=True),
    "gptq": _NEAREST.replace(gptq=True),
    "hqdit-plus": _PLUS.replace(
        activation_scale_rule="clipped",
        weight_granularity="group",
        activation_granularity="group",
        group_size=72,
        group_fit="at-most",
        scale_format="e4m3",
    ),
    "hqdit-plus-token": _PLUS.replace(activation_scale_rule="rms"),
    "w4a8": _PAPER.replace(activations="int8"),
    "quarot": _PAPER.replace(weights="int4", scale_rule="mse"),
    "svdquant": _NEAREST.replace(smoothing=0.5, low_rank=32),
    "hqdit-no-rotation": _PAPER.replace(rotation="none"),
    "hqdit-fixed-format": _PAPER.replace(weights="e2m1"),
    "hqdit-no-gptq": _PAPER.replace(gptq=False),
    "hqdit-channel": _PAPER.replace(activation_granularity="channel"),
}
DEFAULT_PRESET = "hqdit"
