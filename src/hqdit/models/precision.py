"""A model in another dtype, but for the modules that its class keeps in float32."""

from __future__ import annotations

import torch
from torch import nn


def stays_in_float32(model: nn.Module, name: str) -> bool:
    """Whether a tensor or module lies in a module that the class of `model` names in `_keep_in_fp32_modules`."""
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return not set(name.split(".")).isdisjoint(kept)


def to_dtype(model: nn.Module, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """`model`, changed in place: on `device`, with its float tensors in `dtype`.

    Tensors below a module that the class names in `_keep_in_fp32_modules` keep their float32, as they do when diffusers
    loads such a model. It is not diffusers' own `to`, which only warns that they are not kept.
    """
    exact = {
        name: tensor.data
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.dtype == torch.float32 and stays_in_float32(model, name)
    }
    nn.Module.to(model, device=device, dtype=dtype)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in exact:
            tensor.data = exact[name].to(device)
    return model
