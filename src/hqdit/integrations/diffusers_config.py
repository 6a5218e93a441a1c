"""The quantization config that diffusers sees: a request, or the description of a quantized checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from enum import StrEnum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from hqdit.errors import UsageError
from hqdit.integrations.registration import register
from hqdit.pipeline.config import QuantizationConfig

# diffusers imports this module while it imports itself: nothing here may need diffusers' models.


class QuantMethod(StrEnum):
    """diffusers asks a method for its `value`."""

    HQDIT = "hqdit"


class HQDiTConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What `from_pretrained` quantizes to while it loads; the diffusers face of `QuantizationConfig`.

    Without arguments weights and activations have 4 bits, and everything is as `QuantizationConfig` has it but for
    `gptq`, which needs calibration data that diffusers cannot hand over.

    Attributes:
        quant_method: "hqdit".
        request: what is asked for, or what was asked for when the checkpoint was made.
        description: the quantization_config of a quantized model as docs/checkpoint.md has it, or None for a request.

    Raises:
        UsageError: an unknown setting, a value out of range, or a request that needs calibration.
    """

    def __init__(self, **settings: Any) -> None:
        """A request; the settings are the fields of `QuantizationConfig`."""
        method = settings.pop("quant_method", QuantMethod.HQDIT)
        if method != QuantMethod.HQDIT:
            raise UsageError(f"HQDiTConfig.quant_method: found {method!r}, needed 'hqdit'. Fix: leave it out")
        self.quant_method = QuantMethod.HQDIT
        self.request = QuantizationConfig.from_json({"gptq": False, **settings})
        self.description: dict[str, Any] | None = None
        if self.request.needs_calibration:
            raise UsageError(
                "HQDiTConfig: found GPTQ, smoothing or static scales, which need calibration data, needed a data-free "
                "request, because from_pretrained has no data. Fix: quantize the loaded float model with "
                "hqdit.quantize(model, config, calibration), or a folder with the command hqdit quantize"
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A config from the settings of a request, or from a checkpoint's quantization_config.

        Args:
            config_dict: see above.
            return_unused_kwargs: return the pair of the config and `kwargs`, of which none is ever used.
            kwargs: not used.

        Raises:
            UsageError: as for the class.
            CheckpointError: a quantization_config that cannot be read.
        """
        from hqdit.pipeline.description import KEYS, read_description

        if (KEYS - {"quant_method"}) & config_dict.keys():
            config = cls.of_description(config_dict, read_description(config_dict, "config.json").record.config)
        else:
            config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    @classmethod
    def of_description(cls, description: dict[str, Any], request: QuantizationConfig) -> HQDiTConfig:
        """The config of a quantized model.

        Args:
            description: what `pipeline.description.describe` gives.
            request: the one inside it.
        """
        config = cls()
        config.request, config.description = request, copy.deepcopy(description)
        return config

    def to_dict(self) -> dict[str, Any]:
        """What stands in config.json; `from_dict` is the inverse."""
        if self.description is not None:
            return copy.deepcopy(self.description)
        return {"quant_method": self.quant_method.value, **self.request.to_json()}

    def to_diff_dict(self) -> dict[str, Any]:
        """The request's settings that are not those of a config without arguments."""
        default = HQDiTConfig().to_dict()
        asked = {"quant_method": self.quant_method.value, **self.request.to_json()}
        return {key: value for key, value in asked.items() if key == "quant_method" or value != default.get(key)}

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Nothing: a config stays as it was made. Returns all of `kwargs` as unused."""
        return kwargs

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.to_dict().items())

    def __repr__(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.to_diff_dict().items() if key != "quant_method")
        return f"HQDiTConfig({settings})"


register()
