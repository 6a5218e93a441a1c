"""The answer for one layer: formats, granularities and rotation, as frozen plain data."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from hqdit.errors import CheckpointError, HQDiTError, UsageError
from hqdit.formats.catalog import format_from_json
from hqdit.formats.number_format import NumberFormat
from hqdit.transforms.rotation import ROTATION_KINDS, RotationSpec

WEIGHT_GRANULARITIES = ("tensor", "channel", "group")
#: token: a dynamic scale per token. group: a dynamic scale per token and group of channels. tensor: one static scale.
#: channel: a static scale per channel, folded into the weight, and no dynamic one (the paper's per-channel
#: quantization). channel-token: the same static scales, then a dynamic scale per token.
ACTIVATION_GRANULARITIES = ("token", "group", "tensor", "channel", "channel-token")
#: Those whose scales come from calibration data.
STATIC_GRANULARITIES = ("tensor", "channel", "channel-token")

#: Those that compute a scale for each token, or for each of its groups.
DYNAMIC_GRANULARITIES = ("token", "group", "channel-token")

#: What a dynamic scale is proportional to: the largest magnitude, or the root mean square.
ACTIVATION_SCALE_RULES = ("absmax", "rms")
#: How the scales of groups are kept: as they are, or in 8 bits relative to a unit that they share (see
#: `quantizers.short_scales`).
SCALE_FORMATS = ("float32", "e4m3")

#: Where the factors that smooth a layer's input are applied: nowhere, by the layers before it, or by the layer.
SMOOTHING_PLACES = ("none", "folded", "applied")

#: What is subtracted from an input before anything is rounded: nothing; every channel's mean over calibration data,
#: whose product the bias holds; or, after that, the mean of what is left over the tokens of each sample, which goes
#: through the layer in 8 bits.
CENTRINGS = ("none", "static", "sample")

#: The dtype in which the static mean of a centred input is stored; what rounding takes from it the bias does not see.
SHIFT_DTYPE = torch.bfloat16

INT32_MAX = 2**31 - 1
FLOAT32_BITS = 32


def require_group_size(group_size: int | None, width: int, where: str) -> int:
    """`group_size` if it is a multiple of 4 that divides `width`.

    Raises:
        UsageError: it is not; the message lists the sizes that work.
    """
    if not isinstance(group_size, int) or group_size < 4 or group_size % 4 or width % group_size:
        sizes = [size for size in range(4, width + 1, 4) if width % size == 0]
        raise UsageError(
            f"{where}: found group size {group_size} on width {width}, needed a multiple of 4 that divides it. "
            f"Fix: choose one of {sizes}"
        )
    return group_size


@dataclass(frozen=True)
class WeightSpec:
    """Weight of one layer.

    Attributes:
        formats: one format, or several where each output channel chose its own (the layer then holds an index).
        granularity: one of `WEIGHT_GRANULARITIES`.
        group_size: input channels that share a scale; None unless the granularity is group.
        low_rank: rank of the 16-bit branch beside the codes, which then stand for what the branch leaves; 0 for none.
        scale_format: one of `SCALE_FORMATS`; "e4m3" for granularity group only.
    """

    formats: tuple[NumberFormat, ...]
    granularity: str = "channel"
    group_size: int | None = None
    low_rank: int = 0
    scale_format: str = "float32"

    @property
    def has_short_scales(self) -> bool:
        """Whether scales are kept in 8 bits, relative to a unit of their output channel."""
        return self.scale_format == "e4m3"

    def scale_shape(self, out_features: int, in_features: int) -> tuple[int, int]:
        """Shape of the scales: (1, 1), (out_features, 1) or (out_features, groups)."""
        if self.granularity == "tensor":
            return (1, 1)
        return (out_features, in_features // self.group_size if self.group_size else 1)


@dataclass(frozen=True)
class ActivationSpec:
    """Input of one layer.

    Attributes:
        format: of the levels.
        granularity: one of `ACTIVATION_GRANULARITIES`.
        group_size: channels of a token that share a scale; None unless the granularity is group.
        smoothing: one of `SMOOTHING_PLACES`.
        scale_rule: one of `ACTIVATION_SCALE_RULES`, for dynamic scales.
        scale_factor: a dynamic scale is this times absmax / top, or this times the root mean square. Below 1, the
            largest numbers under absmax saturate.
        scale_format: one of `SCALE_FORMATS`; "e4m3" for granularity group only.
        centring: one of `CENTRINGS`.
        emphasis: number of directions in which the input is stretched before the rotation (`quantizers.emphasis`).
    """

    format: NumberFormat
    granularity: str = "token"
    group_size: int | None = None
    smoothing: str = "none"
    scale_rule: str = "absmax"
    scale_factor: float = 1.0
    scale_format: str = "float32"
    centring: str = "none"
    emphasis: int = 0

    def bits_per_number(self, width: int) -> float:
        """Bits of the codes and of the dynamic scales for each number of an input of `width` channels."""
        scales = width // self.group_size if self.group_size else int(self.has_dynamic_scale)
        # Short scales have 8 bits each, and the exponent of the unit that a token's scales share has 8.
        scale_bits = 8 * (scales + 1) if self.has_short_scales else FLOAT32_BITS * scales
        return self.format.bits + scale_bits / width

    @property
    def has_dynamic_scale(self) -> bool:
        """Whether each token, or each of its groups, gets a scale of its own."""
        return self.granularity in DYNAMIC_GRANULARITIES

    @property
    def has_short_scales(self) -> bool:
        """Whether the scales of a token's groups are rounded to 8 bits, relative to a unit of the token."""
        return self.scale_format == "e4m3"

    @property
    def has_channel_scale(self) -> bool:
        """Whether static per-channel scales are folded into the weight."""
        return self.granularity in ("channel", "channel-token")

    @property
    def has_static_scale(self) -> bool:
        """Whether the layer holds one static scale instead of computing a scale per token."""
        return self.granularity == "tensor"

    @property
    def needs_calibration(self) -> bool:
        """Whether scales come from calibration data."""
        return self.granularity in STATIC_GRANULARITIES


