"""Give a model that hqdit quantized or loaded what diffusers' own methods look for."""

from __future__ import annotations

from typing import Any, NoReturn, cast

from diffusers.configuration_utils import FrozenDict
from torch import nn

from hqdit.errors import UsageError
from hqdit.integrations.diffusers_config import HQDiTConfig
from hqdit.integrations.diffusers_quantizer import HQDiTQuantizer
from hqdit.integrations.model_tensors import tie
from hqdit.pipeline.checkpoint import equal_tensors
from hqdit.pipeline.dequantize import dequantize
from hqdit.pipeline.description import describe
from hqdit.pipeline.record import QuantizationRecord


def attach(model: nn.Module) -> nn.Module:
    """Make `save_pretrained`, `dequantize` and diffusers' guards work on a quantized model, as after `from_pretrained`.

    Equal tensors are held once from here on. A float model, and one that is attached already, stays as it is.
    """
    record: QuantizationRecord | None = getattr(model, "quantization_record", None)
    if record is None or getattr(model, "hf_quantizer", None) is not None:
        return model
    quantizer = HQDiTQuantizer(config_of(model, record), pre_quantized=True)
    quantizer.tensor_names = frozenset(model.state_dict())
    announce(model, quantizer)
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = quantizer.quantization_config.quant_method
    model.hf_quantizer = quantizer
    return model


def config_of(model: nn.Module, record: QuantizationRecord) -> HQDiTConfig:
    """The description of a quantized model, whose equal tensors are held once from here on."""
    if record.shared is None:
        record.shared = equal_tensors(model.state_dict(), record.dtypes)
    tie(model, record.shared)
    return HQDiTConfig.of_description(describe(model, record, record.shared), record.config)


def announce(model: nn.Module, quantizer: HQDiTQuantizer) -> None:
    """Write the quantizer's config into the model's, and refuse what would spoil the model without a word."""
    cast(Any, model).register_to_config(quantization_config=quantizer.quantization_config)
    cast(Any, model).enable_layerwise_casting = _refuse_layerwise_casting


def detach(model: nn.Module) -> nn.Module:
    """Float layers instead of quantized ones, and nothing left that says otherwise."""
    dequantize(model, cast(Any, model).config.get("_pre_quantization_dtype"))
    any_model = cast(Any, model)
    rest = {key: value for key, value in any_model.config.items() if key != "quantization_config"}
    any_model._internal_dict = FrozenDict(rest)
    del any_model.enable_layerwise_casting, any_model.quantization_method
    return model


def _refuse_layerwise_casting(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise UsageError(
        "enable_layerwise_casting: found a model quantized by hqdit, whose float tensors are biases that 8 bits would "
        "spoil, needed a float model. Fix: leave it out; the weights take 4 bits already"
    )
