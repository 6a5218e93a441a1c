"""What the user asks for."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from hqdit.errors import UsageError
from hqdit.formats.catalog import FP4_FORMATS, format_from_json
from hqdit.formats.number_format import IntegerFormat, NumberFormat
from hqdit.pipeline.config_checks import SAME_AS_WEIGHTS, SELECT_FP4, require_valid
from hqdit.quantizers.spec import STATIC_GRANULARITIES


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
        sensitive_group_size: the same as `group_size` for inputs through which much of the model's error comes
            (`pipeline.known_input.SENSITIVE_SHARE`), or None for no such distinction.
        activation_scale_rule: "absmax"; "clipped": the share of it that suits normal numbers best; "rms": a multiple of
            the root mean square, likewise.
        scale_format: "float32", or "e4m3" for scales of groups in 8 bits.
        scale_rule: absmax, mse, or mse-refit (mse, then least squares against the codes), for weights.
        gptq: round weights by GPTQ; otherwise to nearest.
        act_order: GPTQ visits columns by descending Hessian diagonal.
        smoothing: alpha of SmoothQuant, from 0 to 1, or None for no smoothing; it comes before the rotation.
        smoothing_statistic: "absmax" or "rms": what the factors of smoothing are made of.
        centring: "static": subtract every channel's mean over calibration data from the input; the bias takes it over.
            "sample": where that is predicted to pay, subtract what is left of the mean over the tokens of each sample,
            too, which goes through the layer in 8 bits.
        emphasis: the most directions in which an input is stretched because the model's output is sensitive to them
            (`quantizers.emphasis`); 0 for none.
        bias_correction: let the bias take over the mean of a layer's rounding error over calibration data.
        average_bits: give the inputs through which most of the error comes 8 bits, as long as the mean over the layers
            of the bits for each number of their inputs, scales included, is at most this; None for no such inputs.
        max_error: give inputs 8 bits until the predicted power of the output's error, relative to the output's, is at
            most this; None for no such inputs, or with `average_bits` for as small an error as it allows.
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
    sensitive_group_size: int | None = None
    activation_scale_rule: str = "absmax"
    scale_format: str = "float32"
    scale_rule: str = "absmax"
    gptq: bool = True
    act_order: bool = False
    smoothing: float | None = None
    smoothing_statistic: str = "absmax"
    centring: str = "none"
    emphasis: int = 0
    bias_correction: bool = False
    average_bits: float | None = None
    max_error: float | None = None
    low_rank: int = 0
    format_search: bool = False
    modulation: bool = True
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    keep_dtype: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_valid(self, _FIELD_TYPES)

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
        return self.smoothing is not None or self.centring != "none" or self.needs_gradients

    @property
    def needs_gradients(self) -> bool:
        """Whether it has to be known how strongly the model's output depends on every input."""
        return (
            self.emphasis > 0
            or self.sensitive_group_size is not None
            or self.centring == "sample"
            or self.average_bits is not None
            or self.max_error is not None
        )

    def group_size_for(self, width: int, is_sensitive: bool = False) -> int | None:
        """Channels per group of a layer, or None without groups.

        Args:
            width: its input channels.
            is_sensitive: whether `sensitive_group_size` holds for it.
        """
        asked = (self.sensitive_group_size if is_sensitive else None) or self.group_size
        if asked is None or self.group_fit == "exact":
            return asked
        fitting = [size for size in range(4, asked + 1, 4) if width % size == 0]
        return max(fitting, default=asked)

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
    "sensitive_group_size": None,
    "activation_scale_rule": "absmax",
    "scale_format": "float32",
    "smoothing_statistic": "absmax",
    "centring": "none",
    "emphasis": 0,
    "bias_correction": False,
    "average_bits": None,
    "max_error": None,
}

_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("weights", "activations", "weight_granularity", "activation_granularity", "rotation"), (str,)),
    **dict.fromkeys(("format_granularity", "scale_rule", "group_fit", "activation_scale_rule"), (str,)),
    **dict.fromkeys(("scale_format", "smoothing_statistic", "centring"), (str,)),
    **dict.fromkeys(("fold_value_rotation", "gptq", "act_order", "format_search", "modulation"), (bool,)),
    "bias_correction": (bool,),
    **dict.fromkeys(("include", "exclude"), (tuple,)),
    **dict.fromkeys(("group_size", "sensitive_group_size"), (int, type(None))),
    "keep_dtype": (str, type(None)),
    "alpha": (float, int),
    **dict.fromkeys(("smoothing", "average_bits", "max_error"), (float, int, type(None))),
    **dict.fromkeys(("low_rank", "emphasis", "seed"), (int,)),
}


#: (weight bits, activation bits) of each bit width that a preset comes in.
BIT_WIDTHS: dict[str, tuple[int, int]] = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A6": (4, 6), "W4A4": (4, 4)}

_PAPER = QuantizationConfig()
_NEAREST = QuantizationConfig(weights="int4", rotation="none", gptq=False)
#: Beyond the paper, at its granularity: what follows from both operands being nearly normal after the rotation, and
#: from some directions of an input mattering more than others.
_PLUS = _PAPER.replace(
    weights="lloyd-max",
    scale_rule="mse-refit",
    act_order=True,
    smoothing=0.5,
    smoothing_statistic="rms",
    centring="sample",
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
        sensitive_group_size=16,
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