@dataclass(frozen=True)
class LinearSpec:
    """Everything that the shapes and the arithmetic of one quantized linear layer follow from.

    Raises:
        UsageError: a granularity, group size or width that cannot work; the message names the layer.
    """

    name: str
    in_features: int
    out_features: int
    weight: WeightSpec
    activation: ActivationSpec
    rotation: RotationSpec

    def __post_init__(self) -> None:
        if self.weight.granularity not in WEIGHT_GRANULARITIES:
            raise UsageError(
                f"{self.name}: found weight granularity {self.weight.granularity!r}, needed one of "
                f"{', '.join(WEIGHT_GRANULARITIES)}. Fix: pick one of them"
            )
        if self.activation.granularity not in ACTIVATION_GRANULARITIES:
            raise UsageError(
                f"{self.name}: found activation granularity {self.activation.granularity!r}, needed one of "
                f"{', '.join(ACTIVATION_GRANULARITIES)}. Fix: pick one of them"
            )
        if self.activation.smoothing not in SMOOTHING_PLACES:
            raise UsageError(
                f"{self.name}: found smoothing {self.activation.smoothing!r}, needed one of "
                f"{', '.join(SMOOTHING_PLACES)}. Fix: pick one of them"
            )
        self._require_rank()
        self._require_centring()
        self._require_emphasis()
        self._require_scales()
        for side in (self.weight, self.activation):
            if side.granularity == "group":
                require_group_size(side.group_size, self.in_features, self.name)
            elif side.group_size is not None:
                raise UsageError(
                    f"{self.name}: found group size {side.group_size} with granularity {side.granularity!r}, needed "
                    "none. Fix: use granularity group, or no group size"
                )
        if self.rotation.width != self.in_features:
            raise UsageError(
                f"{self.name}: found a rotation of width {self.rotation.width} on {self.in_features} input channels, "
                "needed equal ones. Fix: plan the rotation for this layer"
            )
        both = self.weight.group_size, self.activation.group_size
        if None not in both and both[0] != both[1]:
            raise UsageError(
                f"{self.name}: found groups of {both[0]} for weights and {both[1]} for activations, needed equal "
                "ones, because a group's sum has one scale. Fix: give both the same group size"
            )
        if any(not fmt.is_signed for fmt in self.weight.formats):
            raise UsageError(
                f"{self.name}: found a one-sided table for the weights, needed a signed format. "
                "Fix: use one-sided tables for activations only"
            )
        if len({fmt.bits > 4 for fmt in self.weight.formats}) > 1 or len({f.is_int8 for f in self.weight.formats}) > 1:
            raise UsageError(
                f"{self.name}: found weight formats of different storage, needed formats of equal size per channel. "
                "Fix: choose among 4-bit formats"
            )
        if self.in_features < 2:
            raise UsageError(
                f"{self.name}: found {self.in_features} input channels, needed at least 2. Fix: --exclude this layer"
            )
        if self.in_features % 2 and any(fmt.bits <= 4 for fmt in self.weight.formats):
            raise UsageError(
                f"{self.name}: found {self.in_features} input channels, needed an even number because two 4-bit "
                "codes share a byte. Fix: --exclude this layer or use an 8-bit format"
            )
        largest = max(max(-fmt.levels[0], fmt.max_level) for fmt in self.weight.formats)
        top = max(-self.activation.format.levels[0], self.activation.format.max_level)
        if self.is_int8 and largest * top * self.in_features > INT32_MAX:
            raise UsageError(
                f"{self.name}: found {self.in_features} input channels, needed at most {INT32_MAX // (largest * top)} "
                f"so that int32 sums of {self.weight.formats[0]} x {self.activation.format} are exact. "
                "Fix: --exclude this layer"
            )

    def _require_rank(self) -> None:
        rank, largest = self.weight.low_rank, min(self.in_features, self.out_features)
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank <= largest:
            raise UsageError(
                f"{self.name}: found a low-rank branch of rank {rank} on {self.in_features} -> {self.out_features} "
                f"channels, needed an integer from 0 to {largest}. Fix: change --low-rank or --exclude this layer"
            )
        if rank and self.rotation.is_folded:
            raise UsageError(
                f"{self.name}: found a low-rank branch behind a rotation that is folded into the value projection, "
                "needed the unrotated input. Fix: use --no-fold-value-rotation"
            )

    def _require_centring(self) -> None:
        activation = self.activation
        if activation.centring not in CENTRINGS:
            raise UsageError(
                f"{self.name}: found centring {activation.centring!r}, needed one of {', '.join(CENTRINGS)}. "
                "Fix: pick one of them"
            )
        if activation.centring == "sample" and activation.granularity in STATIC_GRANULARITIES:
            raise UsageError(
                f"{self.name}: found centring by sample with activation granularity {activation.granularity!r}, needed "
                "scales that are found for each token. Fix: use granularity token or group, or --centring static"
            )

    def _require_emphasis(self) -> None:
        rank = self.activation.emphasis
        if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank <= self.in_features:
            raise UsageError(
                f"{self.name}: found {rank} emphasised directions on {self.in_features} input channels, needed an "
                f"integer from 0 to {self.in_features}. Fix: change --emphasis or --exclude this layer"
            )
        if rank and self.rotation.is_folded:
            raise UsageError(
                f"{self.name}: found emphasised directions behind a rotation that is folded into the value projection, "
                "needed the unrotated input. Fix: use --no-fold-value-rotation"
            )

    def _require_scales(self) -> None:
        activation, factor = self.activation, self.activation.scale_factor
        if activation.scale_rule not in ACTIVATION_SCALE_RULES:
            raise UsageError(
                f"{self.name}: found the activation scale rule {activation.scale_rule!r}, needed one of "
                f"{', '.join(ACTIVATION_SCALE_RULES)}. Fix: pick one of them"
            )
        is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
        if not is_number or not 0 < factor < math.inf:
            raise UsageError(
                f"{self.name}: found the activation scale factor {factor!r}, needed a positive number. Fix: use 1 for "
                "scales of the whole range, or less to let the largest numbers saturate"
            )
        if not activation.has_dynamic_scale and (activation.scale_rule, factor) != ("absmax", 1):
            raise UsageError(
                f"{self.name}: found the activation scale rule {activation.scale_rule!r} with factor {factor} and "
                f"granularity {activation.granularity!r}, whose scales are static, needed one of "
                f"{', '.join(DYNAMIC_GRANULARITIES)}. Fix: use one of these, or rule absmax with factor 1"
            )
        for what, side in (("weight", self.weight), ("activation", activation)):
            if side.scale_format not in SCALE_FORMATS:
                raise UsageError(
                    f"{self.name}: found the {what} scale format {side.scale_format!r}, needed one of "
                    f"{', '.join(SCALE_FORMATS)}. Fix: pick one of them"
                )
            if side.has_short_scales and side.granularity != "group":
                raise UsageError(
                    f"{self.name}: found {what} scales in {side.scale_format} with granularity {side.granularity!r}, "
                    "needed granularity group, because such scales share a unit. Fix: use groups, or scale format "
                    "float32"
                )

    @property
    def is_int8(self) -> bool:
        """Whether the product runs as an exact int8 product; otherwise it runs dequantized in float32."""
        return self.activation.format.is_int8 and all(fmt.is_int8 for fmt in self.weight.formats)

    @property
    def arithmetic(self) -> str:
        """What `is_int8` says, in a word for records: "int8" or "float32"."""
        return "int8" if self.is_int8 else "float32"

    def to_json(self) -> dict[str, Any]:
        """Plain values for the checkpoint, without the name, which is the key."""
        weight: dict[str, Any] = {
            "formats": [fmt.to_json() for fmt in self.weight.formats],
            "granularity": self.weight.granularity,
        }
        activation: dict[str, Any] = {
            "format": self.activation.format.to_json(),
            "granularity": self.activation.granularity,
        }
        for side, spec in ((weight, self.weight), (activation, self.activation)):
            if spec.group_size is not None:
                side["group_size"] = spec.group_size
            if spec.scale_format != "float32":
                side["scale_format"] = spec.scale_format
        if self.weight.low_rank:
            weight["low_rank"] = self.weight.low_rank
        if self.activation.smoothing != "none":
            activation["smoothing"] = self.activation.smoothing
        if self.activation.scale_rule != "absmax":
            activation["scale_rule"] = self.activation.scale_rule
        if self.activation.scale_factor != 1:
            activation["scale_factor"] = self.activation.scale_factor
        if self.activation.centring != "none":
            activation["centring"] = self.activation.centring
        if self.activation.emphasis:
            activation["emphasis"] = self.activation.emphasis
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            "arithmetic": self.arithmetic,
            "weight": weight,
            "activation": activation,
            "rotation": self.rotation.to_json(),
        }

    @classmethod
    def from_json(cls, name: str, value: dict[str, Any]) -> LinearSpec:
        """The inverse of `to_json`.

        Raises:
            CheckpointError: keys missing or values out of range; the message names the layer.
        """
        try:
            weight, activation, rotation = value["weight"], value["activation"], value["rotation"]
            if rotation["kind"] not in ROTATION_KINDS:
                raise UsageError(f"found rotation {rotation['kind']!r}, needed one of {', '.join(ROTATION_KINDS)}")
            spec = cls(
                name,
                int(value["in_features"]),
                int(value["out_features"]),
                WeightSpec(
                    tuple(format_from_json(fmt) for fmt in weight["formats"]),
                    weight["granularity"],
                    weight.get("group_size"),
                    weight.get("low_rank", 0),
                    weight.get("scale_format", "float32"),
                ),
                ActivationSpec(
                    format_from_json(activation["format"]),
                    activation["granularity"],
                    activation.get("group_size"),
                    activation.get("smoothing", "none"),
                    activation.get("scale_rule", "absmax"),
                    activation.get("scale_factor", 1.0),
                    activation.get("scale_format", "float32"),
                    activation.get("centring", "none"),
                    activation.get("emphasis", 0),
                ),
                RotationSpec.from_json(rotation, int(value["in_features"])),
            )
            if not spec.rotation.is_identity and rotation["factors"] != spec.rotation.describe():
                raise UsageError(f"found rotation {rotation['factors']!r}, needed {spec.rotation.describe()!r}")
            # An unknown key, or a value that says something else than the rest; as text, because true equals 1.
            if json.dumps(spec.to_json(), sort_keys=True) != json.dumps(value, sort_keys=True):
                raise UsageError(f"needed exactly {spec.to_json()!r}")
            return spec
        except (KeyError, TypeError, ValueError, HQDiTError) as error:
            raise CheckpointError(
                f"layer {name} of quantization_config: found {value!r}, needed a layer specification of format "
                f"version 1 ({error}). Fix: quantize the model again"
            ) from error
