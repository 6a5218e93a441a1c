"""From a quantized model back to float layers."""

from __future__ import annotations

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import nn

from hqdit.errors import UsageError
from hqdit.layers.linear import HQLinear
from hqdit.layers.pointwise_conv import HQPointwiseConv2d
from hqdit.models.adapter import adapter_for


@torch.no_grad()
def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every quantized layer by a float layer with the weight that its codes stand for.

    Inputs are not rounded any more. Where layers were changed to deliver rotated or smoothed inputs they still do, and
    the new weights expect such inputs. No two tensors of the result have common memory.

    Args:
        model: quantized, changed in place.
        dtype: of the new weights and biases; None is that of the model's first parameter.

    Returns:
        `model`, without its `QuantizationRecord`.

    Raises:
        UsageError: not quantized, or a layer whose tensors are not in memory.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, HQLinear)}
    if not layers:
        raise UsageError("dequantize: found no quantized layer, needed a quantized model. Fix: use the model as it is")
    for name, layer in layers.items():
        if layer.qweight.is_meta:
            raise UsageError(
                f"{name}: found a layer whose weights are not in memory, needed them there. Fix: load the model "
                "without offloading, or remove the offloading first"
            )
    adapter_for(model).unfuse(model)
    dtype = dtype or next(parameter.dtype for parameter in model.parameters())
    for name, layer in layers.items():
        replacement = _float_layer(layer, dtype)
        hook = getattr(layer, "_hf_hook", None)
        if hook is not None:  # of accelerate, which moves the inputs of a layer to its device
            remove_hook_from_module(layer)
            add_hook_to_module(replacement, hook)
        model.set_submodule(name, replacement)
    _untie(model)
    if hasattr(model, "quantization_record"):
        del model.quantization_record
    if hasattr(model, "source_dtypes"):
        del model.source_dtypes  # of the float model that was quantized; this one is stored as it is
    return model


def _float_layer(layer: HQLinear, dtype: torch.dtype) -> nn.Module:
    weight, bias = layer.delivered_weight().to(dtype), layer.delivered_bias()
    has_bias = bias is not None
    replacement: nn.Linear | nn.Conv2d
    if isinstance(layer, HQPointwiseConv2d):
        replacement = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=has_bias, device="meta")
        weight = weight[:, :, None, None]
    else:
        replacement = nn.Linear(layer.in_features, layer.out_features, bias=has_bias, device="meta")
    replacement.weight = nn.Parameter(weight)
    if bias is not None:
        replacement.bias = nn.Parameter(bias.detach().to(dtype))
    return replacement.train(layer.training)


def _untie(model: nn.Module) -> None:
    """Give every tensor memory of its own, which diffusers needs to save a float model."""
    seen: set[int] = set()
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            address = tensor.untyped_storage().data_ptr()
            if address in seen:
                own = tensor.detach().clone()
                is_parameter = isinstance(tensor, nn.Parameter)
                setattr(module, name, nn.Parameter(own, tensor.requires_grad) if is_parameter else own)
            seen.add(address)
