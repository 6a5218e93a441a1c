"""What the user asks for."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from hqdit.errors import UsageError
from hqdit.formats.catalog import FORMAT_NAMES, FP4_FORMATS, format_from_json
from hqdit.formats.number_format import NumberFormat
from hqdit.quantizers.scaling import SCALE_RULES
from hqdit.quantizers.spec import ACTIVATION_GRANULARITIES, STATIC_GRANULARITIES, WEIGHT_GRANULARITIES
from hqdit.transforms.rotation import parse_block

#: Let the statistic choose among E3M0, E2M1 and E1M2.
SELECT_FP4 = "fp4"
#: Activations take the format that was chosen for the weights of the layers that read them.
SAME_AS_WEIGHTS = "same"

KEEP_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class QuantizationConfig:
    """A request; every field has the paper's value as its default.

    Attributes:
        weights: "fp4" (format selection among E3M0, E2M1 and E1M2), a format's name, or "table:" and 16 integers.
        activations: "same" (the layer's format), a format's name, or a table.
        weight_granularity: tensor, channel (per output channel) or group.
        activation_granularity: token (dynamic), group (dynamic), tensor (static), channel (static per channel, folded
            into the weight) or channel-token (both).
        group_size: channels per group for the granularity group; a multiple of 4 that divides every width.
        format_granularity: "layer" or "channel": one choice for a layer, or one per output channel.
        alpha: quantile of the format statistic, strictly between 0 and 1.
        rotation: "full", "block:B" or "none".
        fold_value_rotation: fold the within-head part of the attention output's rotation into the value projection.
        scale_rule: absmax or mse, for weights.
        gptq: round weights by GPTQ; otherwise to nearest.
        act_order: GPTQ visits columns by descending Hessian diagonal.
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
    scale_rule: str = "absmax"
    gptq: bool = True
    act_order: bool = False
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
            ("--scale-rule", self.scale_rule, SCALE_RULES),
            ("--keep-dtype", self.keep_dtype, (None, *KEEP_DTYPES)),
        ):
            if value not in choices:
                raise UsageError(
                    f"{flag}: found {value!r}, needed one of {', '.join(str(c) for c in choices if c)}. Fix: pick one"
                )
        for flag, value, word in (
            ("--weights", self.weights, SELECT_FP4),
            ("--activations", self.activations, SAME_AS_WEIGHTS),
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
        if self.seed < 0:
            raise UsageError(f"--seed: found {self.seed!r}, needed an integer of at least 0. Fix: 0 is the default")

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
    def needs_calibration(self) -> bool:
        """Whether `quantize` needs a `CalibrationSet`."""
        return self.gptq or self.activation_granularity in STATIC_GRANULARITIES

    def replace(self, **changes: Any) -> QuantizationConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        values = dataclasses.asdict(self)
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
    def preset(cls, name: str) -> QuantizationConfig:
        """The configuration called `name`: "hqdit" (the paper's method) or "minmax" (round-to-nearest E2M1).

        Raises:
            UsageError: no such preset.
        """
        if name not in PRESETS:
            raise UsageError(f"--preset: found {name!r}, needed one of {', '.join(PRESETS)}. Fix: pick one of them")
        return PRESETS[name]


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("weights", "activations", "weight_granularity", "activation_granularity", "rotation"), (str,)),
    **dict.fromkeys(("format_granularity", "scale_rule"), (str,)),
    **dict.fromkeys(("fold_value_rotation", "gptq", "act_order"), (bool,)),
    **dict.fromkeys(("include", "exclude"), (tuple,)),
    "group_size": (int, type(None)),
    "keep_dtype": (str, type(None)),
    "alpha": (float, int),
    "seed": (int,),
}


def _parse_format(flag: str, value: object, word: str) -> None:
    try:
        format_from_json(value)
    except UsageError as error:
        raise UsageError(
            f"{flag}: found {value!r}, needed {word}, {', '.join(FORMAT_NAMES)} or table:n,...,n (16 ascending "
            "integers from -128 to 127). Fix: pick one of them"
        ) from error


#: hqdit is the paper: full rotation, format selection, GPTQ. minmax is the baseline without any of them.
PRESETS: dict[str, QuantizationConfig] = {
    "hqdit": QuantizationConfig(),
    "minmax": QuantizationConfig(weights="e2m1", rotation="none", gptq=False),
}
DEFAULT_PRESET = "hqdit"
